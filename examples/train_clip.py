"""Train a compact CLIP of your own, on the demo world or on any folder of images with a captions file.

    python -m examples.train_clip --world --out examples/demo/world_clip.pt
    python -m examples.train_clip --images PHOTOS --captions captions.csv --out my_clip.pt --size 96 --patch 12

`captions.csv` has the columns `image` and `caption`; an image may have several lines. The model is an instance of OpenAI's
`clip.model.CLIP`, and the file has OpenAI's state-dict layout: `PromptRefiner(classes, clip="my_clip.pt")` loads it
as it loads ViT-B/32. The image tower is a ViT (default), OpenAI's ResNet (`--tower resnet`), or frozen pretrained convolutional
features with a trained attention pool (`--tower FILE.py:FUNCTION`, see `FeatureTower`). A file of the last kind is loaded by
`PromptRefiner(classes, clip=load_feature_clip("my_clip.pt", "FILE.py:FUNCTION"))`.

The first command, with its defaults (seed 0, about 25 minutes on two cores), wrote `examples/demo/world_clip.pt`.
`--world kin --steps 800 --out examples/clusters/kin_clip.pt` wrote the CLIP of the clusters example.

Training: symmetric cross-entropy over the cosine similarities of a batch (Radford et al., ICML 2021). A caption that occurs
twice in a batch is a match of both images. `--fade` fades a share of the images by random smooth masks, so that the model
learns what a region looks like when the rest has the mean color: that is how the refiner shows regions to CLIP. (The demo
world has faded images of its own, whose captions name only what is left.)
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import os
import sys
import zipfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD, OpenAIClip, openai_clip_module


class Batch(NamedTuple):
    """`images` (N, S, S, 3) uint8 RGB, or cached features (N, C, h, h) of a `FeatureTower`, and one caption per image."""

    images: Union[np.ndarray, Tensor]
    captions: List[str]


# -------------------------------------------------------------------------------------------------------------- data


def world_batches(size: int, batch_size: int, seed: int, name: str = "demo") -> Iterator[Batch]:
    """Endless batches of new captioned scenes of the demo world, or of another of `WORLDS`."""
    from .demo import world

    rng = np.random.default_rng(seed)
    while True:
        scenes = [world.caption_scene(rng, world.WORLDS[name]) for _ in range(batch_size)]
        images = np.stack([_fit(s.image, size) for s in scenes])
        yield Batch(images, [s.caption for s in scenes])


class Photos(NamedTuple):
    """Captioned images: `images` (N, S, S, 3) uint8 RGB, and all captions of each."""

    images: np.ndarray
    captions: List[List[str]]


def read_photos(folder: Path, captions: Path, size: int) -> Photos:
    """The images of a folder that the captions file names, sorted by name.

    Raises:
        ValueError: if the captions file lacks a column, or names no readable image.
    """
    texts = read_captions(captions)
    images: Dict[str, np.ndarray] = {}
    for name in tqdm(texts, desc="reading images"):
        picture = cv2.imread(str(folder / name), cv2.IMREAD_COLOR)
        if picture is not None:
            images[name] = _fit(picture[..., ::-1], size)
    if not images:
        raise ValueError(f"{captions} must name images in {folder}; none of its {len(texts)} could be read.")
    if len(images) < len(texts):
        print(f"{len(texts) - len(images)} of {len(texts)} images could not be read and are left out", file=sys.stderr)
    names = sorted(images)
    return Photos(np.stack([images[n] for n in names]), [texts[n] for n in names])


def shuffled(photos: Photos, batch_size: int, seed: int) -> Iterator[Tuple[np.ndarray, List[str], np.random.Generator]]:
    """Endless (indices, captions, random generator): every image once per epoch, with one of its captions at random."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(photos.images))
        for start in range(0, max(len(order) - batch_size, 0) + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield chosen, [photos.captions[i][rng.integers(len(photos.captions[i]))] for i in chosen], rng


def photo_batches(photos: Photos, batch_size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches, flipped left to right at random."""
    for chosen, captions, rng in shuffled(photos, batch_size, seed):
        flip = rng.random(len(chosen)) < 0.5
        yield Batch(np.stack([photos.images[i][:, ::-1] if f else photos.images[i] for i, f in zip(chosen, flip)]), captions)


@torch.no_grad()
def cached_batches(
    tower: FeatureTower, photos: Photos, batch_size: int, seed: int, fade_share: float, variants: int
) -> Iterator[Batch]:
    """Endless shuffled batches of frozen features. Each image is encoded once in each of its variants (flipped, faded)."""
    generator = torch.Generator().manual_seed(seed)
    bank: List[Tensor] = []
    for variant in tqdm(range(variants), desc="caching features"):
        rows = []
        for start in range(0, len(photos.images), 64):
            part = photos.images[start : start + 64]
            images = fade(normalize(part[:, :, ::-1] if variant % 2 else part), fade_share, generator)
            rows.append(tower.features(images).half())
        bank.append(torch.cat(rows))
    for chosen, captions, rng in shuffled(photos, batch_size, seed):
        pick = rng.integers(variants, size=len(chosen))
        yield Batch(torch.stack([bank[v][i] for v, i in zip(pick, chosen)]).float(), captions)


def read_captions(path: Path) -> Dict[str, List[str]]:
    """Image name -> captions, from a CSV file with the columns `image` and `caption`."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"image", "caption"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} must have the columns image,caption; got {','.join(reader.fieldnames or ())}.")
        texts: Dict[str, List[str]] = {}
        for row in reader:
            texts.setdefault(row["image"], []).append(row["caption"])
    return texts


def _fit(picture: np.ndarray, size: int) -> np.ndarray:
    """Center square of a picture at `size` pixels."""
    height, width = picture.shape[:2]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    square = picture[y : y + side, x : x + side]
    return square if side == size else cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)


