"""Stage (b): failed prompts are learned again, named and left out; several prompts per class; figures of every prompt."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner, losses, masks
from semples_plugin.cli import main
from semples_plugin.prompt_learning import PromptFit, group_features
from tests.test_losses import plain_cosine

Pairs = Tuple[Tensor, Tensor]
QUICK: Dict[str, Any] = {"epochs": 6, "lr": 0.05, "progress": False}


@pytest.fixture
def background_features(make_refiner: Any, make_batch: Any) -> Callable[..., Pairs]:
    """v_b and pairs of a few batches, as stage (b) collects them; every class has pairs unless `labels` are given."""

    def make(count: int = 4, labels: Any = None) -> Pairs:
        refiner = make_refiner()
        features, pairs = [], []
        for seed in range(count):
            img, cam, target = make_batch(labels or ([[1, 1, 1], [0, 1, 0]] if seed % 2 else None), seed=seed)
            found, rows = refiner.encode_backgrounds(img, cam, target)
            features.append(found)
            pairs.append(rows + torch.tensor([2 * seed, 0]))
        return torch.cat(features), torch.cat(pairs)

    return make


def out_of_reach(features: Tensor, pairs: Tensor, k: int) -> Tensor:
    """The same features, those of class k made zero: no text resembles them."""
    return torch.where((pairs[:, 1] == k)[:, None], torch.zeros(()), features)


def failing(make_refiner: Any, found: Pairs, **options: Any) -> Tuple[PromptRefiner, PromptFit]:
    """A refiner whose prompt of "bird" failed."""
    features, pairs = found
    refiner = make_refiner(**options)
    with pytest.warns(UserWarning, match="background prompts failed and are left out of L_refine"):
        fit = refiner.fit_prompts_on(out_of_reach(features, pairs, 2), pairs, **QUICK)
    return refiner, fit


# ------------------------------------------------------------------------------------------------ gradient


def test_a_prompt_that_starts_below_the_clamp_learns(make_refiner: Any) -> None:
    refiner = make_refiner(["boat"], lambda_t=0.0, prompt_restarts=0)
    start = F.normalize(refiner.prompt_features()[0, 0], dim=0)
    other = F.normalize(make_refiner(["boat"], seed=5).prompt_features()[0, 0], dim=0)
    away = F.normalize(other - (other @ start) * start, dim=0)
    features = (-0.2 * start + math.sqrt(1 - 0.04) * away)[None].repeat(4, 1)
    assert F.cosine_similarity(features, start[None]).max() < -0.19
    pairs = torch.tensor([[i, 0] for i in range(4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether it counts as alive is not the question here
        fit = refiner.fit_prompts_on(features, pairs, epochs=30, lr=0.1, progress=False)
    assert fit.similarity > 0.1


# ------------------------------------------------------------------------------------------------ figures


def test_figures_of_every_prompt_are_those_of_the_result(make_refiner: Any, background_features: Any) -> None:
    features, pairs = background_features()
    refiner = make_refiner()
    fit = refiner.fit_prompts_on(features, pairs, **QUICK)
    u_b = refiner.prompt_features()[:, 0]
    empty = refiner.encoder.encode_tokens([[*refiner.encoder.tokenize(["a photo of ."])[0]]])[0]
    assert [p.name for p in fit.prompts] == refiner.classes and fit.failed == []
    for k, prompt in enumerate(fit.prompts):
        own = features[pairs[:, 1] == k]
        mean, nothing = (sum(float(plain_cosine(v, u)) for v in own) / len(own) for u in (u_b[k], empty))
        assert (prompt.num_pairs, prompt.attempts, prompt.alive, prompt.number) == (len(own), 1, True, None)
        assert prompt.similarity == pytest.approx(mean, abs=1e-5) and prompt.title == prompt.name
        assert prompt.empty_similarity == pytest.approx(nothing, abs=1e-5) and mean > nothing
        assert prompt.class_similarity == pytest.approx(float(plain_cosine(refiner.text_features[k], u_b[k])), abs=1e-5)
    weighted = sum(p.similarity * p.num_pairs for p in fit.prompts) / len(pairs)
    assert fit.similarity == pytest.approx(weighted, abs=1e-6)
    assert fit.class_similarity == pytest.approx(sum(p.class_similarity for p in fit.prompts) / 3, abs=1e-6)


def test_a_class_without_pairs_has_no_prompt(make_refiner: Any, make_batch: Any, background_features: Any) -> None:
    features, pairs = background_features(labels=[[1, 0, 0], [1, 1, 0]])
    refiner = make_refiner()
    start = refiner.prompts.context.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing failed: there was nothing to learn from
        fit = refiner.fit_prompts_on(features, pairs, **QUICK)
    bird = fit.prompts[2]
    assert (bird.num_pairs, bird.attempts, bird.similarity, bird.empty_similarity, bird.alive) == (0, 0, None, None, False)
    assert fit.failed == [] and refiner.prompts.alive.tolist() == [[True], [True], [False]]
    assert torch.equal(refiner.prompts.context[2], start[2]) and not torch.equal(refiner.prompts.context[0], start[0])
    assert fit.class_similarity == pytest.approx(sum(p.class_similarity for p in fit.prompts[:2]) / 2, abs=1e-6)
    assert refiner.compute(*make_batch([[0, 0, 1]])).terms["refine"] == 0
    assert "bird (cos to class" in str(refiner.nearest_words(["water"])[2])
    assert "not in use: failed or without data): water" in str(refiner.nearest_words(["water"])[2])


# ------------------------------------------------------------------------------------------------ restarts


def test_a_failed_prompt_is_named_and_learned_as_often_as_allowed(make_refiner: Any, background_features: Any) -> None:
    features, pairs = background_features()
    message = (
        r"1 of 3 background prompts failed and are left out of L_refine \('bird': cosine to its backgrounds 0\.00, of a prompt "
        r"without content 0\.00, 4 attempts\)\. Try more `epochs`"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        fit = make_refiner(prompt_restarts=3).fit_prompts_on(out_of_reach(features, pairs, 2), pairs, **QUICK)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [p.attempts for p in fit.prompts] == [1, 1, 4] and [p.title for p in fit.failed] == ["bird"]


def test_only_failed_prompts_are_learned_again(make_refiner: Any, background_features: Any) -> None:
    found = background_features()
    once, first = failing(make_refiner, found, prompt_restarts=0)
    again, fit = failing(make_refiner, found, prompt_restarts=2)
    assert torch.equal(once.prompts.context[:2], again.prompts.context[:2])
    assert first.losses == fit.losses and first.prompts[:2] == fit.prompts[:2]
    assert fit.prompts[2].similarity >= first.prompts[2].similarity
    assert (first.prompts[2].attempts, fit.prompts[2].attempts) == (1, 3)


def test_the_best_attempt_is_kept(make_refiner: Any, background_features: Any) -> None:
    features, pairs = background_features()
    refiner = make_refiner()
    with pytest.warns(UserWarning, match="background prompts failed"):
        fit = refiner.fit_prompts_on(features, pairs, epochs=1, lr=0.0, progress=False)  # the initial values as they are
    assert {prompt.attempts for prompt in fit.prompts} == {1, 3}
    for k, prompt in enumerate(fit.prompts):
        values = []
        for attempt in range(prompt.attempts):
            start = refiner.prompts.initial(attempt)[k]
            u_b = refiner.encoder.encode_prompt(start, refiner.config.prompt_template)
            values.append(F.cosine_similarity(features[pairs[:, 1] == k], u_b).mean().item())
        assert prompt.similarity == pytest.approx(max(values), abs=1e-6)
        assert prompt.alive == (max(values) > prompt.empty_similarity) == (prompt.attempts < 3)
        best = values.index(max(values))
        assert torch.equal(refiner.prompts.context[k], refiner.prompts.initial(best)[k])


def test_another_start_can_mend_a_prompt(make_refiner: Any, make_batch: Any) -> None:
    from tests.test_refiner import data_of

    data, host = data_of(make_batch)
    settings: Dict[str, Any] = {"epochs": 4, "lr": 0.02, "progress": False}
    with pytest.warns(UserWarning, match="'bird': cosine to its backgrounds"):
        once = make_refiner(seed=9, prompt_restarts=0).fit_prompts(data, host, **settings)
    assert [p.title for p in once.failed] == ["bird"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = make_refiner(seed=9).fit_prompts(data, host, **settings)
    assert mended.prompts[2].attempts == 2 and mended.prompts[2].alive and mended.failed == []
    assert mended.prompts[2].similarity > once.prompts[2].similarity


def test_restarts_are_the_same_each_time(make_refiner: Any, background_features: Any) -> None:
    found = background_features()
    (first, a), (second, b) = (failing(make_refiner, found) for _ in range(2))
    assert a == b and torch.equal(first.prompts.context, second.prompts.context)
    with pytest.warns(UserWarning, match="failed"):
        again = first.fit_prompts_on(out_of_reach(*found, 2), found[1], **QUICK)
    assert again == a and torch.equal(first.prompts.context, second.prompts.context)


def test_initial_values_of_attempts_differ(make_refiner: Any) -> None:
    prompts = make_refiner().prompts
    starts = [prompts.initial(attempt) for attempt in range(3)]
    assert torch.equal(starts[0], prompts.context) and torch.equal(prompts.initial(2), starts[2])
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("value", [-1, 1.5, "two", True])
def test_restarts_must_be_a_number(value: Any, make_refiner: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`prompt_restarts` must be"):
        make_refiner(prompt_restarts=value)


@pytest.mark.parametrize("value", [0, 1.5, None])
def test_prompts_per_class_must_be_a_number(value: Any, make_refiner: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`prompts_per_class` must be"):
        make_refiner(prompts_per_class=value)


# ------------------------------------------------------------------------------------------------ a failed prompt is not used


def test_pairs_of_a_failed_prompt_count_as_zero(make_refiner: Any, make_batch: Any, background_features: Any) -> None:
    refiner, _ = failing(make_refiner, background_features())
    img, cam, labels = make_batch([[1, 0, 1], [0, 1, 1]])
    out = refiner.compute(img, cam, labels)
    v_f = refiner.encoder.encode_image(refiner._views(img, cam, out.pairs, refiner.config.eps)[1][0])
    each = losses.refine(v_f, refiner.prompt_features()[out.pairs[:, 1], 0], "none")
    each[out.pairs[:, 1] == 2] = 0
    assert out.terms["refine"].item() == pytest.approx(each.mean().item(), rel=1e-5) and each.mean() > 0
    only = refiner.compute(*make_batch([[0, 0, 1]]))
    match = only.terms["match_foreground"] + refiner.config.lambda_b * only.terms["match_background"]
    assert only.terms["refine"] == 0 and only.loss.item() == pytest.approx(match.item(), rel=1e-6)
    refiner(*make_batch([[0, 0, 1]])).backward()


def test_a_failed_prompt_is_no_rival_in_suppression(make_refiner: Any, make_batch: Any, background_features: Any) -> None:
    refiner, _ = failing(make_refiner, background_features())
    img, cam, _ = make_batch([[1, 0, 0], [0, 0, 1]])
    labels = torch.tensor([[1, 0, 0], [0, 0, 1]])
    plain, got = (refiner.refine_masks(img, cam, labels, suppress=s, align=None).masks for s in (False, True))
    assert torch.allclose(got[1, 2], plain[1, 2], atol=1e-6)  # the only class of its image, and no prompt: no rival
    assert (got[0, 0] - plain[0, 0]).abs().max() > 0.01


def test_every_prompt_failed(make_refiner: Any, make_batch: Any, background_features: Any, tmp_path: Path) -> None:
    features, pairs = background_features()
    refiner = make_refiner()
    with pytest.warns(UserWarning, match="3 of 3 background prompts failed"):
        refiner.fit_prompts_on(0 * features, pairs, **QUICK)
    assert refiner.stage == "refine" and not refiner.prompts.alive.any()
    batch = make_batch()
    assert refiner.compute(*batch).terms["refine"] == 0
    refiner(*batch).backward()
    assert torch.isfinite(batch[1].grad).all() and batch[1].grad.abs().max() > 0
    refiner.save(tmp_path / "p.safetensors")
    assert not make_refiner().load_prompts(tmp_path / "p.safetensors").prompts.alive.any()


def test_a_file_keeps_what_failed(
    make_refiner: Any, make_batch: Any, background_features: Any, aligned_clip: nn.Module, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "p.safetensors"
    refiner, _ = failing(make_refiner, background_features())
    refiner.save(path)
    batch = make_batch()
    for loaded in (make_refiner().load_prompts(path), PromptRefiner.load(path, clip=aligned_clip)):
        assert loaded.prompts.alive.tolist() == [[True], [True], [False]]
        assert loaded(*batch).item() == refiner(*batch).item()
        assert [reading.alive for reading in loaded.nearest_words(["water"])] == [True, True, False]
    torch.save(aligned_clip.state_dict(), tmp_path / "clip.pt")
    assert main(["prompts", "show", str(path), "--clip", str(tmp_path / "clip.pt"), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "without a prompt in use (failed or without data): bird" in lines
    assert sum("not in use" in line for line in lines) == 1
    assert main(["prompts", "show", str(path), "--clip", str(tmp_path / "clip.pt"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["alive"] == [[True], [True], [False]] and shown["nearest_words"]["bird"]["alive"] is False


def test_state_dict_keeps_what_failed(make_refiner: Any, background_features: Any) -> None:
    refiner, _ = failing(make_refiner, background_features())
    other = make_refiner()
    other.load_state_dict(refiner.state_dict())
    assert other.prompts.alive.tolist() == [[True], [True], [False]] and other.stage == "refine"


def test_an_interrupted_fit_changes_nothing(make_refiner: Any, background_features: Any) -> None:
    refiner, _ = failing(make_refiner, background_features())
    before = {name: value.clone() for name, value in refiner.state_dict().items()}
    with pytest.raises(FloatingPointError, match="The prompts diverged"):
        refiner.fit_prompts_on(*background_features(), epochs=3, lr=1e30, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in refiner.state_dict().items())


# ------------------------------------------------------------------------------------------------ several prompts per class


def test_groups_are_those_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = torch.eye(8)[[0, 1, 2, 3, 4]]
    which = torch.randint(0, 2, (60,), generator=generator)
    classes = torch.randint(0, 2, (60,), generator=generator)
    features = 5 * torch.rand(60, 1, generator=generator) * (centers[2 * classes + which] + 0.05 * torch.rand(60, 8))
    for seed in range(5):
        groups = group_features(features, classes, 2, seed)
        for k in range(2):
            together = {(int(a), int(b)) for a, b in zip(which[classes == k], groups[classes == k])}
            assert together in ({(0, 0), (1, 1)}, {(0, 1), (1, 0)})
    assert torch.equal(group_features(features, classes, 2, 3), group_features(features, classes, 2, 3))
    assert group_features(features, classes, 1).tolist() == [0] * 60


def test_fewer_features_than_groups_leave_groups_empty() -> None:
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0.6, 0.8]])
    groups = group_features(features, torch.tensor([0, 0, 0, 1]), 4)
    assert groups[0] == groups[1] != groups[2] and set(groups[:3].tolist()) == {0, 1} and groups[3] == 0
    assert group_features(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), 2).tolist() == [0, 0]


@pytest.mark.parametrize("clusters", [None, {"vehicles": ["boat", "train"], "animals": ["bird"]}])
def test_first_epoch_with_two_prompts_equals_the_formula(
    clusters: Any, make_refiner: Any, background_features: Any, padded_prompt: Callable, aligned_clip: nn.Module
) -> None:
    features, pairs = background_features()
    refiner = make_refiner(prompts_per_class=2, lambda_t=0.5, clusters=clusters, prompt_restarts=0)
    contexts = refiner.prompts.context.clone()
    assert contexts.shape == (3, 2, 4, 64)
    groups = group_features(features, pairs[:, 1], 2, 0)
    total = 0.0
    for v_b, (_, k), n in zip(features, pairs.tolist(), groups.tolist()):
        u_b = padded_prompt(aligned_clip, contexts[k, n]).detach()
        near = [k] if clusters is None else [i for i in range(3) if (i < 2) == (k < 2)]
        repel = sum(math.log(float(plain_cosine(refiner.text_features[j], u_b))) for j in near) / len(near)
        total += -math.log(float(plain_cosine(v_b, u_b))) + 0.5 * repel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = refiner.fit_prompts_on(features, pairs, epochs=1, batch_size=100, progress=False)
    assert fit.losses[0] == pytest.approx(total / len(pairs), rel=1e-4)
    counts = [[int(((pairs[:, 1] == k) & (groups == n)).sum()) for n in range(2)] for k in range(3)]
    assert [p.num_pairs for p in fit.prompts] == [count for row in counts for count in row] and min(map(min, counts)) > 0
    assert [p.title for p in fit.prompts] == ["boat 1", "boat 2", "train 1", "train 2", "bird 1", "bird 2"]


def two_prompts(make_refiner: Any, found: Pairs, alive: List[List[bool]], **options: Any) -> PromptRefiner:
    refiner = make_refiner(prompts_per_class=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refiner.fit_prompts_on(*found, **QUICK)
    refiner.prompts.take(refiner.prompts.context, torch.tensor(alive))
    return refiner


ALIVE = [[True, True], [False, True], [False, False]]


def test_two_prompts_come_nearer_than_one(make_refiner: Any, background_features: Any) -> None:
    features, pairs = background_features(8)
    one, two = (make_refiner(prompts_per_class=n) for n in (1, 2))
    settings: Dict[str, Any] = {"epochs": 40, "lr": 0.05, "progress": False}
    fits = [refiner.fit_prompts_on(features, pairs, **settings) for refiner in (one, two)]
    assert fits[1].similarity > fits[0].similarity + 0.005


def test_refine_is_the_mean_over_the_prompts_in_use(make_refiner: Any, make_batch: Any, background_features: Any) -> None:
    refiner = two_prompts(make_refiner, background_features(), ALIVE)
    img, cam, labels = make_batch([[1, 1, 1], [1, 0, 0]])
    out = refiner.compute(img, cam, labels)
    v_f = refiner.encoder.encode_image(refiner._views(img, cam, out.pairs, refiner.config.eps)[1][0])
    u_b = refiner.prompt_features()
    assert u_b.shape == (3, 2, 32)
    total = 0.0
    for v, (_, k) in zip(v_f, out.pairs.tolist()):
        used = [n for n in range(2) if ALIVE[k][n]]
        total += sum(-math.log(1 - float(plain_cosine(v, u_b[k, n]))) for n in used) / max(len(used), 1)
    assert out.terms["refine"].item() == pytest.approx(total / 4, rel=1e-4)


def test_suppression_with_two_prompts(make_refiner: Any, make_batch: Any, background_features: Any) -> None:
    refiner = two_prompts(make_refiner, background_features(), ALIVE)
    img, cam, labels = make_batch([[1, 0, 0], [0, 1, 1]])
    got, plain = (refiner.refine_masks(img, cam, labels, suppress=s, align=None).masks for s in (True, False))
    dense = refiner.encoder.encode_dense(refiner._clip_images(img))
    alive, scale = refiner.prompts.alive, refiner.encoder.logit_scale
    pairs = labels.nonzero()
    weight = masks.suppression(dense, pairs, refiner.text_features, refiner.prompt_features(), scale, alive)
    weight = F.interpolate(weight[:, None], size=(40, 40), mode="bilinear")[:, 0]
    for p, (b, k) in enumerate(pairs.tolist()):
        assert torch.allclose(got[b, k], plain[b, k] * weight[p], atol=1e-5)


def test_words_of_two_prompts(make_refiner: Any, background_features: Any) -> None:
    refiner = two_prompts(make_refiner, background_features(), ALIVE)
    words = ["water", "sky", "snow"]
    readings = refiner.nearest_words(words, top=2)
    assert [(r.name, r.number, r.alive) for r in readings] == [
        ("boat", 1, True), ("boat", 2, True), ("train", 1, False), ("train", 2, True), ("bird", 1, False), ("bird", 2, False)
    ]  # fmt: skip
    texts = refiner.encoder.encode_text([f"a photo of {word}." for word in words])
    for reading, u_b in zip(readings, refiner.prompt_features().flatten(0, 1)):
        cosines = F.cosine_similarity(texts, u_b[None])
        assert [word for word, _ in reading.words] == [words[i] for i in cosines.topk(2).indices]
        k = refiner.classes.index(reading.name)
        own = F.cosine_similarity(refiner.text_features[k], u_b, dim=0).item()
        assert reading.class_similarity == pytest.approx(own, abs=1e-5)
    assert str(readings[1]).startswith("boat 2 (cos to class ")


def test_file_of_two_prompts(make_refiner: Any, make_batch: Any, background_features: Any, tmp_path: Path,
                             aligned_clip: nn.Module, capsys: Any) -> None:  # fmt: skip
    path, batch = tmp_path / "p.safetensors", make_batch()
    refiner = two_prompts(make_refiner, background_features(), ALIVE)
    refiner.save(path)
    for loaded in (
        PromptRefiner.load(path, clip=aligned_clip),
        make_refiner(prompts_per_class=2).load_prompts(path),
        make_refiner(prompt_length=7).load_prompts(path),  # the file's number and length count
    ):
        assert torch.equal(loaded.prompts.context, refiner.prompts.context) and loaded.prompts.alive.tolist() == ALIVE
        assert loaded(*batch).item() == refiner(*batch).item()
        loaded.save(tmp_path / "again.safetensors")
        assert PromptRefiner.load(tmp_path / "again.safetensors", clip=aligned_clip).config.prompts_per_class == 2
    assert main(["prompts", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "6 prompts of 4 vectors" in out and "without a prompt in use (failed or without data): bird" in out


def test_one_of_two_prompts_can_fail(make_refiner: Any, background_features: Any) -> None:
    features, pairs = background_features()
    turned = features.clone()
    birds = (pairs[:, 1] == 2).nonzero()[:, 0]
    turned[birds[: len(birds) // 2]] *= -1
    refiner = make_refiner(prompts_per_class=2, prompt_restarts=0)
    with pytest.warns(UserWarning, match=r"1 of 6 background prompts failed .*\('bird [12]': cosine to its backgrounds -"):
        fit = refiner.fit_prompts_on(turned, pairs, **QUICK)
    assert [p.name for p in fit.failed] == ["bird"] and int(refiner.prompts.alive.sum()) == 5
    assert refiner.prompts.alive.flatten().tolist() == [p.alive for p in fit.prompts]
