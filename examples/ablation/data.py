"""What the ablation runs on: the demo world, or a folder in VOC's layout."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.files.images import read_image
from semples_plugin.masks import pseudo_labels
from semples_plugin.metrics import confusion_matrix, mean_iou

from ..demo.host import Split, make_split
from ..demo.scores import best_row
from ..demo.world import HOME, STUFF, THINGS
from ..small import small_iou

__all__ = ["Data", "demo_world", "voc_folder"]


class Data:
    """Images with labels for training, and two splits with masks: one for choosing thresholds, one for figures.

    Attributes:
        classes: C names.
        texts: hand-written background prompts for all classes.
        own_texts: those of every class, or empty.
    """

    classes: List[str]
    texts: List[str]
    own_texts: Dict[str, List[str]]

    def splits(self, seed: int) -> Tuple[Split, Split, Split]:
        """Training, choosing and testing images of a seed."""
        raise NotImplementedError

    def score(self, val_masks: Tensor, val: Split, test_masks: Tensor, test: Split) -> Dict[str, float]:
        """Figures of soft masks (N, C, h, w) on the test split at the threshold that is best on `val`, and that threshold."""
        raise NotImplementedError


class DemoWorld(Data):
    classes = list(THINGS)
    texts = [f"a photo of {name}." for name in STUFF]
    own_texts = {name: [f"a photo of {HOME[name]}."] for name in THINGS}

    def __init__(self, train: int = 1200, val: int = 150, test: int = 300):
        self.counts = (train, val, test)

    def splits(self, seed: int) -> Tuple[Split, Split, Split]:
        train, val, test = (make_split(n, (i + 1) * 10_000 + seed) for i, n in enumerate(self.counts))
        return train, val, test

    def score(self, val_masks: Tensor, val: Split, test_masks: Tensor, test: Split) -> Dict[str, float]:
        row = best_row(val_masks, val, test_masks, test)
        found = {"mIoU": row.miou, "co-occurrence share": row.mean_share, "threshold": row.threshold}
        truth = np.stack([scene.things for scene in test.scenes])
        found["IoU of small things"] = small_iou(pseudo_labels(test_masks, row.threshold).numpy(), truth, test.labels.numpy())
        return found


class Masks(NamedTuple):
    """What a `Split` of photos holds in the place of scenes: label maps (N, S, S), 255 for void."""

    labels: np.ndarray


class VocFolder(Data):
    """A folder with JPEGImages, SegmentationClass, ImageSets/Segmentation/{train,val}.txt, and labels.

    Of val every other photo is for choosing the threshold, the rest for the figures; all seeds see the same photos.

    Args:
        folder: such as VOCdevkit/VOC2012.
        labels: JSON, image id -> class names; by default Annotations/<id>.xml is read. Masks are never read for training.
        classes: names of the classes; others of VOC count as background.
        size: side of the images in pixels.
    """

    own_texts: Dict[str, List[str]] = {}

    def __init__(self, folder: Path, labels: Optional[Path], classes: List[str], size: int):
        self.folder, self.classes, self.size = folder, classes, size
        self.named: Optional[Dict[str, List[str]]] = None if labels is None else json.loads(labels.read_text(encoding="utf-8"))
        places = ("grass", "a field", "trees", "the sky", "water", "snow", "a floor", "a wall", "a street", "railway")
        self.texts = [f"a photo of {name}." for name in places]
        self._splits: Optional[Tuple[Split, Split, Split]] = None

    def splits(self, seed: int) -> Tuple[Split, Split, Split]:
        if self._splits is None:
            train, val = self._ids("train"), self._ids("val")
            self._splits = self._read(train, False), self._read(val[0::2], True), self._read(val[1::2], True)
        return self._splits

    def _names(self, name: str) -> List[str]:
        if self.named is not None:
            return self.named[name]
        tree = ElementTree.parse(self.folder / "Annotations" / f"{name}.xml")
        return [str(each.findtext("name")) for each in tree.iter("object")]

    def _ids(self, split: str) -> List[str]:
        ids = (self.folder / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()
        return [i for i in ids if set(self._names(i)) & set(self.classes)]

    def _read(self, ids: List[str], with_masks: bool) -> Split:
        side = (self.size, self.size)
        images = [
            cv2.resize(read_image(self.folder / "JPEGImages" / f"{i}.jpg"), side, interpolation=cv2.INTER_AREA) for i in ids
        ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor([[int(c in self._names(i)) for c in self.classes] for i in ids])
        masks = Masks(np.stack([self._mask(i) for i in ids])) if with_masks else None
        return Split(pixels, labels, masks)  # type: ignore[arg-type]

    def _mask(self, name: str) -> np.ndarray:
        from PIL import Image

        table = np.zeros(256, np.uint8)
        table[255] = 255
        for k, known in enumerate(self.classes):
            table[1 + list(VOC_CLASSES).index(known)] = k + 1
        with Image.open(self.folder / "SegmentationClass" / f"{name}.png") as picture:
            return cv2.resize(table[np.array(picture)], (self.size, self.size), interpolation=cv2.INTER_NEAREST)

    def score(self, val_masks: Tensor, val: Split, test_masks: Tensor, test: Split) -> Dict[str, float]:
        def value(masks: Tensor, split: Split, threshold: float) -> float:
            truth = split.scenes.labels  # type: ignore[attr-defined]
            return mean_iou(confusion_matrix(pseudo_labels(masks, threshold).numpy(), truth, len(self.classes) + 1))

        thresholds = [round(0.02 * i, 2) for i in range(2, 49)]
        best = max(thresholds, key=lambda t: value(val_masks, val, t))
        return {"mIoU": value(test_masks, test, best), "threshold": best}


def demo_world() -> Data:
    return DemoWorld()


def voc_folder(folder: Path, labels: Optional[Path], classes: List[str], size: int) -> Data:
    missing = [name for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation") if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"--data must be a folder in VOC's layout; {folder} lacks {', '.join(missing)}.")
    if labels is None and not (folder / "Annotations").is_dir():
        raise ValueError(f"Image-level labels are read from {folder}/Annotations, which is missing; give --labels FILE.")
    return VocFolder(folder, labels, classes, size)
