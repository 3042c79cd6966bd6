"""CAM files of the known baselines: reading and writing.

MCTformer, WeakTr, TransCAM and SEAM write `.npy` files with a pickled dict {class index: (H, W) array}. IRN pickles
{"keys": class indices, "cam": (K, h, w), "high_res": (K, H, W)}. Others write plain arrays (C, H, W) or `.npz` archives.
Pickles are read by `pickles`, which runs no code of a file.
"""

from __future__ import annotations

import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .._files import PathLike, open_regular, write_atomically
from ..errors import CamFileError
from .pickles import LARGEST, MOST_VALUES, as_array, read_npy

__all__ = ["CamFile", "cam_paths", "read_archive", "read_cam_file", "write_cam_file"]


class CamFile(NamedTuple):
    """The CAMs of one image.

    Attributes:
        cams: class index (from 0, without background) -> (H, W) float32, all of one shape.
        layout: `"dict"`, `"irn"`, `"array"` or `"npz"`; `write_cam_file` writes the same layout.
        low: shape (h, w) of the entry `cam` of a file of IRN, else None.
    """

    cams: Dict[int, np.ndarray]
    layout: str
    low: Optional[Tuple[int, int]] = None


def cam_paths(folder: Path) -> Dict[str, Path]:
    """Image id -> CAM file, of all CAM files in a folder, sorted by file name.

    Raises:
        CamFileError: if an image has both a `.npy` and a `.npz` file.
    """
    found = sorted(p for p in folder.iterdir() if p.suffix in (".npy", ".npz") and not p.name.startswith("."))
    names = {p.name for p in found}
    twice = [p.stem for p in found if p.suffix == ".npz" and f"{p.stem}.npy" in names]
    if twice:
        raise CamFileError(f"{folder} holds both .npy and .npz for {', '.join(twice[:5])}; keep one.")
    return {p.stem: p for p in found}


