"""Hosts that are built otherwise: several networks, passes and losses per step, labels from elsewhere, no model at hand."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import warnings
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from semples_plugin import PromptRefiner, adapters
from semples_plugin.adapters.graph import found_in, nodes_of
from semples_plugin.errors import HostError
from tests.adapters.toy_hosts import CLASSES, DECODER, Decoder, ToyCNN, ToyViT, make_loader, pixel_loss, vit_cam

CNN = {"features": "body", "classifier": "fc"}


@pytest.fixture
def refiner(make_refiner: Callable[..., PromptRefiner]) -> PromptRefiner:
    return make_refiner(CLASSES, image_stats="imagenet")


@pytest.fixture
def batch() -> Tuple[Tensor, Tensor]:
    return make_loader(1)[0]


def net(seed: int = 0) -> ToyCNN:
    torch.manual_seed(seed)
    return ToyCNN().train()


def cam(model: nn.Module, img: Tensor) -> Tensor:
    return F.conv2d(model.body(img), model.fc.weight[:, :, None, None])


def hooks(*modules: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(part, name)) for module in modules for part in module.modules() for name in names)


def nothing_is_left(*modules: nn.Module) -> None:
    assert hooks(*modules) == 0 and not nn.modules.module._global_forward_pre_hooks
    assert torch._C._len_torch_function_stack() == 0
    assert not any("forward" in vars(part) for module in modules for part in module.modules())
    assert DataLoader.__iter__.__qualname__ == "DataLoader.__iter__"
    assert torch.amp.GradScaler.scale.__qualname__ == "GradScaler.scale"


# ------------------------------------------------------------------------------------------------ whose loss it is


def test_the_graph_of_a_loss_names_its_forward_passes() -> None:
    first, second = net(1), net(2)
    img = torch.rand(2, 3, 32, 32)
    outputs = [first(img), second(img), first(img)]
    wanted = [nodes_of(output) for output in outputs]
    assert found_in(outputs[0].sum(), wanted) == [0]
    assert found_in((outputs[2] * outputs[1]).mean(), wanted) == [1, 2]
    assert found_in(outputs[1].detach().requires_grad_(True).exp().sum(), wanted) == []
    assert found_in(outputs[0].sum(), []) == [] and nodes_of([img, {"a": None}]) == frozenset()


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_loss_of_another_network_is_left_alone(mode: str, refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model, other = net(1), net(2)
    expected = refiner(img, cam(model, img), labels).item()
    alone = F.multilabel_soft_margin_loss(other(img), labels)
    alone.backward()
    gradient = other.fc.weight.grad.clone()
    other.zero_grad()
    base = F.multilabel_soft_margin_loss(model(img), labels).item()
    with pytest.warns(UserWarning, match="1 label losses over 3 classes did not come from ToyCNN"):
        with adapters.attach("generic", model, refiner, mode=mode, **CNN) as attached:
            logits = model(img)
            foreign = F.multilabel_soft_margin_loss(other(img), labels)
            own = F.multilabel_soft_margin_loss(logits, labels)
            (foreign + own).backward()
    assert foreign.item() == alone.item() and torch.equal(other.fc.weight.grad, gradient)
    assert own.item() == pytest.approx(expected + (base if mode == "add" else 0), rel=1e-5)
    assert attached.steps == 1 and dict(attached.others) == {"multilabel_soft_margin_loss": 1}


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_two_networks_with_an_attachment_each(mode: str, refiner: PromptRefiner, batch: Any) -> None:
    """Each adds to its own loss, whichever is nested in which; nobody's loss is another's."""
    img, labels = batch
    models = [net(1), net(2)]
    base = [F.multilabel_soft_margin_loss(model(img), labels).item() for model in models]
    extra = [refiner(img, cam(model, img), labels).item() for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapters.attach("generic", models[0], refiner, mode=mode, **CNN) as first:
            with adapters.attach("generic", models[1], refiner, mode=mode, **CNN) as second:
                for turn in ((0, 1), (1, 0)):
                    logits = [model(img) for model in models]
                    losses = {k: F.multilabel_soft_margin_loss(logits[k], labels) for k in turn}
                    sum(losses.values()).backward()
                    expected = {k: extra[k] + (base[k] if mode == "add" else 0) for k in turn}
                    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-5)
                for model in models:  # in turn, as two trainings in one script
                    F.multilabel_soft_margin_loss(model(img), labels).backward()
    assert first.steps == second.steps == 3
    nothing_is_left(*models)


def test_two_attachments_that_replace_the_same_loss(refiner: PromptRefiner, make_refiner: Any, batch: Any) -> None:
    img, labels = batch
    model, other = net(1), make_refiner(CLASSES, image_stats="imagenet", lambda_b=0.1)
    expected = refiner(img, cam(model, img), labels).item() + other(img, cam(model, img), labels).item()
    with adapters.attach("generic", model, refiner, mode="replace", **CNN):
        with adapters.attach("generic", model, other, mode="replace", **CNN):
            loss = F.multilabel_soft_margin_loss(model(img), labels)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_and_unreduced_losses_beside_the_label_loss(refiner: PromptRefiner, batch: Any) -> None:
    """A consistency loss against predictions and an auxiliary loss per class are not the label loss, in whatever order."""
    img, labels = batch
    model = net(1)
    expected = refiner(img, cam(model, img), labels).item()

    def losses() -> List[Tensor]:
        logits = model(img)
        return [
            F.binary_cross_entropy_with_logits(logits, torch.full((2, 3), 0.4)),
            F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(),
            F.multilabel_soft_margin_loss(logits, labels),
        ]

    plain = [loss.item() for loss in losses()]
    with adapters.attach("generic", model, refiner, mode="replace", **CNN) as attached:
        found = losses()
        sum(found).backward()
    assert [loss.item() for loss in found] == pytest.approx([*plain[:2], expected], rel=1e-5) and attached.steps == 1


def test_images_without_a_class_before_the_images(refiner: PromptRefiner, batch: Any) -> None:
    """Out-of-distribution images, all of whose labels are 0, have a loss of their own first."""
    img, labels = batch
    model = net(1)
    expected = refiner(img, cam(model, img), labels).item()
    seen: List[int] = []
    with adapters.attach("generic", model, refiner, on_step=lambda step, _: seen.append(step), **CNN) as attached:
        for _ in range(2):
            nowhere, logits = model(img.flip(0) * 0.5), model(img)
            loss = F.binary_cross_entropy_with_logits(nowhere, torch.zeros(2, 3))
            loss = loss + F.binary_cross_entropy_with_logits(logits, labels)
            loss.backward()
            assert attached.loss == pytest.approx(expected, rel=1e-5)
    assert attached.steps == 2 and seen == [1, 1, 2, 2]


def test_an_adversarial_pass_with_a_backward_of_its_own(refiner: PromptRefiner, batch: Any) -> None:
    """Images, then others that are changed along the gradient of their logits, whose labels are 0; then both label losses."""
    img, labels = batch
    model = net(1)
    expected = refiner(img, cam(model, img), labels).item()
    with adapters.attach("generic", model, refiner, **CNN) as attached:
        for _ in range(2):
            logits = model(img)
            other = img.flip(0).clone().requires_grad_(True)
            model(other).amax(1).sum().backward()
            nowhere = model(other.detach() + 0.1 * other.grad.sign())
            loss = F.binary_cross_entropy_with_logits(nowhere, torch.zeros(2, 3))
            (loss + F.binary_cross_entropy_with_logits(logits, labels)).backward()
            assert attached.loss == pytest.approx(expected, rel=1e-5)
    assert attached.steps == 2


def test_a_foreign_backward_in_the_middle_of_a_step(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model, other = net(1), net(2)
    with adapters.attach("generic", model, refiner, **CNN) as attached:
        for _ in range(2):
            logits = model(img)
            other(img).sum().backward()
            F.multilabel_soft_margin_loss(logits, labels).backward()
    assert attached.steps == 2


# ------------------------------------------------------------------------------------------------ which forward pass


@pytest.mark.parametrize("which, counted", [("first", 0), ("last", 2), (1, 1)])
@pytest.mark.parametrize("together", [True, False])
def test_which_forward_pass_counts(which: Any, counted: int, together: bool, refiner: PromptRefiner) -> None:
    views, labels = [img for img, _ in make_loader(3)], make_loader(1)[0][1]
    model = net(1)
    expected = refiner(views[counted], cam(model, views[counted]), labels).item()
    base = [F.multilabel_soft_margin_loss(model(img), labels).item() for img in views]
    with adapters.attach("generic", model, refiner, forward_pass=which, **CNN) as attached:
        for _ in range(2):
            logits = [model(img) for img in views]
            if together:
                losses = [F.multilabel_soft_margin_loss(sum(logits), labels)]
            else:
                losses = [F.multilabel_soft_margin_loss(x, labels) for x in logits]
                assert [a.item() - b for a, b in zip(losses, base)][counted] == pytest.approx(expected, rel=1e-3)
            sum(losses).backward()
    assert attached.steps == 2 and attached.loss == pytest.approx(expected, rel=1e-5)


def test_a_pass_that_is_in_no_label_loss(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = net(1)
    with pytest.raises(HostError, match="no label loss over 3 classes was seen"):
        with adapters.attach("generic", model, refiner, forward_pass=1, **CNN):
            F.multilabel_soft_margin_loss(model(img), labels).backward()


def test_images_and_their_augmented_copies_with_one_set_of_labels(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = net(1)
    expected = refiner(img, cam(model, torch.cat([img, img.flip(-1)]))[:2], labels).item()
    with pytest.warns(UserWarning, match="ran on 4 images with labels for 2: .* of the first 2") as caught:
        with adapters.attach("generic", model, refiner, **CNN) as attached:
            for _ in range(2):
                both = model(torch.cat([img, img.flip(-1)]))
                F.multilabel_soft_margin_loss(both[:2], labels).backward()
                assert attached.loss == pytest.approx(expected, rel=1e-4)
    assert len(caught) == 1 and attached.steps == 2


def test_a_window_of_steps(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = net(1)
    base = F.multilabel_soft_margin_loss(model(img), labels).item()
    seen = []
    with adapters.attach("generic", model, refiner, mode="replace", first_step=2, last_step=3, **CNN) as attached:
        for _ in range(4):
            loss = F.multilabel_soft_margin_loss(model(img), labels)
            loss.backward()
            seen.append(loss.item() == base)
    assert seen == [True, False, False, True] and attached.steps == 4
    with pytest.raises(ValueError, match="`last_step` must be at least 3"):
        adapters.attach("generic", model, refiner, first_step=3, last_step=2, **CNN)


# ------------------------------------------------------------------------------------------------ labels from elsewhere


@pytest.mark.parametrize("where", ["forward:cls_label", "loader", "loader:1", "function", "indices"])
@pytest.mark.parametrize("at", ["backward", "cross_entropy"])
def test_a_decoder_with_labels_from_elsewhere(where: str, at: str, refiner: PromptRefiner) -> None:
    torch.manual_seed(0)
    model = Decoder().train()
    img, labels = make_loader(1)[0]
    labels = torch.eye(3)[[0, 2]] if where == "indices" else labels
    given = torch.tensor([0, 2]) if where == "indices" else labels
    data = DataLoader(list(zip(img, given)), batch_size=2)
    sources: Dict[str, Any] = {"function": lambda capture: capture.keywords["cls_label"], "indices": "loader:1"}
    expected = refiner(img, model(img).softmax(1)[:, 1:], labels).item()
    base = pixel_loss(model(img)).item()
    losses = []
    with adapters.attach(
        "generic", model, refiner, labels=sources.get(where, where), label_loss=None if at == "backward" else at, **DECODER
    ) as attached:
        for x, y in data:
            model.zero_grad()
            loss = pixel_loss(model(x, 1.0, cls_label=y))
            losses.append(loss.item())
            loss.backward()
    gradient = model.body.weight.grad.clone()
    model.zero_grad()
    (pixel_loss(model(img)) + refiner(img, model(img).softmax(1)[:, 1:], labels)).backward()
    assert attached.steps == 1 and attached.loss == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(gradient, model.body.weight.grad, rtol=1e-4, atol=1e-7)
    assert losses == pytest.approx([base if at == "backward" else base + expected], rel=1e-5)
    nothing_is_left(model)


def test_a_loader_that_is_ahead_of_the_loop_and_another_beside_it(refiner: PromptRefiner) -> None:
    """Labels belong to the images of the pass, not to the batch that was read last."""
    batches = make_loader(4)
    flat = [(x, y) for img, labels in batches for x, y in zip(img, labels)]
    ahead, other = iter(DataLoader(flat, batch_size=2)), DataLoader([(x, 1 - y) for x, y in flat[::-1]], batch_size=2)
    model = Decoder().train()
    with adapters.attach("generic", model, refiner, labels="loader", **DECODER) as attached:
        ahead = iter(DataLoader(flat, batch_size=2))
        queue = [next(ahead), next(ahead)]
        for (img, labels), _ in zip(batches, other):
            x, _ = queue.pop(0)
            queue.append(next(ahead, (None, None)))
            expected = refiner(img, model(img).softmax(1)[:, 1:], labels).item()
            pixel_loss(model(x)).backward()
            assert attached.loss == pytest.approx(expected, rel=1e-5)
    assert attached.steps == 4


@pytest.mark.parametrize("scaled", [False, True])
def test_at_backward_under_a_scaler_and_accumulation(scaled: bool, refiner: PromptRefiner) -> None:
    """The loss is added before it is scaled: the gradients are those of the sum, for any scale."""
    batches = make_loader(2)
    model = Decoder().train()
    for img, labels in batches:
        (0.5 * (pixel_loss(model(img)) + refiner(img, model(img).softmax(1)[:, 1:], labels))).backward()
    expected = model.body.weight.grad.clone()
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    targets = iter([labels for _, labels in batches])
    with adapters.attach("generic", model, refiner, labels=lambda _: next(targets), weight=0.5, **DECODER) as attached:
        for img, _ in batches:
            scaler.scale(pixel_loss(model(img)) / 2).backward()
    gradient = model.body.weight.grad / (64 if scaled else 1)
    assert attached.steps == 2 and torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    nothing_is_left(model)


def test_at_backward_with_the_labels_of_a_label_loss(refiner: PromptRefiner, batch: Any) -> None:
    """For a label loss that is not a scalar."""
    img, labels = batch
    model = net(1)
    expected = refiner(img, cam(model, img), labels).item()
    with adapters.attach("generic", model, refiner, label_loss="backward", **CNN) as attached:
        F.binary_cross_entropy_with_logits(model(img), labels, reduction="none").mean().backward()
    assert attached.steps == 1 and attached.loss == pytest.approx(expected, rel=1e-5)
    with pytest.raises(HostError, match="at backward.., but no labels were seen before it. Say where they come from"):
        with adapters.attach("generic", model, refiner, label_loss="backward", **CNN):
            model(img).sum().backward()


@pytest.mark.parametrize(
    "labels, message",
    [
        ("forward:label", "Decoder was called without an argument 'label'; given were .*'cls_label'"),
        ("forward:scale", r"Labels from the argument 'scale' of Decoder must be \(B, 3\) .* got float"),
        ("loader", "No DataLoader of torch gave a batch with labels .* of 0 remembered batches"),
        (lambda capture: torch.zeros(5, 3), r"Labels from the function <lambda> must be \(B, 3\) for the 2 images"),
        (lambda capture: torch.full((2, 3), 0.5), "`labels` must be 0 or 1; got values such as 0.5"),
    ],
)
def test_labels_that_are_not_there(labels: Any, message: str, refiner: PromptRefiner, batch: Any) -> None:
    model = Decoder().train()
    with pytest.raises((HostError, ValueError), match=message):
        with adapters.attach("generic", model, refiner, labels=labels, **DECODER):
            pixel_loss(model(batch[0], scale=1.0, cls_label=batch[1])).backward()
    nothing_is_left(model)


def test_wrong_options(refiner: PromptRefiner) -> None:
    model = net()
    wrong: List[Tuple[Dict[str, Any], Any, str]] = [
        ({"labels": "batch"}, ValueError, "`labels` must be 'loader', 'loader:KEY', 'forward:NAME' or a function; got 'batch'"),
        ({"labels": 3}, TypeError, "`labels` must be a string, a function or None; got int"),
        ({"label_loss": "backwards"}, ValueError, "must name a loss of torch.nn.functional, such as 'cross_entropy', or be"),
        ({"labels": "loader", "mode": "replace"}, ValueError, "mode='replace' needs a label loss to replace"),
        ({"forward_pass": "second"}, ValueError, "`forward_pass` must be 'first', 'last' or a number from 0; got 'second'"),
        ({"forward_pass": -1}, ValueError, "`forward_pass` must be"),
        ({"network": "ToyCNN"}, ValueError, "`network` is for model=None"),
        ({"activation": "relu6"}, ValueError, "`activation` must be one of 'relu', 'softmax', 'sigmoid' or None; got 'relu6'"),
        ({"run": 3}, TypeError, "`run` must be a function"),
        ({"calls": "forward"}, TypeError, "`calls` must be a list of call names; got the string 'forward'"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            adapters.attach("generic", model, refiner, **{**CNN, **options})
    nothing_is_left(model)


# ------------------------------------------------------------------------------------------------ no model at hand


def train(networks: List[nn.Module], loader: Any) -> List[float]:
    """A host's function that builds its networks inside and trains one after the other."""
    losses = []
    for model in networks:
        for img, labels in loader:
            loss = F.multilabel_soft_margin_loss(model(img), labels)
            loss.backward()
            losses.append(loss.item())
    return losses


