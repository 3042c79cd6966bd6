"""The background threshold without masks: the agreement against a literal loop, and that it finds a planted object."""

from __future__ import annotations

from typing import Any, List

import pytest
import torch
import torch.nn.functional as F

from semples_plugin import PromptRefiner
from semples_plugin.choices import AREA, THRESHOLDS, choose_threshold
from semples_plugin.regions import change_stats, resize_image

OPTIONS = {"align": None, "clip_steps": 0, "progress": False}


def literal(refiner: PromptRefiner, img: Any, masks: Any, labels: Any, threshold: float) -> List[List[float]]:
    """cos of the kept and of the removed region, and the area, of every pair; the masks are at CLIP's size."""
    encoder, rows = refiner.encoder, []
    images = change_stats(resize_image(img, encoder.image_size), None, (encoder.mean, encoder.std))
    for b, k in labels.nonzero().tolist():
        scores = torch.cat([torch.full_like(masks[b, :1], threshold), masks[b]])
        hard = (scores.argmax(0) == k + 1).float()
        cosines = []
        for mask in (hard, 1 - hard):
            feature = encoder.encode_image((mask * images[b])[None])[0]
            cosines.append(float(F.cosine_similarity(feature, refiner.text_features[k], dim=0)))
        rows.append([*cosines, float(hard.mean())])
    return rows


def test_the_agreement_is_the_mean_over_pairs(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch(size=refiner.encoder.image_size)
    masks = refiner.refine_masks(img, cam, labels, align=None, clip_steps=0).masks
    choice = choose_threshold(refiner, [(img, labels)], lambda _: cam.detach(), thresholds=[0.3, 0.6], **OPTIONS)
    assert choice.num_pairs == int(labels.sum()) and choice.thresholds == [0.3, 0.6]
    for i, threshold in enumerate([0.3, 0.6]):
        rows = torch.tensor(literal(refiner, img, masks, labels, threshold)).mean(0)
        assert [choice.kept[i], choice.removed[i], choice.areas[i]] == pytest.approx(rows.tolist(), abs=1e-5)
        assert choice.agreements[i] == pytest.approx(float(rows[0] - rows[1] - AREA * rows[2]), abs=1e-5)
    best = int(choice.agreements[1] > choice.agreements[0])
    assert choice.threshold == [0.3, 0.6][best] and choice.agreement == choice.agreements[best]
    assert str(choice).splitlines()[1 + best].endswith("<-")


def test_batches_and_a_limit(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch()
    cams = iter([cam[:1].detach(), cam[1:].detach()] * 2)
    whole = choose_threshold(refiner, [(img, labels)], lambda _: cam.detach(), **OPTIONS)
    loader = [(img[:1], labels[:1]), (img[1:], labels[1:])]
    parts = choose_threshold(refiner, loader, lambda _: next(cams), **OPTIONS)
    assert parts.agreements == pytest.approx(whole.agreements, abs=1e-6) and parts.thresholds == list(THRESHOLDS)
    first = choose_threshold(refiner, loader, lambda _: next(cams), max_images=1, **OPTIONS)
    assert first.num_pairs == int(labels[0].sum())


def test_nothing_is_trained_and_nothing_changes(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(online_steps=3)
    img, cam, labels = make_batch()
    before = {name: value.clone() for name, value in refiner.state_dict().items() if isinstance(value, torch.Tensor)}
    choose_threshold(refiner, [(img, labels)], lambda _: cam, clip_steps=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items() if name in before)
    assert cam.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": []}, "`thresholds` must hold at least one value"),
        ({"thresholds": [1.5]}, "thresholds.* must be from 0 to 1"),
        ({"area": -1}, "area.* must be"),
    ],
)
def test_wrong_arguments(options: Any, message: str, make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    with pytest.raises(ValueError, match=message):
        choose_threshold(make_refiner(), [(img, labels)], lambda _: cam, **options)


def test_data_without_labels(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    with pytest.raises(ValueError, match="choose_threshold needs at least one positive label"):
        choose_threshold(make_refiner(), [(img, 0 * labels)], lambda _: cam, **OPTIONS)
