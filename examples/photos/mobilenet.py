"""MobileNetV2 features (Sandler et al., CVPR 2018), pretrained on ImageNet: 1280 channels at a 32nd of the image's size.

The weights, a safetensors file, have the names `features.0`, `features.1..17.{expand,depth,project}` and `features.18`, with
batch norm folded in, as they come out of a TensorFlow model: images in [-1, 1], stride 2 padded below and to the right.
"""

from __future__ import annotations

import os
from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD

# expansion, output channels, blocks, stride of the first block (Table 2 of the paper)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
LAST_STAGE = 14  # number of the first block of the stage with 160 channels


class Convolution(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME does for even sizes: with stride 2, one row below, one column to the right."""

    def forward(self, x: Tensor) -> Tensor:
        reach = self.dilation[0] * (self.kernel_size[0] // 2)
        around = (0, reach, 0, reach) if self.stride[0] == 2 else (reach,) * 4
        return super().forward(F.pad(x, around)) if reach else super().forward(x)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise convolution, linear 1x1 projection."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int, dilation: int):
        super().__init__()
        hidden = channels * expansion
        if expansion > 1:
            self.expand = Convolution(channels, hidden, 1)
        self.depth = Convolution(hidden, hidden, 3, stride, dilation=dilation, groups=hidden)
        self.project = Convolution(hidden, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if hasattr(self, "expand") else x
        y = self.project(F.relu6(self.depth(y)))
        return x + y if self.residual else y


class Activated(Convolution):
    """A convolution with ReLU6 after it: the first and the last layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(super().forward(x))


class MobileNetV2Features(nn.Module):
    """Images (B, 3, H, W) with the statistics `stats` (mean, std) -> features (B, 1280, H / 32, W / 32).

    With `output_stride=16` the last stride is taken back and the convolutions after it are dilated: (B, 1280, H / 16, W / 16).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, stats: Tuple[Sequence[float], Sequence[float]], output_stride: int = 32):
        super().__init__()
        layers: List[nn.Module] = [Activated(3, 32, 3, 2)]
        channels = 32
        for expansion, out, count, stride in STAGES:
            for i in range(count):
                step, dilation = (stride if i == 0 else 1), 1
                if output_stride == 16 and len(layers) >= LAST_STAGE:
                    dilation = 1 if len(layers) == LAST_STAGE else 2
                    step = 1
                layers.append(Block(channels, out, expansion, step, dilation))
                channels = out
        self.features = nn.Sequential(*layers, Activated(channels, 1280, 1))
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in stats)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * (x * self.scale + self.mean) - 1
        return self.features(x.contiguous(memory_format=torch.channels_last))


def load_mobilenet(path: str, stats: Tuple[Sequence[float], Sequence[float]], output_stride: int = 32) -> MobileNetV2Features:
    """The pretrained features for images with the statistics `stats`, (mean, std) of three values each."""
    from safetensors.torch import load_file

    network = MobileNetV2Features(stats, output_stride)
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return network.to(memory_format=torch.channels_last)


def load_imagenet_head(path: str) -> Tuple[Tensor, Tensor]:
    """Weight (1001, 1280) and bias (1001) of the ImageNet classifier on the mean of the features; row 0 is background."""
    from safetensors.torch import load_file

    saved = load_file(path)
    return saved["weight"].float() * saved["scale"][:, None], saved["bias"]


def clip_tower() -> nn.Module:
    """Pretrained features for `python -m examples.train_clip --tower examples/photos/mobilenet.py:clip_tower`.

    The environment variable `MOBILENET` names the weights file.
    """
    if "MOBILENET" not in os.environ:
        raise ValueError("Set MOBILENET to the safetensors file of MobileNetV2 features.")
    return load_mobilenet(os.environ["MOBILENET"], (CLIP_MEAN, CLIP_STD))
