"""`semples refine --workers`: the same results for any number of processes, and what becomes of interrupted ones."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, List

import numpy as np
import pytest

from semples_plugin import PromptRefiner
from semples_plugin.files.refine_folder import Options, Summary, refine_folder
from tests.files.refine_world import World, parts, results

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")


def bad_ones(world: World) -> None:
    """Images that fail: in the plan, while they are read, and for their labels."""
    world.add("a_bad")
    (world.cams / "a_bad.npy").write_bytes(b"no")
    world.add("z_bad", keys=(5,))
    world.cam("m_lonely")


def test_any_number_of_workers_writes_the_same_and_says_the_same(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    bad_ones(some)
    said = []
    for workers in (0, 1, 2):
        out = some.root / f"out{workers}"
        assert some.refine("--workers", workers, "--batch-size", 2, "--soft-masks", "--json", out=out) == 1
        captured = capsys.readouterr()
        said.append(({**json.loads(captured.out), "seconds": 0}, captured.err))
        assert list(json.loads(captured.out)["failed"]) == list(said[0][0]["failed"]) and not parts(out)
    assert said[0] == said[1] == said[2] and sorted(said[0][0]["failed"]) == ["a_bad", "m_lonely", "z_bad"]
    assert len(results(some.root / "out0")) == 27
    assert results(some.root / "out0") == results(some.root / "out1") == results(some.root / "out2")
    settings = [(some.root / f"out{workers}" / "settings.json").read_bytes() for workers in (0, 1, 2)]
    assert settings[0] == settings[1] == settings[2]  # another number may take the folder up


def test_workers_take_up_what_is_left(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    some.refine(out=some.root / "whole")
    some.refine()
    for name in ("cams/img0.npy", "labels/img3.png", "cams/img4.npy"):
        (some.out / name).unlink()
    capsys.readouterr()
    assert some.refine("--workers", 2) == 0
    assert capsys.readouterr().out.startswith("3 refined, 6 done before, 0 failed")
    assert results(some.out) == results(some.root / "whole")
    assert some.refine("--workers", 2) == 0  # nothing to do, so none is started
    assert capsys.readouterr().out.startswith("0 refined, 9 done before, 0 failed")


class Halves:
    """Masks without a class: the upper and the lower half. Says that it computes on a GPU."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self, one: Any) -> np.ndarray:
        if one.item.name == "img3":
            raise RuntimeError("a model's own error")
        masks = np.zeros((2, *one.img.shape[1:]), bool)
        masks[0, : masks.shape[1] // 2], masks[1, masks.shape[1] // 2 :] = True, True
        return masks


def refined(world: World, out: Path, workers: int, **options: Any) -> Summary:
    summary = refine_folder(
        world.cams, world.images, out, 3, Options(batch_size=2, soft_masks=True), workers=workers, progress=False, **options
    )
    return summary._replace(seconds=0)


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_with_a_gpu_workers_read_and_write_and_this_process_refines(device: str, some: World) -> None:
    bad_ones(some)
    summaries = [refined(some, some.root / f"out{n}", n, proposals=Halves(device)) for n in (0, 2)]
    assert summaries[0] == summaries[1] and summaries[0].refined == 8
    assert summaries[0].failed["img3"] == "RuntimeError: a model's own error"
    assert list(summaries[0].failed) == list(summaries[1].failed)
    assert results(some.root / "out0") == results(some.root / "out2")


class Loaded(Halves):
    """`Halves` that write down in which process they were loaded, as a model would be."""

    def __init__(self, device: str, record: Path):
        super().__init__(device)
        self.record = record
        with record.open("a") as file:
            file.write(f"{os.getpid()}\n")

    def __reduce__(self) -> Any:
        return Loaded, (self.device, self.record)


@pytest.mark.parametrize("device, copies", [("cuda:0", 0), ("cpu", 2)])
def test_workers_that_read_and_write_load_no_model(device: str, copies: int, some: World) -> None:
    record = some.root / "record.txt"
    some.image("img0", (64, 65))  # large, and not to be kept as it is: with proposals it is refined at the smaller size
    how = {"proposals": Loaded(device, record), "progress": False}
    for n in (0, 2):
        options = Options(batch_size=2, max_pixels=2000)
        refine_folder(some.cams, some.images, some.root / f"out{n}", 3, options, workers=n, **how)
    assert results(some.root / "out0") == results(some.root / "out2")
    processes = record.read_text().split()
    assert len(processes) == 1 + copies and processes.count(str(os.getpid())) == 1


def test_each_worker_builds_its_own_refiner(
    some: World, make_refiner: Callable[..., PromptRefiner], tmp_path: Path, aligned_clip: Any
) -> None:
    import torch

    clip = tmp_path / "clip.pt"
    torch.save(aligned_clip.state_dict(), clip)
    make_refiner(learned=True).save(tmp_path / "prompts.safetensors")
    build = functools.partial(PromptRefiner.load, tmp_path / "prompts.safetensors", clip=str(clip), image_stats=None)
    options = Options(batch_size=4, clip_steps=2, suppress=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in (0, 2):
            how = {"refiner": build(), "build": build, "workers": n, "progress": False}
            refine_folder(some.cams, some.images, some.root / f"out{n}", 3, options, **how)
    finally:
        torch.set_num_threads(before)
    assert len(results(some.out.with_name("out0"))) == 18 and results(some.root / "out0") == results(some.root / "out2")
    with pytest.raises(ValueError, match="need `build`, which makes the refiner anew in each; got none"):
        refine_folder(some.cams, some.images, some.out, 3, options, refiner=build(), workers=2, progress=False)


# ---------------------------------------------------------------------------------------------------- interrupted


@pytest.fixture
def many(world: World) -> World:
    for i in range(120):
        world.add(f"img{i}", size=[(60, 80), (80, 60), (61, 80)][i % 3])
    world.refine("--batch-size", 4, out=world.root / "whole")
    return world


def started(world: World) -> "subprocess.Popen[str]":
    """`semples refine --workers 2` in a session of its own, once it has written some results."""
    command = [sys.executable, "-m", "semples_plugin", *world.arguments("--batch-size", 4, "--workers", 2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit that it is ignored
    )  # fmt: skip
    end = time.monotonic() + 120
    while not list((world.out / "cams").glob("*.npy")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return process


def workers_of(pid: int) -> List[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def gone(pids: List[int]) -> bool:
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def goes_on(world: World) -> bool:
    assert world.refine("--batch-size", 4) == 0
    return results(world.out) == results(world.root / "whole")


@LINUX
def test_ctrl_c_ends_all_processes_in_one_line_without_partial_files(many: World) -> None:
    process = started(many)
    pids = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output[1].splitlines() == ["interrupted; `semples refine` goes on from here with the same command."]
    assert len(pids) == 2 and gone(pids) and not parts(many.out) and len(results(many.out)) < 240
    assert goes_on(many)


@LINUX
def test_a_killed_worker_ends_the_run_in_one_line_without_partial_files(many: World) -> None:
    process = started(many)
    pids = workers_of(process.pid)
    os.kill(pids[0], signal.SIGKILL)
    output = process.communicate(timeout=60)
    assert process.returncode == 2
    (line,) = output[1].splitlines()
    assert line.startswith("error: A worker process ended") and "(signal 9)" in line and "goes on from here" in line
    assert len(pids) == 2 and gone(pids) and not parts(many.out)
    assert goes_on(many)


@LINUX
def test_workers_end_with_a_killed_run(many: World) -> None:
    process = started(many)
    pids = workers_of(process.pid)
    process.kill()
    process.wait()
    assert len(pids) == 2 and gone(pids)
    assert goes_on(many) and not parts(many.out)
