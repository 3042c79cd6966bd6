"""The worlds and their CLIPs, the CLIP trainer, and the demo and the ablation of clusters on a few scenes."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from examples import train_clip
from examples.clusters import __main__ as clusters_command
from examples.clusters import experiment as clusters
from examples.demo import experiment, host, world
from examples.demo.figure import draw_figure
from examples.demo.seeds import summary
from examples.recipe import COMPACT_CLIP
from examples.seeds import cached_record, source_hash, spread
from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import load_clip
from semples_plugin.regions import change_stats


def test_a_seed_fixes_every_pixel_of_the_scenes() -> None:
    first, again, other = world.draw("weak", 5, 3), world.draw("weak", 5, 3), world.draw("weak", 5, 4)
    assert all(np.array_equal(a.image, b.image) and np.array_equal(a.things, b.things) for a, b in zip(first, again))
    assert not np.array_equal(first[0].image, other[0].image)


def test_things_are_on_their_own_stuff_in_weak_scenes_only() -> None:
    def share_at_home(kind: str) -> float:
        at_home, total = 0, 0
        for scene in world.draw(kind, 400, 0):
            for k in scene.labels.nonzero()[0]:
                here = scene.stuff[scene.things == k + 1]
                at_home += int((here == world.STUFF.index(world.HOME[world.THINGS[k]])).mean() > 0.5)
                total += 1
        return at_home / total

    assert share_at_home("weak") > 0.8
    assert share_at_home("caption") < 0.25


def test_captions_name_only_what_the_scene_shows() -> None:
    for scene in world.draw("caption", 300, 1):
        drawn = {world.THINGS[i - 1] for i in np.unique(scene.things) if i}
        grounds = {world.STUFF[i] for i in np.unique(scene.stuff) if i != world.PLAIN}
        words = set(scene.caption.rstrip(".").split())
        assert words & set(world.THINGS) <= drawn
        assert words & set(world.STUFF) <= grounds
        assert words & (drawn | grounds)


@pytest.mark.parametrize(
    "path, own", [(experiment.CLIP_FILE, world.WORLD), (clusters.CLIP_FILE, world.KIN)], ids=["demo", "kin"]
)
def test_clip_classifies_the_masked_regions_of_its_world(path: Path, own: world.World) -> None:
    encoder = load_clip(path)
    assert type(encoder.model).__module__ == "clip.model" and type(encoder.model).__name__ == "CLIP"
    assert path.stat().st_size <= 4_000_000
    split = host.make_split(120, 5, own)
    shown = torch.from_numpy(np.stack([s.things for s in split.scenes]) > 0)
    x = change_stats(split.images, None, (encoder.mean, encoder.std))
    texts = [f"a photo of a {name}." for name in own.things] + [f"a photo of {name}." for name in world.STUFF]
    with torch.no_grad():
        u = F.normalize(encoder.encode_text(texts), dim=-1)
        thing = F.normalize(encoder.encode_image(x * shown[:, None]), dim=-1) @ u.T  # the rest masked out
        rest = F.normalize(encoder.encode_image(x * ~shown[:, None]), dim=-1) @ u.T  # the things masked out
    single = split.labels.sum(1) == 1
    right = thing[single][:, :6].argmax(1) == split.labels[single].argmax(1)
    assert right.float().mean() > 0.85
    assert (rest.argmax(1) >= 6).float().mean() > 0.9  # without its things a scene is classified as stuff


def _write_photos(folder: Path, count: int) -> Path:
    for i, scene in enumerate(world.draw("caption", count, 2)):
        cv2.imwrite(str(folder / f"{i}.png"), scene.image[..., ::-1])
    captions = folder / "captions.csv"
    with open(captions, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows((f"{i}.png", s.caption) for i, s in enumerate(world.draw("caption", count, 2)))
        writer.writerow(["missing.png", "a photo of nothing."])
    return captions


FEATURES = """
import torch
from torch import nn
def features():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, 4, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 4, 1), nn.ReLU())
"""


@pytest.mark.parametrize("tower", ["vit", "resnet", "features"])
def test_a_clip_trained_on_a_folder_with_captions_serves_the_refiner(tower: str, tmp_path: Path) -> None:
    captions, out = _write_photos(tmp_path, 24), tmp_path / "mine.pt"
    if tower == "features":
        (tmp_path / "tower.py").write_text(FEATURES, encoding="utf-8")
        tower = f"{tmp_path / 'tower.py'}:features"
    shape = ["--size", "64", "--patch", "16", "--width", "64", "--layers", "1", "--text-width", "64", "--text-layers", "1"]
    source = ["--images", str(tmp_path), "--captions", str(captions), "--out", str(out), "--dim", "32"]
    train_clip.main([*source, *shape, "--tower", tower, "--steps", "3", "--batch-size", "8", "--fade", "0.5"])
    clip = out
    if tower.endswith(":features"):
        clip = train_clip.load_feature_clip(out, tower)
    refiner = PromptRefiner(["boat", "bird"], clip=clip, image_stats=None, prompt_length=2)
    cam = torch.rand(1, 2, 4, 4, requires_grad=True)
    loss = refiner(torch.rand(1, 3, 64, 64), cam, torch.tensor([[1, 1]]))
    assert torch.isfinite(loss) and loss > 0
    assert refiner.refine_masks(torch.rand(1, 3, 64, 64), cam, torch.tensor([[1, 1]])).masks.shape == (1, 2, 64, 64)


def test_the_same_seed_writes_the_same_clip_file(tmp_path: Path) -> None:
    shape = ["--patch", "32", "--width", "64", "--layers", "1", "--text-width", "64", "--text-layers", "1", "--dim", "16"]
    for name in ("a.pt", "b.pt"):
        train_clip.main(["--world", "--out", str(tmp_path / name), "--steps", "2", "--batch-size", "4", *shape])
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_captions_file_without_its_columns_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "captions.csv"
    path.write_text("file,text\na.png,a boat\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must have the columns image,caption; got file,text"):
        train_clip.read_captions(path)


def test_the_demo_gives_the_same_rows_twice_and_draws_its_figure(tmp_path: Path) -> None:
    settings = experiment.Settings(
        train=24,
        val=8,
        test=40,
        host_steps=3,
        stage_steps=9,
        batch_size=4,
        clip_steps=2,
        config=COMPACT_CLIP.replace(epochs=2, prompt_length=2),
    )
    result = experiment.run(settings, seed=0)
    assert list(result.rows) == list(experiment.ROWS)
    assert all(0 < row.miou < 1 and set(row.share) == set(world.THINGS) for row in result.rows.values())
    again = experiment.run(settings, seed=0)
    assert [row.miou for row in again.rows.values()] == [row.miou for row in result.rows.values()]
    table = experiment.format_table(result.rows)
    assert all(name in table for name in experiment.ROWS)
    draw_figure(result, tmp_path / "demo.png")
    assert cv2.imread(str(tmp_path / "demo.png")).shape[1] > 1000


def test_summary_has_mean_and_deviation_over_seeds_and_paired_differences() -> None:
    def record(miou: float) -> dict:
        row = {"miou": miou, "share": dict.fromkeys(world.THINGS, miou), "threshold": 0.4}
        return {"rows": {name: {**row, "miou": miou + 0.1 * i} for i, name in enumerate(experiment.ROWS)}}

    text = summary([record(0.2), record(0.4)])
    assert "30.0 +- 14.1" in text  # mean of 20 and 40, deviation with n - 1
    assert "mIoU  [+ match + refine, learned prompts] - [host alone]: 30.0 +- 0.0" in text


def test_a_record_is_computed_again_only_for_other_code(tmp_path: Path) -> None:
    calls = []

    def run(seed: int) -> dict:
        calls.append(seed)
        return {"values": (1, 2)}

    first = cached_record(tmp_path, 3, "a", run)
    assert first == {"made_with": "a", "values": [1, 2]} and cached_record(tmp_path, 3, "a", run) == first
    assert calls == [3]
    assert cached_record(tmp_path, 3, "b", run)["made_with"] == "b" and calls == [3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["seed_3.json"]


def test_source_hash_depends_on_files_in_sub_folders(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "code.py").write_text("a = 1", encoding="utf-8")
    before = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not code", encoding="utf-8")
    assert source_hash(tmp_path) == before != source_hash()
    (tmp_path / "inner" / "code.py").write_text("a = 2", encoding="utf-8")
    assert source_hash(tmp_path) != before


def test_spread_of_one_value_has_no_deviation() -> None:
    assert spread([20.0]) == "20.0" and spread([20.0, 40.0], "±") == "30.0 ± 14.1"


# ------------------------------------------------------------------------------------------------ the kin world


def test_kin_occur_together_and_each_on_its_own_stuff() -> None:
    scenes = world.draw("weak", 600, 0, world.KIN)
    names = [{world.KIN.things[k] for k in scene.labels.nonzero()[0]} for scene in scenes]
    together = sum(any(set(pair) <= found for pair in world.KIN.kin) for found in names)
    mixed = sum(len(found) > 1 and not any(set(pair) <= found for pair in world.KIN.kin) for found in names)
    assert together > 40 and mixed > 20
    home = total = 0
    for scene in scenes:
        for k in scene.labels.nonzero()[0]:
            here = scene.stuff[scene.things == k + 1]
            home += int((here == world.STUFF.index(world.KIN.home[world.KIN.things[k]])).mean() > 0.5)
            total += 1
    assert 0.8 < home / total < 0.97


def test_text_features_of_the_kin_clip_give_the_clusters_of_the_file() -> None:
    refiner = clusters.new_refiner(clusters.Settings(), 0)
    found = clusters.find_clusters(refiner, clusters.TEXT)
    assert found.groups() == clusters.find_clusters(refiner, clusters.FILE).groups()
    assert found.provenance["num_clusters"] == "best silhouette" and len(found.provenance["silhouettes"]) == 4
    assert found.groups() == {frozenset(pair) for pair in world.KIN.kin}
    assert not found.groups() & clusters.find_clusters(refiner, clusters.CONTROL).groups()


def test_the_ablation_scores_every_row_and_route() -> None:
    settings = clusters.Settings(
        train=24,
        val=8,
        test=30,
        host_steps=3,
        host_batch_size=4,
        stage_steps=3,
        batch_size=4,
        config=COMPACT_CLIP.replace(epochs=2, prompt_length=2),
    )
    result = clusters.run(settings, seed=0)
    assert {row: tuple(columns) for row, columns in result.figures.items()} == clusters.ROUTES
    every = [(row, route, f) for row, columns in result.figures.items() for route, f in columns.items()]
    assert all(0 < f.cam.miou < 1 and 0 < f.aligned.miou < 1 and 0 <= f.kin <= 1 for _, _, f in every)
    assert {row for row, _, f in every if f.branch is not None} == {
        clusters.CLASSIFIER,
        clusters.BILSTM,
        clusters.CONTRAST,
        clusters.ALL,
    }
    alone = result.figures[clusters.HOST][clusters.FILE]
    assert all(f.cam != alone.cam for row, _, f in every if row != clusters.HOST)  # every row trained a network of its own
    for row in (clusters.TOKENS, clusters.ALL):  # both routes gave the same clusters
        assert result.figures[row][clusters.FILE] == result.figures[row][clusters.TEXT]
    assert result.figures[clusters.TOKENS][clusters.CONTROL].cam != result.figures[clusters.TOKENS][clusters.FILE].cam


def test_summary_of_the_ablation_has_mean_deviation_and_paired_differences() -> None:
    def record(miou: float) -> dict:
        row = {"miou": miou, "share": 0.1, "threshold": 0.4}
        figures = {}
        for i, name in enumerate(clusters.ROWS):
            own = {"cam": {**row, "miou": miou + 0.1 * i}, "aligned": row, "branch": row if name == clusters.ALL else None}
            figures[name] = {route: {**own, "kin": 0.2} for route in clusters.ROUTES[name]}
        same = {"a": ["car", "tram"], "b": ["deer"]}
        return {"figures": figures, "clusters": {clusters.FILE: same, clusters.TEXT: {"b": ["deer"], "c": ["tram", "car"]}}}

    text = clusters_command.summary([record(0.2), record(0.4)])
    assert "30.0 +- 14.1" in text
    assert "mIoU [+ cluster tokens, mismatched] - [host alone]: 10.0 +- 0.0" in text
    assert "The text features gave the clusters of the file in 2 of 2 seeds." in text
    assert len([line for line in text.splitlines() if line.startswith("all ")]) == 2
