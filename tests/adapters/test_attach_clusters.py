"""`attach(..., branch=)` around the loops of toy transformers: loss, steps of the branch's own optimizer, nothing left."""

from __future__ import annotations

import copy
import functools
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner, adapters
from semples_plugin.clusters.branch import ClusterBranch, HostTokens
from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.errors import HostError
from tests.adapters.test_attach import (
    CNN,
    VIT,
    assert_nothing_left,
    assert_same_gradients,
    gradients,
    moving,
    plain_run,
    still,
    unknown_loss,
)
from tests.adapters.toy_hosts import (
    CLASSES,
    DEPTH,
    TOYS,
    WIDTH,
    Scaler,
    Toy,
    ToyCNN,
    ToyMCTformer,
    ToyTransCAM,
    ToyViT,
    make_loader,
    regulariser,
    train_mctformer,
    train_plain,
)

CLUSTERS = CategoryClusters({"vehicles": ["boat", "train"], "animals": ["bird"]}, CLASSES)
SINGLES = CategoryClusters({name: [name] for name in CLASSES}, CLASSES)  # as many clusters as classes
BY_NAME = {toy.name: toy for toy in TOYS}
MCT, WEAKTR, TOY_VIT = (BY_NAME[name] for name in ("mctformer", "weaktr", "vit"))
each_toy = pytest.mark.parametrize("toy", [MCT, WEAKTR, TOY_VIT], ids=lambda toy: toy.name)
REFINER_TERMS, BRANCH_TERMS = {"match_foreground", "match_background"}, {"cluster_tokens", "mce", "patch_contrast"}


@pytest.fixture
def refiner(make_refiner: Callable[..., PromptRefiner]) -> PromptRefiner:
    return make_refiner(CLASSES, image_stats="imagenet")


def make_branch(clusters: CategoryClusters = CLUSTERS, **options: Any) -> ClusterBranch:
    """Without dropout, so that a run can be repeated by hand; a low threshold, so that the contrast has patches."""
    return ClusterBranch(clusters, WIDTH, **{"dropout": 0.0, "threshold": 0.3, "top_k": 3, **options})


