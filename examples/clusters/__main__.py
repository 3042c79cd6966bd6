"""The ablation of category clusters over several seeds: mean and standard deviation per row and cluster route.

    python -m examples.clusters --seeds 5 --out runs/clusters

A seed fixes the scenes, the host's initial weights, the order of the batches, the branch and the prompts. The seeds are 1, 2,
...; the settings were chosen on seed 0. The record of a finished seed is cached in the folder; it is computed again only if
code or CLIP changed. `--seed N` runs that seed alone, so that several processes can share the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np

from semples_plugin import adapters

from ..demo import world as demo_world
from ..seeds import cached_record, paired_difference, source_hash, spread
from . import experiment
from .experiment import BY_ROUTE, FILE, HOST, ROUTES, ROWS, TEXT, Figures


def run_seed(seed: int) -> Dict[str, Any]:
    """All figures of one seed as plain numbers."""
    result = experiment.run(experiment.Settings(), seed)
    return {
        "figures": {row: {route: _numbers(f) for route, f in columns.items()} for row, columns in result.figures.items()},
        "clusters": {route: c.as_dict() for route, c in result.clusters.items()},
    }


def _numbers(figures: Figures) -> Dict[str, Any]:
    rows = {"cam": figures.cam, "aligned": figures.aligned, "branch": figures.branch}
    plain: Dict[str, Any] = {
        name: None if row is None else {"miou": row.miou, "share": row.mean_share, "threshold": row.threshold}
        for name, row in rows.items()
    }
    return {**plain, "kin": figures.kin}


def summary(records: List[Dict[str, Any]]) -> str:
    """One line per row and route, then the differences from the host alone, paired by seed."""
    figures: List[Callable[[Dict[str, Any]], Optional[float]]] = [
        lambda f: f["cam"]["miou"],
        lambda f: f["aligned"]["miou"],
        lambda f: f["branch"] and f["branch"]["miou"],
        lambda f: f["cam"]["share"],
        lambda f: f["kin"],
    ]
    titles = ("mIoU", "aligned", "of the branch", "co-occurrence %", "called kin %")
    lines = [f"{'':36s} {'clusters from':14s} " + " ".join(f"{title:>16s}" for title in titles)]
    differences = []
    for row in ROWS:
        for route in ROUTES[row]:
            cells = []
            for figure in figures:
                values = [figure(record["figures"][row][route]) for record in records]
                cells.append("" if None in values else spread(100 * np.array(values, dtype=float)))
            name = route if row in BY_ROUTE else "-"
            lines.append(f"{row:36s} {name:14s} " + " ".join(f"{cell:>16s}" for cell in cells))
            if row != HOST:
                pair = [[100 * r["figures"][a][b]["cam"]["miou"] for r in records] for a, b in ((row, route), (HOST, FILE))]
                differences.append(f"mIoU [{row}, {name}] - [{HOST}]: {paired_difference(*pair)}")
    same = sum(groups(r["clusters"][TEXT]) == groups(r["clusters"][FILE]) for r in records)
    note = f"The text features gave the clusters of the file in {same} of {len(records)} seeds."
    return "\n".join([*lines, "", *differences, "", note])


def groups(clusters: Dict[str, List[str]]) -> frozenset:
    return frozenset(frozenset(members) for members in clusters.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.clusters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 1; at least 2 (%(default)s)")
    parser.add_argument("--seed", type=int, help="run this seed alone and print no table")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/clusters"), help="folder for the records and the table (%(default)s)"
    )
    args = parser.parse_args()
    if args.seed is None and args.seeds < 2:
        parser.error("--seeds must be 2 or more, for a standard deviation")
    args.out.mkdir(parents=True, exist_ok=True)
    made_with = source_hash(Path(__file__).parent, Path(demo_world.__file__).parent, Path(adapters.__file__).parent)
    seeds = range(1, args.seeds + 1) if args.seed is None else [args.seed]
    records = [cached_record(args.out, seed, made_with, run_seed) for seed in seeds]
    if args.seed is None:
        text = summary(records)
        (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
