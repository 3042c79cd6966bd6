"""The CAM of any network by module names: every layout against a literal loop, and what is refused."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, Callable, Iterator, List

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from semples_plugin import PromptRefiner, adapters
from semples_plugin.adapters.runner import compat
from tests.adapters.toy_hosts import CLASSES, PATCH, PatchEmbed, ToyCNN, ToyViT, make_loader, train_plain, vit_cam


@pytest.fixture
def refiner(make_refiner: Callable[..., PromptRefiner]) -> PromptRefiner:
    return make_refiner(CLASSES, image_stats="imagenet")


class Layout(nn.Module):
    """A feature map in some layout from module `features`, a classifier on its mean, and a class map of its own."""

    def __init__(self, layout: str, classifier: nn.Module, prefix: int = 0):
        super().__init__()
        self.layout, self.prefix = layout, prefix
        self.body, self.features, self.classifier = nn.Conv2d(3, 6, PATCH, stride=PATCH), nn.Identity(), classifier
        self.register = nn.Parameter(torch.randn(1, prefix, 6))

    def forward(self, img: Tensor) -> Tensor:
        x = self.body(img)  # (B, 6, h, w)
        if self.layout == "last":
            x = x.permute(0, 2, 3, 1)
        if self.layout in ("tokens", "tuple"):
            x = torch.cat([self.register.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = self.features((x, "state") if self.layout == "tuple" else x)
        x = x[0] if self.layout == "tuple" else x
        pooled = {"first": (2, 3), "last": (1, 2)}.get(self.layout, (1,))
        x = x.mean(pooled)
        return self.classifier(x if isinstance(self.classifier, nn.Linear) else x[..., None, None]).flatten(1)


def literal(features: Tensor, weight: Tensor) -> Tensor:
    """cam[b, c, y, x] = sum_d weight[c, d] features[b, d, y, x], one place at a time."""
    features, weight = features.detach(), weight.detach()
    batch, width, height, length = features.shape
    cam = torch.zeros(batch, len(weight), height, length)
    for b in range(batch):
        for c in range(len(weight)):
            for y in range(height):
                for x in range(length):
                    cam[b, c, y, x] = sum(float(weight[c, d]) * float(features[b, d, y, x]) for d in range(width))
    return cam


CLASSIFIERS = {
    "linear": lambda: nn.Linear(6, 3),
    "without bias": lambda: nn.Linear(6, 3, bias=False),
    "conv": lambda: nn.Conv2d(6, 3, 1),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize(
    "layout, prefix", [("first", 0), ("last", 0), ("tokens", 0), ("tokens", 1), ("tokens", 5), ("tuple", 2)]
)
def test_every_layout_of_features(layout: str, prefix: int, size: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = Layout(layout, CLASSIFIERS[kind](), prefix)
    img = torch.rand(2, 3, *size)
    expected = literal(model.body(img), model.classifier.weight.flatten(1))
    for patch in (PATCH, (PATCH, PATCH)):
        options = {"patch_size": patch} if layout in ("tokens", "tuple") else {}
        got = adapters.cam_of("generic", model, features="features", classifier="classifier", **options)(img)
        assert got.shape == (2, 3, size[0] // PATCH, size[1] // PATCH) and torch.allclose(got, expected, atol=1e-5)


def test_patches_that_are_not_square() -> None:
    model = Layout("tokens", nn.Linear(6, 3), 1)
    model.body = nn.Conv2d(3, 6, (4, 16), stride=(4, 16))
    img = torch.rand(2, 3, 32, 32)
    expected = literal(model.body(img), model.classifier.weight)
    cam_of = adapters.cam_of("generic", model, features="features", classifier="classifier", patch_size=(4, 16))
    assert expected.shape == (2, 3, 8, 2) and torch.allclose(cam_of(img), expected, atol=1e-5)


def test_as_many_channels_as_places() -> None:
    """Channels first wins if both readings fit."""
    model = Layout("first", nn.Linear(6, 3))
    img = torch.rand(2, 3, 6 * PATCH, 6 * PATCH)
    cam_of = adapters.cam_of("generic", model, features="features", classifier="classifier")
    assert torch.allclose(cam_of(img), literal(model.body(img), model.classifier.weight), atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 4])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_a_vision_transformer_knows_its_patch_size(prefix: int, size: Any) -> None:
    model = ToyViT(prefix=prefix).eval()
    img = torch.rand(2, 3, *size)
    got = adapters.cam_of("generic", model, features="norm", classifier="head")(img)
    assert got.shape == (2, 3, size[0] // PATCH, size[1] // PATCH)
    assert torch.allclose(got, vit_cam(model, img), atol=1e-5)


class Mapped(nn.Module):
    """A class map out of a module of its own, as a map or as tokens."""

    def __init__(self, tokens: bool, num_classes: int = 3):
        super().__init__()
        self.patch_embed = PatchEmbed(6)
        self.tokens = tokens
        self.cam = nn.Linear(6, num_classes) if tokens else nn.Conv2d(6, num_classes, 1)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img)
        if self.tokens:
            return self.cam(torch.cat([x.mean(1, keepdim=True), x], dim=1))[:, 0]
        x = x.transpose(1, 2).reshape(len(x), -1, img.shape[2] // PATCH, img.shape[3] // PATCH)
        return self.cam(x).mean((2, 3))


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_a_module_that_gives_the_class_map(tokens: bool, relu: bool, background: bool, refiner: PromptRefiner) -> None:
    torch.manual_seed(0)
    model = Mapped(tokens, 4 if background else 3).train()
    img, labels = make_loader(1, size=(24, 40))[0]
    weight = model.cam.weight.flatten(1)
    features = model.patch_embed(img).transpose(1, 2).reshape(2, 6, 3, 5)
    expected = literal(features, weight) + model.cam.bias.view(-1, 1, 1)
    expected = (expected.relu() if relu else expected)[:, int(background) :].detach()
    options = {"cam": "cam", "activation": "relu" if relu else None, "background_channel": background}
    got = adapters.cam_of("generic", model, **options)(img)
    assert got.shape == (2, 3, 3, 5) and torch.allclose(got, expected, atol=1e-5)
    with adapters.attach("generic", model, refiner, **options) as attached:
        F.multilabel_soft_margin_loss(model(img)[:, int(background) :], labels).backward()
    assert attached.loss == pytest.approx(refiner.compute(img, expected, labels).loss.item(), rel=1e-5)


def test_a_function_with_modules(refiner: PromptRefiner) -> None:
    model = ToyCNN().train()
    img, labels = make_loader(1)[0]

    def cam(output: Tensor, records: adapters.Records) -> Tensor:
        assert records.names() == ["body.0", "body"] and output.shape == (2, 3)
        enlarged = F.interpolate(records["body"], size=records["body.0"].shape[2:])
        return F.conv2d(enlarged, model.fc.weight[:, :, None, None]) - 0.1

    expected = F.conv2d(model.body(img), model.fc.weight[:, :, None, None]) - 0.1
    for relu in (False, True):
        own = expected.relu() if relu else expected
        options = {"cam": cam, "modules": ["body.0", "body"], "activation": "relu" if relu else None}
        with adapters.attach("generic", model, refiner, **options) as attached:
            train_plain(model, [(img, labels)], torch.optim.SGD(model.parameters(), lr=0.0))
        assert attached.loss == pytest.approx(refiner(img, own, labels).item(), rel=1e-5)
    attached = adapters.attach("generic", model, refiner, cam=lambda output, records: output[:, :, None, None])
    with pytest.raises(adapters.HostError, match=r"CAM of ToyCNN is \(2, 3, 1, 1\): a 1 x 1 map .* not where"):
        with attached:
            train_plain(model, [(img, labels)], torch.optim.SGD(model.parameters(), lr=0.0))


def test_modules_by_dotted_name(refiner: PromptRefiner) -> None:
    model = ToyCNN().eval()
    img, _ = make_loader(1)[0]
    cam_of = adapters.cam_of("generic", model, features="body.3", classifier="fc", activation="relu")
    expected = literal(model.body[:4](img), model.fc.weight).relu()
    model.body[4] = nn.ReLU(inplace=False)
    assert torch.allclose(cam_of(img), expected, atol=1e-5)


class Doubled(nn.Module):
    """A parametrization; `weight` is then no parameter any more."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_classifier_with_a_parametrized_weight(refiner: PromptRefiner) -> None:
    model = ToyCNN().train()
    parametrize.register_parametrization(model.fc, "weight", Doubled())
    img, labels = make_loader(1)[0]
    expected = literal(model.body(img), model.fc.weight)
    cam_of = adapters.cam_of("generic", model, features="body", classifier="fc")
    assert torch.allclose(cam_of(img), expected, atol=1e-5)
    with adapters.attach("generic", model, refiner, mode="replace", features="body", classifier="fc"):
        train_plain(model, [(img, labels)], torch.optim.SGD(model.parameters(), lr=0.0))
    assert model.fc.parametrizations.weight.original.grad.abs().max() > 0


