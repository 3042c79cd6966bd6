from __future__ import annotations

import json
import os
import pickle
import types
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import cv2
import numpy as np
import pytest
import torch

from semples_plugin import cli
from semples_plugin.files.cams import read_cam_file
from semples_plugin.masks import CLIP_STEPS
from tests.files.refine_world import World, results

CLASSES = ["boat", "train", "bird"]


# ---------------------------------------------------------------------------------------------------- the folder of results


@pytest.mark.parametrize(
    "other",
    [("--threshold", 0.5), ("--align", "none"), ("--batch-size", 3), ("--max-pixels", 100), ("--soft-masks",)],
)
def test_other_settings_in_the_same_folder_are_refused(
    other: Sequence[Any], some: World, capsys: pytest.CaptureFixture[str]
) -> None:
    some.refine()
    before = results(some.out)
    capsys.readouterr()
    assert some.refine(*other) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "holds results of other settings" in error and " there, " in error
    assert results(some.out) == before
    assert some.refine() == 0


def test_other_inputs_in_the_same_folder_are_refused(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    some.refine()
    (some.root / "other.txt").write_text("boat\ntrain\ncat")
    (some.root / "labels.json").write_text(json.dumps({f"img{i}": ["boat"] for i in range(9)}))
    os.symlink(some.cams, some.root / "same")
    for extra in (["--classes", some.root / "other.txt"], ["--labels", some.root / "labels.json"], ["--images", some.cams]):
        assert some.refine(*extra) == 2
        expected = "has an image" if extra[0] == "--images" else "holds results of other settings"
        assert expected in capsys.readouterr().err
    assert some.refine("--cams", some.root / "same") == 0  # the same folder by another name


def test_folders_with_other_content_are_refused(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert some.refine(out=some.root) == 2  # it has a folder `cams`
    assert "holds results without a settings.json. Choose another folder." in capsys.readouterr().err
    (some.out / "labels").mkdir(parents=True)
    (some.out / "labels" / "mine.png").write_bytes(b"mine")
    assert some.refine() == 2 and (some.out / "labels" / "mine.png").read_bytes() == b"mine"
    (some.root / "mine").mkdir()
    (some.root / "mine" / "settings.json").write_text("{}")
    assert some.refine(out=some.root / "mine") == 2
    assert (some.root / "mine" / "settings.json").read_text() == "{}"
    (some.root / "file").write_text("")
    capsys.readouterr()
    assert some.refine(out=some.root / "file") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--cams", "--images"])
def test_a_mistyped_folder_can_be_corrected(option: str, some: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert some.refine(option, some.root / "mistyped") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "there is no folder" in error and "mistyped" in error
    assert some.refine() == 0  # the same OUT: nothing was made in it


def test_a_folder_without_cams_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.refine() == 2
    assert capsys.readouterr().err == f"error: {world.cams} holds no .npy or .npz file.\n"


# ---------------------------------------------------------------------------------------------------- output


def test_json_and_quiet(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    some.cam("lonely")
    assert some.refine("--json") == 1
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (
        summary["refined"] == 9 and summary["skipped"] == 0 and list(summary["failed"]) == ["lonely"] and summary["seconds"] > 0
    )
    assert summary == json.loads((some.out / "summary.json").read_text())
    assert captured.err.startswith("failed: lonely: no image lonely.jpg") and len(captured.err.splitlines()) == 1
    loud = [item for item in some.arguments(out=some.root / "loud") if item != "--quiet"]
    (some.cams / "lonely.npy").unlink()
    assert cli.main(loud) == 0
    captured = capsys.readouterr()
    assert "refining" in captured.err and "9/9" in captured.err  # the bar
    assert captured.out.startswith("9 refined, 0 done before, 0 failed, ")
    assert f": {some.root / 'loud'}\nlabels: background threshold 0.4\n" in captured.out


def test_out_inside_an_input_folder_is_refused(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    for out, name in ((some.cams, "cams"), (some.root / "images" / "new", "images")):
        before = sorted(path.name for path in some.cams.iterdir())
        assert some.refine(out=out) == 2 and sorted(path.name for path in some.cams.iterdir()) == before
        assert f"is inside --{name}" in capsys.readouterr().err and not (some.root / "images" / "new").exists()


def test_images_without_a_positive_label_are_counted(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    (some.root / "none.json").write_text(json.dumps({f"img{i}": [] for i in range(9)}))
    assert some.refine("--labels", some.root / "none.json") == 0
    assert "9 images have no positive label; their pseudo labels are all background" in capsys.readouterr().out


def test_a_class_list_may_name_background_first(some: World) -> None:
    assert some.refine(out=some.root / "plain") == 0
    some.classes.write_text("background\n" + some.classes.read_text())
    (some.root / "labels.csv").write_text(
        "image,labels\n" + "".join(f"img{i},background;{['boat', 'train;bird', 'boat;train;bird'][i % 3]}\n" for i in range(9))
    )
    assert some.refine() == 0 and some.refine("--labels", some.root / "labels.csv", out=some.root / "labelled") == 0
    assert results(some.out) == results(some.root / "plain") == results(some.root / "labelled")


def test_files_with_a_background_column_say_so(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(some.root / "labels.npy", {f"img{i}": np.ones(4) for i in range(9)})  # type: ignore[arg-type]
    assert some.refine("--labels", some.root / "labels.npy") == 2
    assert (
        "must have 3 labels of 0 and 1" in (error := capsys.readouterr().err) and "if it is column 0, leave that out" in error
    )
    np.savez(some.root / "labels.npz", ids=np.array(["img0"]), labels=np.ones((1, 4)))
    assert some.refine("--labels", some.root / "labels.npz") == 2
    assert "Background is no class: if it is column 0, leave that out." in capsys.readouterr().err
    np.save(some.cams / "img0.npy", np.ones((4, 24, 32), np.float32))
    np.save(some.cams / "img1.npy", {3: np.ones((32, 24), np.float32)})  # type: ignore[arg-type]
    assert some.refine() == 1
    lines = capsys.readouterr().err.splitlines()
    assert "If map 0 is background, save the array without it, cam[1:]." in lines[0]
    assert "If 0 is background there, leave it out and count the classes from 0." in lines[1]


# ---------------------------------------------------------------------------------------------------- --suppress, --clip-steps


@pytest.fixture
def folder(tmp_path: Path, make_refiner: Callable[..., Any]) -> Path:
    """Images, CAM files, class names and learned prompts."""
    generator = np.random.default_rng(0)
    for part in ("images", "cams"):
        (tmp_path / part).mkdir()
    for i in range(3):
        picture = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"img{i}.png"), cv2.blur(picture, (7, 7)))
        cams = {k: cv2.blur(generator.random((40, 48)).astype(np.float32), (9, 9)) for k in [(0,), (0, 2), (1,)][i]}
        np.save(tmp_path / "cams" / f"img{i}.npy", cams)  # type: ignore[arg-type]
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    make_refiner(learned=True).save(tmp_path / "prompts.safetensors")
    return tmp_path


def refine(folder: Path, out: str, *extra: Any) -> int:
    own: List[Any] = ["refine", "--images", folder / "images", "--cams", folder / "cams", "--out", folder / out]
    return cli.main([str(item) for item in (*own, "--classes", folder / "classes.txt", "--quiet", *extra)])


def made(out: Path) -> Dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.np*")) + sorted(out.rglob("*.png"))}


@pytest.mark.parametrize("how", [["--clip-steps", "3"], ["--suppress", "--clip-steps", "0"], ["--suppress"]])
def test_clip_changes_the_cams_and_two_runs_write_the_same_bytes(how: List[str], folder: Path, clip_file: Path) -> None:
    clip = ["--clip", clip_file, "--prompts", folder / "prompts.safetensors"]
    assert refine(folder, "plain", "--align", "none") == 0
    for out in ("a", "b"):
        assert refine(folder, out, "--align", "none", *how, *clip) == 0
    assert made(folder / "a") == made(folder / "b") and len(made(folder / "a")) == 6
    for i in range(3):
        plain, refined = (read_cam_file(folder / out / "cams" / f"img{i}.npy", 3).cams for out in ("plain", "a"))
        assert list(plain) == list(refined)
        for k in plain:
            assert np.abs(plain[k] - refined[k]).max() > 0.01 and refined[k].min() >= 0 and refined[k].max() <= 1
    facts = json.loads((folder / "a" / "settings.json").read_text())
    assert len(facts["prompts"]) == 64 and facts["clip"].startswith("clip.pt [") and facts["classes"] == CLASSES


def test_clip_steps_are_the_default_where_there_is_a_clip(
    folder: Path, clip_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(out: str) -> int:
        return int(json.loads((folder / out / "settings.json").read_text())["clip_steps"])

    assert refine(folder, "without") == 0 and steps("without") == 0
    assert refine(folder, "none", "--clip-steps", 0) == 0 and steps("none") == 0
    assert made(folder / "none") == made(folder / "without") and "CLIP" not in capsys.readouterr().out
    assert refine(folder, "clip", "--clip", clip_file) == 0 and steps("clip") == CLIP_STEPS
    assert f"CLIP: clip.pt, {CLIP_STEPS} steps\n" in capsys.readouterr().out
    assert refine(folder, "said", "--clip", clip_file, "--clip-steps", CLIP_STEPS) == 0
    assert made(folder / "said") == made(folder / "clip") != made(folder / "without")
    prompts = ["--clip", clip_file, "--prompts", folder / "prompts.safetensors"]
    assert refine(folder, "prompts", *prompts) == 0 and steps("prompts") == CLIP_STEPS
    assert made(folder / "prompts") != made(folder / "clip")


def test_prompts_and_clip_belong_to_the_settings(folder: Path, clip_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = ["--clip", clip_file, "--clip-steps", 1]
    assert refine(folder, "a", *clip) == 0
    assert refine(folder, "a", "--clip", clip_file, "--clip-steps", 2) == 2
    assert "holds results of other settings (clip_steps: 1 there, 2 now)" in capsys.readouterr().err
    assert refine(folder, "a", *clip) == 0  # goes on
    assert refine(folder, "a", *clip, "--prompts", folder / "prompts.safetensors") == 2
    assert refine(folder, "a", *clip, "--set", "lambda_b=1") == 2
    assert capsys.readouterr().err.count("holds results of other settings") == 2
    assert refine(folder, "b", *clip, "--set", "lambda_b=9", "--set", "max_views=2") == 0
    assert made(folder / "a") != made(folder / "b")


@pytest.mark.parametrize(
    "extra, reason",
    [
        (["--clip-steps", "0", "--prompts", "prompts.safetensors"], "matter only where CLIP is used"),
        (["--clip-steps", "0", "--clip", "clip.pt"], "matter only where CLIP is used"),
        (["--set", "lambda_b=1"], "matter only where CLIP is used"),
        (["--device", "cuda"], "matter only where CLIP is used"),
        (["--clip-steps", "-1"], "--clip-steps and --workers must be at least 0"),
        (["--workers", "-1"], "--clip-steps and --workers must be at least 0"),
        (["--suppress", "--set", "lambda_b"], "--set takes NAME=VALUE; got 'lambda_b'"),
        (["--suppress", "--clip", "CLIP", "--set", "unknown=1"], "unknown"),
        (["--suppress", "--clip", "CLIP", "--set", "lambda_b=-1"], "`lambda_b` must be at least 0"),
        (["--suppress", "--clip", "none.pt"], "none.pt"),
        (["--suppress", "--clip", "FOLDER/classes.txt"], "is no CLIP weights file"),
        (["--suppress", "--clip", "CLIP", "--prompts", "FOLDER/none"], "No prompt file at"),
        (["--suppress", "--clip", "CLIP", "--prompts", "FOLDER/classes.txt"], "is damaged or no safetensors file"),
        (["--suppress", "--clip", "CLIP", "--prompts", "FOLDER/prompts.safetensors", "--classes", "voc"], "3 classes"),
        (["--suppress", "--clip", "CLIP", "--device", "nonsense"], "nonsense"),
        pytest.param(
            ["--suppress", "--clip", "CLIP", "--device", "cuda"],
            "",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_wrong_options(
    extra: List[str], reason: str, folder: Path, clip_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [item.replace("FOLDER", str(folder)).replace("CLIP", str(clip_file)) for item in extra]
    assert refine(folder, "out", *given) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ") and reason in captured.err and not made(folder / "out")


def test_set_takes_the_names_of_the_configuration(folder: Path, clip_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for clip in (["--clip", clip_file], ["--clip", clip_file, "--prompts", folder / "prompts.safetensors"]):
        assert refine(folder, "out", "--clip-steps", 1, *clip, "--set", "lambda_aera=1") == 2
        expected = "error: PromptRefiner has no option 'lambda_aera'; did you mean 'lambda_area'?\n"
        assert capsys.readouterr() == ("", expected)


def test_the_image_statistics_cannot_be_set(folder: Path, clip_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refine(folder, "out", "--clip-steps", 1, "--clip", clip_file, "--set", "image_stats=imagenet") == 2
    assert capsys.readouterr().err.startswith("error: --set image_stats is not possible: images are read as values from 0 to 1")
    assert refine(folder, "out", "--clip-steps", 1, "--clip", clip_file, "--set", "image_stats=None") == 0


def test_the_configuration_in_the_prompt_file_counts_and_set_overrides_it(
    folder: Path, clip_file: Path, make_refiner: Callable[..., Any]
) -> None:
    usual, other = folder / "prompts.safetensors", folder / "other.safetensors"
    refiner = make_refiner(lambda_b=9.0, lambda_area=2.0, image_stats="imagenet", background_channel=True)
    refiner.load_prompts(usual).save(other)
    how = ["--clip-steps", 3, "--align", "none", "--clip", clip_file, "--prompts"]
    assert refine(folder, "usual", *how, usual) == 0
    assert refine(folder, "from_the_file", *how, other) == 0
    assert refine(folder, "set", *how, usual, "--set", "lambda_b=9", "--set", "lambda_area=2") == 0
    assert refine(folder, "back", *how, other, "--set", "lambda_b=2.4", "--set", "lambda_area=0") == 0
    assert made(folder / "from_the_file") == made(folder / "set") != made(folder / "usual")
    assert made(folder / "back") == made(folder / "usual")


# ---------------------------------------------------------------------------------------------------- masks, sam, crf


def label_maps(world: World, skip: Sequence[str] = ()) -> Path:
    """A label map of 12 masks per image."""
    folder = world.root / "proposals"
    folder.mkdir()
    for path in sorted(world.images.iterdir()):
        if path.stem not in skip:
            height, width = cv2.imread(str(path)).shape[:2]
            low = np.arange(1, 13, dtype=np.uint8).reshape(3, 4)
            cv2.imwrite(str(folder / f"{path.stem}.png"), cv2.resize(low, (width, height), interpolation=cv2.INTER_NEAREST))
    return folder


def test_masks_give_the_classes_their_shape(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = label_maps(some)
    assert some.refine("--masks", folder, "--align", "none", "--threshold", 0.45) == 0
    assert f"masks: of {folder}, chosen at 0.45\n" in capsys.readouterr().out
    changed = 0
    for path in folder.iterdir():
        proposals = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cams = read_cam_file(some.cams / f"{path.stem}.npy", 3).cams
        refined = read_cam_file(some.out / "cams" / f"{path.stem}.npy", 3).cams
        maps = {k: (cam - cam.min()) / (cam.max() - cam.min() + 1e-6) for k, cam in cams.items()}
        best = np.stack(list(maps.values())).max(0)
        for k, value in refined.items():
            if set(np.unique(value)) <= {0, 1}:  # a union of proposals, and chosen by the rules
                region = (maps[k] == best) & (best > 0.45)
                for m in np.unique(proposals):
                    assert len(np.unique(value[proposals == m])) == 1
                    if value[proposals == m].all():
                        assert region[proposals == m].mean() > 0.5
                        changed += 1
    assert changed > 5
    facts = json.loads((some.out / "settings.json").read_text())
    assert facts["masks"] == str(folder) and facts["sam"] is None
    capsys.readouterr()
    assert some.refine("--align", "none", "--threshold", 0.45) == 2  # other settings
    assert "masks: " in capsys.readouterr().err


def test_runs_with_masks_write_the_same_bytes_and_can_be_cut_in_processes(some: World, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ["--masks", label_maps(some), "--threshold", "0.3:0.5", "--max-pixels", 500]
    assert some.refine(*how) == 0 and some.refine(*how, out=some.root / "b") == 0
    assert results(some.out) == results(some.root / "b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert some.refine(*how, out=some.root / "c") == 0
    assert results(some.out) == results(some.root / "c")


def test_masks_with_clip(folder: Path, clip_file: Path) -> None:
    (folder / "m").mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / "m" / f"img{i}.png"), np.tile(np.arange(48, dtype=np.uint8) // 12, (40, 1)))
    how: List[Any] = ["--clip", clip_file, "--clip-steps", 1]
    assert refine(folder, "a", *how) == 0 and refine(folder, "b", *how, "--masks", folder / "m") == 0
    assert made(folder / "a") != made(folder / "b")


def test_wrong_masks_fail_their_own_image(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = label_maps(some, skip=["img0"])
    (folder / "img1.png").write_bytes(b"")
    (folder / "img2.png").unlink()
    (folder / "img2.json").write_text('[{"segmentation": {"size": [99999, 99999], "counts": [9999800001]}}]')
    assert some.refine("--masks", folder, "--json") == 1
    failed = json.loads(capsys.readouterr().out)["failed"]
    assert sorted(failed) == ["img0", "img1", "img2"]
    assert failed["img0"].startswith("expected one file of masks per image; there is no masks img0.json, img0.png or img0/ in")
    assert "img1.png is not a readable image" in failed["img1"] and "mask 0 has size 99999 x 99999" in failed["img2"]
    assert not (some.out / "labels" / "img0.png").exists() and (some.out / "labels" / "img3.png").exists()


@pytest.mark.parametrize(
    "extra, reason",
    [
        (["--masks", "nowhere"], "Expected a folder of masks; there is no folder nowhere."),
        (["--masks", "images", "--sam", "model"], "--masks and --sam both give masks without a class; choose one."),
        (["--masks", ".."], "is inside --masks"),
        (["--sam", "nowhere/at/all"], "'nowhere/at/all' cannot be loaded as a Segment Anything model"),
        (["--sam", "nowhere", "--device", "nonsense"], "--device 'nonsense' cannot be used"),
    ],
)
def test_wrong_sources_of_masks_end_the_run_at_once(
    extra: List[str], reason: str, some: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = [str(some.root / item) if item in ("images", "..") else item for item in extra]
    assert some.refine(*[str(some.root) if item.endswith("..") else item for item in given]) == 2
    error = capsys.readouterr().err
    assert f"error: {reason}" in error or reason in error and error.startswith("error: ")
    assert not results(some.out)


def test_sam_makes_the_masks(some: World, sam_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from semples_plugin import sam

    monkeypatch.setattr(sam, "POINTS_PER_SIDE", 2)
    assert some.refine("--sam", sam_folder) == 0
    assert f"masks: of {sam_folder}, chosen at 0.4\n" in capsys.readouterr().out
    assert json.loads((some.out / "settings.json").read_text())["sam"] == str(sam_folder)
    assert some.refine("--sam", sam_folder, out=some.root / "b") == 0 and results(some.out) == results(some.root / "b")


@pytest.mark.parametrize("workers, held", [(0, True), (2, False)])
def test_sam_is_loaded_where_it_is_used(workers: int, held: bool, some: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from semples_plugin.files import refine_folder

    loaded, given = [], []

    def stand_in(model: str, device: str) -> Any:
        loaded.append((model, device))
        return lambda img: torch.ones(1, *img.shape[1:], dtype=torch.bool)

    def refined(*_: Any, proposals: Any, **__: Any) -> refine_folder.Summary:
        given.append(proposals)
        return refine_folder.Summary(0, 0, 0, {}, 1.0)

    monkeypatch.setattr("semples_plugin.sam.SamProposals", stand_in)
    monkeypatch.setattr(refine_folder, "refine_folder", refined)
    some.out.mkdir()
    assert some.refine("--sam", "model", "--workers", workers) == 0
    assert loaded == [("model", "cpu")] and (given[0]._sam is not None) == held  # loaded once, to see that it can be
    copy = pickle.loads(pickle.dumps(given[0]))
    assert len(loaded) == 1
    image = types.SimpleNamespace(img=torch.zeros(3, 4, 5))
    assert copy(image).shape == copy(image).shape == (1, 4, 5) and len(loaded) == 2


def test_align_crf_in_folders(some: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pydensecrf", None)
        assert some.refine("--align", "crf") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: align='crf' needs pydensecrf") and "pip install pydensecrf2" in error
    assert not some.out.exists()
    pytest.importorskip("pydensecrf.densecrf")
    assert some.refine("--align", "crf") == 0 and some.refine("--align", "crf", out=some.root / "b") == 0
    assert results(some.out) == results(some.root / "b")


# ---------------------------------------------------------------------------------------------------- --threshold auto


def test_the_threshold_is_chosen_by_clip(some: World, clip_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--clip", clip_file, "--clip-steps", "0")
    assert some.refine(*options, "--threshold", "auto") == 0
    printed = capsys.readouterr().out
    settings = json.loads((some.out / "settings.json").read_text())
    assert f"background threshold {settings['threshold']:g}, chosen by CLIP on 18 (image, class) pairs" in printed
    assert some.refine(*options, "--threshold", "auto") == 0 and "9 done before" in capsys.readouterr().out
    other = some.root / "other"
    assert some.refine("--threshold", settings["threshold"], out=other) == 0  # CLIP chose the threshold and did no more
    assert results(other) == results(some.out)


def test_a_threshold_is_not_chosen_for_masks_without_a_class(some: World, capsys: pytest.CaptureFixture[str]) -> None:
    (some.root / "masks").mkdir()
    assert some.refine("--threshold", "auto", "--masks", some.root / "masks") == 2
    assert "--threshold auto chooses for masks that are made of the CAMs" in capsys.readouterr().err
