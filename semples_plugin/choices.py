"""Choices that usually need masks, from image-level labels and CLIP alone: the background threshold, and which run is better.

For every threshold CLIP sees what the pseudo labels call the class, and what they leave. A good threshold keeps what CLIP takes
for the class, leaves nothing of it outside, and keeps no more than that. Ours; what it loses against a choice on masks is in
docs/results.md. Flow: `refiner` -> **choices** -> files, cli.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import regions, views
from ._checks import check_number, img_and_labels
from .masks import check_threshold, pseudo_labels
from .refiner import PromptRefiner

__all__ = ["AREA", "THRESHOLDS", "ThresholdChoice", "choose_threshold"]

THRESHOLDS = tuple(round(0.1 + 0.05 * i, 2) for i in range(17))  # 0.1 to 0.9
AREA = 0.75  # weight of the area in the agreement; chosen in the demo world and on photos, on one seed each


class ThresholdChoice(NamedTuple):
    """A background threshold, and what spoke for it.

    Attributes:
        threshold: the one with the highest agreement.
        agreement: its agreement. Of two runs of the same network on the same images, the one with the higher agreement is
            probably the better: for choosing lambda, or the step to stop at.
        thresholds: all that were tried.
        agreements: of each.
        kept, removed: < cos(v_f, u_f) > and < cos(v_b, u_f) > at each.
        areas: share of the image that is kept, at each.
        num_pairs: positive (image, class) pairs that were looked at.
    """

    threshold: float
    agreement: float
    thresholds: List[float]
    agreements: List[float]
    kept: List[float]
    removed: List[float]
    areas: List[float]
    num_pairs: int

    def __str__(self) -> str:
        lines = ["threshold  agreement  kept  removed  area"]
        for row in zip(self.thresholds, self.agreements, self.kept, self.removed, self.areas):
            lines.append("{:9.2f}  {:9.3f} {:5.2f}  {:7.2f} {:5.2f}".format(*row) + "  <-" * (row[0] == self.threshold))
        return "\n".join(lines)


@torch.no_grad()
def choose_threshold(
    refiner: PromptRefiner,
    loader: Iterable[Any],
    cam_of: Callable[[Tensor], Tensor],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    max_images: Optional[int] = None,
    area: float = AREA,
    progress: bool = True,
    **options: Any,
) -> ThresholdChoice:
    """The background threshold of `refine_masks` for these CAMs, without a pixel mask.

        agreement(t) = < cos(v_f, u_f) - cos(v_b, u_f) - area * a >

    where v_f and v_b are CLIP's features of what the pseudo labels at threshold t give to the class and of the rest, u_f the
    text feature of the class, a the share of the image that is kept, and < > the mean over positive (image, class) pairs. CLIP
    sees two views per pair and threshold; some hundred images are a sensible number.

    Args:
        refiner: whose CLIP, classes and options count.
        loader: yields `(img, labels)`, as for `PromptRefiner.fit_prompts`.
        cam_of: img (B, 3, H, W) -> cam (B, C, h, w), as for `PromptRefiner.fit_prompts`.
        thresholds: to choose from, each from 0 to 1.
        max_images: stop after so many images.
        area: weight of the area. What CLIP recognizes shows also in too large a mask; without this term they win.
        progress: show a progress bar.
        **options: of `refine_masks`, as they will be used: `align`, `clip_steps`, `suppress`.

    Returns:
        `ThresholdChoice`: `print` it for a table.

    Raises:
        ValueError: if the data hold no positive label, or a threshold is not from 0 to 1.

    Example:
        >>> refiner = PromptRefiner(["boat", "train", "bird"], clip=tiny_clip, image_stats=None)
        >>> loader = [(torch.rand(2, 3, 32, 32), torch.tensor([[1, 0, 0], [1, 1, 0]]))]
        >>> choice = choose_threshold(refiner, loader, lambda img: torch.rand(2, 3, 8, 8), clip_steps=0, progress=False)
        >>> choice.threshold in choice.thresholds, choice.num_pairs
        (True, 3)
    """
    from tqdm import tqdm

    tried = [float(value) for value in thresholds]
    if not tried:
        raise ValueError("`thresholds` must hold at least one value; got none.")
    for value in tried:
        check_threshold("thresholds", value)
    check_number("area", area, 0)
    total, pairs_seen, images_seen = torch.zeros(len(tried), 3, dtype=torch.float64), 0, 0
    for batch in tqdm(loader, desc="choosing a threshold", disable=not progress):
        if max_images is not None and images_seen >= max_images:
            break
        img, labels = img_and_labels(batch, len(refiner.classes))
        cam = cam_of(img)
        img, labels = img.to(cam.device), labels.to(cam.device)
        masks = refiner.refine_masks(img, cam, labels, **options).masks  # (B, C, H, W)
        pairs = regions.positive_pairs(labels)
        total += agreement_sums(refiner, img, masks, pairs, tried)
        pairs_seen, images_seen = pairs_seen + len(pairs), images_seen + len(img)
    if not pairs_seen:
        raise ValueError("choose_threshold needs at least one positive label; the loader gave none. Check its labels.")
    kept, removed, areas = (total / pairs_seen).T.tolist()
    agreements = [k - r - area * a for k, r, a in zip(kept, removed, areas)]
    best = max(range(len(tried)), key=lambda i: agreements[i])
    return ThresholdChoice(tried[best], agreements[best], tried, agreements, kept, removed, areas, pairs_seen)


def agreement_sums(refiner: PromptRefiner, img: Tensor, masks: Tensor, pairs: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(T, 3) float64 on the CPU: sums over the pairs of cos(v_f, u_f), cos(v_b, u_f) and the area, at every threshold.

    Args:
        refiner: see `choose_threshold`.
        img: (B, 3, H, W) as `refine_masks` takes it.
        masks: (B, C, H, W) in [0, 1].
        pairs: (P, 2).
        thresholds: T values.
    """
    encoder, config = refiner.encoder, refiner.config
    images = views.view_images(img, refiner.image_stats, encoder, config)
    own = refiner.text_features[pairs[:, 1]]  # (P, D)
    rows = []
    for threshold in thresholds:
        labels = pseudo_labels(masks, threshold)  # (B, H, W)
        hard = (labels[pairs[:, 0]] == pairs[:, 1, None, None] + 1).float()  # (P, H, W)
        hard = F.interpolate(hard[:, None], size=(encoder.image_size,) * 2, mode="area")[:, 0]
        features = encoder.encode_image(torch.cat(views.pair_views(images, hard, pairs, encoder, config)), config.max_views)
        v_f, v_b = features[: len(pairs)], features[len(pairs) :]
        figures = [F.cosine_similarity(v_f, own), F.cosine_similarity(v_b, own), hard.flatten(1).mean(1)]
        rows.append(torch.stack([figure.double().sum() for figure in figures]))
    return torch.stack(rows).cpu()
