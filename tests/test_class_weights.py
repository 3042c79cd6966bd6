from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from semples_plugin import VOC, PromptRefiner
from semples_plugin.config import parse_assignments

ALL_TERMS = {"lambda_area": 0.5, "background_texts": ["water"], "lambda_background_texts": 1.0, "learned": True}
LABELS = [[1, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_a_term_is_the_weighted_mean_over_its_pairs(make_refiner: Any, make_batch: Any) -> None:
    batch = make_batch(LABELS)
    refiner = make_refiner(**ALL_TERMS, class_weights={"train": 0.5, "bird": 3})
    out = refiner.compute(*batch)
    weights = [{0: 1.0, 1: 0.5, 2: 3.0}[k] for k in out.pairs[:, 1].tolist()]
    alone = []
    for i, k in out.pairs.tolist():  # every pair by itself
        labels = torch.zeros(1, 3, dtype=torch.long)
        labels[0, k] = 1
        alone.append(make_refiner(**ALL_TERMS).compute(batch[0][i : i + 1], batch[1][i : i + 1], labels).terms)
    assert len(out.terms) == 5
    for name, value in out.terms.items():
        expected = sum(w * terms[name] for w, terms in zip(weights, alone)) / sum(weights)
        assert torch.allclose(value, expected, atol=1e-6), name


def test_weight_0_is_the_same_as_leaving_the_pairs_out(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch(LABELS)
    weighted = make_refiner(**ALL_TERMS, class_weights={"train": 0})
    loss = weighted(img, cam, labels)
    (gradient,) = torch.autograd.grad(loss, cam)
    fewer = labels.clone()
    fewer[:, 1] = 0
    other = make_refiner(**ALL_TERMS)(img, cam, fewer)
    (expected,) = torch.autograd.grad(other, cam)
    assert torch.allclose(loss, other, atol=1e-6) and torch.allclose(gradient, expected, atol=1e-7)
    assert not gradient[:, 1].any() and gradient[:, 0].any() and gradient[:, 2].any()
    assert len(weighted.compute(img, cam, labels).pairs) == 5  # its masks are still given


@pytest.mark.parametrize("labels", [LABELS, [[0, 0, 0]]])
def test_weights_of_0_only_give_a_zero_that_is_attached(labels: Any, make_refiner: Any, make_batch: Any) -> None:
    img, cam, target = make_batch(labels)
    loss = make_refiner(**ALL_TERMS, class_weights=dict.fromkeys(["boat", "train", "bird"], 0))(img, cam, target)
    loss.backward()
    assert loss.item() == 0 and cam.grad is not None and not cam.grad.any()


def test_without_class_weights_the_bits_stay_the_same(make_refiner: Any, make_batch: Any) -> None:
    batch = make_batch(LABELS)
    out = make_refiner(**ALL_TERMS).compute(*batch)
    refiner = make_refiner(**ALL_TERMS)
    masks, views = refiner._views(*batch[:2], out.pairs, refiner.config.eps)
    features = refiner.encoder.encode_image(torch.cat(views))
    values, weights = refiner._pair_terms(features, masks, out.pairs, refiner._learned(out.pairs), refiner.config)
    assert all(torch.equal(out.terms[name], value.mean()) for name, value in values.items())
    assert torch.equal(out.loss, torch.stack([weights[name] * value.mean() for name, value in values.items()]).sum())


def test_optimize_cam_leaves_a_class_of_weight_0_as_it_is(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch(LABELS)
    start = make_refiner().optimize_cam(img, cam, labels, steps=1, lr=0)
    found = make_refiner(class_weights={"train": 0}).optimize_cam(img, cam, labels, steps=3)
    free = make_refiner().optimize_cam(img, cam, labels, steps=3)
    assert torch.equal(found[:, 1], start[:, 1])
    # Adam's epsilon makes steps depend a little on the scale of the loss, which the weighted mean changes.
    assert torch.allclose(found[:, [0, 2]], free[:, [0, 2]], atol=1e-3) and not torch.equal(found, start)


def test_class_weights_are_saved_with_the_prompts(make_refiner: Any, aligned_clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    make_refiner(learned=True, class_weights={"train": 0, "bird": 0.25}).save(path)
    assert PromptRefiner.load(path, clip=aligned_clip).config.class_weights == {"train": 0, "bird": 0.25}
    assert PromptRefiner.load(path, clip=aligned_clip, class_weights=None).config.class_weights is None


def test_class_weights_on_the_command_line() -> None:
    options = parse_assignments("--set", ["class_weights={'train': 0, 'bird': 0.5}"])
    assert VOC.replace(**options).class_weights == {"train": 0, "bird": 0.5}


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"ship": 1}, ValueError, "`class_weights` must name known classes; got 'ship'"),
        ({"boat": -1}, ValueError, "`class_weights\\['boat'\\]` must be at least 0 and finite; got -1"),
        ({"boat": "1"}, TypeError, "`class_weights\\['boat'\\]` must be a number; got '1'"),
        ([1, 0, 1], TypeError, "`class_weights` must be a mapping class name -> weight; got \\[1, 0, 1\\] of type list"),
    ],
)
def test_wrong_class_weights_are_refused(given: Any, error: Any, message: str, make_refiner: Any) -> None:
    with pytest.raises(error, match=message):
        make_refiner(class_weights=given)
