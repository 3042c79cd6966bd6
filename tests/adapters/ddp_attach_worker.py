"""One of two processes: python ddp_attach_worker.py <rank> <folder>. Trains toy hosts by `attach` around their own loops."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from toy_hosts import CLASSES, DECODER, TOYS, Decoder, Toy, make_loader, pixel_loss  # this script's folder is on the path

from semples_plugin import PromptRefiner, adapters
from semples_plugin.clip_backends import openai_clip_module

RUNS = [(toy, mode) for toy in ("mctformer", "cnn") for mode in ("add", "replace")]


def snapshot(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def train(toy: Toy, mode: str, clip: nn.Module, rank: int) -> Dict[str, Any]:
    """Match, prompts, refine; every process has images of its own, and rank 1 also a batch without any label."""
    refiner = PromptRefiner(CLASSES, clip=clip, image_stats="imagenet", prompt_length=4)
    host = DistributedDataParallel(toy.build())
    optimizer = torch.optim.AdamW(host.parameters(), lr=0.01)
    loader = make_loader(2, seed=10 + rank)
    if rank == 1:
        loader[1][1].zero_()
    losses = []
    found: Dict[str, Any] = {"start": snapshot(host.module)}

    def stage() -> Dict[str, torch.Tensor]:
        with adapters.attach(
            toy.host, host, refiner, mode=mode, on_step=lambda step, terms: losses.append(terms), **toy.options
        ) as attached:
            toy.train(host, loader, optimizer)
        assert attached.steps == len(loader)
        return snapshot(host.module)

    found["match"] = stage()
    fit = refiner.fit_prompts(loader, adapters.cam_of(toy.host, host.eval(), **toy.options), epochs=2, progress=False)
    found["refine"] = stage()
    left = [name for name, module in host.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return {**found, "context": refiner.prompts.context.detach(), "pairs": fit.num_pairs, "terms": losses, "left": left}


def train_decoder(clip: nn.Module, rank: int) -> Dict[str, Any]:
    """A host without a label loss: labels from the loader, the loss added at backward() under a scaler; no model is handed
    over.

    Every pass is on the images and their mirror images.
    """
    refiner = PromptRefiner(CLASSES, clip=clip, image_stats="imagenet", prompt_length=4)
    torch.manual_seed(0)
    host = DistributedDataParallel(Decoder())
    optimizer, scaler = torch.optim.AdamW(host.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=8.0)
    pairs = [(x, y) for img, labels in make_loader(3, seed=10 + rank) for x, y in zip(img, labels)]
    start, terms = snapshot(host.module), []
    with adapters.attach(
        "generic", None, refiner, labels="loader", on_step=lambda step, found: terms.append(found), **DECODER
    ) as attached:
        for img, _ in DataLoader(pairs, batch_size=2):
            optimizer.zero_grad()
            scaler.scale(pixel_loss(host(torch.cat([img, img.flip(-1)])))).backward()
            scaler.step(optimizer)
            scaler.update()
    assert attached.steps == 3 and attached.model is host
    return {"start": start, "end": snapshot(host.module), "terms": terms}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    clip = openai_clip_module("model").CLIP(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2)
    clip.ln_final.bias.data += 1.0  # all texts and all images in one direction each, so that cosines are not tiny
    clip.visual.ln_post.bias.data += torch.linalg.pinv(clip.visual.proj.T) @ clip.text_projection.sum(0).detach()
    toys = {toy.name: toy for toy in TOYS}
    found = {f"{name} {mode}": train(toys[name], mode, clip, rank) for name, mode in RUNS}
    found["decoder"] = train_decoder(clip, rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
