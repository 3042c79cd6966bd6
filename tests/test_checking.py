from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples.demo.host import make_split
from examples.demo.world import THINGS
from examples.recipe import COMPACT_CLIP
from semples_plugin import PromptRefiner, checking
from semples_plugin.check_report import VARIANTS
from semples_plugin.checking import AREA_RIVALS

CLIP_FILE = Path(__file__).parents[1] / "examples" / "demo" / "world_clip.pt"
LABELS = [[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]]


def batches(make_batch: Any, size: int = 2) -> Tuple[List[Tuple[Tensor, Tensor]], Tensor]:
    """(img, labels) batches and all CAMs."""
    img, cam, labels = make_batch(LABELS)
    return list(zip(img.split(size), labels.split(size))), cam.detach()


def check(refiner: Any, make_batch: Any, size: int = 2, **options: Any) -> Any:
    loader, cam = batches(make_batch, size)
    cams = iter(cam.split(size))
    return refiner.check(loader, lambda _: next(cams), progress=False, **options)


# ---------------------------------------------------------------------------------------------------- figures

scores = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5001, 1.0]), max_size=12)


@given(scores, scores)
def test_auc_is_that_of_a_double_loop(higher: List[float], lower: List[float]) -> None:
    found = checking.auc(torch.tensor(higher), torch.tensor(lower))
    if not higher or not lower:
        assert found is None
        return
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in higher for b in lower)
    assert found == pytest.approx(wins / len(higher) / len(lower))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.4, 0.9]), st.booleans()), max_size=12))
def test_average_precision_is_that_of_a_loop_over_thresholds(items: List[Tuple[float, bool]]) -> None:
    values, positive = (torch.tensor([item[i] for item in items]) for i in (0, 1))
    found = checking.average_precision(values, positive.bool())
    count = sum(own for _, own in items)
    if not count:
        assert found is None
        return
    expected, recall = 0.0, 0.0
    for threshold in sorted({value for value, _ in items}, reverse=True):
        above = [own for value, own in items if value >= threshold]
        expected += (sum(above) / count - recall) * sum(above) / len(above)
        recall = sum(above) / count
    assert found == pytest.approx(expected)


def test_average_precision_of_a_perfect_ranking_is_1_and_of_equal_scores_is_chance() -> None:
    positive = torch.tensor([True, False, True, False, False])
    assert checking.average_precision(positive.float(), positive) == 1
    assert checking.average_precision(torch.ones(5), positive) == pytest.approx(2 / 5)


Pairs = Tuple[Dict[str, Tensor], Dict[str, Tensor]]


