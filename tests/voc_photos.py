"""A few generated photos in VOC's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List

import cv2
import numpy as np


def write_photos(root: Path) -> Path:
    """Six images in VOC's layout; two of them in val."""
    rng = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    labels: Dict[str, List[str]] = {}
    for i in range(6):
        cv2.imwrite(str(root / "JPEGImages" / f"p{i}.jpg"), rng.integers(0, 256, (40 + i, 60, 3), np.uint8))
        mask = np.zeros((40 + i, 60), np.uint8)
        mask[5:20, 5:30], mask[20:25], mask[30:] = 8, 255, 5  # cat, void, bottle
        cv2.imwrite(str(root / "SegmentationClass" / f"p{i}.png"), mask)
        labels[f"p{i}"] = ["cat", "person"] if i % 2 else ["dog"]
    labels["p0"] = ["bottle"]
    (root / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    (root / "ImageSets/Segmentation/train.txt").write_text("p0\np1\np2\np3\n", encoding="utf-8")
    (root / "ImageSets/Segmentation/val.txt").write_text("p4\np5\n", encoding="utf-8")
    return root
