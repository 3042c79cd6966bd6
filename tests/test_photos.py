"""The photos example on tiny generated photos and random weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Dict, List

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples import train_clip
from examples.photos import experiment
from examples.photos import squeezenet as net
from examples.recipe import COMPACT_CLIP
from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD
from semples_plugin.files.cams import read_cam_file
from semples_plugin.files.images import read_label_png

SETTINGS = experiment.Settings(
    size=64, host_steps=2, stage_steps=2, batch_size=2, config=COMPACT_CLIP.replace(prompt_length=4, epochs=2)
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(net.SqueezeNetFeatures(experiment.IMAGENET).state_dict(), str(path))
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images in VOC's layout; two of them in val."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    labels: Dict[str, List[str]] = {}
    for i in range(6):
        cv2.imwrite(str(root / "JPEGImages" / f"p{i}.jpg"), rng.integers(0, 256, (40 + i, 60, 3), np.uint8))
        mask = np.zeros((40 + i, 60), np.uint8)
        mask[5:20, 5:30], mask[20:25], mask[30:] = 8, 255, 5  # cat, void, bottle
        cv2.imwrite(str(root / "SegmentationClass" / f"p{i}.png"), mask)
        labels[f"p{i}"] = ["cat", "person"] if i % 2 else ["dog"]
    labels["p0"] = ["bottle"]
    (root / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    (root / "ImageSets/Segmentation/train.txt").write_text("p0\np1\np2\np3\n", encoding="utf-8")
    (root / "ImageSets/Segmentation/val.txt").write_text("p4\np5\n", encoding="utf-8")
    return root


def test_squeezenet_converts_images_to_caffe_statistics(weights: Path) -> None:
    """The same image with other statistics gives the same features, those of BGR in 0..255 minus the Caffe mean."""
    picture = torch.rand(1, 3, 64, 64)
    plain = net.load_squeezenet(str(weights), ((0.0,) * 3, (1.0,) * 3))
    clip = net.load_squeezenet(str(weights), (CLIP_MEAN, CLIP_STD))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = plain.features((255 * picture).flip(1) - torch.tensor(net.CAFFE_MEAN).view(3, 1, 1))
    assert expected.shape == (1, 512, 3, 3) and expected.abs().max() > 0
    assert torch.allclose(plain(picture), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(clip((picture - mean) / std), expected, atol=1e-3, rtol=1e-3)


def test_the_backbone_has_a_frozen_lower_and_a_trained_upper_part(weights: Path) -> None:
    low, high = experiment.load_backbone(weights)
    features = low(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 256, 7, 7) and high(features).shape == (2, 512, 7, 7)
    assert not any(p.requires_grad for p in low.parameters()) and all(p.requires_grad for p in high.parameters())


def test_average_precision_is_the_mean_precision_at_positives() -> None:
    labels = torch.tensor([0, 1, 0, 1, 1])
    scores = torch.tensor([0.9, 0.8, 0.1, 0.7, 0.2])
    assert experiment.average_precision(scores, labels) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)


def test_captions_are_made_of_labels(photos: Path) -> None:
    rows = experiment.captions(photos / "labels.json", ["p0", "p1"])
    assert ("p1.jpg", "a photo of a cat and a person.") in rows and ("p0.jpg", "a photo of a bottle.") in rows
    assert {name for name, _ in rows} == {"p0.jpg", "p1.jpg"}


def test_an_interrupted_run_continues_and_writes_the_same_files(
    photos: Path, weights: Path, aligned_clip: Any, tmp_path: Path
) -> None:
    low, high = experiment.load_backbone(weights)
    data = experiment.load_split(photos, photos / "labels.json", "train", low, SETTINGS)
    test = experiment.load_split(photos, photos / "labels.json", "val", low, SETTINGS)
    assert data.ids == ["p1", "p2", "p3"] and data.labels.tolist()[0] == [1, 0, 0, 0, 0, 1]  # p0 has none of the six classes

    def run(out: Path) -> None:
        out.mkdir(exist_ok=True)

        def write(name: str, host: Any) -> None:
            experiment.write_cams(host, test, photos, out / name)

        experiment.stages(high, aligned_clip, data, SETTINGS, 1, out, write)

    run(tmp_path / "once")
    run(tmp_path / "twice")
    (tmp_path / "twice" / "refine.pt").unlink()  # as if interrupted in the last stage: only that one runs again
    before = (tmp_path / "twice" / "match.pt").stat().st_mtime_ns
    run(tmp_path / "twice")
    assert (tmp_path / "twice" / "match.pt").stat().st_mtime_ns == before
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(files) == 4 + 1 + 4 * 2  # weights, prompts, CAM files
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes(), file
    cams = read_cam_file(tmp_path / "once" / "refine" / "p5.npy", 6).cams
    assert list(cams) == [0, 5] and cams[0].shape == (45, 60) and cams[0].min() == 0 and 0 <= cams[0].max() <= 1


def test_masks_have_the_six_classes_and_void(photos: Path, weights: Path, tmp_path: Path) -> None:
    low, _ = experiment.load_backbone(weights)
    data = experiment.load_split(photos, photos / "labels.json", "val", low, SETTINGS)
    experiment.write_masks(data, photos, tmp_path)
    mask = read_label_png(tmp_path / "p4.png")
    assert mask[10, 10] == 1 and mask[22, 0] == 255 and mask[40, 0] == 0 and set(np.unique(mask)) == {0, 1, 255}


def test_cached_batches_hold_the_features_of_the_tower(
    photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SQUEEZENET", str(weights))
    with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = experiment.captions(photos / "labels.json", [f"p{i}" for i in range(6)])
        csv.writer(file).writerows([("image", "caption"), *rows])
    torch.manual_seed(0)
    tower = train_clip.FeatureTower(net.clip_tower(), 64, 32).eval()
    pictures = train_clip.read_photos(photos / "JPEGImages", tmp_path / "captions.csv", 64)
    batches = train_clip.cached_batches(tower, pictures, 6, seed=0, fade_share=0.0, variants=2)
    batch = next(batches)
    whole = train_clip.normalize(pictures.images)
    with torch.no_grad():
        known = torch.cat([tower.features(whole), tower.features(whole.flip(3))])
    assert isinstance(batch.images, torch.Tensor) and batch.images.shape == (6, 512, 3, 3)
    distance = (batch.images[:, None] - known[None]).flatten(2).norm(dim=2)  # (6, 12) to every image and its mirror image
    assert (distance.min(1).values < 1e-2 * known.flatten(1).norm(dim=1).max()).all()
    assert len(set((distance.argmin(1) % 6).tolist())) == 6  # every image once per epoch
    for caption, index in zip(batch.captions, (distance.argmin(1) % 6).tolist()):
        assert caption in pictures.captions[index]
    with torch.no_grad():
        assert torch.allclose(tower.pool(tower.features(whole)), tower(whole))
