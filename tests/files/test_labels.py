from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semples_plugin.class_names import COCO_CLASSES
from semples_plugin.errors import CamFileError
from semples_plugin.files.labels import read_labels
from tests.coco_categories import COCO_BY_ID

CLASSES = ["boat", "train", "bird"]
ROWS = {"2007_000032": [1, 0, 1], "2007_000039": [0, 1, 0]}


def as_lists(labels: Dict[str, np.ndarray]) -> Dict[str, List[int]]:
    assert all(row.dtype == np.uint8 for row in labels.values())
    return {name: row.tolist() for name, row in labels.items()}


def written(path: Path, content: Any) -> Path:
    if isinstance(content, (bytes, str)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif path.suffix == ".npy":
        np.save(path, content, allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_text(json.dumps(content))
    return path


def voc(*names: str, head: str = "") -> str:
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><part><name>head</name></part></object>" for name in names
    )
    return f"{head}<annotation><filename>a.jpg</filename><name>bird</name>{objects}</annotation>"


@pytest.mark.parametrize(
    "file, content",
    [
        ("a.npy", {name: np.array(row, np.float32) for name, row in ROWS.items()}),  # MCTformer and others
        ("a.npy", {int(name.replace("_", "")): np.array(row, np.float32) for name, row in ROWS.items()}),  # IRN
        ("a.npy", {np.int64(name.replace("_", "")): np.array(row, bool) for name, row in ROWS.items()}),
        ("a.npy", {f"{name}.jpg": row for name, row in ROWS.items()}),
        ("a.npy", {name: torch.tensor(row) for name, row in ROWS.items()}),
        ("a.npz", {"ids": list(ROWS), "labels": list(ROWS.values())}),
        ("a.npz", {"ids": [f"{name}.PNG" for name in ROWS], "labels": np.array(list(ROWS.values()), float)}),
        ("a.npz", {"ids": [2007000032, 2007000039], "labels": list(ROWS.values())}),
        ("a.json", ROWS),
        ("a.json", {"2007_000032": ["bird", "boat"], "2007_000039": ["train"]}),
        ("a.json", {"2007_000032.jpeg": [0, 2], "2007_000039": [1]}),
        ("a.csv", "image,boat,train,bird\n2007_000032,1,0,1\n2007_000039,0,1,0\n"),
        ("a.csv", "bird,extra,image,train,boat\r\n1.0,9,2007_000032.jpg,0,1\r\n0,9,2007_000039.jpg,1.0,0\r\n"),
        ("a.csv", "image,labels\n2007_000032,boat; bird\n2007_000039,train;\n"),
        ("a.csv", '"labels","image"\n"bird;boat","2007_000032"\ntrain,2007_000039\n'),
    ],
)
def test_every_format_is_read(file: str, content: Any, tmp_path: Path) -> None:
    assert as_lists(read_labels(written(tmp_path / file, content), CLASSES)) == ROWS


def test_images_without_labels_get_zeros(tmp_path: Path) -> None:
    for file, content in [
        ("a.npy", {"x": np.zeros(3)}),
        ("a.json", {"x": []}),
        ("a.csv", "image,labels\nx,\n"),
        ("b.csv", "image,boat,train,bird\nx,0,0,0\n"),
    ]:
        assert as_lists(read_labels(written(tmp_path / file, content), CLASSES)) == {"x": [0, 0, 0]}


# ---------------------------------------------------------------------------------------------------- COCO


def coco(listed: bool, **changes: Any) -> Dict[str, Any]:
    content: Dict[str, Any] = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg"}],
        "annotations": [{"image_id": 9, "category_id": number, "bbox": [0, 0, 1, 1]} for number in (1, 13, 90, 90)],
    }
    if listed:
        content["categories"] = [{"id": k, "name": name, "supercategory": "x"} for k, name in reversed(COCO_BY_ID.items())]
    return {**content, **changes}


@pytest.mark.parametrize("categories", [True, False])
def test_coco_instances_are_read(categories: bool, tmp_path: Path) -> None:
    labels = read_labels(written(tmp_path / "instances.json", coco(categories)), list(COCO_CLASSES))
    assert labels["000000000009"].shape == (80,)
    assert labels["000000000009"].nonzero()[0].tolist() == [0, 11, 79]  # person, stop sign, toothbrush
    assert labels["000000000025"].sum() == 0  # an image without annotations


@pytest.mark.parametrize("categories", [True, False])
def test_every_coco_category_has_its_column(categories: bool, tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in COCO_BY_ID]
    annotations = [{"image_id": number, "category_id": number} for number in COCO_BY_ID]
    path = written(tmp_path / "a.json", coco(categories, images=images, annotations=annotations))
    labels = read_labels(path, list(COCO_CLASSES))
    for number, name in COCO_BY_ID.items():
        assert [list(COCO_CLASSES)[k] for k in labels[str(number)].nonzero()[0]] == [name]


