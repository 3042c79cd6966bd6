"""Train the stand-in CLIP of the photos experiment: frozen MobileNetV2 features, a learned attention pool, a small text tower.

    python -m examples.photos.train_clip --photos VOCdevkit/VOC2012 --labels image_labels.json --captioned flickr8k \\
        --mobilenet mobilenet_v2_features.safetensors --head mobilenet_v2_imagenet_head.safetensors \\
        --names imagenet_labels.txt --out photo_clip.pt

It learns from captions of one set of photos, from image-level labels of the train split of another, and from what the ImageNet
classifier believes of an image or of a part of it. It never sees a pixel mask. Three losses:

- contrastive (Radford et al., ICML 2021) on images with their captions, and on views with a caption that is drawn from the
  ImageNet classifier's belief about the view ("a photo of a tabby.");
- sigmoid (Zhai et al., ICCV 2023) on views of the labeled photos with the texts of all class names, in varied templates. The
  target of a whole photo is its label. The target of a part is the label times the ImageNet classifier's belief in the class
  on the part, relative to its belief on the whole photo; classes that ImageNet lacks are left out there;
- with `--cut`, the same loss on what a class activation map of a linear classifier on the frozen features keeps (the class is
  there) and leaves out (it is not).

What OpenAI's CLIP never had: the image-level labels of these photos, parts of images as training data, and, with `--cut`,
regions of the very photos whose maps it is to judge later. What it had and this one lacks: four hundred million images.

All views are encoded once by the frozen features and kept in memory (about 4 GB at 224 pixels).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.clip_backends import OpenAIClip
from semples_plugin.files.images import read_image

from ..train_clip import build_clip, normalize, read_photos, save_clip
from .mobilenet import load_imagenet_head

TOWER = f"{Path(__file__).with_name('mobilenet.py')}:clip_tower"
TEMPLATES = ("a photo of a {}.", "{}", "a {} in a picture.", "there is a {}.", "a photo of the {}.", "a close-up of a {}.")
# Rows of the ImageNet classifier (0 is background) that are a VOC class.
ROWS: Dict[str, Tuple[range, ...]] = {
    "dog": (range(152, 270),),
    "cat": (range(282, 287),),
    "horse": (range(340, 341),),
    "cow": (range(346, 348),),
    "sheep": (range(349, 351),),
}
PARTS = 4  # random masks per labeled photo; each gives a view and its complement
BATCH = {"captioned": 128, "labeled": 96, "cut": 64}


class Labeled(NamedTuple):
    """Photos with image-level labels: `images` (N, S, S, 3) uint8 and `labels` (N, 20) multi-hot, VOC's classes."""

    images: np.ndarray
    labels: Tensor


class Bank(NamedTuple):
    """Frozen features of views.

    Attributes:
        features: (N, C, h, h), half precision.
        targets: (N, 20) how much of each class is there, in [0, 1]; NaN where unknown.
    """

    features: Tensor
    targets: Tensor


class Belief:
    """What the ImageNet classifier says of frozen features (N, C, h, h)."""

    def __init__(self, head: Path, names: Path):
        self.weight, self.bias = load_imagenet_head(str(head))
        self.names = [line.split(",")[0].strip() for line in names.read_text(encoding="utf-8").splitlines()]
        self.coarse = {row: name for name, spans in ROWS.items() for span in spans for row in span}

    def probabilities(self, features: Tensor) -> Tensor:
        """(N, 1001)."""
        return (features.float().mean((2, 3)) @ self.weight.T + self.bias).softmax(1)

    def classes(self, features: Tensor) -> Tensor:
        """(N, 20) belief in VOC's classes; NaN for those that ImageNet lacks."""
        p = self.probabilities(features)
        result = torch.full((len(p), len(VOC_CLASSES)), float("nan"))
        for name, spans in ROWS.items():
            rows = [row for span in spans for row in span]
            result[:, list(VOC_CLASSES).index(name)] = p[:, rows].sum(1)
        return result

    def captions(self, features: Tensor, generator: torch.Generator) -> List[str]:
        """A name drawn from the belief in each view, or half of the time the VOC class that it belongs to."""
        rows = torch.multinomial(self.probabilities(features), 1, generator=generator)[:, 0].tolist()
        general = (torch.rand(len(rows), generator=generator) < 0.5).tolist()
        names = [self.coarse.get(row, self.names[row]) if g else self.names[row] for row, g in zip(rows, general)]
        return [template.replace("{}", name) for name, template in zip(names, draw_templates(len(names), generator))]


def draw_templates(count: int, generator: torch.Generator) -> List[str]:
    return [TEMPLATES[i] for i in torch.randint(len(TEMPLATES), (count,), generator=generator).tolist()]


