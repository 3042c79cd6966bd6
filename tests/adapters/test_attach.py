"""`attach` and `cam_of` around the loops of toy hosts: values, gradients, every way to go wrong, and nothing left behind."""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from semples_plugin import DetachedCamError, PromptRefiner, SemplesError, adapters
from semples_plugin.adapters.mctformer import safe_sqrt
from semples_plugin.adapters.registry import HOSTS
from tests.adapters.toy_hosts import (
    CLASSES,
    TOYS,
    Scaler,
    Toy,
    ToyCNN,
    ToyMCTformer,
    ToyTransCAM,
    ToyViT,
    ToyWeakTr,
    amp,
    cnn_cam,
    make_loader,
    mctformer_cam,
    regulariser,
    train_mctformer,
    train_plain,
    train_transcam,
    transcam_cam,
    weaktr_cam,
)

CNN, VIT = {"features": "body", "classifier": "fc"}, {"features": "norm", "classifier": "head"}
each_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)


@pytest.fixture
def refiner(make_refiner: Callable[..., PromptRefiner]) -> PromptRefiner:
    return make_refiner(CLASSES, image_stats="imagenet")


@pytest.fixture
def cnn() -> ToyCNN:
    return ToyCNN().train()


def still(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with lr = 0, so that what a loop did can be computed by hand."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def moving(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def gradients(model: nn.Module) -> Dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: Dict[str, Tensor], expected: Dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert sorted(got) == sorted(expected)
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=tolerance, atol=tolerance * 0.1 * largest), name


def by_hand(toy: Toy, refiner: PromptRefiner, batch: Any, **options: Any) -> Tuple[float, Dict[str, Tensor]]:
    """The refiner's loss and gradients on the host's own CAM, as an edit of the host would compute them."""
    model = toy.build().train()
    loss = refiner(batch[0], toy.cam(model, batch[0], keep_graph=True, **options), batch[1])
    loss.backward()
    return loss.item(), gradients(model)


def plain_run(toy: Toy, loader: Any, **options: Any) -> Tuple[List[float], Dict[str, Tensor]]:
    model = toy.build()
    return toy.train(model, loader, still(model), **options), gradients(model)


def total(*parts: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: sum(part[name] for part in parts if name in part) for part in parts for name in part}  # type: ignore[misc]


def hooks_on(*models: nn.Module) -> List[str]:
    """Names of all hook tables that hold something, on any module."""
    found = []
    for model in models:
        for name, module in model.named_modules():
            found += [f"{name}.{table}" for table, value in vars(module).items() if "hooks" in table and value]
    return found


def mode_stack() -> List[Any]:
    stack = getattr(torch.overrides, "_get_current_function_mode_stack", None)
    return list(stack()) if stack is not None else []


FUNCTIONS = dict(vars(F))


def assert_nothing_left(*models: nn.Module) -> None:
    assert hooks_on(*models) == [] and mode_stack() == []
    assert all(vars(F)[name] is value for name, value in FUNCTIONS.items())


class Calls(TorchFunctionMode):
    """Counts the torch functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ values and gradients


@each_toy
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_added_once_per_step(toy: Toy, weight: float, refiner: PromptRefiner) -> None:
    loader = make_loader(3)
    plain, without = plain_run(toy, loader)
    own = [by_hand(toy, refiner, batch) for batch in loader]
    model = toy.build()
    with adapters.attach(toy.host, model, refiner, weight=weight, **toy.options) as attached:
        seen = toy.train(model, loader, still(model))
    assert attached.steps == len(seen) == 3
    assert seen == pytest.approx([base + weight * loss for base, (loss, _) in zip(plain, own)], rel=1e-5)
    assert attached.loss == pytest.approx(own[-1][0], rel=1e-5)
    assert min(abs(a - b) for a, b in zip(seen, plain)) > 1e-2
    scaled = {name: weight * g for name, g in own[-1][1].items()}
    assert_same_gradients(gradients(model), total(without, scaled))
    moved = [name for name, g in gradients(model).items() if not torch.allclose(g, without.get(name, 0 * g), atol=1e-7)]
    assert len(moved) > 4


@each_toy
def test_one_forward_pass_per_step(toy: Toy, refiner: PromptRefiner) -> None:
    model = toy.build()
    inner = next(iter(model.children()))
    counts = {"model": 0, "inner": 0}

    def count(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        counts[name] += 1

    handles = [m.register_forward_hook(functools.partial(count, name)) for name, m in (("model", model), ("inner", inner))]
    with adapters.attach(toy.host, model, refiner, **toy.options):
        toy.train(model, make_loader(3), moving(model))
    assert counts == {"model": 3, "inner": 3}
    for handle in handles:
        handle.remove()


@each_toy
def test_training_follows_the_refiner(toy: Toy, refiner: PromptRefiner) -> None:
    """The refiner's loss falls in replace mode, and the same run twice gives the same numbers."""
    runs = []
    for _ in range(2):
        model = toy.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        log: List[Dict[str, float]] = []
        on_step = functools.partial(lambda log, step, terms: log.append(terms), log)
        with adapters.attach(toy.host, model, refiner, mode="replace", on_step=on_step, **toy.options):
            toy.train(model, make_loader(1) * 8, optimizer)
        runs.append([terms["loss"] for terms in log])
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0] - 0.01


@each_toy
def test_replace_keeps_only_the_refiners_loss(toy: Toy, refiner: PromptRefiner) -> None:
    loader = make_loader(1)
    loss, expected = by_hand(toy, refiner, loader[0])
    _, without = plain_run(toy, loader)
    model = toy.build()
    if toy.name == "mctformer":  # other terms of a host stay
        rest = regulariser(model.train()(loader[0][0])[1])
        rest.backward()
        loss, expected = loss + rest.item(), total(expected, gradients(model))
    with adapters.attach(toy.host, model, refiner, mode="replace", **toy.options) as attached:
        seen = toy.train(model, loader, still(model))
    assert attached.steps == 1 and seen == pytest.approx([loss], rel=1e-5)
    # What only the label losses reach still gets a gradient, a zero one: DistributedDataParallel waits for it.
    zeros = {name: torch.zeros_like(g) for name, g in without.items()}
    assert_same_gradients(gradients(model), total(zeros, expected))
    if toy.name == "cnn":
        assert torch.equal(model.fc.bias.grad, torch.zeros(3)) and "fc.bias" not in expected


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("label_losses", [1, 2])
def test_any_number_of_label_losses(mode: str, label_losses: int, refiner: PromptRefiner) -> None:
    loader = make_loader(2)
    toy = TOYS[0]
    plain, _ = plain_run(toy, loader, label_losses=label_losses)
    own = [by_hand(toy, refiner, batch)[0] for batch in loader]
    model = toy.build()
    with torch.no_grad():
        rest = [regulariser(model(img)[1]).item() for img, _ in loader]
    with adapters.attach("mctformer", model, refiner, mode=mode):
        seen = train_mctformer(model, loader, still(model), label_losses=label_losses)
    base = plain if mode == "add" else rest
    assert seen == pytest.approx([a + b for a, b in zip(base, own)], rel=1e-5)


