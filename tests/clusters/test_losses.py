"""The losses of category clusters against literal double loops, closed forms and finite differences."""

from __future__ import annotations

import math
from typing import Any, List, Optional, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from semples_plugin import losses
from semples_plugin.clusters import losses as cluster_losses
from semples_plugin.clusters.categories import CategoryClusters
from tests.test_losses import assert_close, clamped_cosine, features, log

CLASSES = [1, 2, 1, 3, 2, 1, 0, 3, 4]  # 4 stands alone
RELATED = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]], dtype=torch.bool)


def literal_entropy(scores: Tensor, labels: Sequence[Sequence[float]]) -> Tensor:
    """L_MCE of scores and labels of one shape, an image and a class at a time."""
    total, count = 0 * scores.double().sum(), 0
    for b in range(len(scores)):
        for k in range(scores.shape[1]):
            s, y = scores[b, k].double(), labels[b][k]
            total = total - y * max(s, 1e-6 + 0 * s).log() - (1 - y) * max(1 - s, 1e-6 + 0 * s).log()
            count += 1
    return total / count


def literal_contrast(
    features: Tensor,
    classes: Sequence[int],
    related: Optional[Tensor],
    temperature: float,
    related_weight: float,
    background: Optional[int] = None,
) -> Tensor:
    """The formula of the docstring, a pair of patches at a time, in float64."""
    f = features.double()

    def e(i: int, j: int) -> Tensor:
        cosine = (f[i] * f[j]).sum() / ((f[i] * f[i]).sum().sqrt() * (f[j] * f[j]).sum().sqrt())
        return (cosine / temperature).exp()

    total, anchors = 0 * f.sum(), 0
    for i, own in enumerate(classes):
        positives = [p for p in range(len(f)) if p != i and classes[p] == own]
        if not positives or own == background:
            continue
        anchors += 1
        below = sum(e(i, p) for p in positives)
        for n, other in enumerate(classes):
            if other != own:
                below = below + (related_weight if related is not None and related[own, other] else 1.0) * e(i, n)
        total = total - sum((e(i, p) / below).log() for p in positives) / len(positives)
    return total / anchors


def same_gradients(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    for mine, reference in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs)):
        assert reference.abs().max() > 0
        assert_close(mine, reference)


# ------------------------------------------------------------------------------------------------ multi-label cross-entropy


def probabilities(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("background", [1.0, 0.3, None])
def test_cross_entropy_equals_double_loop(background: Optional[float], seed: int) -> None:
    labels = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]
    scores = probabilities(4, 4, seed=seed)
    got = cluster_losses.multi_label_cross_entropy(scores, torch.tensor(labels), background)
    if background is None:
        expected = literal_entropy(scores[:, 1:], labels)
    else:
        expected = literal_entropy(scores, [[background, *row] for row in labels])
    assert_close(got, expected)
    same_gradients(got, expected, scores)
    if background is None:
        again = cluster_losses.multi_label_cross_entropy(scores, torch.tensor(labels), None)
        assert not torch.autograd.grad(again, scores)[0][:, 0].any()


@pytest.mark.parametrize("background", [1.0, None])
def test_cross_entropy_without_background_channel(background: Optional[float]) -> None:
    scores, labels = probabilities(3, 4), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]])
    got = cluster_losses.multi_label_cross_entropy(scores, labels, background)
    assert_close(got, literal_entropy(scores, labels.tolist()))
    assert_close(got, F.binary_cross_entropy(scores, labels.float()))


def test_cross_entropy_passes_gradcheck() -> None:
    scores = (0.1 + 0.8 * probabilities(3, 4, dtype=torch.float64).detach()).requires_grad_(True)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
    for background in (1.0, 0.25, None):
        assert torch.autograd.gradcheck(
            lambda s, y=background: cluster_losses.multi_label_cross_entropy(s, labels, y), (scores,)
        )


