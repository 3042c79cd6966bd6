from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from semples_plugin import cli
from semples_plugin.class_names import COCO_CLASSES, VOC_CLASSES, read_class_names
from semples_plugin.config import parse_assignments
from semples_plugin.metrics import Curve, class_scores, confusion_matrix, mean_iou

THRESHOLDS = [i / 100 for i in range(100)]
Cams = Dict[int, np.ndarray]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Tuple[int, str, str]:
    """Exit status, stdout and stderr of `semples`."""
    capsys.readouterr()
    try:
        status = cli.main([str(item) for item in arguments])
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---------------------------------------------------------------------------------------------------- the metric


def literal_counts(
    images: Sequence[Tuple[Cams, np.ndarray]], threshold: float, num_labels: int
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(TP, P, T) per label, line by line as the evaluation scripts of MCTformer, WeakTr and TransCAM count."""
    tp, p, t = (np.zeros(num_labels, np.int64) for _ in range(3))
    for cams, gt in images:
        tensor = np.zeros((num_labels, *gt.shape), np.float32)
        for key in cams:
            tensor[key + 1] = cams[key]
        tensor[0, :, :] = threshold
        predict = np.argmax(tensor, axis=0).astype(np.uint8)
        cal = gt < 255
        mask = (predict == gt) * cal
        for i in range(num_labels):
            p[i] += np.sum((predict == i) * cal)
            t[i] += np.sum((gt == i) * cal)
            tp[i] += np.sum((gt == i) * mask)
    return tp, p, t


def some_images(seed: int, num_labels: int = 5, count: int = 3, ties: bool = True) -> List[Tuple[Cams, np.ndarray]]:
    """Images of different sizes; with `ties` the CAMs hit thresholds and one another exactly. Some classes occur nowhere."""
    generator = np.random.default_rng(seed)
    images = []
    for i in range(count):
        shape = (6 + i, 9 - i)
        keys = generator.permutation(num_labels - 2)[: generator.integers(0, num_labels - 1)]  # the last class never
        values = generator.random((len(keys), *shape))
        if ties:
            values = np.round(values * 62) / 100 - 0.01
        gt = generator.integers(0, num_labels - 1, shape).astype(np.uint8)
        gt[generator.random(shape) < 0.2] = 255
        images.append(({int(k): v.astype(np.float32) for k, v in zip(keys, values)}, gt))
    return images


@given(st.integers(0, 10_000), st.booleans())
def test_curve_counts_as_the_baselines_do_at_every_threshold(seed: int, ties: bool) -> None:
    images, parts = some_images(seed, ties=ties), []
    curve = Curve(THRESHOLDS, 5)
    for cams, gt in images:
        one = Curve(THRESHOLDS, 5)
        one.add(cams, gt)
        parts.append(one)
        curve.merge(one)
    miou = curve.miou()
    for i, threshold in enumerate(THRESHOLDS):
        tp, p, t = literal_counts(images, threshold, 5)
        confusion = curve.confusion(i)
        assert np.array_equal(np.diag(confusion), tp)
        assert np.array_equal(confusion.sum(0), p) and np.array_equal(confusion.sum(1), t)
        assert miou[i] == pytest.approx(mean_iou(confusion), rel=1e-12, nan_ok=True)
        # the scripts divide by T + P - TP + 1e-10 and average over the labels of the data set
        assert miou[i] == pytest.approx(np.mean([v for v, n in zip(tp / (t + p - tp + 1e-10), t + p) if n]), rel=1e-6)
        for score, hit, said, true in zip(class_scores(confusion, list("abcde")), tp, p, t):
            union = said + true - hit
            assert score.iou == (hit / union if union else None)
            assert score.precision == (hit / said if said else None) and score.recall == (hit / true if true else None)
            assert score.false_positive == ((said - hit) / union if union else None)
            assert score.false_negative == ((true - hit) / union if union else None)
            if union:
                assert score.iou + score.false_positive + score.false_negative == pytest.approx(1)


def test_curve_ties_by_hand() -> None:
    third = np.float32(0.3)
    cams = {0: np.array([[third, 0.5, 0.2, -1]], np.float32), 1: np.array([[third, 0.5, 0.4, 0]], np.float32)}
    curve = Curve([0.0, 0.3, 0.5], 3)
    curve.add(cams, np.array([[1, 1, 2, 0]]))
    assert [np.diag(curve.confusion(i)).tolist() for i in range(3)] == [[1, 2, 1], [1, 1, 1], [1, 0, 0]]


def test_curve_of_nothing() -> None:
    curve = Curve([0.1, 0.2], 3)
    assert not curve.confusion(0).any() and all(math.isnan(value) for value in curve.miou())
    curve.add({}, np.zeros((2, 2), np.uint8))
    assert curve.miou() == [1.0, 1.0] and curve.confusion(0)[0, 0] == 4
    curve.add({1: np.ones((2, 2), np.float32)}, np.full((2, 2), 255, np.uint8))
    assert curve.confusion(1).sum() == 4


def test_curve_refuses() -> None:
    for thresholds in ([], [0.2, 0.1], [0.1, 0.1]):
        with pytest.raises(ValueError, match="`thresholds` must ascend and hold at least one"):
            Curve(thresholds, 3)
    with pytest.raises(ValueError, match=r"shape of the ground truth, \(2, 3\); got \(3, 2\)"):
        Curve([0.5], 3).add({0: np.zeros((3, 2), np.float32)}, np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="`target` must hold labels from 0 to 2; got 0 to 3"):
        Curve([0.5], 3).add({}, np.array([[0, 3]]))


# ---------------------------------------------------------------------------------------------------- semples evaluate

CLASSES = ["boat", "train", "bird", "unicorn"]


class Data:
    """Folders of CAM files, label PNGs and ground truth of a few images."""

    def __init__(self, root: Path, seed: int = 0, count: int = 4):
        self.root, self.cams, self.labels, self.gt = root, root / "cams", root / "labels", root / "val"
        for folder in (self.cams, self.labels, self.gt):
            folder.mkdir(parents=True)
        self.classes = root / "classes.txt"
        self.classes.write_text("\n".join(CLASSES) + "\n\n")
        self.images = {f"2007_{i:06d}": one for i, one in enumerate(some_images(seed, 5, count))}
        for name, (cams, gt) in self.images.items():
            np.save(self.cams / f"{name}.npy", cams)  # type: ignore[arg-type]
            Image.fromarray(gt).save(self.gt / f"{name}.png")
            Image.fromarray(self.label_map(name, 0.25)).save(self.labels / f"{name}.png")

    def label_map(self, name: str, threshold: float) -> np.ndarray:
        cams, gt = self.images[name]
        tensor = np.zeros((5, *gt.shape), np.float32)
        tensor[0] = threshold
        for k, value in cams.items():
            tensor[k + 1] = value
        return tensor.argmax(0).astype(np.uint8)

    def arguments(self, *extra: Any, pred: Optional[Path] = None) -> List[Any]:
        return ["evaluate", "--pred", pred or self.cams, "--gt", self.gt, "--classes", self.classes, *extra]

    def miou(self, threshold: float, names: Optional[Sequence[str]] = None) -> float:
        tp, p, t = literal_counts([self.images[n] for n in (names or self.images)], threshold, 5)
        return float(np.mean([a / b for a, b in zip(tp, t + p - tp) if b]))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


def test_cams_at_the_best_threshold(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *data.arguments("--json"))
    found, curve = json.loads(out), [data.miou(t) for t in THRESHOLDS]
    assert (status, err) == (0, "") and found["images"] == 4 and found["split"] == "val" and found["failed"] == {}
    assert np.allclose([value for _, value in found["curve"]], curve) and [t for t, _ in found["curve"]] == THRESHOLDS
    assert found["miou"] == pytest.approx(max(curve)) and found["threshold"] == THRESHOLDS[int(np.argmax(curve))]
    assert found["threshold_chosen_on_ground_truth"] is True and found["absent"] == ["unicorn"]
    assert [score["name"] for score in found["classes"]] == ["background", *CLASSES]
    tp, p, t = literal_counts(list(data.images.values()), found["threshold"], 5)
    for score, a, b, c in zip(found["classes"][:4], tp, p, t):
        assert (score["iou"], score["precision"], score["recall"]) == pytest.approx((a / (b + c - a), a / b, a / c))
        assert (score["false_positive"], score["false_negative"]) == pytest.approx(
            ((b - a) / (b + c - a), (c - a) / (b + c - a))
        )
    assert found["classes"][4]["name"] == "unicorn" and list(found["classes"][4].values())[1:] == [None] * 5

    status, text, _ = run(capsys, *data.arguments())
    lines = text.splitlines()
    assert lines[-1] == f"split val, 4 images; threshold {found['threshold']:g}: chosen on this ground truth"
    assert "absent, not in the mean: unicorn" in lines and f"mean IoU    {100 * found['miou']:6.2f}" in lines
    assert [line.split()[0] for line in lines[1:5]] == ["background", "boat", "train", "bird"]
    row = found["classes"][2]
    assert [float(value) for value in lines[3].split()[1:]] == [round(100 * value, 2) for value in list(row.values())[1:]]


def test_a_given_threshold(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *data.arguments("--threshold", 0.31, "--json"))
    found = json.loads(out)
    assert found["miou"] == pytest.approx(data.miou(0.31)) and found["threshold"] == 0.31 and len(found["curve"]) == 1
    assert found["threshold_chosen_on_ground_truth"] is False
    status, text, _ = run(capsys, *data.arguments("--threshold", 0.31, "--split", "my val"))
    assert status == 0 and text.splitlines()[-1] == "split my val, 4 images; threshold 0.31: given"


def test_the_range_of_thresholds(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *data.arguments("--thresholds", "40:50", "--json"))
    found = json.loads(out)
    assert [t for t, _ in found["curve"]] == [i / 100 for i in range(40, 50)]
    assert found["miou"] == pytest.approx(max(data.miou(i / 100) for i in range(40, 50)))
    for wrong in ("50:40", "5", "a:b", "-1:5", "0:101", "0.1:0.5", ""):
        status, out, err = run(capsys, *data.arguments(f"--thresholds={wrong}"))
        assert (status, out) == (
            2,
            "",
        ) and err == f"error: --thresholds takes two whole hundredths such as 0:60; got {wrong!r}.\n"


def test_label_pngs(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *data.arguments("--json", pred=data.labels))
    found = json.loads(out)
    assert status == 0 and found["miou"] == pytest.approx(data.miou(0.25)) and found["threshold"] is None
    assert found["curve"] == [] and found["threshold_chosen_on_ground_truth"] is False
    total = sum(confusion_matrix(data.label_map(name, 0.25), gt, 5) for name, (_, gt) in data.images.items())
    assert found["miou"] == mean_iou(total)
    _, text, _ = run(capsys, *data.arguments(pred=data.labels))
    assert text.splitlines()[-1] == "split val, 4 images; threshold: label maps, no threshold"


def test_refined_folders_are_evaluated_as_they_are(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    images = data.root / "images"
    images.mkdir()
    for name, (_, gt) in data.images.items():
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*gt.shape, 3), dtype=np.uint8)).save(images / f"{name}.png")
    out = data.root / "out"
    run(capsys, "refine", "--images", images, "--cams", data.cams, "--out", out, "--classes", data.classes, "--quiet",
        "--threshold", 0.3)  # fmt: skip
    _, labels, _ = run(capsys, *data.arguments("--json", pred=out / "labels"))
    _, cams, _ = run(capsys, *data.arguments("--json", "--threshold", 0.3, pred=out / "cams"))
    assert json.loads(labels)["miou"] == pytest.approx(json.loads(cams)["miou"], abs=1e-12)


def test_csv(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *data.arguments("--csv", data.root / "table.csv", "--json"))
    with (data.root / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["class", "iou", "precision", "recall", "false_positive", "false_negative"]
    for row, score in zip(rows, json.loads(out)["classes"]):
        assert row.pop("class") == score.pop("name")
        assert {key: None if text == "" else float(text) for key, text in row.items()} == score
    assert [row["iou"] for row in rows][4] == ""


@pytest.mark.parametrize("form", ["{}", "{}.jpg", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png", "  {}\t\n", "{} 1"])
@pytest.mark.parametrize("pred", ["cams", "labels"])
def test_lists(form: str, pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = list(data.images)[1:3]
    path = data.root / "train_aug.txt"
    path.write_text("".join(form.format(name) + "\n" for name in [*chosen, chosen[0]]))
    status, out, _ = run(capsys, *data.arguments("--list", path, "--json", "--threshold", 0.25, pred=data.root / pred))
    found = json.loads(out)
    assert status == 0 and found["images"] == 2 and found["split"] == "train_aug"
    assert found["miou"] == pytest.approx(data.miou(0.25, chosen))


@pytest.mark.parametrize("pred", ["cams", "labels"])
@pytest.mark.parametrize("name", ["../secret", "../../data/secret", "sub/secret"])
def test_ids_with_folders_are_refused(name: str, pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    first = next(iter(data.images))
    for folder in (data.root, data.gt / "sub", data.labels / "sub", data.cams / "sub"):
        folder.mkdir(exist_ok=True)
        Image.fromarray(data.images[first][1]).save(folder / "secret.png")
        np.save(folder / "secret.npy", data.images[first][0])  # type: ignore[arg-type]
    (data.root / "list.txt").write_text(f"{first}\n{name}\n")
    status, out, err = run(capsys, *data.arguments("--list", data.root / "list.txt", "--json", pred=data.root / pred))
    found = json.loads(out)
    assert status == 1 and found["images"] == 1 and list(found["failed"]) == [name] and len(err.splitlines()) == 1


def spoil(data: Data, name: str, how: str) -> str:
    """Damage one image's files; what the line about it says."""
    gt, cam, label = data.gt / f"{name}.png", data.cams / f"{name}.npy", data.labels / f"{name}.png"
    shape = data.images[name][1].shape
    if how == "no ground truth":
        gt.unlink()
        return f"there is no {gt}"
    if how == "damaged ground truth":
        gt.write_bytes(b"no picture")
        return f"{gt} is no readable PNG"
    if how == "half a ground truth":
        gt.write_bytes(gt.read_bytes()[:60])
        return f"{gt} is no readable PNG"
    if how == "ground truth in colours":
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(gt)
        return f"must be a palette or grey PNG of labels; got an image of shape ({shape[0]}, {shape[1]}, 3)"
    if how == "label out of range":
        Image.fromarray(np.full(shape, 5, np.uint8)).save(gt)
        return "`target` must hold labels from 0 to 4; got 5 to 5"
    if how == "other size":
        Image.fromarray(np.zeros((3, 3), np.uint8)).save(gt)
        return "(3, 3)"
    cam.write_bytes(b"no CAM")
    label.write_bytes(b"no label")
    return "no readable"


KINDS = ["no ground truth", "damaged ground truth", "half a ground truth", "ground truth in colours", "label out of range",
         "other size", "damaged prediction"]  # fmt: skip


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("pred", ["cams", "labels"])
def test_an_image_that_cannot_be_counted(how: str, pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(data.images)
    reason = spoil(data, names[1], how)
    status, out, err = run(capsys, *data.arguments("--json", "--threshold", 0.25, pred=data.root / pred))
    found = json.loads(out)
    assert status == 1 and len(err.splitlines()) == 1 and err.startswith(f"failed: {names[1]}: ") and reason in err
    assert found["images"] == 3 and list(found["failed"]) == [names[1]]
    assert found["miou"] == pytest.approx(data.miou(0.25, [names[0], *names[2:]]))
    _, text, _ = run(capsys, *data.arguments(pred=data.root / pred))
    assert text.splitlines()[-1] == "1 images were not counted" and ", 3 images; " in text.splitlines()[-2]


@pytest.mark.parametrize("pred", ["cams", "labels"])
def test_a_listed_image_without_prediction(pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (data.root / "list.txt").write_text("\n".join([*data.images, "2011_000001"]))
    status, _, err = run(capsys, *data.arguments("--list", data.root / "list.txt", pred=data.root / pred))
    assert status == 1 and err.startswith("failed: 2011_000001: there is no ") and len(err.splitlines()) == 1


def test_nothing_can_be_counted(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    for path in data.gt.iterdir():
        path.unlink()
    status, out, err = run(capsys, *data.arguments())
    assert (status, out) == (2, "") and err.startswith("error: None of the 4 images could be counted: there is no ")
    assert err.endswith("Are --pred and --gt swapped, or of different images?\n") and err.count("\n") == 1
    (data.root / "empty.txt").write_text("\n")
    (data.root / "none").mkdir()
    for arguments in (data.arguments("--list", data.root / "empty.txt"), data.arguments(pred=data.root / "none")):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "") and err.startswith("error: There is nothing to evaluate: ") and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- the command line


def commands() -> Dict[str, argparse.ArgumentParser]:
    """Words of each command -> its parser."""
    found: Dict[str, argparse.ArgumentParser] = {}

    def walk(words: str, parser: argparse.ArgumentParser) -> None:
        found[words] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, part in action.choices.items():
                    walk(f"{words} {name}".strip(), part)

    walk("", cli.build_parser())
    return found


@pytest.mark.parametrize(
    "command, words",
    [
        ("", ["refine", "evaluate", "report", "prompts", "clusters", "Exit status", "semples refine --images",
              "pseudo labels"]),
        ("refine", ["--images", "--cams", "--out", "--labels", "cls_labels.npy", "COCO", "VOC XML", "--classes", "--suppress",
                    "--optimize", "MCTformer", "IRN", "1 + class index", "torchrun", "interrupted", "0.4"]),
        ("evaluate", ["--pred", "--gt", "--list", "255", "--threshold", "chosen on ground truth", "--csv", "--json", "0:100"]),
        ("report", ["--before", "--after", "--gt", "--out", "--prompts", "--rows", "--images", "ground-truth"]),
        ("prompts", ["show"]),
        ("prompts show", ["FILE", "--clip", "--vocabulary", "--top", "--json", "nearest words"]),
    ],
)  # fmt: skip
def test_help(command: str, words: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *command.split(), "--help")
    assert (status, err) == (0, "")
    flat = " ".join(out.split())
    for word in words:
        assert word in flat
    assert out.startswith(f"usage: semples {command}".rstrip())


def test_every_option_is_explained() -> None:
    found = commands()
    assert set(found) == {"", "refine", "evaluate", "report", "prompts", "prompts show", "clusters"}
    bare = [
        f"{words} {'/'.join(action.option_strings) or action.dest}"
        for words, parser in found.items()
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert bare == []


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the following arguments are required: COMMAND"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["refine"], "the following arguments are required: --images, --cams, --out"),
        (["refine", "--images", "a", "--cams", "b", "--out", "c", "--threshold", "much"], "invalid float value: 'much'"),
        (["refine", "--images", "a", "--cams", "b", "--out", "c", "--align", "crf"], "invalid choice: 'crf'"),
        (["refine", "--images", "a", "--cams", "b", "--out", "c", "--bogus"], "unrecognized arguments: --bogus"),
        (["evaluate", "--pred", "a"], "the following arguments are required: --gt"),
        (["report"], "the following arguments are required: --images, --before, --after, --gt, --out"),
        (["prompts"], "the following arguments are required: ACTION"),
        (["prompts", "show"], "the following arguments are required: FILE"),
    ],
)
def test_usage_errors(arguments: List[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("usage: semples") and reason in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["refine", "--cams", "DATA/none"], "there is no folder"),
        (["refine", "--cams", "DATA/val"], "holds no .npy or .npz file"),
        (["refine", "--batch-size", "0"], "--batch-size and --max-pixels at least 1"),
        (["refine", "--max-pixels", "0"], "--batch-size and --max-pixels at least 1"),
        (["refine", "--threshold", "nan"], "threshold"),
        (["refine", "--labels", "DATA/none.npy"], "No label file at"),
        (["refine", "--labels", "DATA/classes.txt"], "Labels are read from"),
        (["refine", "--classes", "pascal"], "class names must be voc, coco or a readable file; got 'pascal'"),
        (["refine", "--classes", "DATA/val"], "class names must be voc, coco or a readable file"),
        (["refine", "--classes", "DATA/latin1.txt"], "class names must be voc, coco or a readable file"),
        (["refine", "--classes", "DATA/empty.txt"], "class"),
        (["refine", "--classes", "DATA/twice.txt"], "twice"),
        (["refine", "--classes", "DATA/broken.json"], "is not readable JSON"),
        (["refine", "--classes", "DATA/deep.json"], "is not readable JSON"),
        (["refine", "--classes", "DATA/number.json"], "must hold a list of names, or a mapping"),
        (["refine", "--classes", "DATA/numbers.json"], "name"),
        (["evaluate", "--classes", "DATA/numbers.json"], "name"),
        (["evaluate", "--classes", "DATA/empty.txt"], "class"),
        (["evaluate", "--pred", "DATA/none"], "--pred and --gt must be folders"),
        (["evaluate", "--gt", "DATA/classes.txt"], "--pred and --gt must be folders"),
        (["evaluate", "--list", "DATA/none.txt"], "none.txt"),
        (["evaluate", "--list", "DATA/latin1.txt"], ""),
        (["evaluate", "--csv", "DATA/none/table.csv"], "table.csv"),
        (["prompts", "show", "DATA/none"], "No prompt file at"),
        (["prompts", "show", "DATA"], "No prompt file at"),
        (["prompts", "show", "DATA/classes.txt"], "is damaged or no safetensors file"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: List[str], reason: str, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.root / "images").mkdir()
    for name, content in {
        "empty.txt": "\n \n", "twice.txt": "twice\nboat\ntwice\n", "broken.json": "[1,", "number.json": "7",
        "numbers.json": "[1, 2, 3, 4]", "deep.json": "[" * 100_000,
    }.items():  # fmt: skip
        (data.root / name).write_text(content)
    (data.root / "latin1.txt").write_bytes("Möwe".encode("latin1"))
    arguments = [item.replace("DATA", str(data.root)) for item in arguments]
    usual: Dict[str, List[Tuple[str, Path]]] = {
        "refine": [("--images", data.root / "images"), ("--cams", data.cams), ("--out", data.root / "out")],
        "evaluate": [("--pred", data.cams), ("--gt", data.gt)],
        "prompts": [],
    }
    for option, value in [*usual[arguments[0]], *([("--classes", data.classes)] if arguments[0] != "prompts" else [])]:
        if option not in arguments:
            arguments += [option, str(value)]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and reason in err and err.count("\n") == 1


def test_class_lists(tmp_path: Path) -> None:
    assert read_class_names("voc") == VOC_CLASSES and read_class_names("coco") == COCO_CLASSES
    (tmp_path / "a.txt").write_text(" boat \n\nsea  gull\r\n", encoding="utf-8")
    assert read_class_names(str(tmp_path / "a.txt")) == ["boat", "sea  gull"]
    (tmp_path / "a.json").write_text('["boat", "train"]')
    (tmp_path / "b.json").write_text('{"boat": "ship", "train": "train"}')
    assert read_class_names(str(tmp_path / "a.json")) == ["boat", "train"]
    assert read_class_names(str(tmp_path / "b.json")) == {"boat": "ship", "train": "train"}


def test_assignments() -> None:
    given = ["a=1", "b=0.5", "c=None", "d=log1m", "e=['x', 'y']", "f=a=b", "g="]
    assert parse_assignments("--set", given) == {
        "a": 1, "b": 0.5, "c": None, "d": "log1m", "e": ["x", "y"], "f": "a=b", "g": "",
    }  # fmt: skip
    for wrong in ("a", "=1", "a b=1", "1a=2"):
        with pytest.raises(ValueError, match="--set takes NAME=VALUE; got"):
            parse_assignments("--set", [wrong])


# ---------------------------------------------------------------------------------------------------- semples prompts show


@pytest.fixture
def prompt_file(tmp_path: Path, make_refiner: Callable[..., Any]) -> Path:
    make_refiner({"boat": "ship", "train": "train", "bird": "bird"}, learned=True).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.fixture(scope="module")
def clip_file(aligned_clip: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(aligned_clip.state_dict(), path)
    return path


def test_prompts_show_without_clip(prompt_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "prompts", "show", prompt_file)
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].startswith(f"{prompt_file}: 3 prompts of 4 vectors, CLIP ")
    assert lines[1:] == [
        "classes: boat, train, bird",
        "layout: 'a photo of {} .', class text: 'a photo of a {}.'",
        "Give --clip to see the nearest words.",
    ]
    status, out, _ = run(capsys, "prompts", "show", prompt_file, "--json")
    shown = json.loads(out)
    assert status == 0 and shown["classes"] == ["boat", "train", "bird"] and shown["vectors"] == [3, 4, 64]
    assert shown["prompt_names"] == ["ship", "train", "bird"] and "nearest_words" not in shown and out.count("\n") == 1


def test_prompts_show_with_clip(
    prompt_file: Path, clip_file: Path, make_refiner: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("rail\nwater\n\n sea gull \n")
    extra = ["--clip", clip_file, "--vocabulary", tmp_path / "words.txt", "--top", "2"]
    status, out, err = run(capsys, "prompts", "show", prompt_file, *extra)
    names = {"boat": "ship", "train": "train", "bird": "bird"}
    readings = make_refiner(names).load_prompts(prompt_file).nearest_words(["rail", "water", "sea gull"], top=2)
    assert (status, err) == (0, "") and out.splitlines()[3:] == [f"  {reading}" for reading in readings]
    _, out, _ = run(capsys, "prompts", "show", prompt_file, *extra, "--json")
    nearest = json.loads(out)["nearest_words"]
    assert list(nearest) == ["boat", "train", "bird"] and all(len(entry["words"]) == 2 for entry in nearest.values())
    assert [word for word, _ in nearest["bird"]["words"]] == [word for word, _ in readings[2].words]
    assert nearest["boat"]["class_similarity"] == pytest.approx(readings[0].class_similarity, abs=1e-5)
    _, out, _ = run(capsys, "prompts", "show", prompt_file, "--clip", clip_file)
    assert len(out.splitlines()) == 6 and all(line.count(",") == 4 for line in out.splitlines()[3:])  # five words of our own


def test_prompts_show_with_another_clip(prompt_file: Path, tiny_clip: nn.Module, tmp_path: Path, capsys: Any) -> None:
    torch.save(tiny_clip.state_dict(), tmp_path / "other.pt")
    status, out, err = run(capsys, "prompts", "show", prompt_file, "--clip", tmp_path / "other.pt")
    assert (status, out) == (2, "") and "were learned with other CLIP weights" in err and err.count("\n") == 1


def test_class_lists_in_capitals() -> None:
    assert list(read_class_names("VOC")) == list(read_class_names("voc")) and len(read_class_names("COCO")) == 80
