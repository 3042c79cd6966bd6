"""The photos experiment: hosts trained on with the refiner's loss and with its controls, and how their CAMs are scored.

Training sees images and image-level labels. Masks are used for scoring alone: of the 200 val photos one half is for choosing
(background thresholds, and every setting below), the figures come from the other half.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.checking import average_precision
from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.config import RefinerConfig
from semples_plugin.files.cams import CamFile, write_cam_file
from semples_plugin.files.images import write_label_png
from semples_plugin.masks import align_masks, pseudo_labels
from semples_plugin.metrics import confusion_matrix, iou_per_class, mean_iou
from semples_plugin.regions import change_stats, pair_masks, positive_pairs, resize_image

from ..controls import area_loss, random_clip
from ..recipe import COMPACT_CLIP, PHOTOS, PLUS_WEIGHT
from ..small import small_iou
from .hosts import CLASSES, Extra, PhotoHost, Photos, cams_of, train

THRESHOLDS = [round(0.02 * i, 2) for i in range(1, 50)]
BACKGROUND_TEXTS = [  # hand-written background prompts, the same for all classes
    f"a photo of {name}." for name in ("grass", "a field", "trees", "the sky", "water", "snow", "a floor", "a sofa", "a street")
]

ALONE = "host alone"
AREA = "area term alone, no CLIP"
BEST_AREA = "area term alone, its own best weight"
PAPER = "+ match, SemPLeS's form"
RANDOM = "+ match, CLIP with random weights"
MATCH = "+ match"
CROPPED = "+ match, views cropped around the CAM"
LEARNED = "+ match + refine, learned prompts"
HAND = "+ match + refine, hand-written prompts"
OPTIMIZED = "host alone, refine_masks with CLIP (no training)"
ROWS = (ALONE, AREA, BEST_AREA, PAPER, RANDOM, MATCH, CROPPED, LEARNED, HAND, OPTIMIZED)
ALIGNED = (ALONE, AREA, BEST_AREA, MATCH, CROPPED, LEARNED, OPTIMIZED)  # scored after edge alignment, too


class Settings(NamedTuple):
    """Sizes, steps and learning rates; all chosen on seed 0 and the half of val that is for choosing.

    Attributes:
        size: side of the images in pixels, of each host.
        host_steps, stage_steps: optimization steps before the rows part, and of each row.
        lr, batch_size: of both.
        pool: of the host's CAM, see `hosts.POOLS`.
        area_weight: the best weight of the area term alone, of each host.
        score_size: side of the masks that are scored, in pixels.
        weight: of the refiner's loss, and of the area term alone, beside the host's.
        config: of the refiner.
        paper: of the row with SemPLeS's form of the loss.
    """

    size: Dict[str, int] = {"squeezenet": 192, "mobilenet": 224}
    host_steps: int = 100
    stage_steps: int = 60
    lr: float = 3e-4
    batch_size: int = 12
    pool: str = "mean"
    area_weight: Dict[str, float] = {"squeezenet": 1.0, "mobilenet": 0.5}
    score_size: int = 112
    weight: float = PLUS_WEIGHT
    config: RefinerConfig = PHOTOS
    paper: RefinerConfig = COMPACT_CLIP


class Data(NamedTuple):
    """The photos of one host and the ground truth of val, (N, score_size, score_size) int labels, 255 for void."""

    train: Photos
    val: Photos
    truth: np.ndarray


def rectified(cam: Tensor) -> Tensor:
    """The CAM that is trained, written and scored: the positive part of the class map."""
    return cam.relu()


def six_classes() -> np.ndarray:
    """(256,) label of every VOC label: 1 to 6 for the six classes, void stays 255, other classes of VOC become background."""
    table = np.zeros(256, np.uint8)
    table[255] = 255
    for k, name in enumerate(CLASSES):
        table[1 + list(VOC_CLASSES).index(name)] = k + 1
    return table


def read_truth(root: Path, ids: List[str], size: int) -> np.ndarray:
    """Masks of the six classes, (N, size, size)."""
    from PIL import Image

    rows = []
    for name in ids:
        with Image.open(root / "SegmentationClass" / f"{name}.png") as picture:
            rows.append(cv2.resize(six_classes()[np.array(picture)], (size, size), interpolation=cv2.INTER_NEAREST))
    return np.stack(rows)


# ----------------------------------------------------------------------------------------------------------- scores


class Score(NamedTuple):
    """Figures of a row: mIoU on both halves of val at the best threshold of the first; on the second, IoU per label, and of
    small things, see `examples.small`."""

    threshold: float
    chosen: float
    miou: float
    iou: List[Optional[float]]
    small: float


def normalized(cam: Tensor, photos: Photos, size: int) -> Tensor:
    """Masks (P, size, size) of the positive pairs."""
    return pair_masks(cam, positive_pairs(photos.labels), (size, size), "minmax", 1e-6)


def score(masks: Tensor, photos: Photos, truth: np.ndarray) -> Score:
    """Score the masks (P, S, S) of the positive pairs: threshold on every other photo, figures on the rest."""
    pairs = positive_pairs(photos.labels)
    dense = torch.zeros(len(photos.ids), len(CLASSES), *masks.shape[1:])
    dense[pairs[:, 0], pairs[:, 1]] = masks

    def labels_of(part: slice, threshold: float) -> np.ndarray:
        return pseudo_labels(dense[part], threshold).numpy()

    def confusion(part: slice, threshold: float) -> np.ndarray:
        return confusion_matrix(labels_of(part, threshold), truth[part], len(CLASSES) + 1)

    choose, rest = slice(0, None, 2), slice(1, None, 2)
    values = [mean_iou(confusion(choose, t)) for t in THRESHOLDS]
    best = int(np.argmax(values))
    result = confusion(rest, THRESHOLDS[best])
    small = small_iou(labels_of(rest, THRESHOLDS[best]), truth[rest], photos.labels[rest].numpy())
    return Score(THRESHOLDS[best], values[best], mean_iou(result), iou_per_class(result), small)


def aligned(masks: Tensor, photos: Photos, size: int) -> Tensor:
    """Masks (P, size, size), aligned to the edges of their images."""
    images = resize_image(photos.images, size)
    return align_masks(images, masks, positive_pairs(photos.labels), "pamr")


# ------------------------------------------------------------------------------------------------------------- rows


def new_refiner(clip: nn.Module, config: RefinerConfig, seed: int, **options: Any) -> PromptRefiner:
    return PromptRefiner(CLASSES, clip=clip, config=config, seed=seed, **options)


def learn_prompts(refiner: PromptRefiner, host: PhotoHost, photos: Photos) -> None:
    """Stage (b) on all train photos."""
    cams = rectified(cams_of(host, photos))
    rows = [refiner.encode_backgrounds(*part) for part in zip(photos.images.split(32), cams.split(32), photos.labels.split(32))]
    pairs = torch.cat([p + torch.tensor([32 * i, 0]) for i, (_, p) in enumerate(rows)])
    refiner.fit_prompts_on(torch.cat([f for f, _ in rows]), pairs)


def checked(refiner: PromptRefiner, host: PhotoHost, photos: Photos, count: int = 100) -> List[Dict[str, Any]]:
    """What `PromptRefiner.check` says beforehand, per class, of the CAMs of the first train photos; no mask is looked at."""
    few = Photos(photos.ids[:count], photos.images[:count], photos.labels[:count], photos.low[:, :count])
    cams = iter(rectified(cams_of(host, few)).split(20))
    loader = zip(few.images.split(20), few.labels.split(20))
    report = refiner.check(loader, lambda img: next(cams), progress=False)
    return [figures.as_dict() for figures in report.classes]


def run(backbone: Tuple[nn.Module, int], clip: nn.Module, data: Data, settings: Settings, host_name: str, seed: int,
        out: Path, rows: Tuple[str, ...] = ROWS) -> Dict[str, Any]:  # fmt: skip
    """Train the host, then on from there once per row; score the CAMs of val.

    Every finished part is in a file of `out`, so that an interrupted run continues after the last one.

    Args:
        backbone: the pretrained upper layers and their channels, see `hosts.load_backbone`.
        clip: a loaded CLIP.
        data: the photos.
        settings: sizes, steps and options.
        host_name: one of `hosts.HOSTS`.
        seed: of the host, the batches and the prompts.
        out: folder for weights, prompts and CAMs.
        rows: which rows.

    Returns:
        Row -> `Score` as a dict; aligned rows end in ", aligned".
    """
    torch.manual_seed(seed)
    first = PhotoHost(copy.deepcopy(backbone[0]), backbone[1])

    def trained(name: str, start: Optional[Dict[str, Tensor]], steps: int, extra: Optional[Callable[[], Extra]]) -> PhotoHost:
        """The host of a part: read from its file, or trained from the weights `start`. `extra()` makes its further loss."""
        host, path = copy.deepcopy(first), out / f"{name}.pt"
        if path.exists():
            host.load_state_dict(torch.load(path, weights_only=True))
        else:
            if start is not None:
                host.load_state_dict(start)
            s = settings
            train(host, data.train, steps, s.lr, s.batch_size, s.pool, seed, name, None if extra is None else extra())
            torch.save(host.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return host.eval()

    def with_refiner(refiner: PromptRefiner, weight: float = settings.weight) -> Extra:
        return lambda img, cam, labels: weight * refiner(img, rectified(cam), labels)

    def with_area(weight: float) -> Extra:
        config, size = settings.config.replace(lambda_area=weight), settings.size[host_name]
        return lambda img, cam, labels: area_loss(rectified(cam), labels, config, size)

    def with_prompts() -> Extra:
        refiner = new_refiner(clip, settings.config, seed)
        path = out / "prompts.safetensors"
        if not path.exists():
            learn_prompts(refiner, row_host(MATCH), data.train)
            refiner.save(path)
        return with_refiner(refiner.load_prompts(path))

    config = settings.config
    hand = {"background_texts": BACKGROUND_TEXTS, "lambda_background_texts": config.lambda_refine * 2}
    extras: Dict[str, Tuple[str, Optional[Callable[[], Extra]]]] = {
        ALONE: ("alone", None),
        AREA: ("area", lambda: with_area(settings.weight * config.lambda_area)),
        BEST_AREA: ("best_area", lambda: with_area(settings.area_weight[host_name])),
        PAPER: ("paper", lambda: with_refiner(new_refiner(clip, settings.paper, seed), 1.0)),
        RANDOM: ("random", lambda: with_refiner(new_refiner(random_clip(clip, seed), config, seed))),
        MATCH: ("match", lambda: with_refiner(new_refiner(clip, config, seed))),
        CROPPED: ("cropped", lambda: with_refiner(new_refiner(clip, config, seed, view_crop=0.25))),
        LEARNED: ("refine", with_prompts),
        HAND: ("hand", lambda: with_refiner(new_refiner(clip, config, seed, **hand))),
    }
    base = trained("base", None, settings.host_steps, None).state_dict()

    def row_host(row: str) -> PhotoHost:
        name, extra = extras[row]
        return trained(name, base, settings.stage_steps, extra)

    size, found = settings.score_size, {}
    for row in rows:
        if row == OPTIMIZED:
            refiner = new_refiner(clip, config, seed)
            cams = rectified(cams_of(row_host(ALONE), data.val))
            cams = cached(out / "optimized_cams.pt", partial(optimized, refiner, cams, data.val))
        else:
            cams = rectified(cams_of(row_host(row), data.val))
        masks = normalized(cams, data.val, size)
        found[row] = score(masks, data.val, data.truth)._asdict()
        if row in (MATCH, RANDOM):
            model = random_clip(clip, seed) if row == RANDOM else clip
            found[row]["check"] = checked(new_refiner(model, config, seed), row_host(ALONE), data.train)
        if row in ALIGNED:
            found[f"{row}, aligned"] = score(aligned(masks, data.val, size), data.val, data.truth)._asdict()
    return found


def optimized(refiner: PromptRefiner, cams: Tensor, photos: Photos) -> Tensor:
    """The CAMs as `refine_masks` changes them with CLIP, before edges."""
    parts = zip(photos.images.split(20), cams.split(20), photos.labels.split(20))
    return torch.cat([refiner.optimize_cam(*part) for part in parts])


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of a file, or of `make`, which is then written to the file."""
    if not path.exists():
        torch.save(make(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------------------ files


def write_cams(cams: Tensor, photos: Photos, root: Path, folder: Path) -> None:
    """CAM files {class index: (H, W)} of CAMs (N, C, h, w), normalized to [0, 1] per image and class."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cam, labels in zip(photos.ids, cams, photos.labels):
        height, width = cv2.imread(str(root / "JPEGImages" / f"{name}.jpg")).shape[:2]
        maps: Dict[int, np.ndarray] = {}
        for k in labels.nonzero()[:, 0].tolist():
            big = F.interpolate(cam[None, k : k + 1], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
            maps[k] = ((big - big.min()) / (big.max() - big.min() + 1e-8)).numpy()
        write_cam_file(folder / f"{name}.npy", CamFile(maps, "dict"))


def write_truth(root: Path, ids: List[str], folder: Path) -> None:
    """Ground truth of the six classes as label maps at the photos' own size."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name in ids:
        with Image.open(root / "SegmentationClass" / f"{name}.png") as picture:
            write_label_png(folder / f"{name}.png", six_classes()[np.array(picture)])


# ------------------------------------------------------------------------------------------------------------- CLIP


def zero_shot(clip: nn.Module, photos: Photos, config: RefinerConfig) -> Dict[str, float]:
    """Average precision per class of cos(image, "a photo of a <class>."): does this CLIP know the classes?"""
    refiner = new_refiner(clip, config, 0)
    encoder = refiner.encoder
    images = change_stats(resize_image(photos.images, encoder.image_size), None, (encoder.mean, encoder.std))
    with torch.no_grad():
        v = torch.cat([encoder.encode_image(part) for part in images.split(50)])  # (N, D)
    scores = F.normalize(v, dim=-1) @ F.normalize(refiner.text_features, dim=-1).T
    return {name: average_precision(scores[:, k], photos.labels[:, k].bool()) or 0.0 for k, name in enumerate(CLASSES)}
