"""Refined masks and pseudo labels from a CAM, without training: CLIP steps, suppression, edge alignment, background, argmax.

`cam_to_masks` is the one way from a CAM to masks; `PromptRefiner.refine_masks` and `files.refine_folder` call it. Each further
step is a function of its own and can be left out. Flow: `regions` -> **masks** -> `refiner`, files.
"""

from __future__ import annotations

import itertools
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from . import crf, regions
from ._checks import check_share
from ._torch import full_precision

__all__ = [
    "Align",
    "Aligns",
    "CLIP_GRID",
    "CLIP_LR",
    "CLIP_STEPS",
    "LOGIT_EPS",
    "MASK_EPS",
    "MOST_CLASSES",
    "Threshold",
    "UNCERTAIN",
    "PAMR_CHUNK",
    "RefinedMasks",
    "align_masks",
    "cam_to_masks",
    "check_align",
    "check_class_count",
    "check_threshold",
    "optimize",
    "optimize_cam",
    "pamr",
    "pseudo_labels",
    "suppression",
]

MASK_EPS = 1e-6  # of the normalization here: masks must not depend on the scale of the CAM
CLIP_STEPS, CLIP_LR, CLIP_GRID = 5, 0.3, 16  # of `optimize`, where nothing else is asked for
PAMR_CHUNK = 8  # masks that `pamr` works on at once
UNCERTAIN = 255  # label of pixels between two thresholds
MOST_CLASSES = 254  # that label maps of 8 bits hold beside background and 255
Threshold = Union[float, Tuple[float, float]]
LOGIT_EPS = 0.02  # masks are clamped to [0.02, 0.98] before their logit: how far d must go to fill an empty place

Align = Callable[[Tensor, Tensor], Tensor]
Aligns = Union[None, str, Align, Sequence[Union[None, str, Align]]]  # one for all images, or one for each


class RefinedMasks(NamedTuple):
    """`masks` (B, C, H, W) float32 in [0, 1], zero for absent classes; `labels` (B, H, W) int64, 0 background, 1 + class."""

    masks: Tensor
    labels: Tensor


def suppression(
    dense: Tensor,
    pairs: Tensor,
    text_features: Tensor,
    prompt_features: Optional[Tensor],
    scale: float,
    alive: Optional[Tensor] = None,
) -> Tensor:
    """How much of each position CLIP assigns to the pair's class rather than to its rivals.

    Rivals of class k are its background prompts (if learned) and the other classes present in the image. The weight is the
    softmax over class and rivals of `scale` times the cosine of the position's dense feature with each text feature.

    Args:
        dense: (B, D, g, g) dense image features (`ClipEncoder.encode_dense`).
        pairs: (P, 2).
        text_features: (C, D), u_f.
        prompt_features: (C, N, D), u_b, or None.
        scale: inverse temperature; CLIP's logit scale.
        alive: (C, N) bool, which prompts are in use; None for all.

    Returns:
        (P, g, g) in [0, 1]; 1 for a pair without rivals.
    """
    with full_precision(dense.device):
        dense = F.normalize(dense, dim=1)
        to_class = torch.einsum("bdhw,cd->bchw", dense, F.normalize(text_features, dim=-1)) * scale  # (B, C, g, g)
        present = torch.zeros(dense.shape[0], text_features.shape[0], dtype=torch.bool, device=dense.device)
        present[pairs[:, 0], pairs[:, 1]] = True
        logits = to_class.masked_fill(~present[:, :, None, None], float("-inf"))[pairs[:, 0]]  # (P, C, g, g)
        own = logits[torch.arange(len(pairs), device=pairs.device), pairs[:, 1]]  # (P, g, g)
        if prompt_features is not None:
            u_b = F.normalize(prompt_features, dim=-1)[pairs[:, 1]]  # (P, N, D)
            rivals = torch.einsum("pdhw,pnd->pnhw", dense[pairs[:, 0]], u_b) * scale
            if alive is not None:
                rivals = rivals.masked_fill(~alive[pairs[:, 1]][:, :, None, None], float("-inf"))
            logits = torch.cat([logits, rivals], dim=1)
        return torch.exp(own - torch.logsumexp(logits, dim=1))


