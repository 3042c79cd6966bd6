"""How masks are scored in the worlds of `world.py`: mIoU, and the co-occurrence share of every class.

Pixel masks are used here alone. The background threshold of a table row is chosen on a validation split; the figures come from
a test split. No training sees either split.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional

import numpy as np
from torch import Tensor

from semples_plugin.masks import pseudo_labels
from semples_plugin.metrics import confusion_matrix, iou_per_class, mean_iou

from .host import Split
from .world import STUFF, WORLD, World

THRESHOLDS = [round(0.1 + 0.02 * i, 2) for i in range(41)]  # background threshold, 0.10 to 0.90


class Row(NamedTuple):
    """Figures of one table row.

    Attributes:
        threshold: background threshold, chosen on validation.
        miou: mean IoU on test, background included.
        iou: IoU per label on test, background first; None for a label that never occurs.
        share: co-occurrence share per class. For class k: of the pixels of k's own stuff, in test images that show k, the
            share that is labeled k.
    """

    threshold: float
    miou: float
    iou: List[Optional[float]]
    share: Dict[str, float]

    @property
    def mean_share(self) -> float:
        return float(np.mean(list(self.share.values())))


def measure(masks: Tensor, split: Split, threshold: float, world: World = WORLD) -> Row:
    """Score soft masks (N, C, S, S) at one background threshold."""
    prediction = pseudo_labels(masks, threshold).numpy()  # (N, S, S)
    count = len(world.things)
    confusion = np.zeros((count + 1,) * 2, np.int64)
    wrong, total = np.zeros(count), np.zeros(count)
    for scene, guess, labels in zip(split.scenes, prediction, split.labels):
        confusion += confusion_matrix(guess, scene.things, count + 1)
        for k in labels.nonzero()[:, 0].tolist():
            own = (scene.stuff == STUFF.index(world.home[world.things[k]])) & (scene.things == 0)
            wrong[k] += (own & (guess == k + 1)).sum()
            total[k] += own.sum()
    share = {name: float(wrong[k] / max(total[k], 1)) for k, name in enumerate(world.things)}
    return Row(threshold, mean_iou(confusion), iou_per_class(confusion), share)


def best_row(val_masks: Tensor, val: Split, test_masks: Tensor, test: Split, world: World = WORLD) -> Row:
    """Test figures at the background threshold that is best on validation."""
    truth = np.stack([scene.things for scene in val.scenes])

    def miou(threshold: float) -> float:
        return mean_iou(confusion_matrix(pseudo_labels(val_masks, threshold).numpy(), truth, len(world.things) + 1))

    threshold = max(THRESHOLDS, key=miou)
    return measure(test_masks, test, threshold, world)
