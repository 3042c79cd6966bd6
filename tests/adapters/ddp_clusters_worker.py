"""A cluster branch by `attach` around the loop of a DistributedDataParallel host: ddp_clusters_worker.py <rank> <folder>.

Rank -1 is a single process on the joint batches, to compare with.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_hosts import CLASSES, WIDTH, Scaler, ToyMCTformer, make_loader, train_mctformer  # this script's folder is on the path

from semples_plugin import PromptRefiner, adapters
from semples_plugin._hooks import unwrap
from semples_plugin.clip_backends import openai_clip_module
from semples_plugin.clusters.branch import ClusterBranch
from semples_plugin.clusters.categories import CategoryClusters

CLUSTERS = CategoryClusters({"vehicles": ["boat", "train"], "animals": ["bird"]}, CLASSES)


def snapshot(model: nn.Module) -> Dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def batches(rank: int, count: int = 3) -> List[Any]:
    """A process has two images of each batch, the single process all four."""
    halves = [make_loader(count, seed=10 + half) for half in range(2)]
    if rank >= 0:
        return halves[rank]
    return [tuple(torch.cat(parts) for parts in zip(*both)) for both in zip(*halves)]


def wrap(model: nn.Module, rank: int) -> nn.Module:
    return model if rank < 0 else DistributedDataParallel(model)


def joint(rank: int, scale: float) -> Dict[str, Any]:
    """What does not depend on how a batch is divided: means over images, no dropout, no contrast of patches."""
    host = wrap(ToyMCTformer(), rank)
    branch = ClusterBranch(CLUSTERS, WIDTH, lambda_contrast=0.0, dropout=0.0, top_k=3)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
    own = torch.optim.AdamW(branch.parameters(), lr=0.01)
    found: Dict[str, Any] = {"start": snapshot(branch)}
    with adapters.attach("mctformer", host, None, branch=branch, branch_optimizer=own) as attached:
        train_mctformer(host, batches(rank), optimizer, loss_scaler=Scaler(scale))
    return {**found, "branch": snapshot(branch), "host": snapshot(unwrap(host)), "steps": attached.steps}


def everything(rank: int, clip: nn.Module) -> Dict[str, Any]:
    """Refiner, contrast and dropout, in two epochs; rank 1 has a batch without any label."""
    torch.manual_seed(rank)
    refiner = PromptRefiner(CLASSES, clip=clip, image_stats="imagenet", prompt_length=4)
    host = wrap(ToyMCTformer(), rank)
    branch = ClusterBranch(CLUSTERS, WIDTH, threshold=0.3, top_k=3)
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.01)
    own = torch.optim.AdamW(branch.parameters(), lr=0.01)
    loader = batches(rank)
    if rank == 1:
        loader[1][1].zero_()
    terms: List[Dict[str, float]] = []
    attached = adapters.attach(
        "mctformer", host, refiner, branch=branch, branch_optimizer=own, on_step=lambda step, values: terms.append(values)
    )
    found: Dict[str, Any] = {"start": snapshot(branch)}
    for _ in range(2):
        with attached:
            train_mctformer(host, loader, optimizer)
            if rank == 0:  # evaluation in one process, then a collective of the host's own
                with torch.no_grad():
                    host.module(loader[0][0])
            dist.all_reduce(torch.ones(3))
    return {**found, "branch": snapshot(branch), "host": snapshot(host.module), "steps": attached.steps, "terms": terms}


def overflow(rank: int) -> Dict[str, Any]:
    """The second loss of one rank is infinite: both leave the step out."""
    host = wrap(ToyMCTformer(), rank).train()
    branch = ClusterBranch(CLUSTERS, WIDTH, lambda_contrast=0.0, dropout=0.0, top_k=3)
    own = torch.optim.AdamW(branch.parameters(), lr=0.01)
    found = []
    with adapters.attach("mctformer", host, None, branch=branch, branch_optimizer=own):
        for i, (img, labels) in enumerate(batches(rank)):
            logits, stages, patch_logits = host(img)
            loss = F.multilabel_soft_margin_loss(logits + patch_logits, labels) + 0 * stages.sum()
            found.append(snapshot(branch))
            (loss * float("inf") if (i, rank) == (1, 1) else loss).backward()
            host.zero_grad()
    return {"branch": [*found, snapshot(branch)], "steps": {int(state["step"]) for state in own.state.values()}}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if rank < 0:
        torch.save({"joint": joint(rank, 1.0)}, folder / "single.pt")
        return
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    clip = openai_clip_module("model").CLIP(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2)
    clip.ln_final.bias.data += 1.0  # all texts and all images in one direction each, so that cosines are not tiny
    clip.visual.ln_post.bias.data += torch.linalg.pinv(clip.visual.proj.T) @ clip.text_projection.sum(0).detach()
    found = {"joint": joint(rank, 1.0), "scaled": joint(rank, 1024.0), "overflow": overflow(rank)}
    found["everything"] = everything(rank, clip)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
