"""The chain on VOC: its mechanics with small steps, what it finds missing, its segmentation network, its page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from examples.controls import AreaOnly
from examples.voc import __main__ as command
from examples.voc import area, coco_masks, crf, data_check, ledger, segmentation
from examples.voc.chain import Chain, ChainError, Command, Digests, Step, read_json
from examples.voc.commands import make_steps
from examples.voc.datasets import Coco, Voc
from examples.voc.segmentation import Batches, Training
from examples.voc.settings import Settings

# ---------------------------------------------------------------------------------------------------- the chain


def write_step(out: Path, name: str, text: str, needs: Sequence[Path] = (), **options: Any) -> Step:
    """A step whose process writes a text and what its inputs hold."""
    code = "import sys; print(sys.argv[1] + ''.join(open(path).read() for path in sys.argv[2:]), end='')"
    words = [sys.executable, "-S", "-c", code, text, *map(str, needs)]
    target = out / f"{name}.txt"
    return Step(name, f"write {text}", [target], needs, groups=[[Command(words, stdout=target)]], **options)


def two_steps(out: Path, first: str = "a", second: str = "b") -> List[Step]:
    return [write_step(out, "one", first), write_step(out, "two", second, [out / "one.txt"])]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path, lambda line: None)


def test_steps_that_are_done_are_skipped(chain: Chain) -> None:
    assert chain.run(two_steps(chain.out)) == ["one", "two"]
    assert (chain.out / "two.txt").read_text() == "ba"
    assert chain.run(two_steps(chain.out)) == []
    assert Chain(chain.out, lambda line: None).run(two_steps(chain.out)) == []


def test_a_record_says_what_ran(chain: Chain) -> None:
    chain.run(two_steps(chain.out))
    record = read_json(chain.out / "steps" / "two.json")
    assert record is not None
    assert record["commands"] == two_steps(chain.out)[1].commands
    assert record["started"] <= record["finished"] and record["seconds"] >= 0
    assert record["versions"]["torch"] == torch.__version__
    assert list(record["outputs"]) == ["two.txt"]


def test_a_step_runs_again_when_its_inputs_change(chain: Chain) -> None:
    chain.run(two_steps(chain.out))
    assert chain.run(two_steps(chain.out, second="c")) == ["two"]
    assert chain.run(two_steps(chain.out, first="d", second="c")) == ["one", "two"]
    assert (chain.out / "two.txt").read_text() == "cd"


def test_steps_after_one_that_gave_the_same_are_skipped(chain: Chain) -> None:
    first, second = two_steps(chain.out)
    chain.run([first, second])
    assert chain.run([first._replace(facts={"new": 1}), second]) == ["one"]


def test_a_step_runs_again_when_its_files_change(chain: Chain) -> None:
    chain.run(two_steps(chain.out))
    (chain.out / "two.txt").write_text("other")
    assert chain.run(two_steps(chain.out)) == ["two"]
    (chain.out / "one.txt").unlink()
    assert chain.run(two_steps(chain.out)) == ["one"]


def test_a_step_that_fails_says_where_its_log_is_and_has_no_record(chain: Chain) -> None:
    words = [sys.executable, "-S", "-c", "import sys; print('half'); sys.exit('no luck')"]
    step = Step("bad", "fail", [chain.out / "bad.txt"], groups=[[Command(words, stdout=chain.out / "bad.txt")]])
    with pytest.raises(ChainError, match="(?s)no luck.*bad ended with status 1.*bad.log.*The same command goes on from here"):
        chain.run([step])
    assert chain.record(step) is None
    assert not (chain.out / "bad.txt").exists()
    with pytest.raises(ChainError, match="did not make"):
        chain.run([Step("idle", "nothing", [chain.out / "idle.txt"])])
    with pytest.raises(ChainError, match="idle needs .*absent, which no step before it made"):
        chain.run([Step("idle", "nothing", [], [chain.out / "absent"])])


def test_commands_of_a_group_run_side_by_side_and_end_together(chain: Chain) -> None:
    wait = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\nwhile not pathlib.Path(sys.argv[2]).exists():"
    wait += " time.sleep(.01)"
    paths = [str(chain.out / name) for name in "ab"]
    group = [Command([sys.executable, "-S", "-c", wait, *order]) for order in (paths, paths[::-1])]  # each waits for the other
    chain.run([Step("both", "wait", [Path(path) for path in paths], groups=[group])])
    sleep = Command([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    fail = Command([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    begin = time.monotonic()
    with pytest.raises(ChainError, match="status"):
        chain.run([Step("one fails", "fail", [], groups=[[sleep, fail]])])
    assert time.monotonic() - begin < 30


def slow_steps(out: Path) -> List[Step]:
    """Two steps whose processes write files 0 to 3 one by one; the second goes on where it was broken off."""
    code = (
        "import pathlib, sys, time\nfor i in range(4):\n path = pathlib.Path(sys.argv[1]) / str(i)\n"
        " path.parent.mkdir(exist_ok=True)\n if not path.exists():\n  time.sleep(.1)\n  path.write_text(str(i))"
    )
    return [
        Step(name, name, [out / name], groups=[[Command([sys.executable, "-S", "-c", code, str(out / name)])]], resumes=resumes)
        for name, resumes in (("again", False), ("goes-on", True))
    ]


def start_slow(out: Path) -> int:
    """The chain of `slow_steps` in a process that leads a group of its own."""
    process = os.fork()
    if process == 0:
        os.setsid()
        try:
            Chain(out, lambda line: None).run(slow_steps(out))
        finally:
            os._exit(0)
    return process


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_run_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    out, lines = tmp_path / "out", []
    for file in ("again/1", "goes-on/1"):
        process = start_slow(out)
        wait_for(out / file)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        wait_for_the_lock(out)
    kept = (out / "goes-on" / "0").stat().st_mtime_ns
    assert Chain(out, lines.append).run(slow_steps(out)) == ["goes-on"]
    assert lines == ["[1/2] again: done before, skipped", "[2/2] goes-on: goes-on (goes on)"]
    assert (out / "goes-on" / "0").stat().st_mtime_ns == kept
    for name in ("again", "goes-on"):
        assert {path.name: path.read_text() for path in (out / name).iterdir()} == {str(i): str(i) for i in range(4)}
    assert {path.name for path in (out / "steps").iterdir()} == {"again.json", "goes-on.json", "digests.json"}


def test_a_process_that_outlives_its_chain_keeps_others_out(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start_slow(out)
    wait_for(out / "again" / "0")
    os.kill(process, signal.SIGKILL)  # its child lives
    os.waitpid(process, 0)
    with pytest.raises(ChainError, match="Another process works in"):
        Chain(out, lambda line: None).run([])
    wait_for_the_lock(out)


def wait_for_the_lock(out: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(ChainError):
            Chain(out, lambda line: None).run([])
            return
        time.sleep(0.02)
    raise AssertionError("the lock is still held")


def test_digests_read_again_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = Digests(tmp_path / "known.json").of(folder)
    monkeypatch.setattr("examples.voc.chain.sha256", lambda path: pytest.fail("read again"))
    assert Digests(tmp_path / "known.json").of(folder) == first
    monkeypatch.undo()
    (folder / ".b.1.part").write_text("left by a kill")
    assert Digests(tmp_path / "known.json").of(folder) == first
    (folder / "b").write_text("2")
    assert Digests(tmp_path / "known.json").of(folder) != first


# ---------------------------------------------------------------------------------------------------- a small VOC


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `VOC2012` (5 training photos of blocks, 2 of evaluation) and `host`, with lists and labels of a host."""
    root = tmp_path_factory.mktemp("world")
    voc, repo, rng = root / "VOC2012", root / "host", np.random.default_rng(0)
    sets = voc / "ImageSets" / "Segmentation"
    for folder in (voc / "JPEGImages", voc / "SegmentationClass", sets, repo / "voc12"):
        folder.mkdir(parents=True)
    ids = [f"2007_00000{i}" for i in range(7)]
    labels = {}
    for i, name in enumerate(ids):
        mask = np.zeros((40 + 2 * i, 56), np.uint8)
        mask[8:28, 10:40] = 1 + i % 3
        mask[:2] = 255
        photo = np.repeat(mask[..., None] % 255 * 60, 3, 2) + rng.integers(0, 40, (*mask.shape, 3)).astype(np.uint8)
        Image.fromarray(photo).save(voc / "JPEGImages" / f"{name}.jpg")
        Image.fromarray(mask).save(voc / "SegmentationClass" / f"{name}.png")
        labels[name] = np.eye(20, dtype=np.float32)[i % 3]
    np.save(repo / "voc12" / "cls_labels.npy", np.array(labels, dtype=object), allow_pickle=True)
    data_check.write_ids(sets / "train.txt", ids[:3])
    data_check.write_ids(sets / "val.txt", ids[5:])
    data_check.write_ids(repo / "voc12" / "train_aug_id.txt", ids[:5])
    (repo / "main.py").touch()
    return root


