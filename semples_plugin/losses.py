"""The loss terms of the papers as pure functions of features and masks; one function per term.

Notation (SemPLeS, arXiv 2401.11791, section 3): `v_f`, `v_b` are CLIP features of the foreground and background region of
the P positive (image, class) pairs, `u_f` the text feature of the pair's class, `u_b` the feature of its learned background
prompt; all (P, D), of any length, none normalized. c(a, b) = clamp(cos(a, b), 1e-4, 0.9999), < > = mean over the P pairs.
Every term of no pairs (P = 0) is a zero that is still attached to the graph. With `reduction="none"` a term is (P,), one value
per pair. Flow: `clip_encoder` -> **losses** -> `refiner`.

The terms of prompt learning keep a gradient where a clamp would end learning: beyond the clamp they go on with slope 1, the
smallest that -log has. The host's terms keep the clamp as it is.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "area",
    "background_texts",
    "cosine",
    "match_background",
    "match_foreground",
    "prompt_background",
    "prompt_repel",
    "prompt_repel_cluster",
    "reduce",
    "refine",
]
COSINE_MIN, COSINE_MAX = 1e-4, 0.9999


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Clamped cosine similarity c(a, b) along the last dimension, as it stands before every logarithm.

    Args:
        a, b: (..., D), broadcast against each other. Half precision is computed in float32.

    Returns:
        (...), in [1e-4, 0.9999]; its gradient is zero where the clamp bites.
    """
    return _cosine(a, b).clamp(COSINE_MIN, COSINE_MAX)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    a, b = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (a, b))
    # F.normalize, a product and a sum: no matrix product, so autocast leaves the precision alone.
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)


