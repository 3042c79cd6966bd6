"""Will the loss help? What CLIP and the loss make of images, image-level labels and CAMs, without any pixel mask.

`measure` goes through the data once; the figures per class are pure functions of what it gathers. Flow: `regions` ->
**checking** -> `check_report` -> `refiner`.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses, regions
from ._checks import img_and_labels
from .check_report import VARIANTS, CheckReport, ClassFigures, PairFigures
from .config import RefinerConfig

__all__ = [
    "Measured",
    "area_weight",
    "auc",
    "average_precision",
    "check",
    "class_figures",
    "measure",
    "pair_figures",
    "random_shifts",
    "variants_of",
]

AREA_SHARE = 0.8  # share of pairs in which the suggested area weight shall let the CAM win
AREA_SHARE_MIN = 0.5  # without a weight that does it in so many, none is suggested
AREA_RIVALS = ("ones", "half", "empty")  # masks that know nothing of the image

Prepare = Callable[[Tensor, Tensor, Tensor], Tuple[Tensor, Tensor, Tensor]]
Terms = Callable[[Tensor, Tensor, Tensor], Tuple[Dict[str, Tensor], Dict[str, float]]]


class Measured(NamedTuple):
    """What `measure` gathers, on the CPU, for N images and P positive pairs.

    Attributes:
        labels: (N, C) bool.
        scores: (N, C) cos(image, u_f) of every image and class.
        pairs: (P, 2) image number and class of each pair.
        cos_kept, cos_removed, cos_shifted: (P,) cos(v_f, u_f), cos(v_b, u_f), and cos(v_f, u_f) of the shifted mask.
        cos_prompt: (P,) cos(v_b, u_b) of the nearest prompt of the class; None without learned prompts.
        areas: variant -> (P,) mean of the mask.
        losses: variant -> (P,) weighted sum of all terms but the area term, float64.
        lambda_area: weight of the area term in force.
    """

    labels: Tensor
    scores: Tensor
    pairs: Tensor
    cos_kept: Tensor
    cos_removed: Tensor
    cos_shifted: Tensor
    cos_prompt: Optional[Tensor]
    areas: Dict[str, Tensor]
    losses: Dict[str, Tensor]
    lambda_area: float

    def total(self, variant: str) -> Tensor:
        """(P,) loss of a variant, the area term included."""
        return self.losses[variant] + self.lambda_area * self.areas[variant]


@torch.no_grad()
def check(
    loader: Iterable[Any],
    cam_of: Callable[[Tensor], Tensor],
    classes: Sequence[str],
    prepare: Prepare,
    *,
    encode: Callable[[Tensor], Tensor],
    terms: Terms,
    text_features: Tensor,
    prompt_features: Optional[Tensor],
    config: RefinerConfig,
    clip: str,
    configure: Callable[..., RefinerConfig],
    max_images: Optional[int] = None,
    progress: bool = True,
) -> CheckReport:
    """`PromptRefiner.check`, which says what it gives; the other arguments are what it needs of a refiner.

    Args:
        loader, cam_of, max_images, progress: as for `PromptRefiner.check`.
        classes: C class names.
        prepare, encode, terms: as for `measure`.
        text_features: (C, D) u_f.
        prompt_features: u_b, (C, D) or (C, N, D) for N prompts per class; None without learned prompts.
        config: the options in force; `lambda_area` and `seed` are used.
        clip: name and fingerprint of the CLIP.
        configure: sets options of the refiner.
    """
    u_f = text_features.float().cpu()
    u_b = None if prompt_features is None else prompt_features.float().cpu().view(len(u_f), -1, u_f.shape[1])  # (C, N, D)
    measured = measure(
        loader, cam_of, prepare, encode, terms, u_f, u_b,
        lambda_area=config.lambda_area, seed=config.seed, max_images=max_images, progress=progress,
    )  # fmt: skip
    figures = class_figures(measured, classes, None if u_b is None else _cosines(u_b, u_f[:, None]).amax(1))
    ignored = [k for k, one in enumerate(figures) if one.verdict == "will not"]
    used = ~torch.isin(measured.pairs[:, 1], torch.tensor(ignored, dtype=torch.long))
    used = used if used.any() else torch.ones_like(used)
    losses_of, areas = ({name: of[name][used] for name in VARIANTS} for of in (measured.losses, measured.areas))
    suggested = area_weight(losses_of, areas)
    lambda_area, area_share = suggested or (None, None)
    return CheckReport(
        classes=figures,
        pairs=pair_figures(measured),
        num_images=len(measured.labels),
        clip=clip,
        stage="match" if u_b is None else "refine",
        config=config,
        lambda_area=lambda_area,
        area_share=area_share,
        configure=configure,
    )


def measure(
    loader: Iterable[Any],
    cam_of: Callable[[Tensor], Tensor],
    prepare: Prepare,
    encode: Callable[[Tensor], Tensor],
    terms: Terms,
    u_f: Tensor,
    u_b: Optional[Tensor],
    *,
    lambda_area: float,
    seed: int,
    max_images: Optional[int] = None,
    progress: bool = True,
) -> Measured:
    """Show CLIP every image, the regions of every positive pair, and ask the loss about every variant of its mask.

    Per image one image encode, per pair 2 for each of the variants and 3 more.

    Args:
        loader, cam_of, max_images, progress: as for `PromptRefiner.check`.
        prepare: img, cam, labels -> images at CLIP's size (B, 3, S, S), masks (P, S, S), pairs (P, 2).
        encode: views (N, 3, S, S) -> features (N, D).
        terms: images, masks, pairs -> unweighted terms by name, (P,) each, and the weight of each.
        u_f, u_b: (C, D) features of the class texts, and (C, N, D) of the N learned prompts per class, or None; on the CPU.
        lambda_area: weight of the area term in force.
        seed: of the shifts.

    Raises:
        ValueError: if the loader gives no image.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    found: Dict[str, List[Tensor]] = {}
    count = 0

    def add(**values: Tensor) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value.detach().cpu())

    for batch in tqdm(loader, desc="checking", disable=not progress):
        img, labels = img_and_labels(batch, len(u_f))
        cam = cam_of(img)
        if all(isinstance(value, Tensor) for value in (img, cam, labels)):
            img, labels = img.to(cam.device), labels.to(cam.device)
            if max_images is not None:
                img, cam, labels = (value[: max_images - count] for value in (img, cam, labels))
        images, masks, pairs = prepare(img, cam, labels)
        masks = masks.float()
        add(labels=labels.cpu() > 0.5, scores=_cosines(encode(images).cpu()[:, None], u_f[None]))
        own = pairs[:, 1].cpu()
        shapes = variants_of(masks, random_shifts(len(pairs), masks.shape[1:], generator))
        kept, removed = (encode(view).cpu() for view in regions.split(images, masks, pairs))  # (P, D) each
        moved = encode(regions.split(images, shapes["shifted"], pairs)[0]).cpu()
        add(cos_kept=_cosines(kept, u_f[own]), cos_removed=_cosines(removed, u_f[own]), cos_shifted=_cosines(moved, u_f[own]))
        if u_b is not None:
            add(cos_prompt=_cosines(removed[:, None], u_b[own]).amax(1))
        for name, mask in shapes.items():
            values, weights = terms(images, mask, pairs)
            parts = [weights[term] * value.double() for term, value in values.items() if term != "area"]
            add(**{f"loss {name}": torch.stack(parts).sum(0), f"area {name}": losses.area(mask, "none").double()})
        add(pairs=pairs.cpu() + torch.tensor([count, 0]))
        count += len(img)
        if max_images is not None and count >= max_images:
            break
    if not count:
        raise ValueError("`loader` must yield at least one batch to be checked; got none.")
    every = {name: torch.cat(values) for name, values in found.items()}
    by_variant = {kind: {name: every.pop(f"{kind} {name}") for name in VARIANTS} for kind in ("loss", "area")}
    every.setdefault("cos_prompt", None)  # type: ignore[arg-type]
    return Measured(**every, areas=by_variant["area"], losses=by_variant["loss"], lambda_area=lambda_area)  # type: ignore[arg-type]


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b, dim=-1)


