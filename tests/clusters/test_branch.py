"""The composed branch: its terms by hand, what it reads from hosts of several layouts, and how it trains with them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import pickle
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils import checkpoint as checkpointing

from semples_plugin.clusters.branch import ClusterBranch, HostTokens
from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.clusters.heads import confident_patches
from semples_plugin.clusters.losses import patch_contrast
from semples_plugin.errors import ClusterError, HostError
from tests.adapters.toy_hosts import CLASSES, PATCH, WIDTH, Block, ToyCNN, ToyMCTformer, ToyViT, ToyWeakTr, make_loader

CLUSTERS = CategoryClusters({"vehicles": ["boat", "train"], "animals": ["bird"]}, CLASSES)
HOSTS: Dict[str, Callable[[], Any]] = {"mctformer": ToyMCTformer, "weaktr": ToyWeakTr, "vit": ToyViT}


def batch(seed: int = 0, size: Tuple[int, int] = (32, 32)) -> Tuple[Tensor, Tensor]:
    return make_loader(seed=seed, size=size)[0]


def sure(branch: ClusterBranch) -> ClusterBranch:
    """The same branch with a classifier that is sure of some patches, and less alike tokens."""
    with torch.no_grad():
        if branch.classifier is not None:
            branch.classifier.weight.weight.mul_(8)
        if branch.tokens is not None:
            branch.tokens.weight.mul_(20)
    return branch


def look(branch: ClusterBranch, model: nn.Module, img: Tensor) -> HostTokens:
    with branch.insert(model):
        model(img)
        return branch.pop_tokens()


# ------------------------------------------------------------------------------------------------ terms and loss

WEIGHTS = {
    "all": ({}, ["cluster_tokens", "mce", "patch_contrast"]),
    "tokens": ({"lambda_mce": 0, "lambda_contrast": 0}, ["cluster_tokens"]),
    "patches": ({"lambda_tokens": 0, "lambda_contrast": 0}, ["mce"]),
    "no tokens": ({"lambda_tokens": 0}, ["mce", "patch_contrast"]),
    "no contrast": ({"lambda_contrast": 0}, ["cluster_tokens", "mce"]),
    "no bilstm": ({"bilstm": False}, ["cluster_tokens", "mce", "patch_contrast"]),
    "uneven": (
        {"lambda_tokens": 0.5, "lambda_mce": 2.0, "lambda_contrast": 3.0},
        ["cluster_tokens", "mce", "patch_contrast"],
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_loss_is_the_weighted_sum_of_the_terms_that_apply(name: str) -> None:
    options, expected = WEIGHTS[name]
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, dropout=0.0, threshold=0.3, **options))
    with branch.insert(model):
        model(img)
        out = branch.compute(labels)
        model(img)
        loss = branch(labels)
    assert list(out.terms) == expected
    weights = {"cluster_tokens": 1.0, "mce": 0.2, "patch_contrast": 0.1}
    for term, key in (("cluster_tokens", "lambda_tokens"), ("mce", "lambda_mce"), ("patch_contrast", "lambda_contrast")):
        weights[term] = float(options.get(key, weights[term]))
    total = sum(weights[term] * value.item() for term, value in out.terms.items())
    assert all(value.item() > 0 and value.shape == () for value in out.terms.values())
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(total, rel=1e-6) and loss.item() == out.loss.item()
    parts = {part.split(".")[0] for part, _ in branch.named_parameters()}  # nothing is built that is not used
    wanted = {"tokens"} if weights["cluster_tokens"] else set()
    wanted |= {"norm", "classifier"} if weights["mce"] else set()
    wanted |= {"bilstm"} if weights["mce"] and options.get("bilstm", True) else set()
    assert parts == wanted
    loss.backward()
    for part, parameter in branch.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, part


def literal_lines(lstm: nn.LSTM, lines: Tensor) -> Tensor:
    return torch.stack([lstm(line[None])[0][0] for line in lines])


@pytest.mark.parametrize("bilstm", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_terms_equal_those_of_the_host_run_by_hand(host: str, bilstm: bool) -> None:
    img, labels = batch()
    model = HOSTS[host]()
    options = {"top_k": 3, "threshold": 0.3, "per_class": 4, "temperature": 0.3, "related_weight": 0.25}
    branch = sure(ClusterBranch(CLUSTERS, model, bilstm=bilstm, dropout=0.0, seed=1, **options))
    with branch.insert(model):
        model(img)
        terms = branch.compute(labels).terms
    # the host with the cluster tokens behind its own
    x = model.patch_embed(img) + getattr(model, "pos_embed", 0)
    x = torch.cat([model.cls_token.expand(2, -1, -1), x, branch.tokens.tokens.expand(2, -1, -1)], dim=1)
    for block in model.blocks:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    patches, tokens = x[:, -18:-2], x[:, -2:]
    # tokens
    logits = (branch.tokens.norm(tokens) * branch.tokens.weight).sum(-1) + branch.tokens.bias
    present = torch.tensor([[float(row[0] or row[1]), float(row[2])] for row in labels.tolist()])
    expected = F.binary_cross_entropy_with_logits(logits, present)
    assert terms["cluster_tokens"].item() == pytest.approx(expected.item(), rel=1e-5)
    # patches
    f = branch.norm(patches)
    if bilstm:
        grids = f.reshape(2, 4, 4, WIDTH)
        rows = torch.stack([literal_lines(branch.bilstm.rows, grid) for grid in grids])
        columns = torch.stack([literal_lines(branch.bilstm.columns, grid.transpose(0, 1)).transpose(0, 1) for grid in grids])
        f = torch.cat([rows, columns], dim=-1).reshape(2, 16, -1)
    z = (f @ branch.classifier.weight.weight.T).softmax(-1)
    total = 0.0
    for b in range(2):
        for c in range(4):
            score = sum(sorted(z[b, :, c].double().tolist())[-3:]) / 3
            total -= math.log(max(score if c == 0 or labels[b, c - 1] else 1 - score, 1e-6))
    assert terms["mce"].item() == pytest.approx(total / 8, rel=1e-4)
    chosen = list(zip(*(part.tolist() for part in confident_patches(z, labels, 0.3, 4))))
    assert len({c for _, _, c in chosen}) > 1
    group = {0: "background", 1: "vehicles", 2: "vehicles", 3: "animals"}
    value, anchors = 0.0, 0
    for b, n, c in chosen:
        mine = {(i, p): math.exp(F.cosine_similarity(f[b, n], f[i, p], dim=0).item() / 0.3) for i, p, _ in chosen}
        positives = [mine[i, p] for i, p, k in chosen if k == c and (i, p) != (b, n)]
        negatives = [(0.25 if group[k] == group[c] else 1.0) * mine[i, p] for i, p, k in chosen if k != c]
        if positives and c:  # background is of many kinds and not drawn together
            anchors += 1
            value -= sum(math.log(e / (sum(positives) + sum(negatives))) for e in positives) / len(positives)
    assert terms["patch_contrast"].item() == pytest.approx(value / anchors, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("term", ["cluster_tokens", "mce", "patch_contrast"])
def test_every_term_trains_the_host(term: str) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, dropout=0.0, threshold=0.2))
    with branch.insert(model):
        model(img)
        branch.compute(labels).terms[term].backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("patch_embed.", "cls_token", "blocks.")):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert name.startswith("pos_embed") or parameter.grad is None


def test_contrast_does_not_train_the_classifier() -> None:
    """It chooses by the scores, which are no part of its graph."""
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, threshold=0.2))
    with branch.insert(model):
        model(img)
        branch.compute(labels).terms["patch_contrast"].backward()
    assert branch.classifier.weight.weight.grad is None
    assert branch.bilstm.rows.weight_ih_l0.grad.abs().max() > 0


def test_without_confident_patches_the_contrast_is_an_attached_zero() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model, threshold=1.0)
    with branch.insert(model):
        model(img)
        out = branch.compute(labels)
    assert out.terms["patch_contrast"].item() == 0 and out.terms["patch_contrast"].requires_grad
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in branch.parameters())


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.float64])
def test_labels_of_any_dtype_give_the_same_loss(kind: torch.dtype) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model).eval()
    seen = look(branch, model, img)
    assert branch.compute(labels.to(kind), seen).loss.item() == branch.compute(labels, seen).loss.item()


def test_related_classes_are_pushed_less() -> None:
    """The branch hands the clusters to the contrast; background is related to itself alone."""
    img, labels = batch()
    labels = torch.ones_like(labels)
    values = []
    for clusters, weight in ((CLUSTERS, 0.0), (CLUSTERS, 1.0), (CategoryClusters({k: [k] for k in CLASSES}, CLASSES), 0.0)):
        model = ToyMCTformer()
        branch = sure(ClusterBranch(clusters, model, lambda_tokens=0, dropout=0.0, threshold=0.2, related_weight=weight))
        seen = look(branch, model, img)
        values.append(branch.compute(labels, seen).terms["patch_contrast"].item())
        features = branch.features(seen)
        scores = branch.classifier(features)
        image, patch, name = confident_patches(scores, labels, 0.2, 8)
        assert {1, 2} <= set(name.tolist())
        plain = patch_contrast(features[image, patch], name, None, 0.1, background=0)
        if clusters is not CLUSTERS or weight == 1:
            assert values[-1] == pytest.approx(plain.item(), rel=1e-6)
    assert values[0] < values[1] - 1e-4 and values[2] == pytest.approx(values[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------ grids and maps


class Embed(nn.Module):
    """Patch embeddings as hosts write them: tokens, a map with channels first, or timm's with channels last."""

    def __init__(self, layout: str, patch_size: Any = None, as_tuple: bool = False):
        super().__init__()
        self.layout, self.as_tuple = layout, as_tuple
        if patch_size is not None:
            self.patch_size = patch_size
        self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Any:
        x = self.proj(x)  # (B, D, h, w)
        if self.layout == "tokens":
            x = x.flatten(2).transpose(1, 2)
        elif self.layout == "last":
            x = x.permute(0, 2, 3, 1)
        return (x, "grid") if self.as_tuple else x