def own_optimizer(branch: ClusterBranch, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(branch.parameters(), lr=lr)


def values(module: nn.Module) -> Dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def distance(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> float:
    """Largest difference of any parameter."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def host_loss(toy: Toy, model: nn.Module, img: Tensor, labels: Tensor) -> Tensor:
    """What the toy's own loop computes."""
    out = model(img)
    if toy.name == "mctformer":
        logits, embeddings, patch_logits = out
        return sum_of_losses([logits, patch_logits], labels) + regulariser(embeddings)
    return sum_of_losses([out] if isinstance(out, Tensor) else out, labels)


def sum_of_losses(logits: Any, labels: Tensor) -> Tensor:
    return torch.stack([F.multilabel_soft_margin_loss(value, labels) for value in logits]).sum()


class Losses(NamedTuple):
    """Of one batch, attached to the host and the branch. `refiner` and `branch` are 0 where there is none."""

    host: Tensor
    refiner: Tensor
    branch: Tensor
    terms: Dict[str, float]

    def sum(self, weight: float = 1.0) -> Tensor:
        return self.host + weight * self.refiner + self.branch


def by_hand(toy: Toy, model: nn.Module, refiner: Optional[PromptRefiner], branch: ClusterBranch, batch: Any) -> Losses:
    """As an edit of the host would compute them, with the branch in it; two forward passes, the first for the CAM."""
    img, labels = batch
    terms: Dict[str, Tensor] = {}
    extra = torch.zeros(())
    if refiner is not None:
        found = refiner.compute(img, toy.cam(model, img, keep_graph=True), labels)
        extra = found.loss
        terms.update(found.terms)
    host = host_loss(toy, model, img, labels)
    out = branch.compute(labels)
    terms.update(out.terms)
    return Losses(host, extra, out.loss, {name: value.item() for name, value in terms.items()})


def train_by_hand(
    toy: Toy,
    model: nn.Module,
    refiner: Optional[PromptRefiner],
    branch: ClusterBranch,
    loader: Any,
    *optimizers: torch.optim.Optimizer,
) -> List[float]:
    seen = []
    with branch.insert(model.train()):
        for batch in loader:
            loss = by_hand(toy, model, refiner, branch, batch).sum()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            seen.append(loss.item())
    return seen


def holds_tokens(branch: ClusterBranch) -> bool:
    """Whether a branch still holds what a forward pass left."""
    return any(isinstance(value, HostTokens) for value in vars(branch).values())


def assert_branch_is_free(branch: ClusterBranch, *models: nn.Module) -> None:
    """No hook, no mode, no mark on a block, no graph kept."""
    assert_nothing_left(branch, *models)
    assert not holds_tokens(branch) and (branch.tokens is None or branch.tokens.output is None)
    for model in models:
        assert not any(hasattr(module, "_holds_cluster_tokens") for module in model.modules())


# ------------------------------------------------------------------------------------------------ values and gradients


@each_toy
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_first_loss_is_the_sum_of_host_refiner_and_branch(toy: Toy, weight: float, refiner: PromptRefiner) -> None:
    loader = make_loader(1)
    expected_model, expected_branch = toy.build().train(), make_branch()
    with expected_branch.insert(expected_model):
        expected = by_hand(toy, expected_model, refiner, expected_branch, loader[0])
    expected.sum(weight).backward()
    model, branch = toy.build(), make_branch()
    log: List[Dict[str, float]] = []
    with adapters.attach(
        toy.host, model, refiner, weight=weight, branch=branch, branch_optimizer=own_optimizer(branch),
        on_step=lambda step, terms: log.append(terms), **toy.options,
    ) as attached:  # fmt: skip
        seen = toy.train(model, loader, still(model))
    rise = weight * expected.refiner.item() + expected.branch.item()
    assert seen == pytest.approx([expected.host.item() + rise], rel=1e-5)
    assert expected.refiner.item() > 1e-2 and expected.branch.item() > 1e-2 and expected.terms["patch_contrast"] > 1e-2
    assert attached.terms.keys() == REFINER_TERMS | BRANCH_TERMS
    assert attached.terms == pytest.approx(expected.terms, rel=1e-4)
    assert attached.loss == pytest.approx(expected.refiner.item() + expected.branch.item(), rel=1e-5)
    assert attached.steps == 1 and log == [{**attached.terms, "loss": attached.loss}]
    assert_same_gradients(gradients(model), gradients(expected_model))


@each_toy
def test_tokens_that_only_read_leave_the_hosts_loss(toy: Toy, refiner: PromptRefiner) -> None:
    """With attention_bias=-inf the loss rises over that of the host alone, and over that with the refiner alone."""
    loader = make_loader(1)
    (plain,), _ = plain_run(toy, loader)
    model, branch = toy.build(), make_branch(attention_bias=float("-inf"))
    with adapters.attach(toy.host, model, refiner, **toy.options) as alone:
        (refined,) = toy.train(model, loader, still(model))
    with adapters.attach(
        toy.host, model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **toy.options
    ) as both:
        (seen,) = toy.train(model, loader, still(model))
    own = both.loss - alone.loss
    assert own > 1e-2 and refined == pytest.approx(plain + alone.loss, rel=1e-5)
    assert seen == pytest.approx(plain + alone.loss + own, rel=1e-5)


@each_toy
def test_one_forward_pass_per_step(toy: Toy, refiner: PromptRefiner) -> None:
    model, branch = toy.build(), make_branch()
    counts: Dict[str, int] = {}

    def count(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        counts[name] = counts.get(name, 0) + 1

    watched = [("model", model), ("embed", model.patch_embed), *((f"block {i}", b) for i, b in enumerate(model.blocks))]
    handles = [module.register_forward_hook(functools.partial(count, name)) for name, module in watched]
    with adapters.attach(toy.host, model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **toy.options):
        toy.train(model, make_loader(3), moving(model))
    assert counts == {name: 3 for name, _ in watched}
    for handle in handles:
        handle.remove()


@each_toy
def test_the_cam_source_sees_the_hosts_own_tokens(toy: Toy, refiner: PromptRefiner) -> None:
    """The shapes that it gets are those without tokens; its CAM is that of the host's inference with the tokens."""
    img, labels = make_loader(1, size=(32, 48) if toy.name == "vit" else (32, 32))[0]
    model, branch = toy.build(), make_branch()
    with branch.insert(model):
        expected = toy.cam(model, img)
    shapes: Dict[str, List[Any]] = {}
    cams: List[Tensor] = []

    def watch(source: Any, key: str) -> None:
        make = source.cam

        def cam(img: Tensor, output: Any, records: Any) -> Tensor:
            found = make(img, output, records)
            parts = [value for name in records.names() for value in records.all(name)]
            flat = [x for value in parts for x in (value if isinstance(value, tuple) else (value,))]
            shapes[key] = [tuple(x.shape) for x in flat]
            cams.append(found.detach())
            return found

        source.cam = cam

    for key, inserted in (("without", None), ("with", branch)):
        source = adapters.make_source(toy.host, **toy.options)
        watch(source, key)
        optimizer = None if inserted is None else own_optimizer(branch, 0.0)
        with adapters.attach(source, model, refiner, branch=inserted, branch_optimizer=optimizer):
            toy.train(model, [(img, labels)], still(model))
            with torch.no_grad():
                inside = toy.cam(model, img)
            again = adapters.cam_of(toy.host, model, **toy.options)(img)
    assert shapes["with"] == shapes["without"] and len(shapes["with"]) >= (1 if toy.name == "vit" else DEPTH)
    without, rebuilt = cams
    assert rebuilt.shape == without.shape == expected.shape == inside.shape
    for cam in (rebuilt, inside, again):
        assert torch.allclose(cam, expected, atol=1e-6, rtol=1e-4)
    assert (rebuilt - without).abs().max() > 1e-4  # the tokens do change it


@each_toy
@pytest.mark.parametrize("contrast", [0.1, 0.0])
def test_training_equals_a_loop_written_by_hand(toy: Toy, contrast: float, refiner: PromptRefiner) -> None:
    loader = make_loader(4)
    a_model, a = toy.build(), make_branch(lambda_contrast=contrast)
    expected = train_by_hand(toy, a_model, refiner, a, loader, moving(a_model), own_optimizer(a))
    model, branch = toy.build(), make_branch(lambda_contrast=contrast)
    start = values(branch)
    with adapters.attach(
        toy.host, model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **toy.options
    ) as attached:
        seen = toy.train(model, loader, moving(model))
    assert attached.steps == 4 and seen == pytest.approx(expected, rel=1e-5)
    assert all(not torch.equal(value, start[name]) for name, value in branch.named_parameters())
    assert distance(values(branch), values(a)) <= 1e-6
    assert distance(values(model), values(a_model)) <= 1e-5


@each_toy
def test_the_branch_alone(toy: Toy) -> None:
    """A branch trains without a refiner."""
    loader = make_loader(4)
    a_model, a = toy.build(), make_branch()
    expected = train_by_hand(toy, a_model, None, a, loader, moving(a_model), own_optimizer(a))
    model, branch = toy.build(), make_branch()
    with adapters.attach(
        toy.host, model, None, branch=branch, branch_optimizer=own_optimizer(branch), **toy.options
    ) as attached:
        seen = toy.train(model, loader, moving(model))
    assert attached.steps == 4 and seen == pytest.approx(expected, rel=1e-5)
    assert attached.terms.keys() == BRANCH_TERMS and attached.loss > 0
    assert distance(values(branch), values(a)) <= 1e-6


@each_toy
def test_replace_keeps_the_losses_of_refiner_and_branch(toy: Toy, refiner: PromptRefiner) -> None:
    """The total is the refiner's loss, the branch's, and what of the host's loss is no label loss."""
    loader = make_loader(1)
    model, branch = toy.build().train(), make_branch()
    with branch.insert(model), torch.no_grad():
        expected = by_hand(toy, model, refiner, branch, loader[0])
        rest = regulariser(model(loader[0][0])[1]).item() if toy.name == "mctformer" else 0.0
    start = values(branch)
    with adapters.attach(
        toy.host, model, refiner, mode="replace", branch=branch, branch_optimizer=own_optimizer(branch), **toy.options
    ) as attached:
        seen = toy.train(model, loader, still(model))
    assert attached.steps == 1
    assert seen == pytest.approx([expected.refiner.item() + expected.branch.item() + rest], rel=1e-5)
    assert distance(values(branch), start) > 1e-3


@pytest.mark.parametrize("passes", [1, 2])
def test_two_forward_passes_per_step(passes: int, refiner: PromptRefiner) -> None:
    """The last pass counts, or with `passes=2` the first of them, for the refiner and the branch alike."""
    (first, labels), (second, _) = make_loader(2)
    found = []
    for by in ("hand", "attach"):
        model, branch = ToyViT().train(), make_branch()
        own = own_optimizer(branch)
        if by == "hand":
            with branch.insert(model):
                counted = second if passes == 1 else first
                extra = by_hand(TOY_VIT, model, refiner, branch, (counted, labels))
                loss = F.multilabel_soft_margin_loss(model(first) + model(second), labels)
                loss = loss + extra.refiner + extra.branch
                loss.backward()
                own.step()
        else:
            with adapters.attach(
                "generic",
                model,
                refiner,
                forward_pass="last" if passes == 1 else "first",
                branch=branch,
                branch_optimizer=own,
                **VIT,
            ) as attached:
                loss = F.multilabel_soft_margin_loss(model(first) + model(second), labels)
                loss.backward()
            assert attached.steps == 1
        found.append((loss.item(), gradients(model), values(branch)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same_gradients(found[1][1], found[0][1])
    assert distance(found[1][2], found[0][2]) <= 1e-6


def test_without_a_branch_nothing_changes(refiner: PromptRefiner) -> None:
    runs = []
    for options in ({}, {"branch": None, "branch_optimizer": None}):
        model = ToyMCTformer()
        with adapters.attach("mctformer", model, refiner, **options) as attached:
            seen = train_mctformer(model, make_loader(2), moving(model))
        runs.append((seen, attached.terms, values(model)))
        assert attached.branch is None and attached.terms.keys() == REFINER_TERMS
    assert runs[0][:2] == runs[1][:2] and distance(runs[0][2], runs[1][2]) == 0


def test_a_batch_without_positive_labels(refiner: PromptRefiner) -> None:
    model, branch = ToyMCTformer(), make_branch()
    start = values(branch)
    with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch)) as attached:
        seen = train_mctformer(model, [(make_loader(1)[0][0], torch.zeros(2, 3))], moving(model))
    assert attached.steps == 1 and all(x < 100 for x in seen)
    assert attached.terms["match_foreground"] == 0 and attached.terms["cluster_tokens"] > 0
    assert distance(values(branch), start) > 1e-3
    assert all(bool(value.isfinite().all()) for value in branch.parameters())


@pytest.mark.parametrize("toy", [MCT, WEAKTR], ids=lambda toy: toy.name)
def test_autocast(toy: Toy, refiner: PromptRefiner) -> None:
    found = []
    for on in (False, True):
        model, branch = toy.build(), make_branch()
        optimizer = torch.optim.SGD(branch.parameters(), lr=1.0)
        start = values(branch)
        with adapters.attach(toy.host, model, refiner, branch=branch, branch_optimizer=optimizer) as attached:
            losses = toy.train(model, make_loader(1), still(model), autocast=on)
        moved = torch.cat([(value - start[name]).flatten() for name, value in values(branch).items()])
        found.append((losses, attached.terms, moved))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02) and found[1][1] == pytest.approx(found[0][1], rel=0.05)
    a, b = (run[2] for run in found)
    assert bool(b.isfinite().all()) and F.cosine_similarity(a, b, dim=0) > 0.95


def test_as_many_clusters_as_classes_are_not_taken_for_labels(refiner: PromptRefiner) -> None:
    """The tokens' own label loss has the shape of the host's; it is not tapped."""
    loader = make_loader(2)
    a_model, a = ToyMCTformer(), make_branch(SINGLES)
    expected = train_by_hand(MCT, a_model, refiner, a, loader, moving(a_model), own_optimizer(a))
    model, branch = ToyMCTformer(), make_branch(SINGLES)
    with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch)) as attached:
        seen = train_mctformer(model, loader, moving(model))
    assert attached.steps == 2 and seen == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clusters", [CLUSTERS, SINGLES], ids=["fewer", "as many"])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_branch_inserted_by_hand(mode: str, clusters: CategoryClusters, refiner: PromptRefiner) -> None:
    """`insert` and a line in the loop, the refiner attached: the branch's loss is no label loss of the host."""
    img, labels = make_loader(1)[0]
    model, branch = ToyViT().train(), make_branch(clusters)
    with branch.insert(model):
        model(img)
        expected = branch(labels).item()
        with adapters.attach("generic", model, refiner, mode=mode, **VIT) as attached:
            loss = F.multilabel_soft_margin_loss(model(img), labels)
            own = branch(labels)
            (loss + own).backward()
    assert attached.steps == 1 and own.item() == pytest.approx(expected, rel=1e-5)


