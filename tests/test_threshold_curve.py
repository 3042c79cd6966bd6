from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semples_plugin.metrics import Curve, class_scores, mean_iou
from tests.voc_metric import THRESHOLDS, literal_counts, some_images


@given(st.integers(0, 10_000), st.booleans())
def test_curve_counts_as_the_baselines_do_at_every_threshold(seed: int, ties: bool) -> None:
    images, parts = some_images(seed, ties=ties), []
    curve = Curve(THRESHOLDS, 5)
    for cams, gt in images:
        one = Curve(THRESHOLDS, 5)
        one.add(cams, gt)
        parts.append(one)
        curve.merge(one)
    miou = curve.miou()
    for i, threshold in enumerate(THRESHOLDS):
        tp, p, t = literal_counts(images, threshold, 5)
        confusion = curve.confusion(i)
        assert np.array_equal(np.diag(confusion), tp)
        assert np.array_equal(confusion.sum(0), p) and np.array_equal(confusion.sum(1), t)
        assert miou[i] == pytest.approx(mean_iou(confusion), rel=1e-12, nan_ok=True)
        # the scripts divide by T + P - TP + 1e-10 and average over the labels of the data set
        assert miou[i] == pytest.approx(np.mean([v for v, n in zip(tp / (t + p - tp + 1e-10), t + p) if n]), rel=1e-6)
        for score, hit, said, true in zip(class_scores(confusion, list("abcde")), tp, p, t):
            union = said + true - hit
            assert score.iou == (hit / union if union else None)
            assert score.precision == (hit / said if said else None) and score.recall == (hit / true if true else None)
            assert score.false_positive == ((said - hit) / union if union else None)
            assert score.false_negative == ((true - hit) / union if union else None)
            if union:
                assert score.iou + score.false_positive + score.false_negative == pytest.approx(1)


def test_curve_ties_by_hand() -> None:
    third = np.float32(0.3)
    cams = {0: np.array([[third, 0.5, 0.2, -1]], np.float32), 1: np.array([[third, 0.5, 0.4, 0]], np.float32)}
    curve = Curve([0.0, 0.3, 0.5], 3)
    curve.add(cams, np.array([[1, 1, 2, 0]]))
    assert [np.diag(curve.confusion(i)).tolist() for i in range(3)] == [[1, 2, 1], [1, 1, 1], [1, 0, 0]]


def test_curve_between_two_thresholds_by_hand() -> None:
    cams = {0: np.array([[0.2, 0.3, 0.4, 0.5, 0.6, 0.9]], np.float32), 1: np.array([[0, 0, 0, 0, 0.9, 0]], np.float32)}
    curve = Curve([0.3, 0.5], 3)
    curve.add(cams, np.array([[0, 1, 1, 1, 1, 255]]))
    assert curve.confusion(0, 1).tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]  # 0.4 and 0.5 are between
    assert curve.confusion(0, 0).tolist() == curve.confusion(0).tolist()
    assert curve.miou(1) == pytest.approx([mean_iou(curve.confusion(0, 1))])


def test_curve_without_images_or_cams() -> None:
    curve = Curve([0.1, 0.2], 3)
    assert not curve.confusion(0).any() and all(math.isnan(value) for value in curve.miou())
    curve.add({}, np.zeros((2, 2), np.uint8))
    assert curve.miou() == [1.0, 1.0] and curve.confusion(0)[0, 0] == 4
    curve.add({1: np.ones((2, 2), np.float32)}, np.full((2, 2), 255, np.uint8))
    assert curve.confusion(1).sum() == 4


def test_curve_refuses_wrong_arguments() -> None:
    for thresholds in ([], [0.2, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match="`thresholds` must ascend and hold at least one"):
            Curve(thresholds, 3)
    with pytest.raises(ValueError, match=r"shape of the ground truth, \(2, 3\); got \(3, 2\)"):
        Curve([0.5], 3).add({0: np.zeros((3, 2), np.float32)}, np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="`target` must hold labels from 0 to 2; got 0 to 3"):
        Curve([0.5], 3).add({}, np.array([[0, 3]]))
