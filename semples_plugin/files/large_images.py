"""Masks and label maps of images that are too large to be refined at once. Memory beside the results does not grow with them.

Flow: `mask_tiles` -> **large_images** -> `refine_images`.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..mask_tiles import pamr_tiles
from .cam_folder import LoadedCam

__all__ = ["label_map", "masks_of_large"]

AT_ONCE = 2**20  # pixels of a label map that are computed at once


def masks_of_large(one: LoadedCam, small: Optional[Tensor], align: Optional[str], device: Any) -> Dict[int, np.ndarray]:
    """Masks of the present classes at the image's own size, aligned to its edges tile by tile.

    Args:
        one: an image that was loaded with its `picture`. The maps of its CAM file are changed.
        small: masks (K, h, w) in [0, 1] of the present classes after CLIP's steps; None for the CAMs of the file, each brought
            to [0, 1].
        align: `"pamr"` or None.
        device: where tiles are aligned.

    Returns:
        class -> (H, W) float32.
    """
    assert one.picture is not None
    maps: Dict[int, Tensor] = {}
    for i, k in enumerate(one.labels.nonzero()[0].tolist()):
        if small is None:
            maps[k] = _enlarge(torch.from_numpy(one.content.cams[k]), one.item.size)
            low, high = maps[k].min(), maps[k].max()
            maps[k].sub_(low).div_(high - low + masks.MASK_EPS)  # as `regions.pair_masks`, in place
        else:
            maps[k] = _enlarge(small[i].cpu(), one.item.size)
    if align == "pamr":
        pamr_tiles(torch.from_numpy(one.picture).permute(2, 0, 1), list(maps.values()), device=device)
    return {k: value.numpy() for k, value in maps.items()}


def _enlarge(value: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(value.shape) == tuple(size):
        return value
    return F.interpolate(value[None, None], size=tuple(size), mode="bilinear", align_corners=False)[0, 0]


def label_map(cams: Dict[int, np.ndarray], size: Sequence[int], threshold: masks.Threshold) -> np.ndarray:
    """Pseudo labels (H, W) uint8 of an image, a few rows at a time: 0 background, 1 + class, 255 uncertain.

    Args:
        cams: class -> (H, W) in [0, 1].
        size: H, W.
        threshold: see `masks.pseudo_labels`.
    """
    result = np.zeros(tuple(size), np.uint8)
    step = max(1, AT_ONCE // size[1])
    for top in range(0, size[0] if cams else 0, step):
        rows = torch.stack([torch.from_numpy(value[top : top + step]) for value in cams.values()])  # (K, r, W)
        result[top : top + step] = masks.pseudo_labels(rows[None], threshold, list(cams))[0].numpy()
    return result