def test_a_refiner_and_a_branch_attached_one_by_one(refiner: PromptRefiner) -> None:
    loader = make_loader(2)
    model, branch = ToyMCTformer(), make_branch()
    with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch)):
        expected = train_mctformer(model, loader, moving(model))
    other_model, other = ToyMCTformer(), make_branch()
    with adapters.attach("mctformer", other_model, None, branch=other, branch_optimizer=own_optimizer(other)) as pcc:
        with adapters.attach("mctformer", other_model, refiner) as attached:
            seen = train_mctformer(other_model, loader, moving(other_model))
    assert pcc.steps == attached.steps == 2 and seen == pytest.approx(expected, rel=1e-5)
    assert distance(values(branch), values(other)) <= 1e-6
    assert_branch_is_free(other, other_model)


# ------------------------------------------------------------------------------------------------ the branch's own optimizer


@pytest.mark.parametrize("toy", [MCT, WEAKTR], ids=lambda toy: toy.name)
def test_a_gradient_scaler(toy: Toy, refiner: PromptRefiner) -> None:
    """A factor on the loss does not change the step."""
    found = []
    for scale in (1.0, 1024.0, 1 / 3):
        model, branch = toy.build(), make_branch()
        # One whose step grows with the gradient; Adam's hardly would.
        optimizer = torch.optim.SGD(branch.parameters(), lr=0.1)
        with adapters.attach(toy.host, model, refiner, branch=branch, branch_optimizer=optimizer):
            toy.train(model, make_loader(3), moving(model), loss_scaler=Scaler(scale))
        found.append(values(branch))
    assert distance(found[0], found[1]) <= 1e-5 and distance(found[0], found[2]) <= 1e-5
    assert distance(found[0], values(make_branch())) > 1e-3


