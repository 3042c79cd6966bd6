from __future__ import annotations

from typing import Any, List, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semples_plugin import crops, regions

PAIR = torch.tensor([[0, 0]])


def square(size: int, top: int, left: int, height: int, width: int) -> Tensor:
    """(1, size, size), 1 inside a rectangle."""
    mask = torch.zeros(1, size, size)
    mask[:, top : top + height, left : left + width] = 1
    return mask


# ---------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "mask, margin, expected",
    [
        (square(32, 8, 16, 8, 4), 0.0, [25, 100, 50, 125]),
        (square(32, 8, 16, 8, 4), 0.5, [12, 87, 63, 138]),
        (square(32, 0, 28, 4, 4), 0.5, [0, 150, 25, 200]),  # moved inside at the corner
        (square(32, 16, 16, 1, 1), 0.0, [45, 90, 58, 116]),  # one cell: an eighth of each side
        (square(32, 0, 0, 32, 32), 0.0, [0, 0, 100, 200]),
        (square(32, 4, 4, 24, 24), 9.0, [0, 0, 100, 200]),
        (torch.zeros(1, 32, 32), 0.1, [0, 0, 100, 200]),  # flat
    ],
)
def test_boxes(mask: Tensor, margin: float, expected: List[int]) -> None:
    assert crops.crop_boxes(mask, (100, 200), margin)[0].tolist() == expected


def test_a_box_depends_on_the_shape_of_the_mask_not_on_its_height() -> None:
    mask = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) ** 8
    assert torch.equal(crops.crop_boxes(mask, (60, 70), 0.1), crops.crop_boxes(mask / 8, (60, 70), 0.1))


@given(st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 70), st.floats(0, 3))
def test_a_box_is_never_empty_and_within_the_image(seed: int, height: int, width: int, margin: float) -> None:
    masks = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(seed)) ** 30
    boxes = crops.crop_boxes(masks, (height, width), margin)
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([height, width])).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    inside = crops.crop_masks(masks, boxes, (height, width), 16)
    assert inside.isfinite().all() and inside.min() >= 0 and inside.max() <= 1


# ---------------------------------------------------------------------------------------------------- crops


def scene(height: int = 96, width: int = 128) -> Tuple[Tensor, Tensor]:
    """A black image with a white rectangle, and its mask at 32 x 32."""
    mask = square(32, 8, 20, 4, 4)
    img = torch.zeros(1, 3, height, width)
    img[:, :, height // 4 : height // 4 + height // 8, 20 * width // 32 : 24 * width // 32] = 1
    return img, mask


def test_a_small_object_fills_the_view_and_its_mask_lies_on_it() -> None:
    img, mask = scene()
    whole = regions.split(regions.resize_image(img, 32), mask, PAIR)[0]
    boxes = crops.crop_boxes(mask, (96, 128), 0.25)
    view, inside = crops.crop_images(img, PAIR, boxes, 32), crops.crop_masks(mask, boxes, (96, 128), 32)
    assert view.shape == (1, 3, 32, 32) and inside.shape == (1, 32, 32)
    assert (whole > 0.5).float().mean() < 0.02 and 0.4 < (view > 0.5).float().mean() < 0.5  # 1 / 1.5^2
    assert ((view[:, 0] > 0.5) == (inside > 0.5)).float().mean() > 0.95


def test_the_box_of_a_linear_mask_is_the_linear_mask_of_the_box() -> None:
    ramp = ((torch.arange(16) + 0.5) / 16).expand(1, 16, 16)  # the place itself, as a share of the width
    box = torch.tensor([[10, 20, 30, 50]])
    got = crops.crop_masks(ramp, box, (40, 80), 8)
    assert torch.allclose(got, ((20 + 30 * (torch.arange(8) + 0.5) / 8) / 80).expand(1, 8, 8), atol=1e-6)
    upright = crops.crop_masks(ramp.transpose(1, 2), box, (40, 80), 8)
    assert torch.allclose(upright, ((10 + 20 * (torch.arange(8) + 0.5) / 8) / 40)[:, None].expand(1, 8, 8), atol=1e-6)


def test_a_map_over_the_whole_image_gives_the_whole_image() -> None:
    img, masks = torch.rand(2, 3, 40, 50), 0.5 + 0.5 * torch.rand(2, 32, 32)
    pairs = torch.tensor([[0, 1], [1, 0]])
    boxes = crops.crop_boxes(masks, (40, 50), 0.1)
    assert torch.equal(crops.crop_images(img, pairs, boxes, 32), regions.resize_image(img, 32))
    assert torch.allclose(crops.crop_masks(masks, boxes, (40, 50), 32), masks, atol=1e-5)


def test_gradients_reach_the_mask_inside_the_box_only() -> None:
    mask = scene()[1].double().requires_grad_(True)
    boxes = crops.crop_boxes(mask, (96, 128), 0.0)
    crops.crop_masks(mask, boxes, (96, 128), 8).sum().backward()
    assert (mask.grad[0, 9:11, 21:23] > 0).all() and mask.grad[0, :6].abs().sum() == 0
    assert torch.autograd.gradcheck(lambda m: crops.crop_masks(m, boxes, (96, 128), 4), mask)


# ---------------------------------------------------------------------------------------------------- the refiner


def test_without_the_option_views_are_those_of_the_whole_image(make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(), make_batch()
    pairs = regions.positive_pairs(labels)
    masks, views = refiner._views(img, cam, pairs, 0.1)
    expected = regions.split(refiner._clip_images(img), regions.pair_masks(cam, pairs, (32, 32), "minmax", 0.1), pairs)
    assert all(torch.equal(a, b) for a, b in zip(views, expected))


@pytest.mark.parametrize("options", [{}, {"view_fill": "blur"}, {"view_sharpness": 8.0}, {"max_views": 3}])
def test_every_method_takes_cropped_views(options: Any, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True, view_crop=0.2, **options)
    img, cam, labels = make_batch()
    cam = torch.nn.functional.interpolate(cam.detach()[:, :, 2:4, 2:4], (8, 8)).requires_grad_(True)
    out = refiner.compute(img, cam, labels)
    out.loss.backward()
    assert out.masks.shape == (4, 32, 32) and (cam.grad[labels.bool()].abs().amax((1, 2)) > 0).all()
    whole = make_refiner(learned=True, **options).compute(img, cam, labels)
    assert torch.equal(out.masks, whole.masks) and out.loss != whole.loss
    assert refiner.optimize_cam(img, cam, labels, steps=2).isfinite().all()
    assert refiner.refine_masks(img, cam, labels, clip_steps=1, suppress=True).masks.isfinite().all()
    assert refiner.check([(img, labels)], lambda _: cam.detach(), progress=False).num_images == 2
    assert refiner.compute(img, cam, torch.zeros_like(labels)).loss == 0


def test_view_crop_must_be_a_margin(make_refiner: Any) -> None:
    with pytest.raises(ValueError, match="`view_crop` must be at least 0 and finite; got -0.1"):
        make_refiner(view_crop=-0.1)
