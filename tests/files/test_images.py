from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from semples_plugin.errors import CamFileError
from semples_plugin.files.images import find_image, image_id, image_size, read_image


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
