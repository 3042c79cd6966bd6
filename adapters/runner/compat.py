"""What old hosts need in a current environment, as `with` blocks for the runner's own process; all is undone on exit.

None of this touches a file, and `attach` uses none of it. Flow: **compat** -> `process`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import types
from typing import Any, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ...errors import HostError
from ..patches import replaced

__all__ = ["explained_torchvision", "old_libraries", "on_cpu"]


# ---------------------------------------------------------------------------------------------------- no GPU


class _NoCuda(TorchFunctionMode):
    """`.to("cuda")` and `device="cuda"` mean the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            args = (args[0], *(_cpu(value) for value in args[1:]))
        if func is torch._C._nn._parse_to:
            args = tuple(_cpu(value) for value in args)
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        return func(*args, **kwargs)


DEVICE = torch.device


class _AnyDevice(type):
    """Stands for `torch.device`, in `isinstance` as well."""

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        return DEVICE("cpu") if args and type(args[0]) is int else DEVICE(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, DEVICE)


class _Device(metaclass=_AnyDevice):
    """`torch.device` on a machine without a GPU: `torch.device(0)` is the CPU."""


def _cpu(value: Any) -> Any:
    if isinstance(value, DEVICE):
        return DEVICE("cpu") if value.type == "cuda" else value
    if isinstance(value, str):
        return "cpu" if value.split(":")[0] == "cuda" else value
    return DEVICE("cpu") if type(value) is int else value  # .to(0)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Run a host with hard-coded `.cuda()` on the CPU. For smoke tests: slow, and autocast to float16 is off.

    `.cuda()` is replaced on the class, since a mode does not see calls inside a custom backward. DistributedDataParallel gets
    no device numbers, and process groups use gloo.
    """
    load, begin, wrap = torch.load, torch.distributed.init_process_group, DistributedDataParallel.__init__

    def load_on_cpu(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(f, "cpu" if map_location is None else _cpu(map_location), *args, **kwargs)

    def with_gloo(backend: Any = None, *args: Any, **kwargs: Any) -> Any:
        return begin("gloo", *args, **{**kwargs, "device_id": None} if "device_id" in kwargs else kwargs)

    def without_devices(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        wrap(self, module, **{key: value for key, value in kwargs.items() if key not in ("device_ids", "output_device")})

    constants = {"get_device_name": lambda *_: "CPU", "current_device": lambda: 0, "is_available": lambda: False}
    idle = {name: _nothing() for name in ("synchronize", "set_device", "empty_cache")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda, **constants, **idle))
        stack.enter_context(replaced(torch, load=load_on_cpu, device=_Device))
        stack.enter_context(replaced(Tensor, cuda=lambda tensor, *args, **kwargs: tensor))
        stack.enter_context(replaced(torch.distributed, init_process_group=with_gloo))
        stack.enter_context(replaced(DistributedDataParallel, __init__=without_devices))
        stack.enter_context(_NoCuda())
        yield


def _nothing() -> Any:
    """A new function each time: torch's compiler keeps a table of torch functions and refuses doubles."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return nothing


# ---------------------------------------------------------------------------------------------------- old libraries


@contextlib.contextmanager
def old_libraries() -> Iterator[List[str]]:
    """Run hosts that were written for timm 0.4 or 0.5 and Pillow 9 under current ones.

    - timm >= 0.6 hands `pretrained_cfg` and the like to every model factory, which a host's own factory does not take:
      `create_model` calls factories that are not timm's own as timm 0.4 did.
    - NumPy >= 1.24 has lost `np.int`, `np.bool` and others, NumPy 2 `numpy.lib.utils`: they get their old names back.
    - scikit-learn >= 1.6 gives scores as Python floats, which have no `.item()`: they are NumPy's again.
    - Pillow >= 10 has lost `Image.CUBIC` and others: they get their old names back.

    Yields the list of what was done, for the record of the run. Libraries that are not installed, or cannot be imported, are
    left alone.
    """
    done: List[str] = []
    with contextlib.ExitStack() as stack:
        for shim in (_pillow, _timm, _sklearn, _numpy):
            note = shim(stack)
            if note:
                done.append(note)
        yield done


