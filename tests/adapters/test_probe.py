"""`probe`: what the loss reaches, where its gradient stops or breaks, and that the host is unchanged afterwards."""

from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner, adapters
from tests.adapters.toy_hosts import (
    CLASSES,
    TOYS,
    Toy,
    ToyCNN,
    ToyMCTformer,
    ToyTransCAM,
    ToyViT,
    ToyWeakTr,
    make_loader,
    train_plain,
)

CNN = {"features": "body", "classifier": "fc"}
BATCH = make_loader(1)[0]


@pytest.fixture
def refiner(make_refiner: Callable[..., PromptRefiner]) -> PromptRefiner:
    return make_refiner(CLASSES, image_stats="imagenet")


def hooks_on(model: nn.Module) -> List[str]:
    return [f"{n}.{t}" for n, m in model.named_modules() for t, value in vars(m).items() if "hooks" in t and value]


def by_hand(toy: Toy, model: nn.Module, refiner: PromptRefiner) -> Tuple[float, Dict[str, Tensor]]:
    """The refiner's loss on the host's own CAM, and its gradients for the parameters that it reaches."""
    img, labels = BATCH
    model = copy.deepcopy(model).train()
    loss = refiner(img, toy.cam(model, img, keep_graph=True), labels)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), {name: g for name, g in zip(names, found) if g is not None}


# ------------------------------------------------------------------------------------------------ attached


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_what_the_loss_reaches(toy: Toy, refiner: PromptRefiner) -> None:
    model = toy.build()
    loss, expected = by_hand(toy, model, refiner)
    probe = adapters.probe(toy.host, model, refiner, *BATCH, **toy.options)
    parameters = dict(model.named_parameters())
    held, every = sum(parameters[name].numel() for name in expected), sum(p.numel() for p in parameters.values())
    assert probe.attached and probe.verdict.startswith(f"attached: the loss reaches {held:,} of {every:,} trainable values ")
    assert f"({len(expected)} of {len(parameters)} tensors)" in probe.verdict
    assert probe.loss == pytest.approx(loss, rel=1e-5)
    assert sorted(probe.names) == sorted(name for name, g in expected.items() if g.any())
    assert sum(row.parameters for row in probe.rows) == every and sum(row.reached for row in probe.rows) == held
    for row in probe.rows:
        inside = [name for name in parameters if name.startswith(f"{row.name}.") or name == row.name]
        norm = math.sqrt(sum(float(expected[name].square().sum()) for name in inside if name in expected))
        weights = math.sqrt(sum(float(parameters[name].detach().square().sum()) for name in inside))
        assert row.parameters == sum(parameters[name].numel() for name in inside), row
        assert row.gradient == pytest.approx(norm, rel=1e-3, abs=1e-6), row
        assert row.relative == pytest.approx(norm / weights, rel=1e-3, abs=1e-6), row


def test_the_verdict_names_what_is_not_reached(refiner: PromptRefiner) -> None:
    probe = adapters.probe("transcam", ToyTransCAM(), refiner, *BATCH)
    rows = {row.name: row for row in probe.rows}
    assert rows["trans_cls_head"].reached == 0 and rows["trans_cls_head"].gradient == 0
    assert rows["conv_cls_head"].reached == rows["conv_cls_head"].parameters > 0
    missed = probe.verdict.split("; not ")[1]
    assert missed.startswith("trans_block.proj.weight, ") and "conv_cls_head" not in missed
    assert adapters.probe("generic", ToyCNN(), refiner, *BATCH, **CNN).verdict.endswith("(7 of 8 tensors); not fc.bias")
    model = ToyCNN()
    model.unused = nn.Linear(2, 2)
    assert adapters.probe("generic", model, refiner, *BATCH, **CNN).verdict.endswith("(7 of 10 tensors); not fc.bias, unused")


