"""The ablation of category clusters: a vision transformer in a world whose classes look alike in pairs.

Every row trains on from the same checkpoint of the host for the same number of steps: refiner and branch are attached by
`adapters.attach`, and the host's own loop runs unchanged. Training sees images and image-level labels. Pixel masks are used
only for scoring, see `examples/demo/scores.py`.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor, nn

from semples_plugin import PromptRefiner, adapters
from semples_plugin.clusters import CategoryClusters, ClusterBranch, clusters_from_text_features
from semples_plugin.config import RefinerConfig
from semples_plugin.masks import pseudo_labels

from ..controls import area_only, random_clip
from ..demo.host import ExtraLoss, Split, make_split, train_host
from ..demo.scores import Row, best_row
from ..demo.world import KIN
from ..recipe import COMPACT_CLIP
from .host import ViTHost

CLIP_FILE = Path(__file__).with_name("kin_clip.pt")
CLUSTER_FILE = Path(__file__).with_name("clusters.json")
FILE, TEXT, CONTROL = "file", "text features", "mismatched"
MISMATCHED = {"one": ["car", "sheep"], "two": ["tram", "cactus"], "three": ["deer", "fir"]}  # no cluster holds a pair

HOST = "host alone"
TOKENS = "+ cluster tokens"
CLASSIFIER = "+ patch classifier"
BILSTM = "+ HV-BiLSTM"
CONTRAST = "+ patch contrast"
AREA = "+ area term alone, no CLIP"
RANDOM = "+ match, CLIP with random weights"
MATCH = "+ match"
SEMPLES = "+ SemPLeS"
SEMPLES_CLUSTERS = "+ SemPLeS, prompts with clusters"
ALL = "all"
ROWS = (HOST, AREA, RANDOM, TOKENS, CLASSIFIER, BILSTM, CONTRAST, MATCH, SEMPLES, SEMPLES_CLUSTERS, ALL)
PROMPTED = (SEMPLES, SEMPLES_CLUSTERS, ALL)  # rows with learned prompts


class Parts(NamedTuple):
    """Which parts of the branch a row has. HV-BiLSTM and contrast need the patch classifier, which has a row of its own."""

    tokens: bool = False
    classifier: bool = False
    bilstm: bool = False
    contrast: bool = False


PARTS: Dict[str, Parts] = {
    TOKENS: Parts(tokens=True),
    CLASSIFIER: Parts(classifier=True),
    BILSTM: Parts(classifier=True, bilstm=True),
    CONTRAST: Parts(classifier=True, contrast=True),
    ALL: Parts(tokens=True, classifier=True, bilstm=True, contrast=True),
}
# Where the clusters of a row come from. Rows that use no clusters have one column.
ROUTES: Dict[str, Tuple[str, ...]] = {row: (FILE,) for row in ROWS}
ROUTES.update({row: (FILE, TEXT, CONTROL) for row in (TOKENS, CONTRAST)})
ROUTES.update({row: (FILE, TEXT) for row in (SEMPLES_CLUSTERS, ALL)})
BY_ROUTE = tuple(row for row in ROWS if len(ROUTES[row]) > 1)


class Settings(NamedTuple):
    """Sizes, steps, learning rates and weights of the branch, chosen on seed 0, and the configuration of the refiners."""

    train: int = 1200
    val: int = 150
    test: int = 300
    host_steps: int = 500
    host_lr: float = 2e-3
    host_batch_size: int = 16
    stage_steps: int = 150
    stage_lr: float = 1e-3
    branch_lr: float = 3e-3
    batch_size: int = 24
    lambda_tokens: float = 1.0
    lambda_mce: float = 0.2
    lambda_contrast: float = 0.1
    top_k: int = 40
    threshold: float = 0.8
    config: RefinerConfig = COMPACT_CLIP


class Figures(NamedTuple):
    """One trained row on the test split.

    Attributes:
        cam: of the host's CAM.
        aligned: of the host's CAM, aligned to edges.
        branch: of the patch classifier's class map, from which PCC takes its masks; None for rows without a classifier.
        kin: see `kin_share`.
    """

    cam: Row
    aligned: Row
    branch: Optional[Row]
    kin: float


class Result(NamedTuple):
    """Figures by row and route (rows without clusters have the first route alone), and the clusters of every route."""

    figures: Dict[str, Dict[str, Figures]]
    clusters: Dict[str, CategoryClusters]


def find_clusters(refiner: PromptRefiner, route: str) -> CategoryClusters:
    """The clusters of a route. `semples clusters` writes those of a language model into a file, so they count as FILE."""
    if route == FILE:
        return CategoryClusters.load(CLUSTER_FILE, KIN.things)
    if route == CONTROL:
        return CategoryClusters(MISMATCHED, KIN.things, {"source": "control: no two classes that look alike"})
    return clusters_from_text_features(refiner.classes, refiner.text_features, clip=refiner.encoder.id)


def new_refiner(
    settings: Settings, seed: int, clusters: Optional[CategoryClusters] = None, clip: Union[Path, nn.Module] = CLIP_FILE
) -> PromptRefiner:
    return PromptRefiner(list(KIN.things), clip=clip, config=settings.config, seed=seed, clusters=clusters)


def new_branch(settings: Settings, row: str, clusters: CategoryClusters, host: ViTHost, seed: int) -> Optional[ClusterBranch]:
    if row not in PARTS:
        return None
    parts = PARTS[row]
    return ClusterBranch(
        clusters, host, bilstm=parts.bilstm, seed=seed, top_k=settings.top_k, threshold=settings.threshold,
        lambda_tokens=parts.tokens * settings.lambda_tokens, lambda_mce=parts.classifier * settings.lambda_mce,
        lambda_contrast=parts.contrast * settings.lambda_contrast,
    )  # fmt: skip


class Trained(NamedTuple):
    """A trained host and its branch."""

    host: ViTHost
    branch: Optional[ClusterBranch]

    @torch.no_grad()
    def cams(self, images: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """CAM (N, C, h, w) of the host with its branch inserted, and of the branch's classifier (None without one)."""
        self.host.eval()
        if self.branch is None:
            return torch.cat([self.host.cam(part) for part in images.split(50)]), None
        self.branch.eval()
        cams: List[Tensor] = []
        branch_cams: List[Tensor] = []
        with self.branch.insert(self.host):
            for part in images.split(50):
                cams.append(self.host.cam(part))
                tokens = self.branch.pop_tokens()
                if self.branch.classifier is not None:
                    branch_cams.append(self.branch.cam(tokens))
        return torch.cat(cams), torch.cat(branch_cams) if branch_cams else None


