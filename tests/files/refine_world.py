"""Folders of images and CAM files for the tests of `semples refine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from semples_plugin import cli
from semples_plugin.files.cams import cam_paths, read_cam_file
from semples_plugin.files.images import find_image, read_image

CLASSES = ["boat", "train", "bird"]
SIZE = (24, 32)


class World:
    """Folders of images and CAM files, and what `semples refine` makes of them."""

    def __init__(self, root: Path):
        self.root, self.images, self.cams, self.out = root, root / "images", root / "cams", root / "out"
        self.images.mkdir(parents=True)
        self.cams.mkdir()
        self.classes = root / "classes.txt"
        self.classes.write_text("\n".join(CLASSES))
        self.random = np.random.default_rng(0)

    def image(self, name: str, size: Tuple[int, int] = SIZE) -> Path:
        path = self.images / f"{name}.jpg"
        cv2.imwrite(str(path), cv2.blur(self.random.integers(0, 256, (*size, 3), dtype=np.uint8), (5, 5)))
        return path

    def cam(self, name: str, keys: Sequence[int] = (0, 2), size: Tuple[int, int] = SIZE, layout: str = "dict") -> Path:
        values = self.random.random((len(CLASSES) if layout == "array" else len(keys), *size)).astype(np.float32)
        path = self.cams / f"{name}.{'npz' if layout == 'npz' else 'npy'}"
        if layout == "dict":
            np.save(path, dict(zip(keys, values)))  # type: ignore[arg-type]
        elif layout == "irn":
            low = torch.from_numpy(values[:, ::4, ::4].copy())
            np.save(path, {"keys": torch.tensor(list(keys)), "cam": low, "high_res": values})  # type: ignore[arg-type]
        elif layout == "array":
            np.save(path, values)
        else:
            np.savez(path, keys=np.array(keys), cam=values)
        return path

    def add(self, name: str, keys: Sequence[int] = (0, 2), size: Tuple[int, int] = SIZE, layout: str = "dict") -> None:
        self.image(name, size)
        self.cam(name, keys, size, layout)

    def arguments(self, *extra: Any, out: Optional[Path] = None) -> List[str]:
        own = ["refine", "--images", self.images, "--cams", self.cams, "--out", out or self.out, "--classes", self.classes]
        return [str(item) for item in (*own, "--quiet", *extra)]

    def refine(self, *extra: Any, out: Optional[Path] = None) -> int:
        return cli.main(self.arguments(*extra, out=out))

    def labels(self, name: str, out: Optional[Path] = None) -> np.ndarray:
        return np.array(Image.open((out or self.out) / "labels" / f"{name}.png"))


def results(out: Path) -> Dict[str, bytes]:
    """Name -> bytes of what a run made, without the records of the run itself."""
    files = [p for p in out.rglob("*") if p.is_file() and p.suffix not in (".json", ".part")]
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(files)}


def parts(out: Path) -> List[Path]:
    return list(out.rglob("*.part"))


def tensors(world: World, names: Sequence[str]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """img, cam and labels of images of one size, as a loader would give them."""
    img = torch.stack([torch.from_numpy(read_image(find_image(world.images, n))).permute(2, 0, 1).float() / 255 for n in names])
    cam, labels = torch.zeros(len(names), 3, *img.shape[2:]), torch.zeros(len(names), 3, dtype=torch.long)
    for i, name in enumerate(names):
        for k, value in read_cam_file(cam_paths(world.cams)[name], 3).cams.items():
            one = torch.from_numpy(value)[None, None]
            cam[i, k] = F.interpolate(one, size=img.shape[2:], mode="bilinear", align_corners=False)[0, 0]
            labels[i, k] = 1
    return img, cam, labels
