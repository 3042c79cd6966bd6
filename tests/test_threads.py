"""One refiner serves several threads: every public method gives there what it gives alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import Tensor

from semples_plugin import PromptRefiner

THREADS, CALLS = 8, 48


def tensors(value: Any) -> List[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in tensors(item)]
    return [t for item in value for t in tensors(item)] if isinstance(value, (tuple, list)) else []


METHODS: Dict[str, Callable[[PromptRefiner, Any], Any]] = {
    "forward": lambda refiner, batch: refiner(*batch),
    "compute": lambda refiner, batch: refiner.compute(*batch),
    "refine_masks": lambda refiner, batch: refiner.refine_masks(*batch, clip_steps=2),
    "suppress": lambda refiner, batch: refiner.refine_masks(*batch, clip_steps=0, suppress=True),
    "optimize_cam": lambda refiner, batch: refiner.optimize_cam(*batch, steps=2),
    "encode_backgrounds": lambda refiner, batch: refiner.encode_backgrounds(*batch),
    "prompt_features": lambda refiner, batch: refiner.prompt_features(),
    "dense": lambda refiner, batch: refiner.encoder.encode_dense(torch.rand(2, 3, 32, 32, generator=seeded(batch))),
    "gradient": lambda refiner, batch: gradient(refiner, batch),
}


def seeded(batch: Any) -> torch.Generator:
    return torch.Generator().manual_seed(int(batch[0].sum()))


def gradient(refiner: PromptRefiner, batch: Any) -> Tensor:
    img, cam, labels = batch
    cam = cam.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(refiner(img, cam, labels), cam)
    return found


def test_eight_threads_over_every_method(make_refiner: Any) -> None:
    refiner = make_refiner(["boat", "train", "bird"], image_stats=None)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for k in range(4):
        labels = torch.zeros(2, 3)
        labels[0, k % 3] = labels[1, (k + 1) % 3] = labels[1, (k + 2) % 3] = 1
        cam = torch.rand(2, 3, 6, 6, generator=generator).requires_grad_(True)
        batches.append((torch.rand(2, 3, 40, 36, generator=generator), cam, labels))
    refiner.fit_prompts([(img, labels) for img, _, labels in batches], lambda img: torch.rand(len(img), 3, 6, 6), epochs=2,
                        progress=False)  # fmt: skip
    tasks = [(name, k) for k in range(len(batches)) for name in METHODS]
    alone = {task: tensors(METHODS[task[0]](refiner, batches[task[1]])) for task in tasks}
    again = [tasks[i % len(tasks)] for i in range(max(CALLS, 2 * len(tasks)))]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda task: tensors(METHODS[task[0]](refiner, batches[task[1]])), again))
    for task, values in zip(again, found):
        assert len(values) == len(alone[task]) > 0
        for value, expected in zip(values, alone[task]):
            assert torch.allclose(value, expected, atol=1e-6), task
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in refiner.modules())


@pytest.mark.filterwarnings("ignore")
def test_dense_features_leave_the_tower_as_it_was(make_refiner: Any) -> None:
    refiner = make_refiner(["boat"], image_stats=None)
    before = {name: id(module) for name, module in refiner.encoder.model.named_modules()}
    views = torch.rand(1, 3, 32, 32)
    first, second = refiner.encoder.encode_dense(views), refiner.encoder.encode_dense(views)
    assert torch.equal(first, second) and {n: id(m) for n, m in refiner.encoder.model.named_modules()} == before
