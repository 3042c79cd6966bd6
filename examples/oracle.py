"""What does the loss prefer? Every term for the true mask of each (image, class) pair, and for masks that are not it.

    python -m examples.oracle demo
    python -m examples.oracle photos --photos VOCdevkit/VOC2012 --labels image_labels.json --clip photo_clip.pt \\
        --mobilenet mobilenet_v2.safetensors

The true masks serve as an oracle, for measurement alone. A row is a configuration of the refiner; a column a variant of the
mask: its mean loss, and the share of pairs in which the true mask has the lower loss. The first column is the share of pairs in
which no variant has a lower loss than the true mask.

With `--cams DIR`, CAM files of a host, the CAM is one more variant, and a last column tells where the gradient at the CAM
points: the area under the ROC curve of the negative gradient, smoothed over 5 x 5 of 14 x 14 cells, of cells inside the object
against cells outside, mean over pairs; 0.5 knows nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.checking import auc
from semples_plugin.config import RefinerConfig
from semples_plugin.files.cams import read_cam_file

from .recipe import COMPACT_CLIP, PHOTOS, PLUS

CONFIGS: Dict[str, RefinerConfig] = {
    "SemPLeS's form, no area term": COMPACT_CLIP.replace(lambda_area=0.0),
    "SemPLeS's form, area weight 1": COMPACT_CLIP,
    "plus": PLUS,
    "plus, lambda_b 1, area 0.5": PLUS.replace(lambda_b=1.0, lambda_area=0.5),
    "photos": PHOTOS,
}
CELLS = 14
LEVELS = 3  # cut levels that are averaged where masks are cut


class Pairs(NamedTuple):
    """Images (N, 3, S, S) in [0, 1], pairs (P, 2) of image and class, and the true mask (P, S, S) of each."""

    images: Tensor
    pairs: Tensor
    masks: Tensor


def variants(masks: Tensor) -> Dict[str, Tensor]:
    """The true mask and what it is compared with, (P, S, S) each: all ones, 0.5 everywhere, its inverse, and the mask dilated
    and eroded by squares of a seventh and a fourteenth of the side."""
    side = masks.shape[-1]

    def change(operation: Callable[..., np.ndarray], reach: int) -> Tensor:
        kernel = np.ones((reach, reach), np.uint8)
        return torch.from_numpy(np.stack([operation(m.numpy().astype(np.uint8), kernel) for m in masks])).float()

    return {
        "true": masks,
        "ones": torch.ones_like(masks),
        "half": torch.full_like(masks, 0.5),
        "inverse": 1 - masks,
        "dilated": change(cv2.dilate, side // 7 | 1),
        "eroded": change(cv2.erode, side // 14 | 1),
    }


@torch.no_grad()
def losses_of(refiner: PromptRefiner, data: Pairs, masks: Tensor) -> Tensor:
    """(P,) loss of each pair with its mask; the refiner must take masks as they are (`normalize=None`)."""
    classes = len(refiner.classes)
    rows: List[float] = []
    for (image, k), mask in zip(data.pairs.tolist(), masks):
        labels = torch.zeros(1, classes, dtype=torch.long)
        labels[0, k] = 1
        cam = torch.zeros(1, classes, *mask.shape)
        cam[0, k] = mask
        repeats = LEVELS if refiner.config.view_sharpness else 1
        values = [float(refiner.compute(data.images[image : image + 1], cam, labels).loss) for _ in range(repeats)]
        rows.append(float(np.mean(values)))
    return torch.tensor(rows)


def gradient_auc(refiner: PromptRefiner, data: Pairs, cams: Tensor) -> float:
    """How well the negative gradient at the CAMs (P, S, S) tells cells inside the object from those outside; mean of pairs."""
    inside = F.interpolate(data.masks[:, None], size=(CELLS, CELLS), mode="area")[:, 0]
    coarse = F.interpolate(cams[:, None], size=(CELLS, CELLS), mode="area")[:, 0]
    found = []
    for (image, k), mask, true in zip(data.pairs.tolist(), coarse, inside):
        if not ((true > 0.6).any() and (true < 0.1).any()):
            continue
        labels = torch.zeros(1, len(refiner.classes), dtype=torch.long)
        labels[0, k] = 1
        total = torch.zeros_like(mask)
        for _ in range(LEVELS if refiner.config.view_sharpness else 1):
            cam = torch.zeros(1, len(refiner.classes), CELLS, CELLS)
            cam[0, k] = mask
            cam.requires_grad_(True)
            total -= torch.autograd.grad(refiner(data.images[image : image + 1], cam, labels), cam)[0][0, k]
        smooth = F.avg_pool2d(F.pad(total[None, None], (2, 2, 2, 2), mode="replicate"), 5, stride=1)[0, 0]
        value = auc(smooth[true > 0.6], smooth[true < 0.1])
        if value is not None:
            found.append(value)
    return float(np.mean(found))


def table(clip: Union[str, Path, nn.Module], classes: Sequence[str], data: Pairs, cams: Optional[Tensor] = None) -> str:
    """The table of all configurations as text; `cams` (P, S, S) in [0, 1] are the host's."""
    lines = [f"{len(data.pairs)} pairs; mean area of the true masks {data.masks.mean():.2f}"]
    shapes = variants(data.masks)
    if cams is not None:
        shapes["CAM"] = cams
    lines.append(
        f"{'':32s} {'true is best':>12s}  "
        + " ".join(f"{name:>13s}" for name in shapes)
        + ("" if cams is None else "   gradient")
    )
    for name, config in CONFIGS.items():
        refiner = PromptRefiner(classes, clip=clip, config=config, normalize=None)  # type: ignore[arg-type]
        found = {shape: losses_of(refiner, data, masks) for shape, masks in shapes.items()}
        best = (torch.stack([*found.values()]).argmin(0) == 0).float().mean()
        cells = [f"{v.mean():6.2f} " + ("      " if k == "true" else f"({100 * (found['true'] < v).float().mean():3.0f}%)")
                 for k, v in found.items()]  # fmt: skip
        points = "" if cams is None else f"   {gradient_auc(refiner, data, cams):8.2f}"
        lines.append(f"{name:32s} {100 * best:11.0f}%  " + " ".join(cells) + points)
    return "\n".join(lines)


