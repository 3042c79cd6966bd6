"""Dense CRF with pydensecrf, where that is installed; its parameters are those of `semples_plugin.crf`.

python -m examples.voc.crf --photos DIR --cams DIR --list FILE --threshold 0.4 --num-classes 20 --out DIR
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Optional, Sequence

import numpy as np

from semples_plugin._files import remove_parts
from semples_plugin.cli.arguments import read_ids
from semples_plugin.crf import mean_field
from semples_plugin.files.cams import cam_paths, read_cam_file
from semples_plugin.files.images import find_image, read_image, write_label_png

NOTE = "pydensecrf is not installed in the environment of this command"


def available() -> bool:
    """Whether pydensecrf can be imported."""
    return importlib.util.find_spec("pydensecrf") is not None


def dense_crf(photo: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Label indices (H, W) after a dense CRF.

    Args:
        photo: (H, W, 3) uint8 RGB.
        probabilities: (L, H, W), adding up to 1 over L.
    """
    from pydensecrf import utils

    return mean_field(photo, utils.unary_from_softmax(probabilities.astype(np.float32))).argmax(0)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("photos", "cams", "list", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threshold", type=float, required=True, help="score of background beside the CAMs")
    parser.add_argument("--num-classes", type=int, required=True)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    remove_parts(options.out)
    paths = cam_paths(options.cams)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    for name in (read_ids(options.list) or [])[rank::world]:
        if (options.out / f"{name}.png").is_file():
            continue
        photo = read_image(find_image(options.photos, name))
        cams = read_cam_file(paths[name], options.num_classes).cams
        scores = np.stack([np.full(photo.shape[:2], options.threshold, np.float32), *(cams[k] for k in sorted(cams))])
        labels = np.array([0, *(k + 1 for k in sorted(cams))], np.uint8)
        write_label_png(options.out / f"{name}.png", labels[dense_crf(photo, scores / scores.sum(0))])


if __name__ == "__main__":
    main()
