"""Baselines of other families, by module names alone (`generic`): a CNN (IRN), a siamese CNN (SEAM), a single-stage ViT (ToCo).

What is asserted ran in other_worker.py, once per session; the scripts of IRN and SEAM also run unedited through the runner.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch

EQUAL = 1e-6


@pytest.fixture
def seen(request: Any, hosts: Any, tmp_path: Path) -> Dict[str, Any]:
    return hosts.work("other_worker.py", request.param, tmp_path)


def parts(names: List[str], depth: int) -> set:
    return {".".join(name.split(".")[:depth]) for name in names}


@pytest.mark.parametrize("seen", ["irn"], indirect=True)
def test_irn_cam_and_reach(seen: Dict[str, Any]) -> None:
    probe = seen["probe"]
    print(probe["verdict"])
    assert parts(probe["reached"], 2) == {"resnet50.layer3", "resnet50.layer4", "classifier.weight"}
    assert parts(probe["missed"], 2) == {"resnet50.layer1", "resnet50.layer2"}  # it detaches after stage 2
    assert parts(probe["frozen"], 2) == {"resnet50.conv1", "resnet50.bn1"}
    for case in ("literal", "inference"):  # F.conv2d(features, classifier.weight); its own inference network
        assert seen[case]["largest"] > 0.01
        assert seen[case]["difference"] <= EQUAL


@pytest.mark.parametrize("which, size", [("first", 64), ("last", 19)])
@pytest.mark.parametrize("seen", ["seam"], indirect=True)
def test_seam_has_two_forward_passes_per_step(seen: Dict[str, Any], which: str, size: int) -> None:
    """The first is of the images, the last of the images at 0.3 of their size; each is in a label loss of its own."""
    ran = seen[which]
    print(f"gradients differ by {ran['gradient difference']:.3f} of their norm")
    assert ran["steps"] == 2
    assert ran["captured"] == [[2, 21, size, size]] * 2
    added = ran["losses"][0] - ran["plain losses"][0]
    # Added to one label loss; the loop takes the mean of two, so that half of it counts.
    assert added == pytest.approx(ran["terms"][0]["loss"] / 2, rel=1e-4)
    assert ran["gradient difference"] > 0.01
    assert ran["same after"]


@pytest.mark.parametrize("seen", ["seam"], indirect=True)
def test_seam_cam_and_reach(seen: Dict[str, Any]) -> None:
    print(seen["probe"]["verdict"])
    assert seen["probe"]["missed"] == ["f8_3.weight", "f8_4.weight", "f9.weight"]
    assert len(seen["probe"]["reached"]) == 36
    for case in ("output", "fc8"):  # its output; the module `fc8`, enlarged
        assert seen[case]["largest"] > 1e-3
        assert seen[case]["difference"] <= EQUAL


@pytest.mark.parametrize("seen", ["seam"], indirect=True)
def test_a_module_whose_calls_no_hook_sees_is_named(seen: Dict[str, Any]) -> None:
    """SEAM's blocks define `__call__` themselves, past the hooks of nn.Module."""
    assert "'b7', which did not run" in seen["error"] and "Hooks see only calls of the module itself" in seen["error"]


@pytest.mark.parametrize("seen", ["toco"], indirect=True)
def test_toco_cam_is_that_of_the_image(seen: Dict[str, Any]) -> None:
    assert seen["norm calls"] == 4  # the image, two global views for the teacher and again, local crops
    assert seen["captured"] == [[2, 20, 6, 6]] * 2
    for case in ("loop cam", "wide cam"):  # in the loop; of 64 x 128 pixels in inference
        assert seen[case]["largest"] > 0.1
        assert seen[case]["difference"] <= EQUAL


@pytest.mark.parametrize("seen", ["toco"], indirect=True)
def test_toco_has_one_more_loss_per_step(seen: Dict[str, Any]) -> None:
    assert seen["steps"] == 2
    added = seen["losses"][0] - seen["plain losses"][0]
    assert added == pytest.approx(seen["terms"][0]["loss"], rel=1e-5)  # one for two label losses
    assert seen["same after"]


