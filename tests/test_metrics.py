from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semples_plugin.metrics import confusion_matrix, iou_per_class, mean_iou


def maps(seed: int, num_labels: int = 4, ignore: int = 255) -> tuple:
    generator = np.random.default_rng(seed)
    prediction, target = generator.integers(0, num_labels, (2, 5, 6))
    target[generator.random(target.shape) < 0.2] = ignore
    return prediction, target


def test_confusion_matrix_by_hand() -> None:
    target = np.array([[0, 0, 1], [1, 2, 255]])
    prediction = np.array([[0, 1, 1], [1, 0, 2]])
    assert confusion_matrix(prediction, target, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert iou_per_class(confusion_matrix(prediction, target, 3)) == [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0]
    assert mean_iou(confusion_matrix(prediction, target, 3)) == pytest.approx(1 / 3)


@given(st.integers(0, 10_000), st.sampled_from([255, 2, None]))
def test_confusion_matrix_equals_loop(seed: int, ignore: int) -> None:
    prediction, target = maps(seed, ignore=3 if ignore is None else ignore)
    expected = np.zeros((4, 4), np.int64)
    for t, p in zip(target.flatten(), prediction.flatten()):
        if t != ignore:
            expected[t, p] += 1
    got = confusion_matrix(prediction, target, 4, ignore)
    assert got.dtype == np.int64 and np.array_equal(got, expected)


@given(st.integers(0, 10_000))
def test_iou_equals_loop(seed: int) -> None:
    prediction, target = maps(seed)
    values = iou_per_class(confusion_matrix(prediction, target, 5))
    for k in range(5):
        both = ((prediction == k) & (target == k)).sum()
        either = (((prediction == k) | (target == k)) & (target != 255)).sum()
        assert values[k] == (pytest.approx(both / either) if either else None)
    assert values[4] is None
    assert mean_iou(confusion_matrix(prediction, target, 5)) == pytest.approx(np.mean([v for v in values if v is not None]))


def test_perfect_and_disjoint() -> None:
    target = np.array([[0, 1], [2, 255]], np.uint8)
    assert mean_iou(confusion_matrix(np.where(target == 255, 0, target), target, 3)) == 1
    assert mean_iou(confusion_matrix((target + 1) % 3, target, 3)) == 0


def test_set_is_counted_together_not_averaged_per_image() -> None:
    a = confusion_matrix(np.array([1, 1, 1, 1]), np.array([1, 1, 1, 1]), 2)
    b = confusion_matrix(np.array([0, 0]), np.array([0, 1]), 2)
    assert iou_per_class(a + b) == [pytest.approx(0.5), pytest.approx(0.8)]


def test_no_pixels() -> None:
    nothing = confusion_matrix(np.zeros((2, 2), int), np.full((2, 2), 255), 3)
    assert nothing.sum() == 0 and iou_per_class(nothing) == [None] * 3 and math.isnan(mean_iou(nothing))


def test_small_types_do_not_overflow() -> None:
    target = np.full(7, 200, np.uint8)
    assert confusion_matrix(target, target, 201)[200, 200] == 7


def test_shapes_differ() -> None:
    with pytest.raises(ValueError, match=r"`prediction` must have the shape of `target`, \(2, 3\); got \(3, 2\)"):
        confusion_matrix(np.zeros((3, 2), int), np.zeros((2, 3), int), 2)


def test_labels_out_of_range() -> None:
    with pytest.raises(ValueError, match="`target` must hold labels from 0 to 2; got 0 to 3. Is num_labels counted with"):
        confusion_matrix(np.array([0, 0]), np.array([0, 3]), 3)
    with pytest.raises(ValueError, match="`prediction` must hold labels from 0 to 2; got -1 to 0"):
        confusion_matrix(np.array([0, -1]), np.array([0, 2]), 3)
    with pytest.raises(ValueError, match="`target` must hold labels from 0 to 2; got 0 to 255"):
        confusion_matrix(np.array([0, 0]), np.array([0, 255]), 3, ignore_index=None)
