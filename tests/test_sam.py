"""Segment Anything through transformers: a tiny model of its own class with random weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semples_plugin import sam
from semples_plugin.errors import MissingLibraryError, SamError
from semples_plugin.sam import SamProposals

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def img() -> torch.Tensor:
    return torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0))


def test_masks_are_those_of_the_models_own_processor(sam_folder: Path, img: torch.Tensor) -> None:
    from PIL import Image

    proposals = SamProposals(str(sam_folder), points_per_side=3)
    picture = Image.fromarray((img * 255).round().byte().permute(1, 2, 0).numpy())
    points = [[[[(x + 0.5) / 3 * 60, (y + 0.5) / 3 * 40]] for y in range(3) for x in range(3)]]
    inputs = proposals.processor(picture, input_points=points, return_tensors="pt")
    inputs["input_points"] = inputs["input_points"].float()
    assert torch.allclose(proposals._grid([43, 64]), inputs["input_points"][0, :, 0], atol=1e-5)
    with torch.no_grad():
        result = proposals.model(**inputs)
    expected = proposals.processor.image_processor.post_process_masks(
        result.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )[0].flatten(0, 1)
    got, stable = proposals._cut(result.pred_masks[0].flatten(0, 1), [43, 64], (40, 60))
    assert torch.equal(got, expected > 0) and got.any() and not got.all() and len(stable) == 27
    stability = (expected > 1).sum((1, 2)) / (expected > -1).sum((1, 2)).clamp(min=1)
    assert torch.equal(stable, (stability > 0.95) & got.any(2).any(1))


def test_an_image_gives_the_same_masks_twice(sam_folder: Path, img: torch.Tensor) -> None:
    proposals = SamProposals(str(sam_folder), points_per_side=3, min_iou=0.5, min_stability=0.5)
    masks = proposals(img)
    assert masks.dtype == torch.bool and masks.shape[1:] == (40, 60) and len(masks) > 0 and masks.any(2).any(1).all()
    assert torch.equal(masks, proposals(img))
    assert not any(p.requires_grad for p in proposals.model.parameters())


def test_no_mask_is_good_enough(sam_folder: Path, img: torch.Tensor) -> None:
    assert SamProposals(str(sam_folder), points_per_side=3, min_iou=1)(img).shape == (0, 40, 60)
    assert SamProposals(str(sam_folder), points_per_side=3, min_iou=0, min_stability=1)(img).shape == (0, 40, 60)


def test_boxes_and_duplicates() -> None:
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 2:6, 3:9], masks[1, 2:6, 3:8], masks[2, 9, 11] = True, True, True
    boxes = sam._boxes(masks)
    assert boxes.tolist() == [[3, 2, 9, 6], [3, 2, 8, 6], [11, 9, 12, 10]]
    assert sam._without_duplicates(boxes, torch.tensor([0.5, 0.9, 0.7])).tolist() == [1, 2]  # 20 / 24 is above 0.7
    assert sam._without_duplicates(boxes[:0], torch.zeros(0)).tolist() == []


def test_what_is_no_segment_anything_model_is_refused(sam_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SamError, match="cannot be loaded as a Segment Anything model: .* Give a name on the hub"):
        SamProposals(str(tmp_path / "none"))
    bert = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(SamError, match="must be a Segment Anything model .*; it is of type 'bert'"):
        SamProposals(str(tmp_path / "bert"))
    model: Any = transformers.SamModel.from_pretrained(sam_folder)
    state = {k: v for k, v in model.state_dict().items() if "mask_decoder.transformer" not in k}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(SamError, match="lacks .* weights of a Segment Anything model, such as mask_decoder.transformer"):
        SamProposals(str(tmp_path / "part"))


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'semples-plugin\[sam\]'"):
        SamProposals("facebook/sam-vit-base")


@pytest.mark.parametrize("options", [{"points_per_side": 0}, {"min_iou": 2}, {"min_stability": np.nan}])
def test_wrong_options_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        SamProposals("none", **options)
