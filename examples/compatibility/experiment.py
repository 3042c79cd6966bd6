"""One cell of the compatibility table: a real host, built small, trained on with an add-on, and the figures of its CAMs.

All hosts see the same scenes of the demo world, with image-level labels. Masks are used for scoring alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

import torch

from semples_plugin import PromptRefiner, adapters
from semples_plugin.clusters import CategoryClusters, ClusterBranch
from semples_plugin.config import RefinerConfig

from ..ablation.data import DemoWorld
from ..ablation.experiment import soft_masks
from ..cells import Cell, slug, write_file
from ..controls import AreaOnly
from ..demo.experiment import CLIP_FILE
from ..hosts import SmallHost, make_host, train_attached, where_it_runs

__all__ = ["ADDONS", "BASE", "Settings", "row_name", "run_cell"]

BASE = "base"  # the host that all cells start from; not in the table
ALONE, AREA, SEMPLES, CLUSTERS, BOTH = "alone", "area alone", "+ SemPLeS", "+ clusters", "+ both"
ADDONS = (ALONE, AREA, SEMPLES, CLUSTERS, BOTH)
MEMBERS = {"vehicles": ["boat", "train", "car"], "animals": ["bird", "sheep"], "plants": ["cactus"]}


class Settings(NamedTuple):
    """What all cells share.

    Attributes:
        repos: folder with clones of the hosts' repositories.
        config: of the refiner; its prompts are learned along the way.
        host_steps, steps: before the cells of a host part, and of each cell.
        lr: learning rate by host.
        host_batch_size, batch_size: of both.
        train: number of training scenes.
        parts: folder for weights.
    """

    repos: Optional[Path]
    config: RefinerConfig
    host_steps: int
    steps: int
    lr: Dict[str, float]
    host_batch_size: int
    batch_size: int
    train: int
    parts: Path


def row_name(host: str, addon: str) -> str:
    return f"{host}: {addon}"


def takes_clusters(host: SmallHost) -> bool:
    """Whether the host is a transformer that cluster tokens can be put into."""
    return bool(host.branch_options)


def run_cell(cell: Cell, settings: Settings) -> Dict[str, Any]:
    """The figures of a cell, and its conditions."""
    torch.set_num_threads(1)
    name, addon = cell.row.split(": ")
    data = DemoWorld(train=settings.train)
    train, val, test = data.splits(cell.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(cell.seed)
    host = make_host(name, len(data.classes), repos=settings.repos).to(device)
    path = settings.parts / f"seed_{cell.seed}" / f"{slug(name)}.pt"
    lr = settings.lr[name]
    if addon == BASE:
        train_attached(host, train, settings.host_steps, lr, settings.host_batch_size, cell.seed, cell.row)
        write_file(path, lambda part: torch.save(host.state_dict(), part))
        return {}
    host.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    refiner, branch = _refiner(addon, data, settings, host, cell.seed), None
    if addon in (CLUSTERS, BOTH):
        if not takes_clusters(host):
            return {"skipped": "no transformer blocks over patches"}
        clusters = CategoryClusters(MEMBERS, data.classes, {"source": "by hand"})
        branch = ClusterBranch(clusters, host.width, seed=cell.seed, **host.branch_options).to(device)
    found: Dict[str, Any] = {"parameters": host.parameter_count(), **_reach(host, refiner, train, device)}
    title = f"seed {cell.seed}, {cell.row}"
    terms = train_attached(host, train, settings.steps, lr, settings.batch_size, cell.seed, title, refiner, branch=branch)
    if branch is None:
        cams = [host.cams(split.images) for split in (val, test)]
    else:
        branch.eval()
        with branch.insert(host.net):
            cams = [host.cams(split.images) for split in (val, test)]
    for ending, edges in (("", False), (", aligned", True)):
        masks = [soft_masks(split, cam, edges) for split, cam in zip((val, test), cams)]
        row = data.score(masks[0], val, masks[1], test)
        found.update({f"{key}{ending}": value for key, value in row.items()})
    present = cams[1][test.labels.bool()]
    found.update(cam_shape=list(cams[1].shape[1:]), cam_range=[float(present.min()), float(present.max())])
    found["classification AP"] = _mean_precision(host, test, device)
    found["last terms"] = {key: sum(t[key] for t in terms[-20:]) / len(terms[-20:]) for key in (terms[-1] if terms else {})}
    return found


def _refiner(addon: str, data: DemoWorld, settings: Settings, host: SmallHost, seed: int) -> Optional[PromptRefiner]:
    if addon in (ALONE, CLUSTERS):
        return None
    config = settings.config.replace(image_stats=host.image_stats, seed=seed)
    if addon == AREA:
        return AreaOnly(data.classes, CLIP_FILE, config)
    return PromptRefiner(data.classes, CLIP_FILE, config, online_steps=max(1, settings.steps // 2))


def _reach(host: SmallHost, refiner: Optional[PromptRefiner], train: Any, device: torch.device) -> Dict[str, Any]:
    """What the refiner's loss reaches before training: the share of parameters, and the modules that it does not reach."""
    if refiner is None:
        return {}
    img, labels = host.prepare(train.images[:8].to(device)), train.labels[:8].to(device)
    with where_it_runs():
        probe = adapters.probe(host.adapter, host.net, refiner, img, labels, **host.options)
    trainable = {name: p.numel() for name, p in host.net.named_parameters() if p.requires_grad}
    hit = {name.split(".")[0] for name in probe.names}
    missed = sorted({name.split(".")[0] for name in trainable} - hit)
    reached = sum(trainable[name] for name in probe.names) / sum(trainable.values())
    return {"reached": reached, "missed": missed, "verdict": probe.verdict}


@torch.no_grad()
def _mean_precision(host: SmallHost, test: Any, device: torch.device) -> float:
    """Mean average precision of the host's classification on the test scenes."""
    from semples_plugin.checking import average_precision

    host.eval()
    with where_it_runs():
        scores = torch.cat([host(part.to(device))[-1].cpu() for part in test.images.split(100)])
    found = [average_precision(scores[:, k], test.labels[:, k].bool()) or 0.0 for k in range(scores.shape[1])]
    return sum(found) / len(found)
