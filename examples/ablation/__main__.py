"""The ablation: controls without CLIP's knowledge, the stages, other kinds of prompts, and every option of the recipe.

    python -m examples.ablation --seeds 5 --jobs 2 --out runs/ablation
    python -m examples.ablation --rows "host alone" "area" "+ match" --seeds 3            some rows
    python -m examples.ablation --host mctformer --repos HOSTS ...                        another host
    python -m examples.ablation --data VOCdevkit/VOC2012 --clip ViT-B/32 --host resnet10t --set lambda_area=1    photos

Writes table.md, table.csv and table.png into the folder. A finished cell (row and seed) is not computed again, so a run that
was stopped goes on where it was. `--jobs N` computes N cells at a time; with several GPUs these take turns on them.

Seeds are 1, 2, ...; settings were chosen on seed 0. Rows that change options are run with the first three seeds.

With --data the options are those of VOC's recipe, which has no area term. Without `--set lambda_area=...` the control "area
term alone" is left out, and match is compared with the host. Rows that would be the same as the row that they are compared with
are left out, too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.config import VOC, parse_assignments

from ..cells import Cell, run_cells
from ..demo import experiment as demo
from ..hosts import HOSTS, make_host
from ..recipe import COMPACT_CLIP
from ..seeds import select_rows, source_hash
from ..tables import Line, as_csv, as_markdown, draw
from .data import demo_world, voc_folder
from .experiment import Settings, run_cell
from .rows import BASE, MATCH, ROWS, distinct_rows

FEW = 3  # seeds of a row that changes options
FIGURES = ["mIoU", "mIoU, aligned", "co-occurrence share", "IoU of small things", "IoU of small things, aligned"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="number of seeds, from 1; at least 2 (%(default)s)")
    add("--rows", nargs="+", metavar="ROW", help="rows, or how their names begin; all by default")
    add("--jobs", type=int, default=1, help="cells that are computed at a time (%(default)s)")
    add("--out", type=Path, default=Path("runs/ablation"), help="folder for everything that is written (%(default)s)")
    add("--data", type=Path, help="folder in VOC's layout; by default the demo world")
    add("--labels", type=Path, help="with --data: JSON, image id -> class names; by default its Annotations")
    add("--classes", nargs="+", choices=VOC_CLASSES, metavar="CLASS", help="with --data: classes of VOC; by default all")
    add("--size", type=int, default=64, help="side of the images in pixels (%(default)s)")
    add("--host", default="demo", help=f"{', '.join(HOSTS)}, or package.module:function that returns a SmallHost (%(default)s)")
    add("--repos", type=Path, help="folder with clones of the hosts' repositories")
    add("--clip", help="CLIP model or weights file; by default the demo's, with --data ViT-B/32")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="option of RefinerConfig for all rows")
    add("--host-steps", type=int, default=300, help="steps before the rows part (%(default)s)")
    add("--steps", type=int, default=150, help="steps of each row (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (%(default)s)")
    add("--host-batch-size", type=int, default=32, help="before the rows part (%(default)s)")
    add("--batch-size", type=int, default=24, help="of each row (%(default)s)")
    return parser


def main(argv: Sequence[str] = ()) -> None:
    parser = make_parser()
    args = parser.parse_args(argv or None)
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more, for a standard deviation")
    try:
        chosen = select_rows([row.name for row in ROWS], args.rows)
        base = COMPACT_CLIP if args.data is None else VOC
        config = base.replace(**parse_assignments("--set", args.set))
        make_host(args.host, 2, args.size, args.repos)  # a wrong name or a missing repository is told now
        data = demo_world() if args.data is None else voc_folder(
            args.data, args.labels, list(args.classes or VOC_CLASSES), args.size
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    rows, left_out = distinct_rows(config)
    rows = [row for row in rows if row.name in chosen and (row.texts != "own" or data.own_texts)]
    notes = [f"Left out: {name} ({why})." for name, why in left_out.items() if name in chosen]
    if not rows:
        parser.error(f"--rows: no row is left. {' '.join(notes)}")
    for note in notes:
        print(note, file=sys.stderr)
    clip = args.clip or (str(demo.CLIP_FILE) if args.data is None else "ViT-B/32")
    weights = {"text_weight": 4.0, "text_threshold": 0.25} if args.data is None else {"text_weight": 1.0, "text_threshold": 0.0}
    settings = Settings(
        args.host, args.repos, clip, config, args.size, args.host_steps, args.steps, args.lr, args.host_batch_size,
        args.batch_size, parts=args.out, **weights,
    )  # fmt: skip
    facts = [settings._replace(parts=Path())._asdict(), str(args.data), str(args.labels), data.classes]
    made_with = hashlib.sha256(
        (source_hash(Path(__file__).parent, Path(demo.__file__).parent) + repr(facts)).encode()
    ).hexdigest()
    settings = settings._replace(parts=args.out / f"parts_{made_with[:8]}")  # parts of other code are not taken over
    seeds = range(1, args.seeds + 1)
    cells = [Cell(BASE, seed, 0) for seed in seeds]
    cells += [Cell(r.name, s, 1 if r.name == MATCH else 2) for s in seeds for r in rows if r.all_seeds or s <= FEW]
    if any(row.prompts for row in rows) and MATCH not in chosen:
        cells += [Cell(MATCH, seed, 1) for seed in seeds]
    found = run_cells(args.out, cells, made_with, functools.partial(run_cell, settings=settings, data=data), args.jobs)
    write_tables(args.out, [line_of(row, found) for row in rows], title_of(args, data.classes), notes)


def line_of(row: Any, found: Dict[Cell, Dict[str, Any]]) -> Line:
    """A row of the table from the records of its cells."""
    own = {cell.seed: record for cell, record in found.items() if cell.row == row.name}
    names = [name for name in FIGURES if all(name in record for record in own.values())]
    figures = {name: {seed: 100 * record[name] for seed, record in own.items()} for name in names}
    dead = sum(not alive for record in own.values() for of in record.get("alive", []) for alive in of)
    return Line(row.group, row.name, figures, row.against, {"prompts not in use": str(dead)} if dead else {})


def title_of(args: argparse.Namespace, classes: List[str]) -> str:
    where = "demo world" if args.data is None else f"{args.data.name}, {len(classes)} classes"
    return f"Ablation: {args.host}, {where}, {args.steps} steps after {args.host_steps} of the host"


def write_tables(out: Path, lines: Sequence[Line], title: str, notes: Sequence[str] = ()) -> None:
    figures = [name for name in FIGURES if any(name in line.figures for line in lines)]
    compared = [name for name in figures if name.startswith("mIoU")]
    text = "\n".join([title, "", as_markdown(lines, figures, compared), *(f"\n{note}" for note in notes), ""])
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "table.csv").write_text(as_csv(lines), encoding="utf-8")
    for name in compared:
        ending = "" if name == "mIoU" else "_aligned"
        draw(lines, name, title, out / f"table{ending}.png")
    print(text)


if __name__ == "__main__":
    main()