def _pillow(stack: contextlib.ExitStack) -> Optional[str]:
    if importlib.util.find_spec("PIL") is None:
        return None
    image = importlib.import_module("PIL.Image")
    old = {"CUBIC": "BICUBIC", "LINEAR": "BILINEAR", "ANTIALIAS": "LANCZOS"}
    lost = {name: getattr(image.Resampling, new) for name, new in old.items() if not hasattr(image, name)}
    stack.enter_context(replaced(image, **lost))
    return f"gave Pillow its old names {', '.join(lost)}" if lost else None


def _timm(stack: contextlib.ExitStack) -> Optional[str]:
    if importlib.util.find_spec("timm") is None:
        return None
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError):  # a torchvision that does not go with torch: the host may not need timm
        return None
    models = importlib.import_module("timm.models")
    if _version(timm.__version__) < (0, 6):
        return None
    create = models.create_model

    def create_model(model_name: str, pretrained: bool = False, *args: Any, **kwargs: Any) -> Any:
        entry = models.model_entrypoint(model_name) if models.is_model(model_name) else None
        if entry is None or entry.__module__.split(".")[0] == "timm":
            return create(model_name, pretrained, *args, **kwargs)
        return entry(pretrained=pretrained, **{key: value for key, value in kwargs.items() if value is not None})

    stack.enter_context(replaced(models, create_model=create_model))
    stack.enter_context(replaced(timm, create_model=create_model))
    return f"called the host's own model factories as timm 0.4 did (timm {timm.__version__})"


def _sklearn(stack: contextlib.ExitStack) -> Optional[str]:
    if importlib.util.find_spec("sklearn") is None or _version(importlib.metadata.version("scikit-learn")) < (1, 6):
        return None
    metrics = importlib.import_module("sklearn.metrics")
    score = metrics.f1_score

    def f1_score(*args: Any, **kwargs: Any) -> Any:
        found = score(*args, **kwargs)
        return np.float64(found) if isinstance(found, float) else found

    stack.enter_context(replaced(metrics, f1_score=f1_score))
    return "gave scikit-learn's f1_score its old type"


def _numpy(stack: contextlib.ExitStack) -> Optional[str]:
    old = {"int": int, "float": float, "bool": bool, "object": object, "str": str}
    lost = {name: kind for name, kind in old.items() if name not in vars(np)}
    stack.enter_context(replaced(np, **lost))
    given = list(lost)
    if "numpy.lib.utils" not in sys.modules and importlib.util.find_spec("numpy.lib.utils") is None:
        utils = types.ModuleType("numpy.lib.utils")
        vars(utils).update(deprecate=lambda function=None, **_: function or (lambda one: one))
        sys.modules["numpy.lib.utils"] = utils
        stack.callback(sys.modules.pop, "numpy.lib.utils", None)
        given.append("lib.utils")
    return f"gave NumPy its old names {', '.join(given)}" if given else None


@contextlib.contextmanager
def explained_torchvision() -> Iterator[None]:
    """Say what to reinstall if importing torchvision fails in this `with` because it was built for another torch.

    Raises:
        HostError: in place of torch's own "operator torchvision::nms does not exist".
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"torchvision::\w+ does not exist", str(error)):
            raise
        raise HostError(_reinstall(str(error))) from error


def _reinstall(error: str) -> str:
    """The message for a torchvision that does not go with torch, from the facts that pip has of it."""
    try:
        distribution = importlib.metadata.distribution("torchvision")
        wanted = [re.match(r"torch\s*\(?\s*==\s*([\w.]+)", text) for text in distribution.requires or []]
        built_for = next((found[1] for found in wanted if found), None)
    except importlib.metadata.PackageNotFoundError:
        built_for = None
    what = "The installed torchvision does not go with the installed torch"
    pair = "torch torchvision"
    if built_for is not None:
        what = f"torchvision {distribution.version} is built for torch {built_for}, but torch {torch.__version__} is installed"
        pair = f"torch=={built_for} torchvision=={distribution.version.split('+')[0]}"
    return (
        f"{what} ({error}). Install the two together, from one index: python -m pip install --force-reinstall {pair} "
        "(for wheels without CUDA add --index-url https://download.pytorch.org/whl/cpu)."
    )


def _version(text: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
