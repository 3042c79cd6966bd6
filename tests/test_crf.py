"""The dense CRF. It needs a build of pydensecrf; without one, only the message is tested."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from semples_plugin import crf, masks
from semples_plugin.errors import MissingLibraryError, SemplesError


def scene() -> "tuple[Tensor, Tensor]":
    """A red square on green; the mask is too small on one side, too large on the other, and blurred."""
    img = torch.zeros(3, 40, 48)
    img[1] = 0.8
    img[:, 10:30, 12:36] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    mask = torch.full((40, 48), 0.1)
    mask[14:34, 10:33] = 0.8
    return img, mask[None]


def test_without_pydensecrf_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, make_refiner: Any, make_batch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(MissingLibraryError, match="pip install pydensecrf2") as caught:
        crf.dense_crf(*scene())
    assert isinstance(caught.value, (SemplesError, ModuleNotFoundError)) and caught.value.name == "pydensecrf"
    with pytest.raises(MissingLibraryError, match="align='crf' needs pydensecrf"):  # before the steps on CLIP
        make_refiner().refine_masks(*make_batch(), align="crf")
    make_refiner().refine_masks(*make_batch(), align="pamr", clip_steps=0)


def test_the_mask_takes_the_shape_of_the_square() -> None:
    pytest.importorskip("pydensecrf.densecrf")
    img, mask = scene()
    got = crf.dense_crf(img, mask)
    square = img[0] > 0.5

    def iou(one: Tensor) -> float:
        return ((one & square).sum() / (one | square).sum()).item()

    assert got.shape == mask.shape and got.dtype == mask.dtype and got.min() >= 0 and got.max() <= 1
    assert iou(mask[0] > 0.5) < 0.8 and iou(got[0] > 0.5) > 0.95
    assert torch.equal(got, crf.dense_crf(img, mask))  # the same twice


def test_classes_and_background_are_probabilities_and_absent_ones_stay_zero(make_refiner: Any, make_batch: Any) -> None:
    pytest.importorskip("pydensecrf.densecrf")
    img, mask = scene()
    two = torch.cat([mask, mask.flip(2)])
    assert crf.dense_crf(img, two).sum(0).max() <= 1 + 1e-5
    assert crf.dense_crf(img, two[:0]).shape == (0, 40, 48)
    img, cam, labels = make_batch()
    refined = make_refiner().refine_masks(img, cam, labels, align="crf", clip_steps=0).masks
    assert refined.shape == (*labels.shape, *img.shape[2:]) and not refined[labels == 0].any() and refined.isfinite().all()


def test_certain_masks_and_masks_outside_of_0_to_1_stay_finite() -> None:
    pytest.importorskip("pydensecrf.densecrf")
    img, mask = scene()
    for hard in ((mask > 0.5).float(), mask * 0, mask * 0 + 1, mask * 3 - 1):
        assert masks.align_masks(img[None], hard, torch.tensor([[0, 0]]), "crf").isfinite().all()
