"""Category clusters from CLIP's text features. Flow: `PromptRefiner.text_features` -> **text_features** -> `categories`."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_classes, check_number
from .categories import CategoryClusters

__all__ = ["clusters_from_text_features"]


def clusters_from_text_features(
    classes: Sequence[str],
    features: Tensor,
    num_clusters: Optional[int] = None,
    clip: Optional[str] = None,
) -> CategoryClusters:
    """Group CLIP's text features: agglomerative clustering with average linkage of cosine distances. Needs scikit-learn.

    A cluster is named after its most central class, with "group" behind it if it has other classes.

    Args:
        classes: C names.
        features: (C, D) one text feature per class, such as `refiner.text_features`.
        num_clusters: K; by default the number from 2 to C - 1 with the best silhouette (the smallest on a tie).
        clip: the CLIP's id, for the provenance.

    Returns:
        The clusters; their provenance holds the silhouette of every K from 2 to C - 1. One cluster if C < 3 and K is not given.

    Raises:
        ValueError: if `features` have another shape, are not finite, or hold a zero vector; or for a K that cannot be.
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    names = check_classes(classes)[0]
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(names):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"`features` must have shape (C, D) with C = {len(names)} classes; got {got}.")
    if not bool(torch.isfinite(features).all()) or bool((features == 0).all(1).any()):
        raise ValueError("`features` must be finite and not zero; a text feature is NaN, inf or all zeros.")
    if num_clusters is not None:
        check_number("num_clusters", num_clusters, float("-inf"), whole=True)
    if num_clusters is not None and not 1 <= num_clusters <= len(names):
        raise ValueError(f"`num_clusters` must be from 1 to the number of classes, {len(names)}; got {num_clusters}.")
    unit = F.normalize(features.detach().double().cpu(), dim=1)
    distance = (1 - unit @ unit.T).clamp(min=0).fill_diagonal_(0).numpy()
    distance = (distance + distance.T) / 2
    index, scores = _agglomerate(distance, num_clusters)
    clusters: Dict[str, List[str]] = {}
    for k in range(max(index) + 1):
        members = [i for i, own in enumerate(index) if own == k]
        center = min(members, key=lambda i: (distance[i, members].sum(), i))
        title = names[center]
        while len(members) > 1 and (title in names or title in clusters):  # a class may be called "cat group"
            title = f"{title} group"
        clusters[title] = [names[i] for i in members]
    chosen = "given" if num_clusters is not None else "best silhouette" if scores else "one: fewer than three classes"
    record = {"source": "text features", "clip": clip, "linkage": "average, cosine", "num_clusters": chosen}
    return CategoryClusters(clusters, names, {**record, "silhouettes": {str(k): round(s, 6) for k, s in scores.items()}})


def _agglomerate(distance: Any, num_clusters: Optional[int]) -> Tuple[List[int], Dict[int, float]]:
    """Cluster number of every class, numbered by first appearance, and the silhouette of every number tried."""
    count = len(distance)
    if count < 3 and num_clusters is None:
        return [0] * count, {}
    if count == 1:
        return [0], {}
    try:
        from scipy.cluster.hierarchy import cut_tree, linkage
        from scipy.spatial.distance import squareform
        from sklearn.metrics import silhouette_score
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Clusters of text features need scikit-learn: pip install 'semples-plugin[clusters]'.", name=error.name
        ) from error
    tree = linkage(squareform(distance, checks=False), method="average")

    def cut(k: int) -> List[int]:
        order: Dict[int, int] = {}
        return [order.setdefault(int(c), len(order)) for c in cut_tree(tree, n_clusters=k)[:, 0]]

    scores = {}
    for k in range(2, count):
        scores[k] = float(silhouette_score(distance, cut(k), metric="precomputed"))
    best = num_clusters if num_clusters is not None else max(scores, key=lambda k: (round(scores[k], 9), -k))
    return cut(best), scores