def test_the_classifier_of_a_wrapped_host_is_trained(refiner: PromptRefiner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found: List[Tensor] = []
    for wrap in (lambda model: model, nn.DataParallel):
        model = ToyCNN()
        wrapped = wrap(model)
        with adapters.attach("generic", wrapped, refiner, mode="replace", features="body", classifier="fc"):
            train_plain(wrapped, make_loader(1), torch.optim.SGD(model.parameters(), lr=0.0))
        found.append(model.fc.weight.grad)
    assert torch.equal(*found) and found[0].abs().max() > 0


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "Say where the CAM comes from: .* got cam=None, features=None, classifier=None"),
        ({"features": "body"}, ValueError, "Say where the CAM comes from: .* classifier=None"),
        ({"classifier": "fc"}, ValueError, "Say where the CAM comes from: .* features=None"),
        ({"cam": "body", "features": "body", "classifier": "fc"}, ValueError, "Say where the CAM comes from"),
        ({"cam": "body", "classifier": "fc"}, ValueError, "Say where the CAM comes from"),
        ({"cam": "body", "modules": ["fc"]}, ValueError, "`modules` are for a `cam` function"),
        ({"features": "body", "classifier": "fc", "modules": ["fc"]}, ValueError, "`modules` are for a `cam` function"),
        ({"cam": print, "modules": "body"}, TypeError, "`modules` must be a list of module names; got the string 'body'"),
        ({"cam": 3}, TypeError, "`cam` must be a module name or a function; got int"),
        ({"camera": "body"}, TypeError, "camera"),
        (
            {"cam": "bodies"},
            adapters.HostError,
            "module 'bodies' .* Its modules are 'body', 'dropout', 'fc'",
        ),
        ({"cam": "body.9"}, adapters.HostError, "module 'body.9' .* missing"),
        ({"features": "bodies", "classifier": "fc"}, adapters.HostError, "module 'bodies'"),
        ({"features": "body", "classifier": "head"}, adapters.HostError, "module 'head'"),
        ({"cam": print, "modules": ["body", "bodies"]}, adapters.HostError, "module 'bodies'"),
        (
            {"features": "body", "classifier": "body.3"},
            adapters.HostError,
            "must be an nn.Linear .* got Conv2d",
        ),
        ({"features": "body", "classifier": "dropout"}, adapters.HostError, "must be an nn.Linear .* got Dropout"),
        ({"features": "body", "classifier": "body.1"}, adapters.HostError, "must be an nn.Linear .* got BatchNorm2d"),
    ],
)
def test_options_that_do_not_go_together(options: Any, error: Any, message: str, refiner: PromptRefiner) -> None:
    with pytest.raises(error, match=message):
        adapters.attach("generic", ToyCNN(), refiner, **options)
    with pytest.raises(error, match=message):
        adapters.cam_of("generic", ToyCNN(), **options)


