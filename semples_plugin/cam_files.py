"""CAM files of the ecosystem, read as what they are: untrusted pickles.

`.npy` files of MCTformer, WeakTr, TransCAM and SEAM hold a pickled dict {class index: (H, W) array}; IRN's hold
{"keys": class indices, "cam": (K, h, w), "high_res": (K, H, W)}; others are plain arrays (C, H, W) or `.npz` archives. Reading
admits arrays, tensors and plain scalars, and refuses everything else by name, so that no file runs code.
"""

from __future__ import annotations

import ast
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np

from .errors import SemplesError

__all__ = ["CamFile", "CamFileError", "read_cam_file", "read_npy", "write_atomically", "write_cam_file", "write_label_png"]

PathLike = Union[str, "os.PathLike[str]"]
LARGEST = 2**31  # bytes of one file that are read; a CAM of 20 classes at 6000 x 4000 pixels takes 1.9e9


class CamFileError(SemplesError, ValueError):
    """A CAM or label file is damaged, of an unknown layout, or holds something other than numbers."""


class CamFile(NamedTuple):
    """The CAMs of one image.

    Attributes:
        cams: class index (from 0, without background) -> (H, W) float32, all of one shape.
        layout: `"dict"`, `"irn"`, `"array"` or `"npz"`; `write_cam_file` writes the same again.
        low: for `"irn"`, shape (h, w) of its `cam` entry.
    """

    cams: Dict[int, np.ndarray]
    layout: str
    low: Optional[Tuple[int, int]] = None


# ---------------------------------------------------------------------------------------------------- pickles without code


def _storage(data: Any) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text advises to read it all the same
        found = re.search(r"(?:GLOBAL|class) `?(\w+\.[\w.]*\w)", str(error))  # torch's words before and after 2.0
        raise CamFileError(f"a tensor in it holds {found.group(1) if found else 'something'} that is no number") from None


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Any:
    """The array of a tensor; bfloat16, which NumPy lacks, becomes float32."""
    import torch

    untyped = storage.untyped() if hasattr(storage, "untyped") else storage._untyped()
    if math.prod(size) * torch.empty(0, dtype=storage.dtype).element_size() > untyped.nbytes():
        raise CamFileError("a tensor in it is larger than its storage")
    tensor = torch.empty(0, dtype=storage.dtype).set_(storage, offset, tuple(size), tuple(stride))
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