@pytest.mark.parametrize("toy", TOYS[:3], ids=lambda toy: toy.name)
@pytest.mark.parametrize("kind", ["patch", "refined", "raw"])
def test_other_cams_of_a_host(toy: Toy, kind: str, refiner: PromptRefiner) -> None:
    known = {"mctformer": ("patch", "refined"), "weaktr": ("patch", "refined"), "transcam": ("raw",)}[toy.name]
    if kind not in known:
        if (toy.name, kind) != ("transcam", "patch"):
            with pytest.raises(ValueError, match=f"`cam` must be 'fused', .* got '{kind}'"):
                adapters.attach(toy.host, toy.build(), refiner, cam=kind)
        return
    loader = make_loader(1)
    plain, without = plain_run(toy, loader)
    loss, own = by_hand(toy, refiner, loader[0], kind=kind)
    model = toy.build()
    with adapters.attach(toy.host, model, refiner, cam=kind):
        seen = toy.train(model, loader, still(model))
    assert seen == pytest.approx([plain[0] + loss], rel=1e-5)
    assert_same_gradients(gradients(model), total(without, own))


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_layers_of_mctformer(layers: int, refiner: PromptRefiner) -> None:
    img, _ = make_loader(1)[0]
    model = ToyMCTformer().eval()
    expected = mctformer_cam(model, img, n_layers=layers)
    assert torch.allclose(adapters.cam_of("mctformer", model, layers=layers)(img), expected, atol=1e-6)
    with pytest.raises(ValueError, match="`layers` must be at least 1; got 0"):
        adapters.attach("mctformer", model, refiner, layers=0)


def test_transcam_before_attention(refiner: PromptRefiner) -> None:
    (img, labels), model = make_loader(1)[0], ToyTransCAM().train()
    expected = refiner(img, model.conv_cls_head(model.stem(img))[:, 1:].relu(), labels).item()
    with adapters.attach("transcam", model, refiner, cam="patch") as attached:
        train_transcam(model, [(img, labels)], still(model))
    assert attached.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_a_refiner_for_a_background_channel_trains_and_learns_prompts(toy: Toy, make_refiner: Any) -> None:
    """Adapters hand over CAMs without background channel, to `attach` and to `fit_prompts` alike."""
    found = []
    for background in (False, True):
        model, loader = toy.build(), make_loader(2)
        refiner = make_refiner(CLASSES, image_stats="imagenet", background_channel=background)
        with adapters.attach(toy.host, model, refiner, **toy.options) as attached:
            toy.train(model, loader, still(model))
        function = adapters.cam_of(toy.host, model.eval(), **toy.options)
        fit = refiner.fit_prompts(loader, function, epochs=2, progress=False)
        masks = refiner.refine_masks(loader[0][0], function(loader[0][0]), loader[0][1]).masks
        found.append(([attached.loss, *fit.losses], masks))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and torch.equal(found[0][1], found[1][1])


def test_terms_loss_steps_and_log(make_refiner: Any) -> None:
    refiner = make_refiner(CLASSES, image_stats="imagenet", lambda_area=0.5)
    refiner.fit_prompts(make_loader(1), adapters.cam_of("generic", ToyCNN(), **CNN), epochs=1, progress=False)
    log: List[Tuple[int, Dict[str, float]]] = []
    model = ToyCNN()
    attached = adapters.attach("generic", model, refiner, on_step=lambda step, terms: log.append((step, terms)), **CNN)
    assert attached.steps == 0 and attached.terms == {} and attached.loss is None
    img, labels = make_loader(2)[1]
    out = refiner.compute(img, cnn_cam(model.train(), img), labels)
    with attached as entered:
        assert entered is attached
        train_plain(model, make_loader(2), still(model))
    assert attached.steps == 2 and [step for step, _ in log] == [1, 2]
    assert sorted(attached.terms) == ["area", "match_background", "match_foreground", "refine"]
    assert attached.terms == pytest.approx({name: float(value) for name, value in out.terms.items()}, rel=1e-5)
    assert log[-1][1] == {**attached.terms, "loss": attached.loss}
    assert all(type(value) is float for value in log[-1][1].values())
    assert attached.loss == pytest.approx(float(out.loss), rel=1e-5)


# ------------------------------------------------------------------------------------------------ what a loop may do


def test_gradient_accumulation(refiner: PromptRefiner) -> None:
    loader = make_loader(2)
    expected = ToyCNN().train()
    for img, labels in loader:
        loss = F.multilabel_soft_margin_loss(expected(img), labels)
        ((loss + refiner(img, cnn_cam(expected, img, keep_graph=True), labels)) / 2).backward()
    model = ToyCNN().train()
    optimizer = moving(model)
    with adapters.attach("generic", model, refiner, **CNN) as attached:
        for img, labels in loader:
            (F.multilabel_soft_margin_loss(model(img), labels) / 2).backward()
        assert_same_gradients(gradients(model), gradients(expected))
        optimizer.step()
    assert attached.steps == 2


def test_two_steps_before_one_backward(refiner: PromptRefiner) -> None:
    loader = make_loader(2)
    parts = [by_hand(TOYS[3], refiner, batch) for batch in loader]
    base, without = zip(*(plain_run(TOYS[3], [batch]) for batch in loader))
    model = ToyCNN().train()
    with adapters.attach("generic", model, refiner, **CNN) as attached:
        losses = [F.multilabel_soft_margin_loss(model(img), labels) for img, labels in loader]
        sum(losses).backward()
    assert attached.steps == 2
    assert [x.item() for x in losses] == pytest.approx([b[0] + p[0] for b, p in zip(base, parts)], rel=1e-5)
    assert_same_gradients(gradients(model), total(*without, *(g for _, g in parts)))


