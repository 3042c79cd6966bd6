"""`semples check`: will the loss help with these images, CAM files and this CLIP?"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any, Mapping

from ..class_names import read_class_names
from ..config import parse_assignments
from .arguments import add_classes, build_refiner, read_ids
from .printing import print_failed

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Looks at images, image-level labels and CAM files, and says per class whether CLIP and the loss tell the regions of the CAM from
the rest. No pixel mask is needed and nothing is trained. Ends with the options that it suggests, and writes a page of pictures
with --out. With --prompts, the configuration in that file counts, and --set overrides it."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `semples`."""
    parser = commands.add_parser(
        "check",
        help="will the loss help? per class, without pixel masks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="images, named as the CAM files")
    add("--cams", type=Path, required=True, metavar="DIR", help="CAM files, as for `semples refine`")
    add("--labels", type=Path, metavar="FILE", help="image-level labels, as for `semples refine` (default: the classes in each "
        "CAM file)")  # fmt: skip
    add_classes(parser)
    add("--prompts", type=Path, metavar="FILE", help="learned background prompts, to check the loss of stage (c)")
    add("--clip", metavar="NAME", help="CLIP model or weights file (default: that of the prompts, else ViT-B/32)")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="option of RefinerConfig, such as lambda_area=1; may be given several times")  # fmt: skip
    add("--list", type=Path, metavar="FILE", help="image ids, one per line (default: all CAM files)")
    add("--limit", type=int, default=300, metavar="N",
        help="look at so many images at most, spread evenly over the ids (default: %(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="N", help="images at once (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write an HTML page with the figures and pictures")
    add("--rows", type=int, default=4, metavar="N",
        help="pairs of each kind on the page: told apart best, worst, random (default: %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the folder; returns 1 if an image could not be looked at or shown, else 0."""
    from ..files.check_folder import check_folder
    from ..files.check_page import write_check_page
    from ..files.labels import read_labels

    if options.limit < 1 or options.batch_size < 1 or options.rows < 1:
        raise ValueError("--limit, --batch-size and --rows must be at least 1.")
    classes = read_class_names(options.classes)
    labels = None if options.labels is None else read_labels(options.labels, list(classes))
    ids = read_ids(options.list)
    refiner = build_refiner(options, classes, parse_assignments("--set", options.set))
    found = check_folder(
        options.cams,
        options.images,
        refiner,
        labels=labels,
        ids=ids,
        limit=options.limit,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    failed = dict(found.failed)
    if options.out is not None:
        fill = refiner.encoder.mean if refiner.config.clip_stats else (0.0, 0.0, 0.0)
        failed.update(write_check_page(options.out, found, fill, rows=options.rows))
    if options.json:
        print(json.dumps({**found.report.as_dict(), "failed": failed}, ensure_ascii=False))
    else:
        print(found.report)
        print(f"as options: {_flags(found.report.options())}")
        if options.out is not None:
            print(options.out)
    print_failed(failed)
    return 1 if failed else 0


def _flags(options: Mapping[str, Any]) -> str:
    """Options as words for a shell; `--set` reads them back."""
    given = {
        name: value if isinstance(value, float) else json.dumps(value) for name, value in options.items() if value is not None
    }
    return " ".join(f"--set {shlex.quote(f'{name}={value}')}" for name, value in given.items()) or "none"
