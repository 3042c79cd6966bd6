"""Reading `.npy` files that hold pickles, without running code.

A pickle is a program: it names functions and calls them. The reader here knows the few names that arrays and tensors need, maps
each to a function of this module that checks its arguments, and refuses every other name.
"""

from __future__ import annotations

import ast
import io
import math
import os
import pickle
import re
import warnings
from typing import Any, Callable, Dict, Tuple

import numpy as np

from .._files import PathLike, fits_storage, open_regular
from ..errors import CamFileError

__all__ = ["LARGEST", "MOST_VALUES", "as_array", "read_npy"]

LARGEST = 2**31  # bytes; larger files are refused. The CAMs of 20 classes at 6000 x 4000 pixels take 1.9e9.
MOST_VALUES = 2**29  # in one file, whatever their type: as float32 they take 2 GiB
MOST_IN_LISTS = 1_000_000  # numbers in the lists of one map


def as_array(path: Any, value: Any) -> np.ndarray:
    """Arrays as they are, and lists of numbers as arrays.

    A pickle can name one list many times, so that a few bytes stand for any number of values; they are counted first.

    Raises:
        CamFileError: if lists hold more than `MOST_IN_LISTS` values; the message begins with `path`.
    """
    if isinstance(value, (list, tuple)) and _count(value, MOST_IN_LISTS) > MOST_IN_LISTS:
        raise CamFileError(f"{path} holds lists of more than {MOST_IN_LISTS} values. Store them as arrays.")
    return np.asarray(value)


def _count(value: Any, most: int) -> int:
    """How many values nested lists hold, or more than `most`."""
    total, stack = 0, [iter([value])]
    while stack and total <= most and len(stack) < 64:
        item = next(stack[-1], stack)
        if item is stack:
            stack.pop()
            continue
        total += 1
        if isinstance(item, (list, tuple)):
            stack.append(iter(item))
    return most + 1 if stack else total


def _storage(data: Any) -> Any:
    """The storage of a tensor, read by torch's own restricted reader."""
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # not torch's own message, which advises to switch the restriction off
        found = re.search(r"(?:GLOBAL|class) `?(\w+\.[\w.]*\w)", str(error))  # "GLOBAL" or "class", by the torch version
        raise CamFileError(f"a tensor in it holds {found.group(1) if found else 'something'} that is not a number") from None


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    """The array of a tensor; bfloat16, which NumPy lacks, becomes float32."""
    import torch

    held = storage.untyped().nbytes() // torch.empty(0, dtype=storage.dtype).element_size()
    size, stride = tuple(size), tuple(stride)
    if not fits_storage(held, offset, size, stride):
        raise CamFileError("a tensor in it is larger than its storage, or lies outside of it")
    tensor = torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


class _Dtype:
    """A dtype of numbers, texts or objects, built from its name. Of its pickled state only the byte order is used."""

    def __init__(self, name: Any, *_: Any):
        self.made = np.dtype(name) if isinstance(name, str) else np.dtype("V")
        if self.made.kind not in "biufcSUOMm" or self.made.names is not None or self.made.subdtype is not None:
            raise CamFileError(f"it holds an array of {name!r}, but only arrays of numbers are read")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.made = self.made.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state must fit its shape. Raw bytes are never taken for objects, that is for pointers."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        count = math.prod(shape)
        if dtype.made.hasobject:
            fits = type(raw) is list and len(raw) == count
        else:
            fits = isinstance(raw, (bytes, str)) and len(raw) == count * dtype.made.itemsize
        if not fits or min(shape, default=0) < 0:
            raise CamFileError("an array in it has another size than its shape says")
        super().__setstate__((1, tuple(shape), dtype.made, bool(fortran), raw))  # type: ignore[arg-type]


def _empty(*_: Any) -> np.ndarray:
    return np.ndarray.__new__(_Array, (0,), "u1")


def _scalar(dtype: _Dtype, raw: Any) -> Any:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if dtype.made.hasobject:
        raise CamFileError("it holds a scalar object")
    return np.frombuffer(raw, dtype.made, 1)[0]


