"""The terms of the loss for every positive pair and their weights, as the options say, and their weighted sum.

Flow: features of `clip_encoder` -> `losses`, one function per term -> **terms** -> `refiner`.
"""

from __future__ import annotations

from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import losses
from .config import RefinerConfig

__all__ = ["class_weights", "pair_terms", "weighted_sum"]


def pair_terms(
    features: Tensor,
    masks: Tensor,
    u_f: Tensor,
    prompts: Optional[Tuple[Tensor, Tensor]],
    background_texts: Tuple[Tensor, Tensor],
    config: RefinerConfig,
) -> Tuple[Dict[str, Tensor], Dict[str, float]]:
    """The unweighted terms of every pair, (P,) each, and the weight of each term.

    Args:
        features: (2P, D), first of the foregrounds, then of the backgrounds of the pairs.
        masks: (P, h, w), the masks that the views were made with.
        u_f: (P, D) text feature of each pair's class.
        prompts: u_b (P, N, D) of each pair's class and which are in use (P, N); None before prompts were learned.
        background_texts: features (K, D) of the hand-written texts, and which belong to the pair's class (P, K).
        config: forms and weights of the terms.
    """
    v_f, v_b = features[: len(u_f)], features[len(u_f) :]  # (P, D) each
    values = {
        "match_foreground": losses.match_foreground(v_f, u_f, "none", config.match_form),
        "match_background": losses.match_background(v_b, u_f, "none", config.match_form),
    }
    weights = {"match_foreground": 1.0, "match_background": config.lambda_b}
    if prompts is not None:
        u_b, alive = prompts
        values["refine"] = losses.refine(v_f, u_b, "none", alive, config.match_form)
        weights["refine"] = config.lambda_refine
    if config.lambda_background_texts:
        texts, present = background_texts
        values["background_texts"] = losses.background_texts(v_f, texts, present, config.background_threshold, "none")
        weights["background_texts"] = config.lambda_background_texts
    if config.lambda_area:
        values["area"] = losses.area(masks, "none")
        weights["area"] = config.lambda_area
    return values, weights


def class_weights(pairs: Tensor, classes: Sequence[str], config: RefinerConfig) -> Optional[Tensor]:
    """(P,) `class_weights` of the classes of the pairs (P, 2), or None without that option."""
    if config.class_weights is None:
        return None
    weights = [float(config.class_weights.get(name, 1)) for name in classes]
    return torch.tensor(weights, device=pairs.device)[pairs[:, 1]]


def weighted_sum(
    values: Dict[str, Tensor], weights: Dict[str, float], pair_weights: Optional[Tensor]
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """Weighted sum of the terms, float32, and the unweighted terms, each the (weighted) mean over the pairs."""
    terms = {name: losses.reduce(value, weights=pair_weights) for name, value in values.items()}
    return torch.stack([weights[name] * term.float() for name, term in terms.items()]).sum(), terms
