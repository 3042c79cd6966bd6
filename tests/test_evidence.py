"""The examples that measure: what the loss prefers, and whether the check's verdict predicts the gain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import oracle, prediction
from examples.demo.experiment import CLIP_FILE
from examples.demo.world import THINGS
from semples_plugin import PromptRefiner


def test_variants_of_a_mask() -> None:
    mask = torch.zeros(1, 42, 42)
    mask[:, 10:30, 10:30] = 1
    shapes = oracle.variants(mask)
    areas = {name: float(shape.sum()) for name, shape in shapes.items()}
    assert areas["true"] == 400 and areas["ones"] == 42 * 42 and areas["inverse"] == 42 * 42 - 400
    assert areas["dilated"] == 26 * 26 and areas["eroded"] == 18 * 18 and float(shapes["half"].unique()) == 0.5


def test_losses_of_single_pairs_are_those_of_the_batch() -> None:
    data = oracle.demo_pairs(6, 1)
    refiner = PromptRefiner(list(THINGS), clip=CLIP_FILE, config=oracle.COMPACT_CLIP, normalize=None)
    single = oracle.losses_of(refiner, data, data.masks)
    cam = torch.zeros(6, 6, 64, 64)
    cam[data.pairs[:, 0], data.pairs[:, 1]] = data.masks
    labels = torch.zeros(6, 6, dtype=torch.long)
    labels[data.pairs[:, 0], data.pairs[:, 1]] = 1
    assert single.mean().item() == pytest.approx(refiner.compute(data.images, cam, labels).loss.item(), rel=1e-4)


def test_in_the_demo_world_the_true_mask_beats_masks_that_know_nothing() -> None:
    lines = oracle.table(CLIP_FILE, list(THINGS), oracle.demo_pairs(20, 1)).splitlines()
    assert lines[1].split() == ["true", "is", "best", "true", "ones", "half", "inverse", "dilated", "eroded"]
    assert [line[:32].strip() for line in lines[2:]] == list(oracle.CONFIGS)
    plus = next(line for line in lines if line.startswith("plus"))
    assert float(plus[32:].split("%")[0]) >= 70


def test_verdicts_are_counted_against_the_gain_over_the_host(tmp_path: Path) -> None:
    def row(iou: list, verdicts: list = ()) -> dict:
        figures = [{"name": f"c{k}", "verdict": v, "average_precision": 0.1 * k, "removed_auc": None, "shifted_auc": 0.5,
                    "cos_kept": 0.1, "cos_removed": 0.1} for k, v in enumerate(verdicts)]  # fmt: skip
        return {"iou": iou, **({"check": figures} if verdicts else {})}

    folder = tmp_path / "world"
    folder.mkdir()
    rows = {
        prediction.HOST: row([0.9, 0.30, 0.40, 0.50]),
        "+ match": row([0.9, 0.20, 0.405, 0.60], ["will not", "cannot tell", "will help"]),
    }
    (folder / "seed_1.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    cases = prediction.cases_of(folder)
    assert [(c.name, c.verdict, round(c.gain, 3)) for c in cases] == [
        ("c0", "will not", -10.0), ("c1", "cannot tell", 0.5), ("c2", "will help", 10.0)
    ]  # fmt: skip
    text = prediction.table(cases)
    assert "3 cases; of 2 with a verdict the sign of the gain was as said in 2" in text
    assert "rank correlation of average_precision with the gain: +1.00" in text
    assert "rank correlation of removed_auc with the gain: -" in text


def test_folders_without_verdicts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        prediction.main([str(tmp_path)])
    assert "no record in these folders holds what a check said" in capsys.readouterr().err


def test_rank_correlation() -> None:
    assert prediction.rank_correlation([1, 2, 3, None], [3, 5, 9, 0]) == pytest.approx(1)
    assert prediction.rank_correlation([1, 2], [3, 5]) is None
    assert np.isclose(prediction.rank_correlation([1, 2, 3], [3, 2, 1]) or 0, -1)
