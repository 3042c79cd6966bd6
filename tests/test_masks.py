from __future__ import annotations

import copy
import math
import statistics
from typing import Any, Dict, List

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from semples_plugin import masks
from semples_plugin.clip_backends import load_clip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


# ------------------------------------------------------------------------------------------------ suppression


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize("with_prompts", [False, True])
def test_suppression_equals_loop(with_prompts: bool, scale: float) -> None:
    dense, u_f, u_b = random(2, 6, 3, 3), random(4, 6, seed=1), random(4, 2, 6, seed=2)
    alive = torch.tensor([[True, True], [True, False], [False, False], [False, True]])
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    pairs = labels.nonzero()
    got = masks.suppression(dense, pairs, u_f, u_b if with_prompts else None, scale, alive)
    assert got.shape == (4, 3, 3)
    for p, (b, k) in enumerate(pairs.tolist()):
        for y in range(3):
            for x in range(3):
                rivals = [cosine(dense[b, :, y, x], u_f[j]) for j in range(4) if labels[b, j]]
                rivals += [cosine(dense[b, :, y, x], u_b[k, n]) for n in range(2) if with_prompts and alive[k, n]]
                own = math.exp(scale * cosine(dense[b, :, y, x], u_f[k]))
                expected = own / sum(math.exp(scale * c) for c in rivals)
                assert got[p, y, x].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_suppression_is_one_without_rivals() -> None:
    got = masks.suppression(random(1, 6, 3, 3), torch.tensor([[0, 2]]), random(4, 6), None, 100.0)
    assert torch.equal(got, torch.ones(1, 3, 3))


def test_suppression_separates_class_from_background() -> None:
    u_f, u_b = torch.eye(3)[:1], torch.eye(3)[1:2][None]
    dense = torch.stack([u_f[0], u_b[0, 0]], dim=1).reshape(1, 3, 1, 2)  # left looks like the class, right like its prompt
    got = masks.suppression(dense, torch.tensor([[0, 0]]), u_f, u_b, 100.0)
    assert got[0, 0, 0] > 0.999 and got[0, 0, 1] < 1e-3


