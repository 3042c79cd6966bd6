"""What edge alignment, a dense CRF and masks without a class make of the CAMs of one host on photos.

    python -m examples.photos.mask_sources --photos VOCdevkit/VOC2012 --labels image_labels.json \\
        --mobilenet mobilenet_v2.safetensors

Trains MobileNetV2 alone. Masks are made and scored at the photos' own size; the threshold is chosen on every other photo of
val, figures are of the rest. The CRF needs pydensecrf, the segments scikit-image; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from semples_plugin.crf import dense_crf
from semples_plugin.files.images import read_image
from semples_plugin.mask_proposals import choose_proposals
from semples_plugin.masks import pamr, pseudo_labels
from semples_plugin.metrics import confusion_matrix, iou_per_class, mean_iou
from semples_plugin.regions import pair_masks, positive_pairs

from . import experiment, hosts

STEPS, SEED = 100, 1
THRESHOLDS = [round(0.04 * k, 2) for k in range(1, 25)]
OF_SEGMENTS = [round(0.1 * k, 1) for k in range(2, 9)]
DRAWS = 2000  # of the bootstrap


class Source:
    """Masks of every photo by threshold, and the seconds of one photo."""

    def __init__(self, name: str, thresholds: Sequence[float], make: Callable[[int, float], Tensor], seconds: float = 0.0):
        self.name, self.thresholds, self.make, self.seconds = name, thresholds, make, seconds


def timed(count: int, make: Callable[[int], Any]) -> Tuple[List[Any], float]:
    """What `make` returns for every photo, and the seconds of CPU time of one."""
    start = time.process_time()
    found = [make(i) for i in range(count)]
    return found, (time.process_time() - start) / count


def segments(img: Tensor, scale: float) -> Tensor:
    """Masks (M, H, W) of the segments of a photo (3, H, W)."""
    from skimage.segmentation import felzenszwalb

    labels = felzenszwalb(img.permute(1, 2, 0).numpy(), scale=scale, sigma=0.8, min_size=50)
    return torch.from_numpy(np.stack([labels == k for k in range(labels.max() + 1)]))


def confusions(
    source: Source, threshold: float, part: Sequence[int], labels: Tensor, truth: Sequence[np.ndarray]
) -> np.ndarray:
    """(photos, L, L) of some photos."""
    count, found = labels.shape[1] + 1, []
    for i in part:
        classes = labels[i].nonzero()[:, 0]
        masks = source.make(i, threshold)
        dense = torch.zeros(1, count - 1, *masks.shape[1:])
        dense[0, classes] = masks
        found.append(confusion_matrix(pseudo_labels(dense, threshold)[0].numpy(), truth[i], count))
    return np.stack(found)


def difference(own: np.ndarray, other: np.ndarray) -> str:
    """Difference in mIoU, with the 95 % interval of a bootstrap over the photos."""
    rng, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        drawn = rng.integers(len(own), size=len(own))
        draws.append(100 * (mean_iou(own[drawn].sum(0)) - mean_iou(other[drawn].sum(0))))
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"{100 * (mean_iou(own.sum(0)) - mean_iou(other.sum(0))):+.1f} ({low:+.1f} to {high:+.1f})"


def sources(photos: Sequence[Tensor], cams: Sequence[Tensor], scale: float) -> List[Source]:
    """All that can be made here of the CAMs (P, H, W) of every photo (3, H, W)."""
    count = len(photos)
    bases: Dict[str, Tuple[List[Tensor], float]] = {"none": (list(cams), 0.0)}
    bases["pamr"] = timed(count, lambda i: pamr(photos[i][None], cams[i][None])[0])
    if importlib.util.find_spec("pydensecrf"):
        bases["crf"] = timed(count, lambda i: dense_crf(photos[i], cams[i]))

    def alone(name: str) -> Source:
        masks, seconds = bases[name]
        return Source(name, THRESHOLDS, lambda i, threshold: masks[i], seconds)

    found = [alone(name) for name in bases]
    if importlib.util.find_spec("skimage"):
        proposals, seconds = timed(count, lambda i: segments(photos[i], scale))

        def chosen(base: str, **options: float) -> Source:
            masks, before = bases[base]

            def make(i: int, threshold: float) -> Tensor:
                return choose_proposals(masks[i], proposals[i], threshold=threshold, **options)

            _, after = timed(min(40, count), lambda i: make(i, 0.5))
            name = f"{base}, then segments" + "".join(f", {key}={value:g}" for key, value in options.items())
            return Source(name, OF_SEGMENTS, make, before + seconds + after)

        found += [chosen("none"), chosen("none", min_covered=1.0), *(chosen(name) for name in bases if name != "none")]
    return found


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.photos.mask_sources", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--photos", type=Path, required=True, help="folder with JPEGImages, SegmentationClass, ImageSets")
    parser.add_argument("--labels", type=Path, required=True, help="JSON: image id -> class names")
    parser.add_argument("--mobilenet", type=Path, required=True, help="MobileNetV2 features, safetensors")
    parser.add_argument("--scale", type=float, default=200, help="of the segments (%(default)g)")
    args = parser.parse_args(argv or None)
    torch.set_num_threads(1)
    os.environ["MOBILENET"] = str(args.mobilenet.resolve())
    settings = experiment.Settings()
    low, *backbone = hosts.load_backbone("mobilenet", args.mobilenet)
    train, val = (
        hosts.load_split(args.photos, args.labels, split, low, settings.size["mobilenet"]) for split in ("train", "val")
    )
    torch.manual_seed(SEED)
    host = hosts.PhotoHost(copy.deepcopy(backbone[0]), backbone[1])
    hosts.train(host, train, STEPS, settings.lr, settings.batch_size, settings.pool, SEED, "alone")
    cam = experiment.rectified(hosts.cams_of(host, val))
    folder, table = args.photos / "JPEGImages", experiment.six_classes()
    photos, cams, truth = [], [], []
    for i, name in enumerate(val.ids):
        photos.append(torch.from_numpy(read_image(folder / f"{name}.jpg")).permute(2, 0, 1).float() / 255)
        cams.append(pair_masks(cam[i : i + 1], positive_pairs(val.labels[i : i + 1]), photos[i].shape[1:], "minmax", 1e-6))
        with Image.open(args.photos / "SegmentationClass" / f"{name}.png") as mask:
            truth.append(table[np.array(mask)])
    choosing, rest = range(0, len(photos), 2), range(1, len(photos), 2)
    names = ["", "threshold", "mean, choosing half", "mean", "background", *hosts.CLASSES, "difference to none", "seconds"]
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    none = None
    for source in sources(photos, cams, args.scale):
        values = [mean_iou(confusions(source, t, choosing, val.labels, truth).sum(0)) for t in source.thresholds]
        best = int(np.argmax(values))
        own = confusions(source, source.thresholds[best], rest, val.labels, truth)
        none = own if none is None else none
        change = "" if own is none else difference(own, none)
        total = own.sum(0)
        shares = [values[best], mean_iou(total), *(value or 0.0 for value in iou_per_class(total))]
        percent = " | ".join(f"{100 * share:.1f}" for share in shares)
        print(f"| {source.name} | {source.thresholds[best]:g} | {percent} | {change} | {source.seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
