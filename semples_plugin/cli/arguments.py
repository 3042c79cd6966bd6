"""Arguments that several commands take: class names, image ids, a split, a background threshold, the options of a refiner."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Union

from ..config import config_for
from ..masks import Threshold

if TYPE_CHECKING:
    from ..refiner import PromptRefiner

__all__ = [
    "AUTO",
    "add_classes",
    "add_ids_and_split",
    "build_refiner",
    "check_device",
    "read_ids",
    "read_threshold",
    "split_name",
]

AUTO = "auto"  # a threshold that CLIP chooses


def add_classes(parser: argparse.ArgumentParser) -> None:
    """Add `--classes`, for `class_names.read_class_names`."""
    parser.add_argument(
        "--classes",
        default="voc",
        metavar="voc|coco|FILE",
        help="class names in the order of the labels; a file has one per line, or is JSON; background is no class: a file may "
        "name it first, and it is left out (default: %(default)s)",
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


def read_threshold(text: str) -> Union[str, Threshold]:
    """`0.4`, `0.3:0.5`, or `auto`."""
    if text == AUTO:
        return AUTO
    low, colon, high = text.partition(":")
    try:
        return (float(low), float(high)) if colon else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, two such as 0.3:0.5, or auto; got {text!r}") from error


def split_name(options: argparse.Namespace) -> str:
    """The name of the split: as given, else the name of the list, else that of the ground-truth folder."""
    return options.split or (options.list.stem if options.list else options.gt.name)


def build_refiner(
    options: argparse.Namespace, classes: Union[List[str], Dict[str, str]], overrides: Mapping[str, Any]
) -> "PromptRefiner":
    """The refiner that `--classes`, `--prompts`, `--clip`, `--set` and `--device` ask for.

    Args:
        options: parsed options.
        classes: of `--classes`.
        overrides: of `--set`.

    Raises:
        ValueError: if the prompts were learned for other classes, the device cannot be used, or `image_stats` is set.
    """
    from ..refiner import PromptRefiner

    if overrides.get("image_stats") is not None:
        raise ValueError("--set image_stats is not possible: images are read as values from 0 to 1. Leave it out.")
    overrides = {**overrides, "image_stats": None}  # images are read as values from 0 to 1
    if options.prompts is None:
        refiner = PromptRefiner(classes, options.clip or "ViT-B/32", config_for(options.classes).replace(**overrides))
    else:
        refiner = PromptRefiner.load(options.prompts, clip=options.clip, **overrides)
        if refiner.classes != list(classes):
            raise ValueError(
                f"{options.prompts} was learned for {len(refiner.classes)} classes ({', '.join(refiner.classes[:3])}, ...) and "
                f"--classes names {len(classes)} ({', '.join(list(classes)[:3])}, ...). They must be the same, in this order."
            )
    check_device(options.device)
    return refiner.to(options.device)


def check_device(device: str) -> None:
    """Raise ValueError if torch cannot use the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device!r} cannot be used: {reason}") from error
