"""Class names of the two benchmarks, in the order of the label columns that WSSS pipelines use; value: what CLIP is told."""

from __future__ import annotations

from typing import Dict, Tuple

__all__ = ["COCO_CATEGORY_IDS", "COCO_CLASSES", "VOC_CLASSES"]

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
