"""Real baselines, unedited, through `python -m semples_plugin.adapters`: stages, records, CAM files, interrupted runs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from semples_plugin import PromptRefiner
from semples_plugin.class_names import VOC_CLASSES

COUNT, BATCH, EPOCHS = 6, 3, 2  # 4 steps
STEPS = COUNT // BATCH * EPOCHS


class Script(NamedTuple):
    """Command lines of a baseline, to be run in a folder made by `Hosts.folder`.

    Attributes:
        train: its training script, small.
        cams: its script that writes CAM files to `cams`, from the weights that the first one saved.
        count: number of photos that it does so for.
        saved: these weights.
    """

    train: List[str]
    cams: List[str]
    count: int
    saved: str


def script(name: str, photos: Path, cwd: Path) -> Script:
    small = ["--input-size", "64", "--batch-size", str(BATCH), "--epochs", str(EPOCHS), "--num_workers", "0"]
    if name == "mctformer":
        main = ["main.py", "--data-path", str(photos), "--img-list", "voc12", "--device", "cpu", *small]
        cams = ["--data-set", "VOC12MS", "--gen_attention_maps", "--resume", "saved/checkpoint.pth", "--attention-dir", "png"]
        return Script([*main, "--output_dir", "saved"], [*main, *cams, "--cam-npy-dir", "cams"], COUNT, "saved/checkpoint.pth")
    if name == "weaktr":
        main = ["main.py", "--data-path", str(cwd / "voc12data"), "--img-ms-list", "voc12/train_aug_id.txt", *small]
        main += ["--label-file-path", "voc12/cls_labels.npy", "--model", "deit_small_WeakTr_patch16_224"]
        main += ["--output_dir", "saved", "--cam-npy-dir", "cams"]
        cams = ["--data-set", "VOC12MS", "--gen_attention_maps", "--resume", "saved/checkpoint.pth"]
        train = ["--data-set", "VOC12", "--finetune", "", "--no-if_eval_miou"]
        return Script([*main, *train], [*main, *cams], COUNT, "saved/checkpoint.pth")
    heads = [f"{head}_cls_head.{kind}" for head in ("trans", "conv") for kind in ("weight", "bias")]
    torch.save({key: torch.zeros(1) for key in heads}, cwd / "init.pth")  # the script drops these; the rest stays random
    (cwd / "saved").mkdir()
    lines = (cwd / "voc12" / "train_aug.txt").read_text(encoding="utf-8").splitlines()[:2]
    (cwd / "voc12" / "two.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")  # its inference is slow: with a CRF
    common = ["--arch", "ti", "--voc12_root", str(photos)]
    train = ["--batch_size", str(BATCH), "--max_epoches", str(EPOCHS), "--crop_size", "64", "--weights", "init.pth"]
    cams = ["--weights", "saved/TransCAM.pth", "--infer_list", "voc12/two.txt", "--out_cam", "cams", "--out_crf", "crf"]
    return Script(
        ["train_TransCAM.py", *common, *train, "--train_list", "voc12/train_aug.txt", "--save_dir", "saved"],
        ["infer_TransCAM.py", *common, *cams],
        2,
        "saved/TransCAM.pth",
    )


class Ran(NamedTuple):
    """One run of the three stages and of the baseline's CAM script after them.

    Attributes:
        matched: the baseline's own weights file as it was after the match stage; of `mctformer` only.
        before, after: state of the clone.
    """

    name: str
    cwd: Path
    ids: List[str]
    script: Script
    matched: Dict[str, torch.Tensor]
    before: str
    after: str

    @property
    def out(self) -> Path:
        return self.cwd / "out"

    @property
    def record(self) -> Dict[str, Any]:
        return json.loads((self.out / "record.json").read_text(encoding="utf-8"))


def weights(path: Path) -> Dict[str, torch.Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("model", content)


def same(first: Dict[str, torch.Tensor], second: Dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def files(folder: Path) -> Dict[str, Tuple[str, int]]:
    """Checksum and time of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module", params=["mctformer", "weaktr", "transcam"])
