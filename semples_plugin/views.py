"""What CLIP is shown, as the options say: images with its statistics, and two views of each positive pair.

Flow: `regions` and `crops` -> **views** -> `clip_encoder`.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import crops, regions
from .clip_encoder import ClipEncoder
from .config import RefinerConfig

__all__ = ["clip_images", "pair_views", "view_images"]

Stats = Optional[Tuple[Sequence[float], Sequence[float]]]


def clip_images(img: Tensor, stats: Stats, encoder: ClipEncoder, config: RefinerConfig) -> Tensor:
    """Images (B, 3, S, S) at CLIP's size, with CLIP's statistics (the host's own without `clip_stats`, as the reference).

    Args:
        img: (B, 3, H, W) with the host's statistics.
        stats: (mean, std) of these, or None for images in [0, 1].
        encoder, config: whose size and statistics; `config.clip_stats`.
    """
    return _with_clip_stats(regions.resize_image(img, encoder.image_size), stats, encoder, config)


def view_images(img: Tensor, stats: Stats, encoder: ClipEncoder, config: RefinerConfig) -> Tensor:
    """What `pair_views` cuts from: `clip_images`, or with `view_crop` images at their own size; arguments as there."""
    if config.view_crop is None:
        return clip_images(img, stats, encoder, config)
    return _with_clip_stats(img.detach().float(), stats, encoder, config)


def pair_views(
    images: Tensor, masks: Tensor, pairs: Tensor, encoder: ClipEncoder, config: RefinerConfig, levels: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """Foreground and background view of each pair.

    Args:
        images: (B, 3, S, S) at CLIP's size; with `view_crop` (B, 3, H, W) of any size.
        masks: (P, S, S) over the whole images.
        pairs: (P, 2) image and class of each mask.
        encoder, config: CLIP's size; `view_crop`, `view_sharpness`, `view_fill`.
        levels: (P,) at which masks are cut where `view_sharpness` says so; by default those of the first P pairs.

    Returns:
        Two tensors (P, 3, S, S), attached to `masks`.
    """
    if config.view_crop is not None:
        size, height_width = encoder.image_size, images.shape[2:]
        boxes = crops.crop_boxes(masks, height_width, config.view_crop)  # (P, 4)
        images = crops.crop_images(images, pairs, boxes, size)  # (P, 3, S, S), one per pair
        masks = crops.crop_masks(masks, boxes, height_width, size)
        pairs = torch.stack([torch.arange(len(pairs), device=pairs.device), pairs[:, 1]], dim=1)
    levels = regions.cut_levels(0, len(pairs)) if levels is None else levels
    return regions.split(images, regions.sharpen(masks, config.view_sharpness, levels), pairs, config.view_fill)


def _with_clip_stats(img: Tensor, stats: Stats, encoder: ClipEncoder, config: RefinerConfig) -> Tensor:
    return regions.change_stats(img, stats, (encoder.mean, encoder.std)) if config.clip_stats else img
