"""The parts on patch tokens against one row, one column, one patch at a time."""

from __future__ import annotations

import copy
import math
from typing import Any, Dict, List, Set, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from semples_plugin.clusters.heads import HVBiLSTM, PatchClassifier, confident_patches, top_k_pool


def head(dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> HVBiLSTM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return HVBiLSTM(dim, **options).to(dtype).eval()


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scores_of(*shape: int, seed: int = 0) -> Tensor:
    return (2 * values(*shape, seed=seed, dtype=torch.float64)).softmax(-1)


# ------------------------------------------------------------------------------------------------ HV-BiLSTM


def one_direction(lstm: nn.LSTM, steps: List[Tensor], suffix: str) -> List[Tensor]:
    """The cell's own equations from the weights of one direction, a step at a time."""
    w_x, w_h = getattr(lstm, f"weight_ih_l0{suffix}"), getattr(lstm, f"weight_hh_l0{suffix}")
    b_x, b_h = getattr(lstm, f"bias_ih_l0{suffix}"), getattr(lstm, f"bias_hh_l0{suffix}")
    h = c = torch.zeros(lstm.hidden_size, dtype=w_x.dtype)
    out = []
    for x in steps:
        i, f, g, o = (w_x @ x + b_x + w_h @ h + b_h).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return out


def by_equations(lstm: nn.LSTM, line: List[Tensor]) -> List[Tensor]:
    there, back = one_direction(lstm, line, ""), one_direction(lstm, line[::-1], "_reverse")[::-1]
    return [torch.cat(pair) for pair in zip(there, back)]


def by_module(lstm: nn.LSTM, line: List[Tensor]) -> List[Tensor]:
    """A plain nn.LSTM with a copy of the weights on one line alone."""
    plain = nn.LSTM(lstm.input_size, lstm.hidden_size, bidirectional=True).to(line[0].dtype)
    plain.load_state_dict(lstm.state_dict())
    return list(plain(torch.stack(line)[:, None])[0][:, 0])


def literal(module: HVBiLSTM, tokens: Tensor, grid: Tuple[int, int], run: Any) -> Tensor:
    """Every row and every column of every image alone."""
    height, width = grid
    out = torch.zeros(len(tokens), height * width, module.out_dim, dtype=tokens.dtype)
    for b in range(len(tokens)):
        rows = [run(module.rows, [tokens[b, y * width + x] for x in range(width)]) for y in range(height)]
        columns = [run(module.columns, [tokens[b, y * width + x] for y in range(height)]) for x in range(width)]
        for y in range(height):
            for x in range(width):
                out[b, y * width + x] = torch.cat([rows[y][x], columns[x][y]])
    return out


@pytest.mark.parametrize("run", [by_module, by_equations])
@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (2, 2), (1, 5), (5, 1), (1, 1)])
def test_bilstm_equals_one_row_and_one_column_at_a_time(grid: Tuple[int, int], run: Any) -> None:
    module = head(8, hidden=3)
    tokens = values(2, grid[0] * grid[1], 8)
    got = module(tokens, grid)
    assert got.shape == (2, grid[0] * grid[1], 12) and module.out_dim == 12
    expected = literal(module, tokens, grid, run).detach()
    assert expected.abs().max() > 0.1
    assert torch.allclose(got, expected, atol=1e-6)


def test_bilstm_gradients_equal_those_of_the_equations() -> None:
    module = head(4, dtype=torch.float64, hidden=2)
    tokens = values(2, 6, 4, dtype=torch.float64).requires_grad_(True)
    weight = values(2, 6, 8, seed=1, dtype=torch.float64)
    inputs = [tokens, *module.parameters()]
    got = torch.autograd.grad((module(tokens, (2, 3)) * weight).sum(), inputs)
    expected = torch.autograd.grad((literal(module, tokens, (2, 3), by_equations) * weight).sum(), inputs)
    for mine, reference in zip(got, expected):
        assert reference.abs().max() > 1e-3
        assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-12)


def test_bilstm_passes_gradcheck() -> None:
    module = head(3, dtype=torch.float64, hidden=1)
    tokens = values(1, 6, 3, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: module(x, (3, 2)), (tokens,))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_a_transposed_grid_is_the_transposed_result_with_the_lstms_swapped(height: int, width: int, seed: int) -> None:
    module, tokens = head(4), values(2, height * width, 4, seed=seed)
    swapped = copy.deepcopy(module)
    swapped.rows, swapped.columns = swapped.columns, swapped.rows
    turned = tokens.view(2, height, width, 4).transpose(1, 2).reshape(2, -1, 4)
    got = swapped(turned, (width, height)).view(2, width, height, 2, 2).transpose(1, 2).flip(3).reshape(2, height * width, 4)
    assert torch.allclose(got, module(tokens, (height, width)), atol=1e-6)