def test_cross_entropy_in_closed_form() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    assert cluster_losses.multi_label_cross_entropy(half, labels).item() == pytest.approx(math.log(2), rel=1e-12)
    assert cluster_losses.multi_label_cross_entropy(labels.double(), labels).item() == 0
    wrong = (1 - labels).double().requires_grad_(True)
    worst = cluster_losses.multi_label_cross_entropy(wrong, labels)
    assert worst.item() == pytest.approx(-math.log(1e-6), rel=1e-9)
    assert torch.autograd.grad(worst, wrong)[0].abs().max() == 0  # the cut bites
    background = torch.tensor([[0.25, 0.5, 0.5]], dtype=torch.float64)
    got = cluster_losses.multi_label_cross_entropy(background, torch.tensor([[1, 0]]))
    assert got.item() == pytest.approx((math.log(4) + 2 * math.log(2)) / 3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores, labels = probabilities(3, 4, dtype=dtype), torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
    got = cluster_losses.multi_label_cross_entropy(scores, labels)
    assert got.dtype == torch.float32
    assert got.item() == cluster_losses.multi_label_cross_entropy(scores.float(), labels).item()


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_cross_entropy_takes_labels_of_any_kind(kind: torch.dtype) -> None:
    scores, labels = probabilities(2, 3), torch.tensor([[1, 0], [1, 1]])
    got = cluster_losses.multi_label_cross_entropy(scores, labels.to(kind))
    assert got.dtype == torch.float32 and got.item() == cluster_losses.multi_label_cross_entropy(scores, labels).item()


def test_cross_entropy_of_no_image_is_an_attached_zero() -> None:
    scores = torch.zeros(0, 4, requires_grad=True)
    got = cluster_losses.multi_label_cross_entropy(scores, torch.zeros(0, 3))
    assert got.shape == () and got.item() == 0
    assert torch.autograd.grad(got, scores)[0].shape == (0, 4)


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (3, 3), (2, 3, 1), (2,)])
def test_cross_entropy_refuses_other_shapes(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"`scores` must have shape \(2, 3\), or \(2, 4\) with the background first; got \("):
        cluster_losses.multi_label_cross_entropy(torch.rand(shape), torch.ones(2, 3))


# ------------------------------------------------------------------------------------------------ patch contrast


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("related", [None, RELATED], ids=["alone", "clusters"])
@pytest.mark.parametrize(("temperature", "weight"), [(0.1, 0.5), (1.0, 0.2), (0.4, 0.0), (0.4, 1.0)])
def test_contrast_equals_double_loop(related: Optional[Tensor], temperature: float, weight: float, seed: int) -> None:
    f = features(len(CLASSES), 6, seed=seed)
    got = cluster_losses.patch_contrast(f, torch.tensor(CLASSES), related, temperature, weight)
    expected = literal_contrast(f, CLASSES, related, temperature, weight)
    assert_close(got, expected)
    same_gradients(got, expected, f)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.integers(0, 100),
    st.floats(0.05, 2.0),
    st.sampled_from([0.0, 0.3, 1]),
)
def test_contrast_equals_double_loop_for_any_classes(classes: List[int], seed: int, temperature: float, weight: float) -> None:
    f = features(len(classes), 4, seed=seed, dtype=torch.float64)
    got = cluster_losses.patch_contrast(f, torch.tensor(classes), RELATED, temperature, weight)
    gradient = torch.autograd.grad(got, f)[0]
    if len(set(classes)) == len(classes):
        assert got.item() == 0 and gradient.abs().max() == 0
        return
    expected = literal_contrast(f, classes, RELATED, temperature, weight)
    assert got.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(gradient, torch.autograd.grad(expected, f)[0], rtol=1e-7, atol=1e-10)


def test_contrast_passes_gradcheck() -> None:
    f = features(7, 4, dtype=torch.float64)
    for weight in (0.0, 0.5, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, w=weight: cluster_losses.patch_contrast(x, torch.tensor(CLASSES[:7]), RELATED, 0.5, w), (f,)
        )


@pytest.mark.parametrize("background", [0, 1, 4, 9])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_background_is_not_drawn_together_but_pushed_away(weight: float, background: int) -> None:
    classes = [*CLASSES, 0, 0]
    f = features(len(classes), 6)
    got = cluster_losses.patch_contrast(f, torch.tensor(classes), RELATED, 0.4, weight, background=background)
    expected = literal_contrast(f, classes, RELATED, 0.4, weight, background)
    assert_close(got, expected)
    same_gradients(got, expected, f)
    everything = cluster_losses.patch_contrast(f, torch.tensor(classes), RELATED, 0.4, weight)
    assert (got.item() == everything.item()) == (background in (4, 9))  # nothing to draw together


def test_background_alone_is_an_attached_zero() -> None:
    f = features(3, 4)
    got = cluster_losses.patch_contrast(f, torch.zeros(3, dtype=torch.long), RELATED, background=0)
    assert got.item() == 0 and not torch.autograd.grad(got, f)[0].any()
    assert cluster_losses.patch_contrast(f, torch.tensor([0, 0, 1]), RELATED, background=0).item() == 0


