"""`semples report`: one HTML page of what a refinement changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..class_names import read_class_names
from .arguments import add_classes, add_ids_and_split, read_ids, split_name
from .printing import print_failed
from .prompts import nearest_words

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `semples`."""
    parser = commands.add_parser("report", help="one HTML page of what a refinement changed")
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="images")
    add("--before", type=Path, required=True, metavar="DIR", help="CAM files of the host")
    add("--after", type=Path, required=True, metavar="DIR", help="refined CAM files")
    add("--gt", type=Path, required=True, metavar="DIR", help="ground-truth PNGs")
    add("--out", type=Path, required=True, metavar="FILE", help="the page")
    add_ids_and_split(parser, "all CAM files of --before")
    add_classes(parser)
    add("--prompts", type=Path, metavar="FILE", help="learned prompts to show with their nearest words")
    add("--clip", metavar="NAME", help="CLIP model or weights file (default: that of the prompts)")
    add("--title", default="What the refinement changed", help="title of the page (default: %(default)s)")
    add("--rows", type=int, default=8, metavar="N",
        help="images of each kind: improved, worse, random (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the page; returns 1 if an image could not be counted or shown, else 0."""
    from ..files.report import write_report

    classes = list(read_class_names(options.classes))
    prompts = nearest_words(options.prompts, options.clip) if options.prompts else None
    if prompts is not None and [prompt.name for prompt in prompts] != classes:
        raise ValueError(f"{options.prompts} was learned for other classes than --classes names ({len(classes)}).")
    failed = write_report(
        options.out,
        options.images,
        options.before,
        options.after,
        options.gt,
        classes,
        ids=read_ids(options.list),
        split=split_name(options),
        title=options.title,
        rows=options.rows,
        prompts=prompts,
    )
    print(options.out)
    print_failed(failed)
    return 1 if failed else 0