def read_cam_file(path: PathLike, num_classes: int) -> CamFile:
    """Read the CAMs of one image from a file of any known layout.

    Args:
        path: a `.npy` or `.npz` file.
        num_classes: C, without background.

    Raises:
        FileNotFoundError: if there is no such file.
        CamFileError: if the file is damaged, names a class that does not exist, or holds maps that are not finite or differ
            in shape.
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
        with open_regular(path) as file:
            return read_archive(path, file, LARGEST)
    except (CamFileError, FileNotFoundError):
        raise
    except Exception as error:
        raise CamFileError(f"{path} is not a readable .npz archive of arrays ({type(error).__name__}: {error}).") from error


def read_archive(path: Path, file: Any, most: int) -> Dict[str, np.ndarray]:
    """The arrays of an open `.npz` file.

    Args:
        path: of the file, for messages.
        file: opened for reading.
        most: bytes that it may unpack to.

    Raises:
        CamFileError: if it unpacks to more.
    """
    with zipfile.ZipFile(file) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > most:
            raise CamFileError(f"{path} unpacks to more than {most / 2**20:.0f} MiB.")
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        found = {name: archive[name] for name in archive.files}
    if sum(array.size for array in found.values()) > MOST_VALUES:
        raise CamFileError(f"{path} holds more than {MOST_VALUES} values.")
    return found


def _from_array(path: Path, content: np.ndarray, num_classes: int) -> CamFile:
    if content.ndim != 3 or len(content) != num_classes:
        background = content.ndim == 3 and len(content) == num_classes + 1
        advice = " If map 0 is background, save the array without it, cam[1:]." if background else ""
        raise CamFileError(f"{path} must hold an array (C, H, W) with C = {num_classes}; it has shape {content.shape}.{advice}")
    return CamFile(_same_shape(path, {k: _map(path, k, value) for k, value in enumerate(content)}), "array")


def _from_keys(path: Path, content: Dict[str, Any], num_classes: int, layout: str) -> CamFile:
    keys = as_array(path, content["keys"]).reshape(-1)
    maps = as_array(path, content["high_res"] if "high_res" in content else content["cam"])
    if maps.ndim != 3 or len(maps) != len(keys):
        raise CamFileError(f"{path} must hold one map (H, W) per key; it has {len(keys)} keys and maps {maps.shape}.")
    low = tuple(as_array(path, content["cam"]).shape[1:]) if "cam" in content and "high_res" in content else None
    if low is not None and (len(low) != 2 or 0 in low):
        raise CamFileError(f"{path} must hold low maps (K, h, w); got {as_array(path, content['cam']).shape}.")
    cams = {_class_index(path, key, num_classes): _map(path, key, value) for key, value in zip(keys.tolist(), maps)}
    if len(cams) < len(keys):
        raise CamFileError(f"{path} names a class twice: {keys.tolist()}.")
    return CamFile(_same_shape(path, cams), layout, low)  # type: ignore[arg-type]


def _class_index(path: Path, key: Any, num_classes: int) -> int:
    number = key
    if isinstance(key, str) and re.fullmatch("-?[0-9]+", key):
        number = int(key)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)):
        raise CamFileError(f"{path} must have class indices as keys; got {reprlib.repr(key)}.")
    if not 0 <= number < num_classes:
        advice = " If 0 is background there, leave it out and count the classes from 0." if number == num_classes else ""
        raise CamFileError(
            f"{path} has class index {number}; with {num_classes} classes they run from 0 to {num_classes - 1}.{advice}"
        )
    return int(number)


def _map(path: Path, key: Any, value: Any) -> np.ndarray:
    value = as_array(path, value)
    if value.dtype.kind not in "fiu" or value.ndim != 2 or value.size == 0:
        raise CamFileError(f"{path} must hold (H, W) maps of numbers; class {key} has {value.dtype} {value.shape}.")
    with np.errstate(over="ignore"):  # inf, refused below
        value = np.array(value, np.float32)
    if not np.isfinite(value).all():
        raise CamFileError(f"{path} must hold finite maps; class {key} has NaN or inf, or values beyond float32.")
    return value


def _same_shape(path: Path, cams: Dict[int, np.ndarray]) -> Dict[int, np.ndarray]:
    shapes = {value.shape for value in cams.values()}
    if len(shapes) > 1:
        raise CamFileError(f"{path} must hold maps of one shape; got {', '.join(map(str, sorted(shapes)))}.")
    return dict(sorted(cams.items()))


def write_cam_file(path: PathLike, content: CamFile) -> None:
    """Write CAMs in their layout, as float32. The file appears whole or not at all."""
    path, cams = Path(path), content.cams
    if content.layout == "dict":
        write_atomically(path, lambda file: np.save(file, np.array(cams, dtype=object), allow_pickle=True))
        return
    if content.layout == "array":
        write_atomically(path, lambda file: _save_maps(file, list(cams.values())))
        return
    keys = np.array(list(cams), np.int64)
    maps = np.stack(list(cams.values())) if cams else np.zeros((0, 1, 1), np.float32)
    if content.layout == "npz":
        write_atomically(path, lambda file: np.savez(file, keys=keys, cam=maps))
        return
    stored: Any = {"keys": keys, "cam": maps, "high_res": maps}
    if content.low is not None:
        stored["cam"] = np.stack([_resize(value, content.low) for value in maps]) if len(maps) else maps
    write_atomically(path, lambda file: np.save(file, np.array(stored, dtype=object), allow_pickle=True))


def _save_maps(file: Any, maps: Sequence[np.ndarray]) -> None:
    """What `np.save` writes of the float32 maps (C, H, W), one after the other: without a second copy of them."""
    shape = (len(maps), *(maps[0].shape if maps else (1, 1)))
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for value in maps:
        file.write(np.ascontiguousarray(value, "<f4").data)


def _resize(value: np.ndarray, shape: Tuple[int, int]) -> np.ndarray:
    import cv2

    return cv2.resize(value, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