def test_related_weight_one_is_the_supervised_contrastive_loss() -> None:
    f, classes = features(len(CLASSES), 6), torch.tensor(CLASSES)
    cosine = F.cosine_similarity(f[:, None], f[None], dim=-1) / 0.2
    rows = []
    for i in range(len(f)):
        others = [a for a in range(len(f)) if a != i]
        chance = dict(zip(others, cosine[i, others].log_softmax(0)))
        positives = [chance[p] for p in others if classes[p] == classes[i]]
        if positives:
            rows.append(-sum(positives) / len(positives))
    expected = sum(rows) / len(rows)
    for related in (None, RELATED):
        assert_close(cluster_losses.patch_contrast(f, classes, related, 0.2, 1.0), expected)


def test_related_weight_zero_leaves_the_cluster_out() -> None:
    f, classes = features(5, 5), torch.tensor([1, 1, 0, 2, 4])
    apart = cluster_losses.patch_contrast(f, classes, RELATED, 0.3, 0.0)
    without = cluster_losses.patch_contrast(f[[0, 1, 2, 4]], classes[[0, 1, 2, 4]], RELATED, 0.3, 0.0)  # no patch of 2
    assert apart.item() == pytest.approx(without.item(), rel=1e-6)
    gradients = torch.autograd.grad(apart, f)[0], torch.autograd.grad(without, f)[0]
    assert_close(*gradients)
    assert gradients[0][3].abs().max() == 0 and gradients[0][[0, 1, 2, 4]].abs().max(1).values.min() > 1e-4
    assert cluster_losses.patch_contrast(f, classes, RELATED, 0.3, 0.5).item() > apart.item() + 1e-3


def test_contrast_is_defined_where_an_anchor_has_nothing_to_compare_with() -> None:
    """Weight 0, and a patch whose only others are of its cluster: it is no anchor and must not spoil the others' gradients."""
    f = features(3, 4)
    got = cluster_losses.patch_contrast(f, torch.tensor([1, 2, 2]), RELATED, 0.5, 0.0)
    assert got.item() == pytest.approx(0, abs=1e-6)
    gradient = torch.autograd.grad(got, f)[0]
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_contrast_in_closed_form(temperature: float) -> None:
    """Two identical patches of one class, every other one orthogonal and of a class of its own: log(1 + n exp(-1 / t))."""
    f = (
        torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2, 3]]
        * torch.tensor([1.0, 5.0, 2.0, 3.0, 0.1], dtype=torch.float64)[:, None]
    )
    e = math.exp(-1 / temperature)

    def value(count: int, related: Optional[Tensor] = None, weight: float = 0.5) -> float:
        return cluster_losses.patch_contrast(
            f[:count], torch.tensor([1, 1, 2, 3, 4][:count]), related, temperature, weight
        ).item()

    assert value(2) == pytest.approx(0, abs=1e-12)
    for count in (3, 4, 5):
        assert value(count) == pytest.approx(math.log1p((count - 2) * e), rel=1e-9)
    for weight in (0.0, 0.25, 1.0):  # 1 and 2 are one cluster
        assert value(5, RELATED, weight) == pytest.approx(math.log1p((2 + weight) * e), rel=1e-9)


def test_contrast_of_equal_features() -> None:
    f, classes = torch.ones(6, 3, dtype=torch.float64), torch.tensor([1, 1, 1, 2, 2, 2])
    assert cluster_losses.patch_contrast(f, classes).item() == pytest.approx(math.log(5), rel=1e-9)
    assert cluster_losses.patch_contrast(f, classes, RELATED, 0.1, 0.5).item() == pytest.approx(math.log(2 + 3 * 0.5), rel=1e-9)
    assert cluster_losses.patch_contrast(f, classes, RELATED, 0.1, 0.0).item() == pytest.approx(math.log(2), rel=1e-9)


