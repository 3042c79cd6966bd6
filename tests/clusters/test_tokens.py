"""Cluster tokens in hosts against the same blocks run by hand, and what the host sees while they are in it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, Callable, List, Optional, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function
from torch.utils.checkpoint import checkpoint

from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.clusters.tokens import ClusterTokens, find_blocks, token_size
from semples_plugin.errors import HostError
from tests.adapters.toy_hosts import (
    CLASSES,
    DEPTH,
    HEADS,
    WIDTH,
    Block,
    PatchEmbed,
    ToyCNN,
    ToyMCTformer,
    ToyTransCAM,
    ToyViT,
    ToyWeakTr,
    make_loader,
)

CLUSTERS = CategoryClusters({"vehicles": ["boat", "train"], "animals": ["bird"]}, CLASSES)
OFF = float("-inf")


# ------------------------------------------------------------------------------------------------ hosts

SOFTMAX = {
    "method": lambda x: x.softmax(dim=-1),
    "function": lambda x: F.softmax(x, dim=-1),
    "torch": lambda x: torch.softmax(x, -1),
    "module": nn.Softmax(dim=-1),
}


class TimmAttention(nn.Module):
    """Attention as timm writes it, with any way of calling the softmax, or fused."""

    def __init__(self, way: str):
        super().__init__()
        self.way, self.qkv, self.proj = way, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        q = 4 * q  # attention that is far from uniform
        if self.way == "fused":
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        elif self.way == "masked":
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(count, count, dtype=torch.bool))
        elif self.way == "causal":
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            x = SOFTMAX[self.way](q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, count, width))


class TimmBlock(nn.Module):
    def __init__(self, way: str):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), TimmAttention(way), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    """The layout of timm's VisionTransformer: one class token, `blocks` a Sequential, `embed_dim`."""

    def __init__(self, way: str = "method", num_classes: int = 3):
        super().__init__()
        self.embed_dim = WIDTH
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch_embed = PatchEmbed()
            self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 17, WIDTH))
            self.blocks = nn.Sequential(*[TimmBlock(way) for _ in range(DEPTH)])
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class Trunk(nn.Module):
    """Blocks alone; `call` says how each is called."""

    def __init__(self, blocks: List[nn.Module], call: Optional[Callable[[nn.Module, Tensor], Any]] = None):
        super().__init__()
        self.blocks, self.call = nn.ModuleList(blocks), call or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = self.call(block, x)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Checkpointed(ToyMCTformer):
    """Runs its blocks from number `first` on in checkpoints."""

    reentrant, first = False, 0

    def walk(self, img: Tensor) -> Tuple[List[Tensor], Tensor, List[Tensor], Tensor]:
        x = self.patch_embed(img)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x + self.pos_embed], dim=1)
        stages, attention = [], []
        for i, block in enumerate(self.blocks):
            x, weights = block(x) if i < self.first else checkpoint(block, x, use_reentrant=self.reentrant)
            stages.append(x[:, : self.num_classes])
            attention.append(weights)
        patches = x[:, self.num_classes :].transpose(1, 2).reshape(len(x), -1, 4, 4)
        return stages, patches, attention, self.head(patches)


HOSTS = {
    "mctformer": ToyMCTformer,
    "weaktr": ToyWeakTr,
    "vit": ToyViT,
    **{f"timm {way}": (lambda way=way: TimmViT(way)) for way in (*SOFTMAX, "fused")},
}