# ------------------------------------------------------------------------------------------------------------- model


class FeatureTower(nn.Module):
    """Frozen convolutional features, then a 1x1 convolution and OpenAI's attention pool, which are trained.

    Args:
        features: maps (N, 3, S, S) images with CLIP's statistics to (N, C, h, h).
        image_size: S, in pixels.
        width: channels of the attention pool, a multiple of 64.
        embed_dim: size of the image features.
    """

    def __init__(self, features: nn.Module, image_size: int, width: int, embed_dim: int):
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        with torch.no_grad():
            _, channels, side, _ = features(torch.zeros(1, 3, image_size, image_size)).shape
        self.input_resolution, self.output_dim = image_size, embed_dim
        self.norm = nn.BatchNorm2d(channels, affine=False)  # the features of another network may have any scale
        self.project = nn.Conv2d(channels, width, 1)
        self.attnpool = openai_clip_module("model").AttentionPool2d(side, width, width // 64, embed_dim)

    def train(self, mode: bool = True) -> "FeatureTower":
        super().train(mode)
        self.features.eval()
        return self

    def pool(self, features: Tensor) -> Tensor:
        """Image features (N, D) of frozen features (N, C, h, h)."""
        pooled = self.attnpool(self.project(self.norm(features)))
        return pooled[0] if pooled.ndim == 3 else pooled

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.features(images))


def build_clip(tower: str, size: int, patch: int, width: int, layers: int, text_width: int, text_layers: int, dim: int):
    """A new `clip.model.CLIP` with OpenAI's vocabulary and context length."""
    if text_width % 64 or (tower != "resnet" and width % 64) or (tower == "vit" and size % patch):
        raise ValueError("Widths must be multiples of 64 (OpenAI's head size), and --size a multiple of --patch.")
    if tower == "resnet" and size % 32:
        raise ValueError(f"A ResNet's --size must be a multiple of 32; got {size}.")
    vision_layers = (1, 1, 1, 1) if tower == "resnet" else layers
    model = openai_clip_module("model").CLIP(
        dim, size, vision_layers, width, patch, 77, 49408, text_width, text_width // 64, text_layers
    )
    if tower not in ("vit", "resnet"):
        model.visual = FeatureTower(load_features(tower), size, width, dim)
    return model


