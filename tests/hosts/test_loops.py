"""The training loops of real baselines with the refiner attached: each ran in loop_worker.py, once per session."""

from __future__ import annotations

from typing import Any, Dict

import pytest

LOOPS = ["mctformer", "weaktr", "transcam"]
FUSION = [f"adaptive_attention_fusion.attn_{part}" for part in ("feat_ffn.0", "feat_ffn.1", "head_ffn.0", "head_ffn.2")]
# Parameters that the CAM does not depend on.
UNREACHED = {
    ("mctformer", "fused"): ["norm", "pos_embed"],
    ("mctformer", "patch"): ["norm", "pos_embed"],
    ("mctformer", "refined"): ["norm", "pos_embed"],
    ("weaktr", "fused"): ["norm"],
    ("weaktr", "patch"): [*FUSION, "norm"],
    ("weaktr", "refined"): ["norm"],
    ("transcam", "fused"): ["trans_cls_head", "trans_norm"],
    ("transcam", "patch"): ["trans_cls_head", "trans_norm"],
    ("transcam", "raw"): ["trans_cls_head", "trans_norm"],
}


@pytest.fixture(params=LOOPS)
def name(request: Any) -> str:
    return request.param


@pytest.fixture
def seen(hosts: Any, name: str, tmp_path: Any) -> Dict[str, Any]:
    return hosts.work("loop_worker.py", name, tmp_path)


def test_one_step_per_batch_in_the_hosts_own_forward_pass(seen: Dict[str, Any]) -> None:
    assert seen["steps"] == seen["batches"] == 3
    assert seen["forwards"] == seen["plain forwards"] == 3


def test_the_loss_of_a_step_holds_the_refiners_once(seen: Dict[str, Any]) -> None:
    assert [set(terms) for terms in seen["terms"]] == [{"match_foreground", "match_background", "loss"}] * 3
    added = seen["losses"][0] - seen["plain losses"][0]  # later steps start from other weights
    assert added == pytest.approx(seen["terms"][0]["loss"], rel=1e-5)


def test_replace_leaves_only_what_is_no_label_loss(name: str, seen: Dict[str, Any]) -> None:
    assert seen["replaced steps"] == 3
    rest = seen["replaced losses"][0] - seen["terms"][0]["loss"]
    if name == "mctformer":  # its regulariser
        assert 0 < rest < seen["plain losses"][0]
    else:
        assert rest == pytest.approx(0, abs=1e-5)


def test_the_gradient_of_the_host_changes(seen: Dict[str, Any]) -> None:
    print(f"gradients of the first step differ by {seen['gradient difference']:.3f} of their norm")
    assert 0.01 < seen["gradient difference"] < 10


def test_the_hosts_random_numbers_stay_the_same(seen: Dict[str, Any]) -> None:
    assert seen["same noise"]


def test_nothing_is_left_behind(seen: Dict[str, Any]) -> None:
    assert seen["hooked inside"]
    assert seen["hooked after"] == []
    assert seen["same after"]


def test_nothing_is_left_behind_by_an_exception(seen: Dict[str, Any]) -> None:
    assert seen["error"] == "BrokenLoader"
    assert seen["hooked after error"] == []
    assert seen["same after error"]


def test_the_probe_reaches_what_the_cam_is_made_of(name: str, seen: Dict[str, Any]) -> None:
    for kind, probe in seen["probes"].items():
        print(f"{kind}: {probe['verdict']}")
        assert probe["attached"]
        missed = {parameter.removesuffix(".weight").removesuffix(".bias") for parameter in probe["missed"]}
        assert sorted(missed) == UNREACHED[name, kind]


def test_the_cam_is_that_of_the_hosts_inference(seen: Dict[str, Any]) -> None:
    for case, cam in seen["cams"].items():
        print(f"{case}: differs by {cam['difference']}, largest {cam['largest']:.3g}")
        assert cam["largest"] > 1e-3
        assert cam["difference"] is not None and cam["difference"] <= 1e-5


def test_the_clone_is_as_it_was(seen: Dict[str, Any]) -> None:
    assert seen["state after"] == seen["state before"]