class AnyViT(nn.Module):
    """No position embedding, so images of any shape; `prefix` class and register tokens come first."""

    def __init__(self, embed: nn.Module, prefix: int = 1, gives: str = "tokens"):
        super().__init__()
        self.embed_dim, self.patch_embed = WIDTH, embed
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.prefix = nn.Parameter(torch.randn(1, prefix, WIDTH))
            self.blocks = nn.ModuleList([Block(gives), Block(gives)])

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img)
        x = x[0] if isinstance(x, tuple) else x
        if x.ndim == 4:
            x = x.flatten(1, 2) if x.shape[3] == WIDTH else x.flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


LAYOUTS = {
    "tokens": lambda: Embed("tokens"),
    "tokens, patch size": lambda: Embed("tokens", PATCH),
    "tokens, patch sizes": lambda: Embed("tokens", (PATCH, PATCH)),
    "tokens in a tuple": lambda: Embed("tokens", PATCH, as_tuple=True),
    "channels first": lambda: Embed("first"),
    "channels last": lambda: Embed("last"),
    "convolution": lambda: nn.Conv2d(3, WIDTH, PATCH, stride=PATCH),
}


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16), (24, 40), (8, 24)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grid_and_patches_are_read_from_every_layout(layout: str, size: Tuple[int, int], prefix: int) -> None:
    img, labels = batch(size=size)
    model = AnyViT(LAYOUTS[layout](), prefix)
    branch = ClusterBranch(CLUSTERS, model, attention_bias=float("-inf"))
    grid = (size[0] // PATCH, size[1] // PATCH)
    expected = model(img)
    with branch.insert(model):
        assert torch.allclose(model(img), expected, atol=1e-6)
        seen = branch.pop_tokens()
        model(img)
        branch(labels).backward()
    assert seen.grid == grid and seen.tokens.shape == (2, 2, WIDTH)
    assert seen.patches.shape == (2, grid[0] * grid[1], WIDTH)
    assert torch.allclose(seen.patches, expected[:, prefix:], atol=1e-6)
    assert branch.cam(seen).shape == (2, 3, *grid)


def test_cam_holds_the_scores_of_the_patches_where_they_are() -> None:
    img, _ = batch(size=(16, 48))
    model = AnyViT(Embed("tokens", PATCH))
    branch = sure(ClusterBranch(CLUSTERS, model).eval())
    seen = look(branch, model, img)
    cam, features = branch.cam(seen), branch.features(seen)
    assert cam.shape == (2, 3, 2, 6) and cam.dtype == torch.float32 and cam.requires_grad
    assert torch.equal(branch.bilstm(branch.norm(seen.patches), (2, 6)), features)
    for b in range(2):
        for y in range(2):
            for x in range(6):
                scores = (branch.classifier.weight.weight @ features[b, 6 * y + x]).softmax(0)
                assert torch.allclose(cam[b, :, y, x], scores[1:], atol=1e-6)
    assert (cam >= 0).all() and (cam.sum(1) < 1).all() and cam.std() > 1e-3


def test_cam_of_a_branch_without_classifier_is_refused() -> None:
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model, lambda_mce=0, lambda_contrast=0)
    with pytest.raises(HostError, match="This branch has no patch classifier; build it with lambda_mce > 0"):
        branch.cam(look(branch, model, batch()[0]))


