"""One HTML page of what a refinement changed: figures, curves, pictures, prompts. It opens from a file and loads nothing.

The page is the template `report.html`; this module computes what the template shows. Flow: `evaluate_folder` -> **report**.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .._files import write_atomically
from ..errors import CamFileError
from ..metrics import best_class
from ..prompts import NearestWords
from .cams import cam_paths, read_cam_file
from .evaluate_folder import Result, evaluate_cams
from .images import find_image, read_image, read_label_png, voc_palette
from .pages import data_uri, heat_map, page_template

__all__ = ["THRESHOLDS", "write_report"]

THRESHOLDS = [i / 100 for i in range(100)]


def write_report(
    path: Path,
    images: Path,
    before: Path,
    after: Path,
    gt: Path,
    classes: Sequence[str],
    *,
    ids: Optional[Sequence[str]] = None,
    split: str = "",
    title: str = "What the refinement changed",
    rows: int = 8,
    prompts: Optional[Sequence[NearestWords]] = None,
) -> Dict[str, str]:
    """Write the page.

    Args:
        path: the HTML file.
        images: folder of images.
        before, after: folders of the host's CAM files and of the refined ones.
        gt: folder of ground-truth PNGs.
        classes: class names, without background.
        ids: images to count; by default all of `before`.
        split: name of the split, for the record.
        title: title of the page.
        rows: images of each kind: most improved, most worsened, random.
        prompts: the learned prompts in words, see `PromptRefiner.nearest_words`.

    Returns:
        Id -> reason, for images that could not be counted or shown.

    Raises:
        ModuleNotFoundError: if Jinja2 is not installed.
    """
    template = page_template("report.html")
    names = ["background", *classes]
    paths = (cam_paths(before), cam_paths(after))
    ids = list(paths[0]) if ids is None else list(ids)
    first = evaluate_cams(before, gt, names, ids, THRESHOLDS, chosen=True, split=split)
    second = evaluate_cams(after, gt, names, ids, THRESHOLDS, chosen=True, split=split)
    failed = {**first.failed, **second.failed}
    both = sorted(set(first.per_image) & set(second.per_image))
    gain = {name: second.per_image[name] - first.per_image[name] for name in both}
    groups: List[Tuple[str, List[_Image]]] = []
    for heading, chosen in _choose(gain, rows).items():
        shown = []
        for name in chosen:
            try:
                shown.append(_image(name, images, *paths, gt, classes, first, second))
            except (CamFileError, OSError, ValueError) as error:
                failed[name] = str(error)
        groups.append((heading, shown))
    page = template.render(
        title=title,
        before=first,
        after=second,
        figures=_figures(first, second, gain),
        bars=[(a.name, a.iou, b.iou) for a, b in zip(first.classes, second.classes) if (a.iou, b.iou) != (None, None)],
        plot=_plot(first, second),
        prompts=prompts,
        groups=groups,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))
    return failed


# ---------------------------------------------------------------------------------------------------- figures


def _choose(gain: Mapping[str, float], rows: int) -> Dict[str, List[str]]:
    """Heading -> ids of the images to show under it."""
    order = sorted(gain, key=lambda name: (-gain[name], name))
    return {
        "Most improved": [name for name in order if gain[name] > 0][:rows],
        "Most worsened": [name for name in reversed(order) if gain[name] < 0][:rows],
        "Random": sorted(random.Random(0).sample(list(gain), min(rows, len(gain)))),
    }


def _figures(first: Result, second: Result, gain: Mapping[str, float]) -> List[Tuple[str, str]]:
    """Value and label of each figure at the top of the page."""

    def mean(result: Result, key: str) -> float:
        values = [getattr(score, key) for score in result.classes if getattr(score, key) is not None]
        return 100 * float(np.mean(values)) if values else float("nan")

    better, worse = sum(g > 0 for g in gain.values()), sum(g < 0 for g in gain.values())
    return [
        (f"{100 * first.miou:.1f} → {100 * second.miou:.1f}", "mean IoU, %"),
        (f"{100 * (second.miou - first.miou) + 0.0:+.1f}".replace("-0.0", "0.0"), "change, points"),
        (f"{mean(first, 'false_positive'):.1f} → {mean(second, 'false_positive'):.1f}", "false-positive share, %"),
        (f"{mean(first, 'false_negative'):.1f} → {mean(second, 'false_negative'):.1f}", "false-negative share, %"),
        (f"{better} / {worse}", "images better / worse"),
    ]


def _plot(first: Result, second: Result) -> Dict[str, Any]:
    """The curves of mIoU over the threshold, without the points that are NaN, and the upper end of the axis."""
    points = [[(threshold, miou) for threshold, miou in result.curve if not np.isnan(miou)] for result in (first, second)]
    highest = max((miou for curve in points for _, miou in curve), default=1.0)
    best = [(result.threshold, result.miou) if curve else None for result, curve in zip((first, second), points)]
    return {
        "top": max(0.1, float(np.ceil(highest * 10) / 10)),
        "curves": [{"points": curve, "best": mark} for curve, mark in zip(points, best)],
    }


# ---------------------------------------------------------------------------------------------------- pictures


class _Image(NamedTuple):
    """One image as the page shows it.

    Attributes:
        id: of the image.
        before, after: IoU of this image in %.
        classes: names of the classes in its CAM files.
        pictures: caption and data URI of each picture.
    """

    id: str
    before: float
    after: float
    classes: str
    pictures: List[Tuple[str, str]]


def _image(
    name: str,
    images: Path,
    before: Mapping[str, Path],
    after: Mapping[str, Path],
    gt: Path,
    classes: Sequence[str],
    first: Result,
    second: Result,
) -> _Image:
    photo = read_image(find_image(images, name))  # (H, W, 3)
    target = read_label_png(gt / f"{name}.png")  # (H, W)
    if photo.shape[:2] != target.shape:
        raise CamFileError(f"its image has size {photo.shape[:2]}, its ground truth {target.shape}")
    old, new = (read_cam_file(paths[name], len(classes)).cams for paths in (before, after))
    score, index = best_class(new, target.shape)
    label_map = np.where(score > np.float32(second.threshold or 0.0), index, 0)
    present = sorted({*old, *new})
    largest = max(present, key=lambda k: float((target == k + 1).sum()), default=None)  # the class whose CAMs are shown
    label = "none" if largest is None else classes[largest]
    pictures = {
        "image": photo,
        f"CAM of {label}": heat_map(photo, None if largest is None else old.get(largest)),
        f"refined, {label}": heat_map(photo, None if largest is None else new.get(largest)),
        "pseudo label": _colors(label_map),
        "ground truth": _colors(target),
    }
    return _Image(
        name,
        100 * first.per_image[name],
        100 * second.per_image[name],
        ", ".join(classes[k] for k in present) or "no class",
        [(caption, data_uri(picture)) for caption, picture in pictures.items()],
    )


def _colors(labels: np.ndarray) -> np.ndarray:
    """A label map (H, W) as (H, W, 3) in VOC's colors."""
    return np.array(voc_palette(), np.uint8).reshape(256, 3)[labels]
