"""How good pseudo labels are: the PASCAL VOC metric, from one confusion matrix over the whole set.

Averaging a per-image IoU is another metric and flatters rare classes; here all pixels of the set are counted together, and
pixels labelled `ignore_index` (255 in VOC) are left out.
"""

from __future__ import annotations

from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

__all__ = ["ClassScore", "Curve", "best_class", "class_scores", "confusion_matrix", "iou_per_class", "mean_iou"]


def confusion_matrix(
    prediction: np.ndarray, target: np.ndarray, num_labels: int, ignore_index: Optional[int] = 255
) -> np.ndarray:
    """Pixel counts (num_labels, num_labels) int64, rows: target, columns: prediction. Add them up over images.

    Args:
        prediction, target: label maps of one shape, whole numbers; 0 is background.
        num_labels: number of labels, background included.
        ignore_index: target label that is not counted.

    Raises:
        ValueError: if the shapes differ, or a label lies outside 0..num_labels-1.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"`prediction` must have the shape of `target`, {target.shape}; got {prediction.shape}.")
    counted = np.ones(target.shape, bool) if ignore_index is None else target != ignore_index
    rows, columns = target[counted].astype(np.int64), prediction[counted].astype(np.int64)
    for name, values in (("target", rows), ("prediction", columns)):
        if values.size and (values.min() < 0 or values.max() >= num_labels):
            raise ValueError(
                f"`{name}` must hold labels from 0 to {num_labels - 1}; got {values.min()} to {values.max()}. "
                "Is num_labels counted with background?"
            )
    return np.bincount(rows * num_labels + columns, minlength=num_labels**2).reshape(num_labels, num_labels)


def iou_per_class(confusion: np.ndarray) -> List[Optional[float]]:
    """Intersection over union of every label; None for a label that neither target nor prediction has."""
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return [float(h / u) if u else None for h, u in zip(hit, union)]


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of the IoU over the labels that occur, background included."""
    present = [value for value in iou_per_class(confusion) if value is not None]
    return float(np.mean(present)) if present else float("nan")


# ---------------------------------------------------------------------------------------------------- folders


def best_class(cams: Mapping[int, np.ndarray], shape: Tuple[int, ...]) -> Tuple[np.ndarray, np.ndarray]:
    """(H, W) highest CAM, at least 0, and its label, 1 + class index, the lower one of equals; label 0 where no CAM is above 0.

    Args:
        cams: class index (from 0) -> (H, W).
        shape: (H, W), for an image without CAMs.
    """
    best, label = np.zeros(shape, np.float32), np.zeros(shape, np.int64)
    for k, cam in sorted(cams.items()):
        if cam.shape != shape:
            raise ValueError(f"The CAM must have the shape of the ground truth, {shape}; got {cam.shape}.")
        higher = cam > best
        best[higher], label[higher] = cam[higher], k + 1
    return best, label


class Curve:
    """Confusion matrices of soft CAMs at many background thresholds, from one pass over the images.

    At threshold t a pixel is called the class with the highest CAM if that is more than t (as float32), else background; of
    equal CAMs the lower class index wins. That is what the baselines' own evaluation scripts do.

    Args:
        thresholds: background thresholds, ascending.
        num_labels: number of labels, background included.
        ignore_index: target label that is not counted.
    """

    def __init__(self, thresholds: Sequence[float], num_labels: int, ignore_index: Optional[int] = 255):
        self.thresholds = list(thresholds)
        if self.thresholds != sorted(set(self.thresholds)) or not self.thresholds:
            raise ValueError(f"`thresholds` must ascend and hold at least one; got {self.thresholds[:5]} ...")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        steps = len(self.thresholds) + 1
        self._counts = np.zeros((num_labels, num_labels, steps), np.int64)  # target, class, thresholds passed

    def add(self, cams: Mapping[int, np.ndarray], target: np.ndarray) -> None:
        """Count one image: class index (from 0) -> (H, W) CAM, and the target label map (H, W)."""
        best, label = best_class(cams, target.shape)
        passed = np.searchsorted(np.asarray(self.thresholds, np.float32), best, side="left")  # thresholds below the CAM
        counted = np.ones(target.shape, bool) if self.ignore_index is None else target != self.ignore_index
        rows, columns, depth = target[counted].astype(np.int64), label[counted], passed[counted]
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_labels):
            raise ValueError(f"`target` must hold labels from 0 to {self.num_labels - 1}; got {rows.min()} to {rows.max()}.")
        flat = (rows * self.num_labels + columns) * self._counts.shape[2] + depth
        self._counts += np.bincount(flat, minlength=self._counts.size).reshape(self._counts.shape)

    def merge(self, other: "Curve") -> None:
        """Add the counts of another curve with the same thresholds."""
        self._counts += other._counts

    def confusion(self, index: int, high: Optional[int] = None) -> np.ndarray:
        """Confusion matrix (num_labels, num_labels) at `thresholds[index]`.

        With `high`, pixels that pass this threshold and not `thresholds[high]` are uncertain and left out.
        """
        result = self._counts[:, :, (index if high is None else high) + 1 :].sum(2)
        result[:, 0] += self._counts[:, :, : index + 1].sum((1, 2))
        return result

    def miou(self, high: Optional[int] = None) -> List[float]:
        """mIoU at every threshold, with `high` at those before it; `mean_iou(self.confusion(i, high))`, all at once."""
        below = self._counts.cumsum(2)[:, :, :-1]  # (target, class, T) counted as background
        below, most = (below, below) if high is None else (below[:, :, :high], below[:, :, high : high + 1])
        called = np.repeat(self._counts.sum(2, keepdims=True), below.shape[2], 2) - most
        called[:, 0] += below.sum(1)
        hit = np.einsum("kkt->kt", called).astype(np.float64)
        union = called.sum(0) + called.sum(1) - hit
        with np.errstate(invalid="ignore"):
            iou = np.where(union > 0, hit / union, np.nan)
        occurs = (union > 0).sum(0)
        return [float(np.nansum(iou[:, t]) / occurs[t]) if occurs[t] else float("nan") for t in range(below.shape[2])]


class ClassScore(NamedTuple):
    """Figures of one label, each None where nothing is there to divide by. false_positive and false_negative are shares of
    the union, so that they and the IoU add up to 1."""

    name: str
    iou: Optional[float]
    precision: Optional[float]
    recall: Optional[float]
    false_positive: Optional[float]
    false_negative: Optional[float]


def class_scores(confusion: np.ndarray, names: Sequence[str]) -> List[ClassScore]:
    """Per-label figures; `names` with background first."""
    scores = []
    for k, name in enumerate(names):
        hit, said, true = int(confusion[k, k]), int(confusion[:, k].sum()), int(confusion[k].sum())
        union = said + true - hit

        def share(value: int, whole: int) -> Optional[float]:
            return value / whole if whole else None

        scores.append(
            ClassScore(
                name, share(hit, union), share(hit, said), share(hit, true), share(said - hit, union), share(true - hit, union)
            )
        )
    return scores