@pytest.mark.parametrize("seen", ["toco"], indirect=True)
def test_toco_reach(seen: Dict[str, Any]) -> None:
    print(seen["probe"]["verdict"], f"gradients differ by {seen['gradient difference']:.3f} of their norm")
    missed = {"encoder.head", "decoder", "proj_head", "aux_classifier"}
    assert {name if name == "encoder.head" else name.split(".")[0] for name in parts(seen["probe"]["missed"], 2)} == missed
    assert parts(seen["probe"]["reached"], 1) == {"encoder", "classifier"}
    assert seen["gradient difference"] > 0.01


@pytest.mark.parametrize("name", ["irn", "seam", "toco"])
def test_the_clone_is_as_it_was(hosts: Any, name: str, tmp_path: Path) -> None:
    seen = hosts.work("other_worker.py", name, tmp_path)
    assert seen["state after"] == seen["state before"]


# ---------------------------------------------------------------------------------------------------- their own scripts

IRN_OTHER_STEPS = "make_cam eval_cam cam_to_ir_label train_irn make_ins_seg eval_ins_seg make_sem_seg eval_sem_seg".split()


@pytest.mark.parametrize("name", ["irn", "seam"])
def test_its_own_script_through_three_stages(hosts: Any, name: str, tmp_path: Path) -> None:
    hosts.repo(name)
    before, photos = hosts.state(name), hosts.photos()
    ids = hosts.folder(name, tmp_path, 4)
    common = ["--voc12_root", str(photos), "--num_workers", "0"]
    if name == "irn":
        hosts.prepare("weights_worker.py", name, tmp_path)
        options = {"features": "stage4", "classifier": "classifier", "image_stats": "imagenet"}
        script = ["run_sample.py", *common, "--cam_batch_size", "2", "--cam_num_epoches", "1", "--cam_learning_rate", "0.001"]
        script += [part for step in IRN_OTHER_STEPS for part in (f"--{step}_pass", "no")]  # it compares with True
        saved = "sess/res50_cam.pth.pth"
    else:
        torch.save({}, tmp_path / "none.pth")  # no pre-trained weights: they are loaded with strict=False
        options = {"cam": "fc8", "background_channel": "True", "activation": "relu", "image_stats": "imagenet"}
        script = ["train_SEAM.py", *common, "--batch_size", "2", "--max_epoches", "1", "--crop_size", "64", "--lr", "0.001"]
        script += ["--weights", "none.pth"]
        saved = "resnet38_SEAM.pth"
    given = [part for key, value in options.items() for part in ("--host-option", f"{key}={value}")]
    hosts.run("generic", name, tmp_path, *given, "--", *script)
    out = tmp_path / "out"
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    assert [record["stages"][stage]["state"] for stage in ("match", "prompt", "refine")] == ["done"] * 3
    assert record["stages"]["match"]["steps"] == record["stages"]["refine"]["steps"] == 2
    assert record["stages"]["prompt"]["images"] == 4
    assert record["stages"]["prompt"]["pairs"] == sum(int(hosts.labels(name)[i].sum()) for i in ids)
    assert record["host_commit"] == {"commit": hosts.git(name, "rev-parse", "HEAD"), "changed_files": []}
    lines = [json.loads(line) for line in (out / "refine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2 and all(np.isfinite(line["refine"]) for line in lines)
    ours = torch.load(out / "refine.pt", map_location="cpu", weights_only=True)["model"]
    its = torch.load(tmp_path / saved, map_location="cpu", weights_only=True)
    assert ours.keys() == its.keys() and all(torch.equal(ours[key], its[key]) for key in its)
    assert hosts.state(name) == before
    for path in (out / "match.pt", out / "refine.pt", tmp_path / saved):
        path.unlink()  # SEAM: 1.3 GB
