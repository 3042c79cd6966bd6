"""Pseudo labels with pixels left uncertain against those with one threshold, in the demo world.

    python -m examples.two_thresholds --ablation runs/ablation --seeds 1 2 3

Takes the weights that the ablation has kept. t is the threshold that is best on the validation scenes; figures are of the test
scenes, aligned to edges.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Dict, Sequence

import numpy as np
import torch

from semples_plugin.masks import UNCERTAIN, pseudo_labels

from .ablation.data import DemoWorld
from .ablation.experiment import kept_host, newest_parts, soft_masks
from .ablation.rows import HOST, MATCH
from .seeds import spread

FIGURES = ("uncertain", "precision of things", "precision of background", "things found")


def figures(labels: np.ndarray, truth: np.ndarray) -> Dict[str, float]:
    """Shares in percent.

    Args:
        labels: (N, S, S) pseudo labels, 255 where they are uncertain.
        truth: (N, S, S) label maps.
    """
    kept, things = labels != UNCERTAIN, truth > 0
    found = (labels == truth) & kept
    shares = (
        (~kept).mean(),
        found[kept & (labels > 0)].mean(),
        found[kept & (labels == 0)].mean(),
        found[things].mean(),
    )
    return {name: 100 * float(share) for name, share in zip(FIGURES, shares)}


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.two_thresholds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ablation", type=Path, required=True, help="folder of `python -m examples.ablation`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(%(default)s)")
    args = parser.parse_args(argv or None)
    torch.set_num_threads(1)
    try:
        parts = newest_parts(args.ablation)
    except ValueError as error:
        parser.error(str(error))
    data = DemoWorld()
    print(f"| CAMs | thresholds | {' | '.join(FIGURES)} |\n|{'---|' * 6}")
    for row in (HOST, MATCH):
        found: Dict[float, Dict[int, Dict[str, float]]] = {}
        for seed in args.seeds:
            _, val, test = data.splits(seed)
            host = kept_host(parts, row, seed, len(data.classes))
            masks = [soft_masks(split, host.cams(split.images), True) for split in (val, test)]
            best = data.score(masks[0], val, masks[1], test)["threshold"]
            truth = np.stack([scene.things for scene in test.scenes])
            for step in (0.0, 0.1, 0.2):
                threshold = (best - step, best + step) if step else best
                one = figures(pseudo_labels(masks[1], threshold).numpy(), truth)
                found.setdefault(step, {})[seed] = one
        for step, by_seed in found.items():
            name = f"t - {step:g}, t + {step:g}" if step else "t"
            values = " | ".join(f"{spread([one[figure] for one in by_seed.values()], '±')} %" for figure in FIGURES)
            print(f"| {row} | {name} | {values} |", flush=True)


if __name__ == "__main__":
    main()
