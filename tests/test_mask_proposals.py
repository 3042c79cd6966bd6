from __future__ import annotations

from typing import Any, List, Tuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semples_plugin import masks
from semples_plugin.mask_proposals import ProposalAlign, choose_proposals, class_regions, overlaps


def literal(maps: np.ndarray, proposals: np.ndarray, threshold: float, inside: float, covered: float) -> np.ndarray:
    """The rules of `choose_proposals`, pixel by pixel."""
    classes, height, width = maps.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    region: List[List[Tuple[int, int]]] = [[] for _ in range(classes)]
    for y, x in places:
        k = int(np.argmax(maps[:, y, x]))
        if maps[k, y, x] > threshold:
            region[k].append((y, x))
    chosen: List[Tuple[float, int, np.ndarray]] = []
    for proposal in proposals:
        best: Tuple[float, int] = (0.0, -1)
        for k in range(classes):
            common = sum(bool(proposal[place]) for place in region[k])
            a = common / max(int(proposal.sum()), 1)
            b = common / max(len(region[k]), 1)
            degree = max(a if np.float32(a) > np.float32(inside) else 0.0, b if np.float32(b) > np.float32(covered) else 0.0)
            if np.float32(degree) > np.float32(best[0]):
                best = (degree, k)
        if best[0] > 0:
            chosen.append((*best, proposal))
    owners = {k for _, k, _ in chosen}
    result = np.zeros_like(maps)
    for place in places:
        here = [(degree, k) for degree, k, proposal in chosen if proposal[place]]
        if here:
            top = max(np.float32(degree) for degree, _ in here)
            result[(next(k for degree, k in here if np.float32(degree) == top), *place)] = 1
        else:
            for k in set(range(classes)) - owners:
                result[(k, *place)] = maps[(k, *place)]
    return result


@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(1, 3),
    count=st.integers(0, 6),
    threshold=st.sampled_from([0.2, 0.5]),
    inside=st.sampled_from([0.1, 0.3, 0.5, 1.0]),
    covered=st.sampled_from([0.3, 0.85, 1.0]),
)
def test_choosing_equals_the_literal_rules(
    seed: int, classes: int, count: int, threshold: float, inside: float, covered: float
) -> None:
    random = np.random.default_rng(seed)
    maps = random.random((classes, 5, 6)).astype(np.float32)
    proposals = random.random((count, 5, 6)) < random.random()
    options = {"threshold": threshold, "min_inside": inside, "min_covered": covered}
    got = choose_proposals(torch.from_numpy(maps), torch.from_numpy(proposals), **options)  # type: ignore[arg-type]
    assert np.array_equal(got.numpy(), literal(maps, proposals, threshold, inside, covered))


def boxes(*corners: Tuple[int, int, int, int]) -> Tensor:
    result = torch.zeros(len(corners), 8, 8, dtype=torch.bool)
    for one, (top, left, bottom, right) in zip(result, corners):
        one[top:bottom, left:right] = True
    return result


def test_a_proposal_inside_the_region_and_one_that_covers_it_are_chosen() -> None:
    maps = torch.zeros(1, 8, 8)
    maps[0, 2:6, 2:6] = 0.9
    small, large, beside = boxes((2, 2, 4, 4), (1, 1, 7, 8), (0, 6, 8, 8))
    assert torch.equal(choose_proposals(maps, torch.stack([small, beside]))[0] > 0, small)
    assert torch.equal(choose_proposals(maps, torch.stack([large, beside]))[0] > 0, large)  # 16 of its 42 pixels
    assert torch.equal(choose_proposals(maps, torch.stack([large, small]), min_covered=1.0)[0] > 0, small)
    assert torch.equal(choose_proposals(maps, beside[None]), maps)  # nothing chosen: its own mask


