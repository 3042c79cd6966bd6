"""`semples evaluate`: compare pseudo labels or CAM files with ground truth."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any, List

from ..class_names import read_class_names
from ..masks import check_threshold
from .arguments import AUTO, add_classes, add_ids_and_split, read_ids, read_threshold, split_name
from .printing import print_failed

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Labels in both folders are 0 for background and 1 + class, in the order of --classes. The VOC metric: one confusion matrix over
the set, label 255 ignored. FP and FN are shares of the union, so that
IoU + FP + FN = 100. For CAM files every background threshold is tried and the best one reported, with a note that it was
chosen on ground truth; --threshold fixes it. With two, LOW:HIGH, pixels whose CAM is between them are not
counted, as those with label 255 in label PNGs; their share is printed."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `semples`."""
    parser = commands.add_parser(
        "evaluate",
        help="compare pseudo labels or CAM files with ground truth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add("--pred", type=Path, required=True, metavar="DIR", help="label PNGs, or CAM files")
    add("--gt", type=Path, required=True, metavar="DIR", help="ground-truth PNGs")
    add_ids_and_split(parser, "all predictions")
    add_classes(parser)
    add("--threshold", type=read_threshold, metavar="T|LOW:HIGH",
        help="background threshold for CAM files, chosen elsewhere; with two, pixels between them are not counted")  # fmt: skip
    add("--thresholds", default="0:100", metavar="FROM:TO", help="hundredths to try, TO excluded (default: %(default)s)")
    add("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    add("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the figures; returns 1 if an image could not be counted, else 0."""
    from ..files.evaluate_folder import evaluate_cams, evaluate_labels

    names = ["background", *read_class_names(options.classes)]
    ids, split = read_ids(options.list), split_name(options)
    if options.threshold == AUTO:
        raise ValueError("--threshold auto is for semples refine, which asks CLIP; give a number, or leave it out to try many.")
    if options.threshold is not None:
        check_threshold("--threshold", options.threshold)
    if not options.pred.is_dir() or not options.gt.is_dir():
        raise ValueError(f"--pred and --gt must be folders; got {options.pred} and {options.gt}.")
    if any(options.pred.glob("*.np[yz]")):
        chosen, tried, high = options.threshold is None, _thresholds(options.thresholds), None
        if not chosen:
            low, top = options.threshold if isinstance(options.threshold, tuple) else (options.threshold, options.threshold)
            tried, high = [low], top if top > low else None
        result = evaluate_cams(options.pred, options.gt, names, ids, tried, chosen=chosen, split=split, high=high)
    else:
        result = evaluate_labels(options.pred, options.gt, names, ids, split=split)
    if options.csv:
        options.csv.write_text(_table(result.classes), encoding="utf-8")
    if not result.images:
        raise ValueError(
            f"None of the {len(result.failed)} images could be counted: {next(iter(result.failed.values()))}. "
            "Are --pred and --gt swapped, or of different images?"
        )
    print(json.dumps(result.as_json(), ensure_ascii=False) if options.json else str(result))
    print_failed(result.failed)
    return 1 if result.failed else 0


def _thresholds(text: str) -> List[float]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high) <= 100):
        raise ValueError(f"--thresholds takes two whole hundredths such as 0:60; got {text!r}.")
    return [i / 100 for i in range(int(low), int(high))]


def _table(scores: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", "iou", "precision", "recall", "false_positive", "false_negative"])
    writer.writerows([["" if value is None else value for value in score] for score in scores])
    return text.getvalue()
