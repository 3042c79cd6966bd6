from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

from semples_plugin import masks

CLASSES = ["boat", "train", "bird"]


def scene(seed: int = 0, cam_size: int = 8) -> Tuple[Tensor, Tensor, Tensor]:
    """Two images with smooth CAMs and two positive labels each."""
    generator = torch.Generator().manual_seed(seed)
    img = torch.rand(2, 3, 40, 40, generator=generator)
    cam = torch.randn(2, 3, cam_size, cam_size, generator=generator)
    return img, cam, torch.tensor([[1, 0, 1], [0, 1, 1]])


# ---------------------------------------------------------------------------------------------------- optimize_cam


@pytest.mark.parametrize("learned", [False, True])
def test_the_loss_goes_down(learned: bool, make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner(learned=learned, normalize=None)
    img, cam, labels = scene()
    cam = cam.sigmoid()
    losses = [refiner.compute(img, cam * labels[:, :, None, None], labels).loss.item()]
    for steps in (5, 20):
        losses.append(refiner.compute(img, refiner.optimize_cam(img, cam, labels, steps=steps), labels).loss.item())
    assert losses[0] > losses[1] > losses[2] and losses[2] < losses[0] - 0.01


def test_the_result_is_the_normalized_cam_moved_in_its_logit(make_refiner: Callable[..., Any]) -> None:
    img, cam, labels = scene()
    result = make_refiner(learned=True).optimize_cam(img, 5 * cam, labels, steps=10, lr=0.1)
    assert result.shape == cam.shape and result.dtype == torch.float32 and not result.requires_grad
    assert 0 <= result.min() and result.max() <= 1
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    plain = ((cam - low) / (high - low)).clamp(0.02, 0.98)
    for b, k in labels.nonzero().tolist():
        moved = torch.logit(result[b, k]) - torch.logit(plain[b, k])
        assert 0.1 < moved.abs().max() <= 10 * 0.1 + 0.05  # about `lr` per step of Adam at most
    assert not result[~labels.bool()].any()


def test_a_learning_rate_of_zero_gives_the_normalized_cam(make_refiner: Callable[..., Any]) -> None:
    img, cam, labels = scene()
    result = make_refiner().optimize_cam(img, cam, labels, steps=2, lr=0.0)
    large = torch.nn.functional.interpolate(cam, size=40)
    expected = make_refiner().refine_masks(img, large, labels, align=None, clip_steps=0).masks
    for b, k in labels.nonzero().tolist():
        assert torch.allclose(result[b, k], expected[b, k][2::5, 2::5], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"lambda_area": 0.5}, {"max_views": 1}])