def found(world: Path, **changed: Any) -> List[str]:
    """What the check says is missing."""
    data = Voc(world / "VOC2012", world / "host")
    values: Dict[str, Any] = {"data": data, "clip": None, "needed_bytes": 0, **changed}
    lists = values["data"].lists()
    values["python"], values["gpu"], values["out"] = changed.get("python", "/no/python"), False, world / "out" / "run"
    return [str(one) for one in data_check.check(lists=lists, **values)]


def test_the_check_lists_all_that_is_missing_and_where_it_comes_from(world: Path, tmp_path: Path) -> None:
    assert len(found(world)) == 1 and "a Python with torch at /no/python" in found(world)[0]
    nothing = "\n".join(found(world, data=Voc(tmp_path / "no", tmp_path / "no")))
    for part in ("JPEGImages", "SegmentationClass", "train.txt", "val.txt", "trainaug.txt", "cls_labels.npy", "main.py"):
        assert part in nothing
    assert "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar" in nothing
    assert "git clone https://github.com/xulianuwa/MCTformer" in nothing
    assert "SBD" in nothing
    assert any("CLIP no.pt" in one for one in found(world, clip="no.pt"))
    assert not any("CLIP" in one for name in ("ViT-B/32", "hf:openai/clip-vit-base-patch32") for one in found(world, clip=name))
    assert any("disk space: about" in one for one in found(world, needed_bytes=10**18))


