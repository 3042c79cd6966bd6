"""CAM files of the ecosystem, read as what they are: untrusted pickles.

`.npy` files of MCTformer, WeakTr, TransCAM and SEAM hold a pickled dict {class index: (H, W) array}; IRN's hold
{"keys": class indices, "cam": (K, h, w), "high_res": (K, H, W)}; others are plain arrays (C, H, W) or `.npz` archives. Reading
admits arrays, tensors and plain scalars, and refuses everything else by name, so that no file runs code.
"""

from __future__ import annotations

import ast
import collections
import io
import math
import os
import pickle
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


def _tensor_from_bytes(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _allowed() -> Dict[Tuple[str, str], Callable[..., Any]]:
    """What a pickle may name: the makers of arrays, scalars, dtypes, ordered dicts, and tensors by torch's own safe reader."""
    core: Any = getattr(np, "_core", None) or np.core
    table: Dict[Tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch.storage", "_load_from_bytes"): _tensor_from_bytes,
    }
    for package in ("numpy.core", "numpy._core"):
        table[f"{package}.multiarray", "_reconstruct"] = core.multiarray._reconstruct
        table[f"{package}.multiarray", "scalar"] = core.multiarray.scalar
        table[f"{package}.numeric", "_frombuffer"] = core.numeric._frombuffer
    return table


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise CamFileError(f"A pickled text may only be bytes written as latin1; got {encoding!r}.")
    return text.encode("latin1")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _allowed().get((module, name))
        if found is None and (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            import torch._utils

            found = torch._utils._rebuild_tensor_v2
        if found is None:
            raise CamFileError(f"it names {module}.{name}, and only numpy arrays, tensors and plain numbers are read")
        return found


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
            raise CamFileError(
                f"{os.fspath(path)} is no readable .npy file ({type(error).__name__}: {error}); is it complete?"
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
    cams = {_class_index(path, key, num_classes): _map(path, key, value) for key, value in zip(keys.tolist(), maps)}
    if len(cams) < len(keys):
        raise CamFileError(f"{path} names a class twice: {keys.tolist()}.")
    return CamFile(_same_shape(path, cams), layout, low)  # type: ignore[arg-type]


def _class_index(path: Path, key: Any, num_classes: int) -> int:
    number = key
    if isinstance(key, str) and key.lstrip("-").isdigit():
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
    value = value.astype(np.float32)
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