class _Dtype:
    """A dtype of numbers, texts or objects by its name; of the state only the byte order counts."""

    def __init__(self, name: Any, *_: Any):
        self.made = np.dtype(name) if isinstance(name, str) else np.dtype("V")
        if self.made.kind not in "biufcSUOMm" or self.made.names is not None or self.made.subdtype is not None:
            raise CamFileError(f"it holds an array of {name!r}, and only arrays of numbers are read")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.made = self.made.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose pickled state must fit its shape; raw bytes never become objects."""

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


_PythonUnpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009  # in every CPython, not in the type stubs


class _Reader(_PythonUnpickler):
    """A pickle reader that makes arrays, tensors and plain containers only.

    It is Python's own reader written in Python: the one in C lets a file of 100 bytes ask for gigabytes of memo, set the state
    of anything it may name, and hash keys nested half a million deep.
    """

    dispatch: Dict[int, Any] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise CamFileError(f"it names {module}.{name}, and only numpy arrays, tensors and plain numbers are read")
        return found

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], (_Array, _Dtype)):
            raise CamFileError(f"it sets a state of {type(self.stack[-2]).__name__}")
        super().load_build()

    def load_setitem(self) -> None:
        self._check(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check(self.stack[::2])
        super().load_dict()

    def _check(self, keys: Any) -> None:
        for key in keys:
            if isinstance(key, tuple) or not isinstance(key, (int, float, str, bytes, np.generic, type(None))):
                raise CamFileError(f"it has a {type(key).__name__} as a key")

    def refuse(self) -> None:
        raise CamFileError("it holds more than arrays and numbers")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    for _op in (pickle.ADDITEMS, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX):
        dispatch[_op[0]] = refuse


def read_npy(path: PathLike) -> Any:
    """The content of a `.npy` file: an array, or the object in a pickled 0-d one, without running code.

    Raises:
        FileNotFoundError: if there is no such file.
        CamFileError: if the file is damaged or holds something other than arrays, numbers, strings and their containers.
    """
    size = os.path.getsize(path)
    if size > LARGEST:
        raise CamFileError(f"{os.fspath(path)} holds {size / 2**30:.1f} GiB; at most {LARGEST / 2**30:.0f} are read.")
    with open(path, "rb") as file:
        try:
            return _parse_npy(file, size)
        except CamFileError as error:
            raise CamFileError(f"{os.fspath(path)} is refused: {error}.") from error
        except Exception as error:  # a damaged pickle can raise nearly anything
            why = " ".join(str(error).split())[:200]
            raise CamFileError(
                f"{os.fspath(path)} is no readable .npy file ({type(error).__name__}: {why}); is it complete?"
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
            warnings.simplefilter("ignore")  # dtypes pickled by an older numpy
            content = _Reader(file, encoding="latin1").load()
        return content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    count = math.prod(shape)
    if count < 0 or count * dtype.itemsize != size - file.tell():
        raise CamFileError(f"its header promises {count} values of {dtype}, but {size - file.tell()} bytes follow")
    flat = np.frombuffer(file.read(), dtype)
    return flat.reshape(shape[::-1]).T if header["fortran_order"] else flat.reshape(shape)


# ---------------------------------------------------------------------------------------------------- CAMs


def read_cam_file(path: PathLike, num_classes: int) -> CamFile:
    """The CAMs of one image from a file of any known layout.

    Args:
        path: a `.npy` or `.npz` file.
        num_classes: C, without background.

    Raises:
        FileNotFoundError: if there is no such file.
        CamFileError: if it is damaged, names a class that does not exist, or holds maps that are not finite or differ in shape.
    """
    path = Path(path)
    try:
        return _read_cams(path, num_classes)
    except (CamFileError, FileNotFoundError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise CamFileError(f"{path} must hold a dict of CAMs or an array (C, H, W) ({type(error).__name__}: {why}).") from error


def _read_cams(path: Path, num_classes: int) -> CamFile:
    if path.suffix == ".npz":
        content: Any = _read_npz(path)
        layout = "npz"
    else:
        content = read_npy(path)
        layout = "dict"
    if isinstance(content, np.ndarray):
        return _from_array(path, content, num_classes)
    if not isinstance(content, dict):
        raise CamFileError(f"{path} must hold a dict of CAMs or an array (C, H, W); it holds a {type(content).__name__}.")
    if "keys" in content and ("high_res" in content or "cam" in content):
        return _from_keys(path, content, num_classes, "irn" if layout == "dict" else "npz")
    cams = {_class_index(path, key, num_classes): _map(path, key, value) for key, value in content.items()}
    if len(cams) < len(content):
        raise CamFileError(f"{path} names a class twice.")
    return CamFile(_same_shape(path, cams), layout)


def _read_npz(path: Path) -> Dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise CamFileError(f"{path} unpacks to more than {LARGEST / 2**30:.0f} GiB.")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except CamFileError:
        raise
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CamFileError(f"{path} is no readable .npz archive of arrays ({type(error).__name__}: {error}).") from error


def _from_array(path: Path, content: np.ndarray, num_classes: int) -> CamFile:
    if content.ndim != 3 or len(content) != num_classes:
        raise CamFileError(f"{path} must hold an array (C, H, W) with C = {num_classes}; it has shape {content.shape}.")
    return CamFile(_same_shape(path, {k: _map(path, k, value) for k, value in enumerate(content)}), "array")


def _from_keys(path: Path, content: Dict[str, Any], num_classes: int, layout: str) -> CamFile:
    keys = np.asarray(content["keys"]).reshape(-1)
    maps = np.asarray(content["high_res"] if "high_res" in content else content["cam"])
    if maps.ndim != 3 or len(maps) != len(keys):
        raise CamFileError(f"{path} must hold one map (H, W) per key; it has {len(keys)} keys and maps {maps.shape}.")
    low = tuple(np.asarray(content["cam"]).shape[1:]) if "cam" in content and "high_res" in content else None
    if low is not None and (len(low) != 2 or 0 in low):
        raise CamFileError(f"{path} must hold low maps (K, h, w); got {np.asarray(content['cam']).shape}.")
    cams = {_class_index(path, key, num_classes): _map(path, key, value) for key, value in zip(keys.tolist(), maps)}
    if len(cams) < len(keys):
        raise CamFileError(f"{path} names a class twice: {keys.tolist()}.")
    return CamFile(_same_shape(path, cams), layout, low)  # type: ignore[arg-type]


def _class_index(path: Path, key: Any, num_classes: int) -> int:
    number = key
    if isinstance(key, str) and re.fullmatch("-?[0-9]+", key):
        number = int(key)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)):
        raise CamFileError(f"{path} must have class indices as keys; got {key!r}.")
    if not 0 <= number < num_classes:
        raise CamFileError(f"{path} has class index {number}; with {num_classes} classes they run from 0 to {num_classes - 1}.")
    return int(number)


def _map(path: Path, key: Any, value: Any) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in "fiu" or value.ndim != 2 or value.size == 0:
        raise CamFileError(f"{path} must hold (H, W) maps of numbers; class {key} has {value.dtype} {value.shape}.")
    with np.errstate(over="ignore"):  # inf, refused below
        value = np.array(value, np.float32)
    if not np.isfinite(value).all():
        raise CamFileError(f"{path} must hold finite maps; class {key} has NaN or inf.")
    return value


def _same_shape(path: Path, cams: Dict[int, np.ndarray]) -> Dict[int, np.ndarray]:
    shapes = {value.shape for value in cams.values()}
    if len(shapes) > 1:
        raise CamFileError(f"{path} must hold maps of one shape; got {', '.join(map(str, sorted(shapes)))}.")
    return dict(sorted(cams.items()))


# ---------------------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """`path` holds all that `write(file)` wrote, or what it held before, also after a power cut in between."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_cam_file(path: PathLike, content: CamFile) -> None:
    """Write CAMs in the layout they were read in: same keys, same kind of arrays, float32."""
    path, cams = Path(path), content.cams
    keys = np.array(list(cams), np.int64)
    maps = np.stack(list(cams.values())) if cams else np.zeros((0, 1, 1), np.float32)
    if content.layout == "npz":
        write_atomically(path, lambda file: np.savez(file, keys=keys, cam=maps))
        return
    if content.layout == "array":
        write_atomically(path, lambda file: np.save(file, maps))
        return
    stored: Any = cams
    if content.layout == "irn":
        stored = {"keys": keys, "cam": maps, "high_res": maps}
        if content.low is not None:
            stored["cam"] = np.stack([_resize(value, content.low) for value in maps]) if len(maps) else maps
    write_atomically(path, lambda file: np.save(file, np.array(stored, dtype=object), allow_pickle=True))


def _resize(value: np.ndarray, shape: Tuple[int, int]) -> np.ndarray:
    import cv2

    return cv2.resize(value, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)


def voc_palette() -> List[int]:
    """The 256 colours of VOC's masks, R, G, B each."""
    colours = []
    for label in range(256):
        red = green = blue = 0
        for bit in range(8):
            red |= (label >> (3 * bit) & 1) << (7 - bit)
            green |= (label >> (3 * bit + 1) & 1) << (7 - bit)
            blue |= (label >> (3 * bit + 2) & 1) << (7 - bit)
        colours += [red, green, blue]
    return colours


def write_label_png(path: PathLike, labels: np.ndarray) -> None:
    """A label map (H, W) of 0..255 as a PNG with VOC's palette, as evaluation scripts and viewers expect it."""
    from PIL import Image

    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette(voc_palette())
    write_atomically(Path(path), lambda file: picture.save(file, format="PNG"))
