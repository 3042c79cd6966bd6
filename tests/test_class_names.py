from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semples_plugin.class_names import COCO_CATEGORY_IDS, COCO_CLASSES, VOC_CLASSES, read_class_names
from tests.coco_categories import COCO_BY_ID


def test_class_names_from_benchmarks_and_files(tmp_path: Path) -> None:
    assert read_class_names("voc") == VOC_CLASSES and read_class_names("coco") == COCO_CLASSES
    (tmp_path / "a.txt").write_text(" boat \n\nsea  gull\r\n", encoding="utf-8")
    assert read_class_names(str(tmp_path / "a.txt")) == ["boat", "sea  gull"]
    (tmp_path / "a.json").write_text('["boat", "train"]')
    (tmp_path / "b.json").write_text('{"boat": "ship", "train": "train"}')
    assert read_class_names(str(tmp_path / "a.json")) == ["boat", "train"]
    assert read_class_names(str(tmp_path / "b.json")) == {"boat": "ship", "train": "train"}


@pytest.mark.parametrize("name", ["background", "Background", "__background__", "_background_"])
def test_background_at_the_head_of_a_list_is_left_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{name}\nboat\ntrain\n")
    assert read_class_names(str(tmp_path / "a.txt")) == ["boat", "train"]
    (tmp_path / "a.json").write_text(f'["{name}", "boat", "train"]')
    assert read_class_names(str(tmp_path / "a.json")) == ["boat", "train"]
    (tmp_path / "b.json").write_text(f'{{"{name}": "background", "boat": "ship"}}')
    assert read_class_names(str(tmp_path / "b.json")) == {"boat": "ship"}


def test_benchmarks_are_named_in_any_case() -> None:
    assert list(read_class_names("VOC")) == list(read_class_names("voc")) and len(read_class_names("COCO")) == 80


def test_coco_names_and_ids_are_the_official_ones() -> None:
    assert len(COCO_CATEGORY_IDS) == len(COCO_CLASSES) == 80 and set(COCO_CATEGORY_IDS) <= set(range(1, 91))
    assert dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES)) == COCO_BY_ID
    assert dict(zip(COCO_CLASSES, COCO_CATEGORY_IDS)) == {name: number for number, name in COCO_BY_ID.items()}
    assert list(VOC_CLASSES)[:3] == ["aeroplane", "bicycle", "bird"] and list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert len(VOC_CLASSES) == 20 and list(VOC_CLASSES).index("person") == 14


@pytest.mark.parametrize(
    "name, content, error, reason",
    [
        ("none.txt", None, ValueError, "The class names must be voc, coco or a readable file; got '.*none.txt'"),
        ("latin1.txt", "Möwe".encode("latin1"), ValueError, "The class names must be voc, coco or a readable file"),
        ("empty.txt", b" \n\n", ValueError, "at least one name"),
        ("twice.txt", b"boat\ntrain\nboat\n", ValueError, "'boat' more than once"),
        ("last.txt", b"boat\ntrain\nbackground\n", ValueError, "names background at place 3. It is no class: leave it out"),
        ("alone.txt", b"background\n", ValueError, "at least one name"),
        ("broken.json", b'["boat",', ValueError, "broken.json is not readable JSON"),
        ("number.json", b"7", ValueError, "must hold a list of names, or a mapping .*; got int"),
        ("numbers.json", b"[1, 2]", TypeError, "must be a string; got 1 of type int"),
        ("values.json", b'{"boat": 1}', TypeError, "must be a string; got 1 of type int"),
    ],
)
def test_unusable_class_names_are_refused(name: str, content: Any, error: Any, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=reason):
        read_class_names(str(tmp_path / name))