def flat(value: Any) -> List[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def batch(seed: int = 0) -> Tuple[Tensor, Tensor]:
    return make_loader(seed=seed)[0]


def host_loss(output: Any, labels: Tensor) -> Tensor:
    """Every output of the host counts."""
    return sum(((k + 1) * out.float().square()).mean() for k, out in enumerate(flat(output))) + F.multilabel_soft_margin_loss(
        flat(output)[0], labels
    )


def gradients(module: nn.Module) -> dict:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def trunk_tokens(count: int = 7, images: int = 2) -> Tensor:
    return torch.randn(images, count, WIDTH, generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------ what the tokens do


@pytest.mark.parametrize("host", HOSTS)
def test_minus_infinity_leaves_the_host_as_it_is_and_zero_does_not(host: str) -> None:
    img, labels = batch()
    outputs, grads = {}, {}
    for bias in (None, OFF, 0.0, -4.0):
        model = HOSTS[host]()
        if bias is None:
            output = model(img)
            host_loss(output, labels).backward()
        else:
            tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
            with torch.no_grad():
                tokens.tokens.mul_(50)
            with tokens.insert(model):
                output = model(img)
                host_loss(output, labels).backward()
            if bias == OFF:
                assert tokens.tokens.grad is None or not tokens.tokens.grad.any()
            else:
                assert tokens.tokens.grad.abs().max() > 1e-6
        outputs[bias], grads[bias] = flat(output), gradients(model)
    assert all(value.abs().max() > 0 for value in grads[None].values() if value is not None)
    for mine, reference in zip(outputs[OFF], outputs[None]):
        assert mine.shape == reference.shape and torch.allclose(mine, reference, atol=1e-6)
    for name, reference in grads[None].items():
        if reference is not None:
            assert torch.allclose(grads[OFF][name], reference, rtol=1e-4, atol=1e-6), name
    moved = {b: max((m - r).abs().max().item() for m, r in zip(outputs[b], outputs[None])) for b in (0.0, -4.0)}
    assert moved[0.0] > 1e-3
    assert 1e-5 < moved[-4.0] < moved[0.0]


@pytest.mark.parametrize("bias", [0.0, OFF, -2.0])
@pytest.mark.parametrize("host", HOSTS)
def test_gradients_of_the_tokens_loss_reach_tokens_and_host(host: str, bias: float) -> None:
    img, labels = batch()
    model = HOSTS[host]()
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
    with tokens.insert(model):
        model(img)
        loss = tokens.loss(labels)
    assert loss.shape == () and loss.dtype == torch.float32
    loss.backward()
    for name, parameter in tokens.named_parameters():
        assert parameter.grad.flatten(1).abs().max(1).values.min() > 0 if parameter.ndim > 1 else parameter.grad.all(), name
    assert tokens.tokens.grad[0].abs().max(1).values.min() > 1e-6  # every cluster's
    before = ("patch_embed.", "cls_token", "pos_embed", "blocks.")
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(before), name
        if name.startswith(before):
            assert parameter.grad.abs().max() > 0, name


def by_hand(model: Any, x: Tensor, tokens: Tensor) -> Tuple[List[Any], Tensor]:
    """The blocks' outputs with the tokens concatenated once, in front of the first, and carried on by the blocks themselves."""
    x = torch.cat([x, tokens.expand(len(x), -1, -1)], dim=1)
    outs = []
    for block in model.blocks:
        out = block(x)
        outs.append(out)
        x = out[0] if isinstance(out, tuple) else out
    return outs, x


@pytest.mark.parametrize("host", ["mctformer", "weaktr"])
def test_outputs_equal_the_blocks_run_by_hand(host: str) -> None:
    img, labels = batch()
    model = HOSTS[host]().eval()
    tokens = ClusterTokens(CLUSTERS, model)
    with tokens.insert(model):
        logits, *rest = model(img)
        output = tokens.pop_output()
    x = model.patch_embed(img) + model.pos_embed
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], dim=1)  # (2, 19, D)
    outs, last = by_hand(model, x, tokens.tokens)
    assert last.shape == (2, 21, WIDTH)
    maps = model.head(last[:, 3:19].transpose(1, 2).reshape(2, WIDTH, 4, 4))
    assert torch.allclose(output, last[:, 19:], atol=1e-6)
    assert torch.allclose(logits, last[:, :3].mean(-1), atol=1e-6)
    if host == "mctformer":
        assert torch.allclose(rest[0], torch.stack([out[0][:, :3] for out in outs]), atol=1e-6)
        assert torch.allclose(rest[1], maps.mean((2, 3)), atol=1e-6)
        with tokens.insert(model):
            _, cams, attention = model(img, return_att=True, n_layers=DEPTH)
        mean = torch.stack([out[1] for out in outs]).mean(2)  # (blocks, B, N + K, N + K)
        assert torch.allclose(attention, mean[:, :, 3:19, 3:19], atol=1e-6)
        fused = mean.mean(0)[:, :3, 3:19].reshape(maps.shape) * maps.relu()
        assert torch.allclose(cams, fused.sqrt(), atol=1e-5)
    else:
        assert torch.allclose(rest[0], maps.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("host", [h for h in HOSTS if h.startswith(("vit", "timm"))])
def test_equals_the_blocks_run_by_hand_in_a_sequential(host: str) -> None:
    img, _ = batch()
    model = HOSTS[host]().eval()
    tokens = ClusterTokens(CLUSTERS, model, seed=4)
    with tokens.insert(model):
        logits = model(img)
        output = tokens.pop_output()
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(img)], dim=1)
    x = x + getattr(model, "pos_embed", 0)
    _, last = by_hand(model, x, tokens.tokens)
    assert torch.allclose(logits, model.head(model.norm(last)[:, 0]), atol=1e-6)
    assert torch.allclose(output, last[:, 17:], atol=1e-6)