def train(
    host: ViTHost,
    refiner: Optional[PromptRefiner],
    branch: Optional[ClusterBranch],
    split: Split,
    settings: Settings,
    seed: int,
    title: str,
    extra: Optional[ExtraLoss] = None,
) -> Trained:
    """A copy of the host, trained on by its own loop with refiner and branch attached, if there are any.

    `extra` is a loss that the loop itself adds: that of a control, which has no refiner to attach.
    """
    host, branch = copy.deepcopy((host, branch))

    def loop() -> None:
        train_host(host, split, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, title, extra)

    if refiner is None and branch is None:
        loop()
        return Trained(host, None)
    torch.manual_seed(seed)  # of the dropout in HV-BiLSTM
    optimizer = None if branch is None else torch.optim.AdamW(branch.parameters(), lr=settings.branch_lr)
    with adapters.attach("generic", host, refiner, branch=branch, branch_optimizer=optimizer, cam="head"):
        loop()
    return Trained(host, branch)


def kin_share(masks: Tensor, split: Split, threshold: float, clusters: CategoryClusters) -> float:
    """Of the pixels of things whose kin is in the same scene, the share that is labeled as the kin."""
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
    """Figures of one row. `refiner` is used to normalize and align only, so it can be the same for all rows."""
    cams, test_cams = trained.cams(val.images), trained.cams(test.images)

    def row(val_cam: Tensor, test_cam: Tensor, align: Optional[str]) -> Tuple[Row, Tensor]:
        val_masks, test_masks = (
            refiner.refine_masks(split.images, cam, split.labels, align=align, clip_steps=0).masks
            for split, cam in ((val, val_cam), (test, test_cam))
        )
        return best_row(val_masks, val, test_masks, test, KIN), test_masks

    cam, masks = row(cams[0], test_cams[0], None)
    aligned, _ = row(cams[0], test_cams[0], "pamr")
    branch = None if cams[1] is None or test_cams[1] is None else row(cams[1], test_cams[1], None)[0]
    return Figures(cam, aligned, branch, kin_share(masks, test, cam.threshold, kin))


def run(settings: Settings, seed: int, rows: Sequence[str] = ROWS) -> Result:
    """Rows of one seed with all their routes. The seed fixes the scenes, the host, the batches, the branch and the prompts.

    No row depends on which others are run.
    """
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
    figures: Dict[str, Dict[str, Figures]] = {row: {} for row in ROWS if row in rows}

    @functools.lru_cache(maxsize=None)
    def matched() -> Trained:
        return train(host, plain, None, train_split, settings, seed, MATCH)

    def fit(row: str, route: str) -> Trained:
        title = f"{row} ({route})"
        if row == MATCH:
            return matched()
        if row == AREA:
            extra = area_only(settings.config, plain.encoder.image_size)
            return train(host, None, None, train_split, settings, seed, title, extra)
        branch = new_branch(settings, row, clusters[route], host, seed)
        refiner = None
        if row == RANDOM:
            refiner = new_refiner(settings, seed, clip=random_clip(plain.encoder.model, seed))
        if row in PROMPTED:
            refiner = new_refiner(settings, seed, None if row == SEMPLES else clusters[route])
            first = f"{title}: match"
            start = train(host, refiner, branch, train_split, settings, seed, first) if row == ALL else matched()
            refiner.fit_prompts(train_split.batches(50), lambda img: start.cams(img)[0])
        return train(host, refiner, branch, train_split, settings, seed, title)

    for row in figures:
        done: Dict[frozenset, str] = {}
        for route in ROUTES[row]:
            groups = clusters[route].groups()
            if groups in done:  # another route gave the same clusters, so the figures are the same
                figures[row][route] = figures[row][done[groups]]
                continue
            done[groups] = route
            figures[row][route] = score(fit(row, route), plain, val, test, kin)
    return Result(figures, clusters)