@given(st.integers(0, 1000), st.permutations(range(len(CLASSES))), st.floats(1e-3, 1e3))
def test_contrast_depends_neither_on_order_nor_on_length(seed: int, order: List[int], scale: float) -> None:
    f, classes = features(len(CLASSES), 5, seed=seed, dtype=torch.float64).detach(), torch.tensor(CLASSES)
    expected = cluster_losses.patch_contrast(f, classes, RELATED).item()
    assert cluster_losses.patch_contrast(f[order] * scale, classes[order], RELATED).item() == pytest.approx(expected, rel=1e-9)
    f[3] *= scale
    assert cluster_losses.patch_contrast(f, classes, RELATED).item() == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_related_weight_pushes_more(seed: int, a: float, b: float) -> None:
    f, classes = features(len(CLASSES), 5, seed=seed, dtype=torch.float64).detach(), torch.tensor(CLASSES)
    low, high = (cluster_losses.patch_contrast(f, classes, RELATED, 0.3, w).item() for w in sorted((a, b)))
    assert low <= high + 1e-12
    assert (high - low > 1e-6) or abs(a - b) < 1e-2


def test_a_step_draws_patches_of_a_class_together_and_classes_apart() -> None:
    f, classes = features(len(CLASSES), 6, shift=0.0), torch.tensor(CLASSES)

    def gap(x: Tensor) -> float:
        cosine = F.cosine_similarity(x[:, None], x[None], dim=-1)
        same = (classes[:, None] == classes) & ~torch.eye(len(x), dtype=torch.bool)
        return (cosine[same].mean() - cosine[classes[:, None] != classes].mean()).item()

    gradient = torch.autograd.grad(cluster_losses.patch_contrast(f, classes, RELATED), f)[0]
    assert gap(f - 0.3 * gradient) > gap(f) + 0.05


@pytest.mark.parametrize("classes", [[], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_without_positives_the_contrast_is_an_attached_zero(classes: List[int], weight: float) -> None:
    f = features(len(classes), 4)
    got = cluster_losses.patch_contrast(f, torch.tensor(classes, dtype=torch.long), RELATED, 0.1, weight)
    assert got.shape == () and got.item() == 0
    gradient = torch.autograd.grad(got, f)[0]
    assert gradient.shape == (len(classes), 4) and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_contrast_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    f, classes = features(len(CLASSES), 6, dtype=dtype), torch.tensor(CLASSES)
    got = cluster_losses.patch_contrast(f, classes, RELATED)
    assert got.dtype == torch.float32
    assert got.item() == cluster_losses.patch_contrast(f.float(), classes, RELATED).item()
    assert torch.autograd.grad(got, f)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_contrast(dtype: torch.dtype) -> None:
    f, classes = features(len(CLASSES), 6, dtype=dtype), torch.tensor(CLASSES)
    expected = cluster_losses.patch_contrast(f, classes, RELATED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cluster_losses.patch_contrast(f, classes, RELATED)
    assert got.dtype == torch.float32 and got.item() == expected.item()
    assert torch.equal(torch.autograd.grad(got, f)[0], torch.autograd.grad(expected, f)[0])


def test_contrast_stays_finite_at_a_small_temperature() -> None:
    f = features(len(CLASSES), 6)
    got = cluster_losses.patch_contrast(f, torch.tensor(CLASSES), RELATED, 1e-3)
    assert math.isfinite(got.item()) and torch.isfinite(torch.autograd.grad(got, f)[0]).all()
    expected = literal_contrast(f, CLASSES, RELATED, 1e-2, 0.5)
    assert_close(cluster_losses.patch_contrast(f, torch.tensor(CLASSES), RELATED, 1e-2), expected, 1e-4)


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 4), 2), ((3,), 3), ((2, 3, 4), 2), ((0, 4), 1)], ids=["length", "vector", "batch", "empty"]
)
def test_contrast_refuses_other_shapes(shape: Any, count: int) -> None:
    with pytest.raises(ValueError, match=r"`features` must have shape \(M, D\) and `classes` \(M,\); got \("):
        cluster_losses.patch_contrast(torch.rand(shape), torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": -1.0}, {"related_weight": -0.1}, {"related_weight": 1.1}]
)
def test_contrast_refuses_other_numbers(options: Any) -> None:
    with pytest.raises(ValueError, match="`temperature` must be > 0 and `related_weight` from 0 to 1; got"):
        cluster_losses.patch_contrast(torch.rand(2, 3), torch.zeros(2, dtype=torch.long), **options)


# ------------------------------------------------------------------------------------------------ prompts and clusters