def random_pairs(seed: int, count: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    values = {name: 3 * torch.rand(count, generator=generator, dtype=torch.float64) for name in ("cam", *AREA_RIVALS)}
    areas = {"ones": torch.ones(count), "half": torch.full((count,), 0.5), "empty": torch.zeros(count)}
    return values, {"cam": 0.1 + 0.8 * torch.rand(count, generator=generator), **areas}


def holding(weight: float, values: Dict[str, Tensor], areas: Dict[str, Tensor]) -> float:
    """Share of pairs in which the CAM's loss is not above any rival's."""
    total = {name: value + weight * areas[name].double() for name, value in values.items()}
    return float(torch.stack([total["cam"] <= total[name] + 1e-12 for name in AREA_RIVALS]).all(0).double().mean())


@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_the_area_weight_is_the_smallest_that_lets_the_cam_win(seed: int, count: int, share: float) -> None:
    values, areas = random_pairs(seed, count)
    found = checking.area_weight(values, areas, share)
    others = [holding(i / 1000, values, areas) for i in range(0, 30_001, 31)]  # a grid, for comparison
    if found is None:
        assert max(others) < 0.5 + 1e-9
        return
    weight, reached = found
    assert holding(weight, values, areas) == pytest.approx(reached) and reached >= min(share, 0.5)
    assert reached >= min(share, max(others)) - 1e-9
    smaller = [one for i, one in enumerate(others) if i * 31 / 1000 < weight - 1e-3]
    assert all(one < min(share, reached) + 1e-9 for one in smaller)


def test_the_area_weight_is_0_where_the_cam_wins_anyway_and_none_without_pairs() -> None:
    values, areas = random_pairs(0, 4)
    values["cam"] = torch.full((4,), -5.0, dtype=torch.float64)
    assert checking.area_weight(values, areas) == (0.0, 1.0)
    assert checking.area_weight({name: v[:0] for name, v in values.items()}, {name: v[:0] for name, v in areas.items()}) is None
    values["cam"] = torch.full((4,), 100.0, dtype=torch.float64)
    areas["cam"] = torch.ones(4)  # as large as ones and worse: no weight helps
    assert checking.area_weight(values, areas) is None


def test_variants_are_what_their_names_say() -> None:
    masks = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    shifts = checking.random_shifts(3, (32, 32), torch.Generator().manual_seed(1))
    found = checking.variants_of(masks, shifts)
    assert tuple(found) == VARIANTS and all(mask.shape == masks.shape for mask in found.values())
    assert bool(((shifts >= 8) & (shifts < 24)).all())
    assert torch.allclose(found["shifted"].mean((1, 2)), masks.mean((1, 2))) and not torch.equal(found["shifted"], masks)
    assert bool((found["eroded"] <= masks).all()) and bool((masks <= found["dilated"]).all())
    assert found["dilated"][0, 10, 10] == masks[0, 8:13, 8:13].max()
    assert found["eroded"][0, 10, 10] == pytest.approx(float(masks[0, 8:13, 8:13].min()))
    assert torch.equal(found["sharpened"][1], (masks[1] > (masks[1].min() + masks[1].max()) / 2).float())
    assert all(mask.shape == (0, 32, 32) for mask in checking.variants_of(masks[:0], shifts[:0]).values())


# ---------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize("learned", [False, True])
def test_figures_are_those_of_the_refiners_own_loss(learned: bool, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(learned=learned, lambda_area=0.5)
    report = check(refiner, make_batch)
    img, cam, labels = make_batch(LABELS)
    out = refiner.compute(img, cam, labels)
    assert [(pair.image, pair.label) for pair in report.pairs] == [tuple(pair) for pair in out.pairs.tolist()]
    assert sum(pair.losses["cam"] for pair in report.pairs) / 6 == pytest.approx(out.loss.item(), abs=1e-5)
    flat = refiner.compute(img, torch.zeros_like(cam), labels)  # a flat CAM becomes an empty mask
    assert sum(pair.losses["empty"] for pair in report.pairs) / 6 == pytest.approx(flat.loss.item(), abs=1e-5)
    assert [figures.images for figures in report.classes] == [2, 2, 2] and report.num_images == 5
    assert report.stage == ("refine" if learned else "match")
    for k, figures in enumerate(report.classes):
        own = [pair for pair in report.pairs if pair.label == k]
        assert figures.chance == pytest.approx(0.4)
        for name in ("cos_kept", "cos_removed", "cos_shifted", "area"):
            assert getattr(figures, name) == pytest.approx(sum(getattr(pair, name) for pair in own) / 2, abs=1e-6)
        assert figures.wins["ones"] == sum(pair.losses["cam"] < pair.losses["ones"] for pair in own) / 2
        assert figures.losses["inverse"] == pytest.approx(sum(pair.losses["inverse"] for pair in own) / 2)
        assert (figures.cos_prompt is not None) == (figures.prompt_alive is not None) == learned


def test_cosines_are_those_of_the_views(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(clip_stats=False)
    pair = check(refiner, make_batch).pairs[0]
    img, cam, labels = make_batch(LABELS)
    mask = refiner.compute(img, cam, labels).masks[0].detach()
    small = torch.nn.functional.interpolate(img[:1], size=(32, 32), mode="bilinear", antialias=True)
    features = refiner.encoder.encode_image(torch.cat([mask * small, (1 - mask) * small]))
    found = torch.nn.functional.cosine_similarity(features, refiner.text_features[:1])
    assert found.tolist() == pytest.approx([pair.cos_kept, pair.cos_removed], abs=1e-5)


def test_batches_do_not_matter_and_two_checks_are_alike(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(lambda_area=0.5)
    state = {name: value.clone() for name, value in refiner.state_dict().items()}
    first, again, other = check(refiner, make_batch), check(refiner, make_batch), check(refiner, make_batch, size=5)
    assert first.as_dict() == again.as_dict()
    for a, b in zip(first.pairs, other.pairs):
        assert a.losses == pytest.approx(b.losses, abs=1e-5) and a.cos_shifted == pytest.approx(b.cos_shifted, abs=1e-5)
    assert all(torch.equal(value, refiner.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("count", [1, 2, 3, 99])
def test_max_images_counts_images(count: int, make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    few, every = check(refiner, make_batch, max_images=count), check(refiner, make_batch)
    assert few.num_images == min(count, 5)
    assert [pair[:2] for pair in few.pairs] == [pair[:2] for pair in every.pairs if pair.image < count]


def test_data_without_labels_give_a_report_that_can_tell_nothing(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch([[0, 0, 0]] * 2)
    report = make_refiner().check([(img, labels)], lambda _: cam, progress=False)
    assert report.pairs == [] and report.lambda_area is None and report.options() == {"class_weights": None}
    assert [figures.verdict for figures in report.classes] == ["cannot tell"] * 3
    assert "classes to leave out: none" in str(report)


@pytest.mark.parametrize("max_images, error", [(0, ValueError), (1.5, TypeError)])
def test_wrong_numbers_of_images_are_refused(max_images: Any, error: Any, make_refiner: Any, make_batch: Any) -> None:
    with pytest.raises(error, match="`max_images` must be"):
        check(make_refiner(), make_batch, max_images=max_images)


def test_an_empty_loader_is_refused(make_refiner: Any) -> None:
    with pytest.raises(ValueError, match="`loader` must yield at least one batch to be checked; got none"):
        make_refiner().check([], lambda img: img, progress=False)


# ---------------------------------------------------------------------------------------------------- the demo's trained CLIP


@pytest.mark.parametrize("shuffled", [False, True])
def test_with_true_masks_every_class_will_be_helped_and_with_shuffled_names_none(shuffled: bool) -> None:
    split = make_split(120, 7)
    cams = torch.stack([torch.stack([torch.from_numpy(s.things == k + 1) for k in range(len(THINGS))]) for s in split.scenes])
    names = [*THINGS[1:], THINGS[0]] if shuffled else list(THINGS)
    refiner = PromptRefiner(names, clip=CLIP_FILE, config=COMPACT_CLIP)
    rest = iter(cams.float().split(40))
    report = refiner.check(split.batches(40), lambda _: next(rest), progress=False)
    verdicts = [figures.verdict for figures in report.classes]
    if not shuffled:
        assert verdicts == ["will help"] * 6 and report.lambda_area is not None
        assert all(figures.removed_auc > 0.9 and figures.average_precision > figures.chance for figures in report.classes)
    else:
        assert "will help" not in verdicts and "will not" in verdicts
        report.apply()
        left_out = [name for name, weight in refiner.config.class_weights.items() if weight == 0]
        assert left_out == [figures.name for figures in report.classes if figures.verdict == "will not"]