def reduce(values: Tensor, reduction: str = "mean", weights: Optional[Tensor] = None) -> Tensor:
    """One number of the values of P pairs, or the values themselves.

    Args:
        values: (P,).
        reduction: `"mean"`, or `"none"` for the values as they are.
        weights: (P,) not negative: the mean is then sum(weights * values) / sum(weights), 0 if all weights are 0; or None.

    Returns:
        Scalar, 0 with P = 0 and attached to the graph in any case; or (P,).

    Raises:
        ValueError: for another `reduction`.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"`reduction` must be 'mean' or 'none'; got {reduction!r}.")
    if reduction == "none":
        return values
    if weights is not None:
        total = weights.sum()
        return (weights * values).sum() / torch.where(total > 0, total, torch.ones_like(total))
    return values.mean() if values.numel() else values.sum()  # the sum of nothing is 0 and keeps the graph


def _attract(a: Tensor, b: Tensor, form: str) -> Tensor:
    """-log c(a, b), or 1 - cos(a, b)."""
    if form == "log":
        return -torch.log(cosine(a, b))
    return 1 - _cosine(a, b)


def _repel_from(a: Tensor, b: Tensor, form: str) -> Tensor:
    """-log(1 - c(a, b)), or max(cos(a, b), 0)."""
    if form == "log":
        return -torch.log(1 - cosine(a, b))
    return _cosine(a, b).clamp(min=0)


def match_foreground(v_f: Tensor, u_f: Tensor, reduction: str = "mean", form: str = "log") -> Tensor:
    """Segment-label matching, foreground: < -log c(v_f, u_f) > (SemPLeS, L_match, first term).

    The region that the CAM keeps should look like its class.

    Args:
        v_f, u_f: (P, D).

    With `form="linear"` it is < 1 - cos(v_f, u_f) >, see `RefinerConfig.match_form`.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.
    """
    return reduce(_attract(v_f, u_f, form), reduction)


def match_background(v_b: Tensor, u_f: Tensor, reduction: str = "mean", form: str = "log") -> Tensor:
    """Segment-label matching, background: < -log(1 - c(v_b, u_f)) > (SemPLeS, L_match, second term, before lambda_b).

    What the CAM leaves out should not look like the class.

    Args:
        v_b, u_f: (P, D).

    With `form="linear"` it is < max(cos(v_b, u_f), 0) >, see `RefinerConfig.match_form`.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.
    """
    return reduce(_repel_from(v_b, u_f, form), reduction)


def refine(v_f: Tensor, u_b: Tensor, reduction: str = "mean", present: Optional[Tensor] = None, form: str = "log") -> Tensor:
    """Prompt-guided semantic refinement: < -log(1 - c(v_f, u_b)) > (SemPLeS, L_refine).

    The region that the CAM keeps should not look like what the class's background prompt describes. With several prompts per
    class (ours, not in the paper) it is the mean over the prompts of the pair's class, then the mean over pairs.

    Args:
        v_f: (P, D).
        u_b: (P, D), frozen; or (P, N, D) for N prompts per class.
        present: (P, N), 1 where prompt n of the pair's class is in use; or None for all. A pair without a prompt counts as 0,
            so that what one pair contributes does not depend on the prompts of other classes.

    With `form="linear"` it is < max(cos(v_f, u_b), 0) >, see `RefinerConfig.match_form`.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.
    """
    if u_b.ndim == v_f.ndim:
        u_b = u_b[:, None]
    value = _repel_from(v_f[:, None], u_b, form)  # (P, N)
    weight = torch.ones_like(value) if present is None else present.to(value)
    return reduce((weight * value).sum(1) / weight.sum(1).clamp(min=1), reduction)


def prompt_background(v_b: Tensor, u_b: Tensor, reduction: str = "mean") -> Tensor:
    """Contrastive prompt learning, pull: < -log c(v_b, u_b) > (SemPLeS, L_prompt, first term).

    Below the clamp, cos < 1e-4, the clamped form has no gradient, and a prompt that gets there never comes back. There the
    value is -log(1e-4) + (1e-4 - cos) instead (ours); everywhere else it is the paper's.

    Args:
        v_b, u_b: (P, D); only the prompt behind u_b learns.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.
    """
    cos = _cosine(v_b, u_b)
    value = -torch.log(cos.clamp(COSINE_MIN, COSINE_MAX))
    return reduce(torch.where(cos < COSINE_MIN, value + (COSINE_MIN - cos), value), reduction)


def prompt_repel(u_f: Tensor, u_b: Tensor, repel: str = "log", reduction: str = "mean") -> Tensor:
    """Contrastive prompt learning, push: T(u_f, u_b) of L_prompt (SemPLeS), before lambda_T.

    `"log"`: < log c(u_f, u_b) >, as in the reference recipe, which lambda_T is tuned for;
    `"log1m"`: < -log(1 - c(u_f, u_b)) >. Both push cos(u_f, u_b) down.

    Above the clamp, cos > 0.9999, where the clamped form has no gradient, the value rises on with cos - 0.9999 (ours). Below it
    there is nothing left to push and the paper's clamp stays.

    Args:
        u_f, u_b: (P, D).
        repel: `"log"` or `"log1m"`.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.

    Raises:
        ValueError: for another value of `repel`.
    """
    return reduce(_repulsion(_cosine(u_f, u_b), repel), reduction)


def prompt_repel_cluster(texts: Tensor, u_b: Tensor, related: Tensor, repel: str = "log", reduction: str = "mean") -> Tensor:
    """T of L_prompt with the clusters of PCC: a background prompt is pushed away from every class of its class's cluster.

    What a cluster shares (the look of an animal) must not end up in the background prompt of one of its classes. For each
    pair, the mean over the classes j of its cluster of T(u_j, u_b); then the mean over pairs. With clusters of one class it is
    `prompt_repel`. A synthesis of this package; neither paper has it.

    Args:
        texts: (C, D), u_f of all classes.
        u_b: (P, D), the background prompt of every pair.
        related: (P, C), 1 where class j is in the cluster of the pair's class, that class included.
        repel: `"log"` or `"log1m"`, as in `prompt_repel`.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.
    """
    value = _repulsion(_cosine(u_b[:, None], texts[None]), repel)  # (P, C)
    weight = related.to(value)
    return reduce((weight * value).sum(1) / weight.sum(1).clamp(min=1), reduction)


def _repulsion(cos: Tensor, repel: str) -> Tensor:
    """T of a cosine that is not clamped yet."""
    if repel not in ("log", "log1m"):
        raise ValueError(f"`repel` must be 'log' or 'log1m'; got {repel!r}.")
    c = cos.clamp(COSINE_MIN, COSINE_MAX)
    value = torch.log(c) if repel == "log" else -torch.log(1 - c)
    return torch.where(cos > COSINE_MAX, value + (cos - COSINE_MAX), value)


def background_texts(v_f: Tensor, texts: Tensor, present: Tensor, threshold: float = 0.0, reduction: str = "mean") -> Tensor:
    """Hand-written background prompts: the refine term with u_b = E_T of given texts (after CLIMS, CVPR 2022).

    For each pair, the mean over its texts t of 1[c(v_f, t) > threshold] * -log(1 - c(v_f, t)); then the mean over pairs.

    Args:
        v_f: (P, D).
        texts: (K, D), features of all texts.
        present: (P, K), 1 where text k belongs to the pair's class. A pair without texts counts as 0.
        threshold: of the cosine; CLIMS ignores texts that the region does not resemble anyway.

    Returns:
        Scalar, 0 with P = 0; or (P,), see `reduce`.
    """
    c = cosine(v_f[:, None], texts[None])  # (P, K)
    weight = present.to(c) * (c > threshold).to(c)
    return reduce((weight * -torch.log(1 - c)).sum(1) / present.to(c).sum(1).clamp(min=1), reduction)


def area(masks: Tensor, reduction: str = "mean") -> Tensor:
    """Area term: < mean of M_k > (CLIMS, CVPR 2022); keeps masks from growing over the whole image.

    Args:
        masks: (P, h, w) in [0, 1].

    Returns:
        Scalar in [0, 1], 0 with P = 0; or (P,), see `reduce`.
    """
    return reduce(masks.flatten(1).mean(1), reduction)
