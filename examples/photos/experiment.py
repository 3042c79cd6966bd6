"""The three stages on real photos: a CAM network on pretrained features, trained on image-level labels, and its CAM files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from semples_plugin import PromptRefiner
from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.config import RefinerConfig
from semples_plugin.files.cams import CamFile, write_cam_file
from semples_plugin.files.images import read_image, write_label_png
from semples_plugin.regions import change_stats, resize_image

from ..recipe import COMPACT_CLIP
from .squeezenet import load_squeezenet

CLASSES = ["cat", "cow", "dog", "horse", "sheep", "person"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Settings(NamedTuple):
    """Sizes, steps and learning rates, and the configuration of the refiner."""

    size: int = 192
    host_steps: int = 200
    host_lr: float = 3e-4
    stage_steps: int = 100
    stage_lr: float = 3e-4
    batch_size: int = 12
    config: RefinerConfig = COMPACT_CLIP


class Photos(NamedTuple):
    """A split of the photos.

    Attributes:
        ids: N names of images.
        images: (N, 3, S, S) in [0, 1].
        labels: (N, C) multi-hot.
        low: (2, N, 256, h, h) frozen low features of the images and of the mirrored images, at half precision.
    """

    ids: List[str]
    images: Tensor
    labels: Tensor
    low: Tensor


class PhotoHost(nn.Module):
    """The last four blocks of SqueezeNet 1.1 and a 1x1 classifier, all trained: low features -> cam (B, C, h, h)."""

    def __init__(self, high: nn.Module, num_classes: int):
        super().__init__()
        self.high = high
        self.head = nn.Conv2d(512, num_classes, 1)

    def forward(self, low: Tensor) -> Tensor:
        return self.head(self.high(low))


def load_backbone(path: Path) -> Tuple[nn.Module, nn.Sequential]:
    """The frozen lower part, images in [0, 1] -> features at an eighth of their size, and the pretrained last four blocks."""
    network = load_squeezenet(str(path), ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))).eval().requires_grad_(False)
    network.features[8] = nn.MaxPool2d(3, stride=1, padding=1)  # a finer CAM
    high = copy.deepcopy(network.features[9:]).requires_grad_(True)
    network.features = network.features[:9]
    return network, high


@torch.no_grad()
def load_split(root: Path, labels: Path, split: str, low: nn.Module, settings: Settings) -> Photos:
    """The photos of a split that show at least one of the six classes. Labels come from the labels file, never from masks."""
    named: Dict[str, List[str]] = json.loads(labels.read_text(encoding="utf-8"))
    ids = (root / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()
    ids = [i for i in ids if set(named[i]) & set(CLASSES)]
    images, features = [], []
    for name in tqdm(ids, desc=f"reading {split}"):
        picture = cv2.resize(
            read_image(root / "JPEGImages" / f"{name}.jpg"), (settings.size,) * 2, interpolation=cv2.INTER_AREA
        )
        image = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
        images.append(image)
        features.append(low(torch.stack([image, image.flip(2)])).half())
    target = torch.tensor([[int(c in named[i]) for c in CLASSES] for i in ids])
    return Photos(ids, torch.stack(images), target, torch.stack(features, dim=1))


Extra = Callable[[Tensor, Tensor, Tensor], Tensor]


def train(host: PhotoHost, photos: Photos, steps: int, lr: float, batch_size: int, seed: int, title: str,
          extra: Optional[Extra] = None) -> None:  # fmt: skip
    """The host's own loop: classification of the pooled CAM, plus the loss `extra(img, cam, labels)` if it is given."""
    optimizer = torch.optim.AdamW(host.parameters(), lr=lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(seed)
    order: List[int] = []
    bar = tqdm(range(steps), desc=title)
    for _ in bar:
        if len(order) < batch_size:
            order = torch.randperm(len(photos.ids), generator=generator).tolist()
        index, order = torch.tensor(order[:batch_size]), order[batch_size:]
        flip = torch.rand(len(index), generator=generator) < 0.5
        img = torch.where(flip[:, None, None, None], photos.images[index].flip(3), photos.images[index])
        cam = host(photos.low[flip.long(), index].float())
        loss = F.multilabel_soft_margin_loss(cam.mean((2, 3)), photos.labels[index])
        if extra is not None:
            loss = loss + extra(img, cam, photos.labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def cams_of(host: PhotoHost, photos: Photos) -> Tensor:
    """CAM (N, C, h, h), the mean over the image and the mirrored image."""
    return torch.cat(
        [(host(a.float()) + host(b.float()).flip(3)) / 2 for a, b in zip(photos.low[0].split(50), photos.low[1].split(50))]
    )


def write_cams(host: PhotoHost, photos: Photos, root: Path, folder: Path) -> None:
    """CAM files {class index: (H, W)}: positive part of the CAM, normalized to [0, 1] per image and class."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, cam, labels in zip(photos.ids, cams_of(host, photos).relu(), photos.labels):
        height, width = cv2.imread(str(root / "JPEGImages" / f"{name}.jpg")).shape[:2]
        maps: Dict[int, np.ndarray] = {}
        for k in labels.nonzero()[:, 0].tolist():
            big = F.interpolate(cam[None, k : k + 1], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
            maps[k] = ((big - big.min()) / (big.max() - big.min() + 1e-8)).numpy()
        write_cam_file(folder / f"{name}.npy", CamFile(maps, "dict"))


def write_masks(photos: Photos, root: Path, folder: Path) -> None:
    """Ground truth of the six classes as label maps 0 to 6. Other classes of VOC become background; void stays void."""
    from PIL import Image

    table = np.zeros(256, np.uint8)
    table[255] = 255
    for k, name in enumerate(CLASSES):
        table[1 + list(VOC_CLASSES).index(name)] = k + 1
    folder.mkdir(parents=True, exist_ok=True)
    for name in photos.ids:
        with Image.open(root / "SegmentationClass" / f"{name}.png") as picture:
            write_label_png(folder / f"{name}.png", table[np.array(picture)])


def new_refiner(clip: nn.Module, settings: Settings, seed: int) -> PromptRefiner:
    return PromptRefiner(CLASSES, clip=clip, config=settings.config, seed=seed)


def zero_shot(clip: nn.Module, photos: Photos, settings: Settings) -> Dict[str, float]:
    """Average precision per class of cos(image, "a photo of a <class>."): does this CLIP know the classes?"""
    refiner = new_refiner(clip, settings, 0)
    encoder = refiner.encoder
    images = change_stats(resize_image(photos.images, encoder.image_size), None, (encoder.mean, encoder.std))
    with torch.no_grad():
        v = torch.cat([encoder.encode_image(part) for part in images.split(50)])  # (N, D)
    scores = F.normalize(v, dim=-1) @ F.normalize(refiner.text_features, dim=-1).T
    return {name: average_precision(scores[:, k], photos.labels[:, k]) for k, name in enumerate(CLASSES)}


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean of the precision at the rank of every positive, highest scores first."""
    hits = labels[scores.argsort(descending=True)].float()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def stages(
    backbone: nn.Sequential, clip: nn.Module, data: Photos, settings: Settings, seed: int, out: Path, write: Callable[..., None]
) -> PromptRefiner:
    """Train the host, then train it on in three ways: alone for as long as the others, match, and match + refine.

    The weights of every finished part are saved in `out`, so that an interrupted run continues after the last one.

    Args:
        backbone: the pretrained last four blocks, see `load_backbone`.
        clip: a loaded CLIP.
        data: the photos to train on.
        settings: sizes, steps and options.
        seed: of the host, the batches and the prompts.
        out: folder for weights and prompts.
        write: called as `write(name, host)` after every part.

    Returns:
        The refiner with its learned prompts.
    """
    torch.manual_seed(seed)
    first = PhotoHost(copy.deepcopy(backbone), len(CLASSES))

    def trained(name: str, start: Optional[Dict[str, Tensor]], work: Callable[[PhotoHost], None]) -> Dict[str, Tensor]:
        """Weights of the part `name`: read from its file, or trained by `work` from the weights `start`."""
        host = copy.deepcopy(first)
        path = out / f"{name}.pt"
        if path.exists():
            host.load_state_dict(torch.load(path, weights_only=True))
        else:
            if start is not None:
                host.load_state_dict(start)
            work(host)
            torch.save(host.state_dict(), path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        write(name, host.eval())
        return host.state_dict()

    def train_on(title: str, extra: Optional[Extra] = None) -> Callable[[PhotoHost], None]:
        s = settings
        return lambda host: train(host, data, s.stage_steps, s.stage_lr, s.batch_size, seed, title, extra)

    def train_first(host: PhotoHost) -> None:
        train(host, data, settings.host_steps, settings.host_lr, settings.batch_size, seed, "host")

    base = trained("base", None, train_first)
    trained("host", base, train_on("host, as long as the others"))
    refiner = new_refiner(clip, settings, seed)
    matched = trained("match", base, train_on("match", refiner))
    prompts = out / "prompts.safetensors"
    if prompts.exists():
        refiner.load_prompts(prompts)
    else:
        host = copy.deepcopy(first)
        host.load_state_dict(matched)
        cams = cams_of(host.eval(), data)
        rows = [
            refiner.encode_backgrounds(*batch) for batch in zip(data.images.split(32), cams.split(32), data.labels.split(32))
        ]
        pairs = torch.cat([p + torch.tensor([32 * i, 0]) for i, (_, p) in enumerate(rows)])
        refiner.fit_prompts_on(torch.cat([f for f, _ in rows]), pairs)
        refiner.save(prompts)
    trained("refine", base, train_on("match + refine", refiner))
    return refiner


def captions(labels: Path, ids: Sequence[str]) -> List[Tuple[str, str]]:
    """(image, caption) pairs made of the photos' image-level labels, to train the photo CLIP on."""
    named: Dict[str, List[str]] = json.loads(labels.read_text(encoding="utf-8"))
    rows = []
    for name in ids:
        things = [("an " if VOC_CLASSES[c][0] in "aeiou" else "a ") + VOC_CLASSES[c] for c in named[name]]
        together = " and ".join(things)
        rows += [(f"{name}.jpg", text) for text in (f"a photo of {together}.", f"{together} in a picture")]
        rows += [(f"{name}.jpg", f"a photo of {thing}.") for thing in things]
    return rows
