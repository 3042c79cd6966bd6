"""The experiment on choices without masks: which records it takes over, which rows it compares, and its table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from examples import choices as experiment
from examples.ablation.rows import HOST, LEARNED, MATCH, ROWS
from examples.cells import Cell, slug
from semples_plugin.choices import THRESHOLDS


def arguments(folder: Path, **changed: Any) -> argparse.Namespace:
    """Of `--photo-runs`, with files that exist."""
    known: Dict[str, Any] = {"ablation": None, "photo_runs": folder / "runs", "host": "mobilenet", "photos": folder / "photos"}
    for name in ("labels", "weights", "clip"):
        known[name] = folder / name
        known[name].write_text(name, encoding="utf-8")
    return argparse.Namespace(**{**known, **changed})


def test_records_of_other_photos_hosts_weights_and_clips_are_not_taken_over(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    first = experiment.identity(args, "code")
    assert experiment.identity(arguments(tmp_path), "code") == first
    others = [experiment.identity(args, "other code")]
    for name, value in [("host", "squeezenet"), ("photos", tmp_path / "coco"), ("photo_runs", tmp_path / "other")]:
        others.append(experiment.identity(arguments(tmp_path, **{name: value}), "code"))
    for name in ("labels", "weights", "clip"):  # the same path, another file
        args = arguments(tmp_path)
        getattr(args, name).write_text("changed", encoding="utf-8")
        others.append(experiment.identity(args, "code"))
    assert len({first, *others}) == 1 + len(others)


def test_records_of_other_ablations_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = argparse.Namespace(ablation=tmp_path / "ablation")
    first = experiment.identity(args, "parts_1")
    monkeypatch.chdir(tmp_path)
    assert experiment.identity(argparse.Namespace(ablation=Path("ablation")), "parts_1") == first
    assert experiment.identity(args, "parts_2") != first
    assert experiment.identity(argparse.Namespace(ablation=tmp_path / "other"), "parts_1") != first


@pytest.mark.parametrize("name", ["choices.py", "train_clip.py", "demo/host.py", "photos/experiment.py", "ablation/rows.py"])
def test_records_of_other_code_are_not_taken_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, changed = argparse.Namespace(ablation=tmp_path), Path(experiment.__file__).parent / name
    first, read = experiment.identity(args, "parts"), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == changed))
    assert experiment.identity(args, "parts") != first


def test_the_command_takes_the_newest_weights_and_no_record_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: List[Any] = []

    def cell(cell: Cell, parts: Path) -> Dict[str, Any]:
        calls.append((parts.parent.name, cell))
        return {kind: curve(0.5, 0.5) for kind in ("raw", "aligned")}

    monkeypatch.setattr(experiment, "demo_cell", cell)
    for ablation in ("first", "second"):
        parts = tmp_path / ablation / "parts_1"
        for seed in (1, 2):
            (parts / f"seed_{seed}").mkdir(parents=True)
            torch.save({}, parts / f"seed_{seed}" / f"{slug(MATCH)}.pt")
        for _ in range(2):
            experiment.main(["--ablation", str(tmp_path / ablation), "--out", str(tmp_path / "out")])
    assert calls == [(name, Cell(MATCH, seed)) for name in ("first", "second") for seed in (1, 2)]
    assert "area weight 0.75, seeds 2, 3, 4, 5" in capsys.readouterr().out


def test_the_newest_version_of_the_photos_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--photo-runs: .* holds no weights; run python -m examples.photos first"):
        experiment.photo_version(tmp_path)
    for time, name in enumerate(["seed_1_ffff", "seed_2_ffff", "seed_1_0000"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time, time))
    assert experiment.photo_version(tmp_path) == "0000"


def test_the_lambdas_are_those_of_the_ablation_that_change_one_option() -> None:
    assert experiment.LAMBDAS["lambda_refine"] == [LEARNED, *(f"{LEARNED}, lambda_refine = {v}" for v in (0.5, 4.0))]
    assert set(experiment.LAMBDAS) == {"lambda_area", "lambda_b", "lambda_refine", "lambda_t"}
    assert {name for names in experiment.LAMBDAS.values() for name in names} < {row.name for row in ROWS}


def curve(masks: float, clip: float) -> Dict[str, Any]:
    """Curves with the best mIoU of `masks` at the first threshold, and the best agreement of `clip` at the last, 0.1 worse."""
    empty = [0.0] * (len(THRESHOLDS) - 2)
    return {
        "chosen": [masks, *empty, masks - 0.1],
        "test": [masks, *empty, masks - 0.1],
        "sums": [[clip - 0.1, 0, 0], *[[0, 0, 0]] * len(empty), [clip, 0, 0]],
        "num_pairs": 1,
    }


def test_the_table_compares_the_choice_by_clip_with_the_choice_on_masks() -> None:
    low, high = (f"{LEARNED}, lambda_refine = {value}" for value in (0.5, 4.0))
    masks = {HOST: (0.3, 0.2), MATCH: (0.6, 0.5), LEARNED: (0.7, 0.6), low: (0.8, 0.3), high: (0.5, 0.7)}
    found: Dict[Cell, Any] = {
        Cell(row, seed): {kind: curve(*of_row) for kind in ("raw", "aligned")}
        for row, of_row in masks.items()
        for seed in (2, 3)
        if seed == 2 or row not in (low, high)
    }
    found.update({Cell(f"step {n}", 3): {"aligned": curve(0.5 + n / 1000, n / 1000)} for n in experiment.STEPS})
    text = experiment.summary(found, 0.75, [2, 3])
    assert "| threshold, raw | 8 | 10.0 | 10.0 |" in text
    assert "| lambda_refine and threshold, aligned | 1 | 40.0 | 40.0 | seed 2 |" in text  # 0.8, and 0.5 - 0.1
    assert "| lambda_refine and threshold, raw: the recipe's lambda_refine, for comparison | 1 | 20.0 | 20.0 | seed 2 |" in text
    assert "| match or refine, and threshold, aligned | 2 | 10.0 | 10.0 |" in text
    assert "| row, controls among them, and threshold, aligned | 2 | 10.0 | 10.0 |" in text
    assert "| step to stop match at, and threshold, aligned | 1 | 10.0 | 10.0 | seed 3 |" in text
    assert "lambda_t" not in text
