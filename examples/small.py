"""How well small things are found: the mean IoU of (image, class) pairs whose true region is smaller than the median of all."""

from __future__ import annotations

import numpy as np

__all__ = ["small_iou"]


def small_iou(prediction: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> float:
    """Mean IoU of the smaller half of the pairs.

    Args:
        prediction: (N, S, S) label maps, 0 background, 1 + class index.
        truth: (N, S, S) the same, 255 for pixels that are not counted.
        labels: (N, C) image-level labels; pairs without a pixel in `truth` are passed over.
    """
    areas, values = [], []
    for i, k in zip(*labels.nonzero()):
        counted = truth[i] != 255
        own, found = truth[i] == k + 1, (prediction[i] == k + 1) & counted
        if own.any():
            areas.append(own.sum())
            values.append((own & found).sum() / (own | found).sum())
    small = np.array(areas) < np.median(areas)
    return float(np.array(values)[small].mean()) if small.any() else 0.0