@pytest.mark.parametrize("way", ["method", "fused"])
@pytest.mark.parametrize("bias", [-1.5, OFF, 2.0])
def test_bias_is_added_from_host_tokens_to_cluster_tokens_only(way: str, bias: float) -> None:
    """One block by hand, a query at a time."""
    model = Trunk([TimmBlock(way)])
    tokens = ClusterTokens(CLUSTERS, WIDTH, attention_bias=bias)
    x = trunk_tokens(5)
    with tokens.insert(model), torch.no_grad():
        got = torch.cat([model(x), tokens.pop_output()], dim=1)
    block: Any = model.blocks[0]
    with torch.no_grad():
        full = torch.cat([x, tokens.tokens.expand(2, -1, -1)], dim=1)  # (2, 7, D)
        q, k, v = block.attn.qkv(block.norm1(full)).view(2, 7, 3, HEADS, -1).unbind(2)  # (2, 7, heads, d)
        mixed = torch.zeros(2, 7, HEADS, WIDTH // HEADS)
        for b in range(2):
            for h in range(HEADS):
                for i in range(7):
                    logits = [4 * float(q[b, i, h] @ k[b, j, h]) / 2 + (bias if i < 5 <= j else 0) for j in range(7)]
                    powers = [math.exp(value) for value in logits]
                    mixed[b, i, h] = sum(p * v[b, j, h] for j, p in enumerate(powers)) / sum(powers)
        full = full + block.attn.proj(mixed.flatten(2))
        full = full + block.mlp(block.norm2(full))
    assert torch.allclose(got, full, atol=1e-5)


def test_softmax_outside_the_blocks_is_unchanged() -> None:
    model = Trunk([TimmBlock("method")])
    tokens = ClusterTokens(CLUSTERS, WIDTH, attention_bias=OFF)
    square = torch.randn(2, 7, 7)
    with tokens.insert(model):
        model(trunk_tokens(5))
        assert torch.equal(square.softmax(-1), F.softmax(square, dim=-1)) and (square.softmax(-1) > 0).all()


# ------------------------------------------------------------------------------------------------ the loss


def test_loss_equals_the_formula_on_cluster_labels() -> None:
    tokens = ClusterTokens(CLUSTERS, WIDTH, seed=3)
    with torch.no_grad():
        tokens.bias.copy_(torch.tensor([0.3, -0.2]))
        tokens.weight.mul_(30)
        tokens.norm.weight.add_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))
    output = torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]])
    cluster_labels = [[1, 0], [0, 1], [1, 1], [0, 0]]  # vehicles, animals
    total = 0.0
    for b in range(4):
        for k in range(2):
            t = output[b, k]
            unit = (t - t.mean()) / (t.var(unbiased=False) + 1e-5).sqrt()
            unit = unit * tokens.norm.weight + tokens.norm.bias
            logit = ((tokens.weight[k] * unit).sum() + tokens.bias[k]).item()
            assert tokens.logits(output)[b, k].item() == pytest.approx(logit, abs=1e-5)
            chance = 1 / (1 + math.exp(-logit))
            total -= math.log(chance) if cluster_labels[b][k] else math.log(1 - chance)
    for kind in (torch.int64, torch.float32, torch.bool):
        assert tokens.loss(labels.to(kind), output).item() == pytest.approx(total / 8, rel=1e-5)


def test_a_few_steps_lower_the_loss() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    tokens = ClusterTokens(CLUSTERS, model)
    optimizer = torch.optim.Adam([*model.parameters(), *tokens.parameters()], lr=0.02)
    seen = []
    for _ in range(12):
        with tokens.insert(model):
            model(img)
            loss = tokens.loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_initial_values_come_from_the_seed_alone() -> None:
    def state(seed: int) -> dict:
        return ClusterTokens(CLUSTERS, WIDTH, seed=seed).state_dict()

    first = state(0)
    torch.manual_seed(99)
    assert all(torch.equal(value, first[name]) for name, value in state(0).items())
    assert not torch.equal(state(1)["tokens"], first["tokens"])
    before = torch.get_rng_state()
    ClusterTokens(CLUSTERS, WIDTH)
    assert torch.equal(torch.get_rng_state(), before)
    assert first["tokens"].shape == (1, 2, WIDTH) and set(first) == {"tokens", "weight", "bias", "norm.weight", "norm.bias"}


# ------------------------------------------------------------------------------------------------ what the host sees


