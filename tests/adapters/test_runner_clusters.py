"""The runner with `--clusters`: a host's transformer trains with a cluster branch, which is put back into it for CAMs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import pytest
import torch
from torch import nn

from semples_plugin.adapters import __main__ as command
from semples_plugin.clusters.branch import ClusterBranch

TOY = Path(__file__).parent / "toy_repo"
CLUSTERS = {"vehicles": ["boat", "train"], "animals": ["bird"]}
TERMS = {"step", "loss", "match_foreground", "match_background", "cluster_tokens", "mce", "patch_contrast"}


class Run(NamedTuple):
    folder: Path
    errors: str

    @property
    def out(self) -> Path:
        return self.folder / "out"


def arguments(folder: Path, *ours: str, script: Sequence[str] = ("vit.py", "train")) -> List[str]:
    return [
        *("generic", "--repo", str(folder / "host"), "--out", str(folder / "out"), "--clip", str(folder / "clip.pt")),
        *("--classes", str(folder / "classes.txt"), "--host-option", "cam=head", "--set", "image_stats=None"),
        *("--set", "prompt_length=4", "--prompt-epochs", "2", "--log-every", "1", "--seed", "7", "--cpu"),
        *ours,
        "--",
        *script,
    ]


def start(folder: Path, *ours: str, script: Sequence[str] = ("vit.py", "train")) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-W", "ignore", "-m", "semples_plugin.adapters", *arguments(folder, *ours, script=script)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(aligned_clip: nn.Module, tmp_path_factory: Any) -> Path:
    found: Path = tmp_path_factory.mktemp("clusters")
    shutil.copytree(TOY, found / "host", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    torch.save(aligned_clip.state_dict(), found / "clip.pt")
    (found / "classes.txt").write_text("boat\ntrain\nbird\n", encoding="utf-8")
    (found / "clusters.json").write_text(json.dumps(CLUSTERS), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """All three stages, each in a process of its own."""
    done = start(folder, "--clusters", str(folder / "clusters.json"), "--branch-option", "top_k=3", "--cluster-prompts")
    assert done.returncode == 0, done.stderr[-4000:]
    return Run(folder, done.stderr)


def lines(path: Path) -> List[Dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_leaves_its_branch(run: Run) -> None:
    first, last = (ClusterBranch.load(run.out / f"{stage}.clusters.safetensors") for stage in ("match", "refine"))
    assert first.clusters == last.clusters and first.top_k == last.top_k == 3
    assert first.size == 8 and set(first.clusters.names) == set(CLUSTERS)
    start = ClusterBranch(first.clusters, 8, **first.options)
    for branch in (first, last):
        moved = [not torch.equal(a, b) for a, b in zip(branch.state_dict().values(), start.state_dict().values())]
        assert all(moved)
    assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), last.state_dict().values()))


def test_the_logs_hold_the_terms_of_both(run: Run) -> None:
    assert [set(line) for line in lines(run.out / "match.jsonl")] == [TERMS] * 3
    assert [set(line) for line in lines(run.out / "refine.jsonl")] == [TERMS | {"refine"}] * 3


def test_the_record_says_what_was_attached(run: Run) -> None:
    record = json.loads((run.out / "record.json").read_text(encoding="utf-8"))
    found = record["run"]["clusters"]
    assert found == {"members": CLUSTERS, "options": {"seed": 7, "top_k": 3}, "lr": 1e-3}
    assert record["run"]["refiner"]["clusters"] == CLUSTERS
    assert [record["stages"][stage]["state"] for stage in ("match", "prompt", "refine")] == ["done"] * 3


def test_other_clusters_are_another_run(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"one": ["boat", "bird"], "two": ["train"]}), encoding="utf-8")
    done = start(run.folder, "--clusters", str(other), "--branch-option", "top_k=3", "--cluster-prompts")
    assert done.returncode == 1 and "holds another run: clusters was" in done.stderr


def test_plain_with_the_branch_gives_the_cams_of_the_trained_network(run: Run) -> None:
    cams = {}
    script = ["vit.py", "infer", str(run.out / "refine.pt")]
    for name, ours in (("with", ["--branch", str(run.out / "refine.clusters.safetensors")]), ("without", [])):
        done = start(run.folder, "--stage", "plain", *ours, script=script)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("refine.clusters.safetensors is in ToyViT" in done.stderr) == (name == "with")
        cams[name] = torch.load(run.folder / "host" / "cams.pt", weights_only=True)
    assert cams["with"].shape == cams["without"].shape == (8, 3, 4, 4)
    assert (cams["with"] - cams["without"]).abs().max() > 1e-4

    sys.path.insert(0, str(run.folder / "host"))  # the same by hand
    argv, sys.argv = sys.argv, script
    cwd = Path.cwd()
    try:
        os.chdir(run.folder)
        import importlib.util

        spec = importlib.util.spec_from_file_location("semples_toy_vit", run.folder / "host" / "vit.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        from semples_plugin.adapters.runner.compat import on_cpu

        with on_cpu():
            spec.loader.exec_module(module)
        branch = ClusterBranch.load(run.out / "refine.clusters.safetensors").eval()
        with torch.no_grad(), branch.insert(module.model):
            by_hand = torch.cat([module.model(img[None], return_cam=True) for img, _ in module.Photos(3)])
    finally:
        os.chdir(cwd)
        sys.argv = argv
        sys.path.remove(str(run.folder / "host"))
        sys.modules.pop("utils", None)
    assert torch.allclose(by_hand, cams["with"], atol=1e-6)


def test_tokens_that_only_read(folder: Path, tmp_path: Path) -> None:
    """`attention_bias=-inf` by the command line, and the trained branch in a script without any option for a CAM."""
    line = arguments(
        folder, "--clusters", str(folder / "clusters.json"), "--stage", "match", "--branch-option", "attention_bias=-inf"
    )
    line[line.index("--out") + 1] = str(tmp_path / "out")
    start = [sys.executable, "-W", "ignore", "-m", "semples_plugin.adapters"]
    done = subprocess.run([*start, *line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    branch = tmp_path / "out" / "match.clusters.safetensors"
    assert ClusterBranch.load(branch).options["attention_bias"] == float("-inf")
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert record["run"]["clusters"]["options"]["attention_bias"] == "-inf"
    cams = []
    for ours in ([], ["--branch", str(branch)]):
        plain = ["generic", "--repo", str(folder / "host"), "--stage", "plain", "--cpu", *ours, "--", "vit.py", "infer"]
        done = subprocess.run([*start, *plain, str(tmp_path / "out" / "match.pt")], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        cams.append(torch.load(folder / "host" / "cams.pt", weights_only=True))
    assert torch.allclose(*cams, atol=1e-6)


def test_a_network_without_blocks_is_refused(folder: Path, tmp_path: Path) -> None:
    line = arguments(folder, "--clusters", str(folder / "clusters.json"), "--stage", "match", script=("train.py",))
    line[line.index("--out") + 1] = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "semples_plugin.adapters", *line], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Cluster tokens need a list of transformer blocks 'blocks' in ToyNet" in done.stderr
    assert not (tmp_path / "out" / "match.pt").exists()


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (["--branch", "FOLDER/clusters.json"], "--branch is for --stage plain"),
        (["--cluster-prompts"], "need --clusters FILE"),
        (["--branch-option", "top_k=2"], "need --clusters FILE"),
        (["--clusters", "FOLDER/none.json"], "No cluster file at"),
        (["--clusters", "FOLDER/classes.txt"], "must end in .json; got 'classes"),
        (["--clusters", "FOLDER/clusters.json", "--classes", "voc"], "In no cluster: 'aeroplane'"),
        (["--clusters", "voc"], "'aeroplane' in cluster 'vehicles' is not one of the classes"),
        (["--clusters", "FOLDER/clusters.json", "--stage", "plain"], "--stage plain trains nothing"),
        (
            ["--clusters", "FOLDER/clusters.json", "--branch-option", "lamda_mce=0"],
            "must name one of lambda_tokens, .*got 'lamda_mce'",
        ),
        (["--clusters", "FOLDER/clusters.json", "--branch-option", "lambda_mce=0"], "`lambda_contrast` needs `lambda_mce`"),
        (["--clusters", "FOLDER/clusters.json", "--branch-option", "bilstm=false"], "`bilstm` must be True or False"),
        (["--clusters", "FOLDER/clusters.json", "--branch-lr", "-1"], "--branch-lr"),
    ],
)
def test_wrong_options(folder: Path, capsys: Any, ours: List[str], message: str) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments(folder, *(part.replace("FOLDER", str(folder)) for part in ours)))
    said = capsys.readouterr().err
    assert message in said or re.search(message, said, re.S)
