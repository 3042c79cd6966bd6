"""The demo's experiment: one host, three stages, and what each row of the table means.

Training sees images and image-level labels. Pixel masks are used only to measure: the background threshold of every row is
chosen on a validation split and the figures come from a test split, neither of which any training sees.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from semples_plugin import PromptRefiner
from semples_plugin.masks import pseudo_labels
from semples_plugin.metrics import confusion_matrix, iou_per_class, mean_iou
from semples_plugin.prompts import NearestWords, PromptFit

from .host import HostCam, Split, make_split, train_host
from .world import HOME, STUFF, THINGS, WORLD, World

CLIP_FILE = Path(__file__).with_name("world_clip.pt")
THRESHOLDS = [round(0.1 + 0.02 * i, 2) for i in range(41)]  # background threshold, 0.10 to 0.90

HOST = "host alone"
MATCH = "+ match"
HAND = "+ match + refine, hand-written prompts"
LEARNED = "+ match + refine, learned prompts"
HOST_ALIGNED = "host alone, aligned to edges"
MATCH_ALIGNED = "+ match, aligned to edges"
ALIGNED = "+ match + refine, learned, aligned to edges"
SUPPRESSED = "+ match + refine, learned, suppressed, aligned"
HOST_SUPPRESSED = "host alone, suppressed, aligned (no training)"
HOST_OPTIMISED = "host alone, optimised, aligned (no training)"
ROWS = (HOST, MATCH, HAND, LEARNED, HOST_ALIGNED, MATCH_ALIGNED, ALIGNED, SUPPRESSED, HOST_SUPPRESSED, HOST_OPTIMISED)


class Settings(NamedTuple):
    """Sizes, rates and weights of the demo; everything else is the package's default or VOC recipe.

    The weights differ from the VOC recipe because the demo's CLIP differs from OpenAI's: its cosines span -0.3 to 0.8
    instead of 0.1 to 0.35. Without the area term the masks grow over most of the image, and refining on such masks
    does harm; with lambda_t as small as VOC's some prompts keep a likeness to the object.
    """

    train: int = 1200
    val: int = 150
    test: int = 300
    host_steps: int = 300
    host_lr: float = 2e-3
    stage_steps: int = 150
    stage_lr: float = 2e-3
    batch_size: int = 24
    lambda_refine: float = 2.0
    lambda_t: float = 0.1
    lambda_area: float = 1.0
    lambda_texts: float = 4.0
    text_threshold: float = 0.25
    prompt_length: int = 8
    prompt_epochs: int = 60
    prompt_lr: float = 2.5e-2
    optimise_steps: int = 10


class Row(NamedTuple):
    """Figures of one row: threshold (chosen on validation), mIoU and IoU per label on test, co-occurrence share per class.

    The co-occurrence share of class k: of the pixels of k's own stuff in test images that show k, the share called k.
    """

    threshold: float
    miou: float
    iou: List[Optional[float]]
    share: Dict[str, float]

    @property
    def mean_share(self) -> float:
        return float(np.mean(list(self.share.values())))


class Result(NamedTuple):
    """Everything the table and the picture need."""

    rows: Dict[str, Row]
    masks: Dict[str, Tensor]
    test: Split
    histories: Dict[str, List[Dict[str, float]]]
    fit: PromptFit
    readings: List[NearestWords]


@torch.no_grad()
def cams_of(host: HostCam, split: Split) -> Tensor:
    host.eval()
    return torch.cat([host.cam(part) for part in split.images.split(100)])


def measure(masks: Tensor, split: Split, threshold: float, world: World = WORLD) -> Row:
    """Score soft masks (N, C, S, S) at one background threshold."""
    prediction = pseudo_labels(masks, threshold).numpy()
    count = len(world.things)
    confusion = np.zeros((count + 1,) * 2, np.int64)
    wrong, total = np.zeros(count), np.zeros(count)
    for scene, guess, labels in zip(split.scenes, prediction, split.labels):
        confusion += confusion_matrix(guess, scene.things, count + 1)
        for k in labels.nonzero()[:, 0].tolist():
            own = (scene.stuff == STUFF.index(world.home[world.things[k]])) & (scene.things == 0)
            wrong[k] += (own & (guess == k + 1)).sum()
            total[k] += own.sum()
    share = {name: float(wrong[k] / max(total[k], 1)) for k, name in enumerate(world.things)}
    return Row(threshold, mean_iou(confusion), iou_per_class(confusion), share)


def best_row(val_masks: Tensor, val: Split, test_masks: Tensor, test: Split, world: World = WORLD) -> Row:
    """Test figures at the background threshold that is best on validation."""
    threshold = max(THRESHOLDS, key=lambda t: measure(val_masks, val, t, world).miou)
    return measure(test_masks, test, threshold, world)


def new_refiner(settings: Settings, seed: int, **options: Any) -> PromptRefiner:
    options = {
        "lambda_refine": settings.lambda_refine,
        "lambda_t": settings.lambda_t,
        "lambda_area": settings.lambda_area,
        **options,
    }
    return PromptRefiner(
        list(THINGS), clip=CLIP_FILE, image_stats=None, prompt_length=settings.prompt_length, seed=seed, **options
    )


def add_refiner(host: HostCam, refiner: PromptRefiner, split: Split, settings: Settings, seed: int, title: str):
    """Train a copy of the host from its own checkpoint with the refiner's loss added; returns it and the history."""
    trained = copy.deepcopy(host)

    def extra(img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        out = refiner.compute(img, cam, labels)
        return out.loss, out.terms

    history = train_host(trained, split, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, title, extra)
    return trained, history


def prompt_loader(split: Split, size: int = 50) -> List[Tuple[Tensor, Tensor]]:
    return list(zip(split.images.split(size), split.labels.split(size)))


def run(settings: Settings, seed: int) -> Result:
    """All rows for one seed: seed of the scenes, the host, the batches and the prompts."""
    torch.manual_seed(seed)
    train = make_split(settings.train, 10_000 + seed)
    val, test = make_split(settings.val, 20_000 + seed), make_split(settings.test, 30_000 + seed)
    host = HostCam()
    histories = {HOST: train_host(host, train, settings.host_steps, settings.host_lr, 32, seed, "host: classification only")}
    # Every other row trains on from this checkpoint, so "host alone" gets the same steps, without the refiner.
    longer = copy.deepcopy(host)
    histories[HOST] += train_host(
        longer, train, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, "host: as long as the others"
    )
    hosts = {HOST: longer}

    matcher = new_refiner(settings, seed)
    hosts[MATCH], histories[MATCH] = add_refiner(host, matcher, train, settings, seed, "stage a: match")
    texts = [f"a photo of {name}." for name in STUFF]  # one list for all classes: nobody says what belongs to whom
    hand = new_refiner(
        settings, seed, background_texts=texts, lambda_background_texts=settings.lambda_texts,
        background_threshold=settings.text_threshold,
    )  # fmt: skip
    hosts[HAND], histories[HAND] = add_refiner(host, hand, train, settings, seed, "hand-written prompts")

    refiner = new_refiner(settings, seed)
    matched = hosts[MATCH]
    fit = refiner.fit_prompts(prompt_loader(train), matched.cam, epochs=settings.prompt_epochs, lr=settings.prompt_lr)
    hosts[LEARNED], histories[LEARNED] = add_refiner(host, refiner, train, settings, seed, "stage c: match + refine")

    table: Dict[str, Row] = {}
    masks: Dict[str, Tensor] = {}
    cams = {name: [(s, cams_of(trained, s)) for s in (val, test)] for name, trained in hosts.items()}
    for name, source, align, suppress in (
        *((name, name, None, False) for name in hosts),
        (HOST_ALIGNED, HOST, "pamr", False),
        (MATCH_ALIGNED, MATCH, "pamr", False),
        (ALIGNED, LEARNED, "pamr", False),
        (SUPPRESSED, LEARNED, "pamr", True),
        (HOST_SUPPRESSED, HOST, "pamr", True),  # what `semples refine --suppress --prompts FILE` does with the host's CAM files
    ):
        val_masks, masks[name] = (
            refiner.refine_masks(s.images, cam, s.labels, align=align, suppress=suppress).masks for s, cam in cams[source]
        )
        table[name] = best_row(val_masks, val, masks[name], test)
    optimised = []
    for s, cam in cams[HOST]:  # what `semples refine --optimize N --prompts FILE` does
        parts = zip(s.images.split(50), cam.split(50), s.labels.split(50))
        better = torch.cat([refiner.optimize_cam(*part, steps=settings.optimise_steps) for part in parts])
        optimised.append(refiner.refine_masks(s.images, better, s.labels, align="pamr").masks)
    masks[HOST_OPTIMISED] = optimised[1]
    table[HOST_OPTIMISED] = best_row(optimised[0], val, optimised[1], test)
    return Result(table, masks, test, histories, fit, refiner.nearest_words(world_vocabulary(), top=3))


def world_vocabulary() -> List[str]:
    """Words that the demo's CLIP was trained on: all stuff and all things."""
    return [*STUFF, *(f"a {name}" for name in THINGS)]


def print_table(rows: Dict[str, Row]) -> str:
    """The table as text: mIoU (background included), then the co-occurrence share of every class."""
    pairs = [f"{name}/{HOME[name]}" for name in THINGS]
    lines = [f"{'':46s} {'mIoU':>6s}  {'share of its co-occurring stuff called the class':s}"]
    lines.append(f"{'':46s} {'':>6s}  {'mean':>6s} " + " ".join(f"{p:>13s}" for p in pairs))
    for name, row in rows.items():
        shares = " ".join(f"{100 * row.share[k]:12.1f}%" for k in THINGS)
        lines.append(f"{name:46s} {100 * row.miou:6.1f}  {100 * row.mean_share:5.1f}% {shares}")
    return "\n".join(lines)