def test_the_check_names_single_files_and_labels(world: Path, tmp_path: Path) -> None:
    voc = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass"):
        (voc / folder).mkdir(parents=True)
        for path in sorted((world / "VOC2012" / folder).iterdir())[1:]:
            (voc / folder / path.name).symlink_to(path)
    (voc / "ImageSets").symlink_to(world / "VOC2012" / "ImageSets")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"2007_000000": ["cat"]}))
    said = "\n".join(found(world, data=Voc(voc, world / "host", labels)))
    assert f"1 files in {voc / 'JPEGImages'}: 2007_000000" in said
    assert f"1 files in {voc / 'SegmentationClass'}: 2007_000000" in said
    assert f"labels of 6 images in {labels}: 2007_000001, 2007_000002, 2007_000003, ..." in said


def test_the_check_tries_what_the_host_imports(world: Path) -> None:
    stand_in = world / "python"
    stand_in.write_text('#!/bin/sh\necho \'[{"timm": "ModuleNotFoundError: No module named timm"}, false]\'\n')
    stand_in.chmod(0o755)
    assert ["import of timm: ModuleNotFoundError" in one for one in found(world, python=str(stand_in))] == [True]


def test_lists_are_those_of_the_data_set_then_of_the_host(world: Path, tmp_path: Path) -> None:
    voc = Voc(world / "VOC2012", world / "host")
    lists = voc.lists()
    assert [len(ids) for ids in lists] == [5, 3, 2]
    assert [len(ids) for ids in voc.lists(4)] == [4, 3, 2]
    data_check.write_lists(tmp_path, voc, lists)
    rows = np.load(tmp_path / "cls_labels.npy", allow_pickle=True).item()
    assert set(rows) == {*lists.train_aug, *lists.val} and rows["2007_000001"].tolist() == np.eye(20)[1].tolist()
    assert (tmp_path / "train" / "train_aug_id.txt").read_text().split() == lists.train
    assert read_json(tmp_path / "images.json")["pairs"] == 7  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------- a small COCO

CATEGORIES = {1: "person", 18: "dog", 90: "toothbrush"}  # id -> name; columns 0, 16 and 79


