"""Edge alignment of one large image, tile by tile: the result of `masks.pamr`, in memory that does not grow with the image.

Flow: `masks` -> **mask_tiles** -> `files.large_images`.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch
from torch import Tensor

from .masks import pamr

__all__ = ["PAMR_REACH", "TILE", "TILE_OVERLAP", "pamr_tiles"]

PAMR_REACH = 240  # pixels: 10 updates with neighbors at up to 24; what is farther away has no influence on a pixel
TILE, TILE_OVERLAP = 1024, 128  # pixels


def pamr_tiles(
    img: Tensor, masks: Sequence[Tensor], *, tile: int = TILE, overlap: int = TILE_OVERLAP, device: Any = "cpu"
) -> None:
    """`masks.pamr` of one image, in place, by tiles that see `overlap` pixels beyond their edges.

    A mask after `masks.pamr` depends on what is within `PAMR_REACH` pixels, and on little of that beyond 100: with an overlap
    of 128 the masks differ by less than 1e-4 from those of the image in one piece, at seams too; with `PAMR_REACH` by rounding
    alone. Memory beside `img` and `masks` is that of `pamr` for one tile, and a copy of the masks of a row of tiles.

    Args:
        img: (3, H, W) uint8.
        masks: K maps (H, W) float32 on the CPU; they are changed. A list, so that they need not lie in one piece of memory.
        tile: side of a tile without overlap, at most.
        overlap: pixels on each side.
        device: where the tiles are computed.
    """
    if not len(masks):
        return
    height, width = masks[0].shape
    rows, columns = _cuts(height, tile), _cuts(width, tile)
    above = torch.stack([mask[:0] for mask in masks])  # (K, a, W): rows above the tiles as they were
    for top, bottom in zip(rows, rows[1:]):
        low = min(height, bottom + overlap)
        first = top - above.shape[1]
        row = torch.cat([above, torch.stack([mask[top:low] for mask in masks])], dim=1)  # (K, low - first, W)
        above = row[:, max(0, bottom - overlap - first) : bottom - first].clone()
        for left, right in zip(columns, columns[1:]):
            begin, end = max(0, left - overlap), min(width, right + overlap)
            piece = img[:, first:low, begin:end].to(device).float() / 255
            aligned = pamr(piece[None], row[:, :, begin:end].to(device)[None])[0]  # (K, low - first, end - begin)
            for mask, new in zip(masks, aligned[:, top - first : bottom - first, left - begin : right - begin]):
                mask[top:bottom, left:right] = new


def _cuts(length: int, tile: int) -> "list[int]":
    """Where an edge is cut into equal parts of at most `tile` pixels: 0, ..., `length`."""
    count = math.ceil(length / tile)
    return [length * i // count for i in range(count + 1)]