def test_coco_labels_of_other_classes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", coco(True))
    labels = read_labels(path, ["toothbrush", "unicorn", "person"])  # "stop sign" is lacking, "unicorn" not in the file
    assert as_lists(labels) == {"000000000009": [1, 0, 1], "000000000025": [0, 0, 0]}
    with pytest.raises(CamFileError, match=r"has none of the 2 classes; its first categories: \['toothbrush'"):
        read_labels(path, ["unicorn", "dragon"])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"annotations": [{"image_id": 7, "category_id": 1}]}, "an annotation names image 7, category 1"),
        ({"annotations": [{"image_id": 9, "category_id": 12}]}, "an annotation names image 9, category 12"),
        ({"annotations": [{"image_id": 9}]}, "not a COCO instances file: KeyError 'category_id'"),
        ({"annotations": None}, "not a COCO instances file"),
        ({"annotations": [{"image_id": float("inf"), "category_id": 1}]}, ""),
        ({"annotations": [{"image_id": float("nan"), "category_id": 1}]}, "not a COCO instances file"),
        ({"images": [9]}, "not a COCO instances file"),
        ({"images": {"9": "a.jpg"}}, "not a COCO instances file"),
        ({"categories": ["person"]}, "not a COCO instances file"),
        ({"images": [], "annotations": []}, "holds no image"),
    ],
)
def test_broken_coco_files_are_refused(changes: Dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(CamFileError, match=reason or None):
        read_labels(written(tmp_path / "a.json", coco(True, **changes)), list(COCO_CLASSES))


# ---------------------------------------------------------------------------------------------------- VOC


def test_voc_annotations_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "Annotations"
    folder.mkdir()
    written(folder / "2007_000032.xml", voc("bird", "boat", "bird", "unknown"))
    written(folder / "2007_000039.xml", voc("train", head='<?xml version="1.0" encoding="utf-8"?>\n'))
    written(folder / "2007_000042.xml", voc())
    written(folder / "notes.txt", "no annotation")
    assert as_lists(read_labels(folder, CLASSES)) == {**ROWS, "2007_000042": [0, 0, 0]}


ENTITIES = '<!DOCTYPE annotation [<!ENTITY a "bird"><!ENTITY b SYSTEM "file:///etc/passwd">]>\n'


@pytest.mark.parametrize(
    "content, reason",
    [
        (voc("&a;", head=ENTITIES), "declares entities"),
        (voc("&b;", head=ENTITIES), "declares entities"),
        (voc("&a;", head='<?xml version="1.0" encoding="utf-16"?>' + ENTITIES).encode("utf-16"), ""),
        ("", "not readable XML"),
        ("<annotation><object>", "not readable XML"),
        (voc("&a;"), "not readable XML"),
        (b"\xff\xd8\xff\xe0 a picture", "not readable XML"),
        (voc("bird", head='<?xml version="1.0" encoding="foo"?>'), "not readable XML"),
        (voc("bird", head='<?xml version="1.0" encoding="utf-7"?>'), "not readable XML"),
    ],
)
def test_broken_voc_annotations_are_refused(content: Any, reason: str, tmp_path: Path) -> None:
    written(tmp_path / "a.xml", content)
    with pytest.raises(CamFileError, match=reason or None) as caught:
        read_labels(tmp_path, CLASSES)
    assert "a.xml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CamFileError, match="holds no .xml file; expected VOC's Annotations folder"):
        read_labels(tmp_path, CLASSES)


# ---------------------------------------------------------------------------------------------------- what is refused


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("a.npy", {"x": [0.9, 0.05, 0.05]}, "image 'x' must have 3 labels of 0 and 1; got float64 of shape"),
        ("a.npy", {"x": [2, 0, 0]}, "3 labels of 0 and 1"),
        ("a.npy", {"x": [-1, 0, 1]}, "3 labels of 0 and 1"),
        ("a.npy", {"x": [float("nan"), 0, 1]}, "3 labels of 0 and 1"),
        ("a.npy", {"x": [1, 0]}, r"3 labels of 0 and 1; got int64 of shape \(2,\). Was the file made for these classes"),
        ("a.npy", {"x": [1, 0, 0, 0]}, "3 labels of 0 and 1"),
        ("a.npy", {"x": [[1, 0, 0]]}, "3 labels of 0 and 1"),
        ("a.npy", {"x": ["1", "0", "0"]}, "3 labels of 0 and 1"),
        ("a.npy", {"x": [[1], [0, 1], 0]}, ""),
        ("a.npy", {"x": None}, "3 labels of 0 and 1"),
        ("a.npy", {}, "holds no image"),
        ("a.npy", np.eye(3), "must hold a pickled dict image id -> labels; it holds a ndarray"),
        ("a.npy", b"", "not a readable .npy file"),
        ("a.npz", {"ids": ["x"]}, "must be an archive of `ids` .* and `labels`"),
        ("a.npz", {"ids": ["x"], "labels": [[1, 0]]}, r"must hold labels \(1, 3\); got \(1, 2\)"),
        ("a.npz", {"ids": ["x"], "labels": [[0.5, 0, 0]]}, "3 labels of 0 and 1"),
        ("a.npz", {"ids": ["x", "y"], "labels": [[1, 0, 0]]}, r"must hold labels \(2, 3\); got \(1, 3\)"),
        ("a.npz", {"ids": "x", "labels": [[1, 0, 0]]}, ""),
        ("a.npz", {"ids": np.array(["x", None]), "labels": np.eye(3)[:2]}, "must be an archive"),
        ("a.npz", {"ids": [], "labels": np.zeros((0, 3))}, "holds no image"),
        ("a.npz", b"PK", "must be an archive"),
        ("a.json", "{", "not readable JSON"),
        ("a.json", "", "not readable JSON"),
        ("a.json", b"\xff\xfe", "not readable"),
        ("a.json", "[" * 100_000, "not readable JSON"),
        ("a.json", '{"x": ' + "[" * 100_000, "not readable JSON"),
        ("a.json", [["x", ["boat"]]], "must hold an object image id -> labels; it holds a list"),
        ("a.json", {}, "holds no image"),
        ("a.json", {"x": "boat"}, "image 'x' must have a list of labels; got str"),
        ("a.json", {"x": ["ship"]}, "image 'x' has the label 'ship', which is none of the 3 classes"),
        ("a.json", {"x": [3]}, "has the label 3, which is none of the 3 classes"),
        ("a.json", {"x": [-1]}, "has the label -1"),
        ("a.json", {"x": [True]}, "has the label True"),
        ("a.json", {"x": [0.9, 0.1, 0.0]}, "has the label 0.9"),
        ("a.json", {"x": [["boat"]]}, r"has the label \['boat'\]"),
        ("a.json", {"x": [{"boat": 1}]}, "has the label {'boat': 1}"),
        ("a.csv", "", "must have the header"),
        ("a.csv", "image,boat,train\nx,1,0\n", "missing: bird"),
        ("a.csv", "file,labels\nx,boat\n", "missing: image, boat, train, bird"),
        ("a.csv", "image,boat,train,bird\nx,1,0\n", "must hold 0 and 1 in its class columns"),
        ("a.csv", "image,boat,train,bird\nx,1,0,yes\n", "must hold 0 and 1 in its class columns"),
        ("a.csv", "image,boat,train,bird\nx,0.9,0,0\n", "3 labels of 0 and 1"),
        ("a.csv", "image,labels\nx,boat;ship\n", "has the label 'ship'"),
        ("a.csv", b"image,labels\n\xff\xfe,boat\n", "not readable as text"),
        ("a.csv", b"image,labels\n\x00,boat\n" + b"x" * 200_000 + b",boat\n", ""),
        ("a.csv", "image,labels\n", "holds no image"),
        ("a.txt", "x boat\n", "Labels are read from .npy, .npz, .json, .csv files or a folder of VOC XML"),
    ],
)
def test_unusable_labels_are_refused(file: str, content: Any, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path / file, content)
    with pytest.raises(CamFileError, match=reason or None) as caught:
        read_labels(path, CLASSES)
    assert file in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No label file at .*none.npy"):
        read_labels(tmp_path / "none.npy", CLASSES)