@pytest.mark.parametrize("bias", [0.0, OFF])
def test_the_host_sees_its_own_number_of_tokens(bias: float) -> None:
    img, _ = batch()
    model = ToyWeakTr()
    shapes: List[Any] = []
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
    with tokens.insert(model):
        handles = [b.register_forward_hook(lambda m, i, o: shapes.append([tuple(t.shape) for t in o])) for b in model.blocks]
        _, cams, attention = model(img, return_att=True)
        for handle in handles:
            handle.remove()
    assert shapes == [[(2, 19, WIDTH), (2, HEADS, 19, 19), (2, 19, WIDTH)]] * DEPTH
    assert cams.shape == (2, 3, 4, 4) and attention.shape == (2, 16, 16)
    mct = ToyMCTformer()
    with ClusterTokens(CLUSTERS, mct, attention_bias=bias).insert(mct):
        assert mct(img, return_att=True)[2].shape == (DEPTH, 2, 16, 16)


def test_hooks_that_the_host_had_before_see_its_own_tokens_too() -> None:
    """Many hosts collect attention or features by hooks that they register when they are built."""
    img, _ = batch()
    model = ToyMCTformer()
    shapes: List[Any] = []
    inputs: List[Any] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda m, i: inputs.append(tuple(i[0].shape)))
        block.register_forward_hook(lambda m, i, o: shapes.append([tuple(t.shape) for t in o]))
    with ClusterTokens(CLUSTERS, model).insert(model):
        model(img)
    assert inputs == [(2, 19, WIDTH)] * DEPTH
    assert shapes == [[(2, 19, WIDTH), (2, HEADS, 19, 19)]] * DEPTH


def test_attention_without_tokens_keeps_its_scale() -> None:
    """Rows of what the host gets sum to less than 1: what went to the cluster tokens is missing."""
    img, _ = batch()
    model = ToyMCTformer().eval()
    rows = {}
    for bias in (0.0, OFF):
        seen: List[Tensor] = []
        with ClusterTokens(CLUSTERS, model, attention_bias=bias).insert(model):
            handle = model.blocks[-1].register_forward_hook(lambda m, i, o, seen=seen: seen.append(o[1]))
            model(img)
            handle.remove()
        rows[bias] = seen[0].sum(-1)
    assert (rows[0.0] < 1).all() and rows[0.0].mean() < 0.99
    assert torch.allclose(rows[OFF], torch.ones_like(rows[OFF]), atol=1e-6)


def test_what_a_block_returns_keeps_its_type() -> None:
    from collections import namedtuple

    Named = namedtuple("Named", "tokens attention extra none scale")

    class Rich(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block("attention")

        def forward(self, x: Tensor) -> Any:
            x, attention = self.inner(x)
            return Named(x, attention, {"a": 1}, None, torch.tensor(2.0))

    model = Trunk([Rich(), Rich()])
    kept: List[Any] = []
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        handle = model.blocks[0].register_forward_hook(lambda m, i, o: kept.append(o))
        model(trunk_tokens())
        handle.remove()
    assert type(kept[0]) is Named and kept[0].tokens.shape == (2, 7, WIDTH) and kept[0].attention.shape == (2, HEADS, 7, 7)
    assert kept[0].extra == {"a": 1} and kept[0].none is None and kept[0].scale.item() == 2


def test_state_dict_is_the_hosts_own() -> None:
    model, fresh = ToyMCTformer(seed=0), ToyMCTformer(seed=1)
    tokens = ClusterTokens(CLUSTERS, model)
    names, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    modules = [name for name, _ in model.named_modules()]
    with tokens.insert(model):
        assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == parameters
        assert [name for name, _ in model.named_modules()] == modules
        fresh.load_state_dict(model.state_dict(), strict=True)  # inside -> outside
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
        model.load_state_dict(ToyMCTformer(seed=2).state_dict(), strict=True)  # outside -> inside
        model(batch()[0])
    assert list(model.state_dict()) == names
    assert torch.equal(model.cls_token, ToyMCTformer(seed=2).cls_token)
    other = ClusterTokens(CLUSTERS, WIDTH, seed=7)
    other.load_state_dict(tokens.state_dict(), strict=True)
    assert torch.equal(other.tokens, tokens.tokens)


# ------------------------------------------------------------------------------------------------ coming and going


def assert_nothing_left(model: nn.Module, img: Tensor, expected: List[Tensor]) -> None:
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not any("cluster" in name or name == "forward" for name in vars(module))
    assert not has_torch_function((torch.ones(1),))
    assert all(torch.equal(a, b) for a, b in zip(flat(model(img)), expected))


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_nothing_is_left_after_the_with(bias: float) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    expected = flat(model(img))
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
    for _ in range(2):
        with tokens.insert(model):
            assert not torch.equal(flat(model(img))[0], expected[0])
            tokens.loss(labels).backward()
            model(img)
            assert tokens.output is not None
        assert tokens.output is None
        model.zero_grad()
        assert_nothing_left(model, img, expected)


class Wrong(Exception):
    pass


@pytest.mark.parametrize("where", ["with", "block", "first block"])
@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_nothing_is_left_after_an_exception(bias: float, where: str) -> None:
    img, _ = batch()
    model = ToyMCTformer()
    expected = flat(model(img))
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)

    def fail(*_: Any) -> None:
        raise Wrong

    with pytest.raises(Wrong):
        with tokens.insert(model):
            reference = flat(model(img))
            if where == "with":
                raise Wrong
            handle = model.blocks[0 if where == "first block" else 1].norm.register_forward_hook(fail)
            try:
                model(img)
            except Wrong:  # a host that goes on after a failed batch
                handle.remove()
                assert all(torch.equal(a, b) for a, b in zip(flat(model(img)), reference))
                raise
    assert_nothing_left(model, img, expected)