def random_masks(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(N, 1, S, S) smooth random masks in [0, 1], from soft to nearly binary."""
    coarse = torch.rand(count, 1, 5, 5, generator=generator)
    mask = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    middle = mask.flatten(1).median(1).values.view(-1, 1, 1, 1) + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    return torch.sigmoid((mask - middle) * (8 + 40 * torch.rand(count, 1, 1, 1, generator=generator)))


def cam_masks(features: Tensor, pairs: Tensor, weight: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Masks (P, 1, S, S) of the class maps of a linear classifier on the features, cut at random levels of 0.3 to 0.6.

    Args:
        features: (N, C, h, h).
        pairs: (P, 2) image and class of each mask.
        weight: (20, C) of the classifier.
        size: S.
        generator: of the levels and of how sharp the cut is.
    """
    cam = torch.einsum("nchw,kc->nkhw", features.float(), weight)[pairs[:, 0], pairs[:, 1]][:, None]
    cam = F.interpolate(cam, size=(size, size), mode="bilinear", align_corners=True)
    low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
    level = 0.3 + 0.3 * torch.rand(len(cam), 1, 1, 1, generator=generator)
    sharpness = 8 + 40 * torch.rand(len(cam), 1, 1, 1, generator=generator)
    return torch.sigmoid(((cam - low) / (high - low + 1e-6) - level) * sharpness)


def linear_classifier(features: Tensor, labels: Tensor, steps: int = 300) -> Tensor:
    """Weight (K, C) of a multi-label classifier on the mean of the features."""
    x, y = features.float().mean((2, 3)), labels.float()
    layer = nn.Linear(x.shape[1], y.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer.weight.detach()


@torch.no_grad()
def encode(tower: nn.Module, images: np.ndarray, masks: Optional[Tensor] = None) -> Tensor:
    """Frozen features (N, C, h, h), half precision, of images (N, S, S, 3) uint8, times masks (N, 1, S, S)."""
    rows = []
    for start in range(0, len(images), 32):
        x = normalize(images[start : start + 32])
        x = x if masks is None else x * masks[start : start + 32]
        rows.append(tower.features(x).half())
    return torch.cat(rows)


def labeled_bank(tower: nn.Module, data: Labeled, belief: Belief, generator: torch.Generator) -> Bank:
    """The photos, the mirrored photos, and both sides of `PARTS` random masks of each."""
    size = data.images.shape[1]
    whole = encode(tower, data.images)
    reference = belief.classes(whole)
    features, targets = [whole, encode(tower, data.images[:, :, ::-1])], [data.labels.float()] * 2
    for _ in tqdm(range(PARTS), desc="parts of labeled photos", mininterval=5):
        masks = random_masks(len(data.images), size, generator)
        for mask in (masks, 1 - masks):
            part = encode(tower, data.images, mask)
            share = (belief.classes(part) / (reference + 1e-6)).clamp(0, 1)  # NaN for classes that ImageNet lacks
            share = torch.where(reference < 0.05, torch.full_like(share, float("nan")), share)
            features.append(part)
            targets.append(torch.where(data.labels == 0, torch.zeros_like(share), share))
    return Bank(torch.cat(features), torch.cat(targets))


def cut_bank(tower: nn.Module, data: Labeled, whole: Tensor, generator: torch.Generator) -> Bank:
    """What the class map of every label keeps, target 1, and leaves out, target 0; other classes of the photo are unknown."""
    weight = linear_classifier(whole, data.labels)
    features, targets = [], []
    for start in tqdm(range(0, len(whole), 32), desc="views cut along class maps", mininterval=5):
        pictures, labels = data.images[start : start + 32], data.labels[start : start + 32]
        pairs = labels.nonzero()
        mask = cam_masks(whole[start : start + 32], pairs, weight, pictures.shape[1], generator)
        for side, value in ((mask, 1.0), (1 - mask, 0.0)):
            features.append(encode(tower, pictures[pairs[:, 0].numpy()], side))
            target = torch.where(labels[pairs[:, 0]] == 0, 0.0, float("nan"))
            target[torch.arange(len(pairs)), pairs[:, 1]] = value
            targets.append(target)
    return Bank(torch.cat(features), torch.cat(targets))


def contrastive_loss(v: Tensor, u: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of views (N, D) and different captions (K, D); `index` (N) is the caption of each view."""
    logits = scale * v @ u.T
    same = F.one_hot(index, len(u)).float()
    to_views = -(same.T * F.log_softmax(logits.T, 1)).sum() / len(v)
    return (F.cross_entropy(logits + same.sum(0).log(), index) + to_views) / 2


def train(
    model: nn.Module, captioned: Tensor, captions: Sequence[Sequence[str]], labeled: Bank, cut: Bank, belief: Belief,
    steps: int, lr: float, seed: int,
) -> List[int]:  # fmt: skip
    """Train in place; returns the token ids that occurred."""
    encoder, generator = OpenAIClip(model, "training"), torch.Generator().manual_seed(seed)
    sigmoid = nn.Parameter(torch.tensor([np.log(10.0), -4.0], dtype=torch.float32))  # log scale and bias
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
              {"params": [p for p in trained if p.ndim <= 1] + [sigmoid], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.06, cycle_momentum=False)
    used: set = set()

    def draw(count: int, of: int) -> Tensor:
        return torch.randint(of, (count,), generator=generator)

    model.train()
    bar = tqdm(range(steps), desc="training CLIP", mininterval=5)
    for _ in bar:
        a, b = draw(BATCH["captioned"], len(captioned)), draw(BATCH["labeled"], len(labeled.features))
        c = draw(BATCH["cut"], len(cut.features)) if len(cut.features) else None
        parts = labeled.features[b]
        texts = [captions[i][int(torch.randint(len(captions[i]), (1,), generator=generator))] for i in a.tolist()]
        texts += belief.captions(parts, generator)
        names = [t.replace("{}", n) for n, t in zip(VOC_CLASSES, draw_templates(len(VOC_CLASSES), generator))]
        rows = encoder.tokenize([*texts, *names])
        used.update(token for row in rows for token in row)
        number = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        u = F.normalize(encoder.encode_tokens([list(row) for row in number]), dim=-1)
        index = torch.tensor([number[tuple(row)] for row in rows])
        views = torch.cat([captioned[a], parts] + ([] if c is None else [cut.features[c]])).float()
        v = F.normalize(model.visual.pool(views), dim=-1)
        own, count = index[: len(texts)], len(texts)
        distinct, back = torch.unique(own, return_inverse=True)
        loss = contrastive_loss(v[:count], u[distinct], back, model.logit_scale.exp().clamp(max=30))
        targets = torch.cat([labeled.targets[b]] + ([] if c is None else [cut.targets[c]]))  # (N, 20)
        logits = sigmoid[0].exp() * v[len(a) :] @ u[index[count:]].T + sigmoid[1]
        known = ~targets.isnan()
        weight = torch.where(targets > 0.5, 4.0, 1.0) * known  # most classes are absent
        each = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
        loss_labels = (weight * each).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        (loss + 4 * loss_labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(contrastive=f"{loss.item():.2f}", labels=f"{loss_labels.item():.3f}", refresh=False)
    model.eval()
    return sorted(used)


def read_labeled(photos: Path, labels: Path, split: str, size: int) -> Labeled:
    """The photos of a split, squeezed to a square, with all of VOC's labels."""
    named: Dict[str, List[str]] = json.loads(labels.read_text(encoding="utf-8"))
    ids = (photos / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()
    pictures = [
        cv2.resize(read_image(photos / "JPEGImages" / f"{i}.jpg"), (size, size), interpolation=cv2.INTER_AREA) for i in ids
    ]
    return Labeled(np.stack(pictures), torch.tensor([[int(c in named[i]) for c in VOC_CLASSES] for i in ids]))


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.photos.train_clip", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder with JPEGImages and ImageSets")
    parser.add_argument("--labels", type=Path, required=True, help="JSON: image id -> class names")
    parser.add_argument("--captioned", type=Path, required=True, help="folder with images/ and captions.csv")
    parser.add_argument("--mobilenet", type=Path, required=True, help="MobileNetV2 features, safetensors")
    parser.add_argument("--head", type=Path, required=True, help="its ImageNet classifier, safetensors")
    parser.add_argument("--names", type=Path, required=True, help="names of the classifier's rows, one per line")
    parser.add_argument("--cut", action="store_true", help="also learn from views cut along class maps of the labeled photos")
    parser.add_argument("--size", type=int, default=224, help="input size in pixels (%(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="weights file to write")
    args = parser.parse_args(argv or None)
    os.environ["MOBILENET"] = str(args.mobilenet.resolve())
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    shape = {"size": args.size, "patch": 32, "width": 256, "layers": 1, "text_width": 128, "text_layers": 2, "dim": 256}
    model = build_clip(TOWER, **shape)
    belief = Belief(args.head, args.names)
    photos = read_photos(args.captioned / "images", args.captioned / "captions.csv", args.size)
    captioned = encode(model.visual, photos.images)
    data = read_labeled(args.photos, args.labels, "train", args.size)
    labeled = labeled_bank(model.visual, data, belief, generator)
    whole = labeled.features[: len(data.images)]
    cut = cut_bank(model.visual, data, whole, generator) if args.cut else Bank(whole[:0], labeled.targets[:0])
    used = train(model, captioned, photos.captions, labeled, cut, belief, args.steps, args.lr, args.seed)
    save_clip(model, args.out, used, shape)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
