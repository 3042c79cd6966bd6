"""SqueezeNet 1.1 features (Iandola et al., 2016), pretrained on ImageNet: 512 channels at a sixteenth of the image's size.

Layout and names of the weights are those of torchvision's `squeezenet1_1().features`; torchvision is not needed. The weights, a
safetensors file, must have been trained on BGR images in 0..255 minus the Caffe mean.
"""

from __future__ import annotations

import os
from typing import Sequence, Tuple

import torch
from torch import Tensor, nn

from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD

CAFFE_MEAN = (103.939, 116.779, 123.68)  # of B, G, R in 0..255


class Fire(nn.Module):
    """1x1 convolution to few channels, then a 1x1 and a 3x3 convolution side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


class SqueezeNetFeatures(nn.Module):
    """Images (B, 3, H, W) with the statistics `stats` (mean, std) -> features (B, 512, H / 16, W / 16), sizes rounded down."""

    mean: Tensor
    scale: Tensor

    def __init__(self, stats: Tuple[Sequence[float], Sequence[float]]):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            Fire(64, 16, 64), Fire(128, 16, 64), nn.MaxPool2d(3, 2),
            Fire(128, 32, 128), Fire(256, 32, 128), nn.MaxPool2d(3, 2),
            Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
        )  # fmt: skip
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in stats)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", std, persistent=False)
        self.register_buffer("caffe", torch.tensor(CAFFE_MEAN).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = 255 * (x * self.scale + self.mean)
        return self.features(x.flip(1) - self.caffe)


def load_squeezenet(path: str, stats: Tuple[Sequence[float], Sequence[float]]) -> SqueezeNetFeatures:
    """The pretrained features for images with the statistics `stats`, (mean, std) of three values each."""
    from safetensors.torch import load_file

    network = SqueezeNetFeatures(stats)
    network.load_state_dict(load_file(path))
    return network


def clip_tower() -> nn.Module:
    """Pretrained features for `python -m examples.train_clip --tower examples/photos/squeezenet.py:clip_tower`.

    The environment variable `SQUEEZENET` names the weights file.
    """
    if "SQUEEZENET" not in os.environ:
        raise ValueError("Set SQUEEZENET to the safetensors file of SqueezeNet 1.1 features.")
    return load_squeezenet(os.environ["SQUEEZENET"], (CLIP_MEAN, CLIP_STD))