# ------------------------------------------------------------------------------------------------ in the host


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("host", HOSTS)
def test_the_host_is_unchanged_after_the_with(host: str, tokens: int) -> None:
    img, labels = batch()
    model = HOSTS[host]()

    def run() -> List[Tensor]:
        out = model(img)
        return [out] if isinstance(out, Tensor) else list(out)

    expected, names = run(), list(model.state_dict())
    branch = ClusterBranch(CLUSTERS, model, lambda_tokens=tokens)
    for fails in (False, True):
        with contextlib.suppress(ZeroDivisionError):
            with branch.insert(model) as inside:
                assert inside is branch
                same = [torch.equal(a, b) for a, b in zip(run(), expected)]
                assert not any(same) if tokens else all(same)  # without tokens the branch only looks on
                assert list(model.state_dict()) == names
                branch(labels)
                run()
                if fails:
                    raise ZeroDivisionError
        assert all(torch.equal(a, b) for a, b in zip(run(), expected))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        with pytest.raises(HostError):
            branch.pop_tokens()


def test_pop_tokens_needs_a_forward_pass() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model)
    message = "There is no forward pass of the host to read: expected one inside `with branch.insert"
    for call in (branch.pop_tokens, lambda: branch(labels), lambda: branch.compute(labels)):
        with pytest.raises(HostError, match=message):
            call()
    model(img)  # outside
    with branch.insert(model):
        with pytest.raises(HostError, match=message):
            branch.pop_tokens()
        model(img)
        branch.pop_tokens()
        with pytest.raises(HostError, match=message):
            branch(labels)
        model(img)
    with pytest.raises(HostError, match=message):
        branch.pop_tokens()