def test_gradient_accumulation(refiner: PromptRefiner) -> None:
    """Every backward pass is a step of the branch, as if the loss had not been divided."""
    found = []
    for parts in (1, 2):
        model, branch = ToyViT().train(), make_branch()
        optimizer = own_optimizer(branch)
        with adapters.attach("generic", model, refiner, branch=branch, branch_optimizer=optimizer, **VIT) as attached:
            for img, labels in make_loader(2):
                (F.multilabel_soft_margin_loss(model(img), labels) / parts).backward()
        assert attached.steps == 2 and all(int(state["step"]) == 2 for state in optimizer.state.values())
        found.append(values(branch))
    assert distance(*found) <= 1e-6


@pytest.mark.parametrize(
    "where, factor",
    [
        ("loss", float("inf")),
        ("loss", float("nan")),
        ("loss", 0.0),
        ("one parameter", float("-inf")),
        ("one parameter", float("nan")),
    ],
)
@pytest.mark.filterwarnings("ignore:1 steps of the cluster branch were left out")
def test_a_step_whose_gradient_is_not_finite_is_left_out(where: str, factor: float, refiner: PromptRefiner) -> None:
    """As a gradient scaler does; later steps are those of a run without this batch."""
    loader = make_loader(3)
    found = []
    for batches in ((0, 1, 2), (0, 2)):
        model, branch = ToyViT().train(), make_branch()
        optimizer, own = moving(model), own_optimizer(branch)
        with adapters.attach("generic", model, refiner, branch=branch, branch_optimizer=own, **VIT):
            for i in batches:
                img, labels = loader[i]
                loss = F.multilabel_soft_margin_loss(model(img), labels)
                assert loss.isfinite()
                optimizer.zero_grad()
                handle = None
                if i == 1 and where == "loss":
                    loss = loss * factor
                elif i == 1:
                    handle = branch.tokens.tokens.register_hook(lambda gradient: gradient * factor)
                loss.backward()
                if i != 1:  # the host's scaler finds it as well
                    optimizer.step()
                if handle is not None:
                    handle.remove()
        assert all(bool(value.isfinite().all()) for value in branch.parameters())
        states = [part for state in own.state.values() for part in state.values()]
        assert all(bool(torch.as_tensor(part).isfinite().all()) for part in states)
        found.append((values(branch), {int(state["step"]) for state in own.state.values()}))
    assert found[0][1] == found[1][1] == {2} and distance(found[0][0], found[1][0]) == 0