def test_bilstm_images_do_not_see_each_other() -> None:
    module, tokens = head(), values(3, 12, 6).requires_grad_(True)
    together = module(tokens, (3, 4))
    for b in range(3):
        assert torch.allclose(together[b], module(tokens[b : b + 1], (3, 4))[0], atol=1e-6)
    gradient = torch.autograd.grad(together[1].square().sum(), tokens)[0]
    assert gradient[1].abs().max() > 1e-3 and not gradient[[0, 2]].any()


def test_a_patch_sees_its_row_and_column_and_no_other() -> None:
    module, tokens = head(), values(1, 12, 6).requires_grad_(True)
    gradient = torch.autograd.grad(module(tokens, (3, 4))[0, 1 * 4 + 2].sum(), tokens)[0].view(3, 4, 6).abs().sum(-1)
    for y in range(3):
        for x in range(4):
            assert (gradient[y, x] > 0) == (y == 1 or x == 2), (y, x)


def test_dropout_is_on_the_input_and_only_in_training() -> None:
    module, tokens = head(dropout=0.5), values(2, 12, 6)
    expected = module(tokens, (3, 4))
    assert torch.equal(module(tokens, (3, 4)), expected)
    module.train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        got = module(tokens, (3, 4))
        torch.manual_seed(1)
        dropped = nn.functional.dropout(tokens, 0.5)
    assert not torch.allclose(got, expected, atol=1e-2)
    assert 0.2 < (dropped == 0).float().mean() < 0.8
    assert torch.allclose(got, literal(module, dropped, (3, 4), by_module), atol=1e-6)
    module.dropout.p = 0.0
    assert torch.equal(module(tokens, (3, 4)), expected)
    assert HVBiLSTM(4).dropout.p == 0.2


@pytest.mark.parametrize(("dim", "hidden"), [(768, 192), (16, 4), (6, 1), (2, 1)])
def test_default_size_of_the_output(dim: int, hidden: int) -> None:
    module = HVBiLSTM(dim)
    assert module.rows.hidden_size == module.columns.hidden_size == hidden and module.out_dim == 4 * hidden
    assert module(torch.rand(1, 2, dim), (1, 2)).shape == (1, 2, 4 * hidden)


def test_bilstm_of_no_image_is_empty() -> None:
    assert head()(torch.zeros(0, 12, 6), (3, 4)).shape == (0, 12, 4)


@pytest.mark.parametrize(("count", "grid"), [(13, (3, 4)), (11, (3, 4)), (12, (3, 3))])
def test_bilstm_refuses_another_grid(count: int, grid: Tuple[int, int]) -> None:
    message = f"`tokens` must hold h x w = {grid[0]} x {grid[1]} patches; got {count}. Leave class tokens out."
    with pytest.raises(ValueError, match=message):
        head()(torch.rand(1, count, 6), grid)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"dim": 0}, ValueError), ({"dim": 4.0}, TypeError), ({"dim": 4, "hidden": 0}, ValueError), ({"dim": True}, TypeError)],
)
def test_bilstm_refuses_other_sizes(options: Any, error: Any) -> None:
    with pytest.raises(error, match="`(dim|hidden)` must be"):
        HVBiLSTM(**options)


# ------------------------------------------------------------------------------------------------ classifier


def test_classifier_is_a_softmax_of_dot_products() -> None:
    module, tokens = PatchClassifier(5, 3), values(2, 4, 5)
    got = module(tokens)
    assert got.shape == (2, 4, 4) and got.dtype == torch.float32
    assert [name for name, _ in module.named_parameters()] == ["weight.weight"]  # no bias, as in the paper
    for b in range(2):
        for n in range(4):
            powers = [math.exp(sum(w * x for w, x in zip(row, tokens[b, n].tolist()))) for row in module.weight.weight.tolist()]
            for c in range(4):
                assert got[b, n, c].item() == pytest.approx(powers[c] / sum(powers), rel=1e-5)


