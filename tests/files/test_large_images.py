"""Images of more than `--max-pixels`: aligned tile by tile, or shrunk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import cv2
import numpy as np
import pytest
import torch

from semples_plugin import mask_tiles
from semples_plugin.files.cams import read_cam_file
from semples_plugin.files.large_images import label_map
from semples_plugin.files.refine_folder import Options, refine_folder
from semples_plugin.masks import pseudo_labels
from tests.files.refine_world import World, results

ROOT = Path(__file__).resolve().parents[2]


def scene(world: World, name: str, size: "tuple[int, int]", cam_size: "tuple[int, int]", layout: str = "dict") -> None:
    """Regions with sharp edges and noise, and a smooth CAM of classes 0 and 2."""
    height, width = size
    regions = world.random.integers(0, 200, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
    picture = cv2.resize(regions, (width, height), interpolation=cv2.INTER_NEAREST).astype(int)
    picture += world.random.integers(0, 40, picture.shape)
    cv2.imwrite(str(world.images / f"{name}.png"), picture.astype(np.uint8))
    cams = {k: cv2.resize(world.random.random((5, 4), np.float32), cam_size[::-1]) for k in (0, 2)}
    if layout == "npz":
        np.savez(world.cams / f"{name}.npz", keys=np.array(list(cams)), cam=np.stack(list(cams.values())))
    else:
        np.save(world.cams / f"{name}.npy", cams)  # type: ignore[arg-type]


@pytest.fixture
def scenes(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(mask_tiles.pamr_tiles, "__kwdefaults__", {"tile": 80, "overlap": 128, "device": "cpu"})
    scene(world, "same_size", (200, 310), (200, 310))
    scene(world, "small_cam", (200, 310), (13, 20), layout="npz")
    scene(world, "large_cam", (210, 150), (300, 200))
    return world


@pytest.mark.parametrize("extra", [(), ("--align", "none"), ("--threshold", "0.3:0.5", "--soft-masks")])
def test_tiles_give_what_one_piece_gives(extra: Any, scenes: World) -> None:
    assert scenes.refine(*extra) == 0
    tiled = scenes.root / "tiled"
    assert scenes.refine(*extra, "--max-pixels", 1000, out=tiled) == 0
    for name in ("same_size.npy", "small_cam.npz", "large_cam.npy"):
        one, other = (read_cam_file(out / "cams" / name, 3) for out in (scenes.out, tiled))
        assert list(one.cams) == list(other.cams) == [0, 2] and one.layout == other.layout
        for k, value in one.cams.items():
            assert np.abs(value - other.cams[k]).max() < 1e-4 and value.shape == other.cams[k].shape
        stem = name.partition(".")[0]
        assert (scenes.labels(stem) == scenes.labels(stem, tiled)).mean() > 0.9999


def test_tiles_write_the_same_bytes_again_and_with_workers(scenes: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # workers have tiles of the usual size
    for number in (0, 1):
        assert scenes.refine("--max-pixels", 1000, "--workers", number, out=scenes.root / f"out{number}") == 0
    assert results(scenes.root / "out0") == results(scenes.root / "out1") and len(results(scenes.root / "out0")) == 6


def test_shrink_refines_at_the_smaller_size(scenes: World, capsys: pytest.CaptureFixture[str]) -> None:
    scenes.refine("--max-pixels", 1000)
    assert scenes.refine("--max-pixels", 1000, "--large", "shrink") == 2
    assert "(large: 'tiles' there, 'shrink' now)" in capsys.readouterr().err
    shrunk = scenes.root / "shrunk"
    assert scenes.refine("--max-pixels", 1000, "--large", "shrink", out=shrunk) == 0
    one, other = (read_cam_file(out / "cams" / "same_size.npy", 3).cams[0] for out in (scenes.out, shrunk))
    assert one.shape == other.shape == (200, 310) and np.abs(one - other).mean() > 0.01
    with pytest.raises(ValueError, match="`large` must be 'tiles' or 'shrink'; got 'halves'"):
        refine_folder(scenes.cams, scenes.images, scenes.out, 3, Options(large="halves"))


def test_with_masks_without_a_class_large_images_are_shrunk(scenes: World) -> None:
    def proposals(one: Any) -> np.ndarray:
        assert one.picture is None and one.img.shape[1] * one.img.shape[2] <= 1000
        return np.ones((1, *one.img.shape[1:]), bool)

    how = Options(max_pixels=1000)
    assert refine_folder(scenes.cams, scenes.images, scenes.out, 3, how, proposals=proposals, progress=False).refined == 3


def test_with_clip_the_steps_see_the_image_made_smaller(scenes: World, make_refiner: Callable[..., Any]) -> None:
    refiner = make_refiner(learned=True)
    how = Options(max_pixels=2000, clip_steps=2, align=None)
    refine_folder(scenes.cams, scenes.images, scenes.root / "a", 3, how, refiner=refiner, progress=False)
    refine_folder(
        scenes.cams, scenes.images, scenes.root / "b", 3, how._replace(large="shrink"), refiner=refiner, progress=False
    )
    assert results(scenes.root / "a") == results(scenes.root / "b")  # without an alignment there are no tiles
    refine_folder(scenes.cams, scenes.images, scenes.root / "c", 3, how._replace(align="pamr"), refiner=refiner, progress=False)
    for k in (0, 2):
        smooth, aligned = (read_cam_file(scenes.root / out / "cams" / "same_size.npy", 3).cams[k] for out in "ac")
        assert 0.001 < np.abs(smooth - aligned).mean() < 0.2


def test_images_without_a_label(scenes: World) -> None:
    (scenes.root / "none.json").write_text(json.dumps({name: [] for name in ("same_size", "small_cam", "large_cam")}))
    assert scenes.refine("--max-pixels", 1000, "--labels", scenes.root / "none.json") == 0
    assert not scenes.labels("same_size").any() and not read_cam_file(scenes.out / "cams" / "same_size.npy", 3).cams


@pytest.mark.parametrize("threshold", [0.4, (0.3, 0.6)])
def test_the_label_map_by_rows_is_that_of_the_library(threshold: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(1, 3, 41, 30, generator=torch.Generator().manual_seed(0))
    expected = pseudo_labels(masks, threshold)[0].numpy()
    for at_once in (1, 100, 2**20):
        monkeypatch.setattr("semples_plugin.files.large_images.AT_ONCE", at_once)
        found = label_map({k: masks[0, k].numpy() for k in range(3)}, (41, 30), threshold)
        assert found.dtype == np.uint8 and np.array_equal(found, expected)
    numbers = label_map({4: masks[0, 0].numpy(), 19: masks[0, 1].numpy()}, (41, 30), 0.4)
    assert set(np.unique(numbers)) == {0, 5, 20} and not label_map({}, (4, 5), 0.4).any()


MEMORY = """
import sys
from pathlib import Path
from semples_plugin import cli

def refine(name):
    root = Path(sys.argv[1]) / name
    assert cli.main(["refine", "--images", str(root / "images"), "--cams", str(root / "cams"), "--out", str(root / "out"),
                     "--quiet"]) == 0
    status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count the parent's, from before exec
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

small = refine("small")
print("MiB", refine("large") - small)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_of_a_large_image_is_that_of_its_results_and_a_tile(tmp_path: Path) -> None:
    size = (1600, 5000)  # 8 million pixels; in one piece the alignment takes 1465 MiB for its weights alone
    for name, pixels in (("small", (40, 50)), ("large", size)):
        scene(World(tmp_path / name), "a", pixels, (16, 50))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert read_cam_file(tmp_path / "large" / "out" / "cams" / "a.npy", 3).cams[2].shape == size
    print(done.stdout)
    assert float(done.stdout.split()[-1]) < 750