# ---------------------------------------------------------------------------------------------------- masks


def random_shifts(count: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """(count, 2) rows and columns to roll a mask by: from a quarter to three quarters of its side, one draw per mask.

    Args:
        count: P.
        size: (height, width) of the masks.
        generator: of the draws.
    """
    shares = [0.25 + 0.5 * torch.rand(2, generator=generator) for _ in range(count)]
    return (torch.stack(shares) * torch.tensor(size)).long() if shares else torch.zeros(0, 2, dtype=torch.long)


def variants_of(masks: Tensor, shifts: Tensor) -> Dict[str, Tensor]:
    """The masks and what the loss should like less, by name.

    cam: the masks; ones, half, empty: 1, 0.5, 0 everywhere; inverse: 1 - M; shifted: M rolled to another place, so a random
    region of the same area; dilated, eroded: the maximum and the minimum of M within a sixteenth of the side; sharpened: 1
    where M is above the middle of its range, else 0.

    Args:
        masks: (P, h, w) in [0, 1].
        shifts: (P, 2) rows and columns to roll each mask by.

    Returns:
        Name -> (P, h, w).
    """
    reach = max(1, masks.shape[-1] // 16)
    rolled = [mask.roll(shift, (0, 1)) for mask, shift in zip(masks, shifts.tolist())]
    low, high = (masks.amin((1, 2), keepdim=True), masks.amax((1, 2), keepdim=True)) if len(masks) else (masks, masks)
    return {
        "cam": masks,
        "ones": torch.ones_like(masks),
        "half": torch.full_like(masks, 0.5),
        "empty": torch.zeros_like(masks),
        "inverse": 1 - masks,
        "shifted": torch.stack(rolled) if rolled else masks,
        "dilated": _highest(masks, reach),
        "eroded": 1 - _highest(1 - masks, reach),
        "sharpened": (masks > (low + high) / 2).to(masks.dtype),
    }


def _highest(masks: Tensor, reach: int) -> Tensor:
    """The maximum within `reach` pixels, (P, h, w)."""
    return F.max_pool2d(masks[:, None], 2 * reach + 1, 1, reach)[:, 0] if len(masks) else masks


# ---------------------------------------------------------------------------------------------------- figures


def average_precision(scores: Tensor, positive: Tensor) -> Optional[float]:
    """Mean precision over the positives, ranked by falling score; equal scores share one rank. None without positives.

    Args:
        scores: (N,).
        positive: (N,) bool.
    """
    values, rank = scores.unique(return_inverse=True)  # (V,) ascending, (N,)
    places = torch.bincount(rank, minlength=len(values)).flip(0).cumsum(0)  # images down to each score, highest first
    own = torch.bincount(rank[positive], minlength=len(values)).flip(0)  # positives at each score
    if not positive.any():
        return None
    return float((own * own.cumsum(0) / places.double()).sum() / own.sum())


def auc(higher: Tensor, lower: Tensor) -> Optional[float]:
    """Area under the ROC curve: the share of pairs (a, b) with a > b, a of `higher`, b of `lower`; equal ones count half.

    Args:
        higher, lower: (P,) and (Q,). None if one of them is empty.
    """
    if not len(higher) or not len(lower):
        return None
    ordered = lower.sort().values
    below, up_to = (torch.searchsorted(ordered, higher.contiguous(), right=right) for right in (False, True))
    return float((below + up_to).double().mean() / 2 / len(lower))


def area_weight(
    losses_of: Mapping[str, Tensor], areas: Mapping[str, Tensor], share: float = AREA_SHARE
) -> Optional[Tuple[float, float]]:
    """The smallest weight of the area term with which the loss prefers the CAM to masks that know nothing of the image.

    In a pair, the CAM is preferred to a rival if L(cam) + w A(cam) <= L(rival) + w A(rival), so for a rival with d = L(cam) -
    L(rival) and a = A(rival) - A(cam): w a >= d, a lower bound of w for a larger rival (ones) and an upper one for a
    smaller rival (empty). The weight is the smallest at which the bounds of all rivals hold in the share `share` of pairs; or,
    if no weight does that, in the largest share there is, at least half of the pairs.

    Args:
        losses_of: variant -> (P,) loss without the area term, of "cam" and of the rivals ones, half, empty.
        areas: variant -> (P,) mean of the mask.
        share: of the pairs.

    Returns:
        The weight, rounded up to 3 digits after the point, and the share of pairs in which the bounds hold. None if there is no
        such weight.
    """
    own = losses_of["cam"].double()
    if not len(own):
        return None
    low, high = torch.zeros_like(own), torch.full_like(own, float("inf"))
    for rival in AREA_RIVALS:
        d, a = own - losses_of[rival].double(), (areas[rival] - areas["cam"]).double()
        low = torch.where(a > 0, torch.maximum(low, d / a), low)
        high = torch.where(a < 0, torch.minimum(high, d / a), high)
        high = torch.where((a == 0) & (d > 0), torch.full_like(high, -1), high)  # no weight makes up for d
    low = ((low * 1000 - 1e-9).ceil() / 1000).clamp(min=0)  # so that a weight of 3 digits is one of the candidates
    possible = low <= high
    starts, ends = low[possible].sort().values, high[possible].sort().values
    candidates = torch.cat([torch.zeros(1, dtype=torch.float64, device=own.device), starts]).unique()  # ascending
    holding = torch.searchsorted(starts, candidates, right=True) - torch.searchsorted(ends, candidates)
    shares = holding.double() / len(own)
    if shares.max() < AREA_SHARE_MIN:
        return None
    chosen = int((shares >= min(share, float(shares.max()))).nonzero()[0])
    return float(candidates[chosen]) + 0.0, float(shares[chosen])


def pair_figures(measured: Measured) -> List[PairFigures]:
    """The figures of every pair."""
    m = measured
    totals = {name: m.total(name).tolist() for name in VARIANTS}
    rows = zip(m.pairs.tolist(), m.areas["cam"].tolist(), m.cos_kept.tolist(), m.cos_removed.tolist(), m.cos_shifted.tolist())
    return [
        PairFigures(image, label, area, kept, removed, shifted, {name: totals[name][i] for name in VARIANTS})
        for i, ((image, label), area, kept, removed, shifted) in enumerate(rows)
    ]


def class_figures(measured: Measured, classes: Sequence[str], prompt_class: Optional[Tensor] = None) -> List[ClassFigures]:
    """The figures of every class.

    Args:
        measured: of `measure`.
        classes: C class names.
        prompt_class: (C,) cos(u_f, u_b); None without learned prompts.
    """
    m, result = measured, []
    for k, name in enumerate(classes):
        own, positive = m.pairs[:, 1] == k, m.labels[:, k]
        totals = {variant: m.total(variant)[own] for variant in VARIANTS}
        figures = ClassFigures(
            name,
            int(positive.sum()),
            average_precision(m.scores[:, k], positive),
            float(positive.float().mean()),
            auc(m.cos_kept[own], m.cos_removed[own]),
            auc(m.cos_kept[own], m.cos_shifted[own]),
        )
        if own.any():
            figures = figures._replace(
                cos_kept=float(m.cos_kept[own].mean()),
                cos_removed=float(m.cos_removed[own].mean()),
                cos_shifted=float(m.cos_shifted[own].mean()),
                area=float(m.areas["cam"][own].mean()),
                losses={variant: float(value.mean()) for variant, value in totals.items()},
                wins={v: float((totals["cam"] < totals[v]).float().mean()) for v in VARIANTS if v != "cam"},
            )
            if m.cos_prompt is not None:
                alive = (m.cos_prompt[own] > losses.COSINE_MIN).float().mean() >= 0.5
                figures = figures._replace(cos_prompt=float(m.cos_prompt[own].mean()), prompt_alive=bool(alive))
        if prompt_class is not None:
            figures = figures._replace(cos_prompt_class=float(prompt_class[k]))
        result.append(figures)
    return result
