"""The ablation of category clusters: a vision transformer in a world whose classes share looks in pairs.

Every row trains on from the host's own checkpoint for as long as the others, through `adapters.attach` and the host's own loop,
which knows nothing of it. Training sees images and image-level labels; masks are used only to measure: the background threshold
of every row is chosen on a validation split, the figures come from a test split.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from semples_plugin import PromptRefiner, adapters
from semples_plugin.clusters.branch import ClusterBranch
from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.clusters.text_features import clusters_from_text_features
from semples_plugin.masks import pseudo_labels

from ..demo.experiment import Row, best_row, prompt_loader
from ..demo.host import Split, make_split, train_host
from ..demo.world import KIN
from .host import ViTHost

CLIP_FILE = Path(__file__).with_name("kin_clip.pt")
CLUSTER_FILE = Path(__file__).with_name("clusters.json")
FILE, TEXT, CONTROL = "file", "text features", "mismatched"
MISMATCHED = {"one": ["car", "sheep"], "two": ["tram", "cactus"], "three": ["deer", "fir"]}  # no two that share looks

HOST = "host alone"
TOKENS = "+ cluster tokens"
CLASSIFIER = "+ patch classifier"
BILSTM = "+ HV-BiLSTM"
CONTRAST = "+ patch contrast"
SEMPLES = "+ SemPLeS"
SEMPLES_CLUSTERS = "+ SemPLeS, prompts with clusters"
ALL = "all"
ROWS = (HOST, TOKENS, CLASSIFIER, BILSTM, CONTRAST, SEMPLES, SEMPLES_CLUSTERS, ALL)
# Which parts of the branch a row has: weights of tokens, L_MCE and contrast, and whether there is an HV-BiLSTM. HV-BiLSTM and
# contrast need the patch classifier, which has a row of its own.
PARTS: Dict[str, Tuple[float, float, float, bool]] = {
    TOKENS: (1, 0, 0, False),
    CLASSIFIER: (0, 1, 0, False),
    BILSTM: (0, 1, 0, True),
    CONTRAST: (0, 1, 1, False),
    ALL: (1, 1, 1, True),
}
# Where the clusters of a row come from; one column for rows that they do not enter.
ROUTES: Dict[str, Tuple[str, ...]] = {row: (FILE,) for row in (HOST, CLASSIFIER, BILSTM, SEMPLES)}
ROUTES.update({row: (FILE, TEXT, CONTROL) for row in (TOKENS, CONTRAST)})
ROUTES.update({row: (FILE, TEXT) for row in (SEMPLES_CLUSTERS, ALL)})
BY_ROUTE = tuple(row for row in ROWS if len(ROUTES[row]) > 1)


class Settings(NamedTuple):
    """Sizes, rates and weights, chosen on seed 0; those of the refiner are the demo's."""

    train: int = 1200
    val: int = 150
    test: int = 300
    host_steps: int = 500
    host_lr: float = 2e-3
    host_batch_size: int = 16
    stage_steps: int = 150
    stage_lr: float = 1e-3
    branch_rate: float = 3e-3
    batch_size: int = 24
    lambda_tokens: float = 1.0
    lambda_mce: float = 0.2
    lambda_contrast: float = 0.1
    top_k: int = 40
    threshold: float = 0.8
    lambda_refine: float = 2.0
    lambda_t: float = 0.1
    lambda_area: float = 1.0
    prompt_length: int = 8
    prompt_epochs: int = 60
    prompt_lr: float = 2.5e-2


class Figures(NamedTuple):
    """One trained row on the test split.

    Attributes:
        cam: of the host's CAM.
        aligned: of the host's CAM, aligned to edges.
        branch: of the patch classifier's own class map, which PCC makes its masks of; None for rows without one.
        kin: of the pixels of things in scenes that show the thing's kin too, the share that is called the kin.
    """

    cam: Row
    aligned: Row
    branch: Optional[Row]
    kin: float


class Result(NamedTuple):
    """Figures by row and route (rows that the clusters do not enter stand once, under the first route), and the clusters."""

    figures: Dict[str, Dict[str, Figures]]
    clusters: Dict[str, CategoryClusters]


def find_clusters(refiner: PromptRefiner, route: str) -> CategoryClusters:
    """The clusters of a route; a language model's are a file too, once `semples clusters` has written it."""
    if route == FILE:
        return CategoryClusters.load(CLUSTER_FILE, KIN.things)
    if route == CONTROL:
        return CategoryClusters(MISMATCHED, KIN.things, {"source": "control: no two that share looks"})
    return clusters_from_text_features(refiner.classes, refiner.text_features, clip=refiner.encoder.id)


def new_refiner(settings: Settings, seed: int, clusters: Optional[CategoryClusters] = None) -> PromptRefiner:
    return PromptRefiner(
        list(KIN.things), clip=CLIP_FILE, image_stats=None, prompt_length=settings.prompt_length, seed=seed, clusters=clusters,
        lambda_refine=settings.lambda_refine, lambda_t=settings.lambda_t, lambda_area=settings.lambda_area,
    )  # fmt: skip


def new_branch(settings: Settings, row: str, clusters: CategoryClusters, host: ViTHost, seed: int) -> Optional[ClusterBranch]:
    if row not in PARTS:
        return None
    tokens, mce, contrast, bilstm = PARTS[row]
    return ClusterBranch(
        clusters, host, bilstm=bilstm, seed=seed, top_k=settings.top_k, threshold=settings.threshold,
        lambda_tokens=tokens * settings.lambda_tokens,
        lambda_mce=mce * settings.lambda_mce, lambda_contrast=contrast * settings.lambda_contrast,
    )  # fmt: skip


