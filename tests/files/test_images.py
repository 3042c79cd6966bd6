from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from semples_plugin.errors import CamFileError
from semples_plugin.files.images import find_image, image_id


def test_image_ids_of_numbers_and_file_names() -> None:
    assert image_id(2007000032) == image_id(np.int64(2007000032)) == image_id("2007_000032") == "2007_000032"
    assert image_id("2007_000032.jpg") == image_id("2007_000032.JPEG") == image_id("2007_000032.png") == "2007_000032"
    assert image_id(139) == "139" and image_id("000000000139.jpg") == "000000000139" and image_id("a.jpg.npy") == "a.jpg.npy"


@pytest.mark.parametrize("name", ["../secret", "a/b", "/etc/passwd", "..", ".", "", "a\\b", "a\0b"])
def test_an_id_is_a_plain_file_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    with pytest.raises(CamFileError, match="is not an image id: ids are file names without folders"):
        find_image(tmp_path / "images", name)
