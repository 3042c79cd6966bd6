"""What old hosts need in a current environment, and that all of it is undone."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import re
import shutil
import sys
import types
import warnings
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from semples_plugin.adapters.patches import replaced
from semples_plugin.adapters.runner import compat
from semples_plugin.errors import HostError

pytestmark = pytest.mark.filterwarnings("ignore:.*Pillow 10:DeprecationWarning")

# ------------------------------------------------------------------------------------------------ replaced


def test_replaced_restores_and_removes() -> None:
    owner = types.ModuleType("owner")
    owner.old = before = object()  # type: ignore[attr-defined]
    with replaced(owner, old=1, new=2):
        assert (owner.old, owner.new) == (1, 2)  # type: ignore[attr-defined]
    assert owner.old is before and not hasattr(owner, "new")  # type: ignore[attr-defined]


def test_replaced_leaves_inherited_attributes_to_the_parent() -> None:
    class Parent:
        def name(self) -> str:
            return "parent"

    class Child(Parent):
        pass

    with replaced(Child, name=lambda self: "replaced"):
        assert Child().name() == "replaced" and Parent().name() == "parent"
    assert Child().name() == "parent" and "name" not in vars(Child)


def test_replaced_keeps_the_kind_of_a_method() -> None:
    class Owner:
        @staticmethod
        def plain() -> int:
            return 1

        @classmethod
        def own(cls) -> str:
            return cls.__name__

    before = dict(vars(Owner))
    with pytest.raises(KeyError), replaced(Owner, plain=None, own=None):
        raise KeyError
    assert Owner.plain() == 1 and Owner().plain() == 1 and Owner.own() == "Owner"
    assert all(vars(Owner)[name] is before[name] for name in ("plain", "own"))


# ------------------------------------------------------------------------------------------------ no GPU

PATCHED = [(torch, "load"), *((torch.cuda, name) for name in ("is_available", "synchronize", "set_device", "empty_cache"))]


@pytest.fixture
def untouched() -> Iterator[None]:
    before = [vars(owner).get(name) for owner, name in PATCHED]
    yield
    assert all(vars(owner).get(name) is value for (owner, name), value in zip(PATCHED, before))
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1).cuda()
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).cuda(0, non_blocking=True),
        lambda: torch.ones(2).cuda(device="cuda:1"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).to("cuda:3", non_blocking=True),
        lambda: torch.ones(2).to(0),
        lambda: torch.ones(2).to(device="cuda"),
        lambda: torch.ones(2).to(device=1),
        lambda: torch.ones(2).to(torch.device("cuda", 0)),
        lambda: torch.ones(2, device="cuda"),
        lambda: torch.ones(2, device=torch.device("cuda")),
        lambda: torch.tensor([1.0, 1.0], device="cuda:0"),
        lambda: torch.full((2,), 1.0, device=0),
        lambda: torch.ones_like(torch.zeros(2), device="cuda"),
        lambda: torch.zeros(1).new_ones(2, device="cuda"),
        lambda: torch.ones(2, requires_grad=True).cuda(),
    ],
)
def test_tensors_stay_on_the_cpu(make: Any, untouched: None) -> None:
    with compat.on_cpu():
        made = make()
    assert made.device.type == "cpu" and made.tolist() == [1, 1]


def test_other_moves_keep_their_meaning(untouched: None) -> None:
    x = torch.ones(2)
    with compat.on_cpu():
        assert x.to("cuda", torch.float64).dtype == torch.float64
        assert x.to(torch.float16).dtype == x.to(dtype=torch.float16).dtype == torch.float16
        assert x.to(torch.zeros(1, dtype=torch.int64)).dtype == torch.int64
        assert x.to("meta").device.type == torch.zeros(1, device="meta").device.type == "meta"
        assert x.cuda() is x
        made = torch.full((2,), 3, device="cpu")
    assert made.tolist() == [3, 3]


def test_modules_stay_on_the_cpu(untouched: None) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = list(model.parameters())
    with compat.on_cpu():
        wrapped = nn.DataParallel(model.cuda()).cuda()
        model.to("cuda").to(torch.device("cuda:0"))
        loss = wrapped(torch.ones(4, 2, device="cuda")).square().sum() + nn.Linear(2, 1, device="cuda")(torch.ones(2)).sum()
        loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_device(0)
        torch.cuda.empty_cache()
        assert not torch.cuda.is_available()
    assert all(new is old and new.grad is not None for new, old in zip(model.parameters(), weights))  # optimizers keep theirs
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}


def test_module_to_a_device_number_stays_on_the_cpu(untouched: None) -> None:
    model = nn.Linear(2, 1)
    with compat.on_cpu():
        assert model.to(0) is model.to(device=1, dtype=torch.float64) is model
    assert model.weight.device.type == "cpu" and model.weight.dtype == torch.float64


@pytest.mark.parametrize("where", ["cuda", "cuda:1", torch.device("cuda"), None, "cpu", lambda storage, location: storage])
def test_checkpoints_are_loaded_on_the_cpu(where: Any, tmp_path: Path, untouched: None) -> None:
    torch.save({"weight": torch.arange(3)}, tmp_path / "host.pt")
    with compat.on_cpu():
        by_name = torch.load(tmp_path / "host.pt", map_location=where)["weight"]
        by_place = torch.load(str(tmp_path / "host.pt"), where)["weight"]
        from_file = torch.load(io.BytesIO((tmp_path / "host.pt").read_bytes()), map_location=where, weights_only=True)["weight"]
    assert all(x.device.type == "cpu" and x.tolist() == [0, 1, 2] for x in (by_name, by_place, from_file))


def test_autocast_is_off(untouched: None) -> None:
    with compat.on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that CUDA is not there
        scaler = torch.cuda.amp.GradScaler()
        model = nn.Linear(2, 1)
        with torch.cuda.amp.autocast():
            loss = model(torch.ones(1, 2).cuda()).sum()
        scaler.scale(loss).backward()
    assert loss.dtype == torch.float32 and model.weight.grad is not None and model.weight.grad.tolist() == [[1, 1]]


def test_on_cpu_ends_with_an_exception(untouched: None) -> None:
    with pytest.raises(ZeroDivisionError), compat.on_cpu():
        raise ZeroDivisionError


# ------------------------------------------------------------------------------------------------ old libraries


@pytest.fixture
def old() -> Iterator[Any]:
    """`old_libraries`, where the installed ones can be had at all."""
    try:
        with compat.old_libraries():
            pass
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the installed libraries do not go with this torch: {error}")
    yield compat.old_libraries


def test_pillow_has_its_old_names(old: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    before = {name: vars(image).get(name) for name in ("CUBIC", "LINEAR", "ANTIALIAS")}
    with old():
        names = [image.CUBIC, image.LINEAR, image.ANTIALIAS]
        assert names == [image.Resampling.BICUBIC, image.Resampling.BILINEAR, image.Resampling.LANCZOS]
        assert image.new("RGB", (8, 6)).resize((4, 3), image.CUBIC).size == (4, 3)
    assert {name: vars(image).get(name) for name in before} == before


def test_pillow_10_gets_its_old_names_in_the_with_alone(old: Any, monkeypatch: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("CUBIC", "LINEAR", "ANTIALIAS"):
        if name in vars(image):
            monkeypatch.delattr(image, name)
    if "__getattr__" in vars(image):  # Pillow 9.4 and 9.5 know them by this function
        monkeypatch.delattr(image, "__getattr__")
    with old() as notes:
        assert image.ANTIALIAS == image.Resampling.LANCZOS
        assert any("Pillow" in note and "CUBIC" in note for note in notes)
    assert not any(hasattr(image, name) for name in ("CUBIC", "LINEAR", "ANTIALIAS"))


MISMATCH = "operator torchvision::nms does not exist"


@pytest.fixture
def mismatched(tmp_path: Path, monkeypatch: Any) -> Path:
    """A torchvision that was built for another torch, as pip knows it, and a timm that needs it."""
    for name, code in (("torchvision", f"raise RuntimeError({MISMATCH!r})"), ("timm", "import torchvision")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    (tmp_path / "torchvision-0.99.1+cu130.dist-info").mkdir()
    facts = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.1+cu130\n"
    facts += "Requires-Dist: numpy\nRequires-Dist: torch (==2.99.0)\n"
    (tmp_path / "torchvision-0.99.1+cu130.dist-info" / "METADATA").write_text(facts)
    for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "timm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_torchvision_for_another_torch_is_explained(mismatched: Path) -> None:
    with pytest.raises(HostError) as caught, compat.explained_torchvision(), compat.old_libraries():
        importlib.import_module("torchvision")
    message = str(caught.value)
    assert f"torchvision 0.99.1+cu130 is built for torch 2.99.0, but torch {torch.__version__} is installed" in message
    assert "python -m pip install --force-reinstall torch==2.99.0 torchvision==0.99.1 " in message and MISMATCH in message


def test_a_torchvision_that_pip_does_not_know_is_explained(mismatched: Path) -> None:
    shutil.rmtree(mismatched / "torchvision-0.99.1+cu130.dist-info")
    if importlib.util.find_spec("torchvision") is None or _installed("torchvision"):
        pytest.skip("another torchvision is installed")
    with pytest.raises(HostError, match="python -m pip install --force-reinstall torch torchvision"):
        with compat.explained_torchvision():
            importlib.import_module("torchvision")


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_a_host_without_torchvision_runs_beside_a_mismatched_one(mismatched: Path) -> None:
    with compat.explained_torchvision(), compat.old_libraries() as notes:
        assert not any("timm" in note for note in notes)
    with pytest.raises(HostError, match="pip install"):  # one that imports timm is told, as if it had imported torchvision
        with compat.explained_torchvision(), compat.old_libraries():
            importlib.import_module("timm")


@pytest.mark.parametrize("text", ["CUDA out of memory", "torchvision::nms() expected 2-D boxes"])
def test_other_errors_are_not_explained(text: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(text)) as caught, compat.explained_torchvision():
        raise RuntimeError(text)
    assert type(caught.value) is RuntimeError


HOST = """
from torch import nn
from timm.models.registry import register_model