def test_outputs_that_are_no_maps() -> None:
    img = make_loader(1)[0][0]
    cnn, vit = ToyCNN().eval(), ToyViT().eval()
    with pytest.raises(adapters.HostError, match="'fc' takes 8 features, but 'body.0' gives 5. Name the last"):
        wide = ToyCNN().eval()
        wide.body[0], wide.body[1] = nn.Conv2d(3, 5, 4, stride=4), nn.Conv2d(5, 8, 1)
        adapters.cam_of("generic", wide, features="body.0", classifier="fc")(img[:, :, :24, :24])
    with pytest.raises(adapters.HostError, match=r"Expected 'dropout' to give a map .* or tokens .* got tensor \(2, 8\)"):
        adapters.cam_of("generic", cnn, features="dropout", classifier="fc")(img)
    with pytest.raises(adapters.HostError, match=r"Expected 'fc' to give a map .* got tensor \(2, 3\)"):
        adapters.cam_of("generic", cnn, cam="fc")(img)
    with pytest.raises(adapters.HostError, match=r"'norm' gives 17 tokens, fewer than the 8 x 8 patches of size \(4, 4\)"):
        adapters.cam_of("generic", vit, features="norm", classifier="head", patch_size=4)(img)
    plain = Layout("tokens", nn.Linear(6, 3), 1)
    with pytest.raises(adapters.HostError, match=r"'features' gives tokens \(2, 17, 6\); say how large a patch is"):
        adapters.cam_of("generic", plain, features="features", classifier="classifier")(img)