def test_a_bias_changes_nothing_outside_after_a_block_failed() -> None:
    model = Trunk([TimmBlock("method")])
    tokens = ClusterTokens(CLUSTERS, WIDTH, attention_bias=OFF)
    with tokens.insert(model):
        handle = model.blocks[0].norm2.register_forward_hook(lambda *_: (_ for _ in ()).throw(Wrong()))
        with pytest.raises(Wrong):
            model(trunk_tokens(5))
        handle.remove()
        assert (torch.zeros(2, 7, 7).softmax(-1) > 0).all()


def test_nested_insertions_are_refused() -> None:
    model = ToyViT()
    first, second = ClusterTokens(CLUSTERS, model), ClusterTokens(CLUSTERS, model, attention_bias=-1.0)
    img, _ = batch()
    expected = flat(model(img))
    insertion = first.insert(model)
    with insertion:
        inside = flat(model(img))
        with pytest.raises(
            HostError, match="ToyViT holds cluster tokens or a cluster branch already; leave that `with` first."
        ):
            with second.insert(model):
                pass
        with pytest.raises(HostError, match="These cluster tokens are in the host already; use one `with` at a time."):
            with insertion:
                pass
        assert all(torch.equal(a, b) for a, b in zip(flat(model(img)), inside))
    assert_nothing_left(model, img, expected)
    with second.insert(model):
        model(img)
    assert_nothing_left(model, img, expected)


def test_each_forward_pass_has_its_own_tokens() -> None:
    model = ToyMCTformer()
    tokens = ClusterTokens(CLUSTERS, model)
    first, second = batch(0)[0], batch(1)[0][:1]
    with tokens.insert(model):
        model(first)
        own = tokens.pop_output()
        assert tokens.output is None
        with pytest.raises(HostError, match="There are no cluster tokens to read"):
            tokens.pop_output()
        model(first)
        model(second)
        last = tokens.pop_output()
        assert own.shape == (2, 2, WIDTH) and last.shape == (1, 2, WIDTH)
        model(second)
        assert torch.equal(tokens.pop_output(), last)
        model(first)
        assert torch.equal(tokens.pop_output(), own)
        loss = tokens.loss(batch()[1], own) + tokens.loss(batch()[1][:1], last)  # both passes
    loss.backward()
    assert torch.isfinite(tokens.tokens.grad).all()


def test_inference_gives_the_same_tokens_without_gradients() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=-1.0)
    with tokens.insert(model):
        expected = flat(model(img))
        reference = tokens.pop_output()
        with torch.no_grad():
            got = flat(model.eval()(img))
            output = tokens.pop_output()
        assert not output.requires_grad and not any(t.requires_grad for t in got)
        assert torch.equal(output, reference) and all(torch.equal(a, b) for a, b in zip(got, expected))
        with torch.inference_mode():
            assert torch.equal(model(img)[0], expected[0])
        model.train()(img)  # and with gradients again
        tokens.loss(labels).backward()
    assert tokens.tokens.grad.abs().max() > 0


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_after_a_forward_pass_hold_no_output_and_give_the_same_loss(way: str) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=OFF)
    with tokens.insert(model):
        model(img)
        assert tokens.output is not None and tokens.output.requires_grad
        other = copy.deepcopy(tokens) if way == "copy" else pickle.loads(pickle.dumps(tokens))
        assert other.output is None and other.clusters == tokens.clusters and other.attention_bias == OFF
        expected = tokens.loss(labels)
    assert other.tokens is not tokens.tokens and torch.equal(other.tokens, tokens.tokens)
    with other.insert(model):
        model(img)
        assert other.loss(labels).item() == expected.item()


