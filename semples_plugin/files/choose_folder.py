"""`choices.choose_threshold` on a folder of CAM files with its images. Flow: `cam_folder` -> **choose_folder** -> cli."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Optional

import numpy as np

from ..choices import ThresholdChoice, choose_threshold
from ..refiner import PromptRefiner
from .cam_folder import CamLoader, evenly, plan
from .refine_folder import Options

__all__ = ["choose_folder"]


def choose_folder(
    cams: Path,
    images: Path,
    refiner: PromptRefiner,
    options: Options,
    *,
    labels: Optional[Dict[str, np.ndarray]] = None,
    limit: Optional[int] = 200,
    progress: bool = True,
) -> ThresholdChoice:
    """The background threshold for a folder that is to be refined, from image-level labels and CLIP alone.

    Args:
        cams, images, labels: as for `refine_folder`.
        refiner: built with `image_stats=None`.
        options: how the folder will be refined; `align`, `suppress`, `clip_steps` and `batch_size` count.
        limit: images to look at, spread evenly over the sorted ids; None for all.
        progress: whether to show a progress bar.

    Raises:
        CamFileError: if a folder is missing or empty, or none of the images can be read.
        ValueError: if none of the images has a positive label.
    """
    items, _ = plan(cams, images)
    loader = CamLoader(evenly(items, limit), labels, len(refiner.classes), options.batch_size, refiner.device)
    return choose_threshold(
        refiner, loader, loader.cam_of, progress=progress,
        align=options.align, suppress=options.suppress, clip_steps=options.clip_steps,
    )  # fmt: skip
