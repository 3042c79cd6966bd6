"""Arguments that several commands take: class names, a list of image ids, the name of a split."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import List, Optional

__all__ = ["add_classes", "add_ids_and_split", "read_ids", "split_name"]


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add `--classes`, for `class_names.read_class_names`."""
    parser.add_argument(
        "--classes",
        default="voc",
        metavar="voc|coco|FILE",
        help="class names; a file has one per line, or is JSON (default: %(default)s)",
    )


def add_ids_and_split(parser: argparse.ArgumentParser, every: str) -> None:
    """Add `--list` and `--split`; `every` says which images are taken without a list."""
    parser.add_argument("--list", type=Path, metavar="FILE", help=f"image ids, one per line (default: {every})")
    parser.add_argument(
        "--split", default="", help="name of the split, for the record (default: the name of --list, else that of --gt)"
    )


def read_ids(path: Optional[Path]) -> Optional[List[str]]:
    """Image ids of a list file, or None without one.

    Of a line such as `/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png` the first file's name is the id.
    """
    if path is None:
        return None
    lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Path(line).stem if line.lower().endswith((".jpg", ".png", ".npy")) else line for line in lines]


def split_name(options: argparse.Namespace) -> str:
    """The name of the split: as given, else the name of the list, else that of the ground-truth folder."""
    return options.split or (options.list.stem if options.list else options.gt.name)
