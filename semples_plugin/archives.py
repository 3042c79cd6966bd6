"""The tensors of a TorchScript archive, such as OpenAI publishes CLIP in, without running its code.

`torch.jit.load` runs what an archive defines, its `__setstate__` for example. Here the archive is read as what it is: a zip
with a pickle of nested attributes and one file per storage. Flow: a weights file -> **archives** -> `clip_backends`.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from ._files import fits_storage
from .errors import ClipError

__all__ = ["archive_tensors", "is_torchscript"]

MOST = 2**34  # bytes of all tensors
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PythonUnpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009  # only there a subclass can refuse single instructions


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip that holds code, which a state dict does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except Exception:  # no zip, or a damaged one, which can raise nearly anything
        return False


def archive_tensors(path: Path) -> Dict[str, Tensor]:
    """The tensors of a TorchScript archive by their names, as in the state dict of the module.

    Args:
        path: a file of `torch.jit.save`.

    Raises:
        ClipError: if the archive is damaged, or holds more than a module's attributes and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1 or sum(entry.file_size for entry in archive.infolist()) > MOST:
                raise ClipError(f"it holds {len(names)} files data.pkl, or more than {MOST / 2**30:.0f} GiB")
            root = names[0][: -len("data.pkl")]
            with archive.open(names[0]) as file:
                module = _Reader(file, archive, root).load()
        if not isinstance(module, _Module):
            raise ClipError(f"it holds a {type(module).__name__}, not a module")
        return _named(module)
    except ClipError as error:
        raise ClipError(f"{path} is no CLIP weights file: {error}.") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ClipError(f"{path} is no readable TorchScript archive ({type(error).__name__}: {str(error)[:200]}).") from error


class _Module:
    """Stands for a class that the archive defines: its attributes, and nothing of its code."""

    def __init__(self) -> None:
        self.attributes: Dict[str, Any] = {}


class _Reader(_PythonUnpickler):
    """An unpickler that builds `_Module`s, tensors and plain containers only."""

    dispatch: Dict[int, Any] = dict(_PythonUnpickler.dispatch)

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._archive, self._root = archive, root
        self._storages: Dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        raise ClipError(f"it names {module}.{name}, but only tensors and a module's attributes are read")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or "/" in str(key):
            raise ClipError("it holds something other than the storage of a tensor")
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(self._storages[key]) < count:
            raise ClipError("a storage in it is shorter than its tensors say")
        return self._storages[key]

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind is not _Module or arguments:
            raise ClipError("it makes something other than a module")
        self.append(_Module())

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Module) or not isinstance(state, dict):
            raise ClipError("it sets the state of something other than a module")
        self.stack[-1].attributes = state

    def refuse(self) -> None:
        raise ClipError("it holds something other than a module's attributes")

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _op in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8):
        dispatch[_op[0]] = refuse


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    size, stride = tuple(size), tuple(stride)
    if not fits_storage(len(storage), offset, size, stride):
        raise ClipError("a tensor in it is larger than its storage, or lies outside of it")
    return storage.as_strided(size, stride, offset)


def _named(module: _Module) -> Dict[str, Tensor]:
    """Tensors by the path of their attributes. Each module is visited once, so that no archive can name one without end."""
    found: Dict[str, Tensor] = {}
    stack: List[Tuple[str, _Module]] = [("", module)]
    seen = set()
    while stack:
        prefix, one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for name, value in one.attributes.items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                stack.append((f"{prefix}{name}.", value))
    return found
