"""The chain of `examples.voc` with the real MCTformer+: a rehearsal, once whole and once killed twice, with the same files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import pytest
from PIL import Image

from semples_plugin.class_names import COCO_CATEGORY_IDS, COCO_CLASSES, VOC_CLASSES

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OWN = ("ledger.html", "steps/ledger.json", "steps/digests.json")  # the second holds the digest of the first
TIMES = re.compile(rb'"(started|finished|seconds|went_on|stamp)": [^\n]*')


def command(hosts: Any, out: Path, coco: Optional[Path] = None) -> List[str]:
    words = [sys.executable, "-W", "ignore", "-m", "examples.voc", "--repo", str(hosts.repo("mctformer"))]
    words += ["--voc", str(hosts.photos())] if coco is None else ["--coco", str(coco)]
    return [*words, "--out", str(out), "--rehearsal", "--cpu", "--limit", "4"]


def environment() -> Dict[str, str]:
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(hosts: Any, out: Path, *options: str, coco: Optional[Path] = None) -> str:
    words = [*command(hosts, out, coco), *options]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def kill_at(hosts: Any, out: Path, path: Path) -> None:
    """Start the chain and kill all its processes when there is such a file."""
    process = subprocess.Popen(
        command(hosts, out),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 1200
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def contents(out: Path) -> Dict[str, bytes]:
    """All files without times in records; logs, the page and summaries of one process not at all."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and not name.startswith("logs") and name not in OWN and path.name != "summary.json":
            found[name] = TIMES.sub(b"", path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
    return found


@pytest.fixture(autouse=True)
def masks(hosts: Any) -> None:
    if not (hosts.photos() / "SegmentationClass").is_dir() or not (hosts.photos() / "ImageSets").is_dir():
        pytest.skip("VOC_PHOTOS has no SegmentationClass and ImageSets")


def test_a_rehearsal_runs_to_the_end_and_again_after_kills(hosts: Any, tmp_path: Path) -> None:
    before, out = hosts.state("mctformer"), tmp_path / "run"
    assert "All done" in run(hosts, out)
    ledger = json.loads((out / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["banner"].startswith("Rehearsal")
    rows = {(section["title"], row["name"]): row for section in ledger["sections"] for row in section["rows"]}
    assert all(0 <= row["mean"] <= 100 for row in rows.values() if not row["why"])
    assert not any(row["why"] for (title, name), row in rows.items() if title in ("Seeds", "Masks") and "CRF" not in name)
    (gain,) = rows["Masks", "fixed threshold"]["gain"]
    assert gain == pytest.approx(
        rows["Masks", "fixed threshold"]["mean"] - rows["Masks", "host alone: fixed threshold"]["mean"]
    )
    assert rows["Segmentation", "network alone"]["split"] == "val"
    whole = contents(out)
    again = run(hosts, out)
    assert again.count("done before, skipped") == again.count("[") - 2  # all but the check and the ledger
    out.rename(tmp_path / "whole")
    kill_at(hosts, out, out / "seed0" / "runner" / "match.jsonl")
    kill_at(hosts, out, out / "seed0" / "masks" / "cams")
    run(hosts, out)
    killed = contents(out)
    assert killed.keys() == whole.keys()
    assert [name for name in whole if killed[name] != whole[name]] == []
    assert hosts.state("mctformer") == before


def test_prompts_learned_along_the_way(hosts: Any, tmp_path: Path) -> None:
    run(hosts, tmp_path, "--online", "4")
    assert (tmp_path / "seed0" / "runner" / "online.pt").is_file()
    ledger = json.loads((tmp_path / "ledger.json").read_text(encoding="utf-8"))
    assert list(ledger["sections"][0]["steps"]) == ["online"]
    assert all(row["gain"] for row in ledger["sections"][0]["rows"] if not row["control"])


SAME = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
        "sofa": "couch", "tvmonitor": "tv"}  # fmt: skip
TO_COCO = np.array([0, *(1 + list(COCO_CLASSES).index(SAME.get(name, name)) for name in VOC_CLASSES), *[0] * 235])  # 255 -> 0


def as_coco(voc: Path, repo: Path, out: Path, split: str, count: int) -> Dict[str, np.ndarray]:
    """Photos of VOC in the layout of COCO under names of the host's list; id -> mask in labels of COCO."""
    mask_api = pytest.importorskip("pycocotools.mask")
    names = (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()[:count]
    ids = (repo / "coco" / f"{split}_id.txt").read_text(encoding="utf-8").split()[:count]
    images: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    masks = {}
    (out / f"{split}2014").mkdir(parents=True)
    (out / "annotations").mkdir(exist_ok=True)
    for name, new in zip(names, ids):
        (out / f"{split}2014" / f"{new}.jpg").write_bytes((voc / "JPEGImages" / f"{name}.jpg").read_bytes())
        mask = masks[new] = TO_COCO[np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png"))]
        images.append({"id": int(new[-12:]), "file_name": f"{new}.jpg", "height": mask.shape[0], "width": mask.shape[1]})
        for label in set(np.unique(mask).tolist()) - {0}:
            segmentation = mask_api.encode(np.asfortranarray(mask == label, dtype=np.uint8))
            segmentation["counts"] = segmentation["counts"].decode()
            one = {"id": len(annotations) + 1, "image_id": int(new[-12:]), "category_id": COCO_CATEGORY_IDS[label - 1]}
            annotations.append({**one, "segmentation": segmentation, "area": int((mask == label).sum()), "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in zip(COCO_CATEGORY_IDS, COCO_CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / "annotations" / f"instances_{split}2014.json").write_text(json.dumps(content), encoding="utf-8")
    return masks


def test_photos_in_the_layout_of_coco(hosts: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    masks = [as_coco(hosts.photos(), hosts.repo("mctformer"), tmp_path / "coco", split, 4) for split in ("train", "val")]
    run(hosts, out, coco=tmp_path / "coco")
    for split, expected in zip(("train", "val"), masks):
        for name, mask in expected.items():
            assert (np.asarray(Image.open(out / "coco-masks" / split / f"{name}.png")) == mask).all()
    ledger = json.loads((out / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["facts"]["data_set"] == "COCO"
    rows = {(section["title"], row["name"]): row for section in ledger["sections"] for row in section["rows"]}
    assert rows["Seeds", "scale 1.0, and its mirror image"]["images"] == rows["Segmentation", "network alone"]["images"] == 4
    assert json.loads((out / "seed0" / "segmentation" / "model" / "config.json").read_text())["id2label"].keys() >= {"80"}