def test_classifier_under_autocast_gives_float32() -> None:
    module, tokens = PatchClassifier(5, 3), values(2, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(tokens)
    assert got.dtype == torch.float32
    assert torch.allclose(got.sum(-1), torch.ones(2, 4), atol=1e-6)
    assert torch.allclose(got, module(tokens), atol=0.02)


# ------------------------------------------------------------------------------------------------ top-k


@pytest.mark.parametrize("k", [1, 2, 6, 7, 100])
def test_top_k_pool_equals_loop(k: int) -> None:
    scores = values(3, 7, 4).requires_grad_(True)
    got = top_k_pool(scores, k)
    total = 0 * scores.sum()
    weight = values(3, 4, seed=1)
    for b in range(3):
        for c in range(4):
            best = sorted((scores[b, n, c] for n in range(7)), reverse=True)[:k]
            mean = sum(best) / len(best)
            assert got[b, c].item() == pytest.approx(mean.item(), rel=1e-5, abs=1e-6)
            total = total + weight[b, c] * mean
    mine = torch.autograd.grad((weight * got).sum(), scores)[0]
    assert torch.allclose(mine, torch.autograd.grad(total, scores)[0], atol=1e-6)
    assert (mine != 0).sum() == 12 * min(k, 7)


def test_top_k_pool_of_all_is_the_mean_and_of_one_the_maximum() -> None:
    scores = scores_of(2, 9, 3)
    assert torch.allclose(top_k_pool(scores, 9), scores.mean(1))
    assert torch.equal(top_k_pool(scores, 1), scores.max(1).values)
    assert torch.equal(top_k_pool(scores, 50), top_k_pool(scores, 9))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_top_k_pool_passes_gradcheck(k: int) -> None:
    scores = values(2, 5, 3, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: top_k_pool(s, k), (scores,))


@given(st.integers(0, 1000), st.permutations(range(6)), st.integers(1, 7))
def test_top_k_pool_does_not_depend_on_the_order_of_patches(seed: int, order: List[int], k: int) -> None:
    scores = scores_of(2, 6, 3, seed=seed)
    assert torch.allclose(top_k_pool(scores[:, order], k), top_k_pool(scores, k), atol=1e-6)
    falling = [top_k_pool(scores, j) for j in (k, k + 1)]
    assert (falling[0] >= falling[1] - 1e-6).all()


@pytest.mark.parametrize("shape", [(2, 3), (2, 0, 3), (2, 3, 4, 5)])
def test_top_k_pool_refuses_other_shapes(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"`scores` must have shape \(B, N, C\) with N >= 1; got \("):
        top_k_pool(torch.rand(shape), 2)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_top_k_pool_refuses_other_k(k: Any, error: Any) -> None:
    with pytest.raises(error, match="`k` must be"):
        top_k_pool(torch.rand(1, 3, 2), k)


# ------------------------------------------------------------------------------------------------ confident patches

Chosen = Set[Tuple[int, int, int]]


def chosen(scores: Tensor, labels: Tensor, *options: Any) -> Chosen:
    image, patch, name = confident_patches(scores, labels, *options)
    assert image.shape == patch.shape == name.shape and image.ndim == 1
    assert image.dtype == patch.dtype == name.dtype == torch.int64
    found = list(zip(image.tolist(), patch.tolist(), name.tolist()))
    assert len(set(found)) == len(found)
    return set(found)


def check_by_loop(found: Chosen, scores: Tensor, labels: Tensor, threshold: float, per_class: int) -> None:
    """`found` is what a loop over images, patches and classes finds; which of several equal patches is left open."""
    for b, (image, present) in enumerate(zip(scores.tolist(), labels.tolist())):
        shown = [0, *(c + 1 for c, there in enumerate(present) if there)]
        wanted: Dict[int, List[Tuple[float, int]]] = {c: [] for c in shown}
        for n, patch in enumerate(image):
            best = max(shown, key=lambda c, patch=patch: patch[c])
            value = patch[best] / sum(patch[c] for c in shown)
            if value >= threshold:
                wanted[best].append((value, n))
        assert {c for i, _, c in found if i == b} == {c for c in shown if wanted[c]}
        for c in shown:
            taken = {n for i, n, name in found if (i, name) == (b, c)}
            assert taken <= {n for _, n in wanted[c]} and len(taken) == min(per_class, len(wanted[c]))
            best_values = sorted((value for value, _ in wanted[c]), reverse=True)[:per_class]
            assert sorted((value for value, n in wanted[c] if n in taken), reverse=True) == best_values


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize(("threshold", "per_class"), [(0.5, 8), (0.0, 2), (0.8, 1), (0.6, 100), (1.0, 3)])
def test_confident_patches_equal_loop(threshold: float, per_class: int, kind: torch.dtype) -> None:
    scores = scores_of(4, 20, 4)
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    found = chosen(scores, labels.to(kind), threshold, per_class)
    check_by_loop(found, scores, labels, threshold, per_class)
    if threshold < 1:  # an image without labels is all background, surely
        assert any(b == 0 and c > 0 for b, _, c in found)
        assert sum(b == 1 for b, _, _ in found) == min(per_class, 20)


@given(
    st.integers(0, 1000), st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=3),
    st.floats(0, 1), st.integers(1, 9),
)  # fmt: skip
def test_confident_patches_equal_loop_for_any_labels(
    seed: int, labels: List[List[bool]], threshold: float, per_class: int
) -> None:
    scores, target = scores_of(len(labels), 8, 4, seed=seed), torch.tensor(labels)
    found = chosen(scores, target, threshold, per_class)
    check_by_loop(found, scores, target, threshold, per_class)
    for b, n, c in found:
        assert c == 0 or target[b, c - 1]  # never a class that the image does not show
        assert 0 <= n < 8
    for b in range(len(labels)):
        for c in range(4):
            assert sum((b, c) == (image, name) for image, _, name in found) <= per_class


