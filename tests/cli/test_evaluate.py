from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from semples_plugin.metrics import confusion_matrix, mean_iou
from tests.cli.running import CLASSES, Data, run
from tests.voc_metric import THRESHOLDS, literal_counts


def test_cams_are_evaluated_at_the_best_threshold(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_given_threshold_is_used(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *data.arguments("--threshold", 0.31, "--json"))
    found = json.loads(out)
    assert found["miou"] == pytest.approx(data.miou(0.31)) and found["threshold"] == 0.31 and len(found["curve"]) == 1
    assert found["threshold_chosen_on_ground_truth"] is False
    status, text, _ = run(capsys, *data.arguments("--threshold", 0.31, "--split", "my val"))
    assert status == 0 and text.splitlines()[-1] == "split my val, 4 images; threshold 0.31: given"


def test_pixels_between_two_thresholds_are_not_counted(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    total, left, known = np.zeros((5, 5), int), 0, 0
    for name, (cams, gt) in data.images.items():
        best = np.max([np.zeros(gt.shape, np.float32), *cams.values()], axis=0)
        between = (best > np.float32(0.25)) & (best <= np.float32(0.5))
        left, known = left + (between & (gt != 255)).sum(), known + (gt != 255).sum()
        total += confusion_matrix(data.label_map(name, 0.5), np.where(between, 255, gt), 5)
        Image.fromarray(np.where(between, 255, data.label_map(name, 0.25)).astype(np.uint8)).save(data.labels / f"{name}.png")
    _, out, _ = run(capsys, *data.arguments("--threshold", "0.25:0.5", "--json"))
    found = json.loads(out)
    assert left and found["miou"] == mean_iou(total) and found["uncertain"] == pytest.approx(left / known)
    assert found["threshold"] == [0.25, 0.5] and found["threshold_chosen_on_ground_truth"] is False
    _, out, _ = run(capsys, *data.arguments("--json", pred=data.labels))
    pngs = json.loads(out)
    assert pngs["classes"] == found["classes"] and pngs["uncertain"] == pytest.approx(found["uncertain"])
    status, text, _ = run(capsys, *data.arguments("--threshold", "0.25:0.5"))
    assert status == 0 and text.splitlines()[-2:] == [
        "split val, 4 images; threshold 0.25 to 0.5, 255 between: given",
        f"{100 * left / known:.2f} % of the labelled pixels are uncertain (255) and not counted",
    ]
    _, same, _ = run(capsys, *data.arguments("--threshold", "0.3:0.3", "--json"))
    assert same == run(capsys, *data.arguments("--threshold", "0.3", "--json"))[1]


@pytest.mark.parametrize(
    "value, reason",
    [
        ("0.5:0.3", "`--threshold` must be a number from 0 to 1, or two of them, low and high"),
        ("1.5", "`--threshold` must be from 0 to 1"),
        ("auto", "--threshold auto is for semples refine"),
        ("much", "must be a number, two such as 0.3:0.5"),
    ],
)
def test_a_wrong_threshold_is_refused(value: str, reason: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *data.arguments("--threshold", value))
    assert (status, out) == (2, "") and reason in err


def test_the_range_of_thresholds_is_tried(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_label_pngs_are_evaluated_without_threshold(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_csv_holds_the_table(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_lists_choose_the_images(form: str, pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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
        return f"{gt} is not a readable PNG"
    if how == "half a ground truth":
        gt.write_bytes(gt.read_bytes()[:60])
        return f"{gt} is not a readable PNG"
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
    return "not a readable"


KINDS = ["no ground truth", "damaged ground truth", "half a ground truth", "ground truth in colours", "label out of range",
         "other size", "damaged prediction"]  # fmt: skip


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("pred", ["cams", "labels"])
def test_an_image_that_cannot_be_counted_is_named(how: str, pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_a_listed_image_without_prediction_is_named(pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (data.root / "list.txt").write_text("\n".join([*data.images, "2011_000001"]))
    status, _, err = run(capsys, *data.arguments("--list", data.root / "list.txt", pred=data.root / pred))
    assert status == 1 and err.startswith("failed: 2011_000001: there is no ") and len(err.splitlines()) == 1


def test_nothing_to_count_is_an_error(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize("pred", ["cams", "labels"])
def test_a_class_list_may_name_background_first(pred: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = data.arguments(pred=getattr(data, pred))
    plain = run(capsys, *arguments)
    data.classes.write_text("background\n" + data.classes.read_text())
    assert run(capsys, *arguments) == plain and plain[0] == 0
    data.classes.write_text("boat\nbackground\ntrain\n")
    status, _, error = run(capsys, *arguments)
    assert status == 2 and "names background at place 2. It is no class" in error
