"""One HTML page of what a check found: figures per class in plain words, and pairs in pictures. It loads nothing.

The page is the template `check.html`; this module computes what the template shows. Flow: `check_folder` -> **check_page**.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

from .. import regions
from .._files import write_atomically
from ..check_report import VARIANTS, CheckReport, PairFigures
from ..errors import CamFileError
from .cam_folder import CamItem
from .cams import read_cam_file
from .check_folder import FolderCheck
from .images import read_image
from .pages import data_uri, heat_map, page_template

__all__ = ["write_check_page"]

VERDICTS = ("will help", "cannot tell", "will not")


def write_check_page(
    path: Path, found: FolderCheck, fill: Sequence[float], *, title: str = "Will the loss help?", rows: int = 4
) -> Dict[str, str]:
    """Write the page.

    Args:
        path: the HTML file.
        found: of `check_folder`.
        fill: color in [0, 1] that CLIP sees where a view is masked out, three values.
        title: title of the page.
        rows: pairs of each kind: told apart best, told apart worst, random.

    Returns:
        Id -> reason, for images that could not be shown.

    Raises:
        ModuleNotFoundError: if Jinja2 is not installed.
    """
    report, failed = found.report, {}
    template = page_template("check.html")
    groups: List[Tuple[str, List[_Pair]]] = []
    for heading, chosen in _choose(report.pairs, rows).items():
        shown = []
        for pair in chosen:
            item = found.items[pair.image]
            try:
                shown.append(_pair(pair, item, report, fill))
            except (CamFileError, OSError) as error:
                failed[item.name] = str(error)
        groups.append((heading, shown))
    figures = [(str(sum(one.verdict == verdict for one in report.classes)), f"classes: {verdict}") for verdict in VERDICTS]
    if report.lambda_area is not None:
        figures.append((f"{report.config.lambda_area:g} → {report.lambda_area:g}", "area weight: now → suggested"))
    page = template.render(title=title, report=report, figures=figures, variants=VARIANTS, groups=groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "backslashreplace")))
    return failed


def _choose(pairs: Sequence[PairFigures], rows: int) -> Dict[str, List[PairFigures]]:
    """Heading -> pairs to show under it."""
    order = sorted(pairs, key=lambda pair: (pair.cos_removed - pair.cos_kept, pair.image, pair.label))
    chosen = random.Random(0).sample(range(len(pairs)), min(rows, len(pairs)))
    return {
        "Pairs whose regions CLIP tells apart best": order[:rows],
        "Pairs whose regions CLIP tells apart worst": order[rows:][-rows:][::-1],
        "Random pairs": [pairs[i] for i in sorted(chosen)],
    }


class _Pair(NamedTuple):
    """One pair as the page shows it.

    Attributes:
        id: of the image.
        name: class name.
        figures: of the pair.
        pictures: caption and data URI of each picture.
    """

    id: str
    name: str
    figures: PairFigures
    pictures: List[Tuple[str, str]]


def _pair(pair: PairFigures, item: CamItem, report: CheckReport, fill: Sequence[float]) -> _Pair:
    photo = read_image(item.image)  # (H, W, 3)
    cam = torch.from_numpy(read_cam_file(item.cam, len(report.classes)).cams[pair.label])[None, None]  # (1, 1, h, w)
    index = torch.zeros(1, 2, dtype=torch.long)
    mask = regions.pair_masks(cam, index, photo.shape[:2], report.config.normalize, report.config.eps)[0].numpy()  # (H, W)
    color = 255 * np.asarray(fill, np.float32)
    kept = mask[..., None] * photo + (1 - mask[..., None]) * color
    removed = (1 - mask[..., None]) * photo + mask[..., None] * color
    name = report.classes[pair.label].name
    pictures = {
        "image": photo,
        f"CAM of {name}": heat_map(photo, mask),
        f"kept view, cosine {pair.cos_kept:.2f}": kept.clip(0, 255).astype(np.uint8),
        f"removed view, cosine {pair.cos_removed:.2f}": removed.clip(0, 255).astype(np.uint8),
    }
    return _Pair(item.name, name, pair, [(caption, data_uri(picture)) for caption, picture in pictures.items()])
