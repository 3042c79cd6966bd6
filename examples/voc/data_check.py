"""What a run needs and does not find, all of it at once, with where it comes from; and the lists that the run works on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.clip_backends import published_clips
from semples_plugin.files.labels import read_labels

from .chain import write_json

VOC = "PASCAL VOC 2012: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
SBD = (
    "the ids of the augmented set (SBD) come with the host, voc12/train_aug_id.txt; its photos are in VOC 2012, and its masks "
    "are not needed"
)
MCTFORMER = "git clone https://github.com/xulianuwa/MCTformer"
HOST_IMPORTS = ("torch", "torchvision", "timm", "sklearn", "cv2", "PIL", "scipy")


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


def find_lists(voc: Path, repo: Path, limit: Optional[int] = None) -> Lists:
    """The ids of all three lists; what has no file is empty. Those of the data set come before the host's.

    Args:
        voc: the folder VOC2012.
        repo: clone of the host.
        limit: images of each list, those of train first; of the host's list then only what there is.
    """
    sets = voc / "ImageSets" / "Segmentation"
    train, val = (_ids(sets / f"{name}.txt") for name in ("train", "val"))
    augmented = next((ids for name in ("trainaug", "train_aug") for ids in [_ids(sets / f"{name}.txt")] if ids), None)
    if augmented is None:
        augmented = _ids(repo / "voc12" / "train_aug_id.txt")
        photos = {path.stem for path in (voc / "JPEGImages").glob("*.jpg")}
        if limit is not None:  # a rehearsal takes what there is
            augmented = [name for name in augmented if name in photos]
    if limit is None:
        return Lists(augmented, train, val)
    train = [name for name in train if name in set(augmented)][:limit]
    rest = [name for name in augmented if name not in set(train)]
    return Lists([*train, *rest][:limit], train, val[:limit])


def _ids(path: Path) -> List[str]:
    """Ids of a list, whose lines may be `/JPEGImages/ID.jpg /SegmentationClassAug/ID.png`."""
    if not path.is_file():
        return []
    return [Path(line.split()[0]).stem for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def check(
    voc: Path,
    repo: Path,
    lists: Lists,
    labels: Path,
    clip: Optional[str],
    python: str,
    gpu: bool,
    out: Path,
    needed_bytes: int,
) -> List[Missing]:
    """All that is missing, in the order of the steps that would need it.

    Args:
        voc: the folder VOC2012.
        repo: clone of the host.
        lists: see `find_lists`.
        labels: file of image-level labels.
        clip: name or file of the CLIP, None for a random one.
        python: interpreter of the host's environment.
        gpu: whether the host needs a GPU.
        out: folder of the run.
        needed_bytes: estimate of what the run writes.
    """
    found = [*_data(voc, lists), *_labels(labels, lists)]
    if not (repo / "main.py").is_file():
        found.append(Missing(f"the host's script {repo / 'main.py'}", MCTFORMER))
    found += _environment(python, gpu)
    if clip is not None and clip not in published_clips() and not clip.startswith("open_clip:") and not Path(clip).is_file():
        found.append(
            Missing(
                f"CLIP {clip}", f"--clip takes a weights file or one of {', '.join(published_clips())}, which are downloaded"
            )
        )
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    if free + written < needed_bytes:
        found.append(
            Missing(f"disk space: about {gigabytes(needed_bytes)} are needed in {out}, {gigabytes(free)} are free",
                    "choose another --out, or free some")
        )  # fmt: skip
    return found


def _data(voc: Path, lists: Lists) -> List[Missing]:
    found = []
    for folder in ("JPEGImages", "SegmentationClass"):
        if not (voc / folder).is_dir():
            found.append(Missing(f"folder {voc / folder}", VOC))
    for name, ids in zip(("train.txt", "val.txt"), (lists.train, lists.val)):
        if not ids:
            found.append(Missing(f"list {voc / 'ImageSets' / 'Segmentation' / name}", VOC))
    if not lists.train_aug:
        found.append(Missing(f"list {voc / 'ImageSets' / 'Segmentation' / 'trainaug.txt'}", SBD))
    for folder, end, ids, source in (
        ("JPEGImages", ".jpg", [*lists.train_aug, *lists.train, *lists.val], VOC),
        ("SegmentationClass", ".png", [*lists.train, *lists.val], f"{VOC}; masks serve evaluation only"),
    ):
        if (voc / folder).is_dir():
            there = {path.name for path in (voc / folder).iterdir()}
            absent = [name for name in dict.fromkeys(ids) if name + end not in there]
            if absent:
                found.append(Missing(f"{len(absent)} files in {voc / folder}: {first(absent)}", source))
    outside = [name for name in lists.train if name not in set(lists.train_aug)]
    if outside and lists.train_aug:
        found.append(Missing(f"{len(outside)} images of train.txt in the list that is trained on: {first(outside)}", SBD))
    return found


def _labels(path: Path, lists: Lists) -> List[Missing]:
    source = (
        f"image-level labels: the host's voc12/cls_labels.npy ({MCTFORMER}), or --labels with any file that `semples` reads"
    )
    if not path.exists():
        return [Missing(f"file {path}", source)]
    known = read_labels(path, VOC_CLASSES)
    absent = [name for name in dict.fromkeys([*lists.train_aug, *lists.val]) if name not in known]
    return [Missing(f"labels of {len(absent)} images in {path}: {first(absent)}", source)] if absent else []


def _environment(python: str, gpu: bool) -> List[Missing]:
    """What the host imports, tried in its own interpreter."""
    code = (
        "import importlib, json\nbad = {}\n"
        f"for name in {(*HOST_IMPORTS, 'semples_plugin.adapters')!r}:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except Exception as error:\n        bad[name] = f'{type(error).__name__}: {error}'\n"
        "import torch\nprint(json.dumps([bad, torch.cuda.is_available()]))"
    )
    try:
        done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)
        bad, has_gpu = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        return [
            Missing(f"a Python with torch at {python} ({type(error).__name__})", "--python: that of the host's environment")
        ]
    source = (
        f"in the host's environment ({python}): pip install timm scikit-learn opencv-python-headless scipy, and --editable ."
    )
    found = [Missing(f"import of {name}: {why}", source) for name, why in bad.items()]
    if gpu and not has_gpu:
        found.append(Missing("a GPU that torch can use", f"run on a machine with one ({python}), or rehearse with --cpu"))
    return found


def first(ids: Sequence[str]) -> str:
    """The beginning of a list of ids."""
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def gigabytes(count: float) -> str:
    """Bytes in GB, in words."""
    return f"{count / 1e9:.1f} GB"


def write_lists(out: Path, voc: Path, lists: Lists, labels: Path) -> None:
    """Write the lists and the image-level labels of their images, in the layout that the host reads.

    Args:
        out: folder. `all/` holds train_aug_id.txt and val_id.txt for training and CAM files, `train/` the same with the images
            of train alone, `cls_labels.npy` the labels, and `images.json` every photo and mask with its size in bytes.
    """
    known = read_labels(labels, VOC_CLASSES)
    for folder, ids in (("all", lists.train_aug), ("train", lists.train)):
        write_ids(out / folder / "train_aug_id.txt", ids)
        write_ids(out / folder / "val_id.txt", lists.val)
    for name, ids in zip(("train_aug", "train", "val"), lists):
        write_ids(out / f"{name}.txt", ids)
    wanted = list(dict.fromkeys([*lists.train_aug, *lists.val]))
    rows: Dict[str, np.ndarray] = {name: known[name].astype(np.float32) for name in wanted}
    with (out / "cls_labels.npy").open("wb") as file:
        np.save(file, np.array(rows, dtype=object), allow_pickle=True)
    masks = [*lists.train, *lists.val]
    sizes = {
        "JPEGImages": {name: (voc / "JPEGImages" / f"{name}.jpg").stat().st_size for name in wanted},
        "SegmentationClass": {name: (voc / "SegmentationClass" / f"{name}.png").stat().st_size for name in masks},
    }
    write_json(out / "images.json", {"pairs": int(sum(row.sum() for row in rows.values())), **sizes})


def write_ids(path: Path, ids: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")


def count_pairs(labels: Path, ids: Sequence[str]) -> int:
    """Pairs of an image and one of its classes; 0 where the labels cannot be read."""
    try:
        known = read_labels(labels, VOC_CLASSES)
    except (OSError, ValueError):
        return 0
    return int(sum(int(known[name].sum()) for name in ids if name in known))


def report(found: Sequence[Missing]) -> str:
    """All of it as text."""
    return "\n".join([f"{len(found)} things are missing:", *map(str, found)])