def test_in_the_hosts_optimizer(refiner: PromptRefiner) -> None:
    """`branch_optimizer=None`: the host's own steps them, once per step."""
    loader = make_loader(4)
    a_model, a = ToyMCTformer(), make_branch()
    both = torch.optim.AdamW([*a_model.parameters(), *a.parameters()], lr=0.01)
    expected = train_by_hand(MCT, a_model, refiner, a, loader, both)
    model, branch = ToyMCTformer(), make_branch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.add_param_group({"params": branch.parameters()})
    with adapters.attach("mctformer", model, refiner, branch=branch) as attached:
        seen = train_mctformer(model, loader, optimizer)
    assert attached.steps == 4 and seen == pytest.approx(expected, rel=1e-4)
    assert {int(optimizer.state[p]["step"]) for p in branch.parameters()} == {4}
    assert distance(values(branch), values(a)) <= 1e-4  # Adam's first steps have the size of lr, whatever the gradient
    assert distance(values(branch), values(make_branch())) > 1e-2


def test_a_branch_that_nobody_trains_is_an_error(refiner: PromptRefiner) -> None:
    model, branch = ToyMCTformer(), make_branch()
    start = values(branch)
    with pytest.raises(
        adapters.HostError,
        match=r"cluster branch was not trained: .*branch_optimizer=torch.optim.AdamW\(branch.parameters\(\).*"
        r"optimizer.add_param_group\(\{\"params\": branch.parameters\(\)\}\)",
    ):
        with adapters.attach("mctformer", model, refiner, branch=branch):
            train_mctformer(model, make_loader(2), moving(model))
    assert distance(values(branch), start) == 0
    assert_branch_is_free(branch, model)
    # Afterwards it can be trained: gradients of the failed attempt do not count.
    again = make_branch()
    for one in (branch, again):
        host = ToyMCTformer()
        with adapters.attach("mctformer", host, refiner, branch=one, branch_optimizer=own_optimizer(one)):
            train_mctformer(host, make_loader(2), moving(host))
    assert distance(values(branch), values(again)) == 0 and distance(values(branch), start) > 0


def test_a_with_without_training_is_no_error(refiner: PromptRefiner) -> None:
    """Also after one with training, whose last gradients are still there."""
    img, _ = make_loader(1)[0]
    for own in (True, False):
        model, branch = ToyMCTformer(), make_branch()
        optimizer = moving(model)
        if not own:
            optimizer.add_param_group({"params": branch.parameters()})
        attached = adapters.attach(
            "mctformer", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch) if own else None
        )
        with attached:
            pass
        with attached:
            train_mctformer(model, make_loader(1), optimizer)
        moved = values(branch)
        with attached, torch.no_grad():
            model.eval()(img)
        assert attached.steps == 1 and distance(values(branch), moved) == 0