@given(st.integers(0, 1000), st.permutations(range(8)))
def test_confident_patches_do_not_depend_on_order(seed: int, order: List[int]) -> None:
    scores, labels = scores_of(2, 8, 4, seed=seed), torch.tensor([[1, 1, 0], [0, 1, 1]])
    moved = chosen(scores[:, order], labels, 0.4, 2)
    assert {(b, order[n], c) for b, n, c in moved} == chosen(scores, labels, 0.4, 2)
    swapped = chosen(scores.flip(0), labels.flip(0), 0.4, 2)
    assert {(1 - b, n, c) for b, n, c in swapped} == chosen(scores, labels, 0.4, 2)


def test_images_without_labels_give_background_only() -> None:
    scores = scores_of(2, 5, 3)
    assert chosen(scores, torch.zeros(2, 2)) == {(b, n, 0) for b in range(2) for n in range(5)}
    scores[..., 0] = 0  # not even background
    assert chosen(scores, torch.zeros(2, 2)) == set()


def test_the_threshold_applies_to_scores_scaled_to_the_present_classes() -> None:
    scores = torch.tensor([[[0.1, 0.3, 0.6], [0.2, 0.1, 0.7], [0.1, 0.2, 0.7]]])  # the absent class 2 has the most
    labels = torch.tensor([[1, 0]])
    assert chosen(scores, labels, 0.7) == {(0, 0, 1)}  # 0.3 / 0.4
    assert chosen(scores, labels, 0.66) == {(0, 0, 1), (0, 1, 0), (0, 2, 1)}  # 2 / 3 each
    assert chosen(scores, labels, 0.8) == set()


def test_per_class_keeps_the_best() -> None:
    own = torch.tensor([0.6, 0.9, 0.7, 0.8])
    scores = torch.stack([1 - own, own], dim=-1)[None]
    assert chosen(scores, torch.ones(1, 1), 0.5, 2) == {(0, 1, 1), (0, 3, 1)}
    assert chosen(scores, torch.ones(1, 1), 0.85, 2) == {(0, 1, 1)}


def test_confident_patches_keep_no_graph() -> None:
    scores = scores_of(2, 5, 3).requires_grad_(True)
    assert not any(part.requires_grad for part in confident_patches(scores, torch.ones(2, 2)))


def test_confident_patches_of_no_image_are_none() -> None:
    for scores, labels in ((torch.rand(0, 5, 3), torch.zeros(0, 2)), (torch.rand(2, 0, 3), torch.ones(2, 2))):
        assert chosen(scores, labels) == set()


@pytest.mark.parametrize(
    ("scores", "labels"), [((2, 5, 3), (2, 3)), ((2, 5, 3), (1, 2)), ((5, 3), (5, 2)), ((2, 5, 3), (2, 2, 1))]
)
def test_confident_patches_refuse_other_shapes(scores: Any, labels: Any) -> None:
    with pytest.raises(ValueError, match=r"`scores` must have shape \(B, N, C \+ 1\) and `labels` \(B, C\); got"):
        confident_patches(torch.rand(scores), torch.ones(labels))