class OtherCNN(ToyCNN):
    pass


def test_the_first_network_that_fits_is_taken(refiner: PromptRefiner, batch: Any) -> None:
    teacher, model = nn.Sequential(nn.Conv2d(3, 3, 3)), net(1)
    teacher(batch[0])
    plain = train([model], [batch] * 2)
    attached = adapters.attach("generic", None, refiner, **CNN)
    with attached:
        teacher(batch[0])
        seen = train([nn.DataParallel(model) if not torch.cuda.is_available() else model], [batch] * 2)
    assert attached.steps == 2 and isinstance(attached.model, nn.Module)
    assert seen == pytest.approx([loss + attached.loss for loss in plain], rel=1e-5)
    nothing_is_left(model, teacher)
    with attached:  # once more, with another network
        train([net(3)], [batch])
    assert attached.steps == 3


def test_two_networks_by_their_names(refiner: PromptRefiner, batch: Any) -> None:
    with adapters.attach("generic", None, refiner, **CNN) as first:
        with adapters.attach("generic", None, refiner, network="OtherCNN", **CNN) as second:
            train([ToyCNN().train(), OtherCNN().train()], [batch] * 2)
    assert first.steps == second.steps == 2 and type(first.model) is ToyCNN and type(second.model) is OtherCNN
    assert not sum(first.others.values()) and not sum(second.others.values())


