"""`attach` around the loop of a host in DistributedDataParallel: two processes that stay equal through all three stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

import semples_plugin


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> List[Dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    root = str(Path(semples_plugin.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    worker = str(Path(__file__).with_name("ddp_attach_worker.py"))
    processes = [
        subprocess.Popen([sys.executable, worker, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
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


def test_the_modes_differ(ranks: List[Dict[str, Any]]) -> None:
    for toy in ("mctformer", "cnn"):
        add, replace = (ranks[0][f"{toy} {mode}"]["match"] for mode in ("add", "replace"))
        assert any(not torch.equal(value, replace[name]) for name, value in add.items())
    bias = [ranks[0]["cnn replace"][stage]["fc.bias"] for stage in ("start", "match")]
    assert torch.allclose(*bias, rtol=1e-3)  # only weight decay moves what the refiner does not reach
    assert not torch.allclose(*(ranks[0]["cnn add"][stage]["fc.bias"] for stage in ("start", "match")), rtol=1e-3)
