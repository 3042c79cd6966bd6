"""Masks without a class of one image, from files: COCO's run lengths as JSON, a label map, or a folder of PNGs.

The files are those of strangers: sizes must be those of the image, run lengths must fill it, and memory is bounded before
anything is decoded. Flow: files -> **proposals** -> `mask_proposals`, `refine_folder`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np

from .._files import read_bytes
from ..errors import CamFileError
from .images import check_id, image_size, read_label_png

__all__ = ["LARGEST", "MOST_CELLS", "MOST_MASKS", "decode_rle", "read_proposals"]

LARGEST = 2**25  # bytes of a JSON file
MOST_CELLS = 2**29  # pixels of all masks of an image together, one byte each
MOST_MASKS = 20_000  # of an image
_MOST_CHARACTERS = 6  # of one run length: 30 bits

Size = Tuple[int, int]


def read_proposals(folder: Path, name: str, size: Size, at: Sequence[int]) -> np.ndarray:
    """The masks of an image.

    Args:
        folder: holds one of these for each image:
            `NAME.json`, a list of `{"segmentation": {"size": [h, w], "counts": ...}}`, or an object with such a list under
            `annotations`, as Segment Anything writes them; counts as a list of numbers or compressed to a text;
            `NAME.png`, a palette or grey PNG, each value above 0 one mask;
            a folder `NAME` of grey PNGs, each one mask: all pixels above 0.
        name: id of the image.
        size: (height, width) of the image in pixels, which the masks must have.
        at: (height, width) at which they are returned; by the nearest pixel.

    Returns:
        (M, height, width) bool, M may be 0.

    Raises:
        CamFileError: if there is no such file or more than one, it is damaged, its masks have another size, or they would take
            more memory than `MOST_CELLS`.
    """
    check_id(name)
    found = [path for path in (folder / f"{name}.json", folder / f"{name}.png") if path.is_file()]
    found += [folder / name] if (folder / name).is_dir() else []
    if len(found) != 1:
        what = "both " + " and ".join(path.name for path in found) if found else f"no masks {name}.json, {name}.png or {name}/"
        raise CamFileError(f"expected one file of masks per image; there is {what} in {folder}")
    path = found[0]
    readers = {".json": _json, ".png": _label_map}
    try:
        masks = (_pngs if path.is_dir() else readers[path.suffix])(path, size)
        return _collect(path, masks, size, (int(at[0]), int(at[1])))
    except CamFileError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise CamFileError(f"{path} is not readable as masks ({type(error).__name__}: {why})") from error


def _collect(path: Path, masks: Iterator[np.ndarray], size: Size, at: Size) -> np.ndarray:
    """All masks at the size `at`, one after the other."""
    most = min(MOST_MASKS, MOST_CELLS // max(at[0] * at[1], 1))
    rows, columns = np.arange(at[0]) * size[0] // at[0], np.arange(at[1]) * size[1] // at[1]
    kept: List[np.ndarray] = []
    for mask in masks:
        if len(kept) == most:
            raise CamFileError(f"{path} holds more than {most} masks, which is the most for {at[0]} x {at[1]} pixels")
        kept.append(mask if at == size else mask[rows[:, None], columns])
    return np.stack(kept) if kept else np.zeros((0, *at), bool)


def _check_size(what: str, got: Sequence[int], size: Size) -> None:
    if tuple(got) != size:
        raise CamFileError(f"{what} has size {' x '.join(map(str, got))}, but its image {size[0]} x {size[1]}")


def _json(path: Path, size: Size) -> Iterator[np.ndarray]:
    try:
        content = json.loads(read_bytes(path, LARGEST).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CamFileError(f"{path} is not readable JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("annotations")
    if not isinstance(content, list):
        raise CamFileError(f"{path} must hold a list of masks, or an object with `annotations`")
    for i, item in enumerate(content):
        what = f"{path}: mask {i}"
        rle = item.get("segmentation") if isinstance(item, dict) else None
        if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
            raise CamFileError(f"{what} must have a `segmentation` of `size` and `counts`; polygons are not read")
        given = rle["size"]
        if not isinstance(given, list) or len(given) != 2 or any(type(n) is not int for n in given):
            raise CamFileError(f"{what} must have a `size` of two whole numbers, height and width")
        _check_size(what, given, size)
        try:
            yield decode_rle(rle["counts"], size)
        except ValueError as error:
            raise CamFileError(f"{what} is damaged: {error}") from error


def _png(path: Path, size: Size) -> np.ndarray:
    _check_size(str(path), image_size(path), size)  # by its header, before it takes memory
    return read_label_png(path)


def _label_map(path: Path, size: Size) -> Iterator[np.ndarray]:
    labels = _png(path, size)
    for value in np.unique(labels):
        if value > 0:
            yield labels == value


def _pngs(path: Path, size: Size) -> Iterator[np.ndarray]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".png")
    if not files:
        raise CamFileError(f"{path} holds no .png file")
    for file in files:
        yield _png(file, size) > 0


def decode_rle(counts: Any, size: Size) -> np.ndarray:
    """A mask from COCO's run lengths: column by column, runs of 0 and of 1 by turns, 0 first.

    Compressed counts are a text: a run length is written in groups of 5 bits, the lowest first, each a character of code 48 +
    bits + 32 if more follow; bit 16 of the last is the sign. From the fourth on it is the difference to the run length two
    before it.

    Args:
        counts: run lengths, or a text of them.
        size: (height, width).

    Returns:
        (height, width) bool.

    Raises:
        ValueError: if these are no run lengths, or they do not fill the mask.

    Example:
        >>> decode_rle([1, 2, 1], (2, 2))
        array([[False,  True],
               [ True, False]])
    """
    total = size[0] * size[1]
    if isinstance(counts, str):
        runs = _uncompressed(counts)
    elif isinstance(counts, list) and all(type(n) is int and 0 <= n <= total for n in counts):
        runs = np.array(counts, np.int64)
    else:
        raise ValueError(f"its counts must be a text, or whole numbers from 0 to the {total} pixels of its image")
    if runs.min(initial=0) < 0 or runs.max(initial=0) > total or int(runs.sum()) != total:
        raise ValueError(f"its counts must be at least 0 and have the sum {total}, the pixels of its image")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size[::-1]).T


def _uncompressed(text: str) -> np.ndarray:
    """The run lengths of a compressed text, int64; each is within 30 bits, so that no sum of a file's overflows."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero((codes & 32) == 0)  # of each number
    if not len(codes):
        return np.zeros(0, np.int64)
    first = np.concatenate([[0], last[:-1] + 1])
    if codes.min() < 0 or codes.max() > 63 or not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("its counts are no compressed run lengths")
    if int((last - first).max()) >= _MOST_CHARACTERS:
        raise ValueError("its counts hold a number beyond the size of any image")
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    numbers = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) > 0
    numbers -= negative.astype(np.int64) << (5 * (place[last] + 1))
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
