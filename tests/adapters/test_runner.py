"""The runner on a toy host. One run in processes of its own, killed in its last stage, serves most tests.

The run that continues it, and all others, run in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from semples_plugin import PromptRefiner, __version__
from semples_plugin.adapters import __main__ as command
from semples_plugin.adapters import make_source
from semples_plugin.adapters.generic import Generic
from semples_plugin.adapters.runner import compat, stages
from semples_plugin.adapters.runner.collector import Collector
from semples_plugin.adapters.runner.record import Record, commit
from semples_plugin.config import COCO, VOC, RefinerConfig
from semples_plugin.errors import HostError

pytestmark = pytest.mark.filterwarnings("ignore:.*Pillow 10:DeprecationWarning")

TOY = Path(__file__).parent / "toy_repo"
CLASSES = ["boat", "train", "bird"]  # no image of the toy host shows a bird
NUM_IMAGES, BATCHES, EPOCHS = 8, 3, 2
FILES = ["match.jsonl", "match.pt", "prompts.safetensors", "record.json", "refine.jsonl", "refine.pt"]
RESULTS = ["match.pt", "prompts.safetensors", "refine.pt"]


class Run(NamedTuple):
    """A copy of the toy host, the folder of a run, and what the runner needs besides."""

    repo: Path
    out: Path
    clip: Path
    classes: Path

    def arguments(self, *ours: str, script: Sequence[str] = ("train.py",)) -> List[str]:
        return [
            *("generic", "--repo", str(self.repo), "--out", str(self.out), "--clip", str(self.clip)),
            *("--classes", str(self.classes), "--host-option", "cam=head", "--set", "image_stats=None"),
            *("--set", "prompt_length=4", "--prompt-epochs", "2", "--log-every", "2", "--seed", "7", "--cpu"),
            *ours,
            "--",
            *script,
        ]


def copy_of_toy(folder: Path) -> Path:
    return Path(shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("__pycache__", ".*")))


def listing(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_record(out: Path) -> Dict[str, Any]:
    """record.json, read as strict JSON: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"record.json holds {constant}, which is not JSON")

    return json.loads((out / "record.json").read_text(encoding="utf-8"), parse_constant=refuse)


