"""The loss terms of the papers as pure functions of features and masks; one function per term.

Notation (SemPLeS, arXiv 2401.11791, section 3): `v_f`, `v_b` are CLIP features of the foreground and background region of
the P positive (image, class) pairs, `u_f` the text feature of the pair's class, `u_b` the feature of its learned background
prompt; all (P, D), of any length, none normalised. c(a, b) = clamp(cos(a, b), 1e-4, 0.9999), < > = mean over the P pairs.
Every term of no pairs (P = 0) is a zero that is still attached to the graph. Flow: `clip_encoder` -> **losses** -> `refiner`.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .clip_encoder import full_precision

__all__ = [
    "area",
    "background_texts",
    "cosine",
    "match_background",
    "match_foreground",
    "multi_label_cross_entropy",
    "patch_contrast",
    "prompt_background",
    "prompt_repel",
    "prompt_repel_cluster",
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
    a, b = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (a, b))
    # F.normalize, a product and a sum: no matrix product, so autocast leaves the precision alone.
    return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1).clamp(COSINE_MIN, COSINE_MAX)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if values.numel() else values.sum()  # the sum of nothing is 0 and keeps the graph


def match_foreground(v_f: Tensor, u_f: Tensor) -> Tensor:
    """Segment-label matching, foreground: < -log c(v_f, u_f) > (SemPLeS, L_match, first term).

    The region that the CAM keeps should look like its class.

    Args:
        v_f, u_f: (P, D).

    Returns:
        Scalar; 0 with P = 0.
    """
    return _mean(-torch.log(cosine(v_f, u_f)))


def match_background(v_b: Tensor, u_f: Tensor) -> Tensor:
    """Segment-label matching, background: < -log(1 - c(v_b, u_f)) > (SemPLeS, L_match, second term, before lambda_b).

    What the CAM leaves out should not look like the class.

    Args:
        v_b, u_f: (P, D).

    Returns:
        Scalar; 0 with P = 0.
    """
    return _mean(-torch.log(1 - cosine(v_b, u_f)))


def refine(v_f: Tensor, u_b: Tensor) -> Tensor:
    """Prompt-guided semantic refinement: < -log(1 - c(v_f, u_b)) > (SemPLeS, L_refine).

    The region that the CAM keeps should not look like what the class's background prompt describes.

    Args:
        v_f, u_b: (P, D); u_b frozen.

    Returns:
        Scalar; 0 with P = 0.
    """
    return _mean(-torch.log(1 - cosine(v_f, u_b)))


def prompt_background(v_b: Tensor, u_b: Tensor) -> Tensor:
    """Contrastive prompt learning, pull: < -log c(v_b, u_b) > (SemPLeS, L_prompt, first term).

    Args:
        v_b, u_b: (P, D); only the prompt behind u_b learns.

    Returns:
        Scalar; 0 with P = 0.
    """
    return _mean(-torch.log(cosine(v_b, u_b)))


def prompt_repel(u_f: Tensor, u_b: Tensor, form: str = "log") -> Tensor:
    """Contrastive prompt learning, push: T(u_f, u_b) of L_prompt (SemPLeS), before lambda_T.

    `"log"`: < log c(u_f, u_b) >, as in the reference recipe, which lambda_T is tuned for;
    `"log1m"`: < -log(1 - c(u_f, u_b)) >. Both push cos(u_f, u_b) down.

    Args:
        u_f, u_b: (P, D).
        form: `"log"` or `"log1m"`.

    Returns:
        Scalar; 0 with P = 0.

    Raises:
        ValueError: for another form.
    """
    return _mean(_repulsion(cosine(u_f, u_b), form))


def prompt_repel_cluster(texts: Tensor, u_b: Tensor, related: Tensor, form: str = "log") -> Tensor:
    """T of L_prompt with the clusters of PCC: a background prompt is pushed away from every class of its class's cluster.

    What a cluster shares (the look of an animal) must not end up in the background prompt of one of its classes. For each
    pair, the mean over the classes j of its cluster of T(u_j, u_b); then the mean over pairs. With clusters of one class it is
    `prompt_repel`. A synthesis of this package; neither paper has it.

    Args:
        texts: (C, D), u_f of all classes.
        u_b: (P, D), the background prompt of every pair.
        related: (P, C), 1 where class j is in the cluster of the pair's class, that class included.
        form: `"log"` or `"log1m"`, as in `prompt_repel`.

    Returns:
        Scalar; 0 with P = 0.
    """
    value = _repulsion(cosine(u_b[:, None], texts[None]), form)  # (P, C)
    weight = related.to(value)
    return _mean((weight * value).sum(1) / weight.sum(1).clamp(min=1))


def _repulsion(c: Tensor, form: str) -> Tensor:
    if form == "log":
        return torch.log(c)
    if form == "log1m":
        return -torch.log(1 - c)
    raise ValueError(f"`form` must be 'log' or 'log1m'; got {form!r}.")


def background_texts(v_f: Tensor, texts: Tensor, present: Tensor, threshold: float = 0.0) -> Tensor:
    """Hand-written background prompts: the refine term with u_b = E_T of given texts (after CLIMS, CVPR 2022).

    For each pair, the mean over its texts t of 1[c(v_f, t) > threshold] * -log(1 - c(v_f, t)); then the mean over pairs.

    Args:
        v_f: (P, D).
        texts: (K, D), features of all texts.
        present: (P, K), 1 where text k belongs to the pair's class. A pair without texts counts as 0.
        threshold: of the cosine; CLIMS ignores texts that the region does not resemble anyway.

    Returns:
        Scalar; 0 with P = 0.
    """
    c = cosine(v_f[:, None], texts[None])  # (P, K)
    weight = present.to(c) * (c > threshold).to(c)
    return _mean((weight * -torch.log(1 - c)).sum(1) / present.to(c).sum(1).clamp(min=1))


def area(masks: Tensor) -> Tensor:
    """Area term: < mean of M_k > (CLIMS, CVPR 2022); keeps masks from growing over the whole image.

    Args:
        masks: (P, h, w) in [0, 1].

    Returns:
        Scalar in [0, 1]; 0 with P = 0.
    """
    return _mean(masks)


def multi_label_cross_entropy(scores: Tensor, labels: Tensor, background_label: Optional[float] = 1.0) -> Tensor:
    """Multi-label cross-entropy L_MCE of pooled patch scores (PCC; ViT-PCM, ECCV 2022). Re-implemented from the description.

        L_MCE = < - y_k log s_k - (1 - y_k) log(1 - s_k) >

    Args:
        scores: (B, C), or (B, C + 1) with the background first; image-level scores in [0, 1], from `patch_heads.top_k_pool`.
        labels: (B, C) multi-hot.
        background_label: y of the background channel, if there is one: nearly every image shows some. None leaves it out.

    Returns:
        Scalar, the mean over images and classes; logarithms are cut at log 1e-6, where their gradient is zero. 0 with B = 0.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if labels.ndim != 2:
        raise ValueError(f"`labels` must have shape (B, C); got {tuple(labels.shape)}.")
    batch, count = labels.shape
    if scores.shape not in ((batch, count), (batch, count + 1)):
        raise ValueError(
            f"`scores` must have shape {(batch, count)}, or {(batch, count + 1)} with the background first; got "
            f"{tuple(scores.shape)}."
        )
    scores, wanted = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores, labels.to(scores)
    if scores.shape[1] > count:
        if background_label is None:
            scores = scores[:, 1:]
        else:
            wanted = torch.cat([torch.full_like(wanted[:, :1], background_label), wanted], dim=1)
    return _mean(-wanted * torch.log(scores.clamp(min=1e-6)) - (1 - wanted) * torch.log((1 - scores).clamp(min=1e-6)))