def test_pairs_do_not_influence_one_another(options: Dict[str, Any], make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner(learned=True, **options)
    img, cam, labels = scene()
    together = refiner.optimize_cam(img, cam, labels, steps=8)
    for b in range(2):
        alone = refiner.optimize_cam(img[b : b + 1], cam[b : b + 1], labels[b : b + 1], steps=8)
        assert (together[b] - alone[0]).abs().max() < 1e-4
    one_class = torch.tensor([[1, 0, 0], [0, 0, 0]])
    assert (refiner.optimize_cam(img, cam, one_class, steps=8)[0, 0] - together[0, 0]).abs().max() < 1e-4


def test_a_region_can_grow_where_the_cam_is_empty_and_go_where_it_is_full() -> None:
    half = torch.zeros(1, 8, 8)
    half[:, :, 4:] = 1
    target = 1 - half  # the loss wants the opposite
    result = masks.optimize(
        half, torch.zeros(1, 2), lambda m, _: (m - target).abs().mean(), (8, 8), steps=30, lr=0.5, grid=8, at_once=1
    )
    assert (result - target).abs().max() < 0.1


@pytest.mark.parametrize("max_views", [1, 2, 5, 7])
def test_chunks_bound_the_views_and_do_not_change_the_result(max_views: int, make_refiner: Callable[..., Any]) -> None:
    img, cam, labels = scene()
    whole = make_refiner(learned=True, max_views=None).optimize_cam(img, cam, labels, steps=4)
    refiner = make_refiner(learned=True, max_views=max_views)
    views: List[int] = []
    handle = refiner.encoder.model.visual.register_forward_pre_hook(lambda module, args: views.append(len(args[0])))
    try:
        chunked = refiner.optimize_cam(img, cam, labels, steps=4)
    finally:
        handle.remove()
    assert (chunked - whole).abs().max() < 1e-4
    assert max(views) <= max_views
    if max_views > 1:  # nothing is encoded twice
        assert sum(views) == 2 * int(labels.sum()) * 4


@pytest.mark.parametrize("learned", [False, True])
def test_inference_mode_gives_the_same(learned: bool, make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner(learned=learned)
    expected = refiner.optimize_cam(*scene(), steps=3)
    with torch.inference_mode():
        got = refiner.optimize_cam(*scene(), steps=3)
        built_inside = make_refiner(["boat", "train", "bird"]).optimize_cam(*scene(), steps=3)
    assert torch.equal(got, expected) and torch.isfinite(built_inside).all()


def test_background_channel_and_other_statistics(make_refiner: Callable[..., Any]) -> None:
    img, cam, labels = scene()
    plain = make_refiner().optimize_cam(img, cam, labels, steps=3)
    with_background = torch.cat([torch.rand(2, 1, 8, 8), cam], dim=1)
    assert torch.equal(make_refiner(background_channel=True).optimize_cam(img, with_background, labels, steps=3), plain)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    imagenet = make_refiner(image_stats="imagenet").optimize_cam((img - mean) / std, cam, labels, steps=3)
    assert (imagenet - plain).abs().max() < 1e-3


def test_a_batch_without_positives(make_refiner: Callable[..., Any]) -> None:
    img, cam, _ = scene()
    result = make_refiner().optimize_cam(img, cam, torch.zeros(2, 3))
    assert result.shape == cam.shape and not result.any()


def test_flat_cams_stay_finite(make_refiner: Callable[..., Any]) -> None:
    img, cam, labels = scene()
    result = make_refiner(learned=True).optimize_cam(img, torch.ones_like(cam), labels, steps=3)
    assert torch.isfinite(result).all() and 0 <= result.min() and result.max() <= 1


def test_no_gradient_is_left_and_none_is_needed(make_refiner: Callable[..., Any], aligned_clip: nn.Module) -> None:
    refiner = make_refiner(learned=True)
    img, cam, labels = scene()
    expected = refiner.optimize_cam(img, cam, labels, steps=3)
    given = cam.clone().requires_grad_(True)
    before = {name: value.clone() for name, value in refiner.state_dict().items()}
    aligned_clip.zero_grad(set_to_none=True)  # shared by all tests
    with torch.no_grad():
        without = refiner.optimize_cam(img, given, labels, steps=3)
        assert not torch.is_grad_enabled()
    again = refiner.optimize_cam(img, given, labels, steps=3)  # and twice gives the same
    assert torch.equal(without, expected) and torch.equal(again, expected) and not again.requires_grad
    assert given.grad is None and torch.equal(given, cam) and img.grad is None
    for parameter in (*refiner.parameters(), *aligned_clip.parameters(), *refiner.encoder.model.parameters()):
        assert parameter.grad is None
    assert not any(parameter.requires_grad for parameter in (*refiner.parameters(), *refiner.encoder.model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items())


@pytest.mark.parametrize(
    "options, error, reason",
    [
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"steps": 1.5}, TypeError, "`steps` must be a whole number"),
        ({"grid": 0}, ValueError, "`grid` must be at least 1"),
        ({"lr": -1.0}, ValueError, "`lr` must be at least 0"),
        ({"lr": float("nan")}, ValueError, "`lr` must be at least 0"),
    ],
)
def test_wrong_arguments(options: Dict[str, Any], error: Any, reason: str, make_refiner: Callable[..., Any]) -> None:
    with pytest.raises(error, match=reason):
        make_refiner().optimize_cam(*scene(), **options)


def test_wrong_batches(make_refiner: Callable[..., Any]) -> None:
    img, cam, labels = scene()
    with pytest.raises(ValueError, match="`img` must be in"):
        make_refiner().optimize_cam(255 * img, cam, labels)
    with pytest.raises(ValueError, match="`labels` must be multi-hot"):
        make_refiner().optimize_cam(img, cam, labels[:, :2])


# ---------------------------------------------------------------------------------------------------- stage (b) in parts


def test_encode_backgrounds_and_fit_prompts_on_are_fit_prompts(make_refiner: Callable[..., Any]) -> None:
    batches = [(*scene(seed)[:2], labels) for seed, labels in enumerate([scene()[2], torch.zeros(2, 3), torch.ones(2, 3)])]
    settings: Dict[str, Any] = {"epochs": 3, "batch_size": 2, "lr": 0.05, "progress": False}
    whole, by_hand = make_refiner(), make_refiner()
    cams = iter(cam for _, cam, _ in batches)
    expected = whole.fit_prompts([(img, labels) for img, _, labels in batches], lambda img: next(cams), **settings)

    features, pairs, count = [], [], 0
    for img, cam, labels in batches:
        v_b, found = by_hand.encode_backgrounds(img, cam.requires_grad_(True), labels)
        assert v_b.shape == (int(labels.sum()), by_hand.encoder.embed_dim) and not v_b.requires_grad
        assert found.tolist() == labels.nonzero().tolist()
        features.append(v_b)
        pairs.append(found + torch.tensor([count, 0]))
        count += len(img)
    assert by_hand.stage == "match"
    fit = by_hand.fit_prompts_on(torch.cat(features), torch.cat(pairs), **settings)
    assert fit == expected and fit.num_pairs == 10 and by_hand.stage == "refine"
    assert torch.equal(by_hand.prompts.context, whole.prompts.context)
    assert torch.equal(by_hand.prompt_features(), whole.prompt_features())


def test_backgrounds_are_the_rest_of_the_image(make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner(normalize=None, clip_stats=False)
    img, _, labels = scene()
    v_b, _ = refiner.encode_backgrounds(img, torch.zeros(2, 3, 4, 4), labels)  # an empty CAM: the whole image is background
    whole = refiner.encoder.encode_image(torch.nn.functional.interpolate(img, size=(32, 32), mode="bilinear", antialias=True))
    assert torch.allclose(v_b, whole[labels.nonzero()[:, 0]], atol=1e-5)


def test_fit_prompts_on_nothing(make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner()
    with pytest.raises(ValueError, match="at least one positive label"):
        refiner.fit_prompts_on(torch.zeros(0, 64), torch.zeros(0, 2, dtype=torch.long), progress=False)
    with pytest.raises(ValueError, match="`epochs` must be at least 1"):
        refiner.fit_prompts_on(torch.rand(1, 64), torch.zeros(1, 2, dtype=torch.long), epochs=0)
    assert refiner.stage == "match"


# ---------------------------------------------------------------------------------------------------- dtypes


def steps_towards_one_half(base: Tensor, head: nn.Module) -> Tensor:
    pairs = torch.zeros(len(base), 2, dtype=torch.long)
    options: Dict[str, Any] = {"steps": 2, "lr": 0.1, "grid": 4, "at_once": 2}
    return masks.optimize(base, pairs, lambda m, _: (m - 0.5).abs().mean() + 0 * head(m).mean(), (8, 8), **options)


def test_steps_take_float64_masks_and_inference_mode() -> None:
    base = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    head = nn.Linear(8, 1)  # float32, as CLIP is
    expected = steps_towards_one_half(base, head)
    assert expected.dtype == torch.float32 and not torch.equal(expected, base)
    assert torch.equal(steps_towards_one_half(base.double(), head), expected)
    with torch.inference_mode():
        assert torch.equal(steps_towards_one_half(base.clone(), head), expected)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_cams_of_other_dtypes(dtype: torch.dtype, inference: bool, make_refiner: Callable[..., Any]) -> None:
    refiner, (img, cam, labels) = make_refiner(learned=True, lambda_area=0.5), scene()
    cam = cam.half().float()  # values that all dtypes hold
    expected = refiner.optimize_cam(img, cam, labels, steps=2)
    with torch.inference_mode(inference):
        got = refiner.optimize_cam(img.clone(), cam.to(dtype), labels.clone(), steps=2)
    assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 3e38), (torch.float64, 1e300)])
def test_a_cam_beyond_float32_is_an_error_that_says_so(
    dtype: torch.dtype, size: float, make_refiner: Callable[..., Any]
) -> None:
    refiner, (img, cam, labels) = make_refiner(), scene()
    cam = cam.sign().to(dtype)
    for method in (refiner.optimize_cam, refiner.compute, refiner.refine_masks):
        with pytest.raises(ValueError, match=r"`cam` must be at most 1e\+38 in size.*got values from -(3e\+38|1e\+300) to"):
            method(img, size * cam, labels)
    assert refiner.optimize_cam(img, 1e38 * cam, labels, steps=1).isfinite().all()
