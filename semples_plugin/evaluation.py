"""How good pseudo labels are: the PASCAL VOC metric, from one confusion matrix over the whole set.

Averaging a per-image IoU is another metric and flatters rare classes; here all pixels of the set are counted together, and
pixels labelled `ignore_index` (255 in VOC) are left out.
"""

from __future__ import annotations

from typing import List, Optional

import numpy as np

__all__ = ["confusion_matrix", "iou_per_class", "mean_iou"]


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
