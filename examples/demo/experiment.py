"""The demo's experiment: one host, three stages, and what each row of the table means.

Training sees images and image-level labels. Pixel masks are used only for scoring, see `scores`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import load_clip
from semples_plugin.config import RefinerConfig
from semples_plugin.masks import CLIP_STEPS
from semples_plugin.prompt_learning import PromptFit
from semples_plugin.prompts import NearestWords

from ..controls import area_only, random_clip
from ..recipe import COMPACT_CLIP, PLUS, PLUS_WEIGHT
from .host import ExtraLoss, HostCam, Split, make_split, train_host
from .scores import Row, best_row
from .world import HOME, STUFF, THINGS

CLIP_FILE = Path(__file__).with_name("world_clip.pt")

HOST = "host alone"
AREA = "+ area term alone, no CLIP"
RANDOM = "+ match, CLIP with random weights"
NO_AREA = "+ match without the area term"
LINEAR = "+ match, plus"
MATCH = "+ match"
HAND = "+ match + refine, hand-written prompts"
LEARNED = "+ match + refine, learned prompts"
HOST_ALIGNED = "host alone, aligned to edges"
AREA_ALIGNED = "+ area term alone, aligned to edges"
LINEAR_ALIGNED = "+ match, plus, aligned to edges"
MATCH_ALIGNED = "+ match, aligned to edges"
ALIGNED = "+ match + refine, learned, aligned to edges"
SUPPRESSED = "+ match + refine, learned, suppressed, aligned"
HOST_SUPPRESSED = "host alone, suppressed, aligned (no training)"
HOST_REFINED = "host alone, refine_masks (no training)"
REFINED = "+ match + refine, learned, refine_masks"
ROWS = (HOST, AREA, RANDOM, NO_AREA, MATCH, LINEAR, HAND, LEARNED, HOST_ALIGNED, AREA_ALIGNED, MATCH_ALIGNED, LINEAR_ALIGNED,
        ALIGNED, SUPPRESSED, HOST_SUPPRESSED, HOST_REFINED, REFINED)  # fmt: skip
CONTROLS = (AREA, RANDOM, NO_AREA, AREA_ALIGNED, LINEAR, LINEAR_ALIGNED)
ONE_SEED = tuple(row for row in ROWS if row not in CONTROLS)  # without them the demo takes less time
TRAINED = (HOST, AREA, RANDOM, NO_AREA, MATCH, LINEAR, HAND, LEARNED)
# The trained row whose host the other rows show.
SOURCE = {HOST_ALIGNED: HOST, AREA_ALIGNED: AREA, MATCH_ALIGNED: MATCH, LINEAR_ALIGNED: LINEAR, ALIGNED: LEARNED,
          SUPPRESSED: LEARNED, HOST_SUPPRESSED: HOST, HOST_REFINED: HOST, REFINED: LEARNED}  # fmt: skip
PROMPTED = (LEARNED, ALIGNED, SUPPRESSED, HOST_SUPPRESSED, HOST_REFINED, REFINED)  # rows that need learned prompts


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
    """Everything the table and the picture need; `fit` and `nearest_words` are None and empty if no row needs prompts."""

    rows: Dict[str, Row]
    masks: Dict[str, Tensor]
    test: Split
    histories: Dict[str, List[Dict[str, float]]]
    fit: Optional[PromptFit]
    nearest_words: List[NearestWords]
    hosts: Dict[str, HostCam]


@torch.no_grad()
def cams_of(host: HostCam, split: Split) -> Tensor:
    host.eval()
    return torch.cat([host.cam(part) for part in split.images.split(100)])


def new_refiner(settings: Settings, seed: int, clip: Union[Path, nn.Module] = CLIP_FILE, **options: Any) -> PromptRefiner:
    return PromptRefiner(list(THINGS), clip=clip, config=settings.config, seed=seed, **options)


def refiner_loss(refiner: PromptRefiner, weight: float = 1.0) -> ExtraLoss:
    """The refiner's loss with a weight, and its terms, for `train_host`."""

    def extra(img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        out = refiner.compute(img, cam, labels)
        return weight * out.loss, out.terms

    return extra


def row_loss(row: str, settings: Settings, seed: int) -> Optional[ExtraLoss]:
    """What is added to the classification loss of a trained row whose refiner has no learned prompts."""
    if row == HOST:
        return None
    if row == AREA:
        return area_only(settings.config, load_clip(CLIP_FILE).image_size)
    if row == RANDOM:
        return refiner_loss(new_refiner(settings, seed, random_clip(load_clip(CLIP_FILE).model, seed)))
    if row == NO_AREA:
        return refiner_loss(new_refiner(settings, seed, lambda_area=0.0))
    if row == LINEAR:
        return refiner_loss(PromptRefiner(list(THINGS), clip=CLIP_FILE, config=PLUS, seed=seed), PLUS_WEIGHT)
    if row == HAND:
        texts = [f"a photo of {name}." for name in STUFF]  # the same for all classes; which stuff is whose is not given
        return refiner_loss(
            new_refiner(
                settings, seed, background_texts=texts, lambda_background_texts=settings.lambda_background_texts,
                background_threshold=settings.background_threshold,
            )
        )  # fmt: skip
    return refiner_loss(new_refiner(settings, seed))


def run(settings: Settings, seed: int, rows: Sequence[str] = ROWS) -> Result:
    """Rows of one seed, which fixes the scenes, the host, the batches and the prompts.

    No row depends on which others are run.
    """
    torch.manual_seed(seed)
    train = make_split(settings.train, 10_000 + seed)
    val, test = make_split(settings.val, 20_000 + seed), make_split(settings.test, 30_000 + seed)
    host = HostCam()
    first = train_host(
        host, train, settings.host_steps, settings.host_lr, settings.host_batch_size, seed, "host: classification only"
    )
    hosts: Dict[str, HostCam] = {}
    histories: Dict[str, List[Dict[str, float]]] = {}
    refiner, fit = new_refiner(settings, seed), None
    needed = {SOURCE.get(row, row) for row in rows}
    if set(rows) & set(PROMPTED):
        needed.add(MATCH)  # its CAMs give the backgrounds that the prompts are learned on
    # Every row trains on from the same checkpoint for the same number of steps, "host alone" without any other loss.
    for row in (row for row in TRAINED if row in needed):
        loss = refiner_loss(refiner) if row == LEARNED else row_loss(row, settings, seed)
        hosts[row] = copy.deepcopy(host)
        histories[row] = train_host(
            hosts[row], train, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, row, loss
        )
        if row == MATCH and set(rows) & set(PROMPTED):
            fit = refiner.fit_prompts(train.batches(50), hosts[MATCH].cam)
    if HOST in hosts:
        histories[HOST] = first + histories[HOST]
    table, masks = score(hosts, refiner, val, test, settings, rows)
    words = refiner.nearest_words(world_vocabulary(), top=3) if fit is not None else []
    return Result(table, masks, test, histories, fit, words, hosts)


def score(
    hosts: Dict[str, HostCam], refiner: PromptRefiner, val: Split, test: Split, settings: Settings, rows: Sequence[str]
) -> Tuple[Dict[str, Row], Dict[str, Tensor]]:
    """Figures and test masks of the rows. `refiner` holds the learned prompts if any row needs them."""
    table: Dict[str, Row] = {}
    masks: Dict[str, Tensor] = {}
    cams = {name: [(s, cams_of(trained, s)) for s in (val, test)] for name, trained in hosts.items()}
    for name in (name for name in ROWS if name in rows):
        val_masks, masks[name] = (
            refiner.refine_masks(
                s.images,
                cam,
                s.labels,
                align="pamr" if name in SOURCE else None,
                suppress=name in (SUPPRESSED, HOST_SUPPRESSED),
                clip_steps=settings.clip_steps if name in (HOST_REFINED, REFINED) else 0,  # as `semples refine --prompts FILE`
            ).masks
            for s, cam in cams[SOURCE.get(name, name)]
        )
        table[name] = best_row(val_masks, val, masks[name], test)
    return table, masks


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