@pytest.mark.parametrize("toy", TOYS[:2], ids=lambda toy: toy.name)
def test_a_scaled_loss(toy: Toy, refiner: PromptRefiner) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = toy.build()
        with adapters.attach(toy.host, model, refiner):
            losses = toy.train(model, make_loader(2), moving(model), loss_scaler=Scaler(scale))
        found.append((losses, gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("toy", TOYS[:2], ids=lambda toy: toy.name)
@pytest.mark.parametrize("kind", ["fused", "refined"])
def test_autocast(toy: Toy, kind: str, mode: str, refiner: PromptRefiner) -> None:
    found = []
    for on in (False, True):
        model = toy.build()
        with adapters.attach(toy.host, model, refiner, mode=mode, cam=kind) as attached:
            losses = toy.train(model, make_loader(2), still(model), autocast=on)
        found.append((losses, attached.loss, gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02) and found[1][1] == pytest.approx(found[0][1], rel=0.02)
    assert sorted(found[0][2]) == sorted(found[1][2])
    a, b = (torch.cat([g.flatten() for g in run[2].values()]) for run in found)
    assert torch.isfinite(b).all() and F.cosine_similarity(a, b, dim=0) > 0.95


def test_the_label_loss_outside_autocast(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    img, labels = make_loader(1)[0]
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        with amp(True):
            logits = cnn(img)
        loss = F.multilabel_soft_margin_loss(logits.float(), labels)
        loss.backward()
    assert attached.steps == 1 and loss.dtype == torch.float32 and loss.isfinite()


class Quadratic(nn.Module):
    """A label loss of the host's own that torch knows nothing of."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.sigmoid() - labels).square().mean()


class Wrapped(nn.Module):
    """A criterion that uses a watched function twice inside."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        first = F.binary_cross_entropy_with_logits(logits, labels)
        return first + F.binary_cross_entropy_with_logits(2 * logits, labels)


def on_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy(logits.sigmoid(), labels)


def by_keyword(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(target=labels, input=logits)


QUADRATIC, WRAPPED, STANDARD = Quadratic(), Wrapped(), nn.BCEWithLogitsLoss()


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize(
    "criterion, label_loss",
    [
        (nn.MultiLabelSoftMarginLoss(), None),
        (nn.MultiLabelSoftMarginLoss(weight=torch.tensor([1.0, 2.0, 3.0])), None),
        (STANDARD, None),
        (STANDARD, STANDARD),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"), None),
        (on_probabilities, None),
        (by_keyword, None),
        (by_keyword, F.binary_cross_entropy_with_logits),
        (F.mse_loss, F.mse_loss),
        (nn.SmoothL1Loss(), F.smooth_l1_loss),
        (QUADRATIC, QUADRATIC),
        (WRAPPED, WRAPPED),
        (WRAPPED, None),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_label_losses(criterion: Any, label_loss: Any, mode: str, refiner: PromptRefiner, cnn: ToyCNN) -> None:
    loader = make_loader(2)
    plain, _ = plain_run(TOYS[3], loader, criterion=criterion)
    own = [by_hand(TOYS[3], refiner, batch)[0] for batch in loader]
    with adapters.attach("generic", cnn, refiner, mode=mode, label_loss=label_loss, **CNN) as attached:
        seen = train_plain(cnn, loader, still(cnn), criterion=criterion)
    assert attached.steps == 2
    base = plain if mode == "add" else [0.0, 0.0]
    assert seen == pytest.approx([a + b for a, b in zip(base, own)], rel=1e-5)
    if isinstance(criterion, nn.Module):
        assert_nothing_left(cnn, criterion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_labels(dtype: torch.dtype, refiner: PromptRefiner, cnn: ToyCNN) -> None:
    img, labels = make_loader(1)[0]
    expected, _ = by_hand(TOYS[3], refiner, (img, labels))
    smooth = (0.9 * labels + 0.1 / 3).to(dtype)
    base = F.multilabel_soft_margin_loss(ToyCNN().train()(img), smooth).item()
    with adapters.attach("generic", cnn, refiner, **CNN):
        seen = train_plain(cnn, [(img, smooth)], still(cnn))
    assert seen == pytest.approx([base + expected], rel=1e-5)


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_mixed_labels_are_refused(mode: str, refiner: PromptRefiner, cnn: ToyCNN) -> None:
    """Labels of 0.5, as mixup makes them, are no labels of a CAM; they must not count as 0 in silence."""
    img, labels = make_loader(1)[0]
    mixed = 0.5 * labels + 0.5 * labels.flip(0)
    assert (mixed == 0.5).any()
    with pytest.raises(ValueError, match="`labels` must be 0 or 1; got values such as 0.5.*turn mixup and cutmix off"):
        with adapters.attach("generic", cnn, refiner, mode=mode, **CNN):
            train_plain(cnn, [(img, mixed)], still(cnn))
    assert_nothing_left(cnn)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 1, 1)])
def test_labels_with_a_background_column(shape: Tuple[int, ...], refiner: PromptRefiner) -> None:
    model = ToyCNN(num_classes=4).train()
    img, labels = make_loader(1)[0]
    expected = refiner(img, F.conv2d(model.body(img), model.fc.weight[:, :, None, None])[:, 1:], labels).item()
    target = torch.cat([torch.ones(2, 1), labels], dim=1).reshape(shape)
    with adapters.attach("generic", model, refiner, background_channel=True, **CNN) as attached:
        F.binary_cross_entropy_with_logits(model(img).reshape(shape), target).backward()
    assert attached.steps == 1 and attached.loss == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_positive_labels(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    loader = [(make_loader(1)[0][0], torch.zeros(2, 3))]
    plain, _ = plain_run(TOYS[3], loader)
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        assert train_plain(cnn, loader, still(cnn)) == plain
    assert attached.steps == 1 and attached.loss == 0


def test_other_losses_are_left_alone(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    """Only losses over (B, C) or (B, C + 1) targets are label losses."""
    img, labels = make_loader(1)[0]
    maps = torch.randn(2, 1, 8, 8, requires_grad=True)

    def others(cnn: nn.Module) -> List[Tensor]:
        logits = cnn(img)
        return [
            F.binary_cross_entropy_with_logits(maps, torch.ones(2, 1, 8, 8)),
            F.binary_cross_entropy(maps.sigmoid(), torch.ones(2, 1, 8, 8)),
            F.binary_cross_entropy_with_logits(torch.cat([logits, logits]), torch.cat([labels, labels])),
            F.binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0]),
            F.cross_entropy(logits, labels.argmax(1)),
            F.mse_loss(logits, labels),
        ]

    expected = [loss.item() for loss in others(ToyCNN().train())]
    with adapters.attach("generic", cnn, refiner, mode="replace", **CNN) as attached:
        losses = others(cnn)
        assert [loss.item() for loss in losses] == expected and attached.steps == 0
        losses.append(F.multilabel_soft_margin_loss(cnn(img), labels))
        assert attached.steps == 1
        sum(losses).backward()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_two_forward_passes_per_step(passes: int, refiner: PromptRefiner, cnn: ToyCNN) -> None:
    """The last pass counts, unless the host is said to need several: then the first of them."""
    (first, labels), (second, _) = make_loader(2)
    expected, _ = by_hand(TOYS[3], refiner, (second if passes == 1 else first, labels))
    other = ToyCNN().train()
    base = F.multilabel_soft_margin_loss(other(first) + other(second), labels).item()
    with adapters.attach("generic", cnn, refiner, forward_pass="last" if passes == 1 else "first", **CNN) as attached:
        for _ in range(2):
            loss = F.multilabel_soft_margin_loss(cnn(first) + cnn(second), labels)
            loss.backward()
            assert loss.item() == pytest.approx(base + expected, rel=1e-4)
    assert attached.steps == 2


def test_two_views_with_a_label_loss_each(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    (first, labels), (second, _) = make_loader(2)
    expected, _ = by_hand(TOYS[3], refiner, (first, labels))
    with adapters.attach("generic", cnn, refiner, mode="replace", **CNN) as attached:
        a, b = cnn(first), cnn(second)
        losses = [F.multilabel_soft_margin_loss(a, labels), F.multilabel_soft_margin_loss(b, labels)]
        sum(losses).backward()
    assert attached.steps == 1 and [x.item() for x in losses] == pytest.approx([expected, 0.0], rel=1e-5)


def test_a_batch_whose_loss_is_skipped_is_forgotten(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    (skipped, _), batch = make_loader(2)
    expected, _ = by_hand(TOYS[3], refiner, batch)
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        cnn(skipped)  # `if ...: continue` before the loss
        F.multilabel_soft_margin_loss(cnn(batch[0]), batch[1]).backward()
    assert attached.steps == 1 and attached.loss == pytest.approx(expected, rel=1e-5)


def test_evaluation_in_the_middle(refiner: PromptRefiner) -> None:
    loader = make_loader(2)
    img, labels = make_loader(1, seed=5)[0]

    def evaluate(model: nn.Module) -> List[float]:
        found = []
        for training, grad in ((False, False), (False, True), (True, False)):
            with torch.set_grad_enabled(grad):
                logits = model.train(training)(img)
                found += [logits.sum().item(), F.multilabel_soft_margin_loss(logits, labels).item()]
        model.train()
        return found

    model, other = ToyViT(), ToyViT()
    with adapters.attach("generic", model, refiner, mode="replace", **VIT) as attached:
        train_plain(model, loader[:1], moving(model))
        other.load_state_dict(model.state_dict())
        loss = attached.loss
        seen = evaluate(model)
        assert attached.steps == 1 and attached.loss == loss
        logits = model(loader[1][0])  # also between a forward pass and its label loss
        evaluate(model)
        F.multilabel_soft_margin_loss(logits, loader[1][1]).backward()
        assert attached.steps == 2 and attached.loss != loss
    assert seen == evaluate(other)


@pytest.mark.parametrize("what", ["wrapper", "network"])
@each_toy
def test_data_parallel_without_gpus(toy: Toy, what: str, refiner: PromptRefiner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain, _ = plain_run(toy, make_loader(1))
    network = toy.build()
    wrapper = nn.DataParallel(network)
    with adapters.attach(toy.host, wrapper if what == "wrapper" else network, refiner, **toy.options) as attached:
        seen = toy.train(wrapper, make_loader(1), still(wrapper))
    assert attached.steps == 1 and seen == pytest.approx([plain[0] + attached.loss], rel=1e-5)
    assert_nothing_left(wrapper)


def test_replicas_of_data_parallel(refiner: PromptRefiner) -> None:
    img, labels = make_loader(1)[0]
    network = ToyMCTformer().train()
    with pytest.raises(adapters.HostError, match="runs as a replica of torch.nn.DataParallel. Give `attach` the DataParallel"):
        with adapters.attach("mctformer", network, refiner):
            network._replicate_for_data_parallel()(img)

    class Parallel(nn.DataParallel):  # as with several GPUs: the wrapper runs replicas
        def forward(self, *inputs: Any, **options: Any) -> Any:
            replica = self.module._replicate_for_data_parallel()
            for name, module in replica.named_children():
                copy = module._replicate_for_data_parallel()
                copy._parameters, replica._modules = dict(module._parameters), {**replica._modules, name: copy}
            replica._parameters = dict(self.module._parameters)
            return replica(*inputs, **options)

    wrapper = Parallel.__new__(Parallel)
    nn.Module.__init__(wrapper)
    wrapper.module = network
    with pytest.raises(adapters.HostError, match=r"made inside the network \('head'\).*Use DistributedDataParallel .* one GPU"):
        with adapters.attach("mctformer", wrapper, refiner, cam="patch"):
            wrapper(img)
    assert_nothing_left(wrapper)
    transcam = Parallel.__new__(Parallel)  # its CAM is the network's output: it can be had
    nn.Module.__init__(transcam)
    transcam.module = ToyTransCAM()
    with adapters.attach("transcam", transcam, refiner) as attached:
        train_transcam(transcam, [(img, labels)], still(transcam))
    assert attached.steps == 1


def test_the_image_as_a_keyword(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    img, labels = make_loader(1)[0]
    expected, _ = by_hand(TOYS[3], refiner, (img, labels))
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        F.multilabel_soft_margin_loss(cnn(img=img), labels).backward()
    assert attached.loss == pytest.approx(expected, rel=1e-5)


def test_two_refiners_at_once(refiner: PromptRefiner, make_refiner: Any) -> None:
    other = make_refiner(CLASSES, image_stats="imagenet", lambda_b=0.1)
    loader = make_loader(2)
    plain, _ = plain_run(TOYS[3], loader)
    own = [by_hand(TOYS[3], refiner, batch)[0] + by_hand(TOYS[3], other, batch)[0] for batch in loader]
    model = ToyCNN()
    with adapters.attach("generic", model, refiner, **CNN), adapters.attach("generic", model, other, **CNN):
        seen = train_plain(model, loader, still(model))
    assert seen == pytest.approx([a + b for a, b in zip(plain, own)], rel=1e-5)
    assert_nothing_left(model)


class OwnSource(adapters.CamSource):
    """A source of one's own: its image comes in a dictionary."""

    name = "own"

    def __init__(self, wanted: Any = ("cam",), cam: Optional[Callable[..., Any]] = None):
        self.wanted, self.make = wanted, cam

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        return {name: model.get_submodule(name) for name in self.wanted}

    def cam(self, img: Tensor, output: Any, records: adapters.Records) -> Any:
        return records["cam"] if self.make is None else self.make(img, output, records)

    def image(self, inputs: Tuple[Any, ...], keywords: Any) -> Optional[Tensor]:
        return inputs[0]["image"] if isinstance(inputs[0], dict) else inputs[0]


class DictHost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cam, self.unused = nn.Conv2d(3, 3, 8, stride=8), nn.Linear(1, 1)

    def forward(self, batch: Dict[str, Tensor]) -> Tensor:
        return self.cam(batch["image"]).mean((2, 3))


def test_a_custom_source(refiner: PromptRefiner) -> None:
    img, labels = make_loader(1)[0]
    model = DictHost().train()
    expected = refiner(img, model.cam(img), labels).item()
    with adapters.attach(OwnSource(), model, refiner) as attached:
        F.multilabel_soft_margin_loss(model({"image": img}), labels).backward()
    assert attached.loss == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TypeError, match="Options such as 'cam' belong to hosts given by name"):
        adapters.attach(OwnSource(), model, refiner, cam="patch")


def test_records_of_modules_that_ran_and_that_did_not(refiner: PromptRefiner) -> None:
    img, labels = make_loader(1)[0]
    model = DictHost().train()
    seen: List[Any] = []

    def cam(img: Tensor, output: Tensor, records: adapters.Records) -> Tensor:
        seen.append((records.names(), len(records.all("cam")), records.all("unused"), output.shape))
        with pytest.raises(adapters.HostError, match="'unused', which did not run in this forward pass; .* 'cam' ran"):
            records["unused"]
        with pytest.raises(adapters.HostError, match="'other' is not watched; watched are 'cam', 'unused'"):
            records["other"]
        return records["cam"]

    with adapters.attach(OwnSource(("cam", "unused"), cam), model, refiner):
        F.multilabel_soft_margin_loss(model({"image": img}), labels).backward()
    assert seen == [(["cam", "unused"], 1, [], torch.Size([2, 3]))]


# ------------------------------------------------------------------------------------------------ what goes wrong


def unknown_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.sigmoid() - labels).square().mean()


def test_attach_to_an_object_that_the_loop_does_not_call(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    other = ToyCNN()
    with pytest.raises(
        adapters.HostError,
        match="label loss multilabel_soft_margin_loss was computed, but no CAM .* ToyCNN ran 0 times .* the very object",
    ):
        with adapters.attach("generic", other, refiner, **CNN):
            train_plain(cnn, make_loader(1), still(cnn))


def test_label_loss_never_seen(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    losses = "multilabel_soft_margin_loss, binary_cross_entropy_with_logits, binary_cross_entropy; losses seen"
    for count, steps in ((1, 1), (3, 1)):  # at the end of the `with`, or at the next forward pass
        done: List[int] = []
        with pytest.raises(adapters.HostError, match=rf"no label loss over 3 classes was seen. Looked for {losses}: none"):
            with adapters.attach("generic", cnn, refiner, **CNN):
                for batch in make_loader(count):
                    train_plain(cnn, [batch], still(cnn), criterion=unknown_loss)
                    done.append(1)
        assert len(done) == steps
    with pytest.raises(adapters.HostError, match=r"losses seen: mse_loss with targets tensor \(2, 3\) \(1x\)") as caught:
        with adapters.attach("generic", cnn, refiner, **CNN):
            train_plain(cnn, make_loader(1), still(cnn), criterion=F.mse_loss)
    assert "label_loss=criterion" in str(caught.value) and isinstance(caught.value, (SemplesError, RuntimeError))
    with pytest.raises(adapters.HostError, match="Looked for Quadratic; losses seen: binary_cross_entropy_with_logits"):
        with adapters.attach("generic", cnn, refiner, label_loss=QUADRATIC, **CNN):
            train_plain(cnn, make_loader(1), still(cnn), criterion=F.binary_cross_entropy_with_logits)
    assert_nothing_left(cnn, QUADRATIC)


def test_label_loss_no_longer_seen(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    with pytest.raises(adapters.HostError, match="no label loss over 3 classes was seen"):
        with adapters.attach("generic", cnn, refiner, **CNN) as attached:
            train_plain(cnn, make_loader(2), still(cnn))
            train_plain(cnn, make_loader(2), still(cnn), criterion=unknown_loss)
    assert attached.steps == 2


def test_training_without_the_host(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    with pytest.raises(adapters.HostError, match=r"backward\(\) ran 2 times, but ToyCNN never ran in training mode"):
        with adapters.attach("generic", ToyCNN(), refiner, **CNN):
            train_plain(cnn, make_loader(2), still(cnn), criterion=unknown_loss)
    with pytest.raises(adapters.HostError, match=r"never ran in training mode with gradients.* call model.train\(\)"):
        with adapters.attach("generic", cnn.eval(), refiner, **CNN):
            for img, labels in make_loader(2):
                F.multilabel_soft_margin_loss(cnn(img), labels).backward()


def test_a_second_with_is_checked_like_the_first(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    attached = adapters.attach("generic", cnn, refiner, **CNN)
    with attached:
        train_plain(cnn, make_loader(1), still(cnn))
    with pytest.raises(adapters.HostError, match="never ran in training mode"):
        with attached:
            for img, labels in make_loader(2):
                F.multilabel_soft_margin_loss(cnn.eval()(img), labels).backward()


def test_a_with_without_training_is_no_error(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        cnn.eval()(make_loader(1)[0][0])
    assert attached.steps == 0


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(reduction="none"), nn.MultiLabelSoftMarginLoss(reduction="none")])
def test_an_unreduced_label_loss(criterion: nn.Module, refiner: PromptRefiner, cnn: ToyCNN) -> None:
    with pytest.raises(adapters.HostError, match=r"must be a scalar .* gave shape \(2.* \(reduction='none'\)"):
        with adapters.attach("generic", cnn, refiner, **CNN):
            train_plain(cnn, make_loader(1), still(cnn), criterion=lambda logits, labels: criterion(logits, labels).mean())
    assert_nothing_left(cnn, criterion)


def test_models_of_another_kind(refiner: PromptRefiner) -> None:
    cnn = ToyCNN()
    message = r"no MCTformer model: expected the module 'head' \(Conv2d\), which is missing in ToyCNN. Its modules are 'body'"
    with pytest.raises(adapters.HostError, match=message + r".* use attach\(\"generic\""):
        adapters.attach("mctformer", cnn, refiner)
    assert_nothing_left(cnn)
    with pytest.raises(adapters.HostError, match=r"'head' \(Conv2d\), which is a Linear in ToyViT"):
        adapters.attach("mctformer", ToyViT(), refiner)
    with pytest.raises(adapters.HostError, match="no WeakTr model: .*'adaptive_attention_fusion.attn_head_ffn'"):
        adapters.attach("weaktr", ToyMCTformer(), refiner)
    with pytest.raises(adapters.HostError, match="no TransCAM model: .*'conv_cls_head'.* missing in ToyWeakTr"):
        adapters.attach("transcam", ToyWeakTr(), refiner)
    with pytest.raises(TypeError, match="`model` must be the host's torch.nn.Module; got str"):
        adapters.attach("mctformer", "model.pth", refiner)  # type: ignore[arg-type]


class Bare(nn.Module):
    """Named like MCTformer and TransCAM, with other outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.blocks = nn.Identity(), nn.ModuleList([nn.Identity()])
        self.head, self.conv_cls_head, self.trans_cls_head = nn.Conv2d(3, 3, 8, stride=8), nn.Identity(), nn.Identity()

    def forward(self, img: Tensor) -> Tensor:
        return self.blocks[0](self.head(img)).mean((2, 3))


def test_outputs_of_another_kind(refiner: PromptRefiner) -> None:
    expected = {
        "mctformer": r"Expected blocks.0 of MCTformer to return \(tokens, attention \(B, heads, N, N\)\); got Tensor",
        "transcam": r"Expected TransCAM to return \(logits, logits, cams \(B, C \+ 1, h, w\)\); got Tensor",
    }
    for host, message in expected.items():
        model = Bare()
        with pytest.raises(adapters.HostError, match=message):
            with adapters.attach(host, model, refiner):
                train_plain(model, make_loader(1), still(model))
        assert_nothing_left(model)
    for cam, message in ((lambda *parts: [1], "must be a tensor .* got int"), (lambda *parts: None, "got NoneType")):
        with pytest.raises(adapters.HostError, match=message):
            with adapters.attach(OwnSource(("head",), cam), Bare().train(), refiner) as attached:
                train_plain(attached.model, make_loader(1), still(attached.model))


def test_another_number_of_classes(make_refiner: Any, cnn: ToyCNN) -> None:
    five = make_refiner(["boat", "train", "bird", "dog", "cat"], image_stats="imagenet")
    with pytest.raises(
        adapters.HostError,
        match=r"no label loss over 5 classes was seen.*multilabel_soft_margin_loss with targets tensor \(2, 3\) \(1x\).*number",
    ):
        with adapters.attach("generic", cnn, five, **CNN):
            train_plain(cnn, make_loader(1), still(cnn))
    two = make_refiner(["boat", "train"], image_stats="imagenet")  # the first of three columns is no background: not all ones
    with pytest.raises(adapters.HostError, match="no label loss over 2 classes was seen"):
        with adapters.attach("generic", cnn, two, **CNN):
            train_plain(cnn, make_loader(1), still(cnn))
    assert_nothing_left(cnn)


class Detached(ToyCNN):
    def forward(self, img: Tensor) -> Tensor:
        self.cam = F.conv2d(self.body(img), self.fc.weight[:, :, None, None]).detach()
        return super().forward(img)


def test_a_detached_cam(refiner: PromptRefiner) -> None:
    model = Detached()
    with pytest.raises(DetachedCamError, match="The CAM of Detached is cut off .*adapters.probe"):
        with adapters.attach("generic", model, refiner, cam=lambda output, records: model.cam):
            train_plain(model, make_loader(1), still(model))
    assert_nothing_left(model)


def test_other_image_statistics_than_the_hosts_warn_at_the_callers_line(make_refiner: Any) -> None:
    with pytest.warns(UserWarning, match="MCTformer normalizes its images with 'imagenet'; .* image_stats=None") as caught:
        adapters.attach("mctformer", ToyMCTformer(), make_refiner(CLASSES))
    assert [warning.filename for warning in caught] == [__file__]
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.warns(UserWarning, match="ToyCNN|the host") as caught:
        adapters.attach("generic", ToyCNN(), make_refiner(CLASSES), image_stats=half, **CNN)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapters.attach("mctformer", ToyMCTformer(), make_refiner(CLASSES, image_stats="imagenet"))
        adapters.attach("generic", ToyCNN(), make_refiner(CLASSES, image_stats=half), image_stats=[[0.5] * 3, [0.5] * 3], **CNN)
        adapters.attach("generic", ToyCNN(), make_refiner(CLASSES), **CNN)


def test_a_warning_of_the_refiner_points_to_the_line_of_the_label_loss(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    img, labels = make_loader(1)[0]
    with pytest.warns(UserWarning, match="all its values are in") as caught:
        with adapters.attach("generic", cnn, refiner, **CNN):
            F.multilabel_soft_margin_loss(cnn(img.clamp(0, 1)), labels).backward()
    assert [warning.filename for warning in caught] == [__file__]


def test_every_host_of_the_registry_is_a_source_in_a_module_of_its_name() -> None:
    for name, kind in HOSTS.items():
        module = importlib.import_module(f"semples_plugin.adapters.{name}")
        found = getattr(module, kind)
        assert issubclass(found, adapters.CamSource) and found.__module__ == module.__name__ and kind in module.__all__
    assert sorted(HOSTS) == adapters.names()


def test_unknown_hosts_and_options(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    assert adapters.names() == ["dupl", "excel", "generic", "mctformer", "recam", "toco", "transcam", "weaktr", "weclip"]
    with pytest.raises(ValueError, match="must be one of 'dupl', .* 'weaktr', 'weclip' or a CamSource; got 'other'"):
        adapters.attach("other", cnn, refiner)
    with pytest.raises(TypeError, match="The host 'mctformer' has no option 'layer'; its options are cam, layers."):
        adapters.attach("mctformer", cnn, refiner, layer=1)
    with pytest.raises(ValueError, match="`mode` must be 'add' .* or 'replace' .*; got 'instead'"):
        adapters.attach("generic", cnn, refiner, mode="instead", **CNN)
    for weight, error in ((-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="`weight` must be"):
            adapters.attach("generic", cnn, refiner, weight=weight, **CNN)  # type: ignore[arg-type]
    for label_loss in (unknown_loss, 3, lambda a, b: a, torch.float32):
        with pytest.raises(
            TypeError, match="`label_loss` must be a torch.nn.Module called as .* wrapping it in a small nn.Module"
        ):
            adapters.attach("generic", cnn, refiner, label_loss=label_loss, **CNN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`on_step` must be a callable .* got list"):
        adapters.attach("generic", cnn, refiner, on_step=[], **CNN)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`refiner` must be a PromptRefiner, or None together with `branch`; got ToyCNN"):
        adapters.attach("generic", cnn, cnn, **CNN)  # type: ignore[arg-type]
    assert_nothing_left(cnn)


def test_entering_twice(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    attached = adapters.attach("generic", cnn, refiner, **CNN)
    with attached:
        with pytest.raises(adapters.HostError, match="entered already; use one `with` at a time"):
            with attached:
                pass
        train_plain(cnn, make_loader(1), still(cnn))
    assert attached.steps == 1
    assert_nothing_left(cnn)
    with attached:  # later again
        train_plain(cnn, make_loader(2), still(cnn))
    assert attached.steps == 3
    assert_nothing_left(cnn)


def test_a_call_without_images(refiner: PromptRefiner) -> None:
    model = DictHost().train()
    img, labels = make_loader(1)[0]
    with pytest.raises(adapters.HostError, match="DictHost was called without an image batch: .* got dict. Give a CamSource"):
        with adapters.attach("generic", model, refiner, cam="cam"):
            model({"image": img})
    plain = ToyCNN().train()
    plain.body[0] = nn.Conv2d(4, 8, 4, stride=4)
    with pytest.raises(adapters.HostError, match=r"called without an image batch: .* got tensor \(2, 4, 32, 32\)"):
        with adapters.attach("generic", plain, refiner, **CNN):
            plain(torch.rand(2, 4, 32, 32))
    assert_nothing_left(model, plain)


# ------------------------------------------------------------------------------------------------ nothing is left


class Stop(Exception):
    pass


class Failing(ToyCNN):
    """Fails in its third forward pass, after the watched module, if `fail` is set."""

    calls, fail = 0, False

    def forward(self, img: Tensor) -> Tensor:
        self.calls += 1
        logits = super().forward(img)
        if self.fail and self.calls == 3:
            raise Stop("out of memory")
        return logits


def _loader_that_stops() -> Any:
    yield from make_loader(2)
    raise Stop("loader")


def _log_that_stops(step: int, terms: Dict[str, float]) -> None:
    raise Stop("log")


ENDS: Dict[str, Tuple[Any, Dict[str, Any]]] = {
    "normal": (None, {}),
    "replace": (None, {"mode": "replace"}),
    "criterion": (adapters.HostError, {"label_loss": QUADRATIC}),
    "loop": (Stop, {}),
    "host": (Stop, {}),
    "log": (Stop, {"on_step": _log_that_stops}),
    "keyboard": (KeyboardInterrupt, {}),
    "label loss": (adapters.HostError, {}),
    "cam": (adapters.HostError, {"features": "dropout", "classifier": "fc"}),
    "detached": (DetachedCamError, {"cam": lambda output, records: torch.rand(2, 3, 4, 4)}),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_after(end: str, refiner: PromptRefiner) -> None:
    error, options = ENDS[end]
    model = Failing()
    first, state = ToyCNN(), {name: value.clone() for name, value in model.state_dict().items()}
    expected = train_plain(first, make_loader(3), moving(first))
    model.fail = end == "host"
    options = options if "features" in options or "cam" in options else {**CNN, **options}

    def loop() -> None:
        loader = _loader_that_stops() if end == "loop" else make_loader(4)
        train_plain(
            model, loader, moving(model), criterion=unknown_loss if end == "label loss" else F.multilabel_soft_margin_loss
        )
        if end == "keyboard":
            raise KeyboardInterrupt

    attached = adapters.attach("generic", model, refiner, **options)
    if error is None:
        with attached:
            assert hooks_on(model)
            loop()
    else:
        with pytest.raises(error):
            with attached:
                loop()
    assert_nothing_left(model, QUADRATIC)
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    model.fail = False
    optimizer = moving(model)
    with Calls() as after:
        again = train_plain(model, make_loader(3), optimizer)
    assert again == expected
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in model.state_dict().items())
    never_attached = ToyCNN()
    optimizer = moving(never_attached)
    with Calls() as never:
        train_plain(never_attached, make_loader(3), optimizer)
    assert after.count == never.count


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("wanted", ["none", "script"])
def test_nothing_is_left_if_attach_fails_halfway(wanted: str, refiner: PromptRefiner) -> None:
    class Halfway(OwnSource):
        def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
            return {"body": model.body, "other": None if wanted == "none" else torch.jit.script(nn.Conv2d(3, 3, 1))}  # type: ignore

    model = ToyCNN()
    with pytest.raises(Exception):  # noqa: B017
        with adapters.attach(Halfway(), model, refiner, label_loss=QUADRATIC):
            pass
    assert_nothing_left(model, QUADRATIC)


@each_toy
def test_training_after_a_with_equals_training_that_was_never_attached(toy: Toy, refiner: PromptRefiner) -> None:
    def run() -> Tuple[List[float], int, nn.Module]:
        model = toy.build()
        optimizer = moving(model)
        with Calls() as calls:
            seen = toy.train(model, make_loader(2), optimizer)
        return seen, calls.count, model

    losses, count, model = run()
    other = toy.build()
    with adapters.attach(toy.host, other, refiner, **toy.options):
        toy.train(other, make_loader(2), moving(other))
    assert hooks_on(other) == []
    again, count_again, model_again = run()
    other.load_state_dict(toy.build().state_dict())
    other.zero_grad(set_to_none=True)
    optimizer = moving(other)
    with Calls() as calls:
        same = toy.train(other, make_loader(2), optimizer)
    assert losses == again == same and count == count_again == calls.count > 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), model_again.state_dict().values()))


def test_no_graph_is_kept_between_steps(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    """Between steps the attachment keeps no tensor that holds on to the host's graph."""
    img, labels = make_loader(1)[0]
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        F.multilabel_soft_margin_loss(cnn(img), labels).backward()
        (capture,) = attached._captures
        assert not capture.img.requires_grad and capture.output is None and capture.records.names() == []
    assert attached._captures == []


# ------------------------------------------------------------------------------------------------ cam_of


@pytest.mark.parametrize(
    "host, build, cam, kind",
    [
        *(("mctformer", ToyMCTformer, mctformer_cam, kind) for kind in ("fused", "patch", "refined")),
        *(("weaktr", ToyWeakTr, weaktr_cam, kind) for kind in ("fused", "patch", "refined")),
        *(("transcam", ToyTransCAM, transcam_cam, kind) for kind in ("fused", "raw")),
    ],
)
def test_cam_of_is_the_cam_of_the_hosts_inference(host: str, build: Any, cam: Any, kind: str) -> None:
    model = build().eval()
    img, _ = make_loader(1)[0]
    got, expected = adapters.cam_of(host, model, cam=kind)(img), cam(model, img, kind)
    assert got.shape == (2, 3, 4, 4) and not got.requires_grad and got.abs().max() > 0
    assert torch.allclose(got, expected, atol=1e-6, rtol=1e-4)
    assert_nothing_left(model)


@each_toy
def test_cam_of_serves_the_refiner(toy: Toy, refiner: PromptRefiner) -> None:
    model = toy.build().eval()
    loader = make_loader(2)
    function = adapters.cam_of(toy.host, model, **toy.options)
    fit = refiner.fit_prompts(loader, function, epochs=2, progress=False)
    context = refiner.prompts.context.clone()
    expected = refiner.fit_prompts(loader, lambda img: toy.cam(model, img), epochs=2, progress=False)
    assert fit.num_pairs == 6 and fit.losses == pytest.approx(expected.losses, rel=1e-4) and refiner.stage == "refine"
    assert torch.allclose(context, refiner.prompts.context, atol=1e-4)
    assert refiner.refine_masks(loader[0][0], function(loader[0][0]), loader[0][1]).masks.shape == (2, 3, 32, 32)
    assert not model.training and gradients(model) == {}
    assert_nothing_left(model)


def test_cam_of_inside_an_attachment(refiner: PromptRefiner, cnn: ToyCNN) -> None:
    loader = make_loader(2)
    function = adapters.cam_of("generic", cnn, **CNN)
    with adapters.attach("generic", cnn, refiner, **CNN) as attached:
        train_plain(cnn, loader[:1], still(cnn))
        assert torch.allclose(function(loader[0][0]), cnn_cam(cnn, loader[0][0]), atol=1e-6)
        train_plain(cnn, loader[1:], still(cnn))
    assert attached.steps == 2
    assert_nothing_left(cnn)


def test_cam_of_refuses_other_models_and_removes_its_hooks(cnn: ToyCNN) -> None:
    with pytest.raises(adapters.HostError, match="no MCTformer model"):
        adapters.cam_of("mctformer", cnn)
    function = adapters.cam_of("generic", cnn, **CNN)
    with pytest.raises(RuntimeError):
        function(torch.rand(2, 5, 32, 32))
    assert_nothing_left(cnn)


# ------------------------------------------------------------------------------------------------ safe_sqrt


def test_safe_sqrt() -> None:
    x = torch.tensor([0.0, 1e-12, 9e-9, 1e-8, 1.1e-8, 1e-4, 1.0, 9.0], requires_grad=True)
    y = safe_sqrt(x)
    assert y.tolist() == pytest.approx([0, 1e-8, 9e-5, 1e-4, 1.1e-8**0.5, 1e-2, 1, 3], rel=1e-5)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.isfinite().all() and gradient.max() <= 1.0001e4
    assert gradient.tolist() == pytest.approx([1e4, 1e4, 1e4, 1e4, 0.5 / 1.1e-8**0.5, 50, 0.5, 1 / 6], rel=1e-4)


@pytest.mark.parametrize("zero", ["some", "all", "attention"])
def test_a_cam_with_zeros_has_finite_gradients(zero: str, refiner: PromptRefiner) -> None:
    model = ToyMCTformer()
    with torch.no_grad():
        if zero == "all":
            model.head.bias -= 100
        if zero == "attention":  # one patch takes it all
            for block in model.blocks:
                block.qkv.weight *= 30
                block.qkv.bias *= 30
    cam = adapters.cam_of("mctformer", model, layers=1)(make_loader(1)[0][0])
    share = float((cam == 0).float().mean())
    assert share == 1 if zero == "all" else 0 < share < 1
    with adapters.attach("mctformer", model, refiner, layers=1, mode="replace") as attached:
        seen = train_mctformer(model, make_loader(1), still(model))
    assert attached.steps == 1 and all(x < 100 for x in seen)
    assert all(bool(g.isfinite().all()) for g in gradients(model).values())
