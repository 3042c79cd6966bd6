"""The data sets that the chain knows: where their lists, photos, masks and labels are, and how the host is told of them.

Flow: `__main__` -> **datasets** -> `settings` -> `commands`. COCO has no masks as pictures; `coco_masks` draws them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from semples_plugin.class_names import COCO_CLASSES, VOC_CLASSES
from semples_plugin.cli import arguments
from semples_plugin.files.labels import read_labels

VOC_SOURCE = "PASCAL VOC 2012: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
SBD_SOURCE = (
    "the ids of the augmented set (SBD) come with the host, voc12/train_aug_id.txt; its photos are in VOC 2012, and its masks "
    "are not needed"
)
COCO_PHOTOS = "MS COCO 2014: http://images.cocodataset.org/zips/train2014.zip and val2014.zip"
COCO_ANNOTATIONS = "MS COCO 2014: http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
MCTFORMER = "git clone https://github.com/xulianuwa/MCTformer"


class Missing(NamedTuple):
    """Something that is not there, and where it comes from."""

    what: str
    source: str

    def __str__(self) -> str:
        return f"- {self.what}\n    {self.source}"


class Lists(NamedTuple):
    """Image ids: those that are trained on, those of them whose CAMs are compared with masks, and those of the evaluation."""

    train_aug: List[str]
    train: List[str]
    val: List[str]


class DataSet:
    """What the chain asks of a data set.

    Attributes:
        root: its folder.
        repo: clone of the host, which has lists and labels.
        name: in words.
        option: its name for --classes.
        classes: in the order of the labels.
        host: names for the host's --data-set, of training and of CAM files.
        train_lists: files of ids that the host reads for training and for CAM files, all with the same content.
        pixels: of a photo, for estimates.
        classes_per_image: for estimates.
    """

    name: str
    option: str
    classes: Sequence[str]
    host: Tuple[str, str]
    train_lists: Tuple[str, ...]
    pixels: int
    classes_per_image: float

    def __init__(self, root: Path, repo: Path, labels: Optional[Path] = None):
        """Set the folders and, instead of the usual image-level labels, a file of them."""
        self.root, self.repo, self._labels = root, repo, labels
        self._known: Optional[Dict[str, np.ndarray]] = None

    def lists(self, limit: Optional[int] = None) -> Lists:
        """The ids of all three lists; what has no file is empty.

        Args:
            limit: images of each list, those of train first; of the host's list then only what there is.
        """
        raise NotImplementedError

    def photos(self, split: str) -> Path:
        """Folder of the photos of train or val."""
        raise NotImplementedError

    def masks(self, split: str, out: Path) -> Path:
        """Folder of the masks of train or val; in the folder `out` of the run, if they are drawn there."""
        raise NotImplementedError

    def annotations(self) -> List[Path]:
        """Files that masks are drawn from, of train and val; none where there are masks."""
        return []

    @property
    def label_files(self) -> List[Path]:
        """Files of image-level labels."""
        return self._own_labels() if self._labels is None else [self._labels]

    def _own_labels(self) -> List[Path]:
        raise NotImplementedError

    def label_words(self, labels: Path) -> List[str]:
        """Words of the host's command that name the file of labels; none where it stands where the host looks for it."""
        return []

    def missing(self, lists: Lists) -> List[Missing]:
        """Photos, masks and lists that are not there."""
        raise NotImplementedError

    def missing_labels(self, lists: Lists) -> List[Missing]:
        """Files of labels that are not there, and images without labels."""
        absent_files = [path for path in self.label_files if not path.exists()]
        if absent_files:
            others = [path for path in absent_files if path not in self.annotations()]  # which `missing` names
            return [Missing(f"file {path}", self._source_of_labels) for path in others]
        known = self.read_labels()
        absent = [name for name in dict.fromkeys([*lists.train_aug, *lists.val]) if name not in known]
        if not absent:
            return []
        place = " and ".join(map(str, self.label_files))
        return [Missing(f"labels of {len(absent)} images in {place}: {first(absent)}", self._source_of_labels)]

    def read_labels(self) -> Dict[str, np.ndarray]:
        """Image id -> multi-hot labels, from all files; read once."""
        if self._known is None:
            self._known = {name: row for path in self.label_files for name, row in read_labels(path, self.classes).items()}
        return self._known

    def sizes(self, lists: Lists) -> Dict[str, Dict[str, int]]:
        """Folder -> image id -> bytes, of all photos and masks: another size is another image."""
        raise NotImplementedError

    _source_of_labels = ""


