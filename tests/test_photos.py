"""The photos example on tiny generated photos and random weights."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from examples import train_clip
from examples.photos import __main__ as command
from examples.photos import experiment, hosts, mobilenet
from examples.photos import squeezenet as net
from examples.photos import train_clip as train_photo_clip
from examples.recipe import COMPACT_CLIP, PHOTOS
from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD
from semples_plugin.files.cams import read_cam_file
from semples_plugin.files.images import read_label_png
from tests.voc_photos import write_photos

SETTINGS = experiment.Settings(
    size={"squeezenet": 64, "mobilenet": 64},
    host_steps=2,
    stage_steps=2,
    batch_size=2,
    score_size=32,
    config=PHOTOS.replace(prompt_length=4, epochs=2, prompt_restarts=0),
    paper=COMPACT_CLIP.replace(prompt_length=4),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    networks = {"squeezenet": net.SqueezeNetFeatures(hosts.PLAIN), "mobilenet": mobilenet.MobileNetV2Features(hosts.PLAIN)}
    for name, network in networks.items():
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, str(folder / f"{name}.safetensors"))
    return {name: folder / f"{name}.safetensors" for name in networks}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("voc"))


def test_squeezenet_converts_images_to_caffe_statistics(weights: Dict[str, Path]) -> None:
    """The same image with other statistics gives the same features, those of BGR in 0..255 minus the Caffe mean."""
    picture = torch.rand(1, 3, 64, 64)
    plain = net.load_squeezenet(str(weights["squeezenet"]), ((0.0,) * 3, (1.0,) * 3))
    clip = net.load_squeezenet(str(weights["squeezenet"]), (CLIP_MEAN, CLIP_STD))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = plain.features((255 * picture).flip(1) - torch.tensor(net.CAFFE_MEAN).view(3, 1, 1))
    assert expected.shape == (1, 512, 3, 3) and expected.abs().max() > 0
    assert torch.allclose(plain(picture), expected, atol=1e-4, rtol=1e-4)
    assert torch.allclose(clip((picture - mean) / std), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "low_shape", "high_shape"), [
    ("squeezenet", (2, 256, 7, 7), (2, 512, 7, 7)), ("mobilenet", (2, 160, 4, 4), (2, 1280, 4, 4))
])  # fmt: skip
def test_the_backbone_has_a_frozen_lower_and_a_trained_upper_part(
    weights: Dict[str, Path], name: str, low_shape: Any, high_shape: Any
) -> None:
    low, high, channels = hosts.load_backbone(name, weights[name])
    features = low(torch.rand(2, 3, 64, 64))
    assert features.shape == low_shape and high(features).shape == high_shape and channels == high_shape[1]
    assert not any(p.requires_grad for p in low.parameters()) and all(p.requires_grad for p in high.parameters())


def test_mobilenet_with_a_smaller_stride_gives_a_finer_map_of_the_same_features(weights: Dict[str, Path]) -> None:
    """Where dilation replaces the last stride, every other place of the finer map is a place of the coarse one."""
    coarse = mobilenet.load_mobilenet(str(weights["mobilenet"]), hosts.PLAIN)
    fine = mobilenet.load_mobilenet(str(weights["mobilenet"]), hosts.PLAIN, output_stride=16)
    picture = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        a, b = coarse.features[:15](2 * picture - 1), fine.features[:15](2 * picture - 1)
    assert a.shape == (1, 160, 4, 4) and b.shape == (1, 160, 8, 8)
    assert torch.allclose(a, b[:, :, 1::2, 1::2], atol=1e-4)  # stride 2 is padded below and to the right alone


def read(photos: Path, weights: Dict[str, Path], name: str) -> Any:
    low, *backbone = hosts.load_backbone(name, weights[name])
    splits = [hosts.load_split(photos, photos / "labels.json", split, low, 64) for split in ("train", "val")]
    return tuple(backbone), experiment.Data(*splits, experiment.read_truth(photos, splits[1].ids, SETTINGS.score_size))


@pytest.mark.filterwarnings("ignore:.*background prompt")
@pytest.mark.parametrize("name", hosts.HOSTS)
def test_an_interrupted_run_continues_and_gives_the_same_rows(
    photos: Path, weights: Dict[str, Path], aligned_clip: Any, tmp_path: Path, name: str
) -> None:
    backbone, data = read(photos, weights, name)
    assert data.train.ids == ["p1", "p2", "p3"] and data.train.labels.tolist()[0] == [1, 0, 0, 0, 0, 1]  # p0 has no such class

    def run(out: Path) -> Dict[str, Any]:
        out.mkdir(exist_ok=True)
        return experiment.run(backbone, aligned_clip, data, SETTINGS, name, 1, out)

    once = run(tmp_path / "once")
    assert list(once)[0] == experiment.ALONE and set(experiment.ROWS) <= set(once)
    run(tmp_path / "twice")
    (tmp_path / "twice" / "refine.pt").unlink()  # as if interrupted in that row: only that one runs again
    before = (tmp_path / "twice" / "match.pt").stat().st_mtime_ns
    assert run(tmp_path / "twice") == once
    assert (tmp_path / "twice" / "match.pt").stat().st_mtime_ns == before
    files = [path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file()]
    assert len(files) == 10 + 1 + 1  # weights, prompts, CAMs that were optimized
    for file in files:
        if file.suffix != ".safetensors":
            a, b = (torch.load(tmp_path / folder / file, weights_only=True) for folder in ("once", "twice"))
            pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else [(a, b)]
            assert all(torch.equal(x, y) for x, y in pairs), file


def test_masks_have_the_six_classes_and_void(photos: Path, weights: Dict[str, Path], tmp_path: Path) -> None:
    experiment.write_truth(photos, ["p4"], tmp_path)
    mask = read_label_png(tmp_path / "p4.png")
    assert mask[10, 10] == 1 and mask[22, 0] == 255 and mask[40, 0] == 0 and set(np.unique(mask)) == {0, 1, 255}


def test_the_score_of_the_true_masks_is_perfect(photos: Path, weights: Dict[str, Path]) -> None:
    _, data = read(photos, weights, "squeezenet")
    val = data.val._replace(labels=torch.tensor([[1, 0, 0, 0, 0, 0]] * 2))  # both photos show a cat and void
    result = experiment.score(torch.from_numpy(data.truth == 1).float(), val, data.truth)
    assert result.miou == 1 and result.iou[:2] == [1, 1]


def test_cam_files_are_normalized_maps_of_the_present_classes(photos: Path, weights: Dict[str, Path], tmp_path: Path) -> None:
    _, data = read(photos, weights, "squeezenet")
    torch.manual_seed(0)
    experiment.write_cams(torch.rand(2, 6, 5, 5), data.val, photos, tmp_path)
    cams = read_cam_file(tmp_path / "p5.npy", 6).cams
    assert list(cams) == [0, 5] and cams[0].shape == (45, 60) and cams[0].min() == 0 and 0 <= cams[0].max() <= 1


def test_the_table_compares_with_the_better_control() -> None:
    def record(shift: float) -> Dict[str, Any]:
        figures = {experiment.ALONE: 0.30, experiment.AREA: 0.32, experiment.MATCH: 0.36, experiment.LEARNED: 0.37}
        return {"rows": {k: {"miou": v + shift, "iou": [v] * 6 + [None]} for k, v in figures.items()}}

    text = command.table([record(0.0), record(0.02)])
    assert f"[{experiment.MATCH}] - [{experiment.AREA}]: +4.0 (95 % interval +4.0 to +4.0" in text
    assert f"[{experiment.LEARNED}] - [{experiment.MATCH}]: +1.0" in text and "person +0.0" in text


# ------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def believer(tmp_path_factory: pytest.TempPathFactory) -> train_photo_clip.Belief:
    """An ImageNet classifier of random weights whose rows have numbered names."""
    folder = tmp_path_factory.mktemp("head")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (1001, 1280), generator=generator, dtype=torch.int8)
    save_file(
        {"weight": weight, "scale": torch.full((1001,), 0.01), "bias": torch.zeros(1001)}, str(folder / "head.safetensors")
    )
    (folder / "names.txt").write_text("\n".join(f"name {i}, other" for i in range(1001)), encoding="utf-8")
    return train_photo_clip.Belief(folder / "head.safetensors", folder / "names.txt")


def test_belief_names_views_and_knows_five_classes(believer: train_photo_clip.Belief) -> None:
    features = torch.zeros(3, 1280, 2, 2)
    features[0] = believer.weight[283].view(-1, 1, 1)  # a cat's row
    features[1] = believer.weight[500].view(-1, 1, 1)
    known = believer.classes(features)
    assert known[0, list(VOC_CLASSES).index("cat")] > 0.99 and known[:, list(VOC_CLASSES).index("person")].isnan().all()
    texts = [believer.captions(features, torch.Generator().manual_seed(i)) for i in range(8)]
    assert all("cat" in t[0] or "name 283" in t[0] for t in texts) and any("cat" in t[0] for t in texts)
    assert all("name 500" in t[1] for t in texts)


def test_views_cut_along_class_maps_are_present_inside_and_absent_outside(
    photos: Path, weights: Dict[str, Path], believer: train_photo_clip.Belief
) -> None:
    torch.manual_seed(0)
    tower = train_clip.FeatureTower(mobilenet.load_mobilenet(str(weights["mobilenet"]), hosts.PLAIN), 64, 64, 32)
    data = train_photo_clip.read_labeled(photos, photos / "labels.json", "train", 64)
    generator = torch.Generator().manual_seed(0)
    bank = train_photo_clip.labeled_bank(tower, data, believer, generator)
    assert len(bank.features) == 4 * (2 + 2 * train_photo_clip.PARTS)
    absent = data.labels.repeat(2 + 2 * train_photo_clip.PARTS, 1) == 0
    assert (bank.targets[absent] == 0).all() and torch.equal(bank.targets[:4], data.labels.float())
    cut = train_photo_clip.cut_bank(tower, data, bank.features[:4], generator)
    pairs = data.labels.nonzero()
    own = cut.targets.view(2, len(pairs), 20)[:, torch.arange(len(pairs)), pairs[:, 1]]
    assert (own[0] == 1).all() and (own[1] == 0).all() and cut.features.shape == (2 * len(pairs), 1280, 2, 2)


def test_the_photo_clip_trains_to_a_file_that_loads(
    photos: Path, weights: Dict[str, Path], believer: train_photo_clip.Belief, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_photo_clip, "BATCH", {"captioned": 4, "labeled": 4, "cut": 2})
    save_file(
        {"weight": torch.ones(1001, 1280, dtype=torch.int8), "scale": torch.ones(1001), "bias": torch.zeros(1001)},
        str(tmp_path / "head.safetensors"),
    )
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(1001)), encoding="utf-8")
    (tmp_path / "images").mkdir()
    for path in (photos / "JPEGImages").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    rows = [("image", "caption"), *((f"p{i}.jpg", f"a picture of number {i}.") for i in range(6))]
    (tmp_path / "captions.csv").write_text("\n".join(",".join(row) for row in rows), encoding="utf-8")
    for out in ("a.pt", "b.pt"):
        train_photo_clip.main([
            "--photos", str(photos), "--labels", str(photos / "labels.json"), "--captioned", str(tmp_path), "--mobilenet",
            str(weights["mobilenet"]), "--head", str(tmp_path / "head.safetensors"), "--names", str(tmp_path / "names.txt"),
            "--cut", "--size", "64", "--steps", "2", "--out", str(tmp_path / out),
        ])  # fmt: skip
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    clip = train_clip.load_feature_clip(tmp_path / "a.pt", train_photo_clip.TOWER)
    refiner = experiment.new_refiner(clip, PHOTOS, 0)
    assert refiner.text_features.shape == (6, 256) and refiner.text_features.isfinite().all()


def test_cached_batches_hold_the_features_of_the_tower(
    photos: Path, weights: Dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SQUEEZENET", str(weights["squeezenet"]))
    with (tmp_path / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"p{i}.jpg", f"a photo of number {i}.") for i in range(6))])
    torch.manual_seed(0)
    tower = train_clip.FeatureTower(net.clip_tower(), 64, 64, 32).eval()
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