class ToyViT(nn.Module):
    def __init__(self, num_classes=10, drop_rate=0.0):
        super().__init__()
        self.head, self.drop_rate = nn.Linear(4, num_classes), drop_rate

@register_model
def semples_toy_vit(pretrained=False, **kwargs):
    return ToyViT(**kwargs)
"""


@pytest.fixture
def timm(old: Any, monkeypatch: Any) -> Any:
    """timm >= 0.6, in which a host has registered a factory as it did in timm 0.4."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    timm = importlib.import_module("timm")
    if tuple(map(int, timm.__version__.split(".")[:2])) < (0, 6):
        pytest.skip("this timm is old itself")
    module = types.ModuleType("semples_toy_host")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm.models.registry has moved
        exec(HOST, vars(module))
    return timm


def test_timm_calls_a_hosts_factory_as_it_did(timm: Any, old: Any) -> None:
    before = timm.create_model, timm.models.create_model
    with pytest.raises(TypeError, match="pretrained_cfg"):
        timm.create_model("semples_toy_vit", num_classes=3)
    with old() as notes:
        from timm.models import create_model  # as a host imports it

        for create in (create_model, timm.create_model):
            model = create("semples_toy_vit", pretrained=False, num_classes=3, drop_rate=0.1, drop_block_rate=None)
            assert type(model).__name__ == "ToyViT" and model.head.out_features == 3 and model.drop_rate == 0.1
        with pytest.raises(TypeError, match="unknown"):
            create("semples_toy_vit", unknown=1)
        assert any("timm" in note for note in notes)
    assert (timm.create_model, timm.models.create_model) == before


