"""One cell of the ablation: a host that is trained on with the loss of a row, and the figures of its CAMs.

Training sees images and image-level labels. Masks are used for scoring alone. Every row trains on from the same weights of the
host for the same number of steps (unless the row says otherwise).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import load_clip
from semples_plugin.config import RefinerConfig
from semples_plugin.masks import align_masks
from semples_plugin.regions import pair_masks, positive_pairs

from ..cells import Cell, slug, write_file
from ..controls import AreaOnly, random_clip
from ..demo.host import Split
from ..hosts import MEAN, STD, SmallHost, make_host, train_attached
from .data import Data
from .rows import BASE, MATCH, ROWS, Row

__all__ = ["Settings", "kept_file", "kept_host", "newest_parts", "run_cell", "soft_masks"]


class Settings(NamedTuple):
    """What all cells share.

    Attributes:
        host: name of the host, see `examples.hosts`.
        repos: folder with clones of the hosts' repositories, or None.
        clip: CLIP's name or file.
        config: of the refiner, before a row's options.
        size: side of the images in pixels.
        host_steps, stage_steps: optimization steps before the rows part, and of each row.
        lr, host_batch_size, batch_size: of both, and of each.
        text_weight, text_threshold: of the term of hand-written prompts.
        parts: folder for weights and features.
    """

    host: str
    repos: Optional[Path]
    clip: str
    config: RefinerConfig
    size: int
    host_steps: int
    stage_steps: int
    lr: float
    host_batch_size: int
    batch_size: int
    text_weight: float
    text_threshold: float
    parts: Path


def run_cell(cell: Cell, settings: Settings, data: Data) -> Dict[str, Any]:
    """The figures of a cell; see `run`."""
    torch.set_num_threads(1)
    return Run(settings, data, cell.seed).cell(cell.row)


class Run:
    """The cells of one seed. Weights that others start from are kept in files."""

    def __init__(self, settings: Settings, data: Data, seed: int):
        self.settings, self.data, self.seed = settings, data, seed
        self.train, self.val, self.test = data.splits(seed)
        self.clip = load_clip(settings.clip, dtype=getattr(torch, str(settings.config.clip_dtype)))
        self.folder = settings.parts / f"seed_{seed}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def cell(self, name: str) -> Dict[str, Any]:
        if name == BASE:
            self.base()
            return {}
        row = next(row for row in ROWS if row.name == name)
        refiner = self.refiner(row)
        if row.prompts is not None:
            self.give_prompts(row, refiner)
        host, terms = self.trained(row, refiner)
        cams = [(split, host.cams(split.images)) for split in (self.val, self.test)]
        plain, aligned = (self.figures(cams, edges) for edges in (False, True))
        found: Dict[str, Any] = {**plain, **{f"{key}, aligned": value for key, value in aligned.items()}}
        last = terms[-20:]
        found["last terms"] = {name: sum(t[name] for t in last) / len(last) for name in (last[0] if last else {})}
        if refiner is not None and refiner.stage == "refine":
            found["alive"] = refiner.prompts.alive.tolist()
            found["words"] = [str(words) for words in refiner.nearest_words(top=2)]
        return found

    # ------------------------------------------------------------------------------------------------ hosts

    def fresh(self) -> SmallHost:
        torch.manual_seed(self.seed)
        s = self.settings
        return make_host(s.host, len(self.data.classes), s.size, s.repos).to(self.device)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Tensors of a file, or of `make()`, which are then written to the file."""
        path = self.folder / f"{slug(name)}.pt"
        if not path.is_file():
            made = make()
            write_file(path, lambda part: torch.save(made, part))
        return torch.load(path, map_location="cpu", weights_only=True)

    def base(self) -> Dict[str, Tensor]:
        def make() -> Dict[str, Tensor]:
            s, host = self.settings, self.fresh()
            train_attached(host, self.train, s.host_steps, s.lr, s.host_batch_size, self.seed, "base")
            return host.state_dict()

        return self.kept(BASE, make)

    def trained(self, row: Row, refiner: Optional[PromptRefiner]) -> Tuple[SmallHost, List[Dict[str, float]]]:
        """The host of a row, and the terms of its steps (none if it was read from a file)."""
        terms: List[Dict[str, float]] = []

        def make() -> Dict[str, Tensor]:
            s, host = self.settings, self.fresh()
            host.load_state_dict(self.base())
            steps = round(row.steps * s.stage_steps)
            title = f"seed {self.seed}: {row.name}"
            terms.extend(train_attached(host, self.train, steps, s.lr, s.batch_size, self.seed, title, refiner, row.weight))
            return host.state_dict()

        host = self.fresh()
        host.load_state_dict(self.kept(row.name, make))
        return host.eval(), terms

    # ------------------------------------------------------------------------------------------------ refiners

    def refiner(self, row: Row) -> Optional[PromptRefiner]:
        s, classes = self.settings, self.data.classes
        if row.loss == "none":
            return None
        options = dict(row.options)
        if "online_steps" in options:
            options["online_steps"] = max(1, round(options["online_steps"] * row.steps * s.stage_steps))
        if row.texts is not None:
            texts: Any = self.data.texts if row.texts == "all" else self.data.own_texts
            options.update(background_texts=texts, lambda_background_texts=s.text_weight, background_threshold=s.text_threshold)
        if row.raw:
            options["clip_stats"] = False
        kind = RawImages if row.raw else AreaOnly if row.loss == "area" else PromptRefiner
        clip: Any = self.clip
        if row.loss == "random clip":
            clip = random_clip(self.clip.model, self.seed)
        named: Any = classes
        if row.loss == "wrong texts":
            named = {name: classes[(k + 1) % len(classes)] for k, name in enumerate(classes)}
        stats = self.fresh().image_stats
        return kind(named, clip, s.config.replace(image_stats=stats, seed=self.seed), **options).to(self.device)

    def give_prompts(self, row: Row, refiner: PromptRefiner) -> None:
        """The prompts of a row, from the CAMs of the host that match has trained."""
        features, pairs = self.backgrounds()
        prompts = refiner.prompts
        if row.prompts == "random":
            prompts.take(prompts.initial(), torch.ones(prompts.alive.shape))
        elif row.prompts == "class-free":
            one = PromptRefiner(["thing"], refiner.encoder, refiner.config, lambda_t=0.0)
            one.fit_prompts_on(features, torch.stack([pairs[:, 0], torch.zeros_like(pairs[:, 1])], dim=1), progress=False)
            prompts.take(one.prompts.context.expand(prompts.context.shape), torch.ones(prompts.alive.shape))
        else:
            refiner.fit_prompts_on(features, pairs, progress=False)
            if row.prompts == "shuffled":
                prompts.take(prompts.context.roll(1, 0), prompts.alive.roll(1, 0))

    def backgrounds(self) -> Tuple[Tensor, Tensor]:
        """v_b of every positive pair of the training images, and the pairs, as match's CAMs cut them out."""

        def make() -> List[Tensor]:
            match = next(row for row in ROWS if row.name == MATCH)
            refiner = self.refiner(match)
            assert refiner is not None
            host, _ = self.trained(match, refiner)
            rows = []
            for start in range(0, len(self.train.images), 50):
                part = self.train.images[start : start + 50]
                img, cam = host.prepare(part.to(self.device)), host.cams(part).to(self.device)
                features, pairs = refiner.encode_backgrounds(img, cam, self.train.labels[start : start + 50].to(self.device))
                rows.append((features, pairs + torch.tensor([start, 0])))
            return [torch.cat([features for features, _ in rows]), torch.cat([pairs for _, pairs in rows])]

        features, pairs = self.kept("backgrounds", make)
        return features, pairs

    # ------------------------------------------------------------------------------------------------ figures

    def figures(self, cams: List[Tuple[Split, Tensor]], edges: bool) -> Dict[str, float]:
        (val, val_cam), (test, test_cam) = cams
        return self.data.score(soft_masks(val, val_cam, edges), val, soft_masks(test, test_cam, edges), test)


