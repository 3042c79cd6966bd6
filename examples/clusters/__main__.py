"""The ablation of category clusters over several seeds: mean and standard deviation per row and cluster route.

    python -m examples.clusters --seeds 5 --out runs/clusters
    python -m examples.clusters --rows "host alone" "+ area" "+ match" "+ SemPLeS"      these rows alone

A seed fixes the scenes, the host's initial weights, the order of the batches, the branch and the prompts. The seeds are 1, 2,
...; the settings were chosen on seed 0. The record of a finished seed is cached in the folder; a row is computed again only if
code or CLIP changed. `--seed N` runs that seed alone, so that several processes can share the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np

from semples_plugin import adapters

from ..demo import world as demo_world
from ..seeds import cached_rows, paired_difference, select_rows, source_hash, spread
from . import experiment
from .experiment import AREA, BY_ROUTE, FILE, HOST, MATCH, RANDOM, ROUTES, ROWS, SEMPLES, TEXT, Figures

COMPARED = ((MATCH, AREA), (MATCH, RANDOM), (SEMPLES, AREA), (SEMPLES, MATCH))


def run_seed(seed: int, rows: Sequence[str]) -> Dict[str, Any]:
    """Rows of one seed as plain numbers."""
    result = experiment.run(experiment.Settings(), seed, rows)
    return {
        "rows": {row: {route: _numbers(f) for route, f in columns.items()} for row, columns in result.figures.items()},
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
    """One line per row and route, then differences paired by seed: from the host alone, and those of `COMPARED`."""
    figures: List[Callable[[Dict[str, Any]], Optional[float]]] = [
        lambda f: f["cam"]["miou"],
        lambda f: f["aligned"]["miou"],
        lambda f: f["branch"] and f["branch"]["miou"],
        lambda f: f["cam"]["share"],
        lambda f: f["kin"],
    ]
    titles = ("mIoU", "aligned", "of the branch", "co-occurrence %", "called kin %")
    lines = [f"{'':36s} {'clusters from':14s} " + " ".join(f"{title:>16s}" for title in titles)]
    rows = list(records[0]["rows"])
    compared = []
    for row in rows:
        for route in ROUTES[row]:
            cells = []
            for figure in figures:
                values = [figure(record["rows"][row][route]) for record in records]
                cells.append("" if None in values else spread(100 * np.array(values, dtype=float)))
            name = route if row in BY_ROUTE else "-"
            lines.append(f"{row:36s} {name:14s} " + " ".join(f"{cell:>16s}" for cell in cells))
            if row != HOST and HOST in rows:
                compared.append(((row, route), (HOST, FILE)))
    compared += [((a, FILE), (b, FILE)) for a, b in COMPARED if a in rows and b in rows]
    differences = []
    for better, worse in compared:
        for title in ("cam", "aligned"):
            pair = [[100 * r["rows"][row][route][title]["miou"] for r in records] for row, route in (better, worse)]
            names = [f"{row}, {route}" if row in BY_ROUTE else row for row, route in (better, worse)]
            label = "mIoU" if title == "cam" else "aligned"
            differences.append(f"{label} [{names[0]}] - [{names[1]}]: {paired_difference(*pair)}")
    same = sum(groups(r["clusters"][TEXT]) == groups(r["clusters"][FILE]) for r in records)
    note = f"The text features gave the clusters of the file in {same} of {len(records)} seeds."
    return "\n".join([*lines, f"{len(records)} seeds; {len(rows)} of {len(ROWS)} rows", "", *differences, "", note])


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
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows, or how their names begin; all by default")
    args = parser.parse_args()
    if args.seed is None and args.seeds < 2:
        parser.error("--seeds must be 2 or more, for a standard deviation")
    try:
        rows = select_rows(ROWS, args.rows)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    made_with = source_hash(Path(__file__).parent, Path(demo_world.__file__).parent, Path(adapters.__file__).parent)
    seeds = range(1, args.seeds + 1) if args.seed is None else [args.seed]
    records = [cached_rows(args.out, seed, made_with, rows, run_seed) for seed in seeds]
    if args.seed is None:
        text = summary(records)
        (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