@each_toy
def test_one_with_per_epoch_equals_one_long_with(toy: Toy, refiner: PromptRefiner) -> None:
    """The optimizer keeps its state, the last step of an epoch is made before its `with` ends."""
    found = []
    for epochs in (1, 3):
        model, branch = toy.build(), make_branch()
        optimizer, own = torch.optim.AdamW(model.parameters(), lr=0.01), own_optimizer(branch)
        attached = adapters.attach(toy.host, model, refiner, branch=branch, branch_optimizer=own, **toy.options)
        seen = []
        for _ in range(epochs):
            before = values(branch)
            with attached:
                seen += toy.train(model, make_loader(2) * (3 // epochs), optimizer)
            assert distance(values(branch), before) > 0
        assert attached.steps == 6 and {int(state["step"]) for state in own.state.values()} == {6}
        found.append((seen, values(branch), values(model)))
    assert found[0][0] == found[1][0]
    assert distance(found[0][1], found[1][1]) == 0 and distance(found[0][2], found[1][2]) == 0


def test_new_attachments_per_epoch(refiner: PromptRefiner) -> None:
    """Match, prompts, refine: one branch and one optimizer through all of it."""
    loader = make_loader(2)
    model, branch = ToyMCTformer(), make_branch()
    optimizer, own = moving(model), own_optimizer(branch)
    for stage in ("match", "refine"):
        assert refiner.stage == stage
        with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own) as attached:
            train_mctformer(model, loader, optimizer)
        if stage == "match":
            with branch.insert(model.eval()):
                refiner.fit_prompts(loader, adapters.cam_of("mctformer", model), epochs=1, progress=False)
    assert attached.terms.keys() == REFINER_TERMS | BRANCH_TERMS | {"refine"}
    assert {int(state["step"]) for state in own.state.values()} == {4}
    assert_branch_is_free(branch, model)


@each_toy
def test_evaluation_in_the_middle(toy: Toy, refiner: PromptRefiner) -> None:
    """Evaluation runs with the tokens, is no step and changes nothing, also between a forward pass and its label loss."""
    loader = make_loader(2)
    img, labels = make_loader(1, seed=5)[0]

    def evaluate(model: nn.Module) -> List[Tensor]:
        found = []
        for training, grad in ((False, False), (False, True), (True, False)):
            with torch.set_grad_enabled(grad):
                out = model.train(training)(img)
                found += [x.detach() for x in ([out] if isinstance(out, Tensor) else out)]
                F.multilabel_soft_margin_loss(found[0], labels)
        model.train()
        return found

    runs = []
    for evaluating in (False, True):
        model, branch = toy.build(), make_branch()
        own = own_optimizer(branch)
        with adapters.attach(toy.host, model, refiner, branch=branch, branch_optimizer=own, **toy.options) as attached:
            toy.train(model, loader[:1], moving(model))
            if evaluating:
                before = attached.loss
                inside = evaluate(model)
                assert attached.steps == 1 and attached.loss == before
                assert {int(state["step"]) for state in own.state.values()} == {1}  # evaluated is the trained branch
                trained, host = values(branch), values(model)
            model.train()
            out = model(loader[1][0])
            if evaluating:
                evaluate(model)
            loss = F.multilabel_soft_margin_loss(out if isinstance(out, Tensor) else out[0], loader[1][1])
            loss.backward()
        assert attached.steps == 2
        runs.append((loss.item(), attached.terms, values(branch)))
    assert runs[0][:2] == runs[1][:2] and distance(runs[0][2], runs[1][2]) == 0
    # The same outputs by the branch alone, others without it.
    model.load_state_dict(host)
    branch.load_state_dict(trained)
    with branch.insert(model):
        assert all(torch.equal(a, b) for a, b in zip(inside, evaluate(model)))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(inside, evaluate(model)))


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_evaluation_in_inference_mode(kind: str, refiner: PromptRefiner) -> None:
    """An evaluation under inference mode between two steps leaves the optimizer's state usable."""
    found = []
    for evaluating in (False, True):
        model, branch = ToyViT(), make_branch()
        options = {"momentum": 0.9} if kind == "SGD" else {}
        own = getattr(torch.optim, kind)(branch.parameters(), lr=0.01, **options)
        optimizer = moving(model)
        with adapters.attach("generic", model, refiner, branch=branch, branch_optimizer=own, **VIT):
            train_plain(model, make_loader(1), optimizer)
            if evaluating:
                with torch.inference_mode():
                    model.eval()(make_loader(1)[0][0])
            train_plain(model, make_loader(2), optimizer)
        found.append(values(branch))
    assert distance(*found) == 0


def test_no_graph_is_kept_between_steps(refiner: PromptRefiner) -> None:
    img, labels = make_loader(1)[0]
    model, branch = ToyViT().train(), make_branch()
    with adapters.attach("generic", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **VIT) as attached:
        F.multilabel_soft_margin_loss(model(img), labels).backward()
        (capture,) = attached._captures
        assert capture.tokens is None and not holds_tokens(branch) and branch.tokens.output is None


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_neither_refiner_nor_branch() -> None:
    with pytest.raises(TypeError, match="`refiner` must be a PromptRefiner, or None together with `branch`; got NoneType"):
        adapters.attach("mctformer", ToyMCTformer(), None)
    with pytest.raises(TypeError, match="or None together with `branch`; got str"):
        adapters.attach("mctformer", ToyMCTformer(), "refiner", branch=make_branch())  # type: ignore[arg-type]


def test_other_arguments(refiner: PromptRefiner) -> None:
    model, branch = ToyMCTformer(), make_branch()
    with pytest.raises(TypeError, match=r"`branch` must be a ClusterBranch; got CategoryClusters.*ClusterBranch\(clusters"):
        adapters.attach("mctformer", model, refiner, branch=CLUSTERS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`branch_optimizer` is for the parameters of `branch`; got no `branch`"):
        adapters.attach("mctformer", model, refiner, branch_optimizer=moving(model))
    with pytest.raises(ValueError, match=r"it lacks 'tokens.tokens'.*torch.optim.AdamW\(branch.parameters\(\)"):
        adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=moving(model))
    with pytest.raises(ValueError, match="it lacks 'classifier.weight.weight'. "):
        some = [p for name, p in branch.named_parameters() if name != "classifier.weight.weight"]
        adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=torch.optim.SGD(some, lr=1.0))