@pytest.mark.parametrize("bias", [0.0, -3.0])
@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_a_copy_of_the_host_is_the_host_without_tokens(way: str, bias: float) -> None:
    """Training loops copy the best model, or save it whole, while the tokens are in it."""
    img, labels = batch()
    model = ToyMCTformer()
    expected = flat(model(img))
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
    with tokens.insert(model):
        inside = flat(model(img))
        other = copy.deepcopy(model) if way == "copy" else pickle.loads(pickle.dumps(model))
        assert all(torch.equal(a, b) for a, b in zip(flat(other(img)), expected))
        assert all(torch.equal(a, b) for a, b in zip(flat(model(img)), inside))
        tokens.loss(labels).backward()
    assert all(torch.equal(a, b) for a, b in zip(flat(other(img)), expected))
    assert other.cls_token.grad is None
    with tokens.insert(other):
        assert all(torch.equal(a, b) for a, b in zip(flat(other(img)), inside))


# ------------------------------------------------------------------------------------------------ checkpointing


def checkpointed_step(first: int, bias: float, reentrant: bool = False, passes: int = 1) -> Any:
    """Loss and gradients of host and tokens, with the blocks from number `first` on in checkpoints."""
    model = Checkpointed()
    model.first, model.reentrant = first, reentrant
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
    loss: Any = 0
    with tokens.insert(model):
        for k in range(passes):
            img, labels = batch(k)
            loss = loss + host_loss(model(img), labels) + tokens.loss(labels)
        loss.backward()
        assert tokens.output is None  # running the blocks again leaves nothing to be taken for a new pass
    return loss.item(), gradients(model), gradients(tokens)


