from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from semples_plugin.errors import CamFileError
from semples_plugin.files.images import find_image, image_id, image_size, read_image
from semples_plugin.files.tiff import read_tiff_header


def test_image_ids_of_numbers_and_file_names() -> None:
    assert image_id(2007000032) == image_id(np.int64(2007000032)) == image_id("2007_000032") == "2007_000032"
    assert image_id("2007_000032.jpg") == image_id("2007_000032.JPEG") == image_id("2007_000032.png") == "2007_000032"
    assert image_id(139) == "139" and image_id("000000000139.jpg") == "000000000139" and image_id("a.jpg.npy") == "a.jpg.npy"


@pytest.mark.parametrize("name", ["../secret", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "a\0b"])
def test_an_id_is_a_plain_file_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    with pytest.raises(CamFileError, match="is not an image id: ids are file names without folders"):
        find_image(tmp_path / "images", name)


def gradient(mode: str) -> Any:
    """A picture whose red grows to the right and whose green grows downwards."""
    y, x = np.mgrid[0:16, 0:24]
    rgb = np.stack([x * 10, y * 15, np.full_like(x, 40)], axis=2).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


@pytest.mark.parametrize(
    "name, mode, exact",
    [
        ("a.png", "RGB", True), ("a.tif", "RGB", True), ("a.tiff", "RGB", True), ("a.bmp", "RGB", True), ("a.TIF", "RGB", True),
        ("a.webp", "RGB", False), ("a.jpg", "RGB", False), ("a.jpg", "CMYK", False), ("a.png", "P", True),
    ],
)  # fmt: skip
def test_images_of_many_formats(name: str, mode: str, exact: bool, tmp_path: Path) -> None:
    gradient(mode).save(tmp_path / name)
    path = find_image(tmp_path, "a")
    found, expected = read_image(path).astype(int), np.array(gradient(mode).convert("RGB")).astype(int)
    assert path.name == name and found.shape == (16, 24, 3) and image_size(path) == (16, 24)
    assert (np.abs(found - expected).max() == 0) if exact else np.abs(found - expected).mean() < 12
    assert image_id(name) == "a"


def test_grey_16_bit_and_transparent_images(tmp_path: Path) -> None:
    grey = np.array(gradient("L"))
    gradient("L").save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    for suffix in ("png", "tif"):
        cv2.imwrite(str(tmp_path / f"deep.{suffix}"), grey.astype(np.uint16) * 256 + 77)
        found = read_image(tmp_path / f"deep.{suffix}")[..., 0].astype(int)
        assert np.abs(found - grey).max() <= 1
    see_through = gradient("RGBA")
    see_through.putalpha(Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (16, 1))))
    see_through.save(tmp_path / "alpha.png")
    assert np.array_equal(read_image(tmp_path / "alpha.png"), np.array(gradient("RGB")))
    first, second = gradient("RGB"), gradient("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    assert np.array_equal(read_image(tmp_path / "pages.tif"), np.array(first))


# ---------------------------------------------------------------------------------------------------- TIFF


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colors_of_transparent_tiffs_stay(mode: str, tmp_path: Path) -> None:
    picture = gradient(mode)
    picture.putalpha(Image.fromarray(np.tile(np.arange(24, dtype=np.uint8) * 10, (16, 1))))
    picture.save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.array(gradient("RGB" if mode == "RGBA" else "L").convert("RGB")))


def test_cmyk_tiffs_become_rgb(tmp_path: Path) -> None:
    gradient("CMYK").save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.array(gradient("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_tiffs_are_not_rotated(mode: str, orientation: int, tmp_path: Path) -> None:
    deep = Image.fromarray(np.array(gradient("L")).astype(np.uint16) * 256)
    (deep if mode == "I;16" else gradient(mode)).save(tmp_path / "a.tif", tiffinfo={274: orientation})
    expected = np.array(gradient("L" if mode == "I;16" else "RGB").convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "a.tif"), expected) and image_size(tmp_path / "a.tif") == (16, 24)


@pytest.mark.parametrize(
    "values, words",
    [
        (np.zeros((16, 24), np.float32), "a TIFF of 1 band of 32 bits, floating point"),
        (np.zeros((16, 24, 3), np.float32), "a TIFF of 3 bands of 32 bits, floating point"),
        (np.zeros((16, 24), np.int32), "a TIFF of 1 band of 32 bits, whole numbers with sign"),
    ],
)
def test_a_tiff_that_is_not_read_is_described(values: np.ndarray, words: str, tmp_path: Path) -> None:
    if values.dtype == np.int32:
        Image.fromarray(values).save(tmp_path / "a.tif")
    else:
        cv2.imwrite(str(tmp_path / "a.tif"), values)
    with pytest.raises(CamFileError, match=f"is not a readable image.*: it is {words}; 1 to 4 bands of 8 or 16 bits"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True), (">", True)])
def test_headers_of_tiffs(order: str, big: bool) -> None:
    word, width = ("Q", 8) if big else ("I", 4)
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    start += struct.pack(f"{order}HHQ", 8, 0, 16) if big else struct.pack(f"{order}I", 8)
    fields = [(256, 4, 300), (257, 3, 200), (258, 3, 8), (274, 3, 6), (277, 3, 4), (338, 3, 2)]
    body = struct.pack(f"{order}{'Q' if big else 'H'}", len(fields))
    for tag, kind, value in fields:
        packed = struct.pack(f"{order}{'I' if kind == 4 else 'H'}", value).ljust(width, b"\0")
        body += struct.pack(f"{order}HH{word}", tag, kind, 1) + packed
    header = read_tiff_header(io.BytesIO(start + body))
    assert header is not None and header[:4] == ((200, 300), 8, 4, True) and header.orientation is not None
    place, upright = header.orientation
    assert (start + body)[place : place + 2] == struct.pack(f"{order}H", 6) and upright == struct.pack(f"{order}H", 1)
    random = np.random.default_rng(0)
    for end in range(len(start + body)):  # half a file, or a changed one, is None or something else but no error
        read_tiff_header(io.BytesIO((start + body)[:end]))
        damaged = bytearray(start + body)
        damaged[end] = random.integers(256)
        read_tiff_header(io.BytesIO(damaged))
