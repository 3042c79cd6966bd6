from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import nn

from tests.cli.running import run


@pytest.fixture
def prompt_file(tmp_path: Path, make_refiner: Callable[..., Any]) -> Path:
    make_refiner({"boat": "ship", "train": "train", "bird": "bird"}, learned=True).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_prompts_show_without_clip(prompt_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "prompts", "show", prompt_file)
    lines = out.splitlines()
    assert (status, err) == (0, "") and lines[0].startswith(f"{prompt_file}: 3 prompts of 4 vectors, CLIP ")
    assert lines[1:] == [
        "classes: boat, train, bird",
        "layout: 'a photo of {} .', class text: 'a photo of a {}.'",
        "Give --clip to see the nearest words.",
    ]
    status, out, _ = run(capsys, "prompts", "show", prompt_file, "--json")
    shown = json.loads(out)
    assert status == 0 and shown["classes"] == ["boat", "train", "bird"] and shown["vectors"] == [3, 1, 4, 64]
    assert shown["prompt_names"] == ["ship", "train", "bird"] and "nearest_words" not in shown and out.count("\n") == 1


def test_prompts_show_with_clip(
    prompt_file: Path, clip_file: Path, make_refiner: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("rail\nwater\n\n sea gull \n")
    extra = ["--clip", clip_file, "--vocabulary", tmp_path / "words.txt", "--top", "2"]
    status, out, err = run(capsys, "prompts", "show", prompt_file, *extra)
    names = {"boat": "ship", "train": "train", "bird": "bird"}
    readings = make_refiner(names).load_prompts(prompt_file).nearest_words(["rail", "water", "sea gull"], top=2)
    assert (status, err) == (0, "") and out.splitlines()[3:] == [f"  {reading}" for reading in readings]
    _, out, _ = run(capsys, "prompts", "show", prompt_file, *extra, "--json")
    nearest = json.loads(out)["nearest_words"]
    assert list(nearest) == ["boat", "train", "bird"] and all(len(entry["words"]) == 2 for entry in nearest.values())
    assert [word for word, _ in nearest["bird"]["words"]] == [word for word, _ in readings[2].words]
    assert nearest["boat"]["class_similarity"] == pytest.approx(readings[0].class_similarity, abs=1e-5)
    _, out, _ = run(capsys, "prompts", "show", prompt_file, "--clip", clip_file)
    assert len(out.splitlines()) == 6 and all(line.count(",") == 4 for line in out.splitlines()[3:])  # five words of our own


def test_prompts_show_refuses_another_clip(prompt_file: Path, tiny_clip: nn.Module, tmp_path: Path, capsys: Any) -> None:
    torch.save(tiny_clip.state_dict(), tmp_path / "other.pt")
    status, out, err = run(capsys, "prompts", "show", prompt_file, "--clip", tmp_path / "other.pt")
    assert (status, out) == (2, "") and "were learned with other CLIP weights" in err and err.count("\n") == 1
