"""The demo's experiment: one host, three stages, and what each row of the table means.

Training sees images and image-level labels. Pixel masks are used only for scoring, see `scores`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from semples_plugin import PromptRefiner
from semples_plugin.config import RefinerConfig
from semples_plugin.masks import CLIP_STEPS
from semples_plugin.prompts import NearestWords, PromptFit

from ..recipe import COMPACT_CLIP
from .host import HostCam, Split, make_split, train_host
from .scores import Row, best_row
from .world import HOME, STUFF, THINGS

CLIP_FILE = Path(__file__).with_name("world_clip.pt")

HOST = "host alone"
MATCH = "+ match"
HAND = "+ match + refine, hand-written prompts"
LEARNED = "+ match + refine, learned prompts"
HOST_ALIGNED = "host alone, aligned to edges"
MATCH_ALIGNED = "+ match, aligned to edges"
ALIGNED = "+ match + refine, learned, aligned to edges"
SUPPRESSED = "+ match + refine, learned, suppressed, aligned"
HOST_SUPPRESSED = "host alone, suppressed, aligned (no training)"
HOST_REFINED = "host alone, refine_masks (no training)"
REFINED = "+ match + refine, learned, refine_masks"
ROWS = (HOST, MATCH, HAND, LEARNED, HOST_ALIGNED, MATCH_ALIGNED, ALIGNED, SUPPRESSED, HOST_SUPPRESSED, HOST_REFINED, REFINED)


class Settings(NamedTuple):
    """Sizes, steps and learning rates of the demo, and the configuration of its refiners."""

    train: int = 1200
    val: int = 150
    test: int = 300
    host_steps: int = 300
    host_lr: float = 2e-3
    host_batch_size: int = 32
    stage_steps: int = 150
    stage_lr: float = 2e-3
    batch_size: int = 24
    config: RefinerConfig = COMPACT_CLIP
    lambda_background_texts: float = 4.0
    background_threshold: float = 0.25
    clip_steps: int = CLIP_STEPS


class Result(NamedTuple):
    """Everything the table and the picture need."""

    rows: Dict[str, Row]
    masks: Dict[str, Tensor]
    test: Split
    histories: Dict[str, List[Dict[str, float]]]
    fit: PromptFit
    nearest_words: List[NearestWords]


@torch.no_grad()
def cams_of(host: HostCam, split: Split) -> Tensor:
    host.eval()
    return torch.cat([host.cam(part) for part in split.images.split(100)])


def new_refiner(settings: Settings, seed: int, **options: Any) -> PromptRefiner:
    return PromptRefiner(list(THINGS), clip=CLIP_FILE, config=settings.config, seed=seed, **options)


def train_with_refiner(
    host: HostCam, refiner: PromptRefiner, split: Split, settings: Settings, seed: int, title: str
) -> Tuple[HostCam, List[Dict[str, float]]]:
    """A copy of the host, trained on with the refiner's loss added, and its losses per step."""
    trained = copy.deepcopy(host)

    def extra(img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        out = refiner.compute(img, cam, labels)
        return out.loss, out.terms

    history = train_host(trained, split, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, title, extra)
    return trained, history


def run(settings: Settings, seed: int) -> Result:
    """All rows for one seed: seed of the scenes, the host, the batches and the prompts."""
    torch.manual_seed(seed)
    train = make_split(settings.train, 10_000 + seed)
    val, test = make_split(settings.val, 20_000 + seed), make_split(settings.test, 30_000 + seed)
    host = HostCam()
    first = train_host(
        host, train, settings.host_steps, settings.host_lr, settings.host_batch_size, seed, "host: classification only"
    )
    # Every row trains on from this checkpoint for the same number of steps, "host alone" without the refiner.
    longer = copy.deepcopy(host)
    more = train_host(
        longer, train, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, "host: as long as the others"
    )
    hosts, histories = {HOST: longer}, {HOST: first + more}

    matcher = new_refiner(settings, seed)
    hosts[MATCH], histories[MATCH] = train_with_refiner(host, matcher, train, settings, seed, "stage a: match")
    texts = [f"a photo of {name}." for name in STUFF]  # the same for all classes; which stuff is whose is not given
    hand = new_refiner(
        settings, seed, background_texts=texts, lambda_background_texts=settings.lambda_background_texts,
        background_threshold=settings.background_threshold,
    )  # fmt: skip
    hosts[HAND], histories[HAND] = train_with_refiner(host, hand, train, settings, seed, "hand-written prompts")

    refiner = new_refiner(settings, seed)
    fit = refiner.fit_prompts(train.batches(50), hosts[MATCH].cam)
    hosts[LEARNED], histories[LEARNED] = train_with_refiner(host, refiner, train, settings, seed, "stage c: match + refine")

    table: Dict[str, Row] = {}
    masks: Dict[str, Tensor] = {}
    cams = {name: [(s, cams_of(trained, s)) for s in (val, test)] for name, trained in hosts.items()}
    for name, source, align, suppress, clip_steps in (
        *((name, name, None, False, 0) for name in hosts),
        (HOST_ALIGNED, HOST, "pamr", False, 0),
        (MATCH_ALIGNED, MATCH, "pamr", False, 0),
        (ALIGNED, LEARNED, "pamr", False, 0),
        (SUPPRESSED, LEARNED, "pamr", True, 0),
        (HOST_SUPPRESSED, HOST, "pamr", True, 0),
        (HOST_REFINED, HOST, "pamr", False, settings.clip_steps),  # as `semples refine --prompts FILE` does with CAM files
        (REFINED, LEARNED, "pamr", False, settings.clip_steps),
    ):
        options = {"align": align, "suppress": suppress, "clip_steps": clip_steps}
        val_masks, masks[name] = (refiner.refine_masks(s.images, cam, s.labels, **options).masks for s, cam in cams[source])
        table[name] = best_row(val_masks, val, masks[name], test)
    return Result(table, masks, test, histories, fit, refiner.nearest_words(world_vocabulary(), top=3))


def world_vocabulary() -> List[str]:
    """Words that the demo's CLIP was trained on: all stuff and all things."""
    return [*STUFF, *(f"a {name}" for name in THINGS)]


def format_table(rows: Dict[str, Row]) -> str:
    """The table as text: mIoU (background included), then the co-occurrence share of every class."""
    pairs = [f"{name}/{HOME[name]}" for name in THINGS]
    lines = [f"{'':46s} {'mIoU':>6s}  {'share of its co-occurring stuff called the class':s}"]
    lines.append(f"{'':46s} {'':>6s}  {'mean':>6s} " + " ".join(f"{p:>13s}" for p in pairs))
    for name, row in rows.items():
        shares = " ".join(f"{100 * row.share[k]:12.1f}%" for k in THINGS)
        lines.append(f"{name:46s} {100 * row.miou:6.1f}  {100 * row.mean_share:5.1f}% {shares}")
    return "\n".join(lines)
