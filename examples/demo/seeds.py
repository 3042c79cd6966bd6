"""The demo's table over several seeds: mean and standard deviation per row, and of the differences between rows.

    python -m examples.demo.seeds --seeds 5 --out runs/seeds

A seed fixes the scenes, the host's initial weights, the order of the batches and the prompts. The seeds are 1, 2, ...;
the demo's settings were chosen on seed 0. Finished seeds are kept in the folder and run again only if code or CLIP changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np

import semples_plugin

from . import experiment
from .experiment import (
    ALIGNED,
    HAND,
    HOST,
    HOST_ALIGNED,
    HOST_OPTIMISED,
    HOST_SUPPRESSED,
    LEARNED,
    MATCH,
    MATCH_ALIGNED,
    SUPPRESSED,
)
from .world import THINGS


def run_seed(seed: int) -> Dict[str, Any]:
    """Rows of one seed as plain numbers."""
    result = experiment.run(experiment.Settings(), seed)
    return {
        "rows": {name: {"miou": row.miou, "share": row.share, "threshold": row.threshold} for name, row in result.rows.items()},
        "words": {r.name: r.words for r in result.readings},
    }


def kept(folder: Path, seed: int, made_with: str, run: Callable[[int], Dict[str, Any]]) -> Dict[str, Any]:
    """The record of a seed, read from its file if that was made with the same code, else run and written."""
    path = folder / f"seed_{seed}.json"
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["made_with"] == made_with:
            return record
    text = json.dumps({"made_with": made_with, **run(seed)}, indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
    return json.loads(text)  # as a later run will read it


def source_hash(*more: Path) -> str:
    """Of everything that a seed's figures depend on: the package, the demo and its CLIP, and further folders of code."""
    digest = hashlib.sha256()
    for folder in (Path(semples_plugin.__file__).parent, Path(__file__).parent, *more):
        for path in sorted((*folder.glob("*.py"), *folder.glob("*.pt"), *folder.glob("*.json"))):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def summary(records: List[Dict[str, Any]]) -> str:
    """Mean and standard deviation (n - 1) per row, and of the paired differences that matter."""
    miou = {name: np.array([100 * r["rows"][name]["miou"] for r in records]) for name in records[0]["rows"]}
    share = {name: np.array([100 * np.mean([r["rows"][name]["share"][k] for k in THINGS]) for r in records]) for name in miou}
    lines = [f"{'':46s} {'mIoU':>14s} {'co-occurrence share':>22s}   thresholds"]
    for name in miou:
        chosen = " ".join(f"{r['rows'][name]['threshold']:.2f}" for r in records)
        lines.append(f"{name:46s} {spread(miou[name]):>14s} {spread(share[name]) + ' %':>22s}   {chosen}")
    lines.append("")
    compared = ((LEARNED, HOST), (LEARNED, MATCH), (LEARNED, HAND))
    compared += ((ALIGNED, HOST_ALIGNED), (ALIGNED, MATCH_ALIGNED), (SUPPRESSED, ALIGNED))
    compared += ((HOST_SUPPRESSED, HOST_ALIGNED), (HOST_OPTIMISED, HOST_ALIGNED), (ALIGNED, HOST_OPTIMISED))
    for better, worse in compared:
        for title, values in (("mIoU", miou), ("share", share)):
            difference = values[better] - values[worse]
            ratio = abs(difference.mean()) / max(difference.std(ddof=1), 1e-9)
            lines.append(f"{title:5s} [{better}] - [{worse}]: {spread(difference)}, {ratio:.1f} standard deviations")
    return "\n".join(lines)


def spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} +- {values.std(ddof=1):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 1; at least 2")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("a standard deviation needs --seeds 2 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    text = summary([kept(args.out, seed, source_hash(), run_seed) for seed in range(1, args.seeds + 1)])
    (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
