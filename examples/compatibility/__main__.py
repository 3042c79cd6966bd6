"""The compatibility table: the real networks of public repositories, each alone, with a control, and with the add-ons.

    python -m examples.compatibility --repos HOSTS --seeds 3 --jobs 2 --out runs/compatibility

HOSTS holds clones of MCTformer, WeakTr, TransCAM and ToCo, by these names; timm is a package. Each network is built small by
its own constructors with random weights, trained on the demo world with image-level labels, and trained on from there with the
add-on through `adapters.attach`; SemPLeS learns its prompts along the way (`online_steps`). Writes table.md, table.csv and
table.png. A finished cell is not computed again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from pathlib import Path
from typing import Any, Dict, List, Sequence

from semples_plugin import adapters

from ..cells import Cell, run_cells
from ..demo import experiment as demo
from ..hosts import HOSTS
from ..recipe import COMPACT_CLIP
from ..seeds import source_hash
from ..tables import Line, as_csv, as_markdown, draw
from .experiment import ADDONS, ALONE, AREA, BASE, BOTH, CLUSTERS, SEMPLES, Settings, row_name, run_cell

FIGURES = ["mIoU", "mIoU, aligned", "co-occurrence share", "classification AP"]
AGAINST = {AREA: ALONE, SEMPLES: AREA, CLUSTERS: ALONE, BOTH: SEMPLES}
LR = {"demo": 2e-3, "mctformer": 1e-3, "weaktr": 1e-3, "transcam": 1e-3, "toco": 1e-3, "resnet10t": 1e-3}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.compatibility", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--repos", type=Path, help="folder with clones of the hosts' repositories")
    add("--hosts", nargs="+", choices=HOSTS, default=[name for name in HOSTS if name != "demo"], help="hosts; all by default")
    add("--addons", nargs="+", choices=ADDONS, default=list(ADDONS), help="columns; all by default")
    add("--seeds", type=int, default=3, help="number of seeds, from 1; at least 2 (%(default)s)")
    add("--jobs", type=int, default=1, help="cells that are computed at a time (%(default)s)")
    add("--host-steps", type=int, default=300, help="steps before the cells of a host part (%(default)s)")
    add("--steps", type=int, default=100, help="steps of each cell (%(default)s)")
    add("--train", type=int, default=1200, help="number of training scenes (%(default)s)")
    add("--host-batch-size", type=int, default=12, help="before the cells of a host part (%(default)s)")
    add("--batch-size", type=int, default=12, help="of each cell (%(default)s)")
    add("--out", type=Path, default=Path("runs/compatibility"), help="folder for everything that is written (%(default)s)")
    return parser


def main(argv: Sequence[str] = ()) -> None:
    parser = make_parser()
    args = parser.parse_args(argv or None)
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more, for a standard deviation")
    settings = Settings(
        args.repos, COMPACT_CLIP, args.host_steps, args.steps, LR, args.host_batch_size, args.batch_size, args.train, args.out
    )
    code = source_hash(*(Path(package.__file__).parent for package in (demo, adapters)), Path(__file__).parent)
    facts = repr(settings._replace(repos=None, parts=Path()))
    made_with = hashlib.sha256((code + facts).encode()).hexdigest()
    settings = settings._replace(parts=args.out / f"parts_{made_with[:8]}")
    seeds = range(1, args.seeds + 1)
    cells = [Cell(row_name(host, BASE), seed, 0) for host in args.hosts for seed in seeds]
    cells += [Cell(row_name(host, addon), seed, 1) for host in args.hosts for seed in seeds for addon in args.addons]
    found = run_cells(args.out, cells, made_with, functools.partial(run_cell, settings=settings), args.jobs)
    lines = [line_of(host, addon, found) for host in args.hosts for addon in args.addons]
    conditions = (
        f"{args.train} training scenes of the demo world, {args.host_steps} steps of the host (batch {args.host_batch_size}), "
        f'then {args.steps} steps (batch {args.batch_size}) for every cell, "alone" too; {args.seeds} seeds'
    )
    write_tables(args.out, lines, conditions, [facts_of(host, found) for host in args.hosts])


def line_of(host: str, addon: str, found: Dict[Cell, Dict[str, Any]]) -> Line:
    """A row of the table from the records of its cells."""
    own = {cell.seed: record for cell, record in found.items() if cell.row == row_name(host, addon)}
    names = [name for name in FIGURES if all(name in record for record in own.values())]
    figures = {name: {seed: 100 * record[name] for seed, record in own.items()} for name in names}
    against = AGAINST.get(addon)
    skipped = next((record["skipped"] for record in own.values() if "skipped" in record), "")
    note = {"note": skipped} if skipped else {}
    return Line(host, row_name(host, addon), figures, row_name(host, against) if against else "", note)


def facts_of(host: str, found: Dict[Cell, Dict[str, Any]]) -> str:
    """One line on a host: its size, its CAM, and what the loss reaches."""
    records = [record for cell, record in found.items() if cell.row.startswith(f"{host}: ") and "reached" in record]
    if not records:
        return f"- {host}"
    one = records[-1]
    shape, (low, high) = " x ".join(map(str, one["cam_shape"])), one["cam_range"]
    doc = " ".join(str(HOSTS[host].__doc__).split())
    missed = f"; not {', '.join(one['missed'])}" if one["missed"] else ""
    return (
        f"- {host}: {doc} {one['parameters']:,} parameters, learning rate {LR[host]:g}; CAM {shape}, values {low:.2f} to "
        f"{high:.2f}; the refiner's loss reaches {100 * one['reached']:.0f} % of them{missed}."
    )


def write_tables(out: Path, lines: List[Line], conditions: str, facts: List[str]) -> None:
    figures = [name for name in FIGURES if any(name in line.figures for line in lines)]
    compared = [name for name in figures if name.startswith("mIoU")]
    text = f"{conditions}\n\n{as_markdown(lines, figures, compared)}\n\n" + "\n".join(facts) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.csv").write_text(as_csv(lines), encoding="utf-8")
    for name in compared:
        draw(lines, name, conditions, out / f"table{'' if name == 'mIoU' else '_aligned'}.png")
    print(text)


if __name__ == "__main__":
    main()
