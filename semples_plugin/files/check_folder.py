"""`PromptRefiner.check` on a folder of CAM files with its images.

Flow: `cam_folder` -> **check_folder** -> `check_page`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from ..check_report import CheckReport
from ..errors import CamFileError
from ..refiner import PromptRefiner
from .cam_folder import CamItem, CamLoader, evenly, plan

__all__ = ["FolderCheck", "check_folder"]


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
    loader = CamLoader(evenly(items, limit), labels, len(refiner.classes), batch_size, refiner.device)
    report = refiner.check(loader, loader.cam_of, progress=progress)
    return FolderCheck(report, loader.items, {**failed, **loader.failed})
