from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

import semples_plugin
from semples_plugin import COCO, VOC, DetachedCamError, PromptRefiner, RefinerConfig, SemplesError


class Host(nn.Module):
    """A small network with class activation maps: (B, 3, H, W) -> (B, C, H/4, W/4), and logits from their mean."""

    def __init__(self, num_classes: int = 3, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Conv2d(3, 8, 4, stride=4)
            self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, img: Tensor) -> Tensor:
        return self.head(self.body(img).tanh())

    def loss(self, cam: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.multilabel_soft_margin_loss(cam.mean((2, 3)), labels.float())


def gradients(module: nn.Module) -> Dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------ training a host


@pytest.mark.parametrize("learned", [False, True])
def test_adding_and_adding_in_place_train_alike(learned: bool, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=learned)
    img, _, labels = make_batch()
    found = {}
    for way in ("none", "add", "in place"):
        host = Host()
        cam = host(img)
        loss = host.loss(cam, labels)
        if way == "add":
            loss = loss + refiner(img, cam, labels)
        elif way == "in place":
            loss += refiner(img, cam, labels)
        loss.backward()
        found[way] = (loss.item(), gradients(host))
    assert found["add"][0] == found["in place"][0]
    for name in ("body.weight", "body.bias", "head.weight"):
        assert torch.equal(found["add"][1][name], found["in place"][1][name])
        assert (found["add"][1][name] - found["none"][1][name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("learned", [False, True])
def test_training_lowers_the_loss(learned: bool, make_refiner: Any, make_batch: Any) -> None:
    refiner, host = make_refiner(learned=learned), Host()
    img, _, labels = make_batch()
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.02)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = refiner(img, host(img), labels)
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0] - 0.02


def test_three_stages(make_refiner: Any, make_batch: Any) -> None:
    refiner, host = make_refiner(), Host()
    img, _, labels = make_batch()
    assert refiner.stage == "match"
    assert sorted(refiner.compute(img, host(img), labels).terms) == ["match_background", "match_foreground"]
    fit = refiner.fit_prompts([(img, labels)], host, epochs=3, progress=False)
    assert refiner.stage == "refine" and len(fit.losses) == 3 and fit.num_pairs == 4
    out = refiner.compute(img, host(img), labels)
    assert sorted(out.terms) == ["match_background", "match_foreground", "refine"]
    terms = {name: value.item() for name, value in out.terms.items()}
    total = terms["match_foreground"] + 2.4 * terms["match_background"] + 0.05 * terms["refine"]
    assert out.loss.item() == pytest.approx(total, rel=1e-6)
    assert "stage='refine'" in repr(refiner) and "3 classes" in repr(refiner)


def test_forward_is_the_loss_of_compute(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True, lambda_area=0.5)
    img, cam, labels = make_batch()
    loss, out = refiner(img, cam, labels), refiner.compute(img, cam, labels)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    assert loss.item() == out.loss.item()
    assert out.masks.shape == (4, 32, 32) and 0 <= out.masks.min() and out.masks.max() <= 1
    assert out.pairs.tolist() == labels.nonzero().tolist()
    assert out.terms["area"].item() == pytest.approx(out.masks.mean().item(), rel=1e-6)


def test_detached_cam_trains_nothing_but_can_be_looked_at(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch()
    with pytest.raises(DetachedCamError, match=r"`cam` must require grad; .* Capture it without detach\(\)"):
        refiner(img, cam.detach(), labels)
    assert issubclass(DetachedCamError, ValueError) and issubclass(DetachedCamError, SemplesError)
    expected = refiner(img, cam, labels).item()
    assert refiner.compute(img, cam.detach(), labels).loss.item() == expected
    with torch.no_grad():
        assert refiner(img, cam.detach(), labels).item() == expected


@pytest.mark.parametrize("labels", [[[0, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
@pytest.mark.parametrize("learned", [False, True])
def test_no_positive_label_gives_an_attached_zero(
    learned: bool, labels: List[List[int]], make_refiner: Any, make_batch: Any
) -> None:
    water = ["a photo of water."]
    refiner = make_refiner(learned=learned, lambda_area=1.0, background_texts=water, lambda_background_texts=1.0)
    img, _, target = make_batch(labels)
    host = Host()
    out = refiner.compute(img, host(img), target)
    out.loss.backward()
    assert out.loss.item() == 0 and all(term.item() == 0 for term in out.terms.values())
    assert out.masks.shape == (0, 32, 32) and out.pairs.shape == (0, 2)
    assert sorted(gradients(host)) == sorted(name for name, _ in host.named_parameters())
    assert all(g.abs().max() == 0 for g in gradients(host).values())


def test_images_without_labels_do_not_change_the_loss(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    img, cam, labels = make_batch([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    kept = [0, 2]
    assert refiner(img, cam, labels).item() == pytest.approx(refiner(img[kept], cam[kept], labels[kept]).item(), rel=1e-5)


def test_only_cams_of_positive_pairs_get_gradients(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    make_refiner(learned=True)(img, cam, labels).backward()
    assert ((cam.grad.abs().amax((2, 3)) > 0) == labels.bool()).all()


def test_one_pair_in_the_batch(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    img, cam, labels = make_batch([[0, 1, 0]])
    loss = refiner(img, cam, labels)
    loss.backward()
    assert loss.isfinite() and loss > 0 and cam.grad[0, 1].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16])
def test_labels_of_any_type(dtype: torch.dtype, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch()
    assert refiner(img, cam, labels.to(dtype)).item() == refiner(img, cam, labels).item()


def test_loss_does_not_depend_on_the_order_of_images(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    img, cam, labels = make_batch([[1, 0, 1], [0, 1, 0], [1, 1, 1]])
    order = [2, 0, 1]
    assert refiner(img[order], cam[order], labels[order]).item() == pytest.approx(refiner(img, cam, labels).item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ classes, recipes, options


def test_published_recipes() -> None:
    expected = {
        "lambda_b": 2.4, "lambda_t": 0.02, "lambda_refine": 0.05, "eps": 0.1, "prompt_eps": 1e-4, "prompt_length": 30,
        "prompt_lr": 2.5e-2, "prompt_batch_size": 128, "epochs": 60, "weight_decay": 0.03,
    }  # fmt: skip
    assert {name: getattr(VOC, name) for name in expected} == expected
    assert COCO == VOC.replace(lambda_b=0.75, lambda_t=0.01, lambda_refine=0.2, prompt_lr=2.5e-3)


@pytest.mark.parametrize("config", [VOC, COCO, VOC.replace(lambda_b=9.0)])
def test_configuration_sets_the_numbers(config: RefinerConfig, aligned_clip: nn.Module) -> None:
    refiner = PromptRefiner(["boat"], aligned_clip, config)
    assert refiner.config == config
    assert refiner.prompts.context.shape == (1, 1, 30, 64)
    assert refiner.prompts.context.min() >= 0 and refiner.prompts.context.max() < 1


def test_arguments_override_the_configuration(aligned_clip: nn.Module) -> None:
    numbers = {"lambda_b": 0.0, "lambda_t": 1.0, "lambda_refine": 0.0, "eps": 0.5, "prompt_length": 3}
    refiner = PromptRefiner(["boat"], clip=aligned_clip, config=COCO, **numbers)
    assert refiner.config == COCO.replace(**numbers)
    assert refiner.prompts.context.shape == (1, 1, 3, 64)


def test_mapping_of_classes(make_refiner: Any, make_batch: Any) -> None:
    mapped, plain = make_refiner({"boat": "boat", "person": "player"}), make_refiner(["boat", "player"])
    assert mapped.classes == ["boat", "person"] and mapped.prompt_names == ["boat", "player"]
    assert torch.equal(mapped.text_features, plain.text_features)
    batch = make_batch(num_classes=2)
    assert mapped(*batch).item() == plain(*batch).item()
    assert mapped(*batch).item() != make_refiner(["boat", "person"])(*batch).item()


def test_one_class(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(["boat"])
    img, cam, labels = make_batch([[1], [0], [1]], num_classes=1)
    fit = refiner.fit_prompts([(img, labels)], lambda _: cam, epochs=3, lr=0.1, progress=False)
    assert fit.num_pairs == 2 and fit.losses[-1] < fit.losses[0]
    refiner(img, cam, labels).backward()
    assert cam.grad[0].abs().max() > 0 and cam.grad[1].abs().max() == 0
    assert refiner.refine_masks(img, cam, labels).masks.shape == (3, 1, 40, 40)


def test_three_hundred_classes(make_refiner: Any, make_batch: Any, padded_text: Any) -> None:
    names = [f"thing number {k}" for k in range(300)]
    refiner = make_refiner(names)
    assert refiner.text_features.shape == (300, 32)
    last = padded_text(refiner.encoder.model, "a photo of a thing number 299.")
    assert torch.allclose(refiner.text_features[299], last, rtol=1e-5, atol=1e-5)
    labels = torch.zeros(1, 300, dtype=torch.long)
    labels[0, [3, 299]] = 1
    img, cam, target = make_batch(labels.tolist(), num_classes=300)
    refiner.fit_prompts([(img, target)], lambda _: cam, epochs=1, progress=False)
    refiner(img, cam, target).backward()
    assert refiner.prompt_features().shape == (300, 1, 32)
    assert cam.grad[0].abs().amax((1, 2)).nonzero().flatten().tolist() == [3, 299]


def test_hand_written_texts_and_area_add_their_weight(make_refiner: Any, make_batch: Any) -> None:
    batch = make_batch()
    plain = make_refiner().compute(*batch)
    texts = ["a photo of water.", "a photo of railway."]
    out = make_refiner(background_texts=texts, lambda_background_texts=0.7, lambda_area=0.3).compute(*batch)
    extra = 0.7 * out.terms["background_texts"] + 0.3 * out.terms["area"]
    assert out.loss.item() == pytest.approx((plain.loss + extra).item(), rel=1e-6)
    assert out.terms["background_texts"] > 0.1 and 0 < out.terms["area"] < 1


def test_hand_written_texts_belong_to_their_class(make_refiner: Any, make_batch: Any) -> None:
    options: Dict[str, Any] = {"background_texts": {"boat": ["a photo of water."]}, "lambda_background_texts": 1.0}
    refiner = make_refiner(**options)
    assert refiner.compute(*make_batch([[0, 1, 1]])).terms["background_texts"].item() == 0
    assert refiner.compute(*make_batch([[1, 1, 1]])).terms["background_texts"].item() > 0


def test_threshold_silences_unlike_texts(make_refiner: Any, make_batch: Any) -> None:
    options: Dict[str, Any] = {"background_texts": ["a photo of water."], "lambda_background_texts": 1.0}
    loud, silent = make_refiner(**options), make_refiner(**options, background_threshold=0.99)
    assert loud.compute(*make_batch()).terms["background_texts"].item() > 0
    assert silent.compute(*make_batch()).terms["background_texts"].item() == 0


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("learned", [False, True])
def test_bfloat16_autocast_stays_close(learned: bool, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=learned)
    img, _, labels = make_batch()
    losses, grads = [], []
    for enabled in (False, True):
        host = Host()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            cam = host(img)
            assert cam.dtype == (torch.bfloat16 if enabled else torch.float32)
            out = refiner.compute(img, cam, labels)
        assert out.loss.dtype == torch.float32 and all(t.dtype == torch.float32 for t in out.terms.values())
        out.loss.backward()
        losses.append(out.loss.item())
        grads.append(torch.cat([g.flatten() for g in gradients(host).values()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert nn.functional.cosine_similarity(grads[0], grads[1], dim=0) > 0.9


def test_text_and_prompt_features_are_exact_under_autocast(make_refiner: Any) -> None:
    plain = make_refiner(learned=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = make_refiner()
        cast.load_state_dict(plain.state_dict())
        assert torch.equal(cast.text_features, plain.text_features)
        assert torch.equal(cast.prompt_features(), plain.prompt_features())


def test_reading_is_exact_under_autocast(make_refiner: Any) -> None:
    refiner = make_refiner(learned=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = refiner.nearest_words(["water", "sky"])
    for reading, expected in zip(cast, refiner.nearest_words(["water", "sky"])):
        assert reading.class_similarity == pytest.approx(expected.class_similarity, abs=1e-5)
        assert dict(reading.words) == pytest.approx(dict(expected.words), abs=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_cams_of_other_precision(dtype: torch.dtype, tolerance: float, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True, lambda_area=0.1)
    img, cam, labels = make_batch()
    expected = refiner(img, cam, labels)
    other = cam.detach().to(dtype).requires_grad_(True)
    loss = refiner(img, other, labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=tolerance)
    mine, reference = torch.autograd.grad(loss, other)[0], torch.autograd.grad(expected, cam)[0]
    assert mine.dtype == dtype
    assert nn.functional.cosine_similarity(mine.double().flatten(), reference.double().flatten(), dim=0) > 0.99
    assert refiner(img.to(dtype), cam, labels).item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize("change", ["half", "double", "bfloat16", "float"])
def test_changes_of_precision_pass_the_refiner_by(change: str, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    batch = make_batch()
    before = {name: value.clone() for name, value in (*refiner.state_dict().items(), *refiner.named_buffers())}
    loss = refiner(*batch).item()
    host = nn.ModuleDict({"body": nn.Conv2d(3, 3, 1), "refiner": refiner})
    getattr(host, change)()
    for name, value in (*refiner.state_dict().items(), *refiner.named_buffers()):
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert refiner.encoder.dtype == torch.float32
    assert refiner(*batch).item() == loss


def test_moving_to_a_device_and_type(make_refiner: Any) -> None:
    refiner = make_refiner().to("cpu", torch.float16)
    assert refiner.device == torch.device("cpu")
    assert refiner.prompts.context.dtype == refiner.text_features.dtype == torch.float32


def test_use_under_inference_mode_does_not_break_training(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    img, cam, labels = make_batch()
    with torch.inference_mode():
        refiner.refine_masks(img, cam, labels)
        inside = refiner(img, cam, labels).item()
    loss = refiner(img, cam, labels)
    loss.backward()
    assert loss.item() == inside and cam.grad.abs().max() > 0


def test_a_refiner_built_under_inference_mode_trains(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    expected = make_refiner(learned=True)(img, cam, labels)
    with torch.inference_mode():
        refiner = make_refiner()
        copy_of_inference = PromptRefiner(["boat"], clip=copy.deepcopy(refiner.encoder.model), image_stats=None)
    refiner.load_state_dict(make_refiner(learned=True).state_dict())
    with torch.inference_mode():
        refiner.prompt_features()  # cached here, used with gradients below
    loss = refiner(img, cam, labels)
    loss.backward()
    assert torch.equal(loss, expected) and cam.grad.abs().max() > 0
    copy_of_inference(img, cam[:, :1], labels[:, :1]).backward()


# ------------------------------------------------------------------------------------------------ stage (b)


def data_of(make_batch: Any, count: int = 3) -> Tuple[List[Tuple[Tensor, Tensor]], Host]:
    batches = [make_batch([[1, 0, 1], [0, 1, 0]] if seed % 2 else None, seed=seed) for seed in range(count)]
    return [(img, labels) for img, _, labels in batches], Host()


def test_fit_lowers_the_loss(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    data, host = data_of(make_batch)
    fit = refiner.fit_prompts(data, host, epochs=15, lr=0.1, progress=False)
    assert len(fit.losses) == 15 and fit.losses[-1] < fit.losses[0] - 0.1
    untrained = make_refiner().fit_prompts(data, host, epochs=1, lr=0.0, progress=False)
    assert fit.similarity > untrained.similarity + 0.1
    assert fit.num_pairs == untrained.num_pairs == sum(int(labels.sum()) for _, labels in data)


def test_repel_keeps_prompts_away_from_their_class(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    free, repelled = (
        make_refiner(lambda_t=weight).fit_prompts(data, host, epochs=15, lr=0.1, progress=False) for weight in (0.0, 3.0)
    )
    assert repelled.class_similarity < free.class_similarity - 0.05


def test_reported_similarities_are_those_of_the_result(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    data, host = data_of(make_batch)
    fit = refiner.fit_prompts(data, host, epochs=2, progress=False)
    own = [reading.class_similarity for reading in refiner.nearest_words(["water"])]
    assert fit.class_similarity == pytest.approx(sum(own) / 3, abs=1e-5)


def test_fit_starts_again_from_the_seed(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    refiner = make_refiner()
    first = refiner.fit_prompts(data, host, epochs=3, batch_size=2, progress=False)
    context = refiner.prompts.context.clone()
    torch.manual_seed(123)
    second = refiner.fit_prompts(data, host, epochs=3, batch_size=2, progress=False)
    assert second == first and torch.equal(refiner.prompts.context, context)
    other = make_refiner(seed=1).fit_prompts(data, host, epochs=3, batch_size=2, progress=False)
    assert other.losses != first.losses


def test_batch_size_counts_images(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    refiner = make_refiner()
    calls: List[int] = []
    refiner.encoder.model.ln_final.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    refiner.fit_prompts(data, host, epochs=2, batch_size=4, progress=False)  # 6 images: two steps per epoch
    assert len(calls) == 1 + 2 * 2 + 1 and all(1 <= n <= 3 for n in calls)


@pytest.mark.parametrize("action", ["build", "step", "fit", "fit in chunks", "refine"])
def test_global_random_state_is_left_alone(action: str, make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch, 2)
    batch = make_batch()
    refiner = make_refiner(max_views=3 if action == "fit in chunks" else None)
    state = torch.get_rng_state()
    if action == "build":
        make_refiner()
    elif action == "step":
        refiner(*batch).backward()
    elif action == "refine":
        refiner.refine_masks(*batch)
    else:
        refiner.fit_prompts(data, host, epochs=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_fit_under_no_grad(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    expected = make_refiner().fit_prompts(data, host, epochs=3, progress=False)
    refiner = make_refiner()
    with torch.no_grad():
        assert refiner.fit_prompts(data, host, epochs=3, progress=False) == expected
    assert not refiner.prompts.context.requires_grad and refiner.prompts.context.grad is None


@pytest.mark.parametrize("training", [False, True])
def test_fit_leaves_the_host_untouched(training: bool, make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    host.train(training)
    before = copy.deepcopy(host.state_dict())
    make_refiner().fit_prompts(data, host, epochs=2, progress=False)
    assert host.training is training and gradients(host) == {}
    assert all(p.requires_grad for p in host.parameters())
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


def test_fit_takes_longer_tuples_lists_and_generators(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    expected = make_refiner().fit_prompts(data, host, epochs=2, progress=False)
    longer = make_refiner().fit_prompts([[img, labels, "name"] for img, labels in data], host, epochs=2, progress=False)
    lazy = make_refiner().fit_prompts((pair for pair in data), host, epochs=2, progress=False)
    assert longer == lazy == expected


def test_fit_skips_batches_without_labels(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    img, _, labels = make_batch([[0, 0, 0]])
    expected = make_refiner().fit_prompts(data, host, epochs=2, progress=False)
    got = make_refiner().fit_prompts([data[0], (img, labels), *data[1:]], host, epochs=2, progress=False)
    assert got.losses == pytest.approx(expected.losses, rel=1e-6) and got.num_pairs == expected.num_pairs


def test_fit_with_a_background_channel(make_refiner: Any, make_batch: Any) -> None:
    data, host = data_of(make_batch)
    expected = make_refiner().fit_prompts(data, host, epochs=2, progress=False)
    refiner = make_refiner(background_channel=True)

    def with_background(img: Tensor) -> Tensor:
        cam = host(img)
        return torch.cat([torch.full_like(cam[:, :1], 9.0), cam], dim=1)

    assert refiner.fit_prompts(data, with_background, epochs=2, progress=False) == expected


def test_fit_without_any_positive_label(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    before = refiner.prompts.context.clone()
    img, cam, labels = make_batch([[0, 0, 0]])
    with pytest.raises(ValueError, match="fit_prompts needs at least one positive label; the loader gave none"):
        refiner.fit_prompts([(img, labels)], lambda _: cam, progress=False)
    with pytest.raises(ValueError, match="fit_prompts needs at least one positive label; the loader gave none"):
        refiner.fit_prompts([], lambda _: cam, progress=False)
    assert refiner.stage == "refine" and torch.equal(refiner.prompts.context, before)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"lr": -1.0}])
def test_failed_fit_keeps_the_prompts(options: Dict[str, Any], make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    before = refiner.prompts.context.clone()
    img, cam, labels = make_batch()
    try:
        refiner.fit_prompts([(img, labels)], lambda _: cam, progress=False, **options)
    except (ValueError, ZeroDivisionError):
        pass
    assert refiner.stage == "refine" and torch.equal(refiner.prompts.context, before)


def test_fit_with_another_kind_of_loader(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    for batch in (img, (img,), {"img": img}, iter([img, labels])):
        with pytest.raises(TypeError, match=r"`loader` must yield \(img, labels\), .*; got (dict|Tensor|tuple|list_iterator)"):
            make_refiner().fit_prompts([batch], lambda _: cam, progress=False)
    with pytest.raises(TypeError, match=r"labels \(B, 3\), at any place of a batch; got list, tensor \(2, 3, 40, 40\), str"):
        make_refiner().fit_prompts([(["a", "b"], img, "c")], lambda _: cam, progress=False)


@pytest.mark.parametrize("form", ["name first", "crops behind", "mapping", "boxes between"])
def test_fit_with_the_batches_of_other_projects(form: str, make_refiner: Any, make_batch: Any) -> None:
    """DuPL, SeCo, MoRe and PPC yield (name, img, label, ...); Hugging Face and Lightning code yields mappings."""
    img, cam, labels = make_batch()
    batch = {
        "name first": [["2007_000032", "2007_000033"], img, labels],
        "crops behind": (("a", "b"), img, labels, torch.rand(2, 3, 16, 16), torch.zeros(2, 4)),
        "mapping": {"id": torch.tensor([1, 2]), "image": img, "label": labels},
        "boxes between": [img, torch.zeros(2, 4), labels],
    }[form]
    expected, refiner = make_refiner(), make_refiner()
    expected.fit_prompts([(img, labels)], lambda _: cam, epochs=2, progress=False)
    refiner.fit_prompts([batch], lambda _: cam, epochs=2, progress=False)
    assert torch.equal(refiner.prompts.context, expected.prompts.context)


def test_progress_bar_goes_to_stderr(make_refiner: Any, make_batch: Any, capsys: pytest.CaptureFixture) -> None:
    data, host = data_of(make_batch)
    make_refiner().fit_prompts(data, host, epochs=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "learning prompts" in shown.err and "2/2" in shown.err
    make_refiner().fit_prompts(data, host, epochs=2, progress=False)
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ copies and checkpoints


def test_the_same_numbers_twice(make_refiner: Any, make_batch: Any) -> None:
    batch = make_batch()
    values = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        refiner = make_refiner(learned=True)
        loss = refiner(*batch)
        values.append((loss.item(), torch.autograd.grad(loss, batch[1])[0], refiner.prompts.context.clone()))
    assert values[0][0] == values[1][0]
    assert torch.equal(values[0][1], values[1][1]) and torch.equal(values[0][2], values[1][2])


def test_state_dict_restores_the_stage(make_refiner: Any, make_batch: Any, tmp_path: Path) -> None:
    learned, fresh = make_refiner(learned=True), make_refiner(seed=4)
    torch.save(learned.state_dict(), tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").stat().st_size < 10_000  # no CLIP weights
    fresh.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    assert fresh.stage == "refine"
    batch = make_batch()
    assert fresh(*batch).item() == learned(*batch).item()
    learned.load_state_dict(make_refiner().state_dict())
    assert learned.stage == "match"


def test_deep_copy_is_independent(make_refiner: Any, make_batch: Any) -> None:
    first = make_refiner(learned=True)
    batch = make_batch()
    expected = first(*batch).item()
    second = copy.deepcopy(first)
    assert second(*batch).item() == expected
    img, cam, labels = batch
    second.fit_prompts([(img, labels)], lambda _: cam, epochs=3, lr=0.5, progress=False)
    assert first(*batch).item() == expected and second(*batch).item() != expected
    assert not any(p.requires_grad for p in second.encoder.model.parameters())


def test_two_refiners_share_an_encoder(make_refiner: Any, make_batch: Any) -> None:
    first = make_refiner()
    second = make_refiner(clip=first.encoder)
    assert second.encoder is first.encoder
    assert second(*make_batch()).item() == first(*make_batch()).item()


# ------------------------------------------------------------------------------------------------ several processes


def test_two_processes(tmp_path: Path) -> None:
    root = str(Path(semples_plugin.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    worker = str(Path(__file__).with_name("ddp_worker.py"))
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    a, b = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(loss > 0 for loss in a["losses"]) and b["losses"] == [0.0] * 4  # rank 1 has no positive label
    assert all(torch.equal(a["host"][name], b["host"][name]) for name in a["host"])
    assert any(not torch.equal(a["host"][name], a["start"][name]) for name in a["host"])
    assert torch.equal(a["context"], b["context"]) and a["stage"] == b["stage"] == "refine"
    assert a["num_pairs"] == b["num_pairs"] == 3
    assert torch.equal(a["second_context"], b["second_context"])
    assert a["second_num_pairs"] == b["second_num_pairs"] == 4
    assert not torch.equal(a["context"], a["second_context"])


def test_a_refiner_is_not_pickled_whole(make_refiner: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="its weights would go into your file. Save refiner.state_dict"):
        torch.save(make_refiner(), tmp_path / "refiner.pt")


def test_a_replica_of_data_parallel_is_refused(make_refiner: Any, make_batch: Any) -> None:
    replica = make_refiner()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="cannot run inside torch.nn.DataParallel"):
        replica(*make_batch())


def test_diverged_prompts_do_not_pass_for_learned(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    before = refiner.prompts.context.clone()
    img, cam, labels = make_batch()
    with pytest.raises(FloatingPointError, match="The prompts diverged .* smaller `lr`"):
        refiner.fit_prompts([(img, labels)], lambda _: cam.detach(), epochs=3, lr=1e30, progress=False)
    assert torch.equal(refiner.prompts.context, before) and refiner.stage == "refine"


# ------------------------------------------------------------------------------------------------ views that masks are cut for


def test_every_step_cuts_the_masks_at_other_levels_and_a_new_refiner_at_the_same(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    runs = []
    for _ in range(2):
        refiner = make_refiner(view_sharpness=8.0)
        runs.append([refiner.compute(img, cam, labels).loss.item() for _ in range(3)])
    assert runs[0] == runs[1] and len(set(runs[0])) == 3
    plain = make_refiner()
    assert plain.compute(img, cam, labels).loss.item() == plain.compute(img, cam, labels).loss.item()


def test_the_masks_that_are_returned_are_not_cut(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    cut, plain = (make_refiner(view_sharpness=sharpness, lambda_area=1.0).compute(img, cam, labels) for sharpness in (8.0, 0.0))
    assert torch.equal(cut.masks, plain.masks) and torch.equal(cut.terms["area"], plain.terms["area"])
    assert cut.terms["match_foreground"] != plain.terms["match_foreground"]


@pytest.mark.parametrize("options", [{"view_sharpness": 8.0}, {"view_fill": "blur"}, {"match_form": "linear"}])
def test_every_form_of_the_views_trains_the_host(options: Any, make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    cam = cam.detach().requires_grad_(True)
    make_refiner(learned=True, **options)(img, cam, labels).backward()
    assert cam.grad is not None and cam.grad.isfinite().all() and cam.grad[labels.bool()].abs().amax() > 0


def test_the_linear_form_is_one_minus_the_cosine_and_the_positive_cosine(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    refiner = make_refiner(match_form="linear", lambda_b=4.0)
    out = refiner.compute(img, cam, labels)
    views = refiner._views(*refiner._check(img, cam, labels)[:2], out.pairs, refiner.config.eps)[1]
    v_f, v_b = (refiner.encoder.encode_image(view) for view in views)
    u_f = refiner.text_features[out.pairs[:, 1]]
    foreground, background = (torch.nn.functional.cosine_similarity(v, u_f) for v in (v_f, v_b))
    assert torch.allclose(out.terms["match_foreground"], (1 - foreground).mean(), atol=1e-6)
    assert torch.allclose(out.terms["match_background"], background.clamp(min=0).mean(), atol=1e-6)
    assert torch.allclose(out.loss, (1 - foreground).mean() + 4 * background.clamp(min=0).mean(), atol=1e-5)