def test_each_forward_pass_has_its_own_tokens() -> None:
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model).eval()
    (first, labels), (second, other) = batch(0), batch(1)
    with branch.insert(model):
        model(first)
        one = branch.pop_tokens()
        model(second)
        two = branch.pop_tokens()
        both = branch.compute(labels, one).loss + branch.compute(other, two).loss
        model(first)
        alone = branch(labels)
        model(second)
        assert both.item() == pytest.approx((alone + branch(other)).item(), rel=1e-6)
    both.backward()
    assert torch.isfinite(model.cls_token.grad).all()


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (2, 4), (2, 3, 1), (6,)])
def test_labels_of_another_shape_are_refused(shape: Any) -> None:
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model)
    with branch.insert(model):
        model(batch()[0])
        with pytest.raises(ValueError, match=r"`labels` must have shape \(B, C\) = \(2, 3\); got \("):
            branch(torch.ones(shape))


@contextlib.contextmanager
def no_early_stop() -> Iterator[None]:
    """Checkpointing runs a block again to its end, as torch 2.0 does anyway."""
    setting = getattr(checkpointing, "set_checkpoint_early_stop", None)
    with contextlib.nullcontext() if setting is None else setting(False):
        yield


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("tokens", [0, 1])
def test_checkpointing_gives_the_same_gradients(tokens: int, early: bool) -> None:
    class Checkpointed(AnyViT):
        on = True

        def forward(self, img: Tensor) -> Tensor:
            x = torch.cat([self.prefix.expand(len(img), -1, -1), self.patch_embed(img)], dim=1)
            for block in self.blocks:
                x = checkpointing.checkpoint(block, x, use_reentrant=False) if self.on else block(x)
            return x

    img, labels = batch()
    found = {}
    for on in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Checkpointed(Embed("tokens", PATCH))
        model.on = on
        branch = sure(ClusterBranch(CLUSTERS, model, lambda_tokens=tokens, dropout=0.0, threshold=0.3))
        with branch.insert(model), contextlib.nullcontext() if early else no_early_stop():
            out = model(img)
            (out.square().mean() + branch(labels)).backward()
            with pytest.raises(HostError):  # running the blocks again is no new pass
                branch.pop_tokens()
        found[on] = [p.grad for p in (*model.parameters(), *branch.parameters())]
    for mine, reference in zip(found[True], found[False]):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-6)