def pamr(img: Tensor, masks: Tensor, iterations: int = 10, dilations: Sequence[int] = (1, 2, 4, 8, 12, 24)) -> Tensor:
    """Pixel-adaptive mask refinement (Araslanov and Roth, CVPR 2020, section 4.2): masks follow the image's edges.

    For every pixel i and its 8 neighbors j at each dilation, k(i, j) = -|x_i - x_j| / (0.1 sigma_i), averaged over the
    color channels, sigma_i the standard deviation of x over all neighbors of i; alpha = softmax of k over the neighbors;
    then `iterations` times m_i <- sum_j alpha_ij m_j.

    Sums run over one neighbor at a time and `PAMR_CHUNK` masks at once. Memory is the weights alpha, one float32 per pixel and
    neighbor (192 MB for 1000 x 1000 pixels and the 48 neighbors), and about two more copies of a chunk, whatever K is.

    Args:
        img: (B, 3, H, W) in any linear scale; a constant, no gradient reaches it.
        masks: (B, K, H, W).
        iterations: number of updates.
        dilations: neighbor distances in pixels.

    Returns:
        (B, K, H, W), within the range of `masks`, attached to it.
    """
    shifts = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    with torch.no_grad():
        affinity = _affinity(img, shifts)  # (B, N, H, W)
    results = []
    for part in masks.split(PAMR_CHUNK, dim=1):
        for _ in range(iterations):
            updated = torch.zeros_like(part)
            for n, neighbor in enumerate(_neighbors(part, shifts)):
                updated.addcmul_(affinity[:, n : n + 1], neighbor)
            part = updated
        results.append(part)
    return torch.cat(results, dim=1)