def test_conflicts_go_to_the_higher_overlap_and_a_class_without_proposals_keeps_its_mask() -> None:
    maps = torch.zeros(3, 8, 8)
    maps[0, :, :4], maps[1, :, 4:6], maps[2, :, 6:] = 0.9, 0.9, 0.7
    wide, right = boxes((0, 0, 8, 5), (0, 4, 8, 6))  # 80 % in class 0; all in class 1
    got = choose_proposals(maps, torch.stack([wide, right]), min_covered=1.0)
    assert torch.equal(got[1] > 0, right) and torch.equal(got[0] > 0, wide & ~right)
    assert torch.equal(got[2], maps[2])
    got = choose_proposals(maps, boxes((0, 0, 8, 4), (0, 4, 8, 7)), min_covered=1.0)
    assert got[2, :, 7].eq(maps[2, :, 7]).all() and not got[2, :, :7].any()  # column 6 went to class 1


def test_regions_do_not_overlap_and_empty_ones_have_no_share() -> None:
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    regions = class_regions(maps, 0.6)
    assert regions.sum(0).max() == 1 and torch.equal(regions.any(0), maps.amax(0) > 0.6)
    assert class_regions(maps[:0], 0.6).shape == (0, 8, 8)
    empty = overlaps(torch.zeros(2, 8, 8, dtype=torch.bool), torch.zeros(3, 8, 8, dtype=torch.bool))
    assert not empty.inside.any() and not empty.covered.any() and empty.inside.shape == (2, 3)
    assert overlaps(torch.zeros(0, 8, 8, dtype=torch.bool), regions).covered.shape == (0, 3)


def test_nothing_to_choose_or_to_choose_from() -> None:
    maps, none = torch.rand(2, 8, 8), torch.zeros(0, 8, 8, dtype=torch.bool)
    assert torch.equal(choose_proposals(maps, none), maps)
    assert choose_proposals(maps[:0], boxes((0, 0, 8, 8))).shape == (0, 8, 8)


def test_align_of_one_image_in_refine_masks(make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(), make_batch()
    random = np.random.default_rng(0)
    proposals = [random.random((4, *img.shape[2:])) < 0.3 for _ in img]
    proposals[0][0] = True
    edges = refiner.refine_masks(img, cam, labels, align="pamr", clip_steps=0).masks
    align = [ProposalAlign(one, threshold=0.3, min_inside=0.2, first="pamr") for one in proposals]
    got = refiner.refine_masks(img, cam, labels, align=align, clip_steps=0, threshold=0.3)
    for i, one in enumerate(proposals):
        own = labels[i].bool()
        expected = choose_proposals(edges[i, own], torch.from_numpy(one), threshold=0.3, min_inside=0.2)
        assert torch.equal(got.masks[i, own], expected) and not got.masks[i, ~own].any()
    assert not torch.equal(got.masks, edges)
    single = refiner.refine_masks(img[:1], cam[:1], labels[:1], align=align[0], clip_steps=0).masks
    assert torch.equal(single, got.masks[:1])


def test_align_first_is_that_of_align_masks() -> None:
    img, maps = torch.rand(3, 16, 16), torch.rand(2, 16, 16)
    none = torch.zeros(0, 16, 16, dtype=torch.bool)
    assert torch.equal(ProposalAlign(none)(img, maps), maps)
    assert torch.equal(ProposalAlign(none, first="pamr")(img, maps), masks.pamr(img[None], maps[None])[0])


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (np.zeros((2, 4, 4), np.uint8), {}, TypeError, "`proposals` must be bool; got torch.uint8"),
        (
            np.zeros((4, 4), bool),
            {},
            ValueError,
            r"`proposals` must have shape \(M, H, W\), .* got tensor \(4, 4\)",
        ),
        (np.zeros((2, 4, 4), bool), {"threshold": 2}, ValueError, "`threshold` must be from 0 to 1"),
        (np.zeros((2, 4, 4), bool), {"min_inside": -1}, ValueError, "`min_inside` must be from 0 to 1"),
        (np.zeros((2, 4, 4), bool), {"min_covered": "all"}, TypeError, "`min_covered` must be a number"),
    ],
)
def test_wrong_proposals_are_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ProposalAlign(arguments, **options)


def test_proposals_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`proposals` must have the size of their image, \(8, 8\); got \(4, 4\)"):
        ProposalAlign(np.zeros((1, 4, 4), bool))(torch.rand(3, 8, 8), torch.rand(1, 8, 8))
