"""From img + cam + labels to the regions that CLIP looks at: one foreground and one background view per positive pair.

X_k^f = M_k X and X_k^b = (1 - M_k) X (SemPLeS, section 3.1), where M_k is the CAM of class k, enlarged to CLIP's input size
and normalized to [0, 1]. The mask multiplies the image after normalization, so what is masked out becomes the mean color.
Flow: host -> **regions** -> `clip_encoder`.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["blur", "change_stats", "cut_levels", "pair_masks", "positive_pairs", "resize_image", "sharpen", "split"]


def positive_pairs(labels: Tensor) -> Tensor:
    """The P positive (image, class) pairs of multi-hot `labels` (B, C): indices (P, 2), images in order."""
    return labels.nonzero()


def pair_masks(cam: Tensor, pairs: Tensor, size: Sequence[int], normalize: Optional[str], eps: float) -> Tensor:
    """Soft masks M_k of the positive pairs.

    The pair's map is enlarged bilinearly (align_corners=True), then with `normalize="minmax"`
    (cam - min) / (max - min + eps), min and max over the map; gradients flow through both.

    Args:
        cam: (B, C, h, w) of any real range and float dtype.
        pairs: (P, 2).
        size: (height, width) of the masks in pixels.
        normalize: `"minmax"`, or None for a CAM that is in [0, 1] already.
        eps: keeps flat maps finite (and near 0); also softens maps with a small range.

    Returns:
        (P, height, width) in [0, 1], float32 (float64 for a float64 CAM), attached to `cam`.
    """
    raw = cam[pairs[:, 0], pairs[:, 1]]  # (P, h, w)
    raw = raw if raw.dtype == torch.float64 else raw.float()
    if raw.shape[0] == 0:  # interpolate refuses empty batches
        return raw.new_zeros((0, size[0], size[1])) + 0 * raw.sum()
    raw = F.interpolate(raw[:, None], size=tuple(size), mode="bilinear", align_corners=True)[:, 0]  # (P, height, width)
    if normalize is None:
        return raw
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    return (raw - low) / (high - low + eps)


def resize_image(img: Tensor, size: int) -> Tensor:
    """Images (B, 3, H, W) at CLIP's input size: bilinear with antialiasing, float32, no gradient."""
    img = img.detach().float()
    if tuple(img.shape[2:]) == (size, size):
        return img
    return F.interpolate(img, size=(size, size), mode="bilinear", align_corners=False, antialias=True)


def change_stats(
    img: Tensor,
    old: Optional[Tuple[Sequence[float], Sequence[float]]],
    new: Optional[Tuple[Sequence[float], Sequence[float]]],
) -> Tensor:
    """Images (B, 3, H, W) with statistics `old` (mean, std) brought to `new`; None stands for plain [0, 1]."""
    for stats, undo in ((old, True), (new, False)):
        if stats is not None:
            mean, std = (img.new_tensor(s).view(3, 1, 1) for s in stats)
            img = img * std + mean if undo else (img - mean) / std
    return img


def sharpen(masks: Tensor, sharpness: float, levels: Tensor) -> Tensor:
    """Nearly binary masks: sigmoid(sharpness (M - t)), rescaled so that 0 and 1 stay what they are.

    A soft mask can pass for foreground and background at once, because CLIP recognizes dimmed images. Cut at a level t, each
    place belongs to one side; with a level of its own for every pair and step, all level sets of a mask are looked at, and the
    gradient reaches every value of M. An extension of this package.

    Args:
        masks: (P, h, w) in [0, 1].
        sharpness: slope of the cut; 0 gives the masks as they are.
        levels: (P,) t in (0, 1).

    Returns:
        (P, h, w) in [0, 1], attached to `masks`.
    """
    if not sharpness:
        return masks
    t = levels.to(masks)[:, None, None]
    low, high = torch.sigmoid(-sharpness * t), torch.sigmoid(sharpness * (1 - t))
    return (torch.sigmoid(sharpness * (masks - t)) - low) / (high - low)


def cut_levels(start: int, count: int) -> Tensor:
    """Levels (count,) in [0.2, 0.8] of the pairs number `start`, `start` + 1, ...: multiples of the golden ratio, modulo 1.

    Any run of consecutive levels covers the interval evenly, and the same numbers give the same levels.
    """
    number = torch.arange(start, start + count, dtype=torch.float64)
    return (0.2 + 0.6 * (number * 0.6180339887498949 % 1)).float()


def blur(img: Tensor, cells: int = 8) -> Tensor:
    """Images (B, 3, H, W) reduced to `cells` x `cells` means and enlarged again: what is around stays, what it is does not."""
    small = F.interpolate(img, size=(cells, cells), mode="area")
    return F.interpolate(small, size=tuple(img.shape[2:]), mode="bilinear", align_corners=False)


def split(img: Tensor, masks: Tensor, pairs: Tensor, fill: str = "mean") -> Tuple[Tensor, Tensor]:
    """Foreground and background views of the pairs: M_k X + (1 - M_k) Z and (1 - M_k) X + M_k Z.

    Args:
        img: (B, 3, S, S).
        masks: (P, S, S).
        pairs: (P, 2).
        fill: Z, what is put where something is taken away: `"mean"`, the mean color (0, as in the paper), or `"blur"`, the
            blurred image.

    Returns:
        Two tensors (P, 3, S, S), attached to `masks`.
    """
    x = img[pairs[:, 0]].to(masks.dtype)  # (P, 3, S, S)
    if fill == "mean":
        foreground = masks[:, None] * x
        return foreground, x - foreground
    z = blur(img)[pairs[:, 0]].to(masks.dtype)
    change = masks[:, None] * (x - z)
    return z + change, x - change
