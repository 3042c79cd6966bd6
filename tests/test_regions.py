from __future__ import annotations

from typing import List, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semples_plugin import regions

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OTHER = ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
PAIR = torch.tensor([[0, 0]])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask_of(values: List[List[float]], eps: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask of one map at the map's own size."""
    cam = torch.tensor(values, dtype=dtype)[None, None]
    return regions.pair_masks(cam, PAIR, cam.shape[2:], "minmax", eps)[0]


def test_positive_pairs_in_order_of_images() -> None:
    labels = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    assert regions.positive_pairs(labels).tolist() == [[0, 1], [0, 2], [2, 0], [2, 2]]
    assert regions.positive_pairs(torch.zeros(2, 3)).shape == (0, 2)


# ------------------------------------------------------------------------------------------------ masks


def test_minmax_reaches_zero_and_one_without_eps() -> None:
    assert torch.equal(mask_of([[-3.0, 1.0], [-1.0, 5.0]]), torch.tensor([[0.0, 0.5], [0.25, 1.0]]))


def test_eps_keeps_the_maximum_below_one() -> None:
    mask = mask_of([[0.0, 0.1], [0.05, 0.2]], eps=0.1)  # range 0.2: divided by 0.3
    assert torch.allclose(mask, torch.tensor([[0.0, 1 / 3], [1 / 6, 2 / 3]]))


@pytest.mark.parametrize("value", [-7.0, 0.0, 1e6])
def test_flat_map_gives_zeros_and_finite_gradients(value: float) -> None:
    cam = torch.full((1, 1, 3, 3), value, requires_grad=True)
    mask = regions.pair_masks(cam, PAIR, (5, 5), "minmax", 0.1)
    assert torch.equal(mask, torch.zeros(1, 5, 5))
    weights = random(1, 5, 5)
    gradient = torch.autograd.grad((weights * mask).sum(), cam)[0]
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e6, 1e30])
def test_huge_and_tiny_ranges_stay_in_the_unit_interval(scale: float) -> None:
    cam = scale * random(1, 1, 6, 6)
    mask = regions.pair_masks(cam, PAIR, (6, 6), "minmax", 0.1)
    spread = (cam.max() - cam.min()).item()
    assert mask.min() == 0 and mask.max() <= 1
    assert mask.max().item() == pytest.approx(spread / (spread + 0.1), rel=1e-5)


def test_all_negative_map_equals_its_shift() -> None:
    cam = random(1, 1, 5, 5)
    shifted = regions.pair_masks(cam - 50, PAIR, (8, 8), "minmax", 0.1)
    assert torch.allclose(shifted, regions.pair_masks(cam, PAIR, (8, 8), "minmax", 0.1), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_of_masks(dtype: torch.dtype, result: torch.dtype) -> None:
    cam = random(2, 3, 6, 6, dtype=dtype).requires_grad_(True)
    pairs = torch.tensor([[0, 2], [1, 0]])
    mask = regions.pair_masks(cam, pairs, (9, 9), "minmax", 0.1)
    assert mask.dtype == result
    exact = regions.pair_masks(cam.detach().double(), pairs, (9, 9), "minmax", 0.1)
    assert torch.allclose(mask.double(), exact, atol=1e-6)
    gradient = torch.autograd.grad(mask[0].square().sum(), cam)[0]
    assert gradient.dtype == dtype and gradient[0, 2].abs().max() > 0
    assert gradient[0, :2].abs().max() == 0 and gradient[1].abs().max() == 0


def test_one_by_one_cam() -> None:
    cam = torch.tensor([[[[3.0]]]], requires_grad=True)
    assert torch.equal(regions.pair_masks(cam, PAIR, (4, 4), "minmax", 0.1), torch.zeros(1, 4, 4))
    same = regions.pair_masks(cam, PAIR, (4, 4), None, 0.1)
    assert torch.equal(same, torch.full((1, 4, 4), 3.0))
    assert torch.autograd.grad(same.sum(), cam)[0].item() == 16


def test_no_normalization_only_enlarges() -> None:
    cam = torch.tensor([[[[0.0, 1.0], [0.5, 0.25]]]])
    mask = regions.pair_masks(cam, PAIR, (3, 3), None, 0.1)[0]
    assert torch.allclose(mask, torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.4375, 0.625], [0.5, 0.375, 0.25]]))