NAMES = ["car", "cat", "dog", "bus", "cow"]
CLUSTERS = CategoryClusters({"animals": ["cat", "dog", "cow"], "vehicles": ["car", "bus"]}, NAMES)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("repel", ["log", "log1m"])
def test_repel_cluster_equals_double_loop(repel: str, seed: int) -> None:
    texts, u_b, classes = features(5, 8, seed=seed), features(4, 8, seed=seed + 10), [2, 0, 4, 2]
    got = losses.prompt_repel_cluster(texts, u_b, CLUSTERS.related()[classes], repel)
    total = 0 * texts.sum() + 0 * u_b.sum()
    for p, k in enumerate(classes):
        members = next(m for m in CLUSTERS.values() if NAMES[k] in m)
        for name in members:
            c = clamped_cosine(texts[NAMES.index(name)].double(), u_b[p].double())
            total = total + (log(c) if repel == "log" else -log(1 - c)) / len(members)
    assert_close(got, total / 4)
    same_gradients(got, total / 4, texts, u_b)


@pytest.mark.parametrize("repel", ["log", "log1m"])
def test_repel_cluster_passes_gradcheck(repel: str) -> None:
    texts, u_b = features(5, 6, shift=3.0, dtype=torch.float64), features(3, 6, seed=1, shift=3.0, dtype=torch.float64)
    c = losses.cosine(u_b[:, None], texts[None])
    assert ((c > 0.1) & (c < 0.99)).all()
    related = CLUSTERS.related()[[0, 1, 1]]
    assert torch.autograd.gradcheck(lambda a, b: losses.prompt_repel_cluster(a, b, related, repel), (texts, u_b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("repel", ["log", "log1m"])
def test_clusters_of_one_class_are_plain_repel_exactly(repel: str, dtype: torch.dtype) -> None:
    alone = CategoryClusters({name: [name] for name in NAMES}, NAMES)
    for seed in range(5):
        texts, u_b = features(5, 64, seed=seed, dtype=dtype), features(7, 64, seed=seed + 10, dtype=dtype)
        classes = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(seed))
        got = losses.prompt_repel_cluster(texts, u_b, alone.related()[classes], repel)
        expected = losses.prompt_repel(texts[classes], u_b, repel)
        assert got.item() == expected.item() and got.dtype == expected.dtype
        assert torch.equal(torch.autograd.grad(got, u_b)[0], torch.autograd.grad(expected, u_b)[0])


def test_repel_cluster_in_closed_form() -> None:
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    u_b = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)
    sixty, thirty = math.log(0.5), math.log(math.sqrt(0.75))
    assert losses.prompt_repel_cluster(texts, u_b, torch.tensor([[1, 1, 0]])).item() == pytest.approx((sixty + thirty) / 2)
    assert losses.prompt_repel_cluster(texts, u_b, torch.tensor([[0, 1, 0]])).item() == pytest.approx(thirty)
    everything = losses.prompt_repel_cluster(texts, u_b, torch.tensor([[True, True, True]])).item()
    assert everything == pytest.approx((sixty + thirty + math.log(1e-4)) / 3)


@pytest.mark.parametrize("repel", ["log", "log1m"])
def test_repel_cluster_pushes_every_class_of_the_cluster_and_no_other(repel: str) -> None:
    texts, u_b = features(5, 8, shift=1.0).detach(), features(1, 8, seed=1, shift=1.0)
    related = CLUSTERS.related()[[1]]  # cat
    gradient = torch.autograd.grad(losses.prompt_repel_cluster(texts, u_b, related, repel), u_b)[0]
    before, after = losses.cosine(u_b, texts), losses.cosine(u_b - 0.1 * gradient, texts)
    assert (after - before)[related[0]].mean() < -1e-3
    moved = texts.clone()
    moved[~related[0]] = 7 - moved[~related[0]]
    assert torch.equal(gradient, torch.autograd.grad(losses.prompt_repel_cluster(moved, u_b, related, repel), u_b)[0])


def test_repel_cluster_of_no_pairs_is_an_attached_zero() -> None:
    u_b = torch.zeros(0, 8, requires_grad=True)
    got = losses.prompt_repel_cluster(torch.rand(5, 8), u_b, torch.zeros(0, 5, dtype=torch.bool))
    assert got.shape == () and got.item() == 0
    assert torch.autograd.grad(got, u_b)[0].shape == (0, 8)


def test_repel_cluster_refuses_another_repel() -> None:
    with pytest.raises(ValueError, match="`repel` must be 'log' or 'log1m'; got 'exp'"):
        losses.prompt_repel_cluster(torch.rand(2, 4), torch.rand(1, 4), torch.ones(1, 2), "exp")
