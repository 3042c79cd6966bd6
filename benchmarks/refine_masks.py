"""What `refine_masks` costs with and without CLIP: images per second of CPU time, one thread.

    OMP_NUM_THREADS=1 python benchmarks/refine_masks.py

Two CLIPs: the demo's own on images of 64 pixels, and the architecture of ViT-B/32 with random weights (nothing is downloaded)
on images of 224 pixels. Images and CAMs are random; three classes are present in every two images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from literal import random_clip

from semples_plugin import PromptRefiner
from semples_plugin.masks import CLIP_STEPS

DEMO_CLIP = Path(__file__).parents[1] / "examples" / "demo" / "world_clip.pt"


def images_per_second(clip: Any, size: int, count: int, clip_steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    img, cam = torch.rand(count, 3, size, size, generator=generator), torch.rand(count, 3, 14, 14, generator=generator)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]]).repeat(count // 2, 1)
    refiner = PromptRefiner(["boat", "train", "bird"], clip=clip, image_stats=None)
    refiner.refine_masks(img[:2], cam[:2], labels[:2], clip_steps=min(clip_steps, 1))  # warm up
    start = time.process_time()
    refiner.refine_masks(img, cam, labels, clip_steps=clip_steps)
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=CLIP_STEPS, help="of the rows with CLIP (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, clip, size, count in (("demo's CLIP", str(DEMO_CLIP), 64, 32), ("ViT-B/32, random", random_clip(), 224, 2)):
        without, with_clip = (images_per_second(clip, size, count, steps) for steps in (0, options.steps))
        print(f"{name}, {size} pixels: {without:.1f} images/s without CLIP, {with_clip:.2f} with {options.steps} steps")


if __name__ == "__main__":
    main()
