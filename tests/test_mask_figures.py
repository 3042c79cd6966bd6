"""The figures of the examples on two thresholds and on sources of masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.photos import mask_sources
from examples.two_thresholds import figures
from semples_plugin.masks import pamr


def test_what_stays_uncertain_counts_neither_as_right_nor_as_wrong() -> None:
    truth, labels = np.array([[[0, 0, 1, 1, 2]]]), np.array([[[0, 1, 1, 255, 255]]])
    found = figures(labels, truth)
    assert list(found.values()) == pytest.approx([40, 50, 100, 100 / 3])


def test_sources_of_masks_and_their_scores() -> None:
    torch.manual_seed(0)
    photos, labels = [torch.rand(3, 20, 24)] * 4, torch.tensor([[1, 0], [0, 1]] * 2)
    cams = [torch.zeros(1, 20, 24) for _ in photos]
    for cam in cams:
        cam[0, 5:15, 5:15] = 0.8
    found = {source.name: source for source in mask_sources.sources(photos, cams, 200)}
    assert list(found)[:2] == ["none", "pamr"]
    assert torch.equal(found["pamr"].make(1, 0.5), pamr(photos[1][None], cams[1][None])[0])
    truth = [np.where(cam[0].numpy() > 0, 1 + i % 2, 0) for i, cam in enumerate(cams)]
    right = mask_sources.confusions(found["none"], 0.5, range(4), labels, truth)
    empty = mask_sources.confusions(found["none"], 0.9, range(4), labels, truth)
    assert right.shape == (4, 3, 3) and right.sum(0).trace() == right.sum() == 4 * 480
    assert empty.sum(0)[0, 0] == 4 * 380 and empty.sum(0).trace() == 4 * 380
    assert mask_sources.difference(right, right) == "+0.0 (+0.0 to +0.0)"
    assert mask_sources.difference(right, empty).startswith("+73.6")
