"""Files of masks without a class: formats, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from semples_plugin.errors import CamFileError
from semples_plugin.files import proposals
from semples_plugin.files.proposals import decode_rle, read_proposals

SIZE = (24, 32)


def runs(mask: np.ndarray) -> List[int]:
    """Uncompressed run lengths, one pixel at a time."""
    counts, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(counts: List[int]) -> str:
    """The text of run lengths, as the COCO format describes it."""
    text = ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits, x = x & 31, x >> 5
            more = not (x == -1 and bits & 16 or x == 0 and not bits & 16)
            text += chr(48 + bits + 32 * more)
    return text


def entry(mask: np.ndarray, text: bool = True) -> Any:
    return {"segmentation": {"size": list(mask.shape), "counts": compressed(runs(mask)) if text else runs(mask)}, "area": 1}


@pytest.fixture
def masks() -> np.ndarray:
    random = np.random.default_rng(0)
    found = np.zeros((4, *SIZE), bool)
    found[0, 3:9, 4:20], found[1, 10:, :7], found[2] = True, True, random.random(SIZE) < 0.5
    found[3] = True
    return found


# ---------------------------------------------------------------------------------------------------- run lengths


@given(seed=st.integers(0, 1000), height=st.integers(1, 40), width=st.integers(1, 40), share=st.sampled_from([0, 0.02, 0.5, 1]))
def test_run_lengths_give_the_mask_back(seed: int, height: int, width: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    assert np.array_equal(decode_rle(runs(mask), (height, width)), mask)
    assert np.array_equal(decode_rle(compressed(runs(mask)), (height, width)), mask)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (24, 32), (300, 2000)])
def test_run_lengths_are_read_as_pycocotools_reads_them(size: Any, share: float) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(0).random(size) < share
    text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert np.array_equal(decode_rle(text, size), mask)
    assert coco.frPyObjects({"size": list(size), "counts": runs(mask)}, *size)["counts"].decode() == text
    if size != (300, 2000):
        assert compressed(runs(mask)) == text


@pytest.mark.parametrize(
    "counts, message",
    [
        ([10], "the sum 768"),
        ([0, 769], "whole numbers from 0 to the 768"),
        ([-1, 769], "whole numbers from 0 to the 768"),
        ([768.0], "whole numbers from 0 to the 768"),
        ([True, 767], "whole numbers from 0 to the 768"),
        ([10**30], "whole numbers from 0 to the 768"),
        ([], "the sum 768"),
        (None, "must be a text, or whole numbers"),
        ({"a": 1}, "must be a text, or whole numbers"),
        ("", "the sum 768"),
        ("\u00e9", "the sum 768|no compressed run lengths"),
        (" ", "no compressed run lengths"),
        ("ppp", "no compressed run lengths"),
        ("ooooo", "no compressed run lengths"),  # never ends
        ("ooooooo0", "beyond the size of any image"),
        (compressed([700]), "the sum 768"),
        (compressed([800, 0]), "the sum 768"),
        (compressed([-32, 800]), "at least 0"),
        (compressed([0, 400, 400, -32]), "at least 0"),
        ("oooof0" * 9, "the sum 768|beyond"),
    ],
)
def test_wrong_run_lengths_are_refused(counts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_rle(counts, SIZE)


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["text", "numbers", "annotations", "folder"])
def test_formats_give_the_masks_in_order(kind: str, masks: np.ndarray, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "a").mkdir()
        for i, mask in enumerate(masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "a" / f"{i}.png")
        (tmp_path / "a" / "metadata.csv").write_text("id,area\n")  # Segment Anything's own script writes it
    else:
        content: Any = [entry(mask, kind != "numbers") for mask in masks]
        content = {"image": {"file_name": "a.jpg"}, "annotations": content} if kind == "annotations" else content
        (tmp_path / "a.json").write_text(json.dumps(content))
    got = read_proposals(tmp_path, "a", SIZE, SIZE)
    assert got.dtype == bool and np.array_equal(got, masks)
    small = read_proposals(tmp_path, "a", SIZE, (12, 16))
    assert np.array_equal(small, masks[:, ::2, ::2])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_label_map_gives_a_mask_per_value(dtype: Any, tmp_path: Path) -> None:
    labels = np.zeros(SIZE, dtype)
    labels[:5], labels[5:9, 3:], labels[20:] = 7, np.iinfo(dtype).max, 2
    Image.fromarray(labels).save(tmp_path / "a.png")
    got = read_proposals(tmp_path, "a", SIZE, SIZE)
    assert np.array_equal(got, np.stack([labels == value for value in (2, 7, np.iinfo(dtype).max)]))


def test_an_image_may_have_no_mask(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "b.png")
    assert read_proposals(tmp_path, "a", SIZE, SIZE).shape == read_proposals(tmp_path, "b", SIZE, SIZE).shape == (0, *SIZE)


def picture(path: Path, size: Any = SIZE, mode: str = "L") -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size[::-1], 1 if mode == "L" else (1, 2, 3)).save(path)


REFUSED = {
    "nothing": (lambda f: None, "there is no masks a.json, a.png or a/ in"),
    "two": (lambda f: (picture(f / "a.png"), (f / "a.json").write_text("[]")), "there is both a.json and a.png in"),
    "pipe": (lambda f: os.mkfifo(f / "a.json"), "there is no masks"),
    "pipe in a folder": (lambda f: (picture(f / "a" / "0.png"), os.mkfifo(f / "a" / "1.png")), "1.png is not a readable image"),
    "empty folder": (lambda f: (f / "a").mkdir(), "a holds no .png file"),
    "no JSON": (lambda f: (f / "a.json").write_bytes(b"\xff{"), "a.json is not readable JSON"),
    "deep": (lambda f: (f / "a.json").write_text("[" * 200_000), "a.json is not readable JSON"),
    "long number": (lambda f: (f / "a.json").write_text("[" + "9" * 10_000 + "]"), "a.json"),
    "object": (lambda f: (f / "a.json").write_text("{}"), "a.json must hold a list of masks, or an object with `annotations`"),
    "number": (lambda f: (f / "a.json").write_text("[1]"), "a.json: mask 0 must have a `segmentation` of `size` and `counts`"),
    "polygon": (lambda f: (f / "a.json").write_text('[{"segmentation": [[1, 2]]}]'), "mask 0 .* polygons are not read"),
    "picture": (lambda f: picture(f / "a.png", mode="RGB"), "a.png must be a palette or grey PNG"),
    "size": (lambda f: picture(f / "a.png", (32, 24)), "a.png has size 32 x 24, but its image 24 x 32"),
    "size in a folder": (lambda f: picture(f / "a" / "x.png", (3, 4)), "x.png has size 3 x 4, but its image 24 x 32"),
    "no PNG": (lambda f: (f / "a.png").write_text("no"), "a.png is not a readable image"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused(kind: str, tmp_path: Path) -> None:
    make: Callable[[Path], Any]
    make, message = REFUSED[kind]
    make(tmp_path)
    with pytest.raises(CamFileError, match=message) as caught:
        read_proposals(tmp_path, "a", SIZE, SIZE)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "size, counts, message",
    [
        ([32, 24], "", r"a.json: mask 1 has size 32 x 24, but its image 24 x 32"),
        ([10**9, 10**9], [10**18], r"a.json: mask 1 has size 1000000000 x 1000000000, but its image"),
        ([24, 32.0], "", r"a.json: mask 1 must have a `size` of two whole numbers"),
        ([True, 32], "", r"a.json: mask 1 must have a `size` of two whole numbers"),
        ("24x32", "", r"a.json: mask 1 must have a `size` of two whole numbers"),
        ([24, 32], [1, 2], r"a.json: mask 1 is damaged: its counts .* the sum 768"),
        ([24, 32], "~~~~", r"a.json: mask 1 is damaged: its counts are no compressed run lengths"),
    ],
)
def test_a_wrong_mask_is_named(size: Any, counts: Any, message: str, masks: np.ndarray, tmp_path: Path) -> None:
    wrong = {"segmentation": {"size": size, "counts": counts}}
    (tmp_path / "a.json").write_text(json.dumps([entry(masks[0]), wrong]))
    with pytest.raises(CamFileError, match=message):
        read_proposals(tmp_path, "a", SIZE, SIZE)


def test_memory_is_bounded(masks: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text(json.dumps([entry(mask) for mask in masks]))
    monkeypatch.setattr(proposals, "MOST_CELLS", 3 * 24 * 32)
    with pytest.raises(CamFileError, match="a.json holds more than 3 masks, which is the most for 24 x 32 pixels"):
        read_proposals(tmp_path, "a", SIZE, SIZE)
    assert len(read_proposals(tmp_path, "a", SIZE, (12, 16))) == 4
    monkeypatch.setattr(proposals, "MOST_MASKS", 2)
    with pytest.raises(CamFileError, match="a.json holds more than 2 masks"):
        read_proposals(tmp_path, "a", SIZE, (12, 16))
    monkeypatch.setattr(proposals, "LARGEST", 100)
    with pytest.raises(CamFileError, match="holds more than"):
        read_proposals(tmp_path, "a", SIZE, SIZE)


def test_a_large_picture_is_refused_by_its_header(tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    with pytest.raises(CamFileError, match="a.png has size 9000 x 9000"):
        read_proposals(tmp_path, "a", SIZE, SIZE)


@pytest.mark.parametrize("name", ["../a", "", "a/b", ".."])
def test_names_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    with pytest.raises(CamFileError, match="is not an image id"):
        read_proposals(tmp_path, name, SIZE, SIZE)
