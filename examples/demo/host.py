"""The demo's host: a small convolutional classifier with class activation maps, as any CAM pipeline has one.

It contains nothing of CLIP or of the refiner. `train_host` minimizes its classification loss, plus another one if it is given.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .world import THINGS, WORLD, Scene, World, draw


class Split(NamedTuple):
    """Scenes as tensors: `images` (N, 3, S, S) in [0, 1], `labels` (N, C) multi-hot, and the scenes for scoring."""

    images: Tensor
    labels: Tensor
    scenes: List[Scene]

    def batches(self, size: int) -> List[Tuple[Tensor, Tensor]]:
        """(img, labels) batches in order, as a data loader yields them."""
        return list(zip(self.images.split(size), self.labels.split(size)))


def make_split(count: int, seed: int, world: World = WORLD) -> Split:
    """`count` scenes of the weakly-supervised world."""
    scenes = draw("weak", count, seed, world)
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float() / 255
    return Split(images, torch.from_numpy(np.stack([s.labels for s in scenes])), scenes)


class HostCam(nn.Module):
    """Four convolutions, a 1x1 classifier, global average pooling: cam (B, C, 16, 16), logits (B, C)."""

    def __init__(self, num_classes: int = len(THINGS)):
        super().__init__()
        widths = ((3, 32, 2), (32, 64, 2), (64, 96, 1), (96, 96, 1))
        layers: List[nn.Module] = []
        for i, o, stride in widths:
            layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Conv2d(96, num_classes, 1)

    def cam(self, img: Tensor) -> Tensor:
        return self.head(self.features((img - 0.5) / 0.25))

    def forward(self, img: Tensor) -> Tuple[Tensor, Tensor]:
        cam = self.cam(img)
        return cam, cam.mean((2, 3))


ExtraLoss = Callable[[Tensor, Tensor, Tensor], Tuple[Tensor, Dict[str, Tensor]]]


def random_batches(split: Split, batch_size: int, seed: int) -> Iterator[Tuple[Tensor, Tensor]]:
    """Endless shuffled (img, labels) batches, flipped left to right at random."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(split.images), generator=generator).split(batch_size):
            img = split.images[index]
            flip = torch.rand(len(index), 1, 1, 1, generator=generator) < 0.5
            yield torch.where(flip, img.flip(3), img), split.labels[index]


def train_host(
    host: nn.Module,
    split: Split,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    title: str,
    extra: Optional[ExtraLoss] = None,
) -> List[Dict[str, float]]:
    """The host's own loop: classification, plus the loss that `extra(img, cam, labels)` gives. Returns the losses per step.

    `host(img)` returns the CAM and one or more logits (B, C); each of them gets the classification loss.
    """
    optimizer = torch.optim.AdamW(host.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history: List[Dict[str, float]] = []
    source = random_batches(split, batch_size, seed)
    device = next(host.parameters()).device
    host.train()
    bar = tqdm(range(steps), desc=title, mininterval=1)
    for _ in bar:
        img, labels = (part.to(device) for part in next(source))
        cam, *logits = host(img)
        loss = torch.stack([F.multilabel_soft_margin_loss(each, labels) for each in logits]).sum()
        record = {"classification": loss.item()}
        if extra is not None:
            added, terms = extra(img, cam, labels)
            loss = loss + added
            record.update({name: term.item() for name, term in terms.items()})
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(record)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    host.eval()
    return history