def test_classes_in_another_order(refiner: PromptRefiner) -> None:
    other = make_branch(CLUSTERS.ordered(["train", "boat", "bird"]))
    with pytest.raises(
        ValueError,
        match=r"the same order; got 'boat', 'train', 'bird' and 'train', 'boat', 'bird'. Use clusters.ordered\(refiner.classes",
    ):
        adapters.attach("mctformer", ToyMCTformer(), refiner, branch=other)
    more = make_branch(CategoryClusters({"all": [*CLASSES, "dog"]}, [*CLASSES, "dog"]))
    with pytest.raises(ValueError, match="must have the same classes"):
        adapters.attach("mctformer", ToyMCTformer(), refiner, branch=more)


@pytest.mark.parametrize(
    "host, build, options", [("transcam", ToyTransCAM, {}), ("generic", ToyCNN, CNN)], ids=["transcam", "cnn"]
)
def test_no_transformer(host: str, build: Any, options: Dict[str, Any], refiner: PromptRefiner) -> None:
    model, branch = build(), make_branch()
    attached = adapters.attach(
        host, model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **options
    )  # fmt: skip
    with pytest.raises(HostError, match=r"a list of transformer blocks 'blocks' in Toy\w+, but there is none. .*blocks='"):
        with attached:
            raise AssertionError("entered")
    assert_branch_is_free(branch, model)
    with pytest.raises(HostError, match=r"a list of transformer blocks 'blocks' in Toy\w+, but there is none"):
        ClusterBranch(CLUSTERS, model)


def test_a_branch_that_is_in_the_host_already(refiner: PromptRefiner) -> None:
    model, branch = ToyMCTformer(), make_branch()
    with branch.insert(model):
        with pytest.raises(
            HostError, match="ToyMCTformer holds cluster tokens or a cluster branch already; leave that `with` first"
        ):
            with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch)):
                pass
        model(make_loader(1)[0][0])
        assert branch.pop_tokens().tokens.shape == (2, 2, WIDTH)
    assert_branch_is_free(branch, model)


class Stop(Exception):
    pass


class FailingHost(ToyMCTformer):
    """Fails in its third forward pass, after its blocks, if `fail` is set."""

    calls, fail = 0, False

    def forward(self, x: Tensor, **options: Any) -> Any:
        self.calls += 1
        out = super().forward(x, **options)
        if self.fail and self.calls == 3:
            raise Stop
        return out


def _loader_that_stops() -> Any:
    yield from make_loader(2)
    raise Stop


def _log_that_stops(step: int, terms: Dict[str, float]) -> None:
    raise Stop


ENDS: Dict[str, Any] = {
    "normal": None,
    "replace": None,
    "loop": Stop,
    "host": Stop,
    "block": Stop,
    "log": Stop,
    "keyboard": KeyboardInterrupt,
    "label loss": adapters.HostError,
    "not trained": adapters.HostError,
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_after(end: str, refiner: PromptRefiner) -> None:
    error = ENDS[end]
    model, branch = FailingHost(), make_branch()
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = ToyMCTformer()
    expected = train_mctformer(first, make_loader(3), moving(first))
    model.fail = end == "host"
    broken = model.blocks[1].mlp.register_forward_hook(lambda *_: _log_that_stops(0, {})) if end == "block" else None
    options: Dict[str, Any] = {"branch_optimizer": None if end == "not trained" else own_optimizer(branch)}
    if end == "log":
        options["on_step"] = _log_that_stops
    if end == "replace":
        options["mode"] = "replace"

    def loop() -> None:
        if end == "label loss":
            for img, labels in make_loader(2):
                unknown_loss(model.train()(img)[0], labels).backward()
        train_mctformer(model, _loader_that_stops() if end == "loop" else make_loader(4), moving(model))
        if end == "keyboard":
            raise KeyboardInterrupt

    attached = adapters.attach("mctformer", model, refiner, branch=branch, **options)
    if error is None:
        with attached:
            loop()
    else:
        with pytest.raises(error):
            with attached:
                loop()
    if broken is not None:
        broken.remove()
    assert_branch_is_free(branch, model)
    assert {name: set(vars(module)) - {"calls", "fail"} for name, module in model.named_modules()} == keys
    assert all(bool(value.isfinite().all()) for value in branch.parameters())
    model.load_state_dict(state, strict=True)
    model.zero_grad(set_to_none=True)
    model.fail = False
    assert train_mctformer(model, make_loader(3), moving(model)) == expected
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in model.state_dict().items())
    with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch)) as again:
        train_mctformer(model, make_loader(2), moving(model))
    assert again.steps == 2


# ------------------------------------------------------------------------------------------------ checkpoints


@each_toy
def test_the_hosts_checkpoints_stay_its_own(toy: Toy, refiner: PromptRefiner) -> None:
    model, branch = toy.build(), make_branch()
    keys = list(model.state_dict())
    with adapters.attach(toy.host, model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **toy.options):
        toy.train(model, make_loader(1), moving(model))
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        assert list(saved) == keys == [*dict(model.named_parameters())]
        model.load_state_dict(toy.build().state_dict(), strict=True)
        model.load_state_dict(saved, strict=True)
    toy.build().load_state_dict(saved, strict=True)
    model.load_state_dict(toy.build().state_dict(), strict=True)
    img, _ = make_loader(1)[0]
    with torch.no_grad():
        assert torch.equal(toy.cam(model, img), toy.cam(toy.build(), img))


