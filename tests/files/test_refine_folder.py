from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import semples_plugin.files.refine_images as refine_images
from semples_plugin import cli
from semples_plugin.files.cams import cam_paths, read_cam_file
from semples_plugin.files.refine_folder import Options, refine_folder
from tests.files.refine_world import SIZE, World, parts, results, tensors

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("align", ["pamr", "none"])
def test_without_clip_folders_equal_refine_masks(align: str, some: World, make_refiner: Callable[..., Any]) -> None:
    assert some.refine("--align", align, "--threshold", 0.35, "--batch-size", 2) == 0
    refiner = make_refiner()
    for name in cam_paths(some.cams):
        img, cam, labels = tensors(some, [name])
        how = None if align == "none" else align
        expected = refiner.refine_masks(img, cam, labels, threshold=0.35, align=how, clip_steps=0)
        content = read_cam_file(some.out / "cams" / f"{name}.npy", 3)
        assert list(content.cams) == labels[0].nonzero()[:, 0].tolist()
        for k, value in content.cams.items():
            assert np.abs(value - expected.masks[0, k].numpy()).max() < 1e-5
        assert (some.labels(name) == expected.labels[0].numpy()).mean() > 0.999


@pytest.mark.parametrize("how", [{"suppress": True}, {"clip_steps": 3}, {"clip_steps": 2, "suppress": True}])
def test_clip_in_folders_equals_refine_masks(how: Dict[str, Any], some: World, make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner(learned=True)
    options = Options(batch_size=4, **how)
    summary = refine_folder(some.cams, some.images, some.out, 3, options, refiner=refiner, progress=False)
    assert summary.refined == 9 and not summary.failed
    names = [name for name in cam_paths(some.cams) if Image.open(some.images / f"{name}.jpg").size == (32, 24)][:4]
    expected = refiner.refine_masks(*tensors(some, names), **{"clip_steps": 0, **how}).masks
    for i, name in enumerate(names):
        for k, value in read_cam_file(some.out / "cams" / f"{name}.npy", 3).cams.items():
            assert np.abs(value - expected[i, k].numpy()).max() < 1e-5


@pytest.mark.parametrize("options", [Options(suppress=True), Options(clip_steps=1)])
def test_using_clip_needs_a_refiner(options: Options, some: World) -> None:
    with pytest.raises(ValueError, match="need a refiner"):
        refine_folder(some.cams, some.images, some.out, 3, options, progress=False)


@pytest.mark.parametrize("layout", ["dict", "irn", "array", "npz"])
def test_refined_cams_have_the_layout_of_the_input(layout: str, world: World) -> None:
    for name in "ab":
        world.add(name, keys=(0, 2), layout=layout)
    labels = world.root / "labels.json"
    labels.write_text(json.dumps({"a": ["boat", "bird"], "b": ["bird"]}))
    assert world.refine("--labels", labels) == 0
    suffix = "npz" if layout == "npz" else "npy"
    assert sorted(p.name for p in (world.out / "cams").iterdir()) == [f"a.{suffix}", f"b.{suffix}"]
    a, b = (read_cam_file(world.out / "cams" / f"{name}.{suffix}", 3) for name in "ab")
    assert a.layout == b.layout == layout and all(v.shape == SIZE for v in (*a.cams.values(), *b.cams.values()))
    if layout == "array":
        assert list(b.cams) == [0, 1, 2] and not b.cams[0].any() and not b.cams[1].any() and b.cams[2].any()
    else:
        assert list(a.cams) == [0, 2] and list(b.cams) == [2]
    assert a.low == ((6, 8) if layout == "irn" else None)
    if layout in ("dict", "irn"):
        loaded = np.load(world.out / "cams" / "a.npy", allow_pickle=True).item()
        assert list(loaded if layout == "dict" else loaded["keys"]) == [0, 2]


def test_label_pngs_have_vocs_palette_and_soft_masks_are_the_cams_in_8_bits(some: World) -> None:
    assert some.refine("--soft-masks", "--threshold", 0.3) == 0
    for name in cam_paths(some.cams):
        with Image.open(some.out / "labels" / f"{name}.png") as picture:
            assert (
                picture.mode == "P" and picture.format == "PNG" and picture.size == Image.open(some.images / f"{name}.jpg").size
            )
            palette = np.array(picture.getpalette()).reshape(-1, 3)
            label_map = np.array(picture)
        assert palette[[0, 1, 2, 15, 20]].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128]]
        assert len(palette) == 256 and palette[255].tolist() == [224, 224, 192]
        cams = read_cam_file(some.out / "cams" / f"{name}.npy", 3).cams
        with np.load(some.out / "masks" / f"{name}.npz") as archive:
            assert archive["keys"].tolist() == list(cams) and archive["masks"].dtype == np.uint8
            assert np.abs(archive["masks"] / 255 - np.stack(list(cams.values()))).max() < 0.5 / 255 + 1e-6
        scores = np.concatenate([np.full((1, *label_map.shape), 0.3, np.float32), np.stack(list(cams.values()))])
        assert np.array_equal(label_map, np.array([0, *(k + 1 for k in cams)])[scores.argmax(0)])