def ran(request: Any, hosts: Any, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    name = request.param
    hosts.repo(name)
    before, photos, cwd = hosts.state(name), hosts.photos(), tmp_path_factory.mktemp(name)
    ids = hosts.folder(name, cwd, COUNT)
    lines, matched = script(name, photos, cwd), {}
    if name == "mctformer":
        for stage in ("match", "prompt", "refine"):
            hosts.run(name, name, cwd, "--stage", stage, "--", *lines.train)
            if stage == "match":
                matched = weights(cwd / lines.saved)
    else:
        hosts.run(name, name, cwd, "--", *lines.train)
    hosts.run(name, name, cwd, "--stage", "plain", "--", *lines.cams)
    return Ran(name, cwd, ids, lines, matched, before, hosts.state(name))


def test_the_record_says_what_ran(hosts: Any, ran: Ran) -> None:
    record = ran.record
    assert {stage: values["state"] for stage, values in record["stages"].items()} == dict.fromkeys(
        ("match", "prompt", "refine"), "done"
    )
    assert record["stages"]["match"]["steps"] == record["stages"]["refine"]["steps"] == STEPS
    assert record["stages"]["prompt"]["images"] == COUNT
    assert record["stages"]["prompt"]["pairs"] == sum(int(hosts.labels(ran.name)[i].sum()) for i in ran.ids)
    assert record["host_commit"] == {"commit": hosts.git(ran.name, "rev-parse", "HEAD"), "changed_files": []}
    assert record["run"]["script"] == ran.script.train
    assert {"torch", "timm", "torchvision", "numpy", "semples_plugin", "python"} <= record["versions"].keys()


def test_the_weights_are_the_hosts_own(ran: Ran) -> None:
    match, refine = weights(ran.out / "match.pt"), weights(ran.out / "refine.pt")
    assert same(refine, weights(ran.cwd / ran.script.saved))  # the script's file, written again in the last stage
    assert not same(match, refine)
    if ran.matched:
        assert same(match, ran.matched)


def test_the_log_names_the_terms_of_the_stage(ran: Ran) -> None:
    for stage, terms in (("match", set()), ("refine", {"refine"})):
        lines = [json.loads(line) for line in (ran.out / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for line in lines:
            assert line.keys() - {"step", "loss"} == {"match_foreground", "match_background", *terms}
            assert np.isfinite(list(line.values())).all()


def test_the_prompts_load_in_another_process(ran: Ran, aligned_clip: nn.Module) -> None:
    refiner = PromptRefiner.load(ran.out / "prompts.safetensors", clip=aligned_clip)
    assert list(refiner.classes) == list(VOC_CLASSES)
    assert refiner.stage == "refine"
    start = PromptRefiner(VOC_CLASSES, clip=aligned_clip, prompt_length=4).prompts.context
    assert refiner.prompts.context.shape == start.shape
    assert not torch.equal(refiner.prompts.context, start)


def test_the_hosts_script_writes_its_cam_files(hosts: Any, ran: Ran) -> None:
    labels = hosts.labels(ran.name)
    assert {path.stem for path in (ran.cwd / "cams").glob("*.npy")} == set(ran.ids[: ran.script.count])
    for name in ran.ids[: ran.script.count]:
        cams = np.load(ran.cwd / "cams" / f"{name}.npy", allow_pickle=True).item()
        with Image.open(hosts.photos() / "JPEGImages" / f"{name}.jpg") as photo:
            size = photo.size[::-1]
        assert sorted(cams) == np.flatnonzero(labels[name]).tolist()
        for cam in cams.values():
            assert cam.shape == size
            assert np.issubdtype(cam.dtype, np.floating) and np.isfinite(cam).all()


def test_the_clone_is_as_it_was(ran: Ran) -> None:
    assert ran.after == ran.before


def test_a_finished_run_is_left_alone(hosts: Any, ran: Ran) -> None:
    before, record = files(ran.out), ran.record
    said = hosts.run(ran.name, ran.name, ran.cwd, "--", *ran.script.train)
    for stage in ("match", "prompt", "refine"):
        assert f"semples: {stage}: done before, skipped" in said
    after = files(ran.out)
    del before["record.json"], after["record.json"]
    assert after == before
    assert ran.record == record


@pytest.mark.parametrize("ran", ["mctformer"], indirect=True)
def test_a_killed_refine_stage_is_run_again(hosts: Any, ran: Ran, tmp_path: Path) -> None:
    """SIGKILL after the first step; the same command then runs this stage only, to the result of an uninterrupted run."""
    hosts.folder(ran.name, tmp_path, COUNT)
    lines = script(ran.name, hosts.photos(), tmp_path)
    record, log = tmp_path / "out" / "record.json", tmp_path / "out" / "refine.jsonl"

    def stages() -> Dict[str, Any]:
        return json.loads(record.read_text(encoding="utf-8")).get("stages", {}) if record.exists() else {}

    process = hosts.start(ran.name, ran.name, tmp_path, "--", *lines.train)
    try:
        end = time.monotonic() + 600
        while not (log.exists() and log.read_bytes().count(b"\n")):
            assert process.poll() is None, (tmp_path / "started.log").read_text()[-4000:]
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert stages()["refine"]["state"] == "running"
    assert not (tmp_path / "out" / "refine.pt").exists()
    before = files(tmp_path / "out")
    said = hosts.run(ran.name, ran.name, tmp_path, "--", *lines.train)
    assert [f"semples: {stage}: done before, skipped" in said for stage in ("match", "prompt", "refine")] == [True, True, False]
    after = files(tmp_path / "out")
    for name in ("match.pt", "match.jsonl", "prompts.safetensors"):
        assert after[name] == before[name]
    assert stages()["refine"]["state"] == "done"
    for name in ("match.pt", "refine.pt"):
        assert same(weights(tmp_path / "out" / name), weights(ran.out / name))
    for name in ("match.jsonl", "refine.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (ran.out / name).read_bytes()
    prompts = [load_file(out / "prompts.safetensors") for out in (tmp_path / "out", ran.out)]
    assert same(*prompts)


@pytest.mark.parametrize("name", ["mctformer", "weaktr"])
def test_a_cluster_branch_goes_through_the_scripts(hosts: Any, name: str, tmp_path: Path) -> None:
    """Trained by the training script, and put back into the network of the script for CAM files."""
    hosts.repo(name)
    before = hosts.state(name)
    ids, lines = hosts.folder(name, tmp_path, COUNT), script(name, hosts.photos(), tmp_path)
    hosts.run(name, name, tmp_path, "--stage", "match", "--clusters", "voc", "--", *lines.train)
    log = [json.loads(line) for line in (tmp_path / "out" / "match.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(log) == STEPS and all({"cluster_tokens", "mce", "patch_contrast"} <= line.keys() for line in log)
    assert same(weights(tmp_path / "out" / "match.pt"), weights(tmp_path / lines.saved))  # the host's own tensors alone
    branch = tmp_path / "out" / "match.clusters.safetensors"
    found = {}
    for ours in ([], ["--branch", str(branch)]):
        said = hosts.run(name, name, tmp_path, "--stage", "plain", *ours, "--", *lines.cams)
        assert (f"{branch} is in " in said) == bool(ours)
        found[len(ours)] = {i: np.load(tmp_path / "cams" / f"{i}.npy", allow_pickle=True).item() for i in ids}
    for i in ids:
        alone, together = found[0][i], found[2][i]
        assert sorted(alone) == sorted(together)
        assert all(alone[k].shape == together[k].shape and np.isfinite(together[k]).all() for k in alone)
    assert max(np.abs(found[0][i][k] - found[2][i][k]).max() for i in ids for k in found[0][i]) > 1e-3
    assert hosts.state(name) == before
