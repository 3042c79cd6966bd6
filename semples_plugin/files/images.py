"""Images and label maps on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import List

import numpy as np

from .._files import PathLike, write_atomically
from ..errors import CamFileError

__all__ = ["voc_palette", "write_label_png"]


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


SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


def check_id(name: str) -> None:
    """An id from a list or a label file must not lead out of the folder it is looked up in."""
    if re.search(r"[/\\\0]", name) or name in ("", ".", ".."):
        raise CamFileError(f"{name!r} is no image id: ids are file names without folders")


def find_image(folder: Path, name: str) -> Path:
    """The image file of an id.

    Raises:
        CamFileError: if there is none, or the id is no plain file name.
    """
    check_id(name)
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise CamFileError(f"no image {name}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:3])}) in {folder}")


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, as stored: a rotation in the EXIF data is not applied, as CAM networks' loaders do not apply it."""
    import cv2

    data = np.fromfile(path, np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
    if picture is None:
        raise CamFileError(f"{path} is no readable image")
    return np.ascontiguousarray(picture[..., ::-1])


def read_label_png(path: Path) -> np.ndarray:
    """A label map (H, W) from a palette or grey PNG."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            labels = np.array(picture)
    except FileNotFoundError:
        raise CamFileError(f"there is no {path}") from None
    except Exception as error:
        raise CamFileError(f"{path} is no readable PNG ({type(error).__name__})") from error
    if labels.ndim != 2:
        raise CamFileError(f"{path} must be a palette or grey PNG of labels; got an image of shape {labels.shape}")
    return labels