def test_the_second_of_two_networks_is_not_silently_left_out(refiner: PromptRefiner, batch: Any) -> None:
    with pytest.warns(UserWarning, match="2 label losses over 3 classes did not come from ToyCNN and were left alone"):
        with adapters.attach("generic", None, refiner, **CNN) as attached:
            train([ToyCNN().train(), OtherCNN().train()], [batch] * 2)
    assert attached.steps == 2


@pytest.mark.parametrize("network", [None, "Missing"])
def test_no_network_fits(network: Any, refiner: PromptRefiner, batch: Any) -> None:
    done: List[int] = []

    def loop() -> None:
        for _ in range(3):
            train([ToyCNN().train()], [batch])
            done.append(1)

    message = "The loop trained without .*Modules that ran in training mode: ToyCNN"
    with pytest.raises(HostError, match=message + ("" if network else r".*Did you mean 'body.3'\?")):
        with adapters.attach("generic", None, refiner, network=network, features="features.3", classifier="fc"):
            loop()
    assert len(done) == (3 if network else 0)  # without a name it is an error at the first backward()
    assert not nn.modules.module._global_forward_pre_hooks


# ------------------------------------------------------------------------------------------------ other ways to call


class Methods(ToyCNN):
    def feature_list(self, img: Tensor) -> List[Tensor]:
        body = self.body(img)
        return [body, self.fc(body.mean((2, 3)))]


