"""Image ids, images, and label maps as PNGs with VOC's palette."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any, List, Optional, Tuple

import numpy as np

from .._files import PathLike, open_regular, write_atomically
from ..errors import CamFileError
from .tiff import TiffHeader, read_tiff_header

__all__ = [
    "MOST_PIXELS",
    "check_id",
    "find_image",
    "image_id",
    "image_size",
    "read_image",
    "read_label_png",
    "voc_palette",
    "write_label_png",
]

MOST_PIXELS = 100_000_000  # of an image; a larger one takes more than 1 GB as it is decoded
_LOWER = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
SUFFIXES = (*_LOWER, *(suffix.upper() for suffix in _LOWER))


def image_id(key: Any) -> str:
    """The id of an image from what a file calls it.

    Args:
        key: an id, a file name, or a number: IRN writes 2007000032 for `2007_000032`.

    Example:
        >>> image_id("2007_000032.jpg"), image_id(2007000032), image_id(139)
        ('2007_000032', '2007_000032', '139')
    """
    text = str(int(key)) if isinstance(key, (int, np.integer)) else str(key)
    if isinstance(key, (int, np.integer)) and len(text) == 10:
        return f"{text[:4]}_{text[4:]}"
    return re.sub(r"\.(jpe?g|png|tiff?|webp|bmp)$", "", text, flags=re.IGNORECASE)


def check_id(name: str) -> None:
    """Refuse an id that would lead out of the folder in which it is looked up.

    Raises:
        CamFileError: if the id is not a plain file name.
    """
    if re.search(r"[/\\\0]", name) or name in ("", ".", ".."):
        raise CamFileError(f"{name!r} is not an image id: ids are file names without folders")


def find_image(folder: Path, name: str) -> Path:
    """The image file of an id.

    Raises:
        CamFileError: if there is no such image, or the id is not a plain file name.
    """
    check_id(name)
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.exists() and path.is_file():
            return path
    raise CamFileError(f"no image {name}{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:7])}) in {folder}")


def read_image(path: Path) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB.

    Grey images get three equal channels; transparency is dropped, the colors below it stay; CMYK becomes RGB; of 16 bits the
    upper eight count; of several pages the first. A rotation in the EXIF data, or in the header of a TIFF, is not applied,
    because the loaders of CAM networks do not apply it either.

    Raises:
        CamFileError: if the file is not a readable image.
    """
    import cv2

    with open_regular(path) as file:
        image_size(path, file)
        header = read_tiff_header(file)
        file.seek(0)
        content = bytearray(file.read())
    if header is not None and header.orientation is not None:  # which the readers of TIFFs apply unasked
        place, upright = header.orientation
        content[place : place + 2] = upright
    if header is not None and header.alpha and header.bits <= 8:  # OpenCV would multiply the colors by it
        return _without_alpha(path, content)
    data = np.frombuffer(content, np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
    if picture is None:
        raise CamFileError(f"{path} is not a readable image{_in_words(header)}")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=picture))  # in place


def _without_alpha(path: Path, content: bytearray) -> np.ndarray:
    """A TIFF with transparency."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            colors = picture.convert("RGBA") if picture.mode == "RGBa" else picture  # colors that are multiplied already
            return np.array(colors.convert("RGB"))
    except Exception as error:
        raise CamFileError(f"{path} is not a readable image ({type(error).__name__})") from error


def _in_words(header: Optional[TiffHeader]) -> str:
    return "" if header is None else f": it is {header}; 1 to 4 bands of 8 or 16 bits, whole numbers from 0, are read"


def image_size(path: Path, file: Any = None) -> Tuple[int, int]:
    """Height and width of an image, from its header.

    Args:
        path: of the image.
        file: the file, if it is open.

    Raises:
        CamFileError: if it is no readable image, or has more than `MOST_PIXELS` pixels.
    """
    from PIL import Image

    header = None
    try:
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is ours
            file = stack.enter_context(open_regular(path)) if file is None else file
            header = read_tiff_header(file)
            file.seek(0)
            width, height = Image.open(file).size
    except Image.DecompressionBombError as error:
        raise CamFileError(f"{path} has too many pixels; at most {MOST_PIXELS // 10**6} million are read") from error
    except Exception as error:
        raise CamFileError(f"{path} is not a readable image ({type(error).__name__}){_in_words(header)}") from error
    if header is not None:
        height, width = header.size  # as Pillow's, but never rotated
    _check_pixels(path, width, height)
    return height, width


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise CamFileError(
            f"{path} has {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are read. Cut it into tiles"
        )


def read_label_png(path: Path) -> np.ndarray:
    """A label map (H, W) from a palette or grey PNG.

    Raises:
        CamFileError: if the file is missing, damaged, or an image in colors.
    """
    from PIL import Image

    try:
        with open_regular(path) as file, Image.open(file) as picture:
            _check_pixels(path, *picture.size)
            labels = np.array(picture)
    except FileNotFoundError:
        raise CamFileError(f"there is no {path}") from None
    except CamFileError:
        raise
    except Exception as error:
        raise CamFileError(f"{path} is not a readable PNG ({type(error).__name__})") from error
    if labels.ndim != 2:
        raise CamFileError(f"{path} must be a palette or grey PNG of labels; got an image of shape {labels.shape}")
    return labels


def write_label_png(path: PathLike, labels: np.ndarray) -> None:
    """Write a label map (H, W) of values 0 to 255 as a PNG with VOC's palette, which evaluation scripts and viewers expect."""
    from PIL import Image

    picture = Image.fromarray(labels.astype(np.uint8))
    picture.putpalette(voc_palette())
    write_atomically(Path(path), lambda file: picture.save(file, format="PNG"))


def voc_palette() -> List[int]:
    """The 256 colors of VOC's masks, as red, green, blue of each in one flat list."""
    colors = []
    for label in range(256):
        red = green = blue = 0
        for bit in range(8):
            red |= (label >> (3 * bit) & 1) << (7 - bit)
            green |= (label >> (3 * bit + 1) & 1) << (7 - bit)
            blue |= (label >> (3 * bit + 2) & 1) << (7 - bit)
        colors += [red, green, blue]
    return colors