def patch_contrast(
    features: Tensor,
    classes: Tensor,
    related: Optional[Tensor] = None,
    temperature: float = 0.1,
    related_weight: float = 0.5,
    background: Optional[int] = None,
) -> Tensor:
    """Class-aware patch contrast with the clusters as a prior (CPC, arXiv 2508.17009). Re-implemented from the description.

    Patches of one class are drawn together (intra-class consistency), patches of different classes are pushed apart
    (inter-class separation), those of one cluster less than those of two, since they do share features:

        L = < -1/|P(i)| sum_{p in P(i)} log( e_ip / (sum_{p in P(i)} e_ip + sum_{n in N(i)} w_in e_in) ) >

    where e_ij = exp(cos(f_i, f_j) / temperature); P(i): the other patches of i's class; N(i): the patches of other classes;
    w_in = related_weight if the classes of i and n are in one cluster, else 1; < >: mean over patches with a non-empty P(i).
    The paper's own wording of the prior is not public; the weight is our reading of it, and 1 gives the supervised contrastive
    loss (Khosla et al., NeurIPS 2020).

    Args:
        features: (M, D), of any length, not normalised. Half precision is computed in float32.
        classes: (M,) class of each patch.
        related: (K, K) bool over all values of `classes`: whether two classes are in one cluster; None for no prior.
        temperature: > 0.
        related_weight: weight of a negative of the same cluster, from 0 (not pushed) to 1.
        background: value of `classes` whose patches are not drawn together (P(i) is empty), since background is of many kinds;
            they are pushed away from the classes all the same. None: there is no such class.

    Returns:
        Scalar; 0, still attached, if no patch has another one of its class.
    """
    if features.ndim != 2 or classes.shape != features.shape[:1]:
        raise ValueError(
            f"`features` must have shape (M, D) and `classes` (M,); got {tuple(features.shape)} and {tuple(classes.shape)}."
        )
    if not temperature > 0 or not 0 <= related_weight <= 1:
        raise ValueError(
            f"`temperature` must be > 0 and `related_weight` from 0 to 1; got {temperature!r} and {related_weight!r}."
        )
    features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
    unit = F.normalize(features, dim=-1)
    with full_precision(features.device):
        similarity = unit @ unit.T / temperature  # (M, M)
    same = classes[:, None] == classes
    itself = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    weight = torch.ones_like(similarity)
    if related is not None:
        kin = related.to(classes.device)[classes[:, None], classes] & ~same
        weight = weight.masked_fill(kin, related_weight)
    weight = weight.masked_fill(itself, 0.0)
    positive = same & ~itself
    count = positive.sum(1)
    anchors = (count > 0) & (classes != background) if background is not None else count > 0
    if not bool(anchors.any()):
        return features.sum() * 0.0
    # Anchors alone: a row of nothing but -inf (weight 0, no positive) would have NaN for its gradient.
    total = torch.logsumexp((similarity + weight.log())[anchors], dim=1)  # log 0 = -inf leaves a pair out
    mean = (similarity.masked_fill(~positive, 0.0).sum(1))[anchors] / count[anchors]
    return (total - mean).mean()