def assert_same_step(got: Any, expected: Any) -> None:
    assert got[0] == expected[0]
    for mine, reference in zip(got[1:], expected[1:]):
        for name, value in reference.items():
            assert torch.allclose(mine[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("bias", [0.0, -1.0, OFF])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_checkpointing_gives_the_same_gradients(first: int, bias: float) -> None:
    got, expected = checkpointed_step(first, bias), checkpointed_step(DEPTH, bias)
    assert_same_step(got, expected)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_checkpointing_of_two_passes_gives_the_same_gradients(first: int) -> None:
    """Each pass is run again with its own tokens, not with those of the last one."""
    got, expected = checkpointed_step(first, 0.0, passes=2), checkpointed_step(DEPTH, 0.0, passes=2)
    assert_same_step(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [0, 1, 2])
def test_reentrant_checkpointing_is_refused(first: int) -> None:
    with pytest.raises(HostError, match=rf"Block {first} of Checkpointed runs without gradients inside a pass with gradients"):
        checkpointed_step(first, 0.0, reentrant=True)


# ------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("bias", [0.0, -2.0, OFF])
@pytest.mark.parametrize("host", HOSTS)
def test_outputs_under_bfloat16_autocast_are_close_to_float32(host: str, bias: float) -> None:
    img, labels = batch()
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = HOSTS[host]()
        tokens = ClusterTokens(CLUSTERS, model, attention_bias=bias)
        with tokens.insert(model):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
                outputs = flat(model(img))
                loss = tokens.loss(labels)
            loss.backward()
        assert loss.dtype == torch.float32 and tokens.tokens.grad.dtype == torch.float32
        assert torch.isfinite(tokens.tokens.grad).all() and tokens.tokens.grad.any()
        results[dtype] = (loss.item(), [out.float() for out in outputs])
    assert results[torch.bfloat16][0] == pytest.approx(results[torch.float32][0], rel=0.02)
    for mine, reference in zip(results[torch.bfloat16][1], results[torch.float32][1]):
        assert torch.allclose(mine, reference, atol=0.25)


def test_a_host_in_bfloat16_gets_tokens_in_bfloat16() -> None:
    img, labels = batch()
    model = ToyViT().to(torch.bfloat16)
    tokens = ClusterTokens(CLUSTERS, model, attention_bias=-1.0)
    with tokens.insert(model):
        assert model(img.to(torch.bfloat16)).dtype == torch.bfloat16
        loss = tokens.loss(labels)
    loss.backward()
    assert loss.dtype == tokens.tokens.grad.dtype == torch.float32 and tokens.tokens.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ what is refused


class Takes(nn.Module):
    """A block that may be given something else beside the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block("tokens")

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.inner(x)


def refuse_extra(call: Any, got: str) -> None:
    model = Trunk([Takes(), Takes()], call)
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        with pytest.raises(
            HostError, match=rf"block 0 of Trunk to be called with tokens \(B, N, 8\) and no other tensor; got {got}"
        ):
            model(trunk_tokens())


def test_other_tensors_for_the_blocks_are_refused() -> None:
    refuse_extra(lambda block, x: block(x, torch.ones(7, 7)), r"tensor \(2, 7, 8\), tensor \(7, 7\)\.")


def test_other_tensors_by_keyword_are_refused() -> None:
    refuse_extra(lambda block, x: block(x, mask=torch.ones(7, 7)), r"tensor \(2, 7, 8\), tensor \(7, 7\)\.")


def test_arguments_that_are_no_tensors_are_accepted() -> None:
    x = trunk_tokens()
    for call in (lambda block, x: block(x, None), lambda block, x: block(x, mask=None), lambda block, x: block(x, "flag")):
        model = Trunk([Takes(), Takes()], call)
        tokens = ClusterTokens(CLUSTERS, WIDTH)
        with tokens.insert(model):
            assert model(x).shape == x.shape
            assert tokens.pop_output().shape == (2, 2, WIDTH)


@pytest.mark.parametrize("x", [torch.rand(2, 2, 4, WIDTH), torch.rand(7, WIDTH)])
def test_other_inputs_of_the_blocks_are_refused(x: Tensor) -> None:
    model = Trunk([nn.Identity()])
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        with pytest.raises(HostError, match=r"block 0 of Trunk to be called with tokens \(B, N, 8\) and no other tensor; got"):
            model(x)


def test_tokens_of_another_size_are_refused() -> None:
    model = Trunk([nn.Identity()])
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        with pytest.raises(HostError, match="The tokens of Trunk have size 9, those of the cluster tokens 8. Make them for it"):
            model(torch.rand(2, 7, WIDTH + 1))


@pytest.mark.parametrize(
    ("gives", "got"),
    [
        (lambda x: x[:, 1:], r"tensor \(2, 8, 8\)"),
        (lambda x: x.flatten(1), r"tensor \(2, 72\)"),
        (lambda x: {"x": x}, "dict"),
        (lambda x: ("a", x), "str"),
    ],
)
def test_other_outputs_of_the_blocks_are_refused(gives: Any, got: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return gives(x)

    model = Trunk([Odd()])
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        with pytest.raises(HostError, match=rf"block 0 of Trunk to return its 9 tokens .* first in a tuple; got {got}\."):
            model(trunk_tokens())


@pytest.mark.parametrize("way", ["none", "masked", "causal"])
def test_a_bias_without_attention_to_add_it_to_is_refused(way: str) -> None:
    model = Trunk([nn.Linear(WIDTH, WIDTH)] if way == "none" else [TimmBlock(way)])
    with ClusterTokens(CLUSTERS, WIDTH, attention_bias=-4.0).insert(model):
        message = "attention_bias=-4.0 was asked for, but no softmax" if way == "none" else "The host masks its attention"
        with pytest.raises(HostError, match=f"{message}.*Use attention_bias=0."):
            model(trunk_tokens())
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        assert model(trunk_tokens()).shape == (2, 7, WIDTH)


def test_as_many_tokens_as_their_size_is_ambiguous() -> None:
    model = Trunk([Block("features")])
    tokens = ClusterTokens(CLUSTERS, WIDTH)
    with tokens.insert(model):
        with pytest.raises(
            HostError, match=r"Trunk returns a tensor \(2, 8, 8\), and 8 is both the number of tokens and their size"
        ):
            model(trunk_tokens(WIDTH - 2))
        assert model(trunk_tokens(WIDTH - 3)).shape == (2, WIDTH - 3, WIDTH)
    plain = Trunk([Block("attention")])  # (B, heads, N, N) is clear
    with tokens.insert(plain):
        assert plain(trunk_tokens(WIDTH - 2)).shape == (2, WIDTH - 2, WIDTH)


@pytest.mark.parametrize("order", [[1], [0, 2], [0, 0], [2, 1, 0]])
def test_blocks_that_do_not_run_one_after_the_other_are_refused(order: List[int]) -> None:
    class Skips(Trunk):
        def forward(self, x: Tensor) -> Tensor:
            for i in order:
                x = self.blocks[i](x)
            return x

    tokens = ClusterTokens(CLUSTERS, WIDTH)
    model = Skips([Block("tokens") for _ in range(3)])
    with tokens.insert(model):
        if order == [0, 0]:  # never gets to the last
            model(trunk_tokens())
            with pytest.raises(HostError, match="no forward pass of the host ran to its last block"):
                tokens.pop_output()
        else:
            with pytest.raises(HostError, match=rf"Block {max(order[0], order[-1])} of Skips ran on 2 images, but block"):
                model(trunk_tokens())


def test_a_replica_is_refused() -> None:
    model = Trunk([Block("tokens")])
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        model.blocks[0]._is_replica = True  # type: ignore[assignment]
        with pytest.raises(HostError, match="cannot be put into replicas of torch.nn.DataParallel"):
            model(trunk_tokens())


@pytest.mark.parametrize(
    ("model", "what", "names"),
    [
        (ToyCNN(), "there is none", "'body', 'dropout', 'fc'"),
        (ToyTransCAM(), "there is none", "'stem', 'trans_block', 'conv_cls_head', 'trans_cls_head'"),
        (nn.ReLU(), "there is none", "none"),
        (Trunk([]), "it is a ModuleList", "'blocks'"),
    ],
)
def test_a_host_without_blocks_is_refused_with_what_it_has(model: nn.Module, what: str, names: str) -> None:
    message = rf"blocks 'blocks' in {type(model).__name__}, but {what}. Its modules are {names}. "
    message += "If it is a plain vision transformer, name the list: blocks="
    with pytest.raises(HostError, match=message):
        ClusterTokens(CLUSTERS, WIDTH).insert(model)
    with pytest.raises(HostError, match=message):
        ClusterTokens(CLUSTERS, model)


def test_the_blocks_may_have_another_name() -> None:
    model = ToyTransCAM()
    model.encoder = nn.Module()
    model.encoder.layers = nn.ModuleList([model.trans_block])
    assert find_blocks(model, "encoder.layers") == [model.trans_block]
    tokens = ClusterTokens(CLUSTERS, WIDTH, blocks="encoder.layers")
    with tokens.insert(model):
        model("transcam", batch()[0])
        assert tokens.pop_output().shape == (2, 2, WIDTH)
    with pytest.raises(HostError, match="'stem' in ToyTransCAM, but it is a Conv2d"):
        model.stem = nn.Conv2d(3, 8, 8)
        find_blocks(model, "stem")


def test_the_size_of_a_token_is_read_from_the_host() -> None:
    assert token_size(TimmViT()) == token_size(ToyMCTformer()) == token_size(nn.DataParallel(ToyViT())) == WIDTH
    model = Trunk([Block("tokens")])
    with pytest.raises(HostError, match="The size of a token of Trunk could not be read from `embed_dim`, `cls_token`"):
        token_size(model)
    model.pos_embed = nn.Parameter(torch.zeros(1, 7, 12))
    assert token_size(model) == 12 and ClusterTokens(CLUSTERS, model).tokens.shape == (1, 2, 12)


@pytest.mark.parametrize("bias", [float("inf"), float("nan")])
def test_other_biases_are_refused(bias: float) -> None:
    with pytest.raises(ValueError, match="`attention_bias` must be a number or -inf; got"):
        ClusterTokens(CLUSTERS, WIDTH, attention_bias=bias)


def test_clusters_must_be_clusters() -> None:
    with pytest.raises(TypeError, match="`clusters` must be CategoryClusters; got dict."):
        ClusterTokens({"vehicles": ["boat"]}, WIDTH)  # type: ignore[arg-type]


def test_attention_in_nested_outputs_loses_the_tokens_too() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block("attention")

        def forward(self, x: Tensor) -> Any:
            x, weights = self.block(x)
            return x, [weights, {"again": weights}], (None, weights.mean(1))

    model = nn.Module()
    model.blocks = nn.ModuleList([Nested()])
    x = torch.rand(2, 5, WIDTH)
    with ClusterTokens(CLUSTERS, WIDTH).insert(model):
        tokens, (weights, again), (nothing, mean) = model.blocks[0](x)
    assert tokens.shape == x.shape and nothing is None
    assert weights.shape == again["again"].shape == (2, 2, 5, 5) and mean.shape == (2, 5, 5)


@pytest.mark.parametrize("options", [{"dim": "8"}, {"dim": 8.0}, {"dim": 8, "attention_bias": "x"}])
def test_arguments_of_another_type_are_refused(options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="`dim` must be a whole number|`attention_bias` must be a number"):
        ClusterTokens(CLUSTERS, **options)


def test_labels_of_another_shape_are_refused() -> None:
    tokens = ClusterTokens(CLUSTERS, WIDTH)
    with pytest.raises(ValueError, match=r"`labels` must have shape \(B, 3\), one column per class; got \(2, 2\)."):
        tokens.loss(torch.ones(2, 2), torch.rand(2, 2, WIDTH))