def test_labels_choose_the_classes(world: World) -> None:
    world.add("a", keys=(0, 1, 2))
    np.save(world.root / "cls_labels.npy", {"a": np.array([0.0, 1.0, 0.0], np.float32)})  # type: ignore[arg-type]
    assert world.refine("--labels", world.root / "cls_labels.npy") == 0
    assert list(read_cam_file(world.out / "cams" / "a.npy", 3).cams) == [1] and set(np.unique(world.labels("a"))) == {0, 2}


# ------------------------------------------------------------------------------------------- images that are out of the way


def grey(world: World) -> None:
    Image.fromarray(world.random.integers(0, 256, SIZE, dtype=np.uint8)).save(world.images / "odd.png")
    world.cam("odd")


def sixteen_bits(world: World) -> None:
    cv2.imwrite(str(world.images / "odd.png"), world.random.integers(0, 65536, (*SIZE, 3), dtype=np.uint16))
    world.cam("odd")


def transparent(world: World) -> None:
    cv2.imwrite(str(world.images / "odd.png"), world.random.integers(0, 256, (*SIZE, 4), dtype=np.uint8))
    world.cam("odd")


def palette(world: World) -> None:
    picture = Image.fromarray(world.random.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    picture.convert("P").save(world.images / "odd.png")
    world.cam("odd")


def cmyk(world: World) -> None:
    picture = Image.fromarray(world.random.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
    picture.convert("CMYK").save(world.images / "odd.jpg")
    world.cam("odd")


def one_pixel(world: World) -> None:
    world.add("odd", size=(1, 1))


def one_row(world: World) -> None:
    world.add("odd", size=(1, 300))


def rotated(world: World) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.fromarray(world.random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(world.images / "odd.jpg", exif=exif)
    world.cam("odd")


def smaller_cam(world: World) -> None:
    world.image("odd")
    world.cam("odd", size=(3, 5))


def larger_cam(world: World) -> None:
    world.image("odd")
    world.cam("odd", size=(50, 60))


def flat_cam(world: World) -> None:
    world.image("odd")
    np.save(world.cams / "odd.npy", {0: np.full(SIZE, 7.0), 2: np.zeros(SIZE)})  # type: ignore[arg-type]


def negative_cam(world: World) -> None:
    world.image("odd")
    np.save(world.cams / "odd.npy", {0: world.random.normal(-1e6, 1e5, SIZE), 2: -np.ones(SIZE)})  # type: ignore[arg-type]


def upper_case(world: World) -> None:
    world.add("odd")
    (world.images / "odd.jpg").rename(world.images / "odd.JPEG")


def odd_name(world: World) -> None:
    world.add("odd")
    for folder, suffix in ((world.images, ".jpg"), (world.cams, ".npy")):
        (folder / f"odd{suffix}").rename(folder / f"a b'ö.x{suffix}")


ODD: List[Callable[[World], None]] = [
    grey, sixteen_bits, transparent, palette, cmyk, one_pixel, one_row, rotated, smaller_cam, larger_cam, flat_cam,
    negative_cam, upper_case, odd_name,
]  # fmt: skip


@pytest.mark.parametrize("make", ODD)
def test_odd_images_are_refined(make: Callable[[World], None], world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.add("good")
    make(world)
    assert world.refine("--soft-masks") == 0
    assert capsys.readouterr().err == ""
    name = next(name for name in cam_paths(world.cams) if name != "good")
    expected = {one_pixel: (1, 1), one_row: (1, 300)}.get(make, SIZE)
    assert world.labels(name).shape == expected
    assert all(value.shape == expected for value in read_cam_file(world.out / "cams" / f"{name}.npy", 3).cams.values())


def test_an_image_without_positive_label_is_all_background(world: World) -> None:
    for name, layout in (("a", "dict"), ("b", "irn"), ("c", "array"), ("d", "npz"), ("e", "dict")):
        world.add(name, layout=layout)
    (world.root / "labels.json").write_text(json.dumps({"a": [], "b": [], "c": [], "d": [], "e": ["boat"]}))
    assert world.refine("--labels", world.root / "labels.json", "--soft-masks") == 0
    for name, path in cam_paths(world.out / "cams").items():
        cams = read_cam_file(path, 3).cams
        assert name == "e" or (not world.labels(name).any() and not any(value.any() for value in cams.values()))
    assert world.labels("e").any() and world.refine("--labels", world.root / "labels.json", "--soft-masks") == 0


# ---------------------------------------------------------------------------------------------------- bad ones among good ones


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


class Nested(Evil):
    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (pickle.dumps(Evil(self.marker)),)


def bad_cam(content: Any) -> Callable[[World], None]:
    def make(world: World) -> None:
        world.image("bad")
        given = content(world) if callable(content) else content
        path = world.cams / "bad.npy"
        path.write_bytes(given) if isinstance(given, bytes) else np.save(path, given, allow_pickle=True)  # type: ignore

    return make


def bad_npz(content: Any) -> Callable[[World], None]:
    def make(world: World) -> None:
        world.image("bad")
        path = world.cams / "bad.npz"
        path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)

    return make


def bad_image(content: Any) -> Callable[[World], None]:
    def make(world: World) -> None:
        path = world.image("bad")
        world.cam("bad")
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return make


def no_image(world: World) -> None:
    world.cam("bad")


def folder_for_an_image(world: World) -> None:
    world.cam("bad")
    (world.images / "bad.jpg").mkdir()


def folder_for_a_cam(world: World) -> None:
    world.image("bad")
    (world.cams / "bad.npy").mkdir()


def bmp(width: int, height: int) -> bytes:
    """A black BMP; OpenCV raises its own error for more than 2**20 pixels in a row."""
    data = bytes((width * 3 + 3) // 4 * 4 * height)
    sizes = np.array([40, width, height], "<i4").tobytes()
    return (
        b"BM"
        + np.array([54 + len(data), 0, 54], "<i4").tobytes()
        + sizes
        + np.array([1, 24], "<i2").tobytes()
        + bytes(24)
        + data
    )


def truncated_cam(world: World) -> bytes:
    data = world.cam("bad").read_bytes()
    return data[: len(data) // 2]


ONES = np.ones(SIZE, np.float32)
BAD: Dict[str, Tuple[Callable[[World], None], str]] = {
    "no image": (no_image, "no image bad.jpg"),
    "a folder for an image": (folder_for_an_image, "no image bad.jpg"),
    "no bytes of an image": (bad_image(b""), "not a readable image"),
    "text for an image": (bad_image(b"<html>not found</html>"), "not a readable image"),
    "header of an image only": (bad_image(lambda data: data[:300]), "not a readable image"),
    "an image that OpenCV does not take": (bad_image(bmp(2**20 + 1, 1)), ""),
    "a folder for a CAM": (folder_for_a_cam, ""),
    "no bytes of a CAM": (bad_cam(b""), "not a readable .npy file"),
    "half a CAM": (bad_cam(truncated_cam), "not a readable .npy file"),
    "NaN": (bad_cam({0: ONES * np.nan}), "finite"),
    "inf": (bad_cam({0: ONES * np.inf}), "finite"),
    "texts": (bad_cam({0: ONES.astype(str)}), "numbers"),
    "objects": (bad_cam({0: ONES.astype(object)}), "numbers"),
    "ragged": (bad_cam({0: [[1.0], [1.0, 2.0]]}), ""),
    "wrong shape": (bad_cam({0: ONES[None]}), "(H, W)"),
    "shapes differ": (bad_cam({0: ONES, 1: ONES.T}), "one shape"),
    "class out of range": (bad_cam({3: ONES}), "class index 3; with 3 classes they run from 0 to 2"),
    "negative class": (bad_cam({-1: ONES}), "class index -1"),
    "text class": (bad_cam({"boat": ONES}), "class indices as keys"),
    "superscript class": (bad_cam({"²": ONES}), "class indices as keys"),
    "all classes and no labels": (bad_cam(np.ones((3, *SIZE))), "give labels that say which are present"),
    "wrong number of classes": (bad_cam(np.ones((4, *SIZE))), "C = 3"),
    "code": (bad_cam(lambda world: {0: Evil(world.root / "marker")}), f"names {os.system.__module__}.system"),
    "code in a tensor": (bad_cam(lambda world: {0: Nested(world.root / "marker")}), ""),
    "low maps without pixels": (
        bad_cam({"keys": np.array([1]), "cam": np.zeros((1, 0, 0)), "high_res": ONES[None]}), ""
    ),
    "low maps of one dimension": (bad_cam({"keys": np.array([1]), "cam": np.zeros(1), "high_res": ONES[None]}), ""),
    "damaged npz": (bad_npz(b"PK\x03\x04"), "not a readable .npz archive"),
    "npz with objects": (bad_npz({"keys": np.array([1]), "cam": np.array([None])}), "not a readable .npz archive"),
    "npz without pixels": (bad_npz({"keys": np.array([1]), "cam": np.zeros((1, 0, 4))}), "(H, W)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_image_is_named_in_one_line_and_the_good_ones_are_refined(
    kind: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    make, reason = BAD[kind]
    for name in ("a_good", "z_good"):
        world.add(name)
    make(world)
    assert world.refine("--soft-masks") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("2 refined, 0 done before, 1 failed")
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("failed: bad: ") and reason in lines[0] and len(lines[0]) < 600
    made = {str(Path(name).with_suffix("")) for name in results(world.out)}
    assert made == {f"{part}/{name}" for part in ("cams", "labels", "masks") for name in ("a_good", "z_good")}
    assert not parts(world.out) and not (world.root / "marker").exists()
    summary = json.loads((world.out / "summary.json").read_text())
    assert summary["refined"] == 2 and list(summary["failed"]) == ["bad"]


def test_every_bad_image_is_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.add("good")
    names = ["absent", "missing_class", "no_picture", "not_an_array"]
    for name in names:
        world.add(name)
    (world.images / "no_picture.jpg").unlink()
    (world.cams / "not_an_array.npy").write_bytes(b"no")
    labels = {"good": ["boat"], "missing_class": ["train", "boat"], "no_picture": ["boat"], "not_an_array": ["boat"]}
    (world.root / "labels.json").write_text(json.dumps(labels))
    assert world.refine("--labels", world.root / "labels.json") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == names
    assert "the labels do not name this image" in lines[0]
    assert "its CAM file lacks class 1, which the labels name" in lines[1]
    assert sorted(results(world.out)) == ["cams/good.npy", "labels/good.png"]


def test_a_repaired_image_is_refined_and_the_rest_is_skipped(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    good = (some.cams / "img4.npy").read_bytes()
    some.refine(out=some.root / "whole")
    (some.cams / "img4.npy").write_bytes(good[:-100])
    assert some.refine() == 1
    (some.cams / "img4.npy").write_bytes(good)
    capsys.readouterr()
    assert some.refine() == 0
    assert capsys.readouterr().out.startswith("1 refined, 8 done before, 0 failed")
    assert results(some.out) == results(some.root / "whole")


def test_a_full_disk_ends_the_run_names_the_image_and_leaves_no_partial_file(
    some: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "img4.png":
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert some.refine() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: img4 could not be written to ") and "No space left" in line and "goes on from here" in line
    assert not any("img4" in name for name in results(some.out)) and not parts(some.out)
    assert some.refine() == 0 and len(results(some.out)) == 18


def test_two_cam_files_of_one_image_are_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.add("a")
    world.cam("a", layout="npz")
    assert world.refine() == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {world.cams} holds both .npy and .npz for a; keep one."]


# ---------------------------------------------------------------------------------------------------- the same bytes


def test_two_runs_write_the_same_bytes(some: World) -> None:
    first, second = some.root / "first", some.root / "second"
    assert some.refine("--soft-masks", out=first) == some.refine("--soft-masks", out=second) == 0
    assert len(results(first)) == 27 and results(first) == results(second)
    assert (first / "settings.json").read_bytes() == (second / "settings.json").read_bytes()
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*.np*")}
    assert some.refine("--soft-masks", out=first) == 0
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*.np*")} == before  # nothing is done again


def test_missing_results_are_written_again_with_the_same_bytes(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    some.refine("--soft-masks")
    expected = results(some.out)
    for name in ("cams/img0.npy", "labels/img3.png", "masks/img5.npz"):
        (some.out / name).unlink()
    capsys.readouterr()
    assert some.refine("--soft-masks") == 0
    assert capsys.readouterr().out.startswith("3 refined, 6 done before, 0 failed") and results(some.out) == expected


def test_a_run_interrupted_between_two_files_of_an_image_resumes(some: World, monkeypatch: pytest.MonkeyPatch) -> None:
    some.refine(out=some.root / "whole")
    write, count = refine_images.write_cam_file, [0]

    def interrupted(*args: Any) -> None:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(refine_images, "write_cam_file", interrupted)
        assert some.refine() == 130
    assert len(results(some.out)) == 7 and not parts(some.out)  # the fourth image has its label map only
    assert some.refine() == 0
    assert results(some.out) == results(some.root / "whole")


def test_a_run_killed_at_a_random_moment_resumes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(80):
        world.add(f"img{i}", size=[(60, 80), (80, 60), (61, 80)][i % 3])
    world.refine("--batch-size", 4, out=world.root / "whole")
    command = [sys.executable, "-m", "semples_plugin", *world.arguments("--batch-size", 4)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, cwd=world.root, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (world.out / "cams").is_dir() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    time.sleep(random.Random().uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in (world.out / "cams").glob("*.npy"):
        read_cam_file(path, 3)  # what is there is whole
    done = len(list((world.out / "cams").glob("*.npy")))
    capsys.readouterr()
    assert world.refine("--batch-size", 4) == 0
    assert capsys.readouterr().out.startswith(f"{80 - done} refined, {done} done before, 0 failed")
    assert results(world.out) == results(world.root / "whole")


@pytest.mark.parametrize("number", [2, 3])
def test_processes_share_the_work(
    number: int, some: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some.cam("lonely")
    assert some.refine("--batch-size", 2, out=some.root / "whole") == 1
    expected = json.loads((some.root / "whole" / "summary.json").read_text())
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", str(number))
    summaries = []
    for rank in range(number):
        monkeypatch.setenv("RANK", str(rank))
        status = some.refine("--batch-size", 2, "--json")
        summaries.append(json.loads(capsys.readouterr().out))
        assert summaries[-1] == json.loads((some.out / f"summary-{rank}-of-{number}.json").read_text())
        assert status == (1 if summaries[-1]["failed"] else 0)
    assert results(some.out) == results(some.root / "whole")
    assert sum(s["refined"] for s in summaries) == 9 and not any(s["skipped"] for s in summaries)
    assert all(s["refined"] > 0 for s in summaries)
    assert [name for s in summaries for name in s["failed"]] == list(expected["failed"]) == ["lonely"]
    assert not (some.out / "summary.json").exists()
    # another number of processes takes the same folder up
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    (some.out / "cams" / "img2.npy").unlink()
    assert some.refine("--batch-size", 2) == 1
    assert results(some.out) == results(some.root / "whole")


# ---------------------------------------------------------------------------------------------------- memory


MEMORY = """
import sys
from pathlib import Path
from semples_plugin import cli

def peak():
    status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count the parent's, from before exec
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def refine(name, *extra):
    root = Path(sys.argv[1]) / name
    assert cli.main(["refine", "--images", str(root / "images"), "--cams", str(root / "cams"), "--out", str(root / "out"),
                     "--quiet", *extra]) == 0

refine("few")
few = peak()
refine("many")
many = peak()
refine("large", "--max-pixels", "10000", "--large", "shrink")
print("MiB", few, many, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_folder_nor_with_absent_classes(tmp_path: Path) -> None:
    for name, count in (("few", 50), ("many", 300)):
        world = World(tmp_path / name)
        for i in range(count):
            world.add(f"img{i}", keys=(0, 14))
    world = World(tmp_path / "large")
    cv2.imwrite(str(world.images / "a.png"), np.zeros((4000, 6000, 3), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    world.cam("a", keys=(1,), size=(40, 60))
    world.add("b")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    few, many, large = (float(value) for value in done.stdout.splitlines()[-1].split()[1:])
    assert many - few < 40
    assert world.labels("a").shape == (4000, 6000) and world.labels("b").shape == SIZE
    assert read_cam_file(world.out / "cams" / "a.npy", 3).cams[1].shape == (4000, 6000)
    assert large - many < 1200  # one class of 20 is present: 92 MiB a map; all of them would take 1830 MiB


@pytest.mark.parametrize("layout", ["dict", "array"])
def test_nothing_is_computed_for_absent_classes(
    layout: str, world: World, make_refiner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        world.add(name, layout=layout)
    labels = {name: np.array(row) for name, row in {"a": [1, 0, 0], "b": [0, 0, 1], "c": [0, 0, 0]}.items()}
    channels, inner = [], refine_images.masks.cam_to_masks

    def counting(img: torch.Tensor, cam: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        channels.append(tuple(cam.shape[:2]))
        return inner(img, cam, *rest, **options)

    monkeypatch.setattr("semples_plugin.masks.cam_to_masks", counting)
    for out, options in (("plain", {}), ("clip", {"refiner": make_refiner()})):
        steps = Options(clip_steps=len(options))
        refine_folder(world.cams, world.images, world.root / out, 3, steps, labels=labels, progress=False, **options)
    assert channels == [(1, 1), (1, 1), (1, 0), (3, 2)]  # without CLIP each image by itself, with it the classes of the chunk
    alone = {"c": np.array([0, 0, 0])}
    refine_folder(world.cams, world.images, world.root / "none", 3, steps, labels=alone, progress=False, **options)
    assert not world.labels("c", world.root / "none").any()


def test_label_maps_have_room_for_254_classes(world: World, capsys: Any) -> None:
    world.add("a", keys=(0, 253))
    world.classes.write_text("\n".join(f"class {i}" for i in range(254)))
    assert world.refine("--threshold", "0.3:0.6") == 0
    assert set(np.unique(world.labels("a"))) == {0, 1, 254, 255}
    evaluate = ["evaluate", "--gt", str(world.out / "labels"), "--classes", str(world.classes), "--pred"]
    assert cli.main([*evaluate, str(world.out / "labels")]) == 0 and "100.00" in capsys.readouterr().out
    world.classes.write_text("\n".join(f"class {i}" for i in range(255)))
    assert world.refine(out=world.root / "more") == 2 and not (world.root / "more").exists()
    assert cli.main([*evaluate, str(world.out / "labels")]) == cli.main([*evaluate, str(world.out / "cams")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("Label maps hold at most 254 classes" in line for line in lines)


def test_two_thresholds_and_their_evaluation(world: World, capsys: Any) -> None:
    for name in ("a", "b"):
        world.add(name)
    assert world.refine("--threshold", "0.3") == 0 and world.refine("--threshold", "0.3:0.6", out=world.root / "two") == 0
    assert "background threshold 0.3 to 0.6, 255 between" in capsys.readouterr().out
    one, two = world.labels("a"), world.labels("a", world.root / "two")
    assert set(np.unique(two)) <= {0, 1, 3, 255} and (two == 255).any()
    assert ((two == one) | (two == 255)).all() and (one[two == 255] > 0).all()
    gt = world.root / "gt"
    gt.mkdir()
    for name in ("a", "b"):
        (gt / f"{name}.png").write_bytes((world.out / "labels" / f"{name}.png").read_bytes())
    arguments = ["evaluate", "--pred", str(world.root / "two" / "labels"), "--gt", str(gt), "--classes", str(world.classes)]
    assert cli.main(arguments) == 0
    of_labels = capsys.readouterr().out
    arguments[2] = str(world.root / "two" / "cams")
    assert cli.main([*arguments, "--threshold", "0.3:0.6"]) == 0
    of_cams = capsys.readouterr().out
    assert of_cams.replace("threshold 0.3 to 0.6, 255 between: given", "threshold: label maps, no threshold") == of_labels
    share = np.mean([(world.labels(name, world.root / "two") == 255).mean() for name in ("a", "b")])
    assert f"{100 * share:.2f} % of the labelled pixels are uncertain (255) and not counted" in of_labels
    assert "100.00" in of_labels
    assert world.refine("--threshold", "0.6:0.3", out=world.root / "wrong") == 2
    assert "`--threshold` must be a number from 0 to 1, or two of them, low and high" in capsys.readouterr().err