def test_the_host_is_found_inside_parallel_wrappers() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, DataParallel(model)).eval()
    with branch.insert(model):
        model(img)
        expected = branch(labels).item()
    parallel = DataParallel(model)  # without a GPU it calls the module
    distributed = DistributedDataParallel.__new__(DistributedDataParallel)  # no processes are needed to find the blocks
    nn.Module.__init__(distributed)
    distributed.module = model
    for wrapped, call in ((parallel, parallel), (distributed, model), (DataParallel(distributed), model)):
        with branch.insert(wrapped):
            if not torch.cuda.is_available() or call is model:
                call(img)
                assert branch(labels).item() == expected
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------------ seeds, copies, training


def test_initial_values_come_from_the_seed_alone() -> None:
    first = ClusterBranch(CLUSTERS, WIDTH, seed=3).state_dict()
    torch.rand(5)
    again, other = (ClusterBranch(CLUSTERS, WIDTH, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("tokens.tokens", "classifier.weight.weight", "bilstm.rows.weight_ih_l0", "bilstm.columns.weight_hh_l0"):
        assert not torch.equal(first[name], other[name])


def test_building_a_branch_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ClusterBranch(CLUSTERS, WIDTH)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.rand(3), expected)


def test_building_a_branch_leaves_the_random_state_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds every GPU as well; the host's dropout would begin anew there."""
    seeds: List[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    ClusterBranch(CLUSTERS, WIDTH)
    assert seeds == []


@pytest.mark.parametrize("way", ["copy", "pickle"])
def test_copies_after_a_forward_pass_hold_no_tokens_and_give_the_same_loss(way: str) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model, attention_bias=-2.0).eval()
    with branch.insert(model):
        model(img)
        other = copy.deepcopy(branch) if way == "copy" else pickle.loads(pickle.dumps(branch))
        expected = branch(labels).item()
        with pytest.raises(HostError, match="There is no forward pass"):
            other.pop_tokens()
    assert other.clusters == branch.clusters and list(other.state_dict()) == list(branch.state_dict())
    with other.insert(model):
        model(img)
        assert other(labels).item() == expected


@pytest.mark.parametrize("bias", [0.0, float("-inf")])
def test_load_restores_the_saved_branch(bias: float, tmp_path: Path) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, attention_bias=bias, top_k=2, lambda_contrast=0.3, seed=8)).eval()
    branch.save(tmp_path / "b.safetensors")
    other = ClusterBranch.load(tmp_path / "b.safetensors").eval()
    assert other.clusters == CLUSTERS and other.options == branch.options and other.term_weights == branch.term_weights
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in branch.state_dict().items())
    values = []
    for one in (branch, other):
        with one.insert(model):
            model(img)
            values.append(one(labels).item())
    assert values[0] == values[1]
    other.save(tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-9])
    with pytest.raises(ClusterError, match="d.safetensors is damaged or is not a cluster branch"):
        ClusterBranch.load(tmp_path / "d.safetensors")
    with pytest.raises(FileNotFoundError, match="No cluster branch at"):
        ClusterBranch.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize("host", HOSTS)
