"""Views of small objects: the part of the image around the CAM, enlarged to CLIP's input size, with the mask of that part.

CLIP's input is small: an object of 40 pixels in an image of 500 covers one patch of ViT-B/32. An extension of this package,
used where `view_crop` is set. Flow: `regions.pair_masks` -> **crops** -> `regions.split` -> `clip_encoder`.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .regions import resize_image

__all__ = ["CROP_LEVEL", "MIN_SIDE", "crop_boxes", "crop_images", "crop_masks"]

CROP_LEVEL = 0.3  # share of a mask's largest value from which a place counts as the object
MIN_SIDE = 0.125  # smallest side of a box, as a share of the image's side: a few pixels show CLIP nothing


def crop_boxes(masks: Tensor, size: Sequence[int], margin: float) -> Tensor:
    """The box around each mask: where it reaches `CROP_LEVEL` of its largest value, and a margin.

    A box has at least `MIN_SIDE` of the image's height and width. One that would leave the image is moved inside.

    Args:
        masks: (P, h, w) in [0, 1]; no gradient flows through the choice of a box.
        size: (H, W) of the images in pixels.
        margin: added on each side, as a share of the box's height and width.

    Returns:
        (P, 4) int64: top, left, bottom, right in pixels, bottom and right exclusive; the whole image for a flat mask.
    """
    masks = masks.detach()
    inside = masks >= CROP_LEVEL * masks.amax((1, 2), keepdim=True)  # (P, h, w)
    starts, ends = [], []
    for pixels, line in zip(size, (inside.any(2), inside.any(1))):  # (P, h), then (P, w)
        count = line.shape[1]
        low = line.int().argmax(1).double() / count  # the first place, as a share of the side
        high = 1 - line.flip(1).int().argmax(1).double() / count  # behind the last
        side = ((high - low) * (1 + 2 * margin)).clamp(MIN_SIDE, 1)
        start = ((low + high - side) / 2).clamp(min=0).minimum(1 - side)
        first = (start * pixels + 1e-9).floor().long()
        starts.append(first)
        ends.append(((start + side) * pixels - 1e-9).ceil().long().clamp(max=pixels).maximum(first + 1))
    return torch.stack([*starts, *ends], dim=1)


def crop_images(img: Tensor, pairs: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The box of each pair from its image, at CLIP's input size.

    Args:
        img: (B, 3, H, W).
        pairs: (P, 2) image and class.
        boxes: (P, 4), see `crop_boxes`.
        size: S.

    Returns:
        (P, 3, S, S) float32, no gradient.
    """
    parts = [
        resize_image(img[i : i + 1, :, top:bottom, left:right], size)
        for i, (top, left, bottom, right) in zip(pairs[:, 0].tolist(), boxes.tolist())
    ]
    return torch.cat(parts) if parts else img.new_zeros((0, 3, size, size), dtype=torch.float32)


def crop_masks(masks: Tensor, boxes: Tensor, size: Sequence[int], out: int) -> Tensor:
    """The same boxes of the masks, sampled bilinearly at the places of the pixels of `crop_images`.

    Args:
        masks: (P, h, w) over whole images.
        boxes: (P, 4) in pixels of the images.
        size: (H, W) of the images.
        out: S.

    Returns:
        (P, S, S), attached to `masks`.
    """
    if not len(masks):
        return masks.new_zeros((0, out, out)) + 0 * masks.sum()
    steps = (torch.arange(out, device=masks.device, dtype=torch.float64) + 0.5) / out  # (S,)
    start, end = boxes[:, :2].double(), boxes[:, 2:].double()  # (P, 2) rows, columns
    places = start[:, :, None] + steps * (end - start)[:, :, None]  # (P, 2, S)
    y, x = (2 * places[:, axis] / size[axis] - 1 for axis in (0, 1))  # (P, S) each in [-1, 1]
    grid = torch.stack([x[:, None, :].expand(-1, out, -1), y[:, :, None].expand(-1, -1, out)], dim=3)  # (P, S, S, 2)
    return F.grid_sample(masks[:, None], grid.to(masks.dtype), padding_mode="border", align_corners=False)[:, 0]