@pytest.mark.parametrize("where", ["value", "key", "row", "object array"])
def test_labels_that_run_code_are_refused(where: str, tmp_path: Path) -> None:
    evil = Evil(tmp_path / "marker")
    objects = np.array([evil, 0, 0], object)
    content: Any = {"value": {"x": evil}, "key": {evil: [1, 0, 0]}, "row": {"x": [evil, 0, 0]}, "object array": {"x": objects}}
    path = written(tmp_path / "a.npy", content[where])
    with pytest.raises(CamFileError, match=f"names {os.system.__module__}.system"):
        read_labels(path, CLASSES)
    assert not evil.marker.exists()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 5), cut=st.floats(0, 1), where=st.floats(0, 1), bits=st.integers(0, 255))
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, which: int, cut: float, where: float, bits: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    file, content = [
        ("a.npy", {name: np.array(row, np.float32) for name, row in ROWS.items()}),
        ("a.npz", {"ids": list(ROWS), "labels": list(ROWS.values())}),
        ("a.json", {"2007_000032": ["bird", "boat"], "2007_000039": ["train"]}),
        ("b.json", coco(True, categories=[{"id": 1, "name": "boat"}, {"id": 13, "name": "bird"}, {"id": 90, "name": "x"}])),
        ("a.csv", "image,labels\n2007_000032,boat; bird\n2007_000039,train;\n"),
        ("a.xml", voc("bird", "boat")),
    ][which]
    path = written(folder / file, content)
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= bits
    path.write_bytes(data[: len(data) if cut > 0.5 else int(2 * cut * len(data))])
    if path.suffix == ".xml":
        (folder / "xml").mkdir(exist_ok=True)
        path = path.replace(folder / "xml" / "a.xml").parent
    try:
        labels = read_labels(path, CLASSES)
    except CamFileError as error:
        assert "\n" not in str(error).replace(repr(file), "")
        return
    assert all(type(name) is str and row.shape == (3,) and set(row.tolist()) <= {0, 1} for name, row in labels.items())
