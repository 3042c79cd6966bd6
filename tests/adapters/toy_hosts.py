"""Tiny hosts with the interfaces of MCTformer+, WeakTr and TransCAM, a plain CNN and a plain ViT, and their training loops.

Only names, signatures, outputs and the shape of the loops follow the hosts; nothing here is theirs. `return_att=True` gives the
CAM of a host's inference, detached as the hosts do; `keep_graph=True` is for the tests, to compare gradients with.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = ["boat", "train", "bird"]
SIZE, PATCH, WIDTH, HEADS, DEPTH = 32, 8, 8, 2, 3
Loader = Iterable[Tuple[Tensor, Tensor]]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make_loader(count: int = 1, seed: int = 0, size: Tuple[int, int] = (SIZE, SIZE), num_classes: int = 3) -> List[Any]:
    """Batches of two images with ImageNet statistics, three positive labels each."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for k in range(count):
        img = (torch.rand(2, 3, *size, generator=generator) - MEAN) / STD
        labels = torch.zeros(2, num_classes)
        labels[0, k % num_classes] = labels[0, (k + 1) % num_classes] = labels[1, (k + 2) % num_classes] = 1
        batches.append((img, labels))
    return batches


# ------------------------------------------------------------------------------------------------ parts


class PatchEmbed(nn.Module):
    def __init__(self, width: int = WIDTH, patch: int = PATCH):
        super().__init__()
        self.patch_size = (patch, patch)
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Self-attention and a small MLP; returns what its host's blocks return."""

    def __init__(self, gives: str, width: int = WIDTH, heads: int = HEADS):
        super().__init__()
        self.gives, self.heads = gives, heads
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Any:
        batch, count, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (4 * q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, N, N)
        feats = (weights @ v).transpose(1, 2).reshape(batch, count, width)
        x = x + self.proj(feats)
        x = x + self.mlp(x)
        return {"tokens": x, "attention": (x, weights), "features": (x, weights, feats)}[self.gives]


def root(x: Tensor) -> Tensor:
    """sqrt(x) with a zero gradient at 0."""
    return torch.where(x > 0, x, torch.ones_like(x)).sqrt() * (x > 0)