def newest_parts(out: Path) -> Path:
    """The folder of the weights that `python -m examples.ablation --out OUT` has kept last.

    Raises:
        ValueError: if it has kept none.
    """
    folders = sorted(out.glob("parts_*"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise ValueError(f"--ablation: {out} holds no weights; run python -m examples.ablation first")
    return folders[-1]


def kept_file(parts: Path, row: str, seed: int) -> Path:
    """The file of the weights of a row."""
    return parts / f"seed_{seed}" / f"{slug(row)}.pt"


def kept_host(parts: Path, row: str, seed: int, num_classes: int) -> SmallHost:
    """The demo's host with the weights of a row."""
    host = make_host("demo", num_classes)
    host.load_state_dict(torch.load(kept_file(parts, row, seed), weights_only=True))
    return host


def soft_masks(split: Split, cam: Tensor, edges: bool) -> Tensor:
    """Masks (N, C, S, S) of CAMs (N, C, h, w), normalized, and aligned to the edges of the images if asked for."""
    size = split.images.shape[-2:]
    dense = torch.zeros(len(cam), cam.shape[1], *size)
    for start in range(0, len(cam), 50):
        part = slice(start, start + 50)
        pairs = positive_pairs(split.labels[part])
        found = pair_masks(cam[part], pairs, (size[0], size[1]), "minmax", 1e-6)
        if edges:
            found = align_masks(split.images[part], found, pairs, "pamr")
        dense[part][pairs[:, 0], pairs[:, 1]] = found
    return dense


class RawImages(PromptRefiner):
    """Feeds CLIP images with ImageNet's statistics, as the reference recipe does, also where the host takes others."""

    def _check(self, img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        img, cam, labels = super()._check(img, cam, labels)
        if self.image_stats is None:
            mean, std = (torch.tensor(v, device=img.device)[:, None, None] for v in (MEAN, STD))
            img = (img - mean) / std
        return img, cam, labels