def demo_pairs(count: int, seed: int) -> Pairs:
    """Scenes of the demo world."""
    from .demo.host import make_split

    split = make_split(count, seed)
    pairs = split.labels.nonzero()
    things = torch.stack([torch.from_numpy(scene.things) for scene in split.scenes])
    return with_pixels(split.images, pairs, (things[pairs[:, 0]] == (pairs[:, 1] + 1)[:, None, None]).float())


def photo_pairs(
    photos: Path, labels: Path, count: int, cams: Optional[Path], size: int = 224
) -> Tuple[Pairs, Optional[Tensor]]:
    """The first `count` val photos, and the CAMs (P, S, S) of a folder of CAM files."""
    from .photos import experiment, hosts

    data = hosts.load_split(photos, labels, "val", nn.Flatten(), size)
    truth = torch.from_numpy(experiment.read_truth(photos, data.ids[:count], size))
    pairs = data.labels[:count].nonzero()
    found = with_pixels(data.images[:count], pairs, (truth[pairs[:, 0]] == (pairs[:, 1] + 1)[:, None, None]).float())
    if cams is None:
        return found, None
    rows = []
    for image, k in found.pairs.tolist():
        cam = read_cam_file(cams / f"{data.ids[image]}.npy", len(hosts.CLASSES)).cams[k]
        rows.append(torch.from_numpy(cv2.resize(np.asarray(cam, np.float32), (size, size), interpolation=cv2.INTER_AREA)))
    return found, torch.stack(rows)


def with_pixels(images: Tensor, pairs: Tensor, masks: Tensor) -> Pairs:
    """Without the pairs whose mask is empty: a label may be of an object that the other masks hide."""
    seen = masks.flatten(1).any(1)
    return Pairs(images, pairs[seen], masks[seen])


def main(argv: Tuple[str, ...] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.oracle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", choices=("demo", "photos"))
    parser.add_argument("--photos", type=Path, help="folder with JPEGImages, SegmentationClass, ImageSets")
    parser.add_argument("--labels", type=Path, help="JSON: image id -> class names")
    parser.add_argument("--clip", type=Path, help="CLIP of `python -m examples.photos.train_clip`")
    parser.add_argument("--mobilenet", type=Path, help="MobileNetV2 features, safetensors")
    parser.add_argument("--cams", type=Path, help="folder of CAM files of the photos")
    parser.add_argument("--count", type=int, default=150, help="number of images (%(default)s)")
    args = parser.parse_args(argv or None)
    if args.world == "demo":
        from .demo.experiment import CLIP_FILE
        from .demo.world import THINGS

        print(table(CLIP_FILE, list(THINGS), demo_pairs(args.count, 40_000)))
        return
    if None in (args.photos, args.labels, args.clip, args.mobilenet):
        parser.error("photos need --photos, --labels, --clip and --mobilenet")
    from .photos.hosts import CLASSES
    from .photos.train_clip import TOWER
    from .train_clip import load_feature_clip

    os.environ["MOBILENET"] = str(args.mobilenet.resolve())
    print(table(load_feature_clip(args.clip, TOWER), CLASSES, *photo_pairs(args.photos, args.labels, args.count, args.cams)))


if __name__ == "__main__":
    main()
