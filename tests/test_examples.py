"""The worlds and their CLIPs, the CLIP trainer, and the demo and the ablation of clusters on a few scenes."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples import train_clip
from examples.clusters import __main__ as clusters_command
from examples.clusters import experiment as clusters
from examples.controls import area_loss, random_clip
from examples.demo import experiment, host, pairings, world
from examples.demo.figure import draw_figure
from examples.demo.seeds import summary
from examples.recipe import COMPACT_CLIP
from examples.seeds import cached_record, cached_rows, paired_difference, select_rows, source_hash, spread, t_quantile
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
    again = experiment.run(settings, 0, experiment.ONE_SEED)  # the same figures also without the controls
    assert again.rows == {name: row for name, row in result.rows.items() if name not in experiment.CONTROLS}
    controls = experiment.run(settings, 0, experiment.CONTROLS)
    trained = set(experiment.CONTROLS) & set(experiment.TRAINED)
    assert controls.rows == {name: result.rows[name] for name in experiment.CONTROLS}
    assert controls.fit is None and not controls.nearest_words and set(controls.histories) == trained
    table = experiment.format_table(again.rows)
    assert all(name in table for name in again.rows)
    draw_figure(again, tmp_path / "demo.png")
    assert cv2.imread(str(tmp_path / "demo.png")).shape[1] > 1000


def test_control_rows_train_on_the_losses_that_they_are_named_after() -> None:
    settings = experiment.Settings(config=COMPACT_CLIP.replace(lambda_area=0.5))
    split = host.make_split(4, 7)
    cam = torch.rand(4, 6, 8, 8, requires_grad=True)
    terms = {}
    for row in (experiment.AREA, experiment.RANDOM, experiment.NO_AREA, experiment.MATCH):
        loss, terms[row] = experiment.row_loss(row, settings, 1)(split.images, cam, split.labels)
        assert torch.autograd.grad(loss, cam)[0].abs().sum() > 0
        if row == experiment.AREA:
            area = loss
    assert area.item() == pytest.approx(0.5 * terms[experiment.MATCH]["area"].item(), rel=1e-6)
    assert experiment.row_loss(experiment.HOST, settings, 1) is None
    assert "area" not in terms[experiment.NO_AREA] and "area" in terms[experiment.RANDOM]
    for name in ("match_foreground", "match_background"):
        assert terms[experiment.NO_AREA][name] == terms[experiment.MATCH][name] != terms[experiment.RANDOM][name]


def test_summary_has_mean_and_deviation_over_seeds_and_paired_differences() -> None:
    def record(miou: float) -> dict:
        row = {"miou": miou, "share": dict.fromkeys(world.THINGS, miou), "threshold": 0.4}
        return {"rows": {name: {**row, "miou": miou + 0.1 * i} for i, name in enumerate(experiment.ROWS)}}

    text = summary([record(0.2), record(0.4)])
    assert "30.0 +- 14.1" in text  # mean of 20 and 40, deviation with n - 1
    assert "mIoU  [+ match + refine, learned prompts] - [host alone]: +70.0 (95 % interval +70.0 to +70.0;" in text


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


def test_rows_that_are_cached_are_not_computed_again(tmp_path: Path) -> None:
    calls = []

    def run(seed: int, rows: list) -> dict:
        calls.append(rows)
        return {"rows": {name: len(calls) for name in rows}, "words": rows}

    assert cached_rows(tmp_path, 3, "a", ["x"], run)["rows"] == {"x": 1}
    both = cached_rows(tmp_path, 3, "a", ["y", "x"], run)
    assert both == {"made_with": "a", "rows": {"y": 2, "x": 1}, "words": ["y"]} and calls == [["x"], ["y"]]
    assert cached_rows(tmp_path, 3, "a", ["x"], run)["rows"] == {"x": 1} and len(calls) == 2  # y stays in the file
    assert cached_rows(tmp_path, 3, "a", ["y", "x"], run) == both and len(calls) == 2
    assert cached_rows(tmp_path, 3, "b", ["x"], run)["rows"] == {"x": 3}  # other code
    assert cached_rows(tmp_path, 3, "b", ["x", "y"], run)["rows"] == {"x": 3, "y": 4}


def test_rows_are_selected_by_name_or_by_how_they_begin() -> None:
    rows = ("host", "+ match", "+ match, aligned", "all")
    assert select_rows(rows, None) == rows
    assert select_rows(rows, ["+ match", "all"]) == ("+ match", "all")  # a whole name means that row alone
    assert select_rows(rows, ["all", "+"]) == ("+ match", "+ match, aligned", "all")
    with pytest.raises(ValueError, match="--rows must name rows of the table .*; got 'none'"):
        select_rows(rows, ["host", "none"])


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


def test_t_quantiles_are_those_of_the_printed_tables() -> None:
    printed = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # two-sided 5 %, 1 to 9 degrees of freedom
    assert [round(t_quantile(n), 3) for n in range(1, 10)] == printed
    assert t_quantile(30) == pytest.approx(2.042, abs=5e-4)


def test_a_paired_difference_has_its_interval_by_students_t() -> None:
    found = paired_difference([11.0, 14.0, 14.0], [10.0, 12.0, 11.0])  # differences 1, 2, 3: mean 2, deviation 1
    assert found.mean == 2 and found.deviations == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert str(found) == "+2.0 (95 % interval -0.5 to +4.5; 2.0 standard deviations)"
    assert paired_difference([1.5, 1.5], [1.0, 1.0]) == (0.5, 0.5, 0.5, float("inf"))
    with pytest.raises(ValueError, match="needs 2 or more seeds; got 1"):
        paired_difference([1.0], [2.0])


# ------------------------------------------------------------------------------------------------ controls


@pytest.mark.parametrize("kind", ["openai", "feature tower"])
def test_a_random_clip_has_the_same_weights_in_other_places(kind: str, tiny_clip: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_clip)
    if kind == "feature tower":
        (tmp_path / "tower.py").write_text(FEATURES, encoding="utf-8")
        model = train_clip.build_clip(f"{tmp_path / 'tower.py'}:features", 32, 16, 64, 1, 64, 1, 32).eval()
    model.token_embedding.weight.data[3:] = 0  # as for tokens that no caption held
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = random_clip(model, 1), random_clip(model, 1), random_clip(model, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the original is untouched
    assert type(first) is type(model) and torch.equal(first.logit_scale, model.logit_scale)
    for name, weight in model.named_parameters():
        shuffled = first.get_parameter(name)
        assert torch.equal(shuffled.flatten().sort()[0], weight.flatten().sort()[0])
        assert torch.equal(shuffled == 0, weight == 0)
        assert torch.equal(shuffled, again.get_parameter(name))
    img = torch.rand(2, 3, 32, 32)
    features = [load_clip(clip).encode_image(img) for clip in (model, first, other)]
    assert not torch.allclose(features[0], features[1]) and not torch.allclose(features[1], features[2])


def test_the_area_loss_is_the_area_term_of_the_refiner(tiny_clip: nn.Module) -> None:
    refiner = PromptRefiner(["boat", "bird"], clip=tiny_clip, config=COMPACT_CLIP.replace(lambda_area=1.5))
    cam, labels = torch.randn(2, 2, 5, 5, requires_grad=True), torch.tensor([[1, 1], [0, 1]])
    expected = 1.5 * refiner.compute(torch.rand(2, 3, 40, 40), cam, labels).terms["area"]
    loss = area_loss(cam, labels, refiner.config, refiner.encoder.image_size)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.autograd.grad(loss, cam)[0].abs().sum() > 0


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
    some = (clusters.AREA, clusters.MATCH)
    assert clusters.run(settings, 0, some).figures == {row: result.figures[row] for row in some}
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
        return {"rows": figures, "clusters": {clusters.FILE: same, clusters.TEXT: {"b": ["deer"], "c": ["tram", "car"]}}}

    text = clusters_command.summary([record(0.2), record(0.4)])
    assert "2 seeds; 11 of 11 rows" in text
    assert "30.0 +- 14.1" in text
    assert "mIoU [+ cluster tokens, mismatched] - [host alone]: +30.0 (95 % interval +30.0 to +30.0;" in text
    assert "aligned [+ SemPLeS] - [+ match]: +0.0 (95 % interval +0.0 to +0.0; 0.0 standard deviations)" in text
    assert "The text features gave the clusters of the file in 2 of 2 seeds." in text
    assert len([line for line in text.splitlines() if line.startswith("all ")]) == 2


def test_other_homes_move_every_thing() -> None:
    own, other = pairings.HOMES["own"], pairings.HOMES["other"]
    assert set(other.home) == set(own.home) == set(world.THINGS)
    assert all(other.home[name] != own.home[name] for name in world.THINGS)
    assert not set(other.home.values()) & set(other.neutral) and len(set(other.home.values())) == 6
    scenes = world.draw("weak", 200, 0, other)
    boats = [s for s in scenes if s.labels[0]]
    at_home = [(s.stuff[s.things == 1] == world.STUFF.index("road")).mean() > 0.5 for s in boats]
    assert len(boats) > 10 and np.mean(at_home) > 0.8


@pytest.mark.filterwarnings("ignore:.*background prompts failed")
def test_pairings_report_every_prompt() -> None:
    few = experiment.Settings(train=60, host_steps=2, stage_steps=2, config=COMPACT_CLIP.replace(epochs=1, prompt_restarts=0))
    record = pairings.run_seed(1, pairings.HOMES["other"], few)
    assert [row["name"] for row in record["prompts"]] == list(world.THINGS)
    assert {row["stuff"] for row in record["prompts"]} == set(pairings.OTHER_HOME.values())
    lines = pairings.summary({"other": {1: record}}).splitlines()
    alive = sum(row["alive"] for row in record["prompts"])
    assert len(lines) == 9 and lines[1].startswith("other     1  boat on road")
    assert lines[-1].startswith(f"6 pairings: {alive} prompts alive")
