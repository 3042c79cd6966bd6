"""The hosts of the photos experiment: CAM networks on pretrained convolutional features, and their own training loop.

The lower layers are frozen, and their features of every photo are computed once. The upper layers and a 1x1 classifier are
trained on image-level labels; the CAM is the classifier's map.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from semples_plugin.files.images import read_image

from .mobilenet import load_mobilenet
from .squeezenet import load_squeezenet

CLASSES = ["cat", "cow", "dog", "horse", "sheep", "person"]
PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # images in [0, 1]
HOSTS = ("squeezenet", "mobilenet")


class Photos(NamedTuple):
    """A split of the photos.

    Attributes:
        ids: N names of images.
        images: (N, 3, S, S) in [0, 1].
        labels: (N, C) multi-hot.
        low: (2, N, K, h, h) frozen low features of the images and of the mirrored images, at half precision.
    """

    ids: List[str]
    images: Tensor
    labels: Tensor
    low: Tensor


class PhotoHost(nn.Module):
    """Trained upper layers and a 1x1 classifier: low features (B, K, h, h) -> cam (B, C, h', h')."""

    def __init__(self, high: nn.Module, channels: int, num_classes: int = len(CLASSES)):
        super().__init__()
        self.high = high
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, low: Tensor) -> Tensor:
        return self.head(self.high(low))


def load_backbone(name: str, weights: Path) -> Tuple[nn.Module, nn.Module, int]:
    """The frozen lower layers, images in [0, 1] -> features, the pretrained upper layers, and the channels of the latter.

    SqueezeNet 1.1: the last four blocks are trained, at an eighth of the image's size; MobileNetV2: the last block and the last
    convolution, at a sixteenth.
    """
    if name == "squeezenet":
        network = load_squeezenet(str(weights), PLAIN)
        network.features[8] = nn.MaxPool2d(3, stride=1, padding=1)  # a finer CAM
        cut, channels = 9, 512
    else:
        network, cut, channels = load_mobilenet(str(weights), PLAIN, output_stride=16), 17, 1280
    network = network.eval().requires_grad_(False)
    high = copy.deepcopy(network.features[cut:]).requires_grad_(True)
    network.features = network.features[:cut]
    return network, high, channels


@torch.no_grad()
def load_split(root: Path, labels: Path, split: str, low: nn.Module, size: int) -> Photos:
    """The photos of a split that show at least one of the six classes. Labels come from the labels file, never from masks."""
    named: Dict[str, List[str]] = json.loads(labels.read_text(encoding="utf-8"))
    ids = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()
    ids = [i for i in ids if set(named[i]) & set(CLASSES)]
    images, features = [], []
    for name in tqdm(ids, desc=f"reading {split}", mininterval=5):
        picture = cv2.resize(read_image(root / "JPEGImages" / f"{name}.jpg"), (size, size), interpolation=cv2.INTER_AREA)
        image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        images.append(image)
        features.append(low(torch.stack([image, image.flip(2)])).half())
    target = torch.tensor([[int(c in named[i]) for c in CLASSES] for i in ids])
    return Photos(ids, torch.stack(images), target, torch.stack(features, dim=1))


Extra = Callable[[Tensor, Tensor, Tensor], Tensor]
Pool = Callable[[Tensor], Tensor]
POOLS: Dict[str, Pool] = {
    "mean": lambda cam: cam.mean((2, 3)),
    "top": lambda cam: cam.flatten(2).topk(max(cam[0, 0].numel() // 5, 1), dim=2).values.mean(2),
    "lse": lambda cam: (torch.logsumexp(4 * cam.flatten(2), 2) - torch.tensor(float(cam[0, 0].numel())).log()) / 4,
}


def train(host: PhotoHost, photos: Photos, steps: int, lr: float, batch_size: int, pool: str, seed: int, title: str,
          extra: Optional[Extra] = None) -> None:  # fmt: skip
    """The host's own loop: classification of the pooled CAM, plus the loss `extra(img, cam, labels)` if it is given."""
    optimizer = torch.optim.AdamW(host.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    order: List[int] = []
    host.train()
    bar = tqdm(range(steps), desc=title, mininterval=5)
    for _ in bar:
        if len(order) < batch_size:
            order = torch.randperm(len(photos.ids), generator=generator).tolist()
        index, order = torch.tensor(order[:batch_size]), order[batch_size:]
        flip = torch.rand(len(index), generator=generator) < 0.5
        img = torch.where(flip[:, None, None, None], photos.images[index].flip(3), photos.images[index])
        cam = host(photos.low[flip.long(), index].float())
        loss = F.multilabel_soft_margin_loss(POOLS[pool](cam), photos.labels[index])
        if extra is not None:
            loss = loss + extra(img, cam, photos.labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    host.eval()


@torch.no_grad()
def cams_of(host: PhotoHost, photos: Photos) -> Tensor:
    """CAM (N, C, h, h), the mean over the image and the mirrored image."""
    return torch.cat(
        [(host(a.float()) + host(b.float()).flip(3)) / 2 for a, b in zip(photos.low[0].split(50), photos.low[1].split(50))]
    )