class Tokens(nn.Module):
    """Class tokens and patches through the blocks; base of the two hosts of that family."""

    def __init__(self, gives: str, num_classes: int, seed: int):
        super().__init__()
        self.num_classes = num_classes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patch_embed = PatchEmbed()
            self.cls_token = nn.Parameter(torch.randn(1, num_classes, WIDTH))
            self.pos_embed = nn.Parameter(0.1 * torch.randn(1, (SIZE // PATCH) ** 2, WIDTH))
            self.blocks = nn.ModuleList([Block(gives) for _ in range(DEPTH)])
            self.head = nn.Conv2d(WIDTH, num_classes, 3, padding=1)

    def walk(self, img: Tensor) -> Tuple[List[Tensor], Tensor, List[Tensor], Tensor]:
        """Class tokens after every block, patch tokens, attention of every block, class map."""
        x = self.patch_embed(img)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x + self.pos_embed], dim=1)
        stages, attention = [], []
        for block in self.blocks:
            x, weights = block(x)[:2]
            stages.append(x[:, : self.num_classes])
            attention.append(weights)
        height, width = img.shape[2] // PATCH, img.shape[3] // PATCH
        patches = x[:, self.num_classes :].transpose(1, 2).reshape(len(x), -1, height, width)
        return stages, patches, attention, self.head(patches)


# ------------------------------------------------------------------------------------------------ MCTformer+


class ToyMCTformer(Tokens):
    def __init__(self, num_classes: int = 3, seed: int = 0):
        super().__init__("attention", num_classes, seed)

    def forward(
        self,
        x: Tensor,
        return_att: bool = False,
        n_layers: int = 12,
        attention_type: str = "fused",
        keep_graph: bool = False,
    ) -> Any:
        stages, _, attention, maps = self.walk(x)
        logits, patch_logits = stages[-1].mean(-1), maps.mean((2, 3))
        if not return_att:
            return [logits, torch.stack(stages), patch_logits]
        c = self.num_classes
        cams = maps.relu()
        mean = torch.stack(attention).mean(2)  # (blocks, B, N, N)
        if attention_type == "fused":
            cams = root(mean[-n_layers:].mean(0)[:, :c, c:].reshape(maps.shape) * cams)
        patch_attn = mean[:, :, c:, c:]
        return (logits, cams, patch_attn) if keep_graph else (logits, cams.detach().clone(), patch_attn.detach().clone())


def mctformer_cam(model: nn.Module, img: Tensor, kind: str = "fused", **options: Any) -> Tensor:
    """As the host's script for CAM files does it."""
    attention_type = "patchcam" if kind == "patch" else "fused"
    _, cams, patch_attn = model(img, return_att=True, attention_type=attention_type, **options)
    if kind == "refined":
        cams = torch.matmul(patch_attn.sum(0)[:, None], cams.flatten(2)[..., None]).reshape(cams.shape)
    return cams


def train_mctformer(
    model: nn.Module,
    data_loader: Loader,
    optimizer: torch.optim.Optimizer,
    loss_scaler: Optional[Callable[..., None]] = None,
    autocast: bool = False,
    label_losses: int = 2,
) -> List[float]:
    """`train_one_epoch`: up to two label losses and a regulariser under autocast, a callable scaler. The losses it saw."""
    model.train()
    seen = []
    for samples, targets in data_loader:
        with amp(autocast):
            outputs = model(samples)
            patch_outputs = None
            if not isinstance(outputs, Tensor):
                outputs, embeddings, patch_outputs = outputs
            loss = F.multilabel_soft_margin_loss(outputs, targets)
            if label_losses > 1:
                loss = loss + F.multilabel_soft_margin_loss(patch_outputs, targets)
            loss = loss + regulariser(embeddings)
        seen.append(loss.item())
        optimizer.zero_grad()
        (loss_scaler or Scaler())(loss, optimizer, clip_grad=None, parameters=model.parameters())
    return seen


def regulariser(embeddings: Tensor) -> Tensor:
    """Class embeddings of one image should differ."""
    directions = F.normalize(embeddings.float(), dim=-1)
    return 0.1 * (directions @ directions.transpose(-2, -1)).square().mean()


class Scaler:
    """loss x scale, backward, gradients / scale, step: what a gradient scaler does."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip_grad: Any = None, parameters: Any = None) -> None:
        (self.scale * loss).backward()
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self.scale
        optimizer.step()


def amp(on: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if on else contextlib.nullcontext()


# ------------------------------------------------------------------------------------------------ WeakTr


class Fusion(nn.Module):
    """One weight per attention head from its (detached) attention; the heads of all blocks, heads outermost."""

    def __init__(self, heads: int = HEADS * DEPTH):
        super().__init__()
        self.attn_head_ffn = nn.Sequential(nn.Linear(heads, 2 * heads), nn.ReLU(), nn.Linear(2 * heads, heads), nn.Sigmoid())

    def forward(self, attention: List[Tensor]) -> Tuple[Tensor, Tensor]:
        every = torch.stack([weights.detach() for weights in attention], dim=2).flatten(1, 2)  # (B, heads x blocks, N, N)
        weights = self.attn_head_ffn(10 * every.std((2, 3)))
        return weights, (weights[..., None, None] * every).mean(1)


class ToyWeakTr(Tokens):
    def __init__(self, num_classes: int = 3, seed: int = 0):
        super().__init__("features", num_classes, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            self.adaptive_attention_fusion = Fusion()

    def forward(self, x: Tensor, return_att: bool = False, attention_type: str = "fused", keep_graph: bool = False) -> Any:
        stages, _, attention, maps = self.walk(x)
        weights, fused = self.adaptive_attention_fusion(attention)
        c = self.num_classes
        if keep_graph:
            fused = (weights[..., None, None] * torch.stack(attention, dim=2).flatten(1, 2)).mean(1)
        cams = (maps if keep_graph else maps.detach()).relu()
        if attention_type == "fused":
            cams = fused[:, :c, c:].reshape(maps.shape) * cams
        if return_att:
            return stages[-1].mean(-1), cams if keep_graph else cams.detach(), fused[:, c:, c:]
        return stages[-1].mean(-1), maps.mean((2, 3)), 100 * cams.mean((2, 3))


def weaktr_cam(model: nn.Module, img: Tensor, kind: str = "fused", **options: Any) -> Tensor:
    attention_type = "patchcam" if kind == "patch" else "fused"
    _, cams, patch_attn = model(img, return_att=True, attention_type=attention_type, **options)
    if kind == "refined":
        cams = torch.matmul(patch_attn[:, None], cams.flatten(2)[..., None]).reshape(cams.shape)
    return cams


def train_weaktr(
    model: nn.Module,
    data_loader: Loader,
    optimizer: torch.optim.Optimizer,
    loss_scaler: Optional[Callable[..., None]] = None,
    autocast: bool = False,
) -> List[float]:
    """Three label losses."""
    model.train()
    seen = []
    for samples, targets in data_loader:
        with amp(autocast):
            cls_logits, patch_logits, cam_logits = model(samples)
            loss = F.multilabel_soft_margin_loss(cls_logits, targets)
            loss += F.multilabel_soft_margin_loss(patch_logits, targets)
            loss += F.multilabel_soft_margin_loss(cam_logits, targets)
        seen.append(loss.item())
        optimizer.zero_grad()
        (loss_scaler or Scaler())(loss, optimizer, parameters=model.parameters())
    return seen


# ------------------------------------------------------------------------------------------------ TransCAM


class ToyTransCAM(nn.Module):
    def __init__(self, num_classes: int = 3, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, PATCH, stride=PATCH), nn.BatchNorm2d(WIDTH), nn.ReLU())
            self.trans_block = Block("attention")
            self.conv_cls_head = nn.Conv2d(WIDTH, num_classes + 1, 1)
            self.trans_cls_head = nn.Linear(WIDTH, num_classes + 1)

    def forward(self, mode: str, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        if mode != "transcam":
            raise ValueError(mode)
        features = self.stem(x)
        tokens, weights = self.trans_block(features.flatten(2).transpose(1, 2))
        maps = self.conv_cls_head(features)  # (B, C + 1, h, w)
        cams = torch.matmul(weights.mean(1)[:, None], maps.flatten(2)[..., None]).reshape(maps.shape)
        return maps.mean((2, 3), keepdim=True), self.trans_cls_head(tokens.mean(1)), cams


def transcam_cam(model: nn.Module, img: Tensor, kind: str = "fused", keep_graph: bool = False) -> Tensor:
    cams = model("transcam", img)[2][:, 1:]
    cams = cams.relu() if kind == "fused" else cams
    return cams if keep_graph else cams.detach()


def train_transcam(model: nn.Module, data_loader: Loader, optimizer: torch.optim.Optimizer) -> List[float]:
    """The loop of a script: a column of ones for the background, one label loss without it."""
    model.train()
    seen = []
    for img, label in data_loader:
        label = torch.cat([torch.ones(len(label), 1), label], dim=1)[:, :, None, None]  # (B, C + 1, 1, 1)
        logits, _, _ = model("transcam", img)
        loss = F.multilabel_soft_margin_loss(logits[:, 1:], label[:, 1:])
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


# ------------------------------------------------------------------------------------------------ without an adapter


class ToyCNN(nn.Module):
    """Convolutions, global mean, one linear layer."""

    def __init__(self, num_classes: int = 3, seed: int = 0, dropout: float = 0.0, wide: int = WIDTH):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, wide, 4, stride=4), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU()
            )
            self.dropout = nn.Dropout(dropout)
            self.fc = nn.Linear(wide, num_classes)

    def forward(self, img: Tensor) -> Tensor:
        return self.fc(self.dropout(self.body(img).mean((2, 3))))


class ToyViT(nn.Module):
    """One class token (or more), one linear layer on it; a class map only by `norm` and `head`."""

    def __init__(self, num_classes: int = 3, seed: int = 0, prefix: int = 1):
        super().__init__()
        self.prefix = prefix
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patch_embed = PatchEmbed()
            self.cls_token = nn.Parameter(torch.randn(1, prefix, WIDTH))
            self.blocks = nn.Sequential(Block("tokens"), Block("tokens"))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, img: Tensor) -> Tensor:
        x = self.patch_embed(img)
        x = self.norm(self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)))
        return self.head(x[:, : self.prefix].mean(1) if self.prefix else x.mean(1))


def cnn_cam(model: ToyCNN, img: Tensor, keep_graph: bool = False) -> Tensor:
    cams = F.conv2d(model.body(img), model.fc.weight[:, :, None, None])
    return cams if keep_graph else cams.detach()


def vit_cam(model: ToyViT, img: Tensor, keep_graph: bool = False) -> Tensor:
    x = model.patch_embed(img)
    x = model.norm(model.blocks(torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)))
    rows = [[model.head.weight @ x[b, n] for n in range(model.prefix, x.shape[1])] for b in range(len(x))]
    cams = torch.stack([torch.stack(row) for row in rows]).transpose(1, 2)
    cams = cams.reshape(len(x), -1, img.shape[2] // PATCH, img.shape[3] // PATCH)
    return cams if keep_graph else cams.detach()


def train_plain(
    model: nn.Module,
    data_loader: Loader,
    optimizer: torch.optim.Optimizer,
    criterion: Callable[..., Tensor] = F.multilabel_soft_margin_loss,
) -> List[float]:
    model.train()
    seen = []
    for img, labels in data_loader:
        loss = criterion(model(img), labels)
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


# ------------------------------------------------------------------------------------------------ all of them


class Toy(NamedTuple):
    """A toy host as the tests go through them."""

    name: str
    host: str
    build: Callable[..., nn.Module]
    train: Callable[..., List[float]]
    cam: Callable[..., Tensor]
    options: dict


_CNN, _VIT = {"features": "body", "classifier": "fc"}, {"features": "norm", "classifier": "head"}
TOYS = [
    Toy("mctformer", "mctformer", ToyMCTformer, train_mctformer, mctformer_cam, {}),
    Toy("weaktr", "weaktr", ToyWeakTr, train_weaktr, weaktr_cam, {}),
    Toy("transcam", "transcam", ToyTransCAM, train_transcam, transcam_cam, {}),
    Toy("cnn", "generic", ToyCNN, train_plain, cnn_cam, _CNN),
    Toy("vit", "generic", ToyViT, train_plain, vit_cam, _VIT),
]


# ------------------------------------------------------------------------------------------------ without a label loss


class Decoder(nn.Module):
    """Logits with background at every place; takes labels as an argument. Its loss is over places."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.decoder = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 4, 1)

    def forward(self, img: Tensor, scale: float = 1.0, cls_label: Any = None) -> Tensor:
        return scale * self.decoder(self.body(img))


DECODER = {"cam": "decoder", "background_channel": True, "activation": "softmax"}


def pixel_loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, torch.zeros(len(logits), *logits.shape[2:], dtype=torch.long))
