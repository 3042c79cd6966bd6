"""Loss terms of the category clusters (PCC, CPC) as pure functions, re-implemented from the papers' description.

Flow: `heads` -> **losses** -> `branch`.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import full_precision

__all__ = ["multi_label_cross_entropy", "patch_contrast"]


def multi_label_cross_entropy(scores: Tensor, labels: Tensor, background_label: Optional[float] = 1.0) -> Tensor:
    """Multi-label cross-entropy L_MCE of pooled patch scores (PCC; ViT-PCM, ECCV 2022). Re-implemented from the description.

        L_MCE = < - y_k log s_k - (1 - y_k) log(1 - s_k) >

    Args:
        scores: (B, C), or (B, C + 1) with the background first; image-level scores in [0, 1], from `heads.top_k_pool`.
        labels: (B, C) multi-hot.
        background_label: y of the background channel, if there is one: nearly every image shows some. None leaves it out.

    Returns:
        Scalar, the mean over images and classes; logarithms are clamped at log 1e-6, where their gradient is zero. With B = 0
        it is 0, still attached.

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
    terms = -wanted * torch.log(scores.clamp(min=1e-6)) - (1 - wanted) * torch.log((1 - scores).clamp(min=1e-6))
    return terms.mean() if terms.numel() else terms.sum()  # the sum of nothing is 0 and keeps the graph


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
        features: (M, D), of any length, not normalized. Half precision is computed in float32.
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
        same_cluster = related.to(classes.device)[classes[:, None], classes] & ~same
        weight = weight.masked_fill(same_cluster, related_weight)
    weight = weight.masked_fill(itself, 0.0)
    positive = same & ~itself
    count = positive.sum(1)
    anchors = (count > 0) & (classes != background) if background is not None else count > 0
    if not bool(anchors.any()):
        return features.sum() * 0.0
    # Only rows of anchors: a row of nothing but -inf (weight 0, no positive) would have a gradient of NaN.
    total = torch.logsumexp((similarity + weight.log())[anchors], dim=1)  # log 0 = -inf leaves a pair out
    mean = (similarity.masked_fill(~positive, 0.0).sum(1))[anchors] / count[anchors]
    return (total - mean).mean()