def test_a_few_steps_lower_the_loss(host: str) -> None:
    img, labels = batch()
    model = HOSTS[host]()
    branch = ClusterBranch(CLUSTERS, model, dropout=0.0, lambda_contrast=0.0)
    optimizer = torch.optim.Adam([*model.parameters(), *branch.parameters()], lr=0.02)
    seen = []
    for _ in range(15):
        with branch.insert(model):
            model(img)
            loss = branch(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.6 * seen[0]


def test_dropout_acts_only_in_training() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = ClusterBranch(CLUSTERS, model, dropout=0.5)
    seen = look(branch, model, img)
    assert branch.compute(labels, seen).loss.item() != branch.compute(labels, seen).loss.item()
    branch.eval()
    assert branch.compute(labels, seen).loss.item() == branch.compute(labels, seen).loss.item()


def test_loss_under_bfloat16_autocast_is_close_to_float32() -> None:
    img, labels = batch()
    found = {}
    for on in (False, True):
        model = ToyMCTformer()
        branch = ClusterBranch(CLUSTERS, model, dropout=0.0, attention_bias=-1.0)
        with branch.insert(model):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                model(img)
                loss = branch(labels)
            loss.backward()
        assert loss.dtype == torch.float32
        assert all(torch.isfinite(p.grad).all() for p in branch.parameters())
        found[on] = loss.item()
    assert found[True] == pytest.approx(found[False], rel=0.02)


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_host_without_blocks_or_patch_embedding_is_refused() -> None:
    for tokens in (0, 1):
        branch = ClusterBranch(CLUSTERS, WIDTH, lambda_tokens=tokens)
        with pytest.raises(
            HostError, match="list of transformer blocks 'blocks' in ToyCNN, but there is none. Its modules are"
        ):
            with branch.insert(ToyCNN()):
                pass
        branch = ClusterBranch(CLUSTERS, WIDTH, lambda_tokens=tokens, patch_embed="stem.proj")
        model = ToyViT()
        message = "ToyViT has no module 'stem.proj', .* Its modules are 'patch_embed', 'blocks', 'norm', 'head'. Name it: "
        with pytest.raises(HostError, match=message):
            with branch.insert(model):
                pass
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_patch_embedding_may_have_another_name() -> None:
    img, _ = batch()
    model = ToyViT()
    branch = ClusterBranch(CLUSTERS, model, patch_embed="patch_embed.proj")
    assert look(branch, model, img).grid == (4, 4)


def test_blocks_that_run_without_the_patch_embedding_are_refused() -> None:
    model = ToyViT()
    with ClusterBranch(CLUSTERS, model).insert(model):
        with pytest.raises(HostError, match="The blocks ran, but 'patch_embed' did not run before them in this forward pass."):
            model.blocks(torch.rand(2, 17, WIDTH))


def test_patches_that_form_no_grid_are_refused() -> None:
    class Overlapping(nn.Module):
        def __init__(self, patch_size: Optional[int]):
            super().__init__()
            self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
            if patch_size:
                self.patch_size = patch_size

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.proj(x).flatten(2).transpose(1, 2), torch.zeros(len(x), 1, WIDTH)], dim=1)

    for patch_size in (PATCH, None):
        model = AnyViT(Overlapping(patch_size))
        with ClusterBranch(CLUSTERS, model).insert(model):
            with pytest.raises(HostError, match="gives 17 patches for an image of 32 x 32, which is no grid of 4 rows"):
                model(batch()[0])