def test_corners_are_aligned_and_normalization_comes_after_enlarging() -> None:
    cam = random(1, 1, 4, 7)
    mask = regions.pair_masks(cam, PAIR, (11, 13), "minmax", 0.1)[0]
    flat = (cam[0, 0] - cam.min()) / (cam.max() - cam.min() + 0.1)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert mask[row, column].item() == pytest.approx(flat[row, column].item(), abs=0.1)
    plain = regions.pair_masks(cam, PAIR, (11, 13), None, 0.1)[0]
    assert torch.allclose(mask, (plain - plain.min()) / (plain.max() - plain.min() + 0.1))


@pytest.mark.parametrize("eps", [1e-4, 0.1])
@pytest.mark.parametrize("normalize", ["minmax", None])
def test_masks_pass_gradcheck(normalize: str, eps: float) -> None:
    cam = random(2, 2, 3, 4).double().requires_grad_(True)
    pairs = torch.tensor([[0, 1], [1, 0], [1, 1]])
    assert torch.autograd.gradcheck(lambda x: regions.pair_masks(x, pairs, (5, 6), normalize, eps), (cam,))


def test_no_pairs_give_an_empty_attached_tensor() -> None:
    cam = random(2, 3, 4, 4).requires_grad_(True)
    mask = regions.pair_masks(cam, torch.zeros(0, 2, dtype=torch.long), (6, 6), "minmax", 0.1)
    assert mask.shape == (0, 6, 6) and mask.requires_grad
    assert torch.equal(torch.autograd.grad(mask.sum(), cam)[0], torch.zeros_like(cam))


@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(-1e4, 1e4),
    st.floats(1e-3, 1e4),
    st.sampled_from([1e-4, 0.1, 1.0]),
)
def test_masks_are_in_the_unit_interval(seed: int, height: int, width: int, shift: float, scale: float, eps: float) -> None:
    cam = shift + scale * random(1, 1, height, width, seed=seed)
    mask = regions.pair_masks(cam, PAIR, (12, 10), "minmax", eps)
    assert mask.shape == (1, 12, 10)
    assert mask.min() == 0 and mask.max() <= 1


@given(st.integers(0, 10_000), st.floats(-100, 100), st.floats(0.01, 100))
def test_masks_ignore_shift_and_scale_without_eps(seed: int, shift: float, scale: float) -> None:
    cam = random(1, 1, 5, 5, seed=seed).double()
    mask = regions.pair_masks(cam, PAIR, (9, 9), "minmax", 0.0)
    assert torch.allclose(regions.pair_masks(scale * cam + shift, PAIR, (9, 9), "minmax", 0.0), mask, atol=1e-9)
    assert mask.max().item() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(("old", "new"), [(None, IMAGENET), (IMAGENET, None), (IMAGENET, OTHER), (None, None)])
def test_change_of_statistics_there_and_back(old: Tuple, new: Tuple) -> None:
    img = random(2, 3, 5, 5)
    there = regions.change_stats(img, old, new)
    assert torch.allclose(regions.change_stats(there, new, old), img, atol=1e-5)
    assert torch.equal(there, img) == (old == new)


def test_change_of_statistics_values() -> None:
    img = torch.full((1, 3, 1, 1), 0.6)
    expected = [(0.6 - m) / s for m, s in zip(*IMAGENET)]
    assert regions.change_stats(img, None, IMAGENET).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    undone = [0.6 * s + m for m, s in zip(*OTHER)]
    assert regions.change_stats(img, OTHER, None).flatten().tolist() == pytest.approx(undone, rel=1e-5)


def test_resize_image() -> None:
    img = random(2, 3, 20, 30, dtype=torch.float64).requires_grad_(True)
    small = regions.resize_image(img, 10)
    assert small.shape == (2, 3, 10, 10) and small.dtype == torch.float32 and not small.requires_grad
    flat = regions.resize_image(torch.full((1, 3, 50, 33), 0.25), 16)
    assert torch.allclose(flat, torch.full((1, 3, 16, 16), 0.25))
    same = torch.rand(1, 3, 16, 16)
    assert torch.equal(regions.resize_image(same, 16), same)


