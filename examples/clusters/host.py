"""The ablation's host: a small vision transformer with one token per class, laid out as in timm and MCTformer.

It contains nothing of CLIP or of clusters. The demo's `train_host` trains it with a classification loss on both of its logits.
Layout: `blocks` return (tokens, attention); class tokens come before patch tokens; `head` is a convolution over the patches.
"""

from __future__ import annotations

from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from ..demo.world import KIN, SIZE


class ViTOutput(NamedTuple):
    """`cam` (B, C, h, w); `logits` (B, C), pooled from the CAM; `token_logits` (B, C), from the class tokens."""

    cam: Tensor
    logits: Tensor
    token_logits: Tensor


class PatchEmbed(nn.Module):
    """Convolutional stem: images (B, 3, S, S) to tokens (B, N, D), N = (S / stride)^2, row by row."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        layers: List[nn.Module] = []
        channels = 3
        for step in [2] * (stride.bit_length() - 1) + [1]:
            out = width // 2 if channels == 3 else width
            layers += [nn.Conv2d(channels, out, 3, step, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.proj = nn.Sequential(*layers, nn.Conv2d(channels, width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Softmax attention in plain operations: tokens (B, T, D) to tokens (B, T, D) and weights (B, heads, T, T)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads) each
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2)), weights


class Block(nn.Module):
    """Pre-norm transformer block that also returns its attention weights."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        mixed, weights = self.attn(self.norm1(x))
        x = x + mixed
        return x + self.mlp(self.norm2(x)), weights


def rank_pool(maps: Tensor, decay: float) -> Tensor:
    """Maps (B, C, h, w) to (B, C): weighted mean of the values, weight decay^i for the i-th largest, as MCTformer+ pools."""
    ranked = maps.flatten(2).sort(dim=2, descending=True).values
    weights = decay ** torch.arange(ranked.shape[2], dtype=ranked.dtype, device=ranked.device)
    return (ranked * weights).sum(2) / weights.sum()


class ViTHost(nn.Module):
    """Vision transformer with C class tokens and a CAM over its patches.

    Args:
        num_classes: C.
        width: D, size of the tokens.
        depth: number of blocks.
        heads: attention heads of each block.
        stride: pixels per patch, a power of two.
        decay: of the weights in `rank_pool`; 1 is the mean.
    """

    def __init__(
        self,
        num_classes: int = len(KIN.things),
        width: int = 64,
        depth: int = 3,
        heads: int = 2,
        stride: int = 4,
        decay: float = 0.99,
    ):
        super().__init__()
        self.num_classes, self.grid, self.decay = num_classes, SIZE // stride, decay
        self.patch_embed = PatchEmbed(width, stride)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, num_classes, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_classes + self.grid**2, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Conv2d(width, num_classes, 3, 1, 1)
        self.token_head = nn.Linear(width, 1)

    def forward(self, img: Tensor) -> ViTOutput:
        patches = self.patch_embed((img - 0.5) / 0.25)
        x = torch.cat([self.cls_token.expand(len(img), -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x, _ = block(x)
        x = self.norm(x)
        maps = x[:, self.num_classes :].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        cam = self.head(maps)
        return ViTOutput(cam, rank_pool(cam, self.decay), self.token_head(x[:, : self.num_classes])[..., 0])

    def cam(self, img: Tensor) -> Tensor:
        return self(img).cam