def test_a_method_in_the_place_of_the_call(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = Methods().train()
    expected = refiner(img, cam(model, img), labels).item()
    with pytest.raises(HostError, match=r"needs that name: calls=\['method'\]"):
        with adapters.attach("generic", model, refiner, **CNN):
            F.multilabel_soft_margin_loss(model.feature_list(img)[1], labels).backward()
    with adapters.attach("generic", model, refiner, calls=["feature_list"], **CNN) as attached:
        F.multilabel_soft_margin_loss(model.feature_list(img)[1], labels).backward()
        F.multilabel_soft_margin_loss(model(img), labels).backward()
    assert attached.steps == 2 and attached.loss == pytest.approx(expected, rel=1e-5)
    assert "feature_list" not in vars(model)
    with pytest.raises(HostError, match="Methods has no method 'features' to be watched"):
        with adapters.attach("generic", model, refiner, calls=["features"], **CNN):
            pass
    nothing_is_left(model)


def test_a_method_of_a_network_that_is_not_at_hand(refiner: PromptRefiner, batch: Any) -> None:
    """Nothing of the network but its parts runs; they lead to it. The pass in which it is found does not count."""
    img, labels = batch
    with adapters.attach("generic", None, refiner, calls=["feature_list"], **CNN) as attached:
        model = Methods().train()
        for _ in range(3):
            F.multilabel_soft_margin_loss(model.feature_list(img)[1], labels).backward()
    assert attached.steps == 2 and attached.model is model and not sum(attached.others.values())
    nothing_is_left(model)
    assert not nn.modules.module._global_module_registration_hooks


def test_forward_of_the_wrapper(refiner: PromptRefiner, batch: Any) -> None:
    """`wrapper.forward(...)` runs no hook of the wrapper; those of the network in it do."""
    img, labels = batch
    wrapper = nn.DataParallel(net(1), device_ids=[])
    with adapters.attach("generic", wrapper, refiner, **CNN) as attached:
        F.multilabel_soft_margin_loss(wrapper.forward(img), labels).backward()
        F.multilabel_soft_margin_loss(wrapper(img), labels).backward()
    assert attached.steps == 2
    nothing_is_left(wrapper)


class LossInside(ToyCNN):
    """Computes its loss inside its forward, as the models of Hugging Face do."""

    def forward(self, img: Tensor, labels: Tensor) -> Dict[str, Tensor]:
        logits = super().forward(img)
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_loss_inside_the_forward_pass(mode: str, refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = LossInside().train()
    base, expected = model(img, labels)["loss"].item(), refiner(img, cam(model, img), labels).item()
    with adapters.attach("generic", model, refiner, mode=mode, **CNN) as attached:
        for _ in range(3):
            loss = model(img, labels=labels)["loss"]
            loss.backward()
            assert loss.item() == pytest.approx(expected + (base if mode == "add" else 0), rel=1e-5)
    assert attached.steps == 3
    with pytest.raises(HostError, match="computes its loss inside its forward, before there is an output"):
        with adapters.attach("generic", model, refiner, cam=lambda output, records: output["cam"]):
            model(img, labels)
    nothing_is_left(model)


def test_a_forward_that_needs_more_than_images(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = LossInside().eval()
    with pytest.raises(HostError, match="LossInside cannot be called with an image batch alone: .*'labels'.* run=lambda"):
        adapters.cam_of("generic", model, **CNN)(img)
    with pytest.raises(HostError, match="Say how: run=lambda model, img"):
        adapters.probe("generic", model, refiner, img, labels, **CNN)
    run = lambda model, img: model(img, labels)  # noqa: E731
    assert torch.allclose(adapters.cam_of("generic", model, run=run, **CNN)(img), cam(model, img), atol=1e-6)
    assert adapters.probe("generic", model, refiner, img, labels, run=run, **CNN).attached
    nothing_is_left(model)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch1, self.branch2 = net(1), net(2)

    def forward(self, img: Tensor) -> Tuple[Tensor, Tensor]:
        return self.branch1(img), self.branch2(img)


def test_several_cams_in_one_attachment(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    model = TwoBranches().train()
    both = lambda output, records: [  # noqa: E731
        F.conv2d(records[f"branch{k}.body"], getattr(model, f"branch{k}").fc.weight[:, :, None, None]) for k in (1, 2)
    ]
    expected = sum(refiner(img, cam(branch, img), labels).item() for branch in (model.branch1, model.branch2))
    options = {"cam": both, "modules": ["branch1.body", "branch2.body"]}
    with adapters.attach("generic", model, refiner, **options) as attached:
        first, second = model(img)
        (F.multilabel_soft_margin_loss(first, labels) + F.multilabel_soft_margin_loss(second, labels)).backward()
    assert attached.steps == 1 and attached.loss == pytest.approx(expected, rel=1e-5)
    assert len(attached.cam_shapes) == 2
    assert model.branch1.body[0].weight.grad is not None and model.branch2.body[0].weight.grad is not None
    assert adapters.probe("generic", model, refiner, img, labels, **options).attached
    assert torch.allclose(adapters.cam_of("generic", model, **options)(img), cam(model.branch1, img), atol=1e-6)


# ------------------------------------------------------------------------------------------------ is it the CAM


class Pooled(nn.Module):
    """Features, pooling, perhaps a norm or dropout, a classifier."""

    def __init__(self, between: nn.Module, pool: str):
        super().__init__()
        self.body, self.between, self.fc, self.pool = nn.Conv2d(3, 6, 8, stride=8), between, nn.Linear(6, 3), pool

    def forward(self, img: Tensor) -> Tensor:
        x = self.body(img)
        return self.fc(self.between(x.mean((2, 3)) if self.pool == "mean" else x.amax((2, 3))))


@pytest.mark.parametrize(
    "between, pool, expected",
    [
        (nn.Identity(), "mean", "^that of 'fc', which classifies the mean over places of 'body'"),
        (nn.Identity(), "max", "^that of 'fc', which classifies the maximum over places of 'body'"),
        (nn.Dropout(0.5), "mean", "classifies the mean over places"),
        (nn.LayerNorm(6), "mean", r"^not that of 'fc', .* \(a norm between them\?\)"),
    ],
)
def test_whether_the_cam_is_the_classifiers(
    between: nn.Module, pool: str, expected: str, refiner: PromptRefiner, batch: Any
) -> None:
    img, labels = batch
    torch.manual_seed(0)
    model = Pooled(between, pool).train()
    wrong = expected.startswith("^not")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with adapters.attach("generic", model, refiner, **CNN) as attached:
            for _ in range(2):
                F.multilabel_soft_margin_loss(model(img), labels).backward()
    probe = adapters.probe("generic", model, refiner, img, labels, **CNN)
    assert re.search(expected, attached.agreement) and probe.cam == f"(2, 3, 4, 4), {attached.agreement}"
    assert len([w for w in caught if "a norm between them" in str(w.message)]) == (1 if wrong else 0)


def test_a_classifier_as_the_class_map(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch

    class After(Pooled):
        def forward(self, img: Tensor) -> Tensor:
            return self.fc(self.body(img).mean((2, 3), keepdim=True)).flatten(1)

    late = After(nn.Identity(), "mean")
    late.fc = nn.Conv2d(6, 3, 1)
    with pytest.raises(HostError, match=r"is \(2, 3, 1, 1\): a 1 x 1 map says which classes are there, not where"):
        adapters.probe("generic", late, refiner, img, labels, cam="fc")


def test_patch_sizes_are_checked(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ToyViT()

        def forward(self, img: Tensor) -> Tensor:
            return self.encoder(img)

    model = Encoder().eval()
    options = {"features": "encoder.norm", "classifier": "encoder.head"}
    assert torch.allclose(adapters.cam_of("generic", model, **options)(img), vit_cam(model.encoder, img), atol=1e-5)
    with pytest.raises(
        HostError, match=r"2 x 2 patches of size \(16, 16\): 13 tokens are left over. The model's own patches are \(8, 8\)"
    ):
        adapters.cam_of("generic", model, patch_size=16, **options)(img)
    with pytest.raises(HostError, match=r"Did you mean 'encoder.norm' or"):
        adapters.cam_of("generic", model, features="norm", classifier="encoder.head")


# ------------------------------------------------------------------------------------------------ nothing is left


class Stop(Exception):
    pass


def test_nothing_is_left_after_exceptions_at_random_places(refiner: PromptRefiner, batch: Any) -> None:
    """1,000 times an exception out of a random call below the `with`; all options are taken in turn."""
    model = Decoder().train()
    data = DataLoader(list(zip(*batch)), batch_size=2)
    random.seed(0)
    stopped = 0
    options = [
        {"labels": "loader"},
        {"labels": "forward:cls_label", "label_loss": "cross_entropy", "calls": ["forward"]},
        {"labels": lambda capture: capture.keywords["cls_label"]},
    ]

    class Raiser:
        """Raises at the n-th function call after its start, in whatever function that is."""

        def __init__(self, after: int):
            self.left = after

        def __call__(self, frame: Any, event: str, arg: Any) -> None:
            if event == "call" and ("adapters" in frame.f_code.co_filename or "test_any_host" in frame.f_code.co_filename):
                self.left -= 1
                if self.left == 0:
                    raise Stop

    for count in range(1000):
        attached = adapters.attach("generic", model if count % 2 else None, refiner, **{**DECODER, **options[count % 3]})
        try:
            with attached:
                sys.setprofile(Raiser(random.randrange(1, 60)))
                for x, y in data:
                    pixel_loss(model(x, cls_label=y))
                sys.setprofile(None)
                raise Stop
        except (Stop, HostError):
            stopped += 1
        finally:
            sys.setprofile(None)
    assert stopped == 1000
    nothing_is_left(model)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_nothing_is_left_after_interrupts(refiner: PromptRefiner) -> None:
    """SIGINT at every line of `__enter__`, `__exit__` and what they call."""
    model = net(1)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
    try:
        interrupt_everywhere(refiner, model)
    finally:
        signal.signal(signal.SIGINT, outside)


def interrupt_everywhere(refiner: PromptRefiner, model: nn.Module) -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupted = total = 0

    class Signal:
        def __init__(self, after: int):
            self.left, self.sent = after, False

        def __call__(self, frame: Any, event: str, arg: Any) -> Any:
            if "adapters" in frame.f_code.co_filename:
                if event == "line" or event == "call":
                    self.left -= 1
                    if self.left == 0:
                        self.sent = True
                        os.kill(os.getpid(), signal.SIGINT)
                return self
            return None

    after, given = 0, model
    while True:
        after += 1
        tracer = Signal(after)
        attached = adapters.attach("generic", given, refiner, **CNN)
        try:
            sys.settrace(tracer)
            with attached:
                pass
            sys.settrace(None)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        nothing_is_left(model)
        assert signal.getsignal(signal.SIGINT) is before
        total += tracer.sent
        if not tracer.sent:
            if given is None:
                break
            after, given = 0, None
    assert interrupted == total > 100


def test_a_second_interrupt_handler_is_put_back(refiner: PromptRefiner, batch: Any) -> None:
    """A handler of the user's own sees the signal, during the loop at once and during `__exit__` after it."""
    seen: List[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        own = signal.getsignal(signal.SIGINT)
        with adapters.attach("generic", net(1), refiner, **CNN):
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*The CAM of .* is not that of")
        yield


# ------------------------------------------------------------------------------------------------ hosts by name


class Encoder(ToyViT):
    """Tokens after the norm, the class token first."""

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img)
        return self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)))


class SingleStage(nn.Module):
    """The parts of ToCo that count: an encoder, a classifier over the maximum of the patches, crops after the image."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.encoder = Encoder(seed=seed)
        self.classifier = nn.Conv2d(8, 3, 1, bias=False)

    def maps(self, img: Tensor) -> Tensor:
        tokens = self.encoder(img)[:, 1:].transpose(1, 2)
        return tokens.reshape(len(img), -1, img.shape[2] // 8, img.shape[3] // 8)

    def forward(self, img: Tensor, crops: Any = None) -> Tensor:
        logits = self.classifier(F.adaptive_max_pool2d(self.maps(img), 1)).flatten(1)
        for crop in [] if crops is None else crops:
            self.encoder(crop)
        return logits

    def own_cam(self, img: Tensor) -> Tensor:
        return F.conv2d(self.maps(img), self.classifier.weight)


class Students(nn.Module):
    """The parts of DuPL that count: with `need_sp` each branch runs on everything, on the images, on the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1, self.branch2 = SingleStage(1), SingleStage(2)

    def forward(self, img: Tensor, need_sp: bool = False) -> List[Tensor]:
        branches = (self.branch1, self.branch2)
        logits = [branch(img) for branch in branches]
        if need_sp:
            img, copies = img.chunk(2)
            logits = [branch(img) for branch in branches]
            for branch in branches:
                branch(F.interpolate(copies, scale_factor=0.75))
        return logits


def test_toco_by_name(refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    torch.manual_seed(0)
    model = SingleStage().train()
    expected = refiner(img, model.own_cam(img), labels).item()
    with adapters.attach("toco", None, refiner) as attached:
        F.multilabel_soft_margin_loss(model(img, crops=[img[:, :, :16, :16]]), labels).backward()
    assert attached.loss == pytest.approx(expected, rel=1e-5)
    assert attached.agreement.startswith("that of 'classifier', which classifies the maximum over places")
    with pytest.raises(HostError, match="This is no ToCo, SeCo or MoRe model"):
        adapters.attach("toco", net(), refiner)


@pytest.mark.parametrize("copies", [False, True])
def test_dupl_by_name(copies: bool, refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    torch.manual_seed(0)
    model = Students().train()
    expected = sum(refiner(img, branch.own_cam(img), labels).item() for branch in (model.branch1, model.branch2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ran on 4 images with labels for 2")
        with adapters.attach("dupl", None, refiner) as attached:
            for logits in (model(torch.cat([img, img.flip(-1)]), need_sp=True) if copies else model(img) for _ in range(2)):
                sum(F.multilabel_soft_margin_loss(x, labels) for x in logits).backward()
                assert attached.loss == pytest.approx(expected, rel=1e-4)
    assert attached.steps == 2 and attached.cam_shapes == [(2, 3, 4, 4)] * 2


class FrozenCLIP(nn.Module):
    """The parts of WeCLIP and ExCEL that count: a decoder that gives logits and attention."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x), [torch.zeros(1)]

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder_fts_fuse, self.decoder = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 8, 1), self.Head()
        self.encoder.requires_grad_(False)

    def forward(self, img: Tensor, img_names: Any = ()) -> Tensor:
        return self.decoder(self.decoder_fts_fuse(self.encoder(img)))[0]


@pytest.mark.parametrize("name", ["weclip", "excel"])
def test_weclip_and_excel_by_name(name: str, refiner: PromptRefiner, batch: Any) -> None:
    img, labels = batch
    torch.manual_seed(0)
    model = FrozenCLIP().train()
    expected = refiner(img, model(img).softmax(1)[:, 1:], labels).item()
    data = DataLoader([(f"photo {k}", img[k], labels[k]) for k in range(2)], batch_size=2)
    with adapters.attach(name, None, refiner) as attached:
        for names, x, _ in data:
            logits = model(x, names)
            (pixel_loss(logits) + F.cross_entropy(logits, torch.ones(2, 4, 4, dtype=torch.long))).backward()
    assert attached.steps == 1 and attached.loss == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(adapters.cam_of(name, model)(img), model(img).softmax(1)[:, 1:], atol=1e-6)


def test_recam_by_name(refiner: PromptRefiner, batch: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage4, self.classifier = nn.Conv2d(3, 6, 8, stride=8), nn.Conv2d(6, 3, 1, bias=False)

        def forward(self, img: Tensor) -> Tensor:
            return self.classifier(self.stage4(img).mean((2, 3), keepdim=True)).flatten(1)

    class Second(Net):
        pass

    with adapters.attach("recam", None, refiner) as first:
        with adapters.attach("recam", None, refiner, network="Second") as second:
            train([Net().train(), Second().train()], [batch] * 2)
    assert first.steps == second.steps == 2 and type(second.model) is Second
