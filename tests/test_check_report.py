from __future__ import annotations

import json
from typing import Any, Dict, List

import pytest

from semples_plugin import VOC
from semples_plugin.check_report import MIN_IMAGES, VARIANTS, CheckReport, ClassFigures, verdict


def figures(**changes: Any) -> ClassFigures:
    """A class that will be helped."""
    usual: Dict[str, Any] = {
        "name": "boat",
        "images": 40,
        "average_precision": 0.9,
        "chance": 0.1,
        "removed_auc": 0.95,
        "shifted_auc": 0.9,
        "cos_kept": 0.3,
        "cos_removed": 0.2,
        "cos_shifted": 0.22,
        "area": 0.3,
        "losses": dict.fromkeys(VARIANTS, 1.0),
        "wins": dict.fromkeys(VARIANTS[1:], 0.9),
    }
    return ClassFigures(**{**usual, **changes})


def report(classes: List[ClassFigures], **changes: Any) -> CheckReport:
    usual: Dict[str, Any] = {
        "classes": classes,
        "pairs": [],
        "num_images": 100,
        "clip": "ViT-B/32 [0123456789abcdef]",
        "stage": "match",
        "config": VOC,
        "lambda_area": 1.25,
        "area_share": 0.8,
        "configure": lambda **options: VOC.replace(**options),
    }
    return CheckReport(**{**usual, **changes})


UNKNOWN = {"average_precision": 0.12, "removed_auc": 0.4}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, "will help"),
        ({"images": MIN_IMAGES - 1}, "cannot tell"),
        ({"removed_auc": 0.7}, "cannot tell"),
        ({"removed_auc": 0.4}, "cannot tell"),  # the CAM may lie beside the object
        ({"wins": dict.fromkeys(VARIANTS[1:], 0.3)}, "cannot tell"),
        ({"average_precision": 0.12}, "cannot tell"),
        (UNKNOWN, "will not"),
        ({**UNKNOWN, "images": 3}, "cannot tell"),
        ({"average_precision": 1.0, "chance": 1.0}, "will help"),
        ({"average_precision": 1.0, "chance": 1.0, "removed_auc": 0.4}, "cannot tell"),
        ({"removed_auc": None}, "cannot tell"),
    ],
)
def test_the_verdict_is_a_function_of_the_figures(changes: Dict[str, Any], expected: str) -> None:
    assert verdict(figures(**changes)) == figures(**changes).verdict == expected


def test_a_class_without_images_has_no_verdict_and_no_figures() -> None:
    assert ClassFigures("boat", 0).verdict == "cannot tell"
    assert "-" in str(report([ClassFigures("boat", 0)])).splitlines()[4]


def test_the_options_leave_out_what_will_not_be_helped_and_keep_other_weights() -> None:
    classes = [figures(), figures(name="train", **UNKNOWN), figures(name="bird", images=2)]
    assert report(classes).options() == {"class_weights": {"train": 0.0}, "lambda_area": 1.25}
    config = VOC.replace(class_weights={"bird": 0.5, "train": 2})
    assert report(classes, config=config).options()["class_weights"] == {"bird": 0.5, "train": 0.0}
    assert report([figures()]).options()["class_weights"] is None
    assert "lambda_area" not in report(classes, lambda_area=None, area_share=None).options()


def test_apply_changes_the_refiner(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    img, cam, labels = make_batch()
    found = refiner.check([(img, labels)], lambda _: cam, progress=False)
    old = refiner.config
    changed = report([figures(name="train", **UNKNOWN)], configure=found.configure).apply()
    assert changed is refiner.config and changed == old.replace(class_weights={"train": 0.0}, lambda_area=1.25)
    out = refiner.compute(img, cam, labels)
    assert "area" in out.terms and not cam.grad
    out.loss.backward()
    assert not cam.grad[:, 1].any()


def test_the_report_is_json(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    found = make_refiner(learned=True).check([(img, labels)], lambda _: cam, progress=False)
    read = json.loads(json.dumps(found.as_dict()))
    assert read["classes"][0]["name"] == "boat" and read["classes"][0]["verdict"] == "cannot tell"
    assert read["images"] == 2 and read["pairs"] == 4 and set(read["classes"][0]["losses"]) == set(VARIANTS)
    assert VOC.replace(**read["config"]) == found.config


@pytest.mark.parametrize("stage", ["match", "refine"])
def test_the_table_fits_120_columns(stage: str) -> None:
    prompt = {"cos_prompt": 0.4, "cos_prompt_class": -0.55, "prompt_alive": False} if stage == "refine" else {}
    classes = [
        figures(name="a very long class name of 40 characters", images=123456, **prompt),
        figures(name="a\x1b[2Jb", **UNKNOWN),
    ]
    text = str(report(classes, stage=stage))
    assert max(map(len, text.splitlines())) <= 120 and "\x1b" not in text
    assert "will help" in text and "will not" in text and "classes to leave out: a\\x1b[2Jb" in text
    assert ("dead" in text) == (stage == "refine")
    assert "area weight: 0 now, 1.25 suggested; the loss then prefers the CAM to an all-ones" in text
    assert "no weight makes the loss prefer the CAM" in str(report(classes, lambda_area=None, area_share=None))
