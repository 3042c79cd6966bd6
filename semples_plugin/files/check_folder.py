"""`PromptRefiner.check` on a folder of CAM files with its images.

Flow: `cam_folder` -> **check_folder** -> `check_page`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..check_report import CheckReport
from ..errors import CamFileError
from ..refiner import PromptRefiner
from .cam_folder import CamItem, cam_tensor, chunks, load, plan

__all__ = ["FolderCheck", "check_folder"]

MAX_PIXELS = 1_000_000  # larger images are made smaller; CLIP sees them smaller still


class FolderCheck(NamedTuple):
    """What a check of a folder gave.

    Attributes:
        report: of `PromptRefiner.check`.
        items: the images that were looked at; image i of `report.pairs` is `items[i]`.
        failed: id -> reason, for images that could not be looked at.
    """

    report: CheckReport
    items: List[CamItem]
    failed: Dict[str, str]


def check_folder(
    cams: Path,
    images: Path,
    refiner: PromptRefiner,
    *,
    labels: Optional[Dict[str, np.ndarray]] = None,
    ids: Optional[Sequence[str]] = None,
    limit: Optional[int] = None,
    batch_size: int = 8,
    progress: bool = True,
) -> FolderCheck:
    """Check a refiner on CAM files and images.

    Args:
        cams: folder of CAM files.
        images: folder of images, named as the CAM files.
        refiner: built with `image_stats=None`.
        labels: image id -> (C,) multi-hot; by default the classes that each CAM file holds.
        ids: images to look at; by default all that have a CAM file.
        limit: look at so many of them at most, spread evenly over the sorted ids.
        batch_size: images at once.
        progress: whether to show a progress bar.

    Raises:
        CamFileError: if a folder is missing or empty, or none of the images can be read.
    """
    items, failed = plan(cams, images)
    if ids is not None:
        known = {item.name for item in items}
        failed = {name: failed.get(name, f"there is no CAM file of it in {cams}") for name in ids if name not in known}
        wanted = set(ids)
        items = [item for item in items if item.name in wanted]
        if not items:
            raise CamFileError(f"None of the {len(ids)} listed images can be checked: {next(iter(failed.values()), 'no id')}.")
    if limit is not None and len(items) > limit:
        items = [items[i * len(items) // limit] for i in range(limit)]
    loader = _Loader(items, labels, len(refiner.classes), batch_size, refiner.device)
    report = refiner.check(loader, loader.cam_of, progress=progress)
    return FolderCheck(report, loader.items, {**failed, **loader.failed})


class _Loader:
    """Batches of images of one size, and the CAM of the batch that was yielded last."""

    def __init__(
        self,
        items: Sequence[CamItem],
        labels: Optional[Dict[str, np.ndarray]],
        num_classes: int,
        batch_size: int,
        device: torch.device,
    ):
        self.chunks = chunks(items, batch_size)
        self.labels, self.num_classes, self.device = labels, num_classes, device
        self.items: List[CamItem] = []
        self.failed: Dict[str, str] = {}
        self._cam: Optional[Tensor] = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for chunk in self.chunks:
            loaded, broken = load(chunk, self.labels, self.num_classes, MAX_PIXELS)
            self.failed.update(broken)
            if not loaded:
                continue
            self.items += [one.item for one in loaded]
            img = torch.stack([one.img for one in loaded])  # (B, 3, h, w)
            cam = torch.stack([cam_tensor(one.content, img.shape[2:], self.num_classes) for one in loaded])  # (B, C, h, w)
            self._cam = cam.to(self.device)
            yield img, torch.from_numpy(np.stack([one.labels for one in loaded]))
        if not self.items:
            reason = next(iter(self.failed.values()))
            raise CamFileError(f"None of the {len(self.failed)} images can be checked: {reason}.")

    def cam_of(self, img: Tensor) -> Tensor:
        assert self._cam is not None and len(self._cam) == len(img)
        return self._cam