class Trained(NamedTuple):
    """A host, and the branch that belongs into it."""

    host: ViTHost
    branch: Optional[ClusterBranch]

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """The host's CAM (N, C, h, w) and the branch's own, with the branch in its place."""
        self.host.eval()
        if self.branch is None:
            return torch.cat([self.host.cam(part) for part in images.split(50)]), None
        self.branch.eval()
        cams: List[Tensor] = []
        own: List[Tensor] = []
        with self.branch.insert(self.host):
            for part in images.split(50):
                cams.append(self.host.cam(part))
                seen = self.branch.take()
                if self.branch.classifier is not None:
                    own.append(self.branch.cam(seen))
        return torch.cat(cams), torch.cat(own) if own else None


def train(
    host: ViTHost,
    refiner: Optional[PromptRefiner],
    branch: Optional[ClusterBranch],
    split: Split,
    settings: Settings,
    seed: int,
    title: str,
) -> Trained:
    """A copy of the host, trained on by its own loop with refiner and branch attached."""
    host, branch = copy.deepcopy((host, branch))

    def loop() -> None:
        train_host(host, split, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, title)

    if refiner is None and branch is None:
        loop()
        return Trained(host, None)
    torch.manual_seed(seed)  # of the dropout in HV-BiLSTM
    optimizer = None if branch is None else torch.optim.AdamW(branch.parameters(), lr=settings.branch_rate)
    with adapters.attach("generic", host, refiner, branch=branch, branch_optimizer=optimizer, cam="head"):
        loop()
    return Trained(host, branch)


def fit_prompts(refiner: PromptRefiner, matched: Trained, split: Split, settings: Settings) -> None:
    refiner.fit_prompts(
        prompt_loader(split), lambda img: matched.maps(img)[0], epochs=settings.prompt_epochs, lr=settings.prompt_lr
    )


def kin_share(masks: Tensor, split: Split, threshold: float, clusters: CategoryClusters) -> float:
    """Of the pixels of things in scenes that show the thing's kin too, the share that is called the kin."""
    related = clusters.related().numpy() & ~np.eye(len(KIN.things), dtype=bool)
    wrong = total = 0
    for scene, guess, labels in zip(split.scenes, pseudo_labels(masks, threshold).numpy(), split.labels.numpy()):
        for k in labels.nonzero()[0]:
            for j in (related[k] * labels).nonzero()[0]:
                own = scene.things == k + 1
                wrong += int((own & (guess == j + 1)).sum())
                total += int(own.sum())
    return wrong / max(total, 1)


def score(trained: Trained, refiner: PromptRefiner, val: Split, test: Split, kin: CategoryClusters) -> Figures:
    """Figures of one row; `refiner` only normalises and aligns."""
    maps = [(split, trained.maps(split.images)) for split in (val, test)]

    def row(which: int, align: Optional[str]) -> Tuple[Row, Tensor]:
        found = [refiner.refine_masks(split.images, cams[which], split.labels, align=align).masks for split, cams in maps]
        return best_row(found[0], val, found[1], test, KIN), found[1]

    (cam, masks), (aligned, _) = row(0, None), row(0, "pamr")
    branch = None if maps[0][1][1] is None else row(1, None)[0]
    return Figures(cam, aligned, branch, kin_share(masks, test, cam.threshold, kin))


def run(settings: Settings, seed: int) -> Result:
    """All rows and routes of one seed: seed of the scenes, the host, the batches, the branch and the prompts."""
    torch.manual_seed(seed)
    train_split = make_split(settings.train, 10_000 + seed, KIN)
    val, test = make_split(settings.val, 20_000 + seed, KIN), make_split(settings.test, 30_000 + seed, KIN)
    host = ViTHost()
    train_host(
        host, train_split, settings.host_steps, settings.host_lr, settings.host_batch_size, seed, "host: classification only"
    )
    plain = new_refiner(settings, seed)
    clusters = {route: find_clusters(plain, route) for route in (FILE, TEXT, CONTROL)}
    kin = clusters[FILE]
    figures: Dict[str, Dict[str, Figures]] = {row: {} for row in ROWS}

    def fit_and_score(row: str, route: str, refiner: Optional[PromptRefiner]) -> None:
        branch = new_branch(settings, row, clusters[route], host, seed)
        trained = train(host, refiner, branch, train_split, settings, seed, f"{row} ({route})")
        figures[row][route] = score(trained, plain, val, test, kin)

    matched = train(host, plain, None, train_split, settings, seed, "SemPLeS: match")
    for row in ROWS:
        done: Dict[Any, str] = {}
        for route in ROUTES[row]:
            groups = clusters[route].groups()
            if groups in done:  # the same clusters by another route: the same figures
                figures[row][route] = figures[row][done[groups]]
                continue
            done[groups] = route
            refiner = None
            if row in (SEMPLES, SEMPLES_CLUSTERS, ALL):
                refiner = new_refiner(settings, seed, None if row == SEMPLES else clusters[route])
                start = matched
                if row == ALL:
                    branch = new_branch(settings, row, clusters[route], host, seed)
                    start = train(host, refiner, branch, train_split, settings, seed, f"{row} ({route}): match")
                fit_prompts(refiner, start, train_split, settings)
            fit_and_score(row, route, refiner)
    return Result(figures, clusters)
