"""Running `semples`, and the folders that several of its commands are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import pytest
from PIL import Image

from semples_plugin import cli
from tests.voc_metric import literal_counts, some_images

CLASSES = ["boat", "train", "bird", "unicorn"]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Tuple[int, str, str]:
    """Exit status, stdout and stderr of `semples`."""
    capsys.readouterr()
    try:
        status = cli.main([str(item) for item in arguments])
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


class Data:
    """Folders of CAM files, label PNGs and ground truth of a few images."""

    def __init__(self, root: Path, seed: int = 0, count: int = 4):
        self.root, self.cams, self.labels, self.gt = root, root / "cams", root / "labels", root / "val"
        for folder in (self.cams, self.labels, self.gt):
            folder.mkdir(parents=True)
        self.classes = root / "classes.txt"
        self.classes.write_text("\n".join(CLASSES) + "\n\n")
        self.images = {f"2007_{i:06d}": one for i, one in enumerate(some_images(seed, 5, count))}
        for name, (cams, gt) in self.images.items():
            np.save(self.cams / f"{name}.npy", cams)  # type: ignore[arg-type]
            Image.fromarray(gt).save(self.gt / f"{name}.png")
            Image.fromarray(self.label_map(name, 0.25)).save(self.labels / f"{name}.png")

    def label_map(self, name: str, threshold: float) -> np.ndarray:
        cams, gt = self.images[name]
        tensor = np.zeros((5, *gt.shape), np.float32)
        tensor[0] = threshold
        for k, value in cams.items():
            tensor[k + 1] = value
        return tensor.argmax(0).astype(np.uint8)

    def arguments(self, *extra: Any, pred: Optional[Path] = None) -> List[Any]:
        return ["evaluate", "--pred", pred or self.cams, "--gt", self.gt, "--classes", self.classes, *extra]

    def miou(self, threshold: float, names: Optional[Sequence[str]] = None) -> float:
        tp, p, t = literal_counts([self.images[n] for n in (names or self.images)], threshold, 5)
        return float(np.mean([a / b for a, b in zip(tp, t + p - tp) if b]))