def test_a_module_that_does_not_run(refiner: PromptRefiner) -> None:
    model = ToyCNN()
    model.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(adapters.HostError, match="needs the output of 'unused', which did not run in this forward pass"):
        with adapters.attach("generic", model, refiner, cam="unused"):
            train_plain(model, make_loader(1), torch.optim.SGD(model.parameters(), lr=0.0))


# ------------------------------------------------------------------------------------------------ timm


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm if it can be imported here, also with a torchvision that was built for another torch."""

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with compat.old_libraries():
                pass
        module = importlib.import_module("timm")
    except (ImportError, RuntimeError, OSError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    yield module


@pytest.mark.parametrize(
    "name, options, features, classifier, width",
    [
        ("resnet18", {}, "layer4", "fc", 512),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, "norm", "head", 192),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2, "global_pool": "avg", "fc_norm": False}, "norm", "head", 192),
    ],
)
def test_timm(name: str, options: Any, features: str, classifier: str, width: int, timm: Any, refiner: PromptRefiner) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3, **options)
    img, labels = make_loader(1, size=(64, 64))[0]
    seen: List[Tensor] = []
    handle = model.get_submodule(features).register_forward_hook(lambda module, inputs, output: seen.append(output))
    cam_of = adapters.cam_of("generic", model.eval(), features=features, classifier=classifier)
    cam = cam_of(img)
    handle.remove()
    side = 2 if name == "resnet18" else 4
    maps = seen[0] if name == "resnet18" else seen[0][:, 1:].transpose(1, 2).reshape(2, width, side, side)
    expected = torch.zeros(2, 3, side, side)
    for y in range(side):
        for x in range(side):
            expected[:, :, y, x] = maps[:, :, y, x] @ model.get_submodule(classifier).weight.T
    assert cam.shape == (2, 3, side, side) and torch.allclose(cam, expected, atol=1e-4, rtol=1e-4)
    model.train()
    with adapters.attach("generic", model, refiner, features=features, classifier=classifier) as attached:
        train_plain(model, [(img, labels)], torch.optim.SGD(model.parameters(), lr=0.0))
    assert attached.steps == 1 and attached.loss is not None and attached.loss > 0
    probe = adapters.probe("generic", model, refiner, img, labels, features=features, classifier=classifier)
    assert probe.attached and f"{classifier}.weight" in probe.names
