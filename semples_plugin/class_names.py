"""Class names of the two benchmarks, in the order of the label columns that WSSS pipelines use; value: what CLIP is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, Tuple, Union

from ._checks import check_classes

__all__ = ["COCO_CATEGORY_IDS", "COCO_CLASSES", "VOC_CLASSES", "read_class_names"]

_SPELLED = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}

VOC_CLASSES: Dict[str, str] = {
    name: _SPELLED.get(name, name)
    for name in (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
        "sofa train tvmonitor"
    ).split()
}
"""The 20 classes of PASCAL VOC, alphabetical as everywhere (class index 1 to 20 in its masks)."""

COCO_CLASSES: Dict[str, str] = {
    name: name
    for name in (
        "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
        "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, "
        "tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
        "tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, "
        "hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, "
        "keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, "
        "hair drier, toothbrush"
    ).split(", ")
}
"""The 80 classes of MS COCO in the order of its category ids 1 to 90 (ten ids are unused)."""

COCO_CATEGORY_IDS: Tuple[int, ...] = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""Category id in COCO's annotation files (1 to 90) of each of the 80 label columns."""


def read_class_names(text: str) -> Union[List[str], Dict[str, str]]:
    """Class names from `voc`, `coco`, or a file: one name per line, a JSON list, or a JSON mapping name -> name for CLIP.

    Raises:
        TypeError, ValueError: if the file cannot be read or does not hold class names.
    """
    names = _read(text)
    check_classes(names)
    return names


def _read(text: str) -> Union[List[str], Dict[str, str]]:
    if text.lower() in ("voc", "coco"):
        return dict(VOC_CLASSES if text.lower() == "voc" else COCO_CLASSES)
    path = Path(text)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes must be voc, coco or a readable file; got {text!r} ({error}).") from error
    if path.suffix != ".json":
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(found, (list, dict)):
        raise ValueError(f"{path} must hold a list of names or a mapping name -> name for CLIP; got {type(found).__name__}.")
    return found