def test_the_table(refiner: PromptRefiner) -> None:
    probe = adapters.probe("weaktr", ToyWeakTr(), refiner, *BATCH)
    names = ["patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1", "blocks.2", "head", "adaptive_attention_fusion"]
    assert sorted(row.name for row in probe.rows) == sorted(names)
    lines = str(probe).splitlines()
    assert lines[0].split() == ["module", "parameters", "reached", "gradient", "/", "weights"]
    assert [line.split()[0] for line in lines[1:-3]] == [row.name for row in probe.rows]
    assert lines[-3:] == [f"CAM {probe.cam}", f"loss {probe.loss:.4f}", f"verdict: {probe.verdict}"]
    deep = adapters.probe("weaktr", ToyWeakTr(), refiner, *BATCH, depth=2)
    deeper = [row.name for row in deep.rows]
    assert {"patch_embed.proj", "blocks.0", "adaptive_attention_fusion.attn_head_ffn.0", "head"} <= set(deeper)
    unreached = str(adapters.probe("transcam", ToyTransCAM(), refiner, *BATCH)).splitlines()
    assert [line.split()[2:] for line in unreached if line.startswith("trans_cls_head")] == [["0", "-", "-"]]


def test_only_trainable_parameters_count(refiner: PromptRefiner) -> None:
    model = ToyCNN()
    model.body[0].requires_grad_(False)
    probe = adapters.probe("generic", model, refiner, *BATCH, **CNN)
    assert probe.attached and "body.0.weight" not in probe.names and "body.3.weight" in probe.names
    assert sum(row.parameters for row in probe.rows) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_wrapped_host(wrap: bool, refiner: PromptRefiner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = adapters.probe("mctformer", ToyMCTformer(), refiner, *BATCH)
    model = ToyMCTformer()
    assert adapters.probe("mctformer", nn.DataParallel(model) if wrap else model, refiner, *BATCH) == expected


def test_under_no_grad(refiner: PromptRefiner) -> None:
    expected = adapters.probe("mctformer", ToyMCTformer(), refiner, *BATCH)
    with torch.no_grad():
        assert adapters.probe("mctformer", ToyMCTformer(), refiner, *BATCH) == expected


# ------------------------------------------------------------------------------------------------ cut, flat or broken


class Cut(nn.Module):
    """Three modules in a row with a cut after one of them; the logits have a branch of their own, before or after the CAM."""

    def __init__(self, after: str = "", logits: str = "same"):
        super().__init__()
        self.after, self.logits = after, logits
        self.first, self.second = nn.Conv2d(3, 4, 8, stride=8), nn.Conv2d(4, 4, 1)
        self.cam, self.fc = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)

    def cut(self, name: str, x: Tensor) -> Tensor:
        return x.detach() if self.after == name else x

    def forward(self, img: Tensor) -> Any:
        first = self.first(img)
        logits = self.fc(first.mean((2, 3))) if self.logits == "before" else None
        cam = self.cam(self.cut("second", self.second(self.cut("first", first))))
        if self.logits == "after":
            logits = self.fc(first.mean((2, 3)))
        return cam.mean((2, 3)) if logits is None else logits


def parameter_free(model: Cut) -> Cut:
    """Its class map has no parameters of its own, so that a cut before it is complete."""
    model.cam = nn.AdaptiveAvgPool3d((3, None, None))
    return model


@pytest.mark.parametrize("logits", ["same", "before", "after"])
def test_a_detached_cam_names_the_module_before_the_cut(logits: str, refiner: PromptRefiner) -> None:
    model = parameter_free(Cut("second", logits))
    probe = adapters.probe("generic", model, refiner, *BATCH, cam="cam")
    assert not probe.attached and probe.names == [] and math.isnan(probe.loss)
    assert probe.verdict.startswith("detached at module 'second': the last one whose output carries a graph; what follows it")
    assert all(row.reached == 0 for row in probe.rows) and "verdict: detached at module 'second'" in str(probe)


def test_the_table_shows_a_cut_in_the_middle(refiner: PromptRefiner) -> None:
    probe = adapters.probe("generic", Cut("second"), refiner, *BATCH, cam="cam")
    assert probe.attached and {name.split(".")[0] for name in probe.names} == {"cam"}
    assert probe.verdict.endswith("(2 of 8 tensors); not first, second, fc")


