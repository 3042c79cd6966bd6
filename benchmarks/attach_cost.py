"""What attaching costs a host: python benchmarks/attach_cost.py --repo MCTformer

Two equal copies of the real MCTformer+ (its forward and losses, CPU, one thread) take steps in turn. One was never attached,
the other was attached, trained for three steps, and released. Their CPU time must be the same within noise. The steps with the
refiner attached are split into the refiner's forward pass and the rest. Forward passes are counted, not timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner, adapters
from semples_plugin.adapters.runner import compat
from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.clip_backends import openai_clip_module


def seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="a clone of xulianuwa/MCTformer")
    parser.add_argument("--size", type=int, default=224, help="image size; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of steps; default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    with compat.old_libraries(), compat.on_cpu():
        sys.path.insert(0, str(options.repo.resolve()))
        import models  # the host's

        torch.manual_seed(0)
        host = models.deit_small_MCTformerPlus(input_size=options.size, num_classes=20).train()
        measure(host, options.size, options.rounds)


def measure(host: nn.Module, size: int, rounds: int) -> None:
    img = torch.randn(2, 3, size, size)
    labels = torch.zeros(2, 20)
    labels[0, 3] = labels[1, 5] = labels[1, 14] = 1
    never, released = host, copy.deepcopy(host)
    clip = openai_clip_module("model").CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)  # ViT-B/32, random weights
    refiner = PromptRefiner(VOC_CLASSES, clip=clip)

    def step(model: nn.Module) -> None:
        outputs, _, patches = model(img)
        loss = F.multilabel_soft_margin_loss(outputs, labels) + F.multilabel_soft_margin_loss(patches, labels)
        model.zero_grad()
        loss.backward()

    forwards: List[int] = []
    counter = released.patch_embed.register_forward_hook(lambda *_: forwards.append(1))
    inside: List[float] = []
    compute = refiner.compute

    def timed(*batch: Tensor) -> Any:
        start = time.process_time()
        out = compute(*batch)
        inside.append(time.process_time() - start)
        return out

    refiner.compute = timed  # type: ignore[method-assign]
    with adapters.attach("mctformer", released, refiner) as attached:
        whole = [seconds(lambda: step(released)) for _ in range(3)][1:]
    print(f"attached: {attached.steps} steps, {len(forwards)} host forward passes")
    counter.remove()
    for model in (never, released):
        step(model)  # warm
    pairs = [(seconds(lambda: step(never)), seconds(lambda: step(released))) for _ in range(rounds)]
    first, second = (statistics.median(column) for column in zip(*pairs))
    ratios = [b / a for a, b in pairs]
    spread = statistics.quantiles(ratios, n=4)
    print(f"host step, never attached: {first:.3f} s; attached and released: {second:.3f} s (median CPU time of {rounds})")
    print(f"ratio: median {statistics.median(ratios):.3f}, quartiles {spread[0]:.3f} to {spread[2]:.3f}")
    print(f"host step with the refiner: {min(whole):.3f} s, of which the refiner's forward {min(inside[1:]):.3f} s")


if __name__ == "__main__":
    main()