def test_a_trained_branch_is_saved_and_loaded(refiner: PromptRefiner) -> None:
    model, branch = ToyViT(), make_branch()
    with adapters.attach("generic", model, refiner, branch=branch, branch_optimizer=own_optimizer(branch), **VIT):
        train_plain(model, make_loader(2), moving(model))
    other = make_branch(seed=7)
    other.load_state_dict(branch.state_dict(), strict=True)
    img, _ = make_loader(1)[0]
    found = []
    for one in (branch, other):
        with one.insert(model.eval()), torch.no_grad():
            found.append((model(img), one.cam((model(img), one.pop_tokens())[1])))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# ------------------------------------------------------------------------------------------------ steps of its own


def test_the_hosts_own_optimizer_is_refused_as_the_branchs(refiner: PromptRefiner) -> None:
    model, branch = ToyMCTformer(), make_branch()
    both = torch.optim.SGD([*model.parameters(), *branch.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="alone; it holds [0-9]+ more, .* pass branch_optimizer=None"):
        adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=both)
    some = torch.optim.SGD(list(branch.parameters())[1:], lr=0.1)
    with pytest.raises(ValueError, match="it lacks 'tokens.tokens'"):
        adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=some)


def test_the_branch_is_stepped_when_backward_is_over() -> None:
    model, branch = ToyViT(), make_branch()
    own = own_optimizer(branch)
    (img, labels) = make_loader()[0]
    with adapters.attach("generic", model, None, branch=branch, branch_optimizer=own, **VIT):
        before = values(branch)
        loss = F.multilabel_soft_margin_loss(model(img), labels)
        assert distance(values(branch), before) == 0
        loss.backward()
        assert distance(values(branch), before) > 1e-4  # at once, not at the next forward pass
        after = values(branch)
        model(img)
        assert distance(values(branch), after) == 0
    assert {int(state["step"]) for state in own.state.values()} == {1}
    assert all(p.grad is None for p in branch.parameters())


def test_steps_that_were_left_out_are_reported_at_the_callers_line() -> None:
    model, branch = ToyViT(), make_branch()
    (img, labels) = make_loader()[0]
    with pytest.warns(UserWarning, match="2 steps of the cluster branch were left out") as caught:
        with adapters.attach("generic", model, None, branch=branch, branch_optimizer=own_optimizer(branch), **VIT):
            for _ in range(2):
                (F.multilabel_soft_margin_loss(model(img), labels) * float("inf")).backward()
                model.zero_grad()
            F.multilabel_soft_margin_loss(model(img), labels).backward()
    assert [warning.filename for warning in caught] == [__file__]


def test_mixed_labels_are_refused_by_a_branch_alone() -> None:
    model, branch = ToyViT(), make_branch()
    img, labels = make_loader()[0]
    with pytest.raises(ValueError, match="`labels` must be 0 or 1; got values such as 0.5.*turn mixup and cutmix off"):
        with adapters.attach("generic", model, None, branch=branch, branch_optimizer=own_optimizer(branch), **VIT):
            F.multilabel_soft_margin_loss(model(img), 0.5 * labels + 0.5 * labels.flip(0)).backward()
    assert_branch_is_free(branch, model)


def test_smoothed_labels_are_hard_ones_for_a_branch_alone() -> None:
    img, labels = make_loader()[0]
    found = []
    for target in (labels, 0.9 * labels + 0.1 / 3):
        model, branch = ToyViT(), make_branch()
        with adapters.attach("generic", model, None, branch=branch, branch_optimizer=own_optimizer(branch), **VIT) as attached:
            F.multilabel_soft_margin_loss(model(img), target).backward()
        found.append(attached.terms)
    assert found[0] == found[1]


def test_running_a_copy_of_the_host_is_no_step(refiner: PromptRefiner) -> None:
    """Many loops keep such a copy, with averaged weights."""
    model, branch = ToyMCTformer(), make_branch()
    own = own_optimizer(branch)
    (img, labels) = make_loader()[0]
    with adapters.attach("mctformer", model, refiner, branch=branch, branch_optimizer=own) as attached:
        train_mctformer(model, make_loader(1), torch.optim.SGD(model.parameters(), lr=0.1))
        average, before = copy.deepcopy(model).eval(), values(branch)
        with torch.no_grad():
            average(img)
        assert distance(values(branch), before) == 0 and attached.steps == 1
        train_mctformer(model, make_loader(1), torch.optim.SGD(model.parameters(), lr=0.1))
    assert attached.steps == 2


def test_a_branch_alone_needs_no_cam() -> None:
    model, branch = ToyViT(), make_branch()
    with adapters.attach("generic", model, None, branch=branch, branch_optimizer=own_optimizer(branch)) as attached:
        train_plain(model, make_loader(2), torch.optim.SGD(model.parameters(), lr=0.1))
    assert attached.steps == 2 and set(attached.terms) == BRANCH_TERMS
    with pytest.raises(ValueError, match="Say where the CAM comes from"):
        adapters.attach("generic", model, None, branch=branch, activation="relu")