def test_a_frozen_host(refiner: PromptRefiner) -> None:
    for toy in TOYS:
        probe = adapters.probe(toy.host, toy.build().requires_grad_(False), refiner, *BATCH, **toy.options)
        assert not probe.attached and probe.rows == [] and probe.names == []
        assert probe.verdict.startswith(
            "detached at its first module: no module's output carries a graph (all parameters frozen"
        )
        assert "detached" in str(probe)


def test_a_host_frozen_up_to_its_cam(refiner: PromptRefiner) -> None:
    model = ToyCNN()
    model.requires_grad_(False)
    model.late = nn.Parameter(torch.ones(3))
    probe = adapters.probe("generic", model, refiner, *BATCH, **CNN)
    assert not probe.attached and probe.verdict.startswith("detached at")
    assert [(row.name, row.reached) for row in probe.rows] == [("late", 0)]


def test_no_grad_inside_the_host(refiner: PromptRefiner) -> None:
    class NoGrad(ToyCNN):
        def forward(self, img: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.body(img)
            return self.fc(x.mean((2, 3)))

    probe = adapters.probe(
        "generic", NoGrad(), refiner, *BATCH, cam=lambda output, records: records["body"][:, :3], modules=["body"]
    )
    assert not probe.attached and probe.verdict.startswith("detached at")


class Odd(nn.Module):
    def __init__(self, make: Callable[[Tensor], Tensor]):
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(x)


def test_nan_in_the_forward_pass(refiner: PromptRefiner) -> None:
    for make, index in ((lambda x: x / 0, "2"), (lambda x: (x - 100).log(), "2")):
        model = ToyCNN()
        model.body[2] = Odd(make)
        probe = adapters.probe("generic", model, refiner, *BATCH, **CNN)
        assert not probe.attached and math.isnan(probe.loss)
        assert probe.verdict == f"NaN at module 'body.{index}', the first whose output is not finite"
    model = ToyCNN()
    with torch.no_grad():
        model.body[3].weight[0, 0, 0, 0] = float("nan")
    assert adapters.probe("generic", model, refiner, *BATCH, **CNN).verdict.startswith("NaN at module 'body.3', the first")


def test_nan_in_the_cam_alone(refiner: PromptRefiner) -> None:
    cam = {"cam": lambda output, records: (records["body"][:, :3] - 100).sqrt(), "modules": ["body"]}
    probe = adapters.probe("generic", ToyCNN(), refiner, *BATCH, **cam)
    assert not probe.attached and probe.verdict.startswith("NaN at the CAM itself")


def test_nan_in_the_gradient(refiner: PromptRefiner) -> None:
    """sqrt at 0 has an infinite slope: everything before it gets NaN."""

    def root(x: Tensor) -> Tensor:
        return (x.sigmoid() * x.relu()).sqrt()

    cam = {"cam": lambda output, records: root(records["body.3"][:, :3]), "modules": ["body.3"]}
    probe = adapters.probe("generic", ToyCNN(), refiner, *BATCH, **cam)
    assert not probe.attached and math.isfinite(probe.loss)
    assert probe.verdict == "NaN at module 'body.3', where it enters the gradient"
    assert [row.name for row in probe.rows if math.isnan(row.gradient)] == ["body.0", "body.1", "body.3"]
    assert probe.names == [] and "nan" in str(probe)
    model = ToyCNN()
    model.body[2] = Odd(root)
    probe = adapters.probe("generic", model, refiner, *BATCH, **CNN)
    assert probe.verdict == "NaN at module 'body.1', where it enters the gradient"
    assert "body.3.weight" in probe.names and "body.1.weight" not in probe.names and not probe.attached


def test_a_gradient_of_zero(make_refiner: Any, tiny_clip: nn.Module) -> None:
    """Cosines below the clamp's edge: the loss is flat."""
    refiner = make_refiner(CLASSES, clip=tiny_clip, image_stats="imagenet")
    refiner.text_features.copy_(-refiner.encoder.encode_image(torch.rand(3, 3, 32, 32)))  # away from all images
    toy = TOYS[3]
    _, expected = by_hand(toy, toy.build(), refiner)
    assert all(not g.any() for g in expected.values())
    probe = adapters.probe("generic", toy.build(), refiner, *BATCH, **CNN)
    assert not probe.attached and probe.names == []
    assert probe.verdict.startswith("attached, but the gradient is zero: the terms are flat here (match_foreground 9.210, ")
    assert sum(row.reached for row in probe.rows) > 0 and all(row.gradient == 0 for row in probe.rows)


# ------------------------------------------------------------------------------------------------ afterwards


class Random(ToyCNN):
    """Dropout, noise, and a module that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.fail = False

    def forward(self, img: Tensor) -> Tensor:
        self.calls += 1
        logits = super().forward(img + 0.1 * torch.randn_like(img))
        if self.fail:
            raise RuntimeError("out of memory")
        return logits


@pytest.mark.parametrize("fail", ["", "host", "refiner", "cam"])
def test_probe_leaves_the_host_as_it_was(fail: str, refiner: PromptRefiner) -> None:
    model = Random().train()
    model.body[1].eval()
    model.fail = fail == "host"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identity = {name: value.data_ptr() for name, value in model.state_dict(keep_vars=True).items()}
    modes = {name: module.training for name, module in model.named_modules()}
    state, python = torch.get_rng_state(), random.getstate()
    img, labels = BATCH
    options: Dict[str, Any] = {"cam": lambda output, records: [][0]} if fail == "cam" else CNN
    if fail:
        wrong = labels[:, :2] if fail == "refiner" else labels
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            adapters.probe("generic", model, refiner, img, wrong, **options)
    else:
        assert adapters.probe("generic", model, refiner, img, labels, **options).attached
    assert hooks_on(model) == []
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.data_ptr() for name, value in model.state_dict(keep_vars=True).items()} == identity
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_gradients_of_the_host_stay(refiner: PromptRefiner) -> None:
    model = ToyCNN().train()
    F.multilabel_soft_margin_loss(model(BATCH[0]), BATCH[1]).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    adapters.probe("generic", model, refiner, *BATCH, **CNN)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


def test_two_probes_give_the_same_answer(refiner: PromptRefiner) -> None:
    model = Random()
    torch.manual_seed(0)
    assert adapters.probe("generic", model, refiner, *BATCH, **CNN) == adapters.probe("generic", model, refiner, *BATCH, **CNN)


def test_a_probe_between_steps_changes_nothing(refiner: PromptRefiner) -> None:
    found = []
    for probing in (False, True):
        torch.manual_seed(0)
        model = Random().train()
        losses = train_plain(model, make_loader(1), torch.optim.SGD(model.parameters(), lr=0.1))
        if probing:
            adapters.probe("generic", model, refiner, *BATCH, **CNN)
        losses += train_plain(model, make_loader(2), torch.optim.SGD(model.parameters(), lr=0.1))
        found.append((losses, model.eval()(BATCH[0]).tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("inside", [False, True])
def test_a_probe_inside_an_attachment_is_no_step(inside: bool, refiner: PromptRefiner) -> None:
    model = Random().train()
    with adapters.attach("generic", model, refiner, **CNN) as attached:
        if inside:
            adapters.probe("generic", model, refiner, *BATCH, **CNN)
        train_plain(model, make_loader(2), torch.optim.SGD(model.parameters(), lr=0.1))
    assert attached.steps == 2


# ------------------------------------------------------------------------------------------------ what is refused


def test_wrong_arguments_of_probe(refiner: PromptRefiner, make_refiner: Any) -> None:
    img, labels = BATCH
    model = ToyMCTformer()
    with pytest.raises(ValueError, match="`labels` must hold at least one positive label, .* got none"):
        adapters.probe("mctformer", model, refiner, img, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must be one of 'dupl', 'excel', 'generic'"):
        adapters.probe("other", model, refiner, img, labels)
    with pytest.raises(adapters.HostError, match="This is no MCTformer model"):
        adapters.probe("mctformer", ToyViT(), refiner, img, labels)
    with pytest.warns(UserWarning, match="MCTformer normalizes its images") as caught, warnings.catch_warnings():
        warnings.simplefilter("always")
        half = make_refiner(CLASSES, image_stats=((0.45, 0.45, 0.45), (0.22, 0.22, 0.22)))
        assert adapters.probe("mctformer", model, half, img, labels).attached
    assert [warning.filename for warning in caught] == [__file__]
    assert hooks_on(model) == []