def test_suppression_is_exact_under_autocast() -> None:
    arguments = random(2, 6, 3, 3), torch.tensor([[0, 0], [0, 2], [1, 1]]), random(4, 6, seed=1), random(4, 1, 6, seed=2), 100.0
    expected = masks.suppression(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = masks.suppression(*arguments)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------ PAMR


def pamr_loop(img: Tensor, mask: Tensor, iterations: int, dilations: List[int]) -> Tensor:
    """The published update, one pixel at a time: img (3, H, W), mask (H, W)."""
    height, width = mask.shape
    for _ in range(iterations):
        updated = torch.zeros_like(mask)
        for y in range(height):
            for x in range(width):
                around = [
                    (min(max(y + dy * d, 0), height - 1), min(max(x + dx * d, 0), width - 1))
                    for d in dilations
                    for dy in (-1, 0, 1)
                    for dx in (-1, 0, 1)
                    if dy or dx
                ]
                kernel = [0.0] * len(around)
                for channel in img.tolist():
                    sigma = statistics.stdev(channel[v][u] for v, u in around)
                    for n, (v, u) in enumerate(around):
                        kernel[n] -= abs(channel[v][u] - channel[y][x]) / (0.1 * sigma + 1e-8) / 3
                weights = [math.exp(k - max(kernel)) for k in kernel]
                updated[y, x] = sum(w * mask[v, u].item() for w, (v, u) in zip(weights, around)) / sum(weights)
        mask = updated
    return mask


@pytest.mark.parametrize(("iterations", "dilations"), [(1, [1]), (2, [1, 2]), (3, [1, 4])])
def test_pamr_equals_loop(iterations: int, dilations: List[int]) -> None:
    img, mask = random(2, 3, 6, 5).sigmoid(), random(2, 2, 6, 5, seed=1).sigmoid()
    got = masks.pamr(img, mask, iterations, dilations)
    for b in range(2):
        for k in range(2):
            assert torch.allclose(got[b, k], pamr_loop(img[b], mask[b, k], iterations, dilations), atol=1e-5)


def test_pamr_keeps_constants() -> None:
    got = masks.pamr(random(1, 3, 20, 20), torch.full((1, 2, 20, 20), 0.3))
    assert torch.allclose(got, torch.full((1, 2, 20, 20), 0.3), atol=1e-5)


def test_pamr_of_a_flat_image_is_finite() -> None:
    mask = random(1, 1, 12, 12).sigmoid()
    got = masks.pamr(torch.full((1, 3, 12, 12), 0.5), mask)
    assert got.isfinite().all() and got.std() < 0.5 * mask.std()  # no edges: plain smoothing


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
def test_pamr_stays_in_the_range_of_the_mask(seed: int, height: int, width: int) -> None:
    mask = random(1, 2, height, width, seed=seed)
    got = masks.pamr(random(1, 3, height, width, seed=seed + 1), mask, 3, (1, 3))
    assert got.shape == mask.shape
    assert got.min() >= mask.min() - 1e-5 and got.max() <= mask.max() + 1e-5


def test_pamr_sharpens_a_blurred_mask_at_an_image_edge() -> None:
    img = torch.zeros(1, 3, 32, 32)
    img[..., 16:] = 0.8
    img += 0.02 * random(1, 3, 32, 32)
    mask = torch.sigmoid((torch.arange(32) - 15.5) / 4).expand(1, 1, 32, 32)  # 10 to 90 % over 18 pixels
    truth = (torch.arange(32) >= 16).float()
    got = masks.pamr(img, mask)
    jump_before, jump_after = ((m[..., 16] - m[..., 15]).mean() for m in (mask, got))
    assert jump_before < 0.07 and jump_after > 0.5
    assert (got - truth).abs().mean() < 0.7 * (mask - truth).abs().mean()


# ------------------------------------------------------------------------------------------------ pseudo labels


def test_pseudo_labels_equal_loop() -> None:
    scores = random(2, 3, 4, 4).sigmoid()
    got = masks.pseudo_labels(scores, 0.6)
    for b in range(2):
        for y in range(4):
            for x in range(4):
                values = scores[b, :, y, x].tolist()
                expected = 1 + values.index(max(values)) if max(values) > 0.6 else 0
                assert got[b, y, x].item() == expected
    assert got.dtype == torch.int64 and len(got.unique()) > 2


def test_threshold_is_background_even_at_equality() -> None:
    assert masks.pseudo_labels(torch.tensor([[[[0.5, 0.75]]]]), 0.5).flatten().tolist() == [0, 1]
    assert masks.pseudo_labels(torch.zeros(1, 2, 1, 1), 0.0).item() == 0


# ------------------------------------------------------------------------------------------------ PromptRefiner.refine_masks


LABELS = [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"suppress": False}, {"align": None}, {"suppress": False, "align": None}])
def test_refine_shapes_and_absent_classes(options: Dict[str, Any], learned: bool, make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch(LABELS)
    got = make_refiner(learned=learned).refine_masks(img[..., :36], cam, labels, **options)
    assert got.masks.shape == (3, 3, 40, 36) and got.masks.dtype == torch.float32 and not got.masks.requires_grad
    assert got.labels.shape == (3, 40, 36) and got.labels.dtype == torch.int64
    assert got.masks.min() >= 0 and got.masks.max() <= 1 + 1e-5
    for b in range(3):
        present = labels[b].nonzero()[:, 0].tolist()
        for k in range(3):
            assert (got.masks[b, k].max() > 0) == (k in present)
        assert set(got.labels[b].unique().tolist()) <= {0, *(k + 1 for k in present)}
    assert torch.equal(got.labels, masks.pseudo_labels(got.masks, 0.4))


def test_refine_without_steps_is_the_normalized_cam(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch(LABELS)
    got = make_refiner().refine_masks(img, cam, labels, suppress=False, align=None, clip_steps=0)
    for b, k in labels.nonzero().tolist():
        up = F.interpolate(cam[b, k][None, None], size=(40, 40), mode="bilinear", align_corners=True)[0, 0]
        assert torch.allclose(got.masks[b, k], (up - up.min()) / (up.max() - up.min() + 1e-6), atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_refine_suppresses_with_dense_features(learned: bool, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=learned)
    img, cam, labels = make_batch(LABELS)
    plain = refiner.refine_masks(img, cam, labels, suppress=False, align=None, clip_steps=0).masks
    got = refiner.refine_masks(img, cam, labels, suppress=True, align=None, clip_steps=0).masks
    mean, std = (torch.tensor(s).reshape(3, 1, 1) for s in (refiner.encoder.mean, refiner.encoder.std))
    small = F.interpolate(img, size=(32, 32), mode="bilinear", antialias=True)
    dense = refiner.encoder.encode_dense((small - mean) / std)
    pairs = labels.nonzero()
    u_b = refiner.prompt_features() if learned else None
    weight = masks.suppression(dense, pairs, refiner.text_features, u_b, refiner.encoder.logit_scale)
    weight = F.interpolate(weight[:, None], size=(40, 40), mode="bilinear")[:, 0]
    for p, (b, k) in enumerate(pairs.tolist()):
        assert torch.allclose(got[b, k], plain[b, k] * weight[p], atol=1e-5)
    change = (got[2, 1] - plain[2, 1]).abs().max()  # the only class of its image: without prompts it has no rival
    assert change > 0.05 if learned else change < 1e-6
    assert (got[0, 0] - plain[0, 0]).abs().max() > 0.05


def test_refine_aligns_with_pamr(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(image_stats=((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    img, cam, labels = make_batch(LABELS)
    host_img = (img - 0.5) / 0.25
    plain = refiner.refine_masks(host_img, cam, labels, align=None).masks
    got = refiner.refine_masks(host_img, cam, labels).masks
    for b, k in labels.nonzero().tolist():
        assert torch.allclose(got[b, k], masks.pamr(img[b : b + 1], plain[b : b + 1, k : k + 1])[0, 0], atol=1e-4)


def test_refine_with_a_callable(make_refiner: Any, make_batch: Any) -> None:
    seen = []

    def halve(img: Tensor, mask: Tensor) -> Tensor:
        seen.append((img, mask.shape))
        return mask / 2

    refiner = make_refiner(image_stats=((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    img, cam, labels = make_batch(LABELS)
    host_img = (img - 0.5) / 0.25
    plain = refiner.refine_masks(host_img, cam, labels, align=None)
    got = refiner.refine_masks(host_img, cam, labels, align=halve, threshold=0.2)
    assert [shape for _, shape in seen] == [(2, 40, 40), (1, 40, 40)]  # present classes only; no call without any
    assert torch.allclose(seen[0][0], img[0], atol=1e-6) and torch.allclose(seen[1][0], img[2], atol=1e-6)
    assert torch.allclose(got.masks, plain.masks / 2)
    assert torch.equal(got.labels, plain.labels)


def test_refine_threshold_and_power(make_refiner: Any, make_batch: Any) -> None:
    refiner, batch = make_refiner(), make_batch(LABELS)
    low, high = (refiner.refine_masks(*batch, threshold=t) for t in (0.1, 0.8))
    assert (low.labels > 0).sum() > 2 * (high.labels > 0).sum()


def test_refine_of_a_batch_without_labels(make_refiner: Any, make_batch: Any) -> None:
    got = make_refiner().refine_masks(*make_batch([[0, 0, 0]]))
    assert got.masks.abs().max() == 0 and got.labels.max() == 0


def test_refine_in_chunks(make_refiner: Any, make_batch: Any) -> None:
    batch = make_batch(LABELS)
    for options in ({"clip_steps": 0}, {"clip_steps": 0, "suppress": True}):
        whole, chunked = (make_refiner(max_views=n).refine_masks(*batch, **options).masks for n in (None, 1))
        assert torch.allclose(whole, chunked, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_refine_is_optimize_cam_then_cam_to_masks(learned: bool, make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(learned=learned), make_batch(LABELS)
    pairs = labels.nonzero()
    got = refiner.refine_masks(img, cam, labels)
    assert torch.equal(got.masks, masks.cam_to_masks(img, refiner.optimize_cam(img, cam, labels), pairs))
    assert torch.equal(got.labels, masks.pseudo_labels(got.masks, 0.4))
    without = refiner.refine_masks(img, cam, labels, clip_steps=0)
    assert torch.equal(without.masks, masks.cam_to_masks(img, cam, pairs))
    assert (got.masks - without.masks).abs().max() > 0.02
    options = {"clip_steps": 2, "clip_lr": 0.3, "clip_grid": 4}
    better = refiner.optimize_cam(img, cam, labels, steps=2, lr=0.3, grid=4)
    assert torch.equal(refiner.refine_masks(img, cam, labels, **options).masks, masks.cam_to_masks(img, better, pairs))


def test_refine_with_a_background_channel_and_without_normalization(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch(LABELS)
    with_background = torch.cat([torch.rand(3, 1, 8, 8), cam], dim=1)
    expected = make_refiner().refine_masks(img, cam, labels, clip_steps=2).masks
    got = make_refiner(background_channel=True).refine_masks(img, with_background, labels, clip_steps=2).masks
    assert torch.equal(got, expected)
    plain = make_refiner(normalize=None).refine_masks(img, cam.sigmoid(), labels, clip_steps=2).masks
    assert plain.min() >= 0 and plain.max() <= 1 + 1e-5


def test_refine_leaves_no_gradient_and_needs_none(make_refiner: Any, make_batch: Any, aligned_clip: nn.Module) -> None:
    refiner, (img, cam, labels) = make_refiner(learned=True), make_batch(LABELS)
    aligned_clip.zero_grad(set_to_none=True)  # shared by all tests
    expected = refiner.refine_masks(img, cam, labels)
    with torch.inference_mode():
        assert torch.equal(refiner.refine_masks(img, cam, labels).masks, expected.masks)
    with torch.no_grad():
        assert torch.equal(refiner.refine_masks(img, cam, labels).masks, expected.masks)
    assert cam.grad is None and not expected.masks.requires_grad
    assert all(p.grad is None for p in (*refiner.parameters(), *refiner.encoder.model.parameters()))


@pytest.mark.parametrize("value, error", [(-1, ValueError), (1.5, TypeError)])
def test_refine_refuses_wrong_clip_steps(value: Any, error: Any, make_refiner: Any, make_batch: Any) -> None:
    with pytest.raises(error, match="`clip_steps` must be"):
        make_refiner().refine_masks(*make_batch(LABELS), clip_steps=value)


def test_refine_takes_detached_cams_and_unknown_align_is_an_error(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch()
    assert torch.equal(refiner.refine_masks(img, cam.detach(), labels).masks, refiner.refine_masks(img, cam, labels).masks)
    with pytest.raises(ValueError, match="`align` must be 'pamr', 'crf', None, a callable, or a list of these; got 'edges'"):
        refiner.refine_masks(img, cam, labels, align="edges")
    with pytest.raises(ValueError, match="`align` must have an entry for each of the 2 images; got 1"):
        refiner.refine_masks(img, cam, labels, align=["pamr"])


def test_refine_takes_an_align_per_image(make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(), make_batch()
    plain, edges = (refiner.refine_masks(img, cam, labels, align=align, clip_steps=0).masks for align in (None, "pamr"))
    got = refiner.refine_masks(img, cam, labels, align=["pamr", None], clip_steps=0).masks
    assert torch.equal(got[0], edges[0]) and torch.equal(got[1], plain[1]) and not torch.equal(plain[0], edges[0])


# ------------------------------------------------------------------------------------------------ dense features


def test_dense_vit_features_equal_literal_maskclip(tiny_clip: nn.Module) -> None:
    views = random(2, 3, 32, 32)
    got = load_clip(tiny_clip).encode_dense(views)
    assert got.shape == (2, 32, 4, 4) and got.dtype == torch.float32
    visual = tiny_clip.visual
    last = visual.transformer.resblocks[-1]
    with torch.no_grad():
        for n in range(2):
            patches = visual.conv1(views[n : n + 1])[0].flatten(1).T  # (16, W)
            tokens = torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding  # (17, W)
            x = visual.ln_pre(tokens)[:, None]  # (17, 1, W)
            for block in list(visual.transformer.resblocks)[:-1]:
                x = block(x)
            for i in range(16):
                y = last.ln_1(x[1 + i, 0])
                value = last.attn.in_proj_weight[2 * 64 :] @ y + last.attn.in_proj_bias[2 * 64 :]
                value = last.attn.out_proj.weight @ value + last.attn.out_proj.bias
                expected = visual.ln_post(value) @ visual.proj
                assert torch.allclose(got[n, :, i // 4, i % 4], expected, rtol=1e-4, atol=1e-5)


def test_dense_resnet_features_equal_the_value_path(tiny_resnet_clip: nn.Module) -> None:
    views = random(2, 3, 64, 64)
    got = load_clip(tiny_resnet_clip).encode_dense(views)
    trunk = copy.deepcopy(tiny_resnet_clip.visual)
    pool, trunk.attnpool = trunk.attnpool, nn.Identity()
    with torch.no_grad():
        feature_map = trunk(views)  # (2, W, 2, 2)
        assert got.shape == (2, 32, *feature_map.shape[2:])
        for n in range(2):
            for y in range(2):
                for x in range(2):
                    expected = pool.c_proj(pool.v_proj(feature_map[n, :, y, x]))
                    assert torch.allclose(got[n, :, y, x], expected, rtol=1e-4, atol=1e-5)


def test_dense_features_leave_no_hook(aligned_clip: nn.Module, tiny_resnet_clip: nn.Module) -> None:
    for model, size in ((aligned_clip, 32), (tiny_resnet_clip, 64)):
        encoder = load_clip(model)
        encoder.encode_dense(random(1, 3, size, size))
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.model.modules())


@pytest.mark.parametrize("align", [None, "pamr"])
def test_refined_masks_do_not_depend_on_the_scale_of_the_cam(align: Any, make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(), make_batch()
    one, thousandth = (refiner.refine_masks(img, scale * cam, labels, align=align) for scale in (1.0, 1e-3))
    assert torch.allclose(one.masks, thousandth.masks, atol=2e-3)
    assert (one.labels == thousandth.labels).float().mean() > 0.999


# ------------------------------------------------------------------------------------------------ edge alignment


@pytest.mark.parametrize("num_masks", [1, 8, 19])
def test_pamr_is_as_exact_as_float32_allows(num_masks: int) -> None:
    img = (255 * random(1, 3, 60, 50).sigmoid()).clamp(100, 170).round() / 255  # levels and saturated areas, as in photos
    mask = random(1, num_masks, 60, 50, seed=1).sigmoid()
    assert (masks.pamr(img, mask) - masks.pamr(img.double(), mask.double())).abs().max() < 4e-6


def test_pamr_allocates_no_copy_of_the_masks_per_neighbor() -> None:
    img, mask = random(1, 3, 50, 60).sigmoid(), random(1, 20, 50, 60, seed=1).sigmoid()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        masks.pamr(img, mask)
    assert largest <= 50 * 60 * 48  # the weights of the 48 neighbors


def test_pamr_passes_the_gradient_of_the_masks() -> None:
    img, mask = random(1, 3, 6, 5).double(), random(1, 10, 6, 5, seed=1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda m: masks.pamr(img, m, 2, (1, 2)), mask)


def test_only_present_classes_are_aligned(make_refiner: Any, make_batch: Any) -> None:
    counts: List[int] = []

    def align(img: Tensor, own: Tensor) -> Tensor:
        counts.append(len(own))
        return own

    make_refiner().refine_masks(*make_batch(LABELS), align=align, clip_steps=0)
    assert counts == [2, 1]


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5, float("inf")])
def test_refine_refuses_wrong_thresholds(value: float, make_refiner: Any, make_batch: Any) -> None:
    with pytest.raises(ValueError, match="`threshold` must be from 0 to 1; got"):
        make_refiner().refine_masks(*make_batch(LABELS), threshold=value)


def test_refine_refuses_a_threshold_that_is_no_number(make_refiner: Any, make_batch: Any) -> None:
    with pytest.raises(TypeError, match="`threshold` must be a number; got '0.4' of type str"):
        make_refiner().refine_masks(*make_batch(LABELS), threshold="0.4")


def test_two_thresholds_leave_uncertain_pixels() -> None:
    soft = torch.tensor([[[[0.1, 0.3, 0.4, 0.6]], [[0.0, 0.35, 0.2, 0.7]]]])  # (1, 2, 1, 4)
    assert masks.pseudo_labels(soft, 0.3).tolist() == [[[0, 2, 1, 2]]]
    assert masks.pseudo_labels(soft, (0.3, 0.5)).tolist() == [[[0, 255, 255, 2]]]
    assert masks.pseudo_labels(soft, (0.35, 0.35)).tolist() == masks.pseudo_labels(soft, 0.35).tolist()


@pytest.mark.parametrize("threshold", [(0.5, 0.3), (0.1, 0.2, 0.3), (0.1, 1.2), (float("nan"), 0.5), ()])
def test_two_thresholds_that_are_none(threshold: Any, make_refiner: Any, make_batch: Any) -> None:
    with pytest.raises(ValueError, match="`threshold` must be"):
        make_refiner(["boat", "train", "bird"]).refine_masks(*make_batch(), threshold=threshold, clip_steps=0)


def test_more_classes_than_labels_below_255_have_one_threshold() -> None:
    soft = torch.zeros(1, 255, 1, 2)
    soft[0, 254, 0, 0], soft[0, 253, 0, 1] = 1.0, 0.4
    assert masks.pseudo_labels(soft, 0.3).tolist() == masks.pseudo_labels(soft, (0.3, 0.3)).tolist() == [[[255, 254]]]
    assert masks.pseudo_labels(soft[:, :254], (0.3, 0.5)).tolist() == [[[0, 255]]]
    for few, classes in ((soft, None), (soft[:, 253:], [253, 254])):
        with pytest.raises(ValueError, match="at most 254 classes; got class index 254, and label 255 means uncertain"):
            masks.pseudo_labels(few, (0.3, 0.5), classes)
    masks.check_class_count(254)
    with pytest.raises(ValueError, match="Label maps hold at most 254 classes, .* got 255 classes"):
        masks.check_class_count(255)


@pytest.mark.parametrize("options", [{}, {"clip_steps": 0}, {"suppress": True, "align": None, "threshold": (0.3, 0.5)}])
def test_refine_on_some_classes_equals_refine_on_all(options: Dict[str, Any], make_refiner: Any, make_batch: Any) -> None:
    refiner, (img, cam, labels) = make_refiner(learned=True), make_batch([[0, 0, 1], [0, 0, 0], [0, 1, 0]])
    expected = refiner.refine_masks(img, cam, labels, **options)
    got = refiner.refine_masks(img, cam[:, 1:], labels[:, 1:], classes=[1, 2], **options)
    assert torch.equal(got.masks, expected.masks[:, 1:]) and torch.equal(got.labels, expected.labels)
    for wrong in ([], [2, 1], [1, 1], [1, 3], [-1, 1]):
        with pytest.raises(ValueError, match="`classes` must hold ascending class indices from 0 to 2; got"):
            refiner.refine_masks(img, cam[:, 1:], labels[:, 1:], classes=wrong)
    with pytest.raises(ValueError, match=r"`cam` must have shape \(B, C, h, w\) with B = 3 and C = 2 classes"):
        refiner.refine_masks(img, cam, labels, classes=[1, 2])
