"""The VOC metric counted literally, and random CAMs with ground truth to count on."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import numpy as np

THRESHOLDS = [i / 100 for i in range(100)]
Cams = Dict[int, np.ndarray]


def literal_counts(
    images: Sequence[Tuple[Cams, np.ndarray]], threshold: float, num_labels: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(TP, P, T) per label, line by line as the evaluation scripts of MCTformer, WeakTr and TransCAM count."""
    tp, p, t = (np.zeros(num_labels, np.int64) for _ in range(3))
    for cams, gt in images:
        tensor = np.zeros((num_labels, *gt.shape), np.float32)
        for key in cams:
            tensor[key + 1] = cams[key]
        tensor[0, :, :] = threshold
        predict = np.argmax(tensor, axis=0).astype(np.uint8)
        cal = gt < 255
        mask = (predict == gt) * cal
        for i in range(num_labels):
            p[i] += np.sum((predict == i) * cal)
            t[i] += np.sum((gt == i) * cal)
            tp[i] += np.sum((gt == i) * mask)
    return tp, p, t


def some_images(seed: int, num_labels: int = 5, count: int = 3, ties: bool = True) -> List[Tuple[Cams, np.ndarray]]:
    """Images of different sizes; with `ties` the CAMs hit thresholds and one another exactly. Some classes occur nowhere."""
    generator = np.random.default_rng(seed)
    images = []
    for i in range(count):
        shape = (6 + i, 9 - i)
        keys = generator.permutation(num_labels - 2)[: generator.integers(0, num_labels - 1)]  # the last class never
        values = generator.random((len(keys), *shape))
        if ties:
            values = np.round(values * 62) / 100 - 0.01
        gt = generator.integers(0, num_labels - 1, shape).astype(np.uint8)
        gt[generator.random(shape) < 0.2] = 255
        images.append(({int(k): v.astype(np.float32) for k, v in zip(keys, values)}, gt))
    return images
