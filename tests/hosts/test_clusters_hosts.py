"""A cluster branch in MCTformer, WeakTr and timm's own transformer: each ran in clusters_worker.py, once per session."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

REFINER = {"match_foreground", "match_background"}
BRANCH = {"cluster_tokens", "mce", "patch_contrast"}


@pytest.fixture(params=["mctformer", "weaktr"])
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def seen(hosts: Any, name: str, tmp_path: Path) -> Dict[str, Any]:
    return hosts.work("clusters_worker.py", name, tmp_path)


def test_tokens_that_only_read_leave_the_hosts_outputs(seen: Dict[str, Any]) -> None:
    for case, found in seen["passive"].items():
        print(f"{case}: differs by {found['difference']:.2g}, largest {found['largest']:.3g}")
        assert found["same shapes"] and found["difference"] <= 1e-6 < found["largest"]
    assert len(seen["passive"]) == 4 and len(seen["passive"]["training"]["shapes"]) >= 3 + 12  # attention of every block


@pytest.mark.parametrize("case", ["outputs free", "branch free"])
def test_gradients_reach_the_tokens_and_the_blocks(case: str, seen: Dict[str, Any]) -> None:
    reach = seen["reach"][case]
    print(f"{case}: gradient of the tokens {reach['tokens']:.3g}")
    assert reach["finite"] and reach["tokens"] > 0
    assert reach["blocks"] == 12 * 12 and reach["blocks missed"] == []  # norms, attention and MLP of every block
    if case == "branch free":
        assert reach["branch missed"] == []


def test_nothing_flows_back_with_a_bias_of_minus_infinity(seen: Dict[str, Any]) -> None:
    assert seen["reach"]["outputs never"]["tokens"] == 0
    never = seen["reach"]["branch never"]
    assert never["finite"] and never["tokens"] > 0 and never["branch missed"] == never["blocks missed"] == []


def test_a_branch_trains_in_the_hosts_own_loop(seen: Dict[str, Any]) -> None:
    ran = seen["training"]
    assert ran["steps"] == ran["batches"] == ran["forwards"] == ran["plain forwards"] == 3
    assert [set(terms) for terms in ran["terms"]] == [{*REFINER, *BRANCH, "loss"}] * 3
    assert min(ran["terms"][0].values()) > 0
    assert min(ran["moved"].values()) > 0
    print(f"least moved {min(ran['moved'].values()):.2g}, most {max(ran['moved'].values()):.2g}")


def test_the_first_loss_rises_by_the_refiners_and_the_branchs(seen: Dict[str, Any]) -> None:
    ran = seen["training"]
    rise = {key: value - ran["first"]["tokens"] for key, value in ran["first"].items()}
    print(f"refiner {rise['refiner']:.6f}, branch {rise['branch']:.6f}, both {rise['both']:.6f}")
    assert rise["refiner"] == pytest.approx(ran["refiner's"], rel=1e-5) and ran["refiner's"] > 0.1
    assert rise["branch"] == pytest.approx(ran["branch's"], rel=1e-5) and ran["branch's"] > 0.1
    assert rise["both"] == pytest.approx(ran["refiner's"] + ran["branch's"], rel=1e-5)
    assert ran["terms"][0]["loss"] == pytest.approx(rise["both"], rel=1e-5)


def test_nothing_is_left_behind(seen: Dict[str, Any]) -> None:
    ran = seen["training"]
    assert ran["hooked inside"]
    assert ran["hooked after"] == ran["marked after"] == []
    assert ran["same after"]


def test_the_hosts_inference_with_tokens(seen: Dict[str, Any]) -> None:
    assert len(seen["inference"]) == 9
    for case, found in seen["inference"].items():
        host, rebuilt = found["host"], found["rebuilt"]
        print(f"{case}: changes by {host['difference']:.3g}, rebuilt differs by {rebuilt['difference']:.2g}")
        assert host["same shapes"] and rebuilt["same shapes"] and rebuilt["largest"] > 1e-3
        assert rebuilt["difference"] <= 1e-5
        assert host["difference"] > 1e-5 or not case.startswith("fused")  # the tokens are there
        assert found["own cam"] == host["shapes"][0]


def test_checkpoints_stay_the_hosts_own(seen: Dict[str, Any]) -> None:
    found = seen["checkpoint"]
    assert found["keys"] and found["loaded"] == ["<All keys matched successfully>"] * 2
    assert found["during"]["same shapes"] and not found["during"]["identical"]
    assert found["after"]["identical"]


def test_the_clone_is_as_it_was(seen: Dict[str, Any]) -> None:
    assert seen["state after"] == seen["state before"]


# ---------------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def timm(hosts: Any, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("install timm")
    folder = tmp_path_factory.mktemp("timm")
    worker = Path(__file__).with_name("clusters_worker.py")
    command = [sys.executable, "-B", "-W", "ignore", worker, "timm", "", hosts.clip, folder / "out.json"]
    hosts.finish([str(part) for part in command], folder)
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["fused", "unfused"])
def test_a_branch_in_timms_transformer(kind: str, timm: Dict[str, Any]) -> None:
    found = timm[kind]
    assert len(found["passive"]) == 6
    for case, part in found["passive"].items():
        assert part["grid"] == ([14, 14] if "224x224" in case else [6, 10])
        allowed = 1e-12 if "float64" in case else 1e-6
        for what in ("outputs", "features"):
            apart, largest = part[what]["difference"], part[what]["largest"]
            print(f"{kind}, {what} {case}: differs by {apart:.2g}, largest {largest:.3g}")
            assert part[what]["same shapes"] and largest > 0.1
            assert apart <= allowed * max(1.0, largest)
    for case in ("outputs free", "branch free", "branch never"):
        reach = found["reach"][case]
        assert reach["finite"] and reach["tokens"] > 0 and reach["blocks"] == 12 * 12
    assert found["reach"]["branch free"]["branch missed"] == found["reach"]["branch free"]["blocks missed"] == []
    assert found["reach"]["outputs never"]["tokens"] == 0
    ran = found["training"]
    assert ran["steps"] == 5 and set(ran["terms"][0]) == {*REFINER, *BRANCH, "loss"} and ran["hooked after"] == []
    assert min(ran["moved"].values()) > 0
    losses = [terms["cluster_tokens"] + terms["mce"] for terms in ran["terms"]]
    print(f"{kind}: cluster tokens and patch classifier {losses[0]:.4f} -> {losses[-1]:.4f}")
    assert losses[-1] < losses[0]
