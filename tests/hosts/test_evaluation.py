"""`semples evaluate` against the baselines' own `evaluation.py`, on the same CAM files: every class, every threshold."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import cv2
import numpy as np
import pytest

from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.files.cams import read_cam_file
from semples_plugin.files.evaluate_folder import evaluate_cams
from semples_plugin.files.images import read_label_png
from semples_plugin.metrics import Curve, iou_per_class

WORKER = Path(__file__).with_name("evaluation_worker.py")
NAMES = ["background", *VOC_CLASSES]
THRESHOLDS = [i / 100 for i in range(60)]


@pytest.fixture(scope="module")
def folder(hosts: Any, tmp_path_factory: pytest.TempPathFactory) -> Tuple[Path, Path, List[str]]:
    """CAM files for eight photos with masks: blurred masks with noise, normalized as the baselines do, and one absent class."""
    photos = hosts.photos()
    masks = sorted((photos / "SegmentationClass").glob("*.png"))[:8]
    path, rng = tmp_path_factory.mktemp("cams"), np.random.default_rng(0)
    for file in masks:
        mask = read_label_png(file)
        cams: Dict[int, np.ndarray] = {}
        for label in {*np.unique(mask).tolist(), 3} - {0, 255}:
            rough = cv2.GaussianBlur((mask == label).astype(np.float32), (0, 0), 12)
            rough += 0.4 * cv2.GaussianBlur(rng.random(mask.shape, np.float32), (0, 0), 8)
            cams[label - 1] = (rough - rough.min()) / (rough.max() - rough.min() + 1e-8)
        np.save(path / f"{file.stem}.npy", np.array(cams, dtype=object))
    return path, photos / "SegmentationClass", [file.stem for file in masks]


@pytest.mark.parametrize("host", ["mctformer", "transcam", "weaktr"])
def test_per_class_iou_at_every_threshold(host: str, hosts: Any, folder: Tuple[Path, Path, List[str]], tmp_path: Path) -> None:
    cams, gt, ids = folder
    repo = hosts.repo(host)
    (tmp_path / "ids.txt").write_text("\n".join(ids), encoding="utf-8")
    before = hosts.state(host)
    parts = [sys.executable, WORKER, repo, cams, gt, tmp_path / "ids.txt", tmp_path / "out.json"]
    hosts.finish([str(part) for part in parts], tmp_path)
    theirs = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ours = Curve(THRESHOLDS, 21)
    for name in ids:
        ours.add(read_cam_file(cams / f"{name}.npy", 20).cams, read_label_png(gt / f"{name}.png"))
    largest = 0.0
    for i, row in enumerate(theirs):
        for value, other in zip(iou_per_class(ours.confusion(i)), row):
            if value is None:
                assert not other > 0  # they print 0 or NaN for a class that is nowhere
            else:
                largest = max(largest, abs(100 * value - other))
    print(f"{host}: largest difference of an IoU {largest:.2e} points, {len(ids)} photos, {len(theirs)} thresholds")
    # WeakTr compares after a softmax in float32, whose rounding makes a few pixels ties; the others compare the CAMs.
    assert largest < (0.05 if host == "weaktr" else 1e-8)
    result = evaluate_cams(cams, gt, NAMES, ids, THRESHOLDS, chosen=True)
    best = [
        np.nanmean([v for v, w in zip(row, iou_per_class(ours.confusion(i))) if w is not None]) for i, row in enumerate(theirs)
    ]
    assert result.threshold == THRESHOLDS[int(np.argmax(best))] and 100 * result.miou == pytest.approx(max(best), abs=0.05)
    assert hosts.state(host) == before
