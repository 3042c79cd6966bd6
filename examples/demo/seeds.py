"""The demo's table over several seeds: mean and standard deviation per row, and the differences between rows.

    python -m examples.demo.seeds --seeds 5 --out runs/seeds
    python -m examples.demo.seeds --rows "host alone" "+ area" "+ match"      the controls without the expensive rows

A seed fixes the scenes, the host's initial weights, the order of the batches and the prompts. The seeds are 1, 2, ...;
the demo's settings were chosen on seed 0. The record of a finished seed is cached in the folder; a row is computed again only
if code or CLIP changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np

from ..controls import random_clip
from ..seeds import cached_rows, paired_difference, select_rows, source_hash, spread
from . import experiment
from .experiment import (
    ALIGNED,
    AREA,
    AREA_ALIGNED,
    HAND,
    HOST,
    HOST_ALIGNED,
    HOST_REFINED,
    HOST_SUPPRESSED,
    LEARNED,
    LINEAR,
    LINEAR_ALIGNED,
    MATCH,
    MATCH_ALIGNED,
    NO_AREA,
    RANDOM,
    REFINED,
    ROWS,
    SUPPRESSED,
    Result,
    Settings,
    new_refiner,
)
from .host import make_split
from .world import THINGS

COMPARED = (
    (AREA, HOST), (RANDOM, HOST), (MATCH, HOST), (MATCH, AREA), (MATCH, RANDOM), (MATCH, NO_AREA),
    (LINEAR, AREA), (LINEAR, MATCH), (LEARNED, HOST), (LEARNED, MATCH), (LEARNED, HAND),
    (AREA_ALIGNED, HOST_ALIGNED), (MATCH_ALIGNED, HOST_ALIGNED), (MATCH_ALIGNED, AREA_ALIGNED),
    (LINEAR_ALIGNED, AREA_ALIGNED), (LINEAR_ALIGNED, MATCH_ALIGNED),
    (ALIGNED, HOST_ALIGNED), (ALIGNED, MATCH_ALIGNED), (SUPPRESSED, ALIGNED),
    (HOST_SUPPRESSED, HOST_ALIGNED), (HOST_REFINED, HOST_ALIGNED), (ALIGNED, HOST_REFINED),
    (REFINED, ALIGNED),
)  # fmt: skip


def run_seed(seed: int, rows: Sequence[str]) -> Dict[str, Any]:
    """Rows of one seed as plain numbers."""
    result = experiment.run(Settings(), seed, rows)
    record: Dict[str, Any] = {
        "rows": {
            name: {
                "miou": row.miou,
                "iou": row.iou,
                "share": row.share,
                "threshold": row.threshold,
                **checked(name, result, seed),
            }
            for name, row in result.rows.items()
        }
    }
    if result.nearest_words:
        record["words"] = {prompt.name: prompt.words for prompt in result.nearest_words}
    return record


def checked(row: str, result: Result, seed: int) -> Dict[str, Any]:
    """What `PromptRefiner.check` says of a row's loss beforehand, on the CAMs of the host alone: figures per class."""
    if row not in (MATCH, RANDOM) or HOST not in result.hosts:
        return {}
    settings = Settings()
    refiner = new_refiner(settings, seed)
    if row == RANDOM:
        refiner = new_refiner(settings, seed, random_clip(refiner.encoder.model, seed))
    loader = make_split(150, 10_000 + seed).batches(50)  # the first scenes of the training split
    report = refiner.check(loader, result.hosts[HOST].cam, progress=False)
    return {"check": [figures.as_dict() for figures in report.classes], "lambda_area": report.lambda_area}


def summary(records: List[Dict[str, Any]]) -> str:
    """Spread per row, and the differences between rows that are both there, paired by seed."""
    miou = {name: np.array([100 * r["rows"][name]["miou"] for r in records]) for name in records[0]["rows"]}
    share = {name: np.array([100 * np.mean([r["rows"][name]["share"][k] for k in THINGS]) for r in records]) for name in miou}
    lines = [f"{'':46s} {'mIoU':>14s} {'co-occurrence share':>22s}   thresholds"]
    for name in miou:
        chosen = " ".join(f"{r['rows'][name]['threshold']:.2f}" for r in records)
        lines.append(f"{name:46s} {spread(miou[name]):>14s} {spread(share[name]) + ' %':>22s}   {chosen}")
    lines.append(f"{len(records)} seeds; {len(miou)} of {len(ROWS)} rows")
    lines.append("")
    for better, worse in COMPARED:
        if better in miou and worse in miou:
            for title, values in (("mIoU", miou), ("share", share)):
                lines.append(f"{title:5s} [{better}] - [{worse}]: {paired_difference(values[better], values[worse])}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 1; at least 2 (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/seeds"), help="folder for the records and the table (%(default)s)"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows, or how their names begin; all by default")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more, for a standard deviation")
    try:
        rows = select_rows(ROWS, args.rows)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    made_with = source_hash(Path(__file__).parent)
    text = summary([cached_rows(args.out, seed, made_with, rows, run_seed) for seed in range(1, args.seeds + 1)])
    (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