def test_a_patch_embedding_that_returns_something_else_is_refused() -> None:
    for gives, got in ((lambda x: x.flatten(1), r"tensor \(2, 3072\)"), (lambda x: "tokens", "str")):

        class Odd(nn.Module):
            def forward(self, x: Tensor, gives: Any = gives) -> Any:
                return gives(x)

        model = AnyViT(Odd())
        with ClusterBranch(CLUSTERS, model).insert(model):
            with pytest.raises(
                HostError, match=rf"Expected Odd to turn an image batch into tokens \(B, N, D\) or a map; got {got}"
            ):
                model(batch()[0])


def test_a_last_block_with_fewer_tokens_than_patches_is_refused() -> None:
    class Pools(AnyViT):
        def forward(self, img: Tensor) -> Tensor:
            x = self.patch_embed(img)
            for block in self.blocks:
                x = block(x[:, ::2])
            return x

    model = Pools(Embed("tokens", PATCH))
    with ClusterBranch(CLUSTERS, model, lambda_tokens=0).insert(model):
        with pytest.raises(HostError, match="The last block gives 4 tokens, fewer than the 4 x 4 patches."):
            model(batch()[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_mce": 0}, ValueError, "`lambda_contrast` needs `lambda_mce` > 0"),
        ({"lambda_tokens": 0, "lambda_mce": 0, "lambda_contrast": 0}, ValueError, "both are 0, so it would do nothing"),
        ({"lambda_tokens": -1}, ValueError, "`lambda_tokens` must be at least 0"),
        ({"lambda_contrast": float("nan")}, ValueError, "`lambda_contrast` must be at least 0"),
        ({"top_k": 0}, ValueError, "`top_k` must be at least 1, or a share between 0 and 1"),
        ({"top_k": 1.5}, TypeError, "`top_k` must be a whole number"),
        ({"top_k": 0.0}, TypeError, "`top_k` must be a whole number"),
        ({"per_class": 1.5}, TypeError, "`per_class` must be a whole number"),
        ({"threshold": "0.5"}, TypeError, "`threshold` must be a number"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be > 0"),
        ({"related_weight": 1.5}, ValueError, "`related_weight` must be from 0 to 1; got 1.5"),
        ({"threshold": 1.5}, ValueError, "`threshold` must be from 0 to 1; got 1.5"),
        ({"dropout": 1.5}, ValueError, "`dropout` must be from 0 to 1; got 1.5"),
        ({"attention_bias": float("inf")}, ValueError, "`attention_bias` must be a number or -inf"),
    ],
)
def test_options_are_checked_when_the_branch_is_built(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ClusterBranch(CLUSTERS, WIDTH, **options)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="`clusters` must be CategoryClusters; got dict"):
        ClusterBranch({"vehicles": ["boat"]}, WIDTH)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`dim` must be a whole number"):
        ClusterBranch(CLUSTERS, 8.0)  # type: ignore[arg-type]
    with pytest.raises(HostError, match="list of transformer blocks 'blocks' in ToyCNN"):
        ClusterBranch(CLUSTERS, ToyCNN())


def test_top_k_may_be_a_share_of_the_patches() -> None:
    img, labels = batch()
    model, mce = ToyMCTformer(), {}
    for top_k in (0.25, 4, 1, 0.01):  # 16 patches
        branch = sure(ClusterBranch(CLUSTERS, model, dropout=0.0, lambda_contrast=0, top_k=top_k))
        with branch.insert(model):
            model(img)
            mce[top_k] = branch.compute(labels).terms["mce"].item()
    assert mce[0.25] == mce[4] and mce[0.01] == mce[1] and mce[4] != mce[1]


def test_the_branch_moves_to_the_host_as_a_whole() -> None:
    model = ToyMCTformer().to("meta")
    branch = ClusterBranch(CLUSTERS, model)
    with branch.insert(model):
        model(torch.rand(2, 3, 32, 32, device="meta"))
        assert {p.device.type for p in branch.parameters()} == {"meta"}
        assert branch.cam(branch.pop_tokens()).device.type == "meta"
    alone = ClusterBranch(CLUSTERS, 8, lambda_tokens=0)
    with alone.insert(model):
        model(torch.rand(2, 3, 32, 32, device="meta"))
        assert alone.features(alone.pop_tokens()).device.type == "meta"


@pytest.mark.parametrize("tokens", [1, 0])
def test_a_copy_of_the_host_does_not_change_the_branch(tokens: int, tmp_path: Any) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, lambda_tokens=tokens, dropout=0.0))
    with branch.insert(model):
        model(img)
        expected = branch.compute(labels).terms
        model(img)
        teacher = copy.deepcopy(model)
        with torch.no_grad():
            for p in teacher.parameters():
                p.zero_()
            teacher(img)
        found = branch.compute(labels).terms
        assert {name: term.item() for name, term in found.items()} == {name: term.item() for name, term in expected.items()}
        torch.save(model, tmp_path / "whole.pt")
    plain = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(plain(img)[0], model(img)[0])  # without the branch


