"""Masks of COCO as label PNGs, drawn from its annotation files with pycocotools.

    python -m examples.voc.coco_masks --annotations instances_val2014.json --list val.txt --out DIR

0 is background, 1 + class otherwise, in the order of the category ids. Where objects overlap, the smaller is on top. Regions
of crowds count as their class. There is no 255. Masks that were drawn otherwise give other figures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from semples_plugin._files import remove_parts
from semples_plugin.class_names import COCO_CLASSES
from semples_plugin.cli.arguments import read_ids
from semples_plugin.files.images import write_label_png


def draw(coco: Any, number: int, labels: Dict[int, int]) -> np.ndarray:
    """The label map of an image, (H, W) uint8.

    Args:
        coco: `pycocotools.coco.COCO` of the annotation file.
        number: id of the image in it.
        labels: category id -> label.
    """
    image = coco.imgs[number]
    target = np.zeros((image["height"], image["width"]), np.uint8)
    found: List[Any] = [one for one in coco.imgToAnns[number] if one["category_id"] in labels]
    for one in sorted(found, key=lambda one: (-one["area"], one["id"])):
        target[coco.annToMask(one) > 0] = labels[one["category_id"]]
    return target


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--list", type=Path, required=True, help="image ids, one per line")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    from pycocotools.coco import COCO

    options.out.mkdir(parents=True, exist_ok=True)
    remove_parts(options.out)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # it prints its progress
        coco = COCO(str(options.annotations))
    names = list(COCO_CLASSES)
    labels = {number: 1 + names.index(one["name"]) for number, one in coco.cats.items() if one["name"] in names}
    numbers = {Path(image["file_name"]).stem: number for number, image in coco.imgs.items()}
    for name in read_ids(options.list) or []:
        if name not in numbers:
            raise SystemExit(f"error: {options.annotations} has no image {name}, which {options.list} lists.")
        path = options.out / f"{name}.png"
        if not path.is_file():
            write_label_png(path, draw(coco, numbers[name], labels))


if __name__ == "__main__":
    main()