def square(number: int, image: int, category: int, left: int, side: int, **more: Any) -> Dict[str, Any]:
    """An annotation whose mask is a square at the top."""
    corners = [left, 0, left + side, 0, left + side, side, left, side]
    one = {"id": number, "image_id": image, "category_id": category, "area": side * side, "iscrowd": 0}
    return {**one, "segmentation": [corners], **more}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `MSCOCO` (3 photos of train, 2 of val, their annotations) and `host`, with its lists."""
    root = tmp_path_factory.mktemp("coco")
    rng = np.random.default_rng(0)
    (root / "MSCOCO" / "annotations").mkdir(parents=True)
    (root / "host" / "coco").mkdir(parents=True)
    (root / "host" / "main.py").touch()
    for split, numbers in (("train", (9, 25, 30)), ("val", (42, 73))):
        ids = [f"COCO_{split}2014_{number:012d}" for number in numbers]
        (root / "MSCOCO" / f"{split}2014").mkdir()
        for name in ids:
            photo = rng.integers(0, 255, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(photo).save(root / "MSCOCO" / f"{split}2014" / f"{name}.jpg")
        data_check.write_ids(root / "host" / "coco" / f"{split}_id.txt", ids)
        crowd = {"counts": [0, 20, 580], "size": [20, 30]}  # the first column
        content = {
            "images": [{"id": n, "file_name": f"{name}.jpg", "height": 20, "width": 30} for n, name in zip(numbers, ids)],
            "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
            "annotations": [
                square(1, numbers[0], 90, 4, 4),
                square(2, numbers[0], 18, 0, 12),
                square(3, numbers[0], 1, 0, 0, segmentation=crowd, area=20, iscrowd=1),
                square(4, numbers[1], 18, 20, 8),
            ],
        }
        (root / "MSCOCO" / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content))
    return root


def test_masks_of_coco_have_small_things_on_top(coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    file, ids = coco / "MSCOCO" / "annotations" / "instances_train2014.json", coco / "host" / "coco" / "train_id.txt"
    arguments = ["--annotations", str(file), "--list", str(ids), "--out", str(tmp_path / "masks")]
    coco_masks.main(arguments)
    expected = np.zeros((20, 30), np.uint8)
    expected[:12, :12], expected[:, 0], expected[:4, 4:8] = 17, 1, 80
    paths = sorted((tmp_path / "masks").iterdir())
    assert [path.stem for path in paths] == ids.read_text().split()
    masks = [np.asarray(Image.open(path)) for path in paths]
    assert (masks[0] == expected).all() and (masks[1] == 17).sum() == 64 and not masks[2].any()
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    coco_masks.main(arguments)  # goes on
    assert paths[0].stat().st_mtime_ns == before and paths[1].exists()
    data_check.write_ids(tmp_path / "ids.txt", ["COCO_train2014_000000000001"])
    with pytest.raises(SystemExit, match="has no image COCO_train2014_000000000001"):
        coco_masks.main([*arguments[:3], str(tmp_path / "ids.txt"), *arguments[4:]])


def test_the_chain_on_coco(coco: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    data = Coco(coco / "MSCOCO", coco / "host")
    lists = data.lists()
    assert [len(ids) for ids in lists] == [2, 2, 2] and [len(ids) for ids in data.lists(1)] == [1, 1, 1]
    assert len(Coco(data.root, data.repo, coco / "absent.json").lists().train) == 3  # one has no class
    assert data.missing(lists) == data.missing_labels(lists) == []
    data_check.write_lists(tmp_path, data, lists)
    rows = np.load(tmp_path / "cls_labels.npy", allow_pickle=True).item()
    assert {name: np.flatnonzero(row).tolist() for name, row in rows.items()} == {
        name: columns for ids in (lists.train, lists.val) for name, columns in zip(ids, ([0, 16, 79], [16]))
    }
    for name in ("train_id.txt", "train_aug_id.txt"):
        assert (tmp_path / "all" / name).read_text().split() == lists.train
    steps = {step.name: step for step in make_steps(Settings(data, coco / "run", python=sys.executable, use_crf=True))}
    assert list(steps)[:3] == ["check", "data-masks", "weights"]
    for name, words in (
        ("seed0/match", f"main.py --data-set COCO --data-path {data.root} --label-file-path {coco / 'run' / 'lists'}"),
        ("seed0/match", "--classes coco --stage match"),
        ("seed0/cams", "--data-set COCOMS"),
        ("seed0/masks", f"--images {data.root / 'train2014'}"),
        ("seed0/masks-crf", "--num-classes 80"),
        ("seed0/seeds", f"--gt {coco / 'run' / 'coco-masks' / 'train'}"),
        ("seed0/evaluation", f"--gt {coco / 'run' / 'coco-masks' / 'val'}"),
        ("seed0/evaluation", "--classes coco"),
        ("seed0/segmentation", f"--photos {data.root / 'train2014'}"),
        ("seed0/predictions", f"--photos {data.root / 'val2014'}"),
    ):
        assert words in steps[name].commands[0], name
    assert coco / "run" / "coco-masks" / "val" in steps["seed0/evaluation"].needs


def test_what_is_missing_of_coco(tmp_path: Path) -> None:
    data = Coco(tmp_path, tmp_path)
    missing = [*data.missing(data.lists()), *data.missing_labels(data.lists())]
    assert len(missing) == len({one.what for one in missing})
    said = "\n".join(map(str, missing))
    for part in ("train2014.zip", "annotations_trainval2014.zip", "instances_val2014.json", "train_id.txt", "MCTformer"):
        assert part in said


# ---------------------------------------------------------------------------------------------------- segmentation

HOW = Training(steps=5, batch_size=2, crop=32, lr=1e-3, warmup=1, every=2, workers=0)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter") / "random"
    try:
        network = segmentation.random_network(21)
    except ImportError as error:  # none, or one for a newer torch
        pytest.skip(f"SegFormer of transformers: {error}")
    segmentation.save_network(network, folder)
    return folder


@pytest.fixture(scope="module")
def train(world: Path, segmenter: Path) -> Callable[..., None]:
    ids = Voc(world / "VOC2012", world / "host").lists().train

    def run(out: Path, how: Training = HOW) -> None:
        voc = world / "VOC2012"
        segmentation.train(ids, voc / "JPEGImages", voc / "SegmentationClass", str(segmenter), out, how, cpu=True)

    return run


@pytest.fixture(scope="module")
def trained(train: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    train(out)
    return out


def files(folder: Path) -> Dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_that_is_broken_off_ends_with_the_same_bytes(
    train: Callable[..., None], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, real, seen = files(trained), Batches.__getitem__, []

    def until(last: int) -> Callable[..., Any]:
        def item(batches: Batches, step: int) -> Any:
            seen.append(step)
            if step == last:
                raise KeyboardInterrupt
            return real(batches, step)

        return item

    for last in (1, 3):
        monkeypatch.setattr(Batches, "__getitem__", until(last))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    monkeypatch.undo()
    assert seen == [0, 1, 0, 1, 2, 3]
    assert (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="is of a training with other settings"):
        train(tmp_path, HOW._replace(lr=1))
    train(tmp_path)
    assert files(tmp_path) == whole and set(whole) == {"log.jsonl", "model/config.json", "model/model.safetensors"}
    train(tmp_path)  # nothing to do
    assert files(tmp_path) == whole
    losses = [json.loads(line)["loss"] for line in whole["log.jsonl"].splitlines()]
    assert len(losses) == 5 and np.isfinite(losses).all()


def test_pixels_at_255_do_not_count() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    label = torch.full((1, 8, 8), 255)
    empty = segmentation.pixel_loss(logits, label)
    empty.backward()
    assert empty == 0 and logits.grad is not None and not logits.grad.any()
    label[0, 0, 0] = 2
    expected = -torch.log_softmax(logits[0, :, 0, 0], 0)[2]  # the corner pixel is the corner of the logits
    assert torch.allclose(segmentation.pixel_loss(logits, label), expected)


def test_every_image_comes_once_per_pass_whatever_the_number_of_processes(world: Path) -> None:
    ids, how = [f"{i}" for i in range(8)], Training(steps=4, batch_size=4)
    for processes in (1, 2):
        parts = [Batches(ids, world, world, how, rank, processes) for rank in range(processes)]
        names = [[part._id(step, i) for part in parts for i in range(part.each)] for step in range(4)]
        assert sorted(names[0] + names[1]) == sorted(names[2] + names[3]) == ids
        assert names[0] + names[1] != names[2] + names[3]
    with pytest.raises(ValueError, match="--batch-size must be a multiple of the 3 processes"):
        Batches(ids, world, world, how, 0, 3)


def test_batches_hold_crops_of_one_size_and_255_outside(world: Path) -> None:
    voc = world / "VOC2012"
    batches = Batches(["2007_000000"], voc / "JPEGImages", voc / "SegmentationClass", Training(batch_size=3, crop=128))
    img, label = batches[7]
    assert img.shape == (3, 3, 128, 128) and label.shape == (3, 128, 128)
    assert set(label.unique().tolist()) <= {0, 1, 255} and (label[:, -1, -1] == 255).all()
    assert torch.equal(batches[7][0], img) and not torch.equal(batches[8][0], img)


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    how = Training(steps=100, warmup=10)
    rates = [segmentation.schedule(step, how) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and int(np.argmax(rates)) == 9
    assert rates[50] == pytest.approx(0.5**0.9) and rates[99] == pytest.approx(0.01**0.9)


def test_predictions_have_the_size_of_the_photos(world: Path, trained: Path, tmp_path: Path) -> None:
    ids, photos = Voc(world / "VOC2012", world / "host").lists().val, world / "VOC2012" / "JPEGImages"
    with_crf = tmp_path / "crf" if crf.available() else None
    segmentation.predict(ids, photos, str(trained / "model"), tmp_path / "plain", with_crf, cpu=True)
    for name in ids:
        with Image.open(photos / f"{name}.jpg") as photo, Image.open(tmp_path / "plain" / f"{name}.png") as label:
            assert label.size == photo.size and np.asarray(label).max() < 21


# ---------------------------------------------------------------------------------------------------- the whole, dry


def settings(world: Path, **options: Any) -> Settings:
    return Settings(Voc(world / "VOC2012", world / "host"), world / "run", python=sys.executable, **options)


def test_every_seed_has_the_steps_of_the_paper(world: Path) -> None:
    names = [step.name for step in make_steps(settings(world, seeds=2))]
    assert names[:5] == ["check", "weights", "seed0/match", "seed0/prompt", "seed0/refine"]
    alone = ["train", "cams-single", "cams", "seeds", "masks", "masks-crf", "mask-figures"]
    assert names[-8:] == [*(f"seed1/alone/{name}" for name in alone), "ledger"]
    assert [name.replace("seed0", "seed1") for name in names[2:23]] == names[23:-1]


def test_the_host_alone_is_trained_as_refine_is_with_nothing_attached(world: Path, tmp_path: Path) -> None:
    start = tmp_path / "own.pth"
    steps = {step.name: step for step in make_steps(settings(world, checkpoint=start, epochs=3))}
    (refine,), (alone,) = (steps[f"seed0/{name}"].groups[0] for name in ("refine", "alone/train"))
    script = [words[words.index("--") + 1 :] for words in (list(refine.words), list(alone.words))]
    assert script[0] == script[1] and "--epochs" in script[0]
    for words in (alone.words, refine.words):
        assert list(words)[words.index("--checkpoint") + 1] == str(start)
    assert alone.words[alone.words.index("--stage") + 1] == "plain" and "--clip" not in alone.words
    assert steps["seed0/alone/train"].makes == [world / "run" / "seed0" / "alone" / "host" / "saved" / "checkpoint.pth"]
    assert str(world / "run" / "lists" / "train" / "0") not in steps["seed0/alone/cams"].commands[0]


def test_all_trainings_start_from_a_host_that_is_trained_first(world: Path) -> None:
    options = {"host_first": True, "mode": "replace", "host_arguments": ("--lr", "5e-4"), "refiner": ("lambda_area=1",)}
    steps = {step.name: step for step in make_steps(settings(world, controls=True, **options))}
    assert list(steps)[:4] == ["check", "weights", "seed0/start/train", "seed0/match"]
    (first,) = steps["seed0/start/train"].makes
    assert first == world / "run" / "seed0" / "start" / "host" / "saved" / "checkpoint.pth"
    assert "--checkpoint" not in steps["seed0/start/train"].commands[0] and "--lr" not in steps["seed0/start/train"].commands[0]
    for name, mode in (("match", True), ("refine", True), ("alone/train", False), ("area/train", False)):
        step = steps[f"seed0/{name}"]
        assert f"--checkpoint {first}" in step.commands[0] and step.commands[0].endswith("--lr 5e-4") and first in step.needs
        assert ("--mode replace" in step.commands[0]) is mode, name
    facts = settings(world, **options).facts()
    assert facts["start"] == "DeiT-S, then its own training with nothing attached" and facts["mode"] == "replace"


def test_another_number_of_processes_or_gpus_changes_nothing_that_is_done(world: Path) -> None:
    few = {step.name: step for step in make_steps(settings(world, use_crf=True, gpus=1, processes=2))}
    many = {step.name: step for step in make_steps(settings(world, use_crf=True, gpus=4, processes=8))}
    for name in ("cams", "masks", "masks-crf", "labels", "predictions"):
        one, other = few[f"seed0/{name}"], many[f"seed0/{name}"]
        assert one.commands != other.commands and one.decides == other.decides and one.decides, name
    assert few["seed0/masks"].decides != few["seed0/alone/masks"].decides


def test_the_chain_compares_what_decides(chain: Chain) -> None:
    step = write_step(chain.out, "one", "a")
    chain.run([step._replace(decides=["the same"])])
    assert chain.run([write_step(chain.out, "one", "b")._replace(decides=["the same"])]) == []
    assert chain.run([step._replace(decides=["other"])]) == ["one"]


def test_what_follows_two_dashes_goes_to_the_host(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--voc", str(world / "VOC2012"), "--repo", str(world / "host"), "--out", str(tmp_path / "run"), "--cpu"]
    assert command.main([*arguments, "--dry-run", "--mode", "replace", "--", "--batch-size", "64"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "--stage match" in line]
    assert "--mode replace" in lines[0] and "--no-pin-mem --batch-size 64" in lines[0]
    with pytest.raises(SystemExit):
        command.main([*arguments, "--", "--epochs=3"])
    assert "--epochs=3 after -- is set by the chain" in capsys.readouterr().err


def test_online_is_one_training_in_the_place_of_three(world: Path) -> None:
    three = [step.name for step in make_steps(settings(world))]
    steps = {step.name: step for step in make_steps(settings(world, online=7))}
    assert list(steps) == [*three[:2], "seed0/online", *three[5:]]
    online, runner = steps["seed0/online"], world / "run" / "seed0" / "runner"
    assert "--stage online" in online.commands[0] and "--set online_steps=7" in online.commands[0]
    assert online.makes == [runner / name for name in ("online.pt", "prompts.safetensors", "online.jsonl")]
    assert f"--resume {runner / 'online.pt'}" in steps["seed0/cams"].commands[0]
    assert steps["seed0/alone/train"].commands == make_steps(settings(world))[16].commands
    (section, *_) = ledger.sections(settings(world, online=7).facts())
    assert "online" in section.steps and "match" not in section.steps


def test_controls_go_to_the_end_of_the_chain(world: Path) -> None:
    options = {"controls": True, "use_crf": True}
    names = [step.name for step in make_steps(settings(world, **options))]
    assert "seed0/alone/evaluation" in names and not any("area" in name for name in names)  # it has no weight
    steps = {step.name: step for step in make_steps(settings(world, refiner=("lambda_area=2",), **options))}
    assert [name for name in steps if name.startswith("seed0/area")] == [
        name.replace("alone", "area") for name in names if name.startswith("seed0/alone")
    ]
    command = steps["seed0/area/train"].commands[0]
    assert "-m examples.voc.area mctformer" in command and "--stage match" in command and "--set lambda_area=2" in command
    made: List[Path] = []
    for step in steps.values():
        assert all(any(path == one or one in path.parents for one in made) for path in step.needs), step.name
        made += step.makes


def test_the_runner_with_the_area_term_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(area.runner, "main", lambda arguments: seen.append((arguments, area.runner.PromptRefiner)))
    before = area.runner.PromptRefiner
    area.main(["mctformer"])
    assert seen == [(["mctformer"], AreaOnly)] and area.runner.PromptRefiner is before


def test_what_a_step_reads_is_made_before(world: Path) -> None:
    made: List[Path] = []
    for step in make_steps(settings(world, use_crf=True)):
        for path in step.needs:
            assert any(path == one or one in path.parents for one in made), (step.name, path)
        made += step.makes


def test_several_gpus_share_the_cam_files_and_the_segmentation_network(world: Path) -> None:
    steps = {step.name: step for step in make_steps(settings(world, gpus=3))}
    (group,) = steps["seed0/cams"].groups
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in group] == ["0", "1", "2"]
    assert "torch.distributed.run --standalone --nproc_per_node 3" in steps["seed0/segmentation"].commands[0]
    assert len(steps["seed0/match"].groups) == 1  # the host's script knows one GPU


def test_a_dry_run_prints_every_command_and_its_estimate_and_runs_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--voc", str(world / "VOC2012"), "--repo", str(world / "host"), "--out", str(tmp_path / "run"), "--seeds", "2"]
    assert command.main([*arguments, "--dry-run", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("estimate:") + said.count("left out:") == 45 and "TFLOP/s" in said
    assert "main.py --data-set VOC12 --data-path" in said and "deit_small_patch16_224-cd65a155.pth" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--limit", "3"], "--limit is for a --rehearsal"),
        (["--label-thresholds", "0.4"], "--label-thresholds takes two"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--finetune", "no.pth"], "--finetune: there is no file no.pth"),
        (["--coco", "coco"], "not allowed with argument --voc"),
        (["--gpus", "3", "--dry-run"], "--batch-size must be a multiple of the number of GPUs; got 16 and 3"),
        (["--input-size", "384"], "takes the weights of DeiT-S at 448 pixels only"),
        (["--host-first", "--checkpoint", __file__], "take one of them"),
        (["--tflops", "0"], "--tflops must be above 0; got 0"),
        (["--online", "0"], "--online must be at least 1; got 0"),
        (["--set", "online_steps=5"], "has an option of its own: --online N"),
        (["--set", "lambda_aera=1"], "did you mean 'lambda_area'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: List[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["--voc", "voc", "--repo", "host", *arguments])
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the ledger


def write_figures(out: Path, seeds: int, facts: Dict[str, Any]) -> None:
    """A figure for every row, 0.5 for the method and 0.4 for its controls, and 0.1 more with every seed."""
    for seed in range(seeds):
        for section in ledger.sections(facts):
            for row in section.rows:
                path = out / f"seed{seed}" / row.control / "figures" / row.step / f"{row.file}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                if row.file == "crf":
                    continue
                split = "val" if row.step == "evaluation" else "train"
                content = {
                    "split": split,
                    "images": 3,
                    "miou": 0.5 - 0.1 * bool(row.control) + seed / 10,
                    "threshold": None,
                    "uncertain": 0.0,
                    "absent": ["cat"],
                }
                path.write_text(json.dumps(content))


@pytest.mark.parametrize("rehearsal", [False, True])
def test_the_ledger_keeps_kinds_of_figures_apart(world: Path, tmp_path: Path, rehearsal: bool) -> None:
    facts = settings(world, seeds=2, rehearsal=rehearsal).facts()
    write_figures(tmp_path, 2, facts)
    record = {"step": "seed0/masks", "what": "<align>", "note": None, "commands": ["semples refine <x>"], "seconds": 3.2}
    ledger.write(tmp_path, facts, [{**record, "finished": "2026-01-01", "versions": {"torch": "2.0"}}])
    content = read_json(tmp_path / "ledger.json")
    assert content is not None
    assert [section["title"] for section in content["sections"]] == ["Seeds", "Masks", "Pseudo labels", "Segmentation"]
    assert {row["split"] for row in content["sections"][0]["rows"]} == {"train"}
    rows = content["sections"][3]["rows"]
    assert rows[0]["split"] == "val" and rows[0]["mean"] == pytest.approx(55) and rows[0]["deviation"] == pytest.approx(50**0.5)
    assert [row["mean"] for row in rows[1:]] == [None] * 3  # the host alone is not taken that far
    page = (tmp_path / "ledger.html").read_text()
    assert ("The figures mean nothing" in page) is rehearsal
    for text in (
        "best case",
        "fixed beforehand",
        "&lt;align&gt;",
        "semples refine &lt;x&gt;",
        "Random seeds: 2",
        "55.00",
        "7.07",
        "not run",
    ):
        assert text in page
    assert "http" not in page.replace(str(world), "")  # loads nothing


def test_gains_are_those_over_the_host_alone(world: Path, tmp_path: Path) -> None:
    facts = settings(world, seeds=2, controls=True, refiner=("lambda_area=1",)).facts()
    write_figures(tmp_path, 2, facts)
    ledger.write(tmp_path, facts, [])
    content = read_json(tmp_path / "ledger.json")
    assert content is not None
    for section in content["sections"]:
        whole, alone, only_area = section["rows"][:3]
        assert alone["name"] == f"host alone: {whole['name']}" and only_area["name"] == f"area term alone: {whole['name']}"
        assert whole["gain"] == pytest.approx([10, 10]) and whole["deviation_of_gain"] == pytest.approx(0)
        assert only_area["gain"] == pytest.approx([0, 0]) and alone["gain"] == [] and alone["mean"] == pytest.approx(45)
    assert "+10.00 ± 0.00 over the host alone" in (tmp_path / "ledger.html").read_text()
    less = settings(world, seeds=2).facts()
    ledger.write(tmp_path, less, [])  # figures that a run with --controls left do not count
    content = read_json(tmp_path / "ledger.json")
    assert content is not None and content["sections"][3]["rows"][0]["gain"] == []
    assert content["sections"][0]["rows"][0]["gain"] == pytest.approx([10, 10])
    assert "not run: only with --controls" in (tmp_path / "ledger.html").read_text()
