"""Class names of PASCAL VOC and MS COCO in the order of the label columns, and class names from a file.

The two mappings go from class name to the name that CLIP is prompted with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, Tuple, Union

from ._checks import check_classes

__all__ = ["COCO_CATEGORY_IDS", "COCO_CLASSES", "VOC_CLASSES", "read_class_names"]

_BACKGROUND = ("background", "__background__", "_background_")
_PROMPT_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}

VOC_CLASSES: Dict[str, str] = {
    name: _PROMPT_NAMES.get(name, name)
    for name in (
        "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
        "sofa train tvmonitor"
    ).split()
}
"""The 20 classes of PASCAL VOC in alphabetical order; its masks number them from 1 to 20."""

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


def read_class_names(classes: str) -> Union[List[str], Dict[str, str]]:
    """Class names from the name of a benchmark or from a file.

    Args:
        classes: `"voc"`, `"coco"`, or the path of a file: a text file with one name per line, or a `.json` file with a list of
            names or a mapping from name to the name that CLIP is prompted with.

    Returns:
        The names, or the mapping, as `PromptRefiner` takes them.

    Raises:
        ValueError: if the file cannot be read, or its names are empty or not unique.
        TypeError: if a name is not a string.

    Example:
        >>> list(read_class_names("voc"))[:3]
        ['aeroplane', 'bicycle', 'bird']
    """
    names = _without_background(classes, _benchmark_or_file(classes))
    check_classes(names)
    return names


def _without_background(classes: str, names: Union[List[str], Dict[str, str]]) -> Union[List[str], Dict[str, str]]:
    places = [i for i, name in enumerate(names) if isinstance(name, str) and name.strip().lower() in _BACKGROUND]
    if not places:
        return names
    if places != [0]:
        raise ValueError(
            f"{classes} names background at place {places[-1] + 1}. It is no class: leave it out, or put it first, where it is "
            "left out; the other names are the classes 0, 1, ... in this order."
        )
    return {key: names[key] for key in list(names)[1:]} if isinstance(names, dict) else names[1:]


def _benchmark_or_file(classes: str) -> Union[List[str], Dict[str, str]]:
    benchmark = {"voc": VOC_CLASSES, "coco": COCO_CLASSES}.get(classes.lower())
    if benchmark is not None:
        return dict(benchmark)
    path = Path(classes)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The class names must be voc, coco or a readable file; got {classes!r} ({error}).") from error
    if path.suffix != ".json":
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        names = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(names, (list, dict)):
        raise ValueError(
            f"{path} must hold a list of names, or a mapping from name to the name for CLIP; got {type(names).__name__}."
        )
    return names