def read_log(out: Path, stage: str) -> List[Dict[str, float]]:
    return [json.loads(line) for line in (out / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(path: Path) -> Dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {name[7:] if name.startswith("module.") else name: value for name, value in content.get("model", content).items()}


def prompts(path: Path) -> Tuple[List[float], Dict[str, str]]:
    """All that a prompt file holds; safetensors writes its facts in any order."""
    with safe_open(str(path), framework="pt") as file:
        return file.get_tensor("context").flatten().tolist(), dict(file.metadata())


def same(a: Dict[str, Tensor], b: Dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def toy_module(name: str) -> Any:
    """A module of the toy host, imported under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"semples_toy_{name}", TOY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with no_bytecode():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def no_bytecode() -> Iterator[None]:
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def forget_host(*folders: Path) -> None:
    """A host's top-level modules belong to its process; this one runs several."""
    places = tuple(f"{folder}{os.sep}" for folder in folders)
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(places):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As in the processes of the complete run, so that the same seed means the same bits."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def material(aligned_clip: nn.Module, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("material")
    torch.save(aligned_clip.state_dict(), folder / "clip.pt")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(material: Path, tmp_path: Path) -> Run:
    """A run that has not begun."""
    return Run(copy_of_toy(tmp_path / "host"), tmp_path / "out", material / "clip.pt", material / "classes.txt")


def clean_environment(patch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "RANK", "TOY_KILL_IF_THERE_IS"):
        patch.setenv(name, "")  # so that it is put back whatever the runner does
        patch.delenv(name)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment(monkeypatch)


@contextlib.contextmanager
def in_this_process(*folders: Path) -> Iterator[Callable[..., int]]:
    """The runner without a process; the stages of `all` run here as well, each ending as its process would."""

    def call(arguments: Sequence[str]) -> int:
        try:
            return command.main(arguments)
        finally:
            forget_host(*folders, Path(arguments[2]))

    def stage(arguments: List[str], **options: Any) -> Any:
        if arguments[:3] != [sys.executable, "-m", "semples_plugin.adapters"]:
            return subprocess.run(arguments, **options)
        try:
            return SimpleNamespace(returncode=call(arguments[3:]))
        except SystemExit as leave:
            return SimpleNamespace(returncode=leave.code if isinstance(leave.code, int) else leave.code is not None)
        except Exception:
            traceback.print_exc()
            return SimpleNamespace(returncode=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "subprocess", SimpleNamespace(run=stage, TimeoutExpired=subprocess.TimeoutExpired))
        clean_environment(patch)
        yield call


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., int]]:
    with in_this_process(tmp_path) as call:
        yield call


# ------------------------------------------------------------------------------------------------ a complete run


class Complete(NamedTuple):
    run: Run
    killed: "subprocess.CompletedProcess[str]"
    record_when_killed: Dict[str, Any]
    files_when_killed: Dict[str, str]
    status: int
    output: str
    host_files: List[str]


def stand_ins(folder: Path) -> Path:
    """Empty libraries with the versions that the hosts were written for: a process starts in half the time."""
    for name, version in (("timm", "0.4.12"), ("torchvision", "0.5.0")):
        (folder / name / "models").mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (folder / name / "models" / "__init__.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def complete(material: Path, tmp_path_factory: Any) -> Complete:
    """`all` in processes of its own, killed in the refine stage; the same command once more, in this process.

    It is started from a folder in which modules lie that are named as the host's are.
    """
    folder = tmp_path_factory.mktemp("complete")
    run = Run(copy_of_toy(folder / "host"), folder / "out", material / "clip.pt", material / "classes.txt")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for name in ("models", "engine", "utils"):
        (elsewhere / f"{name}.py").write_text("raise ImportError('a module of the folder that the runner was started in')\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    paths = [str(stand_ins(folder / "libraries")), *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(paths))
    environment.update(TOY_KILL_IF_THERE_IS=str(run.out / "prompts.safetensors"))
    process = [sys.executable, "-m", "semples_plugin.adapters", *run.arguments()]
    killed = subprocess.run(process, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert run.out.exists(), killed.stderr
    record, files = read_record(run.out), {name: digest(run.out / name) for name in os.listdir(run.out)}
    output = io.StringIO()
    with in_this_process(folder) as call, contextlib.redirect_stderr(output):
        status = call(run.arguments())
    return Complete(run, killed, record, files, status, output.getvalue(), listing(run.repo))


def test_complete_run_exits_with_0(complete: Complete) -> None:
    assert complete.status == 0, complete.killed.stderr + complete.output


def test_files_of_a_run(complete: Complete) -> None:
    assert sorted(os.listdir(complete.run.out)) == FILES


def test_record_says_what_was_run(complete: Complete) -> None:
    record = read_record(complete.run.out)
    asked = record["run"]
    assert asked["host"] == "generic" and asked["script"] == ["train.py"] and asked["adapter"] == {"cam": "head"}
    assert asked["repo"] == asked["cwd"] == str(complete.run.repo) and asked["clip"] == str(complete.run.clip)
    assert asked["refiner"] == VOC.replace(seed=7, image_stats=None, prompt_length=4).as_dict()
    assert (asked["seed"], asked["prompt_epochs"], asked["mode"], asked["weight"]) == (7, 2, "add", 1.0)
    versions = record["versions"]
    assert versions["semples_plugin"] == __version__ and versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__ and versions["python"].count(".") == 2
    assert set(record["host_commit"]) == {"commit", "changed_files"}


def test_record_says_how_far_each_stage_came(complete: Complete) -> None:
    stages = read_record(complete.run.out)["stages"]
    assert list(stages) == ["match", "prompt", "refine"]
    assert {stage["state"] for stage in stages.values()} == {"done"}
    assert all(stage["started"] <= stage["finished"] for stage in stages.values())
    assert stages["match"]["started"] <= stages["prompt"]["started"] <= stages["refine"]["started"]
    for name in ("match", "prompt"):  # in processes that had old libraries
        assert not any("timm" in note or "torchvision" in note for note in stages[name]["shims"])
    for name in ("match", "refine"):
        assert stages[name]["steps"] == BATCHES * EPOCHS and stages[name]["weights"] == f"{name}.pt"


def test_prompt_stage_went_over_the_loader_once(complete: Complete) -> None:
    stage = read_record(complete.run.out)["stages"]["prompt"]
    labels = toy_module("utils").Photos(3).labels
    assert stage["images"] == NUM_IMAGES and stage["pairs"] == int(labels.sum())


def test_nearest_words_of_the_classes_that_were_seen(complete: Complete) -> None:
    words = read_record(complete.run.out)["stages"]["prompt"]["nearest_words"]
    assert list(words) == ["boat", "train"]
    assert all(len(found) == 5 and all(isinstance(word, str) for word in found) for found in words.values())


@pytest.mark.parametrize("stage", ["match", "refine"])
def test_log_of_terms(stage: str, complete: Complete) -> None:
    lines = read_log(complete.run.out, stage)
    assert [line["step"] for line in lines] == [1, 3, 5]  # --log-every 2
    names = {"step", "match_foreground", "match_background", "loss"} | ({"refine"} if stage == "refine" else set())
    assert all(set(line) == names and all(np.isfinite(list(line.values()))) for line in lines)
    for line in lines:  # the weights of VOC
        total = line["match_foreground"] + 2.4 * line["match_background"] + 0.05 * line.get("refine", 0.0)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_prompt_file_is_one_of_the_package(complete: Complete) -> None:
    path = complete.run.out / "prompts.safetensors"
    refiner = PromptRefiner.load(path, clip=complete.run.clip, image_stats=None)
    assert refiner.classes == CLASSES and refiner.stage == "refine" and refiner.prompts.context.shape == (3, 1, 4, 64)


def test_weights_are_those_of_the_script(complete: Complete) -> None:
    own = complete.run.repo / "ckpt" / "toy.pt"  # the script wrote it in the refine stage last
    refined = complete.run.out / "refine.pt"
    assert same(weights(refined), weights(own))
    content = torch.load(refined, map_location="cpu", weights_only=True)
    assert list(content) == ["model"] and not any(name.startswith("module.") for name in content["model"])
    assert not same(weights(refined), weights(complete.run.out / "match.pt"))


def test_host_folder_has_what_the_script_wrote_and_no_more(complete: Complete) -> None:
    assert complete.host_files == sorted([*listing(TOY), "ckpt/toy.pt", "log.txt"])


def test_output_names_every_stage_and_what_it_does(complete: Complete) -> None:
    first, second = complete.killed.stderr, complete.output
    for line in ("match: starting", "attached to ToyNet", "prompt: starting", "background of boat: ", "refine: starting"):
        assert line in first
    assert "background of bird" not in first
    assert f"ToyNet starts from {complete.run.out / 'match.pt'}" in first
    assert "match: done before, skipped" in second and f"refine: {BATCHES * EPOCHS} steps" in second


# ------------------------------------------------------------------------------------------------ interrupted, again


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_run_has_a_true_record(complete: Complete) -> None:
    assert complete.killed.returncode not in (0, None) and "the same command goes on from here" in complete.killed.stderr
    stages = complete.record_when_killed["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == {"match": "done", "prompt": "done", "refine": "running"}
    assert sorted(complete.files_when_killed) == sorted(set(FILES) - {"refine.pt"})


def test_killed_run_continues_where_it_was(complete: Complete) -> None:
    out, before = complete.run.out, complete.files_when_killed
    assert all(digest(out / name) == before[name] for name in ("match.pt", "match.jsonl", "prompts.safetensors"))
    stages, earlier = read_record(out)["stages"], complete.record_when_killed["stages"]
    assert stages["match"] == earlier["match"] and stages["prompt"] == earlier["prompt"]
    assert "match: starting" not in complete.output and "prompt: starting" not in complete.output


def test_same_seed_gives_the_same_bits(complete: Complete, run: Run, start: Any) -> None:
    """In another folder, without an interruption, and with another working folder of the script."""
    cwd = run.repo.parent / "cwd"
    cwd.mkdir()
    assert start(run.arguments("--cwd", str(cwd))) == 0
    for name in ("match", "refine"):
        assert same(weights(run.out / f"{name}.pt"), weights(complete.run.out / f"{name}.pt"))
        assert read_log(run.out, name) == read_log(complete.run.out, name)
    assert prompts(run.out / "prompts.safetensors") == prompts(complete.run.out / "prompts.safetensors")
    assert listing(cwd) == ["ckpt/toy.pt", "log.txt"] and listing(run.repo) == listing(TOY)


def test_same_seed_gives_the_same_files(run: Run, start: Any) -> None:
    """Not only the same tensors: checksums of weights can be compared."""
    others = [run._replace(out=run.out / name) for name in ("one", "two")]
    pid = os.getpid()
    for number, other in enumerate(others):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda number=number: pid + number)  # as another process
            assert start(other.arguments("--stage", "match")) == 0
    assert digest(others[0].out / "match.pt") == digest(others[1].out / "match.pt")


def test_second_run_has_nothing_to_do(complete: Complete, start: Any, capfd: Any, monkeypatch: Any) -> None:
    before = {name: digest(complete.run.out / name) for name in FILES}
    for name in ("timm", "torchvision"):  # a process that runs no stage has not loaded them
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert start(complete.run.arguments()) == 0
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("semples")] == [
        f"semples: {stage}: done before, skipped" for stage in ("match", "prompt", "refine")
    ]
    assert {name: digest(complete.run.out / name) for name in FILES} == before


@pytest.fixture
def copied(complete: Complete, tmp_path: Path) -> Run:
    """The complete run in a folder that a test may change; its host is the one it was made with."""
    shutil.copytree(complete.run.out, tmp_path / "copied")
    return complete.run._replace(out=tmp_path / "copied")


@pytest.mark.parametrize(
    "ours, script, what",
    [
        (["--seed", "8"], ["train.py"], ["seed was 7, is 8"]),
        (["--mode", "replace"], ["train.py"], ["mode was 'add', is 'replace'"]),
        (["--set", "lambda_area=1"], ["train.py"], ["refiner was", "'lambda_area': 1"]),
        ([], ["train.py", "--epochs", "9"], ["script was ['train.py'], is ['train.py', '--epochs', '9']"]),
        (["--weight", "2", "--prompt-epochs", "3"], ["train.py"], ["prompt_epochs was 2, is 3", "weight was 1.0, is 2.0"]),
    ],
)
@pytest.mark.parametrize("stage", ["all", "refine"])
def test_other_arguments_are_refused(
    stage: str, ours: List[str], script: List[str], what: List[str], copied: Run, start: Any, capsys: Any
) -> None:
    before = {name: digest(copied.out / name) for name in FILES}
    assert start(copied.arguments(*ours, "--stage", stage, script=script)) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in ["holds another run", *what, "--restart"])
    assert "classes was" not in message and "Traceback" not in message
    assert {name: digest(copied.out / name) for name in FILES} == before


def test_other_names_for_clip_are_another_run(run: Run, start: Any, capsys: Any, tmp_path: Path) -> None:
    """The names that CLIP gets for the classes, and their order, belong to the run."""
    path = tmp_path / "names.json"
    orders = [
        {"boat": "ship", "train": "train", "bird": "bird"},
        {"boat": "canoe", "train": "train", "bird": "bird"},
        {"train": "train", "boat": "ship", "bird": "bird"},
    ]
    statuses = []
    for names in orders:
        path.write_text(json.dumps(names), encoding="utf-8")
        statuses.append(start(run._replace(classes=path).arguments("--stage", "match")))
    assert statuses == [0, 1, 1] and "classes was" in capsys.readouterr().err


@pytest.mark.parametrize("option, name", [("--prompts", "prompts.safetensors"), ("--checkpoint", "match.pt")])
def test_other_prompts_or_checkpoints_are_no_finished_run(
    option: str, name: str, copied: Run, start: Any, tmp_path: Path
) -> None:
    """A run that is finished with its own prompts and weights is not finished with others."""
    shutil.copy(copied.out / name, tmp_path / name)
    (copied.out / "refine.pt").unlink()
    status = start(copied.arguments(option, str(tmp_path / name)))
    assert status != 0 or (copied.out / "refine.pt").exists()


@pytest.mark.filterwarnings("ignore:.*should be normalized")
def test_a_tuple_in_the_arguments_is_the_same_run_again(run: Run, start: Any) -> None:
    """A tuple is a list in JSON; the same command must still be the same run."""
    stats = "image_stats=((0.5,0.5,0.5),(0.25,0.25,0.25))"
    arguments = run.arguments("--set", stats, "--stage", "match")
    assert start(arguments) == 0
    assert start(arguments) == 0


def test_restart_forgets_what_the_run_wrote(copied: Run, start: Any, monkeypatch: Any) -> None:
    (copied.out / "notes.txt").write_text("mine")
    (copied.out / "cams").mkdir()
    (copied.out / "cams" / "match.pt").write_text("mine as well")
    left: List[List[str]] = []
    monkeypatch.setattr(command, "run_all", lambda job, *rest: left.append(listing(job.out)) or 0)
    assert start(copied.arguments("--restart", "--seed", "8")) == 0
    assert left == [["cams/match.pt", "notes.txt"]]


def test_restart_of_one_stage_forgets_that_stage(copied: Run, start: Any) -> None:
    (copied.out / "refine.pt").write_bytes(b"old")
    before = {name: digest(copied.out / name) for name in ("match.pt", "match.jsonl", "prompts.safetensors")}
    assert start(copied.arguments("--restart", "--stage", "refine")) == 0
    assert sorted(os.listdir(copied.out)) == FILES
    assert {name: digest(copied.out / name) for name in before} == before
    assert len(weights(copied.out / "refine.pt")) > 5


def test_restart_runs_every_stage_again(copied: Run, start: Any) -> None:
    arguments = copied.arguments("--seed", "8", script=["train.py", "--epochs", "1"])
    assert start(arguments) == 1
    at = arguments.index("--")
    assert start([*arguments[:at], "--restart", *arguments[at:]]) == 0
    record = read_record(copied.out)
    assert record["run"]["seed"] == 8 and {stage["state"] for stage in record["stages"].values()} == {"done"}
    assert record["stages"]["match"]["steps"] == record["stages"]["refine"]["steps"] == BATCHES
    assert sorted(os.listdir(copied.out)) == FILES


def test_restart_keeps_what_the_user_brings(copied: Run, start: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "run_all", lambda *arguments: 0)
    brought = [copied.out / "prompts.safetensors", copied.out / "match.pt"]
    assert start(copied.arguments("--restart", "--prompts", str(brought[0]), "--checkpoint", str(brought[1]))) == 0
    assert all(path.exists() for path in brought)
    with pytest.raises(SystemExit) as stopped:  # the match stage would write over what it starts from
        start(copied.arguments("--restart", "--checkpoint", str(brought[1])))
    assert stopped.value.code == 2 and all(path.exists() for path in brought)


def test_only_rank_0_forgets_a_run_under_torchrun(copied: Run, start: Any, monkeypatch: Any) -> None:
    """A slower rank must not delete what rank 0 has begun to write."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command, "run_stage", lambda *arguments: None)
    assert start(copied.arguments("--restart", "--stage", "match")) == 0
    assert (copied.out / "match.jsonl").exists() and (copied.out / "match.pt").exists()


@pytest.mark.parametrize("content", [b"", b'{"run": {"host": "gen', b"\xff\xfe\x00", b"[]", b"null"])
def test_damaged_record(content: bytes, copied: Run, start: Any, capsys: Any) -> None:
    (copied.out / "record.json").write_bytes(content)
    for stage in ("all", "match"):
        assert start(copied.arguments("--stage", stage)) == 1
        message = capsys.readouterr().err
        assert "record.json" in message and "--restart" in message and "Traceback" not in message
    assert (copied.out / "record.json").read_bytes() == content


def test_record_is_whole_or_as_before(tmp_path: Path) -> None:
    record = Record(tmp_path / "new")
    record.stage("match", state="running")
    before = digest(record.path)
    with pytest.raises(TypeError):
        record.stage("match", state=object())  # fails while it is being written
    assert digest(record.path) == before and os.listdir(record.path.parent) == ["record.json"]
    assert Record(tmp_path / "new").state("match") == "running"


# ------------------------------------------------------------------------------------------------ the stages


def test_match_weights_are_those_of_the_script(run: Run, start: Any) -> None:
    assert start(run.arguments("--stage", "match")) == 0
    assert sorted(os.listdir(run.out)) == ["match.jsonl", "match.pt", "record.json"]
    assert same(weights(run.out / "match.pt"), weights(run.repo / "ckpt" / "toy.pt"))


def test_refine_starts_from_the_checkpoint(copied: Run, run: Run, start: Any) -> None:
    ours = ["--stage", "refine", "--checkpoint", str(copied.out / "match.pt")]
    ours += ["--prompts", str(copied.out / "prompts.safetensors")]
    assert start(run.arguments(*ours, script=["train.py", "--lr", "0"])) == 0
    before, after = weights(copied.out / "match.pt"), weights(run.out / "refine.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("running_" in name or "num_batches" in name for name in moved)  # training goes on: statistics
    assert all("refine" in line for line in read_log(run.out, "refine"))


def test_match_and_refine_can_replace_or_weigh(run: Run, start: Any) -> None:
    results = []
    for number, ours in enumerate([[], ["--weight", "0"], ["--mode", "replace"], ["--weight", "0", "--mode", "replace"]]):
        other = run._replace(out=run.out / str(number))
        assert start(other.arguments("--stage", "match", *ours)) == 0
        results.append(weights(other.out / "match.pt"))
    assert start(run.arguments("--stage", "plain")) == 0
    assert same(results[1], weights(run.repo / "ckpt" / "toy.pt"))  # weight 0: as without the refiner
    assert not any(same(a, b) for i, a in enumerate(results) for b in results[:i])


def test_plain_starts_from_a_checkpoint(run: Run, start: Any, complete: Complete, capsys: Any) -> None:
    given = complete.run.out / "match.pt"
    ours = ["--stage", "plain", "--checkpoint", str(given)]
    assert start(run.arguments(*ours, script=["train.py", "--lr", "0"])) == 0
    names = moved(given, run.repo / "ckpt" / "toy.pt")
    assert names and all("running_" in name or "num_batches" in name for name in names)
    assert start(run.arguments("--stage", "match", "--weight", "0", "--checkpoint", str(given))) == 0
    assert start(run.arguments(*ours)) == 0
    assert same(weights(run.out / "match.pt"), weights(run.repo / "ckpt" / "toy.pt"))
    capsys.readouterr()
    assert start(run.arguments(*ours, script=["tools/where.py"])) == 1
    assert "where.py trained without a network that the adapter 'generic' knows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(run.arguments(*ours, "--branch", str(given)))
    assert "--stage plain takes --checkpoint for a training script or --branch" in capsys.readouterr().err


class Seen(NamedTuple):
    batches: List[Tuple[Tensor, Tensor, Tensor]]
    fits: List[Tuple[Tensor, Tensor]]


@pytest.fixture
def seen(monkeypatch: Any) -> Seen:
    """What the prompt stage gives to the refiner."""
    seen = Seen([], [])
    encode, fit = PromptRefiner.encode_backgrounds, PromptRefiner.fit_prompts_on

    def encode_backgrounds(self: PromptRefiner, img: Tensor, cam: Tensor, labels: Tensor) -> Any:
        seen.batches.append((img.clone(), cam.clone(), labels.clone()))
        return encode(self, img, cam, labels)

    def fit_prompts_on(self: PromptRefiner, features: Tensor, pairs: Tensor, **options: Any) -> Any:
        seen.fits.append((features, pairs))
        return fit(self, features, pairs, **options)

    monkeypatch.setattr(PromptRefiner, "encode_backgrounds", encode_backgrounds)
    monkeypatch.setattr(PromptRefiner, "fit_prompts_on", fit_prompts_on)
    return seen


def test_prompt_stage_sees_the_host_as_match_left_it(complete: Complete, run: Run, start: Any, seen: Seen) -> None:
    run.out.mkdir()
    shutil.copy(complete.run.out / "match.pt", run.out)
    assert start(run.arguments("--stage", "prompt", script=["train.py", "--lr", "0.5"])) == 0
    assert digest(run.out / "match.pt") == digest(complete.run.out / "match.pt")

    photos = toy_module("utils").Photos(3)
    imgs, labels = torch.cat([img for img, _, _ in seen.batches]), torch.cat([labels for _, _, labels in seen.batches])
    order = [int((photos.images == img).flatten(1).all(1).nonzero()) for img in imgs]
    assert sorted(order) == list(range(NUM_IMAGES)) and torch.equal(labels.float(), photos.labels[order])

    model = toy_module("models").ToyNet(3)
    model.load_state_dict(weights(run.out / "match.pt"))
    model.eval()  # dropout and batch statistics are still
    with torch.no_grad():
        for img, cam, _ in seen.batches:
            torch.testing.assert_close(cam, model.head(model.body(model.stem(img))), rtol=1e-5, atol=1e-6)

    found = re.findall(r"weight (\S+)", (run.repo / "log.txt").read_text())
    start_weight = model.head.weight.detach().double().sum().item()
    assert len(found) == BATCHES and all(abs(float(value) - start_weight) > 1e-4 for value in found)  # the optimizer stepped
    assert not (run.repo / "ckpt").exists()  # the script never came to its end


def test_prompt_stage_learns_from_all_pairs(complete: Complete, run: Run, start: Any, seen: Seen) -> None:
    ours = ["--stage", "prompt", "--checkpoint", str(complete.run.out / "match.pt")]
    assert start(run.arguments(*ours)) == 0
    ((features, pairs),) = seen.fits
    labels = torch.cat([labels for _, _, labels in seen.batches])
    assert torch.equal(pairs, labels.nonzero()) and features.shape == (len(pairs), 32)  # images are numbered through
    refiner = PromptRefiner(CLASSES, clip=complete.run.clip, image_stats=None, prompt_length=4, seed=7)
    imgs, cams = (torch.cat([batch[part] for batch in seen.batches]) for part in (0, 1))
    torch.testing.assert_close(features, refiner.encode_backgrounds(imgs, cams, labels)[0], rtol=1e-4, atol=1e-5)
    assert prompts(run.out / "prompts.safetensors") == prompts(complete.run.out / "prompts.safetensors")
    assert sorted(os.listdir(run.out)) == ["prompts.safetensors", "record.json"]


def test_prompt_stage_ends_a_script_that_swallows_everything(run: Run, start: Any, complete: Complete) -> None:
    ours = ["--stage", "prompt", "--checkpoint", str(complete.run.out / "match.pt")]
    assert start(run.arguments(*ours, script=["variants.py", "swallow"])) == 0
    stage = read_record(run.out)["stages"]["prompt"]
    assert stage["state"] == "done" and stage["images"] == NUM_IMAGES


@pytest.mark.parametrize("stage", ["match", "prompt"])
def test_host_that_runs_twice_before_its_backward(stage: str, run: Run, start: Any, complete: Complete) -> None:
    """Two scales, say; the first pass counts, and the second must not find its graph overwritten."""
    ours = ["--stage", stage] + (["--checkpoint", str(complete.run.out / "match.pt")] if stage == "prompt" else [])
    assert start(run.arguments(*ours, script=["variants.py", "twice"])) == 0
    found = read_record(run.out)["stages"][stage]
    assert found["images"] == NUM_IMAGES if stage == "prompt" else found["steps"] == BATCHES


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = self.attention(tokens, tokens, tokens)[0].permute(1, 2, 0)
        return self.head(tokens.reshape(x.shape)).mean((2, 3))


def test_prompt_stage_stills_dropout_in_attention(make_refiner: Any, make_batch: Any) -> None:
    """torch's MultiheadAttention has a child module and applies its dropout itself."""
    model, refiner = Attentive().train(), make_refiner()
    img, _, labels = make_batch()
    with Collector(make_source("generic", cam="head"), refiner) as collector:
        collector.bind(model)
        for _ in range(2):
            torch.nn.functional.multilabel_soft_margin_loss(model(img), labels.float()).backward()
    first, second = collector.features
    assert model.training and torch.equal(first, second)


def test_plain_runs_the_script_with_nothing_attached(complete: Complete, run: Run, start: Any) -> None:
    script = ["infer.py", "--weights", str(complete.run.out / "refine.pt"), "--cam-out", "cams"]
    assert start(run.arguments("--stage", "plain", script=script)) == 0
    assert not run.out.exists()
    files = sorted((run.repo / "cams").iterdir())
    assert [path.name for path in files] == [f"{i}.npy" for i in range(NUM_IMAGES)]
    labels = toy_module("utils").Photos(3).labels
    for path, label in zip(files, labels):
        cams = np.load(path, allow_pickle=True).item()
        assert list(cams) == label.nonzero().flatten().tolist() and all(cam.shape == (8, 8) for cam in cams.values())


# ------------------------------------------------------------------------------------------------ what the user brings


@pytest.mark.parametrize(
    "given, stages",
    [([], ["match", "prompt", "refine"]), (["checkpoint"], ["match", "prompt", "refine"]), (["prompts"], ["refine"])],
)
def test_stages_that_are_not_needed(
    given: List[str], stages: List[str], run: Run, complete: Complete, monkeypatch: Any
) -> None:
    files = {"prompts": complete.run.out / "prompts.safetensors", "checkpoint": complete.run.out / "match.pt"}
    asked: List[Any] = []
    monkeypatch.setattr(command, "run_all", lambda job, stages, command: asked.append((stages, command("refine"))) or 0)
    arguments = run.arguments(*[part for name in given for part in (f"--{name}", str(files[name]))])
    assert command.main(arguments) == 0
    ((found, started),) = asked
    assert found == stages
    at, marks = started.index("--"), arguments.index("--")
    assert started[at:] == arguments[marks:] and started[at - 2 : at] == ["--stage", "refine"]
    assert started[: at - 2] == [sys.executable, "-m", "semples_plugin.adapters", *arguments[:marks]]


def moved(before: Path, after: Path) -> List[str]:
    first, second = weights(before), weights(after)
    return [name for name in first if not torch.equal(first[name], second[name])]


def test_match_and_refine_start_from_the_hosts_own_checkpoint(run: Run, start: Any, complete: Complete) -> None:
    """Its names may be as DataParallel makes them; the prompts are learned with the host that match has trained."""
    own = run.repo.parent / "own.pt"
    torch.save({f"module.{name}": value for name, value in weights(complete.run.out / "match.pt").items()}, own)
    arguments = run.arguments("--checkpoint", str(own), script=["train.py", "--lr", "0"])
    assert start(arguments) == 0 and sorted(os.listdir(run.out)) == FILES
    for stage in ("match", "refine"):
        names = moved(complete.run.out / "match.pt", run.out / f"{stage}.pt")
        assert names and all("running_" in name or "num_batches" in name for name in names)  # batch statistics go on


def test_refine_starts_again_and_not_where_match_ended(complete: Complete, copied: Run, start: Any, run: Run) -> None:
    still = run._replace(out=run.out / "still")
    ours = ["--prompts", str(copied.out / "prompts.safetensors")]
    assert start(still.arguments(*ours, script=["train.py", "--lr", "0"])) == 0
    untrained = weights(still.out / "refine.pt")  # what the script itself starts from
    trained = weights(copied.out / "match.pt")
    assert any(not torch.equal(untrained[name], trained[name]) for name in trained if "running_" not in name)


def test_run_with_prompts(run: Run, start: Any, complete: Complete) -> None:
    given = complete.run.out / "prompts.safetensors"
    before = digest(given)
    assert start(run.arguments("--prompts", str(given))) == 0
    assert sorted(os.listdir(run.out)) == ["record.json", "refine.jsonl", "refine.pt"]
    assert same(weights(run.out / "refine.pt"), weights(complete.run.out / "refine.pt")) and digest(given) == before


def of_another_network(path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), path)


def of_no_network(path: Path) -> None:
    torch.save([1, 2], path)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: path.write_text("no weights"), "no checkpoint of plain weights"),
        (lambda path: torch.save({"model": {}, "args": SimpleNamespace()}, path), "no checkpoint of plain weights"),
        (of_another_network, "does not fit ToyNet"),
        (of_no_network, "must hold a state dict"),
    ],
)
def test_files_that_are_no_checkpoint(write: Any, message: str, run: Run, start: Any, capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "host.pt"
    write(path)
    assert start(run.arguments("--stage", "prompt", "--checkpoint", str(path))) == 1
    found = capsys.readouterr().err
    assert message in found and str(path) in found and "Traceback" not in found
    assert read_record(run.out)["stages"]["prompt"]["state"].startswith("failed: HostError")


def test_prompt_stage_without_trained_weights(run: Run, start: Any, capsys: Any) -> None:
    assert start(run.arguments("--stage", "prompt")) == 1
    message = capsys.readouterr().err
    assert "match.pt" in message and "--stage match" in message and "--checkpoint" in message and "Traceback" not in message


def test_refine_without_prompts(run: Run, start: Any, complete: Complete, capsys: Any) -> None:
    assert start(run.arguments("--stage", "refine", "--checkpoint", str(complete.run.out / "match.pt"))) == 1
    message = capsys.readouterr().err
    assert "prompts.safetensors" in message and "--prompts" in message and "Traceback" not in message
    assert read_record(run.out)["stages"]["refine"]["state"].startswith("failed")


def test_refine_with_prompts_for_other_classes(run: Run, start: Any, complete: Complete, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("boat\ntrain\ncat\n")
    ours = ["--stage", "refine", "--checkpoint", str(complete.run.out / "match.pt")]
    ours += ["--prompts", str(complete.run.out / "prompts.safetensors")]
    assert start(run._replace(classes=tmp_path / "names.txt").arguments(*ours)) == 1
    assert "cat" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ scripts that go wrong


def test_status_of_the_script_is_the_runners(run: Run, start: Any, capfd: Any) -> None:
    with pytest.raises(SystemExit) as leave:
        start(run.arguments("--stage", "match", script=["variants.py", "exit"]))
    assert leave.value.code == 3
    assert read_record(run.out)["stages"]["match"]["state"] == "failed: SystemExit: 3"
    assert not (run.out / "match.pt").exists()
    assert start(run.arguments(script=["variants.py", "exit"])) == 3  # `all` stops there
    assert list(read_record(run.out)["stages"]) == ["match"]
    assert "match ended with status 3" in capfd.readouterr().err


def test_script_that_raises(run: Run, start: Any) -> None:
    with pytest.raises(ZeroDivisionError, match="the host went wrong"):
        start(run.arguments("--stage", "match", script=["variants.py", "raise"]))
    stage = read_record(run.out)["stages"]["match"]
    assert stage["state"] == "failed: ZeroDivisionError: the host went wrong" and stage["finished"] >= stage["started"]
    assert sorted(os.listdir(run.out)) == ["match.jsonl", "record.json"]
    assert start(run.arguments(script=["variants.py", "raise"])) == 1


@pytest.mark.parametrize("stage", ["plain", "match"])
def test_script_that_imports_a_torchvision_for_another_torch(
    stage: str, run: Run, start: Any, capsys: Any, monkeypatch: Any
) -> None:
    """The error says what to reinstall."""
    (run.repo / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (run.repo / "imports.py").write_text("import torchvision\n")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert start(run.arguments("--stage", stage, script=["imports.py"])) == 1
    message = capsys.readouterr().err
    assert "python -m pip install --force-reinstall torch" in message and "Traceback" not in message


def test_script_that_is_interrupted(run: Run, start: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(run.arguments("--stage", "match", script=["variants.py", "interrupt"]))
    assert read_record(run.out)["stages"]["match"]["state"] == "interrupted"


@pytest.mark.parametrize("stage", ["match", "prompt"])
def test_script_that_trains_another_model(stage: str, run: Run, start: Any, complete: Complete, capsys: Any) -> None:
    ours = ["--stage", stage] + (["--checkpoint", str(complete.run.out / "match.pt")] if stage == "prompt" else [])
    assert start(run.arguments(*ours, script=["variants.py", "unknown"])) == 1
    message = capsys.readouterr().err
    assert "variants.py" in message and "'generic'" in message and "Headless, Linear" in message and "Traceback" not in message
    assert read_record(run.out)["stages"][stage]["state"].startswith("failed: HostError")


def test_script_that_trains_nothing(run: Run, start: Any, capsys: Any) -> None:
    assert start(run.arguments("--stage", "match", script=["tools/where.py"])) == 1
    message = capsys.readouterr().err
    assert "Modules that ran in training mode: none" in message and "Is this the training script" in message


@pytest.mark.parametrize("stage", ["match", "prompt"])
def test_script_without_a_label_loss(stage: str, run: Run, start: Any, complete: Complete, capsys: Any) -> None:
    ours = ["--stage", stage] + (["--checkpoint", str(complete.run.out / "match.pt")] if stage == "prompt" else [])
    assert start(run.arguments(*ours, script=["variants.py", "no_loss"])) == 1
    message = capsys.readouterr().err
    assert "label loss" in message and "multilabel_soft_margin_loss" in message and "Traceback" not in message
    assert not (run.out / "match.pt").exists() and not (run.out / "prompts.safetensors").exists()


# ------------------------------------------------------------------------------------------------ dry run, several networks


def test_dry_run_prints_a_page_and_writes_no_weights(run: Run, start: Any, capsys: Any) -> None:
    assert start(run.arguments("--dry-run", "2")) == 0
    page = capsys.readouterr().out
    expected = [
        "network: ToyNet, ",
        "steps: 2; 3 images of 32 x 32, 3 rows of labels",
        "CAM: (3, 3, 8, 8)",
        "labels: the target of the label loss",
        "loss: added at multilabel_soft_margin_loss, binary_cross_entropy_with_logits, binary_cross_entropy; the first was ",
        "reached: stem (",
        "losses seen: multilabel_soft_margin_loss with targets tensor (3, 3)",
        "label losses of other networks: none",
    ]
    assert [text for text in expected if text not in page] == []
    assert not run.out.exists()


def test_dry_run_of_a_script_without_a_network_or_a_label_loss(run: Run, start: Any, capsys: Any) -> None:
    assert start(run.arguments("--dry-run", script=["variants.py", "unknown"])) == 1
    printed = capsys.readouterr()
    assert "network: none. variants.py trained without a network that the adapter 'generic' knows" in printed.out
    assert "error: variants.py trained without" in printed.err
    assert start(run.arguments("--dry-run", script=["variants.py", "no_loss"])) == 1
    assert "steps: none. " in capsys.readouterr().out


def test_a_second_network_is_attached_or_named_or_allowed(run: Run, start: Any, capsys: Any) -> None:
    script = ["variants.py", "two"]
    assert start(run.arguments("--stage", "match", script=script)) == 1
    message = capsys.readouterr().err
    assert "variants.py also trained another network: 3 label losses over the 3 classes" in message
    assert "--attach" in message and (run.out / "match.pt").exists()
    run = run._replace(out=run.out / "allowed")
    assert start(run.arguments("--stage", "match", "--allow-others", script=script)) == 0
    run = run._replace(out=run.out / "both")
    both = ["--network", "ToyNet", "--attach", "generic cam=head network=Second"]
    assert start(run.arguments("--stage", "match", *both, script=script)) == 0
    stage = read_record(run.out)["stages"]["match"]
    assert stage["networks"] == ["ToyNet", "Second"] and stage["steps"] == 3
    assert not same(weights(run.out / "match.pt"), weights(run.out / "match.2.pt"))
    assert len(read_log(run.out, "match.2")) == len(read_log(run.out, "match")) == 2
    assert read_record(run.out)["run"]["attach"][0]["network"] == "Second"
    assert start(run.arguments("--stage", "prompt", *both, script=script)) == 0
    assert start(run.arguments("--stage", "refine", *both, script=script)) == 0
    assert "refine" in read_log(run.out, "refine.2")[0]


def test_labels_from_the_loader(run: Run, start: Any) -> None:
    """The whole chain for a host without a loss over classes."""
    script = ["variants.py", "pixels"]
    assert start(run.arguments("--labels", "loader", script=script)) == 0
    assert read_record(run.out)["run"]["labels"] == "loader" and read_record(run.out)["stages"]["refine"]["steps"] == 3


def labels_of(capture: Any) -> Tensor:
    return torch.tensor([[1, 0, 0]]).repeat(len(capture.img), 1)


def test_sources_and_functions_of_the_users_own(run: Run, start: Any, capsys: Any) -> None:
    own = f"{Generic.__module__}:{Generic.__name__}"
    ours = ["--source", own, "--labels", f"{__name__}:labels_of", "--label-loss", "cross_entropy", "--dry-run"]
    assert start(run.arguments(*ours, script=["variants.py", "pixels"])) == 0
    page = capsys.readouterr().out
    assert "labels: the function labels_of" in page and "loss: added at cross_entropy" in page
    for wrong in ("--source", "semples_plugin.adapters.generic:Missing"), ("--labels", "nowhere.at_all:function"):
        with pytest.raises(SystemExit):
            start(run.arguments(*wrong))
        assert f"{wrong[0]} must be package.module:name that Python can import from here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start(run.arguments("--source", "collections:OrderedDict"))
    assert "--source must name a CamSource; collections:OrderedDict gives OrderedDict" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ wrong arguments


def without_mark(arguments: List[str]) -> List[str]:
    return [part for part in arguments if part != "--"]


@pytest.mark.parametrize(
    "ours, script, message",
    [
        (["--set", "lambda_area"], None, "--set takes NAME=VALUE; got 'lambda_area'"),
        (["--set", "2=3"], None, "--set takes NAME=VALUE"),
        (["--host-option", "cam"], None, "--host-option takes NAME=VALUE"),
        (["--host-option", "camera=head"], None, "camera"),
        (["--host-option", "features=body"], None, "Say where the CAM comes from"),
        (["--stage", "train"], None, "invalid choice: 'train'"),
        (["--mode", "multiply"], None, "invalid choice: 'multiply'"),
        (["--log-every", "0"], None, "--log-every must be at least 1"),
        (["--prompt-epochs", "0"], None, "prompt-epochs"),
        (["--set", "seed=5"], None, "--set seed and --set epochs have options of their own"),
        (["--prompt-epochs", "3", "--set", "epochs=5"], None, "--set seed and --set epochs have options of their own"),
        (["--weight", "-1"], None, "weight"),
        (["--weight", "nan"], None, "weight"),
        (["--prompts", "none.safetensors"], None, "--prompts: there is no file none.safetensors"),
        (["--checkpoint", "none.pt"], None, "--checkpoint: there is no file none.pt"),
        (["--cwd", "none"], None, "--cwd: there is no folder none"),
        (["--classes", "none.txt"], None, "The class names must be voc, coco or a readable file; got 'none.txt'"),
        ([], [], "Give the host's script and its arguments after --"),
        ([], ["main.py"], "There is no main.py in"),
        ([], ["tools"], "There is no tools in"),
    ],
)
def test_wrong_arguments(
    ours: List[str], script: Optional[List[str]], message: str, run: Run, start: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(command, "run_all", None)
    with pytest.raises(SystemExit) as leave:
        start(run.arguments(*ours, script=["train.py"] if script is None else script))
    error = capsys.readouterr().err
    assert leave.value.code == 2 and message in error and "usage: python -m semples_plugin.adapters" in error
    assert not run.out.exists()


def test_arguments_without_the_mark(run: Run, start: Any, capsys: Any) -> None:
    arguments = run.arguments()
    for given in (arguments[: arguments.index("--")], without_mark(arguments)):
        with pytest.raises(SystemExit) as leave:
            start(given)
        assert leave.value.code == 2 and "usage: " in capsys.readouterr().err


def test_unknown_host(run: Run, start: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as leave:
        start(["mctformers", *run.arguments()[1:]])
    assert leave.value.code == 2 and "mctformer" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, message",
    [
        ("lambda_aera=1", "has no option 'lambda_aera'; did you mean 'lambda_area'?"),
        ("lambda_area=much", "`lambda_area` must be a number; got 'much'"),
        ("eps=0", "`eps` must be at least 1e-12"),
        ("repel=both", "`repel` must be 'log' or 'log1m'; got 'both'"),
    ],
)
def test_wrong_settings_of_the_refiner(setting: str, message: str, run: Run, start: Any, capsys: Any) -> None:
    """They are refused before anything runs, in a line and not in a traceback."""
    with pytest.raises(SystemExit) as leave:
        start(run.arguments("--stage", "match", "--set", setting))
    error = capsys.readouterr().err
    assert leave.value.code == 2 and message in error and "Traceback" not in error
    assert not run.out.exists()


@pytest.mark.parametrize("setting", ["background_texts={'a lake.'}", "background_texts=[b'a lake.']", "eps=1e999"])
def test_settings_that_no_record_can_hold(setting: str, run: Run, start: Any, capsys: Any) -> None:
    with contextlib.suppress(SystemExit):
        assert start(run.arguments("--stage", "match", "--set", setting)) == 1
    assert "error: " in capsys.readouterr().err
    if run.out.exists():
        read_record(run.out)


def test_online_is_one_stage(run: Run, start: Any) -> None:
    assert start(run.arguments("--set", "online_steps=3")) == 0
    assert sorted(os.listdir(run.out)) == ["online.jsonl", "online.pt", "prompts.safetensors", "record.json"]
    stages_of = read_record(run.out)["stages"]
    assert list(stages_of) == ["online"] and stages_of["online"]["steps"] == BATCHES * EPOCHS
    lines = read_log(run.out, "online")
    assert all(set(line) == {"step", "match_foreground", "match_background", "refine", "prompt", "loss"} for line in lines)
    refiner = PromptRefiner.load(run.out / "prompts.safetensors", clip=run.clip, image_stats=None)
    assert refiner.stage == "refine" and refiner.config.online_steps == 3
    before = refiner.prompts.initial()
    assert not torch.equal(refiner.prompts.context[0], before[0]) and refiner.prompts.alive[2].tolist() == [False]  # no bird


@pytest.mark.parametrize("arguments", [("--stage", "online"), ("--stage", "match", "--set", "online_steps=3")])
def test_online_and_the_three_stages_do_not_mix(arguments: Tuple[str, ...], run: Run, start: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        start(run.arguments(*arguments))
    error = capsys.readouterr().err
    assert "--set online_steps=N learns the prompts along the way, in the one stage online; got --stage" in error


def test_all_is_refused_under_torchrun(run: Run, start: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run.out.mkdir()
    (run.out / "match.pt").write_text("an earlier run")
    with pytest.raises(SystemExit) as leave:
        start(run.arguments("--restart"))
    assert leave.value.code == 2
    assert "under torchrun run --stage match, prompt and refine in turn" in capsys.readouterr().err
    assert listing(run.out) == ["match.pt"]  # refused before anything was deleted


def test_help_names_every_option(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as leave:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert leave.value.code == 0 and text.startswith("usage: python -m semples_plugin.adapters HOST --repo DIR")
    assert all(len(line) <= 130 for line in text.splitlines()) and "%(" not in text
    for option in command.make_parser()._actions:
        assert option.help and all(name in text for name in option.option_strings)
    for word in ("match", "prompt", "refine", "plain", "generic", "mctformer", "transcam", "weaktr", "voc|coco|FILE"):
        assert word in text


# ------------------------------------------------------------------------------------------------ classes


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("names.txt", "boat\n\n train \nbird", (["boat", "train", "bird"], ["boat", "train", "bird"])),
        ("names", "traffic light\nbird\n", (["traffic light", "bird"], ["traffic light", "bird"])),
        ("names.json", '["boat", "bird"]', (["boat", "bird"], ["boat", "bird"])),
        ("names.json", '{"tvmonitor": "tv monitor", "bird": "bird"}', (["tvmonitor", "bird"], ["tv monitor", "bird"])),
    ],
)
def test_classes_from_a_file(name: str, text: str, expected: Any, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    jobs: List[Any] = []
    monkeypatch.setattr(command, "run_stage", lambda job, stage: jobs.append(job))
    assert command.main(run._replace(classes=tmp_path / name).arguments("--stage", "match")) == 0
    refiner = jobs[0].refiner()
    assert (refiner.classes, refiner.prompt_names) == expected


@pytest.mark.parametrize("name, count, config", [("voc", 20, VOC), ("coco", 80, COCO), ("COCO", 80, COCO)])
def test_classes_and_configuration_of_the_benchmarks(
    name: str, count: int, config: RefinerConfig, run: Run, monkeypatch: Any
) -> None:
    jobs: List[Any] = []
    monkeypatch.setattr(command, "run_stage", lambda job, stage: jobs.append(job))
    assert command.main(run._replace(classes=Path(name)).arguments("--stage", "match")) == 0
    expected = config.replace(seed=7, image_stats=None, prompt_length=4)
    assert len(jobs[0].facts["classes"]) == count and jobs[0].facts["refiner"] == expected.as_dict()
    assert jobs[0].refiner().config == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("names.json", b"[", "names.json is not readable JSON"),
        ("names.json", b'"boat"', "must hold a list of names, or a mapping"),
        ("names.json", b'["boat", 2]', "2"),
        ("names.json", b'["boat", "boat"]', "'boat' more than once"),
        ("names.txt", b"\n\n", "at least one name"),
        ("names.txt", b"\xff\xfe\x00\x01", "names.txt"),
        ("names.txt", None, "names.txt"),
    ],
)
def test_classes_from_a_bad_file(
    name: str, content: Optional[bytes], message: str, run: Run, start: Any, capsys: Any, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as leave:
        start(run._replace(classes=path).arguments())
    error = capsys.readouterr().err
    assert leave.value.code == 2 and message in error and "Traceback" not in error
    assert not run.out.exists()


# ------------------------------------------------------------------------------------------------ the host's process


def surroundings() -> Dict[str, Any]:
    timm = sys.modules.get("timm")
    return {
        "cwd": os.getcwd(),
        "argv": list(sys.argv),
        "path": list(sys.path),
        "main": id(sys.modules["__main__"]),
        "bytecode": sys.dont_write_bytecode,
        "iter": DataLoader.__iter__,
        "load": torch.load,
        "cuda": [torch.cuda.is_available, torch.cuda.synchronize],
        "timm": None if timm is None else [timm.create_model, timm.models.create_model],
        "hooks": [
            len(vars(nn.modules.module)["_global_forward_pre_hooks"]),
            len(vars(nn.modules.module)["_global_forward_hooks"]),
        ],
        "grad": torch.is_grad_enabled(),
        "modes": getattr(torch.overrides, "_get_current_function_mode_stack", list)(),
    }


@pytest.mark.parametrize(
    "stage, script",
    [
        ("plain", ["tools/where.py"]),
        ("match", ["train.py", "--epochs", "1"]),
        ("prompt", ["train.py", "--epochs", "1"]),
        ("refine", ["train.py", "--epochs", "1"]),
        ("plain", ["variants.py", "exit"]),
        ("match", ["variants.py", "raise"]),
        ("prompt", ["variants.py", "raise"]),
        ("prompt", ["variants.py", "interrupt"]),
        ("refine", ["variants.py", "exit"]),
        ("refine", ["variants.py", "no_loss"]),
    ],
)
def test_a_stage_leaves_the_process_as_it_was(
    stage: str, script: List[str], run: Run, complete: Complete, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    out = complete.run.out
    ours = ["--stage", stage, "--checkpoint", str(out / "match.pt"), "--prompts", str(out / "prompts.safetensors")]
    if stage in ("prompt", "plain"):
        ours = ours[: 4 if stage == "prompt" else 2]
    jobs: List[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(command, "run_stage", lambda *job: jobs.append(job))
        command.main(run.arguments(*ours, script=script))
    with compat.old_libraries():
        pass  # loads the libraries that it is about
    before = surroundings()
    went = "well"
    try:
        stages.run_stage(*jobs[0])
    except (SystemExit, ZeroDivisionError, KeyboardInterrupt, HostError) as error:
        went = type(error).__name__
    finally:
        forget_host(tmp_path)
    assert surroundings() == before
    expected = {"exit": "SystemExit", "raise": "ZeroDivisionError", "interrupt": "KeyboardInterrupt", "no_loss": "HostError"}
    assert went == expected.get(script[-1], "well")
    assert not list(run.repo.rglob("__pycache__"))


def test_script_runs_as_from_the_shell(run: Run, start: Any) -> None:
    script = ["tools/where.py", "--name", "two words", "--", "--stage", "match"]
    assert start(run.arguments("--stage", "plain", script=script)) == 0
    facts = json.loads((run.repo / "where.json").read_text())
    assert facts["cwd"] == str(run.repo) and facts["name"] == "__main__"
    assert Path(facts["argv"][0]).name == "where.py" and facts["argv"][1:] == script[1:]
    assert Path(facts["file"]).resolve() == run.repo / "tools" / "where.py"
    assert facts["path"][0] == str(run.repo / "tools") and str(run.repo) not in facts["path"]


def test_seed_reaches_every_generator(run: Run, start: Any) -> None:
    script = "import random, json, numpy, torch\n" + (
        "json.dump([random.random(), numpy.random.rand(), torch.rand(1).item()], open('numbers.json', 'w'))\n"
    )
    (run.repo / "numbers.py").write_text(script)
    found = []
    for seed in ("3", "3", "4", str(2**32 + 3)):
        assert start(run.arguments("--stage", "plain", "--seed", seed, script=["numbers.py"])) == 0
        found.append(json.loads((run.repo / "numbers.json").read_text()))
    assert found[0] == found[1] and not set(found[0]) & set(found[2])


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_record_names_the_hosts_commit(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(run.repo.parent))
    assert commit(run.repo) == {"commit": None, "changed_files": None}
    git = ["git", "-C", str(run.repo), "-c", "user.name=toy", "-c", "user.email=toy@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "toy"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    found = commit(run.repo)
    assert re.fullmatch("[0-9a-f]{40,64}", found["commit"]) and found["changed_files"] == []
    (run.repo / "utils.py").write_text("changed = True\n")
    (run.repo / "log.txt").write_text("the host's own output is no change\n")
    assert commit(run.repo) == {"commit": found["commit"], "changed_files": [" M utils.py"]}