class Voc(DataSet):
    """PASCAL VOC 2012, the folder VOC2012."""

    name, option, classes = "VOC", "voc", tuple(VOC_CLASSES)
    host, train_lists = ("VOC12", "VOC12MS"), ("train_aug_id.txt",)
    pixels, classes_per_image = 500 * 375, 1.5
    _source_of_labels = (
        f"image-level labels: the host's voc12/cls_labels.npy ({MCTFORMER}), or --labels with any file that `semples` reads"
    )

    def lists(self, limit: Optional[int] = None) -> Lists:
        """See `DataSet`. Lists of the data set come before the host's."""
        sets = self.root / "ImageSets" / "Segmentation"
        train, val = (read_ids(sets / f"{name}.txt") for name in ("train", "val"))
        augmented = next((ids for name in ("trainaug", "train_aug") for ids in [read_ids(sets / f"{name}.txt")] if ids), None)
        if augmented is None:
            augmented = read_ids(self.repo / "voc12" / "train_aug_id.txt")
            if limit is not None:  # a rehearsal takes what there is
                augmented = _there(augmented, self.photos("train"))
        if limit is None:
            return Lists(augmented, train, val)
        train = [name for name in train if name in set(augmented)][:limit]
        rest = [name for name in augmented if name not in set(train)]
        return Lists([*train, *rest][:limit], train, val[:limit])

    def photos(self, split: str) -> Path:
        return self.root / "JPEGImages"

    def masks(self, split: str, out: Path) -> Path:
        return self.root / "SegmentationClass"

    def _own_labels(self) -> List[Path]:
        return [self.repo / "voc12" / "cls_labels.npy"]

    def missing(self, lists: Lists) -> List[Missing]:
        photos, masks = self.photos("train"), self.masks("train", self.root)
        found = [Missing(f"folder {folder}", VOC_SOURCE) for folder in (photos, masks) if not folder.is_dir()]
        for name, ids in zip(("train.txt", "val.txt"), (lists.train, lists.val)):
            if not ids:
                found.append(Missing(f"list {self.root / 'ImageSets' / 'Segmentation' / name}", VOC_SOURCE))
        if not lists.train_aug:
            found.append(Missing(f"list {self.root / 'ImageSets' / 'Segmentation' / 'trainaug.txt'}", SBD_SOURCE))
        found += _missing_files(photos, ".jpg", [*lists.train_aug, *lists.train, *lists.val], VOC_SOURCE)
        found += _missing_files(masks, ".png", [*lists.train, *lists.val], f"{VOC_SOURCE}; masks serve evaluation only")
        outside = [name for name in lists.train if name not in set(lists.train_aug)]
        if outside and lists.train_aug:
            what = f"{len(outside)} images of train.txt in the list that is trained on: {first(outside)}"
            found.append(Missing(what, SBD_SOURCE))
        return found

    def sizes(self, lists: Lists) -> Dict[str, Dict[str, int]]:
        photos = _sizes(self.photos("train"), ".jpg", [*lists.train_aug, *lists.val])
        return {
            "JPEGImages": photos,
            "SegmentationClass": _sizes(self.masks("train", self.root), ".png", [*lists.train, *lists.val]),
        }


class Coco(DataSet):
    """MS COCO 2014, the folder with train2014, val2014 and annotations. Trained on is train.

    The lists are the host's without the images that have no class: the host writes no CAM file for them.
    """

    name, option, classes = "COCO", "coco", tuple(COCO_CLASSES)
    host, train_lists = ("COCO", "COCOMS"), ("train_id.txt", "train_aug_id.txt")  # its script names CAM files by the second
    pixels, classes_per_image = 640 * 480, 2.9
    _source_of_labels = f"{COCO_ANNOTATIONS}; or --labels with any file that `semples` reads"

    def lists(self, limit: Optional[int] = None) -> Lists:
        train, val = (read_ids(self.repo / "coco" / f"{split}_id.txt") for split in ("train", "val"))
        if all(path.is_file() for path in self.label_files):
            known = self.read_labels()
            train, val = ([name for name in ids if name not in known or known[name].any()] for ids in (train, val))
        if limit is not None:
            train, val = (_there(ids, self.photos(split))[:limit] for ids, split in ((train, "train"), (val, "val")))
        return Lists(train, train, val)

    def photos(self, split: str) -> Path:
        return self.root / f"{split}2014"

    def masks(self, split: str, out: Path) -> Path:
        return out / "coco-masks" / split

    def annotations(self) -> List[Path]:
        return [self.root / "annotations" / f"instances_{split}2014.json" for split in ("train", "val")]

    def _own_labels(self) -> List[Path]:
        return self.annotations()

    def label_words(self, labels: Path) -> List[str]:
        return ["--label-file-path", str(labels)]

    def missing(self, lists: Lists) -> List[Missing]:
        found = [
            Missing(f"folder {folder}", COCO_PHOTOS) for folder in map(self.photos, ("train", "val")) if not folder.is_dir()
        ]
        found += [Missing(f"file {path}", COCO_ANNOTATIONS) for path in self.annotations() if not path.is_file()]
        for split, ids in zip(("train", "val"), (lists.train, lists.val)):
            if not ids:
                found.append(Missing(f"list coco/{split}_id.txt of the host", MCTFORMER))
            found += _missing_files(self.photos(split), ".jpg", ids, COCO_PHOTOS)
        try:
            import pycocotools.mask  # noqa: F401
        except ModuleNotFoundError:
            found.append(Missing("pycocotools, which reads masks from the annotation files", "pip install pycocotools"))
        return found

    def sizes(self, lists: Lists) -> Dict[str, Dict[str, int]]:
        return {f"{split}2014": _sizes(self.photos(split), ".jpg", getattr(lists, split)) for split in ("train", "val")}


def read_ids(path: Path) -> List[str]:
    """Ids of a list; none without the file."""
    return arguments.read_ids(path if path.is_file() else None) or []


def first(ids: Sequence[str]) -> str:
    """The beginning of a list of ids."""
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def _there(ids: Sequence[str], photos: Path) -> List[str]:
    names = {path.stem for path in photos.glob("*.jpg")}
    return [name for name in ids if name in names]


def _missing_files(folder: Path, end: str, ids: Sequence[str], source: str) -> List[Missing]:
    if not folder.is_dir():
        return []
    there = {path.name for path in folder.iterdir()}
    absent = [name for name in dict.fromkeys(ids) if name + end not in there]
    return [Missing(f"{len(absent)} files in {folder}: {first(absent)}", source)] if absent else []


def _sizes(folder: Path, end: str, ids: Sequence[str]) -> Dict[str, int]:
    return {name: (folder / f"{name}{end}").stat().st_size for name in dict.fromkeys(ids)}
