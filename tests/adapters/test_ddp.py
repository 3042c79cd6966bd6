"""`attach` around the loop of a host in DistributedDataParallel: two processes that stay equal, with a cluster branch too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import pytest
import torch

import semples_plugin


def run(script: str, folder: Path, ranks: Sequence[int]) -> None:
    """The processes of a worker of this folder, side by side; all of them must succeed."""
    root = str(Path(semples_plugin.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    worker = str(Path(__file__).with_name(script))
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(ranks), "\n".join(errors)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> List[Dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    run("ddp_attach_worker.py", folder, range(2))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("toy", ["mctformer", "cnn"])
def test_two_processes_stay_equal(toy: str, mode: str, ranks: List[Dict[str, Any]]) -> None:
    a, b = (rank[f"{toy} {mode}"] for rank in ranks)
    for stage in ("start", "match", "refine"):
        assert all(torch.equal(value, b[stage][name]) for name, value in a[stage].items()), stage
        assert all(bool(value.isfinite().all()) for value in a[stage].values())
    for before, after in (("start", "match"), ("match", "refine")):
        moved = [name for name, value in a[before].items() if not torch.equal(value, a[after][name])]
        assert len(moved) > len(a[before]) // 2
    assert torch.equal(a["context"], b["context"]) and a["pairs"] == b["pairs"] == 9
    assert len(a["terms"]) == len(b["terms"]) == 4 and "refine" not in a["terms"][1] and "refine" in a["terms"][2]
    assert all(terms["loss"] > 0 for terms in a["terms"]) and [t["loss"] > 0 for t in b["terms"]] == [True, False] * 2
    assert a["terms"][0] != b["terms"][0]  # each process has images of its own
    assert a["left"] == b["left"] == []


def test_add_and_replace_give_different_weights(ranks: List[Dict[str, Any]]) -> None:
    for toy in ("mctformer", "cnn"):
        add, replace = (ranks[0][f"{toy} {mode}"]["match"] for mode in ("add", "replace"))
        assert any(not torch.equal(value, replace[name]) for name, value in add.items())
    bias = [ranks[0]["cnn replace"][stage]["fc.bias"] for stage in ("start", "match")]
    assert torch.allclose(*bias, rtol=1e-3)  # only weight decay moves what the refiner does not reach
    assert not torch.allclose(*(ranks[0]["cnn add"][stage]["fc.bias"] for stage in ("start", "match")), rtol=1e-3)


def test_a_decoder_without_a_label_loss_in_two_processes(ranks: List[Dict[str, Any]]) -> None:
    """Labels from the loader, the loss at backward() under a gradient scaler, the network found by itself."""
    a, b = (rank["decoder"] for rank in ranks)
    assert all(torch.equal(value, b["end"][name]) for name, value in a["end"].items())
    assert all(not torch.equal(value, a["start"][name]) for name, value in a["end"].items())
    assert len(a["terms"]) == len(b["terms"]) == 3 and all(x["loss"] != y["loss"] for x, y in zip(a["terms"], b["terms"]))


# ------------------------------------------------------------------------------------------------ a cluster branch


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> List[Dict[str, Any]]:
    """Both ranks, and a single process on the joint batches."""
    folder = tmp_path_factory.mktemp("ddp_clusters")
    run("ddp_clusters_worker.py", folder, (0, 1, -1))
    return [torch.load(folder / name) for name in ("rank0.pt", "rank1.pt", "single.pt")]


def distance(a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]) -> float:
    """Largest difference of any parameter."""
    assert a.keys() == b.keys() and all(bool(value.isfinite().all()) for value in a.values())
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


@pytest.mark.parametrize("case", ["joint", "scaled"])
def test_a_branch_of_two_processes_is_that_of_one(case: str, clustered: List[Dict[str, Any]]) -> None:
    a, b, single = clustered[0][case], clustered[1][case], clustered[2]["joint"]
    assert a["steps"] == b["steps"] == single["steps"] == 3
    for part in ("branch", "host"):
        apart = distance(a[part], single[part])
        print(f"{case} {part}: two processes differ from one by {apart:.2g}")
        assert distance(a[part], b[part]) == 0 and apart <= 1e-5
    assert all(not torch.equal(value, a["start"][name]) for name, value in a["branch"].items())


def test_two_processes_with_a_refiner_contrast_and_dropout_stay_equal(clustered: List[Dict[str, Any]]) -> None:
    a, b = (rank["everything"] for rank in clustered[:2])
    assert a["steps"] == b["steps"] == 6
    assert distance(a["branch"], b["branch"]) == distance(a["host"], b["host"]) == 0
    assert distance(a["branch"], a["start"]) > 1e-2
    assert all({"match_foreground", "cluster_tokens", "mce", "patch_contrast"} <= terms.keys() for terms in a["terms"])
    assert a["terms"][0] != b["terms"][0]  # each process has images of its own
    assert b["terms"][1]["match_foreground"] == 0 < b["terms"][1]["mce"]


def test_both_processes_leave_out_a_step_that_is_infinite_in_one(clustered: List[Dict[str, Any]]) -> None:
    a, b = (rank["overflow"] for rank in clustered[:2])
    assert a["steps"] == b["steps"] == {2}
    assert [distance(*pair) for pair in zip(a["branch"], b["branch"])] == [0] * 4
    moved = [distance(*pair) > 0 for pair in zip(a["branch"], a["branch"][1:])]
    assert moved == [True, False, True]