def test_timm_makes_its_own_models_as_before(timm: Any, old: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("resnet10t", pretrained=False, num_classes=2, drop_rate=0.1)

    expected = make()
    with old():
        made = make()
        with pytest.raises(RuntimeError, match="[Uu]nknown model"):
            timm.create_model("no_such_model")
    assert made.pretrained_cfg == expected.pretrained_cfg and made.drop_rate == 0.1
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), expected.state_dict().values()))


def test_old_libraries_ends_with_an_exception(timm: Any, old: Any) -> None:
    before = timm.create_model
    with pytest.raises(ZeroDivisionError), old():
        assert timm.create_model is not before
        raise ZeroDivisionError
    assert timm.create_model is before


def test_libraries_that_are_not_installed_are_left_alone(monkeypatch: Any) -> None:
    loaded = set(sys.modules)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with compat.old_libraries() as notes:
        assert all(note.startswith("gave NumPy its old names") for note in notes)
    assert not {"timm", "PIL", "torchvision", "sklearn"} & (set(sys.modules) - loaded)


def test_numpy_has_its_old_names_in_the_with_alone() -> None:
    before = {name: hasattr(np, name) for name in ("int", "float", "bool", "object", "str")}
    with compat.old_libraries():
        assert np.int(3.7) == 3 and np.zeros(2, np.float).dtype == float and np.str is not None
        assert callable(importlib.import_module("numpy.lib.utils").deprecate)
    assert {name: hasattr(np, name) for name in before} == before
    assert "numpy.lib.utils" not in sys.modules or importlib.util.find_spec("numpy.lib.utils")
