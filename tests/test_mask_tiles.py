from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from semples_plugin.mask_tiles import PAMR_REACH, pamr_tiles
from semples_plugin.masks import pamr


def scene(height: int, width: int, count: int = 2) -> "tuple[torch.Tensor, torch.Tensor]":
    """Regions with sharp edges and noise, as photos have them, and maps as of a CAM."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 20 + 1, width // 20 + 1, generator=generator)
    img = F.interpolate(coarse, size=(height, width))[0] * 200 + 40 * torch.rand(3, height, width, generator=generator)
    masks = F.interpolate(torch.rand(1, count, 9, 7, generator=generator), size=(height, width), mode="bilinear")[0]
    return img.to(torch.uint8), masks


@pytest.mark.parametrize("tile", [64, 150, 1000])
def test_tiles_with_the_whole_reach_give_the_same_as_one_piece(tile: int) -> None:
    img, masks = scene(310, 405)
    whole = pamr(img[None].float() / 255, masks[None])[0]
    parts = list(masks.clone())
    pamr_tiles(img, parts, tile=tile, overlap=PAMR_REACH)
    assert (torch.stack(parts) - whole).abs().max() < 1e-6


def test_the_usual_overlap_is_within_its_tolerance_at_seams_too() -> None:
    img, masks = scene(310, 405)
    whole = pamr(img[None].float() / 255, masks[None])[0]
    parts = list(masks.clone())
    pamr_tiles(img, parts, tile=100)
    assert (torch.stack(parts) - whole).abs().max() < 1e-4
    parts = list(masks.clone())
    pamr_tiles(img, parts, tile=100, overlap=16)
    assert (torch.stack(parts) - whole).abs().max() > 1e-2  # the scene would show a seam


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (200, 1), (7, 9)])
def test_images_that_are_smaller_than_a_tile_in_one_direction(size: "tuple[int, int]") -> None:
    img, masks = scene(*size, count=1)
    parts = list(masks.clone())
    pamr_tiles(img, parts, tile=64, overlap=PAMR_REACH)
    assert (parts[0] - pamr(img[None].float() / 255, masks[None])[0, 0]).abs().max() < 1e-6


def test_no_mask_is_no_work() -> None:
    pamr_tiles(torch.zeros(3, 4, 4, dtype=torch.uint8), [])
