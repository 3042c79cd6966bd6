"""The VOC metric of a folder of pseudo labels or CAM files, and the conditions under which it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ..errors import CamFileError
from ..masks import UNCERTAIN, check_class_count
from ..metrics import ClassScore, Curve, class_scores, confusion_matrix, mean_iou
from .cams import cam_paths, read_cam_file
from .images import check_id, read_label_png

__all__ = ["Result", "evaluate_cams", "evaluate_labels"]


class Result(NamedTuple):
    """The figures of a folder; `str(result)` is a table.

    Attributes:
        miou: mean IoU over the labels that occur, background included.
        classes: figures per label, background first; labels that neither prediction nor ground truth has are None.
        images: number of images counted.
        threshold: background threshold of CAM files, None for label maps.
        chosen: whether that threshold was chosen as the best one on this ground truth.
        curve: (threshold, mIoU) of every threshold that was tried.
        failed: id -> reason for images that were not counted.
        split: name of the split.
        uncertain: share of the labelled pixels that the predictions leave at 255; these are not counted.
        per_image: id -> mIoU of that image alone, for ranking images. `miou` is not the mean of these.
        high: the higher of two thresholds of CAM files, `threshold` the lower; None for one.
    """

    miou: float
    classes: List[ClassScore]
    images: int
    threshold: Optional[float]
    chosen: bool
    curve: List[Tuple[float, float]]
    failed: Dict[str, str]
    split: str
    per_image: Dict[str, float]
    uncertain: float = 0.0
    high: Optional[float] = None

    @property
    def absent(self) -> List[str]:
        """Labels that occur neither in the predictions nor in the ground truth."""
        return [score.name for score in self.classes if score.iou is None]

    @property
    def policy(self) -> str:
        """Where the threshold comes from, in words."""
        if self.threshold is None:
            return "label maps, no threshold"
        return "chosen on this ground truth" if self.chosen else "given"

    def as_json(self) -> Dict[str, Any]:
        """All figures but `per_image`, as JSON can hold them."""
        return {
            "split": self.split,
            "images": self.images,
            "miou": self.miou,
            "threshold": self.threshold if self.high is None else [self.threshold, self.high],
            "threshold_chosen_on_ground_truth": self.chosen,
            "classes": [score._asdict() for score in self.classes],
            "absent": self.absent,
            "curve": self.curve,
            "uncertain": self.uncertain,
            "failed": self.failed,
        }

    def __str__(self) -> str:
        width = max(len(score.name) for score in self.classes)
        lines = [f"{'':<{width}}  {'IoU':>6}  {'prec.':>6}  {'recall':>6}  {'FP':>6}  {'FN':>6}"]
        for score in self.classes:
            if score.iou is not None:
                lines.append(f"{score.name:<{width}}  " + "  ".join(_percent(value) for value in score[1:]))
        lines.append(f"{'mean IoU':<{width}}  {_percent(self.miou)}")
        if self.absent:
            lines.append(f"absent, not in the mean: {', '.join(self.absent)}")
        threshold = "" if self.threshold is None else f" {self.threshold:g}"
        threshold += "" if self.high is None else f" to {self.high:g}, 255 between"
        lines.append(f"split {self.split}, {self.images} images; threshold{threshold}: {self.policy}")
        if self.uncertain:
            lines.append(f"{100 * self.uncertain:.2f} % of the labelled pixels are uncertain (255) and not counted")
        if self.failed:
            lines.append(f"{len(self.failed)} images were not counted")
        return "\n".join(lines)


def _percent(value: Optional[float]) -> str:
    return f"{'-':>6}" if value is None else f"{100 * value:6.2f}"


def evaluate_labels(pred: Path, gt: Path, names: Sequence[str], ids: Optional[Sequence[str]], *, split: str = "") -> Result:
    """Evaluate label PNGs against ground truth.

    Args:
        pred, gt: folders of PNGs.
        names: label names, background first.
        ids: images to count; by default all predictions.
        split: name of the split, for the record.

    Raises:
        ValueError: if there are more than 254 classes beside background.
    """
    check_class_count(len(names) - 1)
    total = np.zeros((len(names), len(names)), np.int64)
    failed: Dict[str, str] = {}
    per_image: Dict[str, float] = {}
    left_out = 0
    wanted = sorted(p.stem for p in pred.glob("*.png") if not p.name.startswith(".")) if ids is None else list(ids)
    for name in _ids_or_error(wanted, pred):
        try:
            check_id(name)
            guess, truth = read_label_png(pred / f"{name}.png"), read_label_png(gt / f"{name}.png")
            uncertain = guess == UNCERTAIN
            if guess.shape == truth.shape:
                left = int((uncertain & (truth != UNCERTAIN)).sum())
                guess, truth = np.where(uncertain, 0, guess), np.where(uncertain, UNCERTAIN, truth)
            one = confusion_matrix(guess, truth, len(names))
        except (ValueError, OSError, MemoryError) as error:  # a CamFileError is a ValueError
            failed[name] = str(error) or type(error).__name__
            continue
        total += one
        left_out += left
        per_image[name] = mean_iou(one)
    share = left_out / max(1, left_out + int(total.sum()))
    return _result(total, names, per_image, None, False, [], failed, split)._replace(uncertain=share)


def evaluate_cams(
    pred: Path,
    gt: Path,
    names: Sequence[str],
    ids: Optional[Sequence[str]],
    thresholds: Sequence[float],
    *,
    chosen: bool,
    split: str = "",
    high: Optional[float] = None,
) -> Result:
    """Evaluate CAM files against ground truth at every threshold; the figures are those of the best one.

    Args:
        pred: folder of CAM files.
        gt: folder of PNGs.
        names: label names, background first.
        ids: images to count; by default all predictions.
        thresholds: background thresholds, ascending.
        chosen: whether the threshold counts as chosen on this ground truth; False for a single one chosen elsewhere.
        split: name of the split, for the record.
        high: higher than all of the thresholds. Pixels between the threshold and this one are uncertain and not counted, as
            those with label 255 in `evaluate_labels`.

    Raises:
        ValueError: if there are more than 254 classes beside background.
    """
    check_class_count(len(names) - 1)
    tried = [*thresholds, *([] if high is None else [high])]
    last = None if high is None else len(thresholds)
    total = Curve(tried, len(names))
    paths = cam_paths(pred)
    failed: Dict[str, str] = {}
    each: Dict[str, List[float]] = {}
    for name in _ids_or_error(list(paths) if ids is None else list(ids), pred):
        one = Curve(tried, len(names))
        try:
            if name not in paths:
                raise CamFileError(f"there is no CAM file for it in {pred}")
            one.add(read_cam_file(paths[name], len(names) - 1).cams, read_label_png(gt / f"{name}.png"))
        except (ValueError, OSError, MemoryError) as error:
            failed[name] = str(error) or type(error).__name__
            continue
        total.merge(one)
        each[name] = one.miou(last)
    curve = total.miou(last)
    best = max(range(len(curve)), key=lambda i: (curve[i] if curve[i] == curve[i] else -1.0, -i))
    per_image = {name: values[best] for name, values in each.items()}
    points = list(zip([float(t) for t in thresholds], curve))
    counted = total.confusion(best, last)
    share = 1 - float(counted.sum() / max(1, total.confusion(best).sum())) if high is not None else 0.0
    result = _result(counted, names, per_image, float(thresholds[best]), chosen, points, failed, split)
    return result._replace(uncertain=share, high=high)


def _ids_or_error(ids: List[str], pred: Path) -> List[str]:
    if not ids:
        raise CamFileError(f"There is nothing to evaluate: {pred} holds no predictions, or the list is empty.")
    return list(dict.fromkeys(ids))


def _result(
    confusion: np.ndarray,
    names: Sequence[str],
    per_image: Dict[str, float],
    threshold: Optional[float],
    chosen: bool,
    curve: List[Tuple[float, float]],
    failed: Dict[str, str],
    split: str,
) -> Result:
    scores = class_scores(confusion, names)
    return Result(mean_iou(confusion), scores, len(per_image), threshold, chosen, curve, failed, split, per_image)