@pytest.mark.parametrize("tokens", [1, 0])
def test_a_loss_of_a_pass_without_gradients_is_refused(tokens: int) -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, lambda_tokens=tokens))
    with branch.insert(model):
        model(img)
        with torch.no_grad():
            model(img)  # a teacher's pass between the forward and the loss
        with pytest.raises(HostError, match="ran without gradients, so this loss would train nothing"):
            branch(labels)
        with torch.no_grad():
            model(img)
            assert branch(labels) > 0  # to look at
        for p in model.parameters():
            p.requires_grad_(False)
        model(img)
        branch(labels).backward()  # a frozen host is fine


def test_a_second_branch_in_the_host_is_refused_also_without_tokens() -> None:
    model = ToyMCTformer()
    outer, inner = (ClusterBranch(CLUSTERS, model, lambda_tokens=0) for _ in range(2))
    with outer.insert(model):
        with pytest.raises(HostError, match="holds cluster tokens or a cluster branch already"):
            inner.insert(model).__enter__()
    with inner.insert(model):
        model(batch()[0])
        assert inner.pop_tokens().patches.shape == (2, 16, 8)


@pytest.mark.parametrize("value", [255.0, 0.5])
def test_labels_other_than_0_and_1_are_refused(value: float) -> None:
    img, labels = batch()
    labels[0, 0] = value
    model = ToyMCTformer()
    for tokens in (0, 1):
        branch = ClusterBranch(CLUSTERS, model, lambda_tokens=tokens)
        with branch.insert(model):
            model(img)
            with pytest.raises(ValueError, match="`labels` must be 0 or 1"):
                branch(labels)


def test_the_heads_do_not_run_under_the_hosts_autocast() -> None:
    img, labels = batch()
    model = ToyMCTformer()
    branch = sure(ClusterBranch(CLUSTERS, model, dropout=0.0))
    kinds = []
    assert branch.bilstm is not None
    branch.bilstm.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    with branch.insert(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(img)
        seen = branch.pop_tokens()
        assert branch.compute(labels, seen).loss.dtype == branch.cam(seen).dtype == torch.float32
    assert kinds == [torch.float32] * 2


def test_options_are_the_arguments_that_build_the_branch(tmp_path: Any) -> None:
    defaults = {
        name: p.default for name, p in inspect.signature(ClusterBranch).parameters.items() if name not in ("clusters", "dim")
    }
    branch = ClusterBranch(CLUSTERS, WIDTH)
    assert branch.options == defaults
    branch.top_k = 3  # changed after it was built
    branch.save(tmp_path / "b.safetensors")
    assert ClusterBranch.load(tmp_path / "b.safetensors").options == {**defaults, "top_k": 3}
