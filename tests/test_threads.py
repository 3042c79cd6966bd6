"""One refiner, many threads: what each call returns is what it returns alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor

from semples_plugin import PromptRefiner

Call = Callable[[PromptRefiner, Tensor, Tensor, Tensor], Any]


def gradient(refiner: PromptRefiner, img: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
    cam = cam.detach().requires_grad_(True)
    return torch.autograd.grad(refiner(img, cam, labels), cam)[0]


CALLS: Dict[str, Call] = {
    "forward": gradient,
    "compute": lambda refiner, *batch: refiner.compute(*batch),
    "refine_masks": lambda refiner, *batch: refiner.refine_masks(*batch, clip_steps=2),
    "refine_masks with suppression": lambda refiner, *batch: refiner.refine_masks(*batch, clip_steps=0, suppress=True),
    "optimize_cam": lambda refiner, *batch: refiner.optimize_cam(*batch, steps=2),
    "encode_backgrounds": lambda refiner, *batch: refiner.encode_backgrounds(*batch),
    "prompt_features": lambda refiner, *batch: refiner.prompt_features(),
    "nearest_words": lambda refiner, *batch: refiner.nearest_words(["rail", "water"], top=2),
    "check": lambda refiner, img, cam, labels: refiner.check([(img, labels)], lambda _: cam, progress=False),
}


def tensors(value: Any) -> List[Any]:
    """The tensors of a result, or the result's text where it holds none."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple) and all(isinstance(part, (Tensor, dict)) for part in value):
        return [one for part in value for one in tensors(part)]
    return [str(value)]


def same(a: Any, b: Any) -> bool:
    return torch.allclose(a, b, atol=1e-6) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", CALLS)
def test_results_of_eight_threads_are_those_of_one(name: str, make_refiner: Any, make_batch: Any) -> None:
    refiner, call = make_refiner(learned=True), CALLS[name]
    batches = [make_batch(seed=seed) for seed in range(16)]
    alone = [tensors(call(refiner, *batch)) for batch in batches]
    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            together = [tensors(result) for result in pool.map(lambda batch: call(refiner, *batch), batches)]
        for one, other in zip(alone, together):
            assert len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))


def test_different_methods_at_once(make_refiner: Any, make_batch: Any) -> None:
    refiner, batch = make_refiner(learned=True), make_batch()
    alone = {name: tensors(call(refiner, *batch)) for name, call in CALLS.items()}
    with ThreadPoolExecutor(8) as pool:
        jobs = [(name, pool.submit(CALLS[name], refiner, *batch)) for _ in range(3) for name in CALLS]
    for name, job in jobs:
        assert all(same(a, b) for a, b in zip(alone[name], tensors(job.result()))), name
