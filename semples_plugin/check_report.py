"""What a check found, per class and per pair, the verdict, and the table that is printed. Flow: `checking` -> **check_report**.

The verdict is one small function of a class's figures, `verdict`, with its thresholds above it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from ._text import printable
from .config import RefinerConfig

__all__ = ["VARIANTS", "CheckReport", "ClassFigures", "PairFigures", "verdict"]

VARIANTS = ("cam", "ones", "half", "empty", "inverse", "shifted", "dilated", "eroded", "sharpened")
"""Masks that the loss is asked about: the CAM itself first; see `checking.variants_of`."""

# Thresholds of `verdict`.
MIN_IMAGES = 10  # fewer positive images say nothing
KNOWN_LIFT = 0.25  # (AP - chance) / (1 - chance), at least: CLIP knows the class by its images
HELP_AUC = 0.75  # kept against removed region, at least
HELP_WINS = 0.6  # share of pairs in which the loss prefers the CAM to the shifted mask, at least
BLIND_AUC = 0.6  # kept against removed region, below


class PairFigures(NamedTuple):
    """One positive (image, class) pair.

    Attributes:
        image: number of the image, from 0, in the order of the loader.
        label: class index.
        area: mean of the mask.
        cos_kept, cos_removed: cosine of the class text with the kept and with the removed region, cos(v_f, u_f), cos(v_b, u_f).
        cos_shifted: cosine of the class text with a random region of the same area.
        losses: variant of the mask -> loss of this pair with the options in force.
    """

    image: int
    label: int
    area: float
    cos_kept: float
    cos_removed: float
    cos_shifted: float
    losses: Dict[str, float]


class ClassFigures(NamedTuple):
    """One class. What is not defined, as for a class without images, is None.

    Attributes:
        name: of the class.
        images: number of images that have the class.
        average_precision: of ranking all images by cos(image, u_f): does CLIP know the class?
        chance: share of images that have the class, which a blind ranking gets.
        removed_auc: area under the ROC curve of cos(kept region, u_f) against cos(removed region, u_f).
        shifted_auc: the same against a random region of the same area (the mask, moved).
        cos_kept, cos_removed, cos_shifted: means over the class's pairs; see `PairFigures`.
        area: mean area of the masks.
        losses: variant of the mask -> mean loss; see `VARIANTS`.
        wins: variant -> share of pairs in which the loss of the CAM is lower than that of the variant.
        cos_prompt: mean cos(v_b, u_b) of the learned prompt with the removed regions.
        cos_prompt_class: cos(u_f, u_b) of the learned prompt with the class text.
        prompt_alive: whether cos(v_b, u_b) of at least half of the pairs is above the clamp, below which nothing is learned.
    """

    name: str
    images: int
    average_precision: Optional[float] = None
    chance: Optional[float] = None
    removed_auc: Optional[float] = None
    shifted_auc: Optional[float] = None
    cos_kept: Optional[float] = None
    cos_removed: Optional[float] = None
    cos_shifted: Optional[float] = None
    area: Optional[float] = None
    losses: Dict[str, float] = {}
    wins: Dict[str, float] = {}
    cos_prompt: Optional[float] = None
    cos_prompt_class: Optional[float] = None
    prompt_alive: Optional[bool] = None

    @property
    def verdict(self) -> str:
        """`"will help"`, `"will not"` or `"cannot tell"`; see the function `verdict`."""
        return verdict(self)

    def as_dict(self) -> Dict[str, Any]:
        """All figures and the verdict, as JSON can hold them."""
        return {**self._asdict(), "verdict": self.verdict}


def verdict(figures: ClassFigures) -> str:
    """Whether the loss will help a class: `"will help"`, `"will not"` or `"cannot tell"`.

    It will help if CLIP knows the class by its images and tells the kept from the removed region, and the loss prefers the
    CAM to a moved one. It will not if CLIP knows the class neither by its images nor by the regions. A CAM that lies beside
    the objects also makes the regions look alike; so the regions alone condemn no class that CLIP knows by its images.

    Args:
        figures: of the class.
    """
    f = figures
    if f.images < MIN_IMAGES or f.average_precision is None or f.chance is None or f.removed_auc is None:
        return "cannot tell"
    every = f.chance >= 1  # all images have the class, so that AP says nothing
    known = not every and (f.average_precision - f.chance) / (1 - f.chance) >= KNOWN_LIFT
    if (known or every) and f.removed_auc >= HELP_AUC and f.wins["shifted"] >= HELP_WINS:
        return "will help"
    return "will not" if not (known or every) and f.removed_auc < BLIND_AUC else "cannot tell"


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `PromptRefiner.check` found; `print(report)` shows it as a table.

    Attributes:
        classes: figures of every class.
        pairs: figures of every positive (image, class) pair, in the order of the loader.
        num_images: number of images that were looked at.
        clip: name and fingerprint of the CLIP.
        stage: `"match"` or `"refine"`, which decides the terms of the loss.
        config: the options in force during the check.
        lambda_area: suggested weight of the area term; see `checking.area_weight`. None if no weight does it.
        area_share: share of pairs in which the loss with that weight prefers the CAM to the masks ones, half and empty.
        configure: sets options of the refiner; what `apply` calls.
    """

    classes: List[ClassFigures]
    pairs: List[PairFigures]
    num_images: int
    clip: str
    stage: str
    config: RefinerConfig
    lambda_area: Optional[float]
    area_share: Optional[float]
    configure: Callable[..., RefinerConfig] = dataclasses.field(repr=False, compare=False)

    def options(self) -> Dict[str, Any]:
        """The options that the check suggests: `class_weights` and `lambda_area`.

        A class with the verdict "will not" gets the weight 0; every other class keeps the weight it has.
        """
        weights = dict(self.config.class_weights or {})
        weights.update({figures.name: 0.0 for figures in self.classes if figures.verdict == "will not"})
        suggested: Dict[str, Any] = {"class_weights": weights or self.config.class_weights}
        if self.lambda_area is not None:
            suggested["lambda_area"] = self.lambda_area
        return suggested

    def apply(self) -> RefinerConfig:
        """Set the suggested options on the refiner that was checked. This changes the refiner from the next step on.

        Returns:
            Its new configuration.
        """
        return self.configure(**self.options())

    def as_dict(self) -> Dict[str, Any]:
        """Everything but the single pairs, as JSON can hold it."""
        return {
            "images": self.num_images,
            "pairs": len(self.pairs),
            "clip": self.clip,
            "stage": self.stage,
            "classes": [figures.as_dict() for figures in self.classes],
            "lambda_area": self.lambda_area,
            "area_share": self.area_share,
            "options": self.options(),
            "config": self.config.as_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{self.num_images} images, {len(self.pairs)} pairs, CLIP {printable(self.clip)}, stage {self.stage}", ""]
        lines += _table(_HEADS, [_row(f) for f in self.classes])
        lines += ["", "mean loss of the CAM, and of other masks in its place"]
        lines += _table([["class", *VARIANTS]], [[f.name, *(_number(f.losses.get(v)) for v in VARIANTS)] for f in self.classes])
        if self.stage == "refine":
            lines += ["", "learned prompts: cosines to the removed regions and to the class"]
            lines += _table([["class", "removed", "class", "state"]], [_prompt_row(f) for f in self.classes])
        return "\n".join(line.rstrip() for line in [*lines, "", self.advice()])

    def advice(self) -> str:
        """What `apply` would set, in words."""
        lines = []
        if self.lambda_area is not None and self.area_share is not None:
            lines.append(
                f"area weight: {self.config.lambda_area:g} now, {self.lambda_area:g} suggested; the loss then prefers the CAM "
                f"to an all-ones, half and empty mask in {100 * self.area_share:.0f} % of pairs"
            )
        else:
            lines.append(f"area weight: {self.config.lambda_area:g} now; no weight makes the loss prefer the CAM in most pairs")
        left_out = [printable(figures.name) for figures in self.classes if figures.verdict == "will not"]
        lines.append(f"classes to leave out: {', '.join(left_out) or 'none'}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- the table

_BEATEN = ("ones", "half", "inverse", "shifted")
_HEADS = [
    ["", "", "", "", "AUC", "AUC", "cos", "cos", *["beats"] * 4, ""],
    ["class", "images", "AP", "chance", "removed", "shifted", "kept", "removed", *_BEATEN, "verdict"],
]
_LEFT = ("verdict", "state")  # columns of words


def _row(f: ClassFigures) -> List[str]:
    beaten = [f"{100 * f.wins[name]:.0f} %" if f.wins else "-" for name in _BEATEN]
    figures = (f.average_precision, f.chance, f.removed_auc, f.shifted_auc, f.cos_kept, f.cos_removed)
    return [f.name, str(f.images), *map(_number, figures), *beaten, f.verdict]


def _prompt_row(f: ClassFigures) -> List[str]:
    state = "-" if f.prompt_alive is None else "alive" if f.prompt_alive else "dead"
    return [f.name, _number(f.cos_prompt), _number(f.cos_prompt_class), state]


def _number(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(heads: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> List[str]:
    """Lines of a table: names and words to the left, numbers to the right."""
    every = [*heads, *([_short(printable(row[0])), *row[1:]] for row in rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(heads[-1]))]
    left = [i == 0 or word in _LEFT for i, word in enumerate(heads[-1])]
    return ["  ".join(c.ljust(w) if words else c.rjust(w) for c, w, words in zip(row, widths, left)) for row in every]


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "~"