def _neighbors(x: Tensor, shifts: Sequence[Tuple[int, int]]) -> Iterator[Tensor]:
    """x (B, K, H, W) moved by each of `shifts` (rows, columns), borders repeated: N views (B, K, H, W) of one padded copy."""
    height, width = x.shape[2:]
    reach = max(max(abs(dy), abs(dx)) for dy, dx in shifts)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    for dy, dx in shifts:
        yield padded[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def _affinity(img: Tensor, shifts: Sequence[Tuple[int, int]]) -> Tensor:
    """The weights alpha of `pamr`, (B, N, H, W)."""
    mean, squares = torch.zeros_like(img), torch.zeros_like(img)
    for n, neighbor in enumerate(_neighbors(img, shifts), start=1):  # Welford's: exactly 0 where all neighbors are equal
        change = neighbor - mean
        mean.add_(change, alpha=1 / n) if n > 1 else mean.copy_(neighbor)
        if n > 1:
            squares.addcmul_(change, neighbor - mean)
    scale = 0.1 * (squares / (len(shifts) - 1)).sqrt_() + 1e-8  # (B, 3, H, W)
    affinity = img.new_empty(len(img), len(shifts), *img.shape[2:])
    for n, neighbor in enumerate(_neighbors(img, shifts)):
        affinity[:, n] = (neighbor - img).abs_().div_(scale).mean(dim=1).neg_()
    affinity.sub_(affinity.amax(dim=1, keepdim=True)).exp_()
    return affinity.div_(affinity.sum(dim=1, keepdim=True))


def align_masks(img: Tensor, masks: Tensor, pairs: Tensor, align: Aligns) -> Tensor:
    """Masks (P, H, W) of the positive pairs, aligned to the edges of their images, all classes of an image together.

    Args:
        img: (B, 3, H, W) in [0, 1].
        masks: (P, H, W) in [0, 1].
        pairs: (P, 2) image and class of each mask.
        align: `"pamr"`, `"crf"` (see `crf.dense_crf`), None for the masks as they are, or a callable (img (3, H, W), masks
            (K, H, W)) -> (K, H, W); or a list of these, one for each image.
    """
    if align is None:
        return masks
    result = masks.clone()
    for i in pairs[:, 0].unique().tolist():
        how = align[i] if isinstance(align, (list, tuple)) else align
        own = pairs[:, 0] == i
        if how == "pamr":
            result[own] = pamr(img[i : i + 1], masks[own][None])[0]
        elif how == "crf":
            result[own] = crf.dense_crf(img[i], masks[own]).to(result)
        elif how is not None:
            result[own] = how(img[i], masks[own]).to(result)  # type: ignore[operator]
    return result


def check_align(align: Any, count: int) -> None:
    """Raise if `align` is not what `align_masks` takes for `count` images, or needs what is not installed."""
    each = align if isinstance(align, (list, tuple)) else [align]
    if each is align and len(align) != count:
        raise ValueError(f"`align` must have an entry for each of the {count} images; got {len(align)}.")
    for how in each:
        if how not in (None, "pamr", "crf") and not callable(how):
            raise ValueError(f"`align` must be 'pamr', 'crf', None, a callable, or a list of these; got {how!r}.")
    if any(how == "crf" for how in each):
        crf.check_crf()


def cam_to_masks(
    img: Tensor,
    cam: Tensor,
    pairs: Tensor,
    *,
    normalize: Optional[str] = "minmax",
    align: Aligns = "pamr",
    weight: Optional[Tensor] = None,
) -> Tensor:
    """Masks at image size: the normalized CAM of every positive pair, weighted and aligned to the edges of the image.

    Args:
        img: (B, 3, H, W) in [0, 1].
        cam: (B, C, h, w), any resolution and range.
        pairs: (P, 2) image and class index, see `regions.positive_pairs`.
        normalize: as in `regions.pair_masks`.
        align: as in `align_masks`.
        weight: (P, g, g) factor per pair, see `suppression`; None for none.

    Returns:
        (B, C, H, W) float32 in [0, 1], 0 for absent classes.
    """
    height, width = img.shape[2:]
    result = torch.zeros(len(img), cam.shape[1], height, width, device=img.device)
    if len(pairs):
        masks = regions.pair_masks(cam, pairs, (height, width), normalize, MASK_EPS).float()  # (P, H, W)
        if weight is not None:
            masks = masks * F.interpolate(weight[:, None], size=(height, width), mode="bilinear", align_corners=False)[:, 0]
        result[pairs[:, 0], pairs[:, 1]] = align_masks(img, masks, pairs, align)
    return result


def optimize(
    masks: Tensor,
    pairs: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    size: Sequence[int],
    *,
    steps: int,
    lr: float,
    grid: int,
    at_once: int,
) -> Tensor:
    """Masks after gradient steps on a loss of their own, the rest being constant.

    m' = sigmoid(logit(m) + d), m clamped to [0.02, 0.98], d a map per mask on a coarse grid that starts at 0 and is learned
    with Adam. So a region can grow where m is 0 and go where it is 1, while the detail of m stays. Masks do not influence one
    another; one that gets no gradient stays exactly as it is.

    Computed in float32 whatever the dtype of `masks`, and also under `torch.inference_mode()`.

    Args:
        masks: (P, h, w) in [0, 1].
        pairs: (P, 2) image and class of each mask.
        loss_of: masks (p, *size), attached, and their pairs (p, 2) -> scalar, a mean over the p masks.
        size: (height, width) at which the loss looks at the masks.
        steps, lr: of Adam.
        grid: side of the grid of d.
        at_once: p, masks that are worked on at once.

    Returns:
        (P, h, w) float32 in [0, 1], detached; (0, h, w) for no masks.
    """

    def resized(maps: Tensor, size: Sequence[int]) -> Tensor:  # (p, a, b) -> (p, *size)
        return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]

    def moved(masks: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(torch.logit(masks, LOGIT_EPS) + resized(d, masks.shape[1:]))

    with torch.inference_mode(False), torch.enable_grad():
        masks, pairs = masks.detach().float().clone(), pairs.clone()  # ordinary tensors, which inference mode does not give
        results = [masks[:0]]
        for part, own in zip(masks.split(at_once), pairs.split(at_once)):
            if not len(part):  # interpolate refuses empty batches
                continue
            d = torch.zeros(len(part), grid, grid, device=masks.device, requires_grad=True)
            optimizer = torch.optim.Adam([d], lr=lr)
            for _ in range(steps):
                loss = loss_of(resized(moved(part, d), size), own)
                optimizer.zero_grad()
                (loss * len(part)).backward()  # the loss is a mean over pairs
                optimizer.step()
            still = (d == 0).all(2).all(1)[:, None, None]  # no gradient reached it, as with a class of weight 0
            results.append(torch.where(still, part, moved(part, d)).detach())
        return torch.cat(results)


def optimize_cam(
    cam: Tensor,
    pairs: Tensor,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
    size: int,
    normalize: Optional[str],
    *,
    steps: int,
    lr: float,
    grid: int,
    at_once: int,
) -> Tensor:
    """`optimize` on the normalized maps of the positive pairs of a CAM.

    Args:
        cam: (B, C, h, w), any resolution, range and float dtype.
        pairs: (P, 2), see `regions.positive_pairs`.
        loss_of: masks (p, size, size), attached, their pairs (p, 2) and the level of the step (p,), see `regions.cut_levels`
            -> scalar, a mean over the p masks.
        size: CLIP's input size.
        normalize: as in `regions.pair_masks`.
        steps, lr, grid, at_once: as for `optimize`.

    Returns:
        (B, C, h, w) float32 in [0, 1], detached; 0 for absent classes.
    """
    base = regions.pair_masks(cam.detach(), pairs, cam.shape[2:], normalize, MASK_EPS)  # (P, h, w)
    calls = itertools.count()

    def loss_of_step(masks: Tensor, pairs: Tensor) -> Tensor:
        level = regions.cut_levels(next(calls) % steps, 1)  # one for all pairs of a step
        return loss_of(masks, pairs, level.expand(len(pairs)))

    better = optimize(base, pairs, loss_of_step, (size, size), steps=steps, lr=lr, grid=grid, at_once=at_once)
    result = torch.zeros(cam.shape, device=cam.device)
    result[pairs[:, 0], pairs[:, 1]] = better
    return result


def pseudo_labels(masks: Tensor, threshold: Threshold, classes: Optional[Sequence[int]] = None) -> Tensor:
    """Label map (B, H, W): argmax over background and classes; 0 background, 1 + class index, 255 uncertain.

    Args:
        masks: (B, C, H, W) in [0, 1].
        threshold: background score of every pixel; a class needs more than this. Two of them, (low, high): a pixel whose best
            class is above high gets the class, one at or below low is background, and one between them is 255, which training
            of a segmentation network leaves out.
        classes: index of the class of each channel; 0 to C - 1 by default.

    Raises:
        ValueError: with two thresholds, if label 255 would also be that of a class.
    """
    low, high = threshold if isinstance(threshold, (tuple, list)) else (threshold, threshold)
    last = masks.shape[1] - 1 if classes is None else max(classes)
    if low < high and last >= MOST_CLASSES:
        raise ValueError(
            f"With two thresholds there may be at most {MOST_CLASSES} classes; got class index {last}, and label {UNCERTAIN} "
            "means uncertain. Give one threshold."
        )
    best, index = masks.max(dim=1)  # (B, H, W)
    if classes is not None:
        index = torch.as_tensor(classes, device=index.device)[index]
    labels = torch.where(best > high, index + 1, torch.full_like(index, UNCERTAIN))
    return torch.where(best > low, labels, torch.zeros_like(index))


def check_class_count(count: int) -> None:
    """Raise if label maps of 8 bits cannot hold so many classes."""
    if count > MOST_CLASSES:
        raise ValueError(
            f"Label maps hold at most {MOST_CLASSES} classes, as label 0 is background and label {UNCERTAIN} is not counted; "
            f"got {count} classes. Name those that occur in your images only, or split the set."
        )


def check_threshold(name: str, threshold: Any) -> None:
    """Raise if `threshold` is neither a number from 0 to 1 nor two of them, low and high."""
    values = threshold if isinstance(threshold, (tuple, list)) else (threshold,)
    for value in values:
        check_share(name, value)
    if len(values) not in (1, 2) or list(values) != sorted(values):
        raise ValueError(f"`{name}` must be a number from 0 to 1, or two of them, low and high; got {threshold!r}.")
