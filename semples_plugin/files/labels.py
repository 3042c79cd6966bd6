"""Image-level labels from the formats that pipelines use: pickled dicts, archives, JSON, CSV, VOC XML, COCO instances."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence
from xml.etree import ElementTree

import numpy as np

from .._files import PathLike, open_regular, read_bytes
from ..class_names import COCO_CATEGORY_IDS, COCO_CLASSES
from ..errors import CamFileError
from .cams import read_archive
from .images import image_id
from .pickles import as_array, read_npy

__all__ = ["read_labels"]

Labels = Dict[str, np.ndarray]
LARGEST = 2**30  # bytes; COCO's instances take 0.5e9


def read_labels(path: PathLike, classes: Sequence[str]) -> Labels:
    """Read image-level labels.

    Args:
        path: one of
            `.npy` with a pickled dict id -> (C,) array (`cls_labels.npy` of the baselines; no code of the file is run);
            `.npz` with `ids` (N,) and `labels` (N, C);
            `.json` with {id: [names or indices]} or {id: multi-hot list}, or COCO instances (`images`, `annotations`);
            `.csv` with the header `image,<class>,<class>,...` and values 0 and 1, or with the header `image,labels` and
            names separated by ";";
            a folder of VOC XML annotations.
        classes: C class names, in the order of the columns, without background. Where a file names labels, `background` may be
            among them; it does not count.

    Returns:
        Image id -> (C,) uint8, 1 for each class in the image.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        CamFileError: if the file is damaged, or was made for other classes.
    """
    path, classes = Path(path), list(classes)
    try:
        return _read(path, classes)
    except (CamFileError, FileNotFoundError):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise CamFileError(f"{path} is not readable as labels ({type(error).__name__}: {why}).") from error


def _read(path: Path, classes: List[str]) -> Labels:
    if path.is_dir():
        return _voc_folder(path, classes)
    if not path.exists():
        raise FileNotFoundError(f"No label file at {path}.")
    readers = {".npy": _npy, ".npz": _npz, ".json": _json, ".csv": _csv}
    if path.suffix not in readers:
        raise CamFileError(f"Labels are read from {', '.join(readers)} files or a folder of VOC XML; got {path}.")
    try:
        labels = readers[path.suffix](path, classes)
    except (UnicodeDecodeError, csv.Error) as error:
        raise CamFileError(f"{path} is not readable as text: {error}.") from error
    if not labels:
        raise CamFileError(f"{path} holds no image.")
    return labels


def _row(path: Path, key: Any, value: Any, classes: Sequence[str]) -> np.ndarray:
    """Multi-hot labels of one image."""
    row = as_array(path, value)
    if row.shape != (len(classes),) or row.dtype.kind not in "biuf" or not np.isin(row, (0, 1)).all():
        raise CamFileError(
            f"{path}: image {reprlib.repr(key)} must have {len(classes)} labels of 0 and 1; got {row.dtype} of shape "
            f"{row.shape}. {_advice(row.shape[-1:], classes)}"
        )
    return row.astype(np.uint8)


def _advice(width: Sequence[int], classes: Sequence[str]) -> str:
    if tuple(width) == (len(classes) + 1,):
        return "Background is no class: if it is column 0, leave that out."
    return "Was the file made for these classes?"


def _npy(path: Path, classes: Sequence[str]) -> Labels:
    content = read_npy(path)
    if not isinstance(content, dict):
        raise CamFileError(f"{path} must hold a pickled dict image id -> labels; it holds a {type(content).__name__}.")
    return {image_id(key): _row(path, key, value, classes) for key, value in content.items()}


def _npz(path: Path, classes: Sequence[str]) -> Labels:
    try:
        with open_regular(path) as file:
            archive = read_archive(path, file, LARGEST)
        ids, rows = archive["ids"], archive["labels"]
    except Exception as error:
        raise CamFileError(f"{path} must be an archive of `ids` (N,) and `labels` (N, C); {error}.") from error
    if ids.ndim != 1 or rows.shape != (len(ids), len(classes)):
        advice = _advice(rows.shape[1:], classes)
        raise CamFileError(f"{path} must hold labels ({len(ids)}, {len(classes)}); got {rows.shape}. {advice}")
    return {image_id(key): _row(path, key, row, classes) for key, row in zip(ids.tolist(), rows)}


def _json(path: Path, classes: Sequence[str]) -> Labels:
    try:
        content = json.loads(read_bytes(path, LARGEST).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CamFileError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CamFileError(f"{path} must hold an object image id -> labels; it holds a {type(content).__name__}.")
    if "annotations" in content and "images" in content:
        return _coco(path, content, classes)
    return {image_id(key): _named(path, key, value, classes) for key, value in content.items()}


def _named(path: Path, key: Any, value: Any, classes: Sequence[str]) -> np.ndarray:
    """Labels from a list of names or indices, or from a multi-hot list. A list of C zeros and ones counts as multi-hot."""
    if not isinstance(value, list):
        raise CamFileError(f"{path}: image {reprlib.repr(key)} must have a list of labels; got {type(value).__name__}.")
    if len(value) == len(classes) > 1 and all(type(item) is int and item in (0, 1) for item in value):
        return _row(path, key, value, classes)
    row = np.zeros(len(classes), np.uint8)
    for item in value:
        if item == "background" and item not in classes:  # it is in every image
            continue
        index = list(classes).index(item) if item in classes else item
        if type(index) is not int or not 0 <= index < len(classes):
            raise CamFileError(
                f"{path}: image {reprlib.repr(key)} has the label {reprlib.repr(item)}, which is none of the {len(classes)} "
                "classes."
            )
        row[index] = 1
    return row


def _coco(path: Path, content: Mapping[str, Any], classes: Sequence[str]) -> Labels:
    """Labels from COCO instances. Category ids run from 1 to 90 with gaps; columns 0 to 79 follow the order of the ids."""
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content.get("categories", ())}
        names = {int(image["id"]): image_id(str(image["file_name"])) for image in content["images"]}
        pairs = [(int(a["image_id"]), int(a["category_id"])) for a in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CamFileError(f"{path} is not a COCO instances file: {type(error).__name__} {error}.") from error
    if not categories:
        categories = dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES))
    column = {number: list(classes).index(name) for number, name in categories.items() if name in classes}
    if not column:
        raise CamFileError(
            f"{path} has none of the {len(classes)} classes; its first categories: {list(categories.values())[:5]}."
        )
    labels = {name: np.zeros(len(classes), np.uint8) for name in names.values()}
    for image, category in pairs:
        if image not in names or category not in categories:
            raise CamFileError(f"{path}: an annotation names image {image}, category {category}, which the file does not list.")
        if category in column:
            labels[names[image]][column[category]] = 1
    return labels


def _csv(path: Path, classes: Sequence[str]) -> Labels:
    reader = csv.DictReader(io.StringIO(read_bytes(path, LARGEST).decode("utf-8"), newline=""))
    rows: List[Dict[str, str]] = list(reader)
    columns = set(reader.fieldnames or ())
    if {"image", "labels"} <= columns:
        split = {row["image"]: [name.strip() for name in (row["labels"] or "").split(";") if name.strip()] for row in rows}
        return {image_id(key): _named(path, key, value, classes) for key, value in split.items()}
    missing = [name for name in classes if name not in columns]
    if "image" not in columns or missing:
        raise CamFileError(
            f"{path} must have the header image,labels or image and all {len(classes)} classes; missing: "
            f"{', '.join((['image'] if 'image' not in columns else []) + missing[:5])}."
        )
    try:
        return {
            image_id(row["image"]): _row(path, row["image"], [float(row[name]) for name in classes], classes) for row in rows
        }
    except (TypeError, ValueError) as error:
        if isinstance(error, CamFileError):
            raise
        raise CamFileError(f"{path} must hold 0 and 1 in its class columns: {error}.") from error


def _voc_folder(path: Path, classes: Sequence[str]) -> Labels:
    files = sorted(path.glob("*.xml"))
    if not files:
        raise CamFileError(f"{path} holds no .xml file; expected VOC's Annotations folder.")
    labels = {}
    for file in files:
        text = read_bytes(file, 2**24)
        if b"\0" in text:
            raise CamFileError(f"{file} is not readable XML in UTF-8.")
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise CamFileError(f"{file} declares entities, which no VOC annotation does; it is not read.")
        try:
            names = [node.text for node in ElementTree.fromstring(text).findall("object/name")]
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise CamFileError(f"{file} is not readable XML: {error}.") from error
        labels[file.stem] = _named(file, file.stem, [name for name in names if name in classes], classes)
    return labels