def test_resize_antialiases() -> None:
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    inner = regions.resize_image(stripes, 16)[..., 2:-2]
    assert (inner - 0.5).abs().max() < 0.05


def test_split_is_literal() -> None:
    img, mask = random(2, 3, 4, 4), torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor([[0, 1], [1, 0], [1, 2]])
    foreground, background = regions.split(img, mask, pairs)
    for p, b in enumerate((0, 1, 1)):
        assert torch.allclose(foreground[p], mask[p] * img[b])
        assert torch.allclose(background[p], (1 - mask[p]) * img[b], atol=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_split_sums_to_the_image(seed: int, size: int) -> None:
    img = random(2, 3, size, size, seed=seed)
    pairs = torch.tensor([[1, 0], [0, 0], [0, 3]])
    mask = torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed))
    foreground, background = regions.split(img, mask, pairs)
    assert torch.allclose(foreground + background, img[[1, 0, 0]], atol=1e-6)


def test_split_passes_gradcheck() -> None:
    img, mask = random(1, 3, 3, 3).double(), torch.rand(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: regions.split(img, m, torch.tensor([[0, 0], [0, 1]])), (mask,))


def test_sharpen_cuts_at_the_level_and_keeps_zero_and_one() -> None:
    masks = torch.tensor([[[0.0, 0.29, 0.31, 1.0]], [[0.0, 0.29, 0.31, 1.0]]])
    cut = regions.sharpen(masks, 500.0, torch.tensor([0.3, 0.6]))
    assert torch.allclose(cut, torch.tensor([[[0.0, 0.0067, 0.9933, 1.0]], [[0.0, 0.0, 0.0, 1.0]]]), atol=1e-3)
    assert torch.equal(regions.sharpen(masks, 0.0, torch.tensor([0.3, 0.6])), masks)
    soft = regions.sharpen(masks, 8.0, torch.tensor([0.3, 0.6]))
    assert soft[:, 0, 0].abs().max() < 1e-6 and (soft[:, 0, 3] - 1).abs().max() < 1e-6 and (soft.diff(dim=2) > 0).all()


def test_sharpen_passes_gradcheck() -> None:
    masks = torch.rand(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: regions.sharpen(m, 8.0, torch.tensor([0.3, 0.6])), (masks,))


def test_a_half_mask_belongs_to_one_side_once_it_is_cut() -> None:
    half = torch.full((40, 2, 2), 0.5)
    cut = regions.sharpen(half, 200.0, regions.cut_levels(0, 40))
    assert ((cut < 0.05) | (cut > 0.95)).float().mean() > 0.9 and 0.4 < cut.mean() < 0.6


@given(st.integers(0, 10_000), st.integers(1, 50))
def test_cut_levels_cover_their_interval_and_go_on_where_they_ended(start: int, count: int) -> None:
    levels = regions.cut_levels(start, count)
    assert levels.shape == (count,) and 0.2 <= levels.min() and levels.max() <= 0.8
    assert torch.equal(regions.cut_levels(start, count + 7)[count:], regions.cut_levels(start + count, 7))
    assert regions.cut_levels(start, 50).sort().values.diff().max() < 0.06


def test_split_with_a_blurred_fill_shows_the_blurred_image_where_something_is_taken_away() -> None:
    img, mask = random(2, 3, 16, 16), torch.zeros(2, 16, 16)
    mask[:, :, 8:] = 1
    pairs = torch.tensor([[1, 0], [0, 2]])
    foreground, background = regions.split(img, mask, pairs, "blur")
    assert torch.allclose(foreground[..., 8:], img[[1, 0]][..., 8:]) and torch.allclose(
        background[..., :8], img[[1, 0]][..., :8]
    )
    assert torch.allclose(foreground[..., :8], regions.blur(img)[[1, 0]][..., :8], atol=1e-6)
    assert torch.allclose(regions.blur(torch.ones(1, 3, 16, 16)), torch.ones(1, 3, 16, 16))
