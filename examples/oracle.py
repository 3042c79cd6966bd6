"""What does the loss prefer? Every term for the true mask of each (image, class) pair, and for masks that are not it.

    python -m examples.oracle demo
    python -m examples.oracle photos --photos VOCdevkit/VOC2012 --labels image_labels.json --clip photo_clip.pt \\
        --mobilenet mobilenet_v2.safetensors

The true masks serve as an oracle, for measurement alone. A row is a configuration of the refiner; a column a variant of the
mask: its mean loss, and the share of pairs in which the true mask has the lower loss. The first column is the share of pairs in
which no variant has a lower loss than the true mask.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.config import RefinerConfig

from .recipe import COMPACT_CLIP, PHOTOS, PLUS

CONFIGS: Dict[str, RefinerConfig] = {
    "SemPLeS's form, no area term": COMPACT_CLIP.replace(lambda_area=0.0),
    "SemPLeS's form, area weight 1": COMPACT_CLIP,
    "plus": PLUS,
    "photos": PHOTOS,
}
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


def table(clip: "str | os.PathLike[str] | nn.Module", classes: Sequence[str], data: Pairs) -> str:
    """The table of all configurations as text."""
    lines = [f"{len(data.pairs)} pairs; mean area of the true masks {data.masks.mean():.2f}"]
    shapes = variants(data.masks)
    lines.append(f"{'':32s} {'true is best':>12s}  " + " ".join(f"{name:>13s}" for name in shapes))
    for name, config in CONFIGS.items():
        refiner = PromptRefiner(classes, clip=clip, config=config, normalize=None)  # type: ignore[arg-type]
        found = {shape: losses_of(refiner, data, masks) for shape, masks in shapes.items()}
        best = (torch.stack([*found.values()]).argmin(0) == 0).float().mean()
        cells = [f"{v.mean():6.2f} " + ("      " if k == "true" else f"({100 * (found['true'] < v).float().mean():3.0f}%)")
                 for k, v in found.items()]  # fmt: skip
        lines.append(f"{name:32s} {100 * best:11.0f}%  " + " ".join(cells))
    return "\n".join(lines)


def demo_pairs(count: int, seed: int) -> Pairs:
    """Scenes of the demo world."""
    from .demo.host import make_split

    split = make_split(count, seed)
    pairs = split.labels.nonzero()
    things = torch.stack([torch.from_numpy(scene.things) for scene in split.scenes])
    return with_pixels(split.images, pairs, (things[pairs[:, 0]] == (pairs[:, 1] + 1)[:, None, None]).float())


def photo_pairs(photos: Path, labels: Path, count: int, size: int = 224) -> Pairs:
    """The first `count` val photos."""
    from .photos import experiment, hosts

    data = hosts.load_split(photos, labels, "val", nn.Flatten(), size)
    truth = torch.from_numpy(experiment.read_truth(photos, data.ids[:count], size))
    pairs = data.labels[:count].nonzero()
    return with_pixels(data.images[:count], pairs, (truth[pairs[:, 0]] == (pairs[:, 1] + 1)[:, None, None]).float())


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
    print(table(load_feature_clip(args.clip, TOWER), CLASSES, photo_pairs(args.photos, args.labels, args.count)))


if __name__ == "__main__":
    main()