def _frombuffer(buffer: Any, dtype: _Dtype, shape: Any, order: str, *_: Any) -> np.ndarray:
    if dtype.made.hasobject:
        raise CamFileError("it holds objects as bytes")
    return np.frombuffer(buffer, dtype.made).reshape(shape, order="F" if order == "F" else "C")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise CamFileError(f"A pickled text may only be bytes written as latin1; got {encoding!r}.")
    return text.encode("latin1")


_ALLOWED: Dict[Tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _empty,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): dict,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _empty
    _ALLOWED[f"{_package}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _frombuffer
_PythonUnpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009  # CPython has it, the type stubs do not


class _Reader(_PythonUnpickler):
    """An unpickler that builds arrays, tensors and plain containers only.

    The standard library has two unpicklers: `pickle.Unpickler`, written in C, and `pickle._Unpickler`, written in Python. This
    class needs the second one, because only there a subclass can change what single instructions of a pickle do. With the first
    one, a hostile file of a few bytes could

    - allocate gigabytes for the table of objects that are used again (the memo),
    - set attributes of any function or class that it is allowed to name,
    - crash the process by a dict key that is nested half a million levels deep.
    """

    dispatch: Dict[int, Any] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise CamFileError(f"it names {module}.{name}, but only numpy arrays, tensors and plain numbers are read")
        return found

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_Array, _Dtype)):
            raise CamFileError(f"it sets the state of a {type(self.stack[-2]).__name__}")
        super().load_build()

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    def _check_keys(self, keys: Any) -> None:
        for key in keys:
            if isinstance(key, tuple) or not isinstance(key, (int, float, str, bytes, np.generic, type(None))):
                raise CamFileError(f"it has a {type(key).__name__} as a key")

    def load_bytearray8(self) -> None:  # the original reserves as much memory as the file says
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def refuse(self) -> None:
        raise CamFileError("it holds something other than arrays and numbers")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _op in (pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX):
        dispatch[_op[0]] = refuse


class _Bounded:
    """A file that is never asked for more bytes than it holds: Python reserves the memory for a request beforehand."""

    def __init__(self, file: Any, size: int):
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> Any:
        if count > self._size:
            raise EOFError(f"it asks for {count} bytes, but holds {self._size}")
        return self._file.read(count)

    def readinto(self, buffer: Any) -> Any:
        return self._file.readinto(buffer)


def read_npy(path: PathLike) -> Any:
    """Read a `.npy` file without running code: an array, or the object that a pickled 0-d array holds.

    Raises:
        FileNotFoundError: if there is no such file.
        CamFileError: if the file is damaged or holds something other than arrays, numbers, strings and their containers.
    """
    try:
        opened = open_regular(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CamFileError(f"{os.fspath(path)} cannot be read: {error}") from error
    with opened as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST:
            raise CamFileError(f"{os.fspath(path)} holds {size / 2**30:.1f} GiB; at most {LARGEST / 2**30:.0f} are read.")
        try:
            return _parse_npy(file, size)
        except CamFileError as error:
            raise CamFileError(f"{os.fspath(path)} is refused: {error}.") from error
        except Exception as error:  # a damaged pickle can raise nearly anything
            why = " ".join(str(error).split())[:200]
            raise CamFileError(
                f"{os.fspath(path)} is not a readable .npy file ({type(error).__name__}: {why}); is it complete?"
            ) from error


def _parse_npy(file: Any, size: int) -> Any:
    version = np.lib.format.read_magic(file)
    length = int.from_bytes(file.read(2 if version[0] == 1 else 4), "little")
    if length > min(size, 65536):
        raise CamFileError("its header is longer than any header of an array")
    header = ast.literal_eval(file.read(length).decode("latin1"))
    shape = tuple(int(n) for n in header["shape"])
    dtype = np.lib.format.descr_to_dtype(header["descr"])
    if dtype.hasobject:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of dtypes that an older numpy pickled
            content = _Reader(_Bounded(file, size), encoding="latin1").load()
        return content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    count = math.prod(shape)
    if count < 0 or count * dtype.itemsize != size - file.tell():
        raise CamFileError(f"its header promises {count} values of {dtype}, but {size - file.tell()} bytes follow")
    if count > MOST_VALUES:
        raise CamFileError(f"it holds an array of {count} values; at most {MOST_VALUES} are read")
    flat = np.frombuffer(file.read(), dtype)
    return flat.reshape(shape[::-1]).T if header["fortran_order"] else flat.reshape(shape)
