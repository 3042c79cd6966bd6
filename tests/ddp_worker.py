"""One of two processes: python ddp_worker.py <rank> <folder>. Only rank 0 has positive labels; writes what it ended up with."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import openai_clip_module


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    clip = openai_clip_module("model").CLIP(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2)
    refiner = PromptRefiner(["boat", "train"], clip=clip, image_stats=None, prompt_length=4)
    host = DistributedDataParallel(nn.Conv2d(3, 2, 4, stride=4))
    start = {name: value.clone() for name, value in host.module.state_dict().items()}
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    img = torch.rand(2, 3, 32, 32, generator=generator)
    labels = torch.tensor([[1, 0], [1, 1]]) if rank == 0 else torch.zeros(2, 2, dtype=torch.long)

    def train(steps: int) -> list:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = refiner(img, host(img), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    match = train(2)
    fit = refiner.fit_prompts([(img, labels)], host.module, epochs=3, progress=False)
    refine = train(2)
    # Both ranks have labels now, rank 1 other ones: still the same prompts everywhere.
    second = PromptRefiner(["boat", "train"], clip=clip, image_stats=None, prompt_length=4)
    own = torch.tensor([[1, 0], [1, 1]]) if rank == 0 else torch.tensor([[0, 1], [0, 0]])
    both = second.fit_prompts([(img, own)], host.module, epochs=3, progress=False)
    torch.save(
        {
            "start": start,
            "host": host.module.state_dict(),
            "losses": match + refine,
            "context": refiner.prompts.context.detach(),
            "num_pairs": fit.num_pairs,
            "second_context": second.prompts.context.detach(),
            "second_num_pairs": both.num_pairs,
            "stage": refiner.stage,
        },
        folder / f"rank{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
