"""What is encoded, how often, and at which length: counted from outside through forward hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, List, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import load_clip


class Counts(NamedTuple):
    image_batches: List[int]  # views of every call of the image tower
    text_batches: List[int]  # texts of every call of the text tower
    text_lengths: List[int]  # tokens that every part of every text block sees

    @property
    def images(self) -> int:
        return sum(self.image_batches)


@contextmanager
def counting(model: nn.Module) -> Iterator[Counts]:
    counts = Counts([], [], [])
    parts = [part for block in model.transformer.resblocks for part in (block.ln_1, block.attn, block.ln_2, block.mlp)]
    handles = [
        model.visual.register_forward_pre_hook(lambda module, args: counts.image_batches.append(len(args[0]))),
        model.ln_final.register_forward_pre_hook(lambda module, args: counts.text_batches.append(len(args[0]))),
        *(part.register_forward_pre_hook(lambda m, args: counts.text_lengths.append(len(args[0]))) for part in parts),
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("labels", [[[1, 0, 1], [1, 1, 1]], [[0, 1, 0]], [[1, 1, 1], [0, 0, 0], [0, 0, 1]]])
def test_match_step_encodes_two_images_per_pair_and_no_text(
    labels: List[List[int]], make_refiner: Any, make_batch: Any
) -> None:
    refiner = make_refiner()
    batch = make_batch(labels)
    with counting(refiner.encoder.model) as counts:
        refiner(*batch).backward()
    assert counts.images == 2 * sum(map(sum, labels))
    assert counts.text_batches == []


def test_refine_step_encodes_two_images_per_pair_and_no_text(make_refiner: Any, make_batch: Any) -> None:
    water = ["a photo of water."]
    refiner = make_refiner(learned=True, background_texts=water, lambda_background_texts=0.1, lambda_area=0.1)
    batch = make_batch()
    refiner(*batch)  # encodes the prompts, once
    with counting(refiner.encoder.model) as counts:
        for _ in range(3):
            refiner(*batch).backward()
    assert counts.image_batches == [8, 8, 8]  # 4 pairs
    assert counts.text_batches == []


def test_prompts_are_encoded_once_after_learning(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    with counting(refiner.encoder.model) as counts:
        for seed in range(3):
            refiner(*make_batch(seed=seed))
    assert counts.text_batches == [3]


def test_step_without_positive_label_encodes_nothing(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    with counting(refiner.encoder.model) as counts:
        assert refiner(*make_batch([[0, 0, 0]])).item() == 0
    assert counts == ([], [], [])


@pytest.mark.parametrize("epochs", [1, 7])
def test_fit_prompts_encodes_one_image_per_pair_in_all(epochs: int, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(prompt_restarts=0)
    data = [make_batch(seed=seed) for seed in range(3)]
    cams = iter([cam for _, cam, _ in data])
    with counting(refiner.encoder.model) as counts:
        fit = refiner.fit_prompts([(i, y) for i, _, y in data], lambda _: next(cams), epochs=epochs, progress=False)
    assert counts.images == 12 == fit.num_pairs
    assert counts.text_batches == [1] + [3] * (
        epochs + 1
    )  # the empty prompt; each class once per step, and once for the report
    with counting(refiner.encoder.model) as counts:
        refiner.prompt_features(), refiner.nearest_words(["water"])
    assert counts.images == 0


def test_each_pass_encodes_every_pair_once(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch()
    with counting(refiner.encoder.model) as counts:
        fit = refiner.fit_prompts([(img, labels)], lambda _: cam, epochs=2, passes=3, progress=False)
    assert counts.images == 12 == fit.num_pairs


def test_refined_masks_encode_two_views_per_pair_and_step(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    img, cam, labels = make_batch()
    with counting(refiner.encoder.model) as counts:
        refiner.refine_masks(img, cam, labels, align=None, clip_steps=0)
        assert counts.images == 0
        refiner.refine_masks(img, cam, labels, align=None, clip_steps=0, suppress=True)
        assert counts.images == len(img)
        refiner.refine_masks(img, cam, labels, align=None, clip_steps=3)
    assert counts.images == len(img) + 2 * int(labels.sum()) * 3


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("length", [1, 4, 30, 71])
def test_prompt_is_encoded_at_its_own_length(length: int, aligned_clip: nn.Module, padded_prompt: Callable) -> None:
    encoder = load_clip(aligned_clip)
    context = torch.rand(3, length, 64, generator=torch.Generator().manual_seed(length))
    with counting(encoder.model) as counts, torch.no_grad():
        got = encoder.encode_prompt(context, "a photo of {} .")
    assert set(counts.text_lengths) == {length + 6}
    expected = torch.stack([padded_prompt(aligned_clip, c) for c in context])
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_gradient_to_prompt_equals_full_length_path(aligned_clip: nn.Module, padded_prompt: Callable) -> None:
    context = torch.rand(1, 4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    weights = torch.randn(32, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad((load_clip(aligned_clip).encode_prompt(context, "a photo of {} .") @ weights).sum(), context)[0]
    expected = torch.autograd.grad(padded_prompt(aligned_clip, context[0]) @ weights, context)[0]
    assert expected.abs().max() > 1e-4
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_texts_of_mixed_length_equal_full_length_path(aligned_clip: nn.Module, padded_text: Callable) -> None:
    texts = ["boat", "a photo of a train.", "a large photo of the small bird, on a branch near the water", "x " * 75]
    encoder = load_clip(aligned_clip)
    with counting(encoder.model) as counts:
        got = encoder.encode_text(texts)
        alone = encoder.encode_text(texts[:1])
    assert set(counts.text_lengths) == {77, 3}
    expected = torch.stack([padded_text(aligned_clip, text) for text in texts])
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(alone, expected[:1], rtol=1e-5, atol=1e-5)


def test_text_features_of_classes_equal_encode_text(make_refiner: Any, aligned_clip: nn.Module, padded_text: Callable) -> None:
    refiner = make_refiner({"boat": "boat", "person": "player"})
    expected = torch.stack([padded_text(aligned_clip, f"a photo of a {name}.") for name in ("boat", "player")])
    assert torch.allclose(refiner.text_features, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("max_views", [1, 2, 3])
def test_chunks_change_neither_value_nor_gradient(max_views: int, make_refiner: Any, make_batch: Any) -> None:
    whole, chunked = make_refiner(max_views=None, learned=True), make_refiner(max_views=max_views, learned=True)
    assert torch.allclose(whole.prompts.context, chunked.prompts.context, atol=1e-4)
    chunked.load_state_dict(whole.state_dict())
    img, cam, labels = make_batch()
    expected = whole(img, cam, labels)
    with counting(chunked.encoder.model) as counts:
        got = chunked(img, cam, labels)
        assert max(counts.image_batches) == max_views and counts.images == 8
        gradient = torch.autograd.grad(got, cam)[0]
    assert counts.images == 16 and max(counts.image_batches) == max_views  # each chunk once more, backwards
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    reference = torch.autograd.grad(expected, cam)[0]
    assert reference.abs().max() > 1e-4
    assert (gradient - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_chunks_without_gradient_are_not_recomputed(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(max_views=3)
    with counting(refiner.encoder.model) as counts, torch.no_grad():
        refiner(*make_batch())
    assert counts.image_batches == [3, 3, 2]


# ------------------------------------------------------------------------------------------------ CLIP stays frozen


def test_clip_takes_no_gradient_and_is_not_registered(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=True)
    refiner(*make_batch()).backward()
    clip = list(refiner.encoder.model.parameters())
    assert clip and all(p.grad is None and not p.requires_grad for p in clip)
    assert not {id(p) for p in clip} & {id(p) for p in refiner.parameters()}
    assert sorted(refiner.state_dict()) == ["prompts.alive", "prompts.context", "prompts.learned"]
    assert [name for name, _ in refiner.named_parameters()] == ["prompts.context"]
    assert not any(p.requires_grad for p in refiner.parameters())


def test_learning_changes_no_clip_weight(make_refiner: Any, aligned_clip: nn.Module) -> None:
    refiner = make_refiner(learned=True)
    for name, value in refiner.encoder.model.state_dict().items():
        assert torch.equal(value, aligned_clip.state_dict()[name]), name


def test_training_mode_does_not_reach_clip(make_refiner: Any) -> None:
    refiner = make_refiner()
    host = nn.Sequential(nn.Conv2d(3, 3, 1), refiner)
    for module in (refiner, host):
        module.train()
        assert refiner.training and not any(m.training for m in refiner.encoder.model.modules())


def test_resnet_statistics_stay_frozen(tiny_resnet_clip: nn.Module, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(clip=tiny_resnet_clip).train()
    before = copy.deepcopy(refiner.encoder.model.visual.bn1.state_dict())
    refiner(*make_batch()).backward()
    for name, value in refiner.encoder.model.visual.bn1.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_users_clip_is_left_untouched(tiny_clip: nn.Module, make_batch: Any) -> None:
    model = copy.deepcopy(tiny_clip).half().train()
    model.visual.proj.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model.state_dict())
    refiner = PromptRefiner(["boat", "train", "bird"], clip=model, image_stats=None, prompt_length=4)
    refiner(*make_batch()).backward()
    assert refiner.encoder.model is not model and refiner.encoder.dtype == torch.float32
    assert [p.requires_grad for p in model.parameters()] == flags and len(set(flags)) == 2
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


def test_features_are_those_of_encode_image(aligned_clip: nn.Module) -> None:
    views: Tensor = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got = load_clip(aligned_clip).encode_image(views)
    expected = aligned_clip.encode_image(views)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert F.cosine_similarity(got[0], got[1], dim=0) < 0.9999  # images differ, so the comparison says something