def load_features(tower: str) -> nn.Module:
    """The module that `FILE.py:FUNCTION` returns."""
    path, _, function = tower.rpartition(":")
    spec = importlib.util.spec_from_file_location("tower", path) if path.endswith(".py") else None
    if spec is None or spec.loader is None:
        raise ValueError(f"--tower must be vit, resnet, or FILE.py:FUNCTION; got {tower!r}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)()


def save_clip(model: nn.Module, path: Path, used_tokens: Sequence[int], shape: Optional[Dict[str, int]] = None) -> None:
    """Write the state dict in OpenAI's layout, at half precision and compressed. The file appears complete or not at all.

    Embeddings of tokens that occur in no caption were not trained. They are set to zero, which compresses well.
    """
    state = {
        name: value.detach().cpu().half() if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    used = torch.zeros(len(state["token_embedding.weight"]), 1, dtype=torch.half)
    used[list(used_tokens)] = 1
    state["token_embedding.weight"] = state["token_embedding.weight"] * used
    plain = io.BytesIO()
    torch.save(state if shape is None else {"state_dict": state, "shape": shape}, plain)
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target:
        for entry in source.infolist():
            fixed = zipfile.ZipInfo(entry.filename, date_time=(1980, 1, 1, 0, 0, 0))  # same weights, same bytes
            fixed.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(fixed, source.read(entry))
    os.replace(part, path)


def load_feature_clip(path: Path, tower: str) -> nn.Module:
    """A trained CLIP with a `FeatureTower`, a module for `PromptRefiner(clip=...)`."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if "shape" not in saved:
        raise ValueError(
            f"{path} must be a file of `--tower FILE.py:FUNCTION`; it is not. Load it with PromptRefiner(clip={str(path)!r})."
        )
    model = build_clip(tower, **saved["shape"])
    model.load_state_dict(saved["state_dict"])
    return model.eval()


# ---------------------------------------------------------------------------------------------------------- training


def normalize(images: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32 with CLIP's statistics."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def fade(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Multiply a share of the images by a smooth random mask in [0, 1]; what is faded gets the mean color."""
    n, size = images.shape[0], images.shape[-1]
    coarse = torch.rand(n, 1, 5, 5, generator=generator)
    mask = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    mask = torch.sigmoid((mask - 0.42) * (6 + 30 * torch.rand(n, 1, 1, 1, generator=generator)))
    mask = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < share, mask, torch.ones(()))
    return images * mask


def train(
    model: nn.Module, batches: Iterator[Batch], steps: int, lr: float, fade_share: float, seed: int, max_scale: float,
    save: Callable[[List[int]], None],
) -> None:  # fmt: skip
    """Train in place. `save` is called every 200 steps and at the end, with the token ids that occurred in captions so far."""
    encoder = OpenAIClip(model, "training")
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.06, cycle_momentum=False)
    used: set = set()
    smooth = None
    model.train()
    bar = tqdm(range(steps), desc="training CLIP", mininterval=5)
    for step in bar:
        batch = next(batches)
        rows = encoder.tokenize(batch.captions)
        used.update(token for row in rows for token in row)
        unique = {tuple(row): i for i, row in reversed(list(enumerate(rows)))}
        index = torch.tensor([list(unique).index(tuple(row)) for row in rows])  # (N,) caption of each image
        if isinstance(batch.images, Tensor):
            v = F.normalize(model.visual.pool(batch.images), dim=-1)
        else:
            v = F.normalize(encoder.encode_image(fade(normalize(batch.images), fade_share, generator)), dim=-1)
        u = F.normalize(encoder.encode_tokens(list(unique)), dim=-1)
        scale = model.logit_scale.exp().clamp(max=max_scale)
        logits = scale * v @ u.T  # (N, number of different captions)
        same = F.one_hot(index, len(unique)).float()
        # Caption to image: every image of a caption is a match. Image to caption: a caption that occurs k times counts k times.
        loss_text = -(same.T * F.log_softmax(logits.T, 1)).sum() / len(rows)
        count = same.sum(0)
        loss_image = F.cross_entropy(logits + count.log(), index)
        loss = (loss_image + loss_text) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(max_scale)))
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", scale=f"{scale.item():.1f}")
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(sorted(used))
            tqdm.write(
                f"step {step + 1}: loss {smooth:.3f}, scale {scale.item():.1f}, mean cosine {(v @ u.T).mean().item():.3f}"
            )
    model.eval()


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--world", nargs="?", const="demo", choices=("demo", "kin"), help="train on the demo world, or on the kin world"
    )
    source.add_argument("--images", type=Path, action="append", help="folder of images; may be given several times")
    parser.add_argument(
        "--captions", type=Path, action="append", help="CSV file with the columns image,caption, one per --images"
    )
    parser.add_argument("--out", type=Path, required=True, help="weights file to write")
    parser.add_argument("--tower", default="vit", help="vit, resnet, or FILE.py:FUNCTION that returns frozen features")
    parser.add_argument("--size", type=int, default=64, help="input size in pixels")
    parser.add_argument("--patch", type=int, default=8, help="ViT patch size in pixels")
    parser.add_argument("--width", type=int, default=128, help="width of the image tower")
    parser.add_argument("--layers", type=int, default=4, help="layers of the ViT")
    parser.add_argument("--text-width", type=int, default=128)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128, help="size of the joint feature space")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--fade", type=float, default=0.0, help="share of the images faded by a random mask")
    parser.add_argument("--variants", type=int, default=4, help="variants of each image whose frozen features are cached")
    parser.add_argument("--max-scale", type=float, default=100.0, help="upper bound of the learned logit scale")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv or None)
    if args.images and len(args.images) != len(args.captions or ()):
        parser.error("Give one --captions for each --images.")
    torch.manual_seed(args.seed)
    names = ("size", "patch", "width", "layers", "text_width", "text_layers", "dim")
    shape = {name: getattr(args, name) for name in names}
    model = build_clip(args.tower, **shape)
    features = args.tower not in ("vit", "resnet")
    if args.world:
        batches = world_batches(args.size, args.batch_size, args.seed, args.world)
    else:
        parts = [read_photos(folder, file, args.size) for folder, file in zip(args.images, args.captions)]
        photos = Photos(np.concatenate([p.images for p in parts]), [texts for p in parts for texts in p.captions])
        if features:
            batches = cached_batches(model.visual, photos, args.batch_size, args.seed, args.fade, args.variants)
        else:
            batches = photo_batches(photos, args.batch_size, args.seed)

    def save(used: List[int]) -> None:
        save_clip(model, args.out, used, shape if features else None)

    train(model, batches, args.steps, args.lr, args.fade, args.seed, args.max_scale, save)
    loading = f"load_feature_clip({str(args.out)!r}, {args.tower!r})" if features else repr(str(args.out))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB. Use it: PromptRefiner(classes, clip={loading})")


if __name__ == "__main__":
    main()
