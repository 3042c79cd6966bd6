"""Masks without a class (of Segment Anything, or of any segmenter) chosen and joined by what a CAM says of them.

After "Segment Anything Model (SAM) Enhanced Pseudo Labels for Weakly Supervised Semantic Segmentation" (Chen et al., arXiv
2305.05803), written from the paper's description. Flow: proposals of one image -> **mask_proposals** -> `masks`, as `align`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Union

import torch
from torch import Tensor

from ._checks import check_share
from ._text import describe
from .masks import Align, align_masks

__all__ = ["MIN_COVERED", "MIN_INSIDE", "ProposalAlign", "Overlaps", "choose_proposals", "class_regions", "overlaps"]

MIN_INSIDE = 0.5  # a proposal is chosen if more than this share of it is inside the region of the class,
MIN_COVERED = 0.85  # or if it covers more than this share of the region


class Overlaps(NamedTuple):
    """`inside` (M, K): share of each proposal that is inside the region of each class; `covered` (M, K): share of the region
    that the proposal covers. 0 for empty proposals and regions."""

    inside: Tensor
    covered: Tensor


def class_regions(masks: Tensor, threshold: float) -> Tensor:
    """Regions (K, H, W) bool of one image: where a class has the highest mask, and that above `threshold`; no two overlap."""
    if not len(masks):
        return torch.zeros_like(masks, dtype=torch.bool)
    best, index = masks.max(dim=0)  # (H, W)
    classes = torch.arange(len(masks), device=masks.device)[:, None, None]
    return (index == classes) & (best > threshold)


def overlaps(proposals: Tensor, regions: Tensor) -> Overlaps:
    """How far proposals (M, H, W) bool and regions (K, H, W) bool lie in one another."""
    flat, sizes = regions.flatten(1), regions.flatten(1).sum(1)  # (K, HW), (K,)
    common, areas = [], []
    for proposal in proposals.flatten(1):  # one at a time: memory stays that of the regions
        common.append((flat & proposal).sum(1))
        areas.append(proposal.sum())
    if not common:
        none = torch.zeros(0, len(regions), device=regions.device)
        return Overlaps(none, none)
    both = torch.stack(common).float()  # (M, K)
    return Overlaps(both / torch.stack(areas)[:, None].clamp(min=1), both / sizes.clamp(min=1))


def choose_proposals(
    masks: Tensor,
    proposals: Tensor,
    *,
    threshold: float = 0.4,
    min_inside: float = MIN_INSIDE,
    min_covered: float = MIN_COVERED,
) -> Tensor:
    """Masks of one image, those of each class replaced by the union of the proposals that its CAM chooses.

    The region of class k is where m_k is the highest mask and above `threshold`. Two overlaps count: the share of a proposal
    that is inside the region, if above `min_inside`, and the share of the region that it covers, if above `min_covered`. A
    proposal is chosen for the class with the highest of them, if there is one. The class is 1 on the union of its proposals
    and 0 elsewhere. Where proposals of several classes meet, a pixel goes to the class whose proposal has the higher overlap.
    A class without a proposal keeps its mask, but not where another class has one.

    Args:
        masks: (K, H, W) in [0, 1], the present classes of one image.
        proposals: (M, H, W) bool; may overlap.
        threshold: background score that cuts the regions.
        min_inside, min_covered: shares from 0 to 1, see above; 1 turns a rule off.

    Returns:
        (K, H, W), dtype and device of `masks`; `masks` itself if no proposal is chosen.

    Example:
        >>> masks = torch.tensor([[[0.9, 0.6, 0.1, 0.0]]])  # one class, one row of four pixels
        >>> proposals = torch.tensor([[[True, True, True, False]], [[False, False, False, True]]])
        >>> choose_proposals(masks, proposals)
        tensor([[[1., 1., 1., 0.]]])
    """
    if not len(masks) or not len(proposals):
        return masks
    inside, covered = overlaps(proposals, class_regions(masks, threshold))
    degrees = torch.maximum(inside * (inside > min_inside), covered * (covered > min_covered))  # (M, K)
    degree, owner = degrees.max(dim=1)  # (M,)
    chosen = degree > 0
    best = torch.zeros(masks.shape[1:], device=masks.device)  # the highest degree at each pixel
    label = torch.full(masks.shape[1:], -1, device=masks.device)
    for m in chosen.nonzero()[:, 0].tolist():
        wins = proposals[m] & (degree[m] > best)
        best[wins], label[wins] = degree[m], owner[m]
    has_own = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    has_own[owner[chosen]] = True
    classes = torch.arange(len(masks), device=masks.device)[:, None, None]
    own = masks * (label < 0)  # (K, H, W) of classes without a proposal
    return torch.where(has_own[:, None, None], (label == classes).to(masks), own)


class ProposalAlign:
    """`align` of one image, for `PromptRefiner.refine_masks`: the masks of its classes from proposals without a class.

    Example:
        >>> proposals = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> proposals[0, :2] = True
        >>> align = ProposalAlign(proposals)
        >>> masks = torch.tensor([0.9, 0.3, 0.1, 0.0])[:, None].expand(4, 4)[None]
        >>> align(torch.rand(3, 4, 4), masks)[0, :, 0]
        tensor([1., 1., 0., 0.])
    """

    def __init__(
        self,
        proposals: Any,
        *,
        threshold: float = 0.4,
        min_inside: float = MIN_INSIDE,
        min_covered: float = MIN_COVERED,
        first: Union[None, str, Align] = None,
    ):
        """Keep the proposals of one image.

        Args:
            proposals: (M, H, W) bool, an array or tensor, at the size of the image.
            threshold: background score that cuts the regions of the classes, from 0 to 1.
            min_inside, min_covered: see `choose_proposals`.
            first: alignment before the proposals are chosen: `"pamr"`, `"crf"` or a callable; None for none.

        Raises:
            TypeError: if `proposals` are not bool.
            ValueError: if they have another number of dimensions, or a share is outside 0 to 1.
        """
        for name, value in (("threshold", threshold), ("min_inside", min_inside), ("min_covered", min_covered)):
            check_share(name, value)
        self.proposals = torch.as_tensor(proposals)
        if self.proposals.dtype != torch.bool:
            raise TypeError(f"`proposals` must be bool; got {self.proposals.dtype}. Compare with 0: `proposals > 0`.")
        if self.proposals.ndim != 3:
            raise ValueError(f"`proposals` must have shape (M, H, W), those of one image; got {describe(self.proposals)}.")
        self.threshold, self.min_inside, self.min_covered, self.first = threshold, min_inside, min_covered, first

    def __call__(self, img: Tensor, masks: Tensor) -> Tensor:
        """Masks (K, H, W) of an image (3, H, W).

        Raises:
            ValueError: if the image has another size than the proposals.
        """
        if self.proposals.shape[1:] != masks.shape[1:]:
            raise ValueError(
                f"`proposals` must have the size of their image, {tuple(masks.shape[1:])}; got "
                f"{tuple(self.proposals.shape[1:])}. They are of one image: for a batch give `align` a list, one per image."
            )
        pairs = torch.stack([torch.zeros(len(masks), dtype=torch.long), torch.arange(len(masks))], dim=1).to(masks.device)
        masks = align_masks(img[None], masks, pairs, self.first)
        return choose_proposals(
            masks,
            self.proposals.to(masks.device),
            threshold=self.threshold,
            min_inside=self.min_inside,
            min_covered=self.min_covered,
        )
