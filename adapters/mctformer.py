"""MCTformer+ (CVPR 2022, TPAMI 2024): class tokens of a ViT attend to the patches; a 3x3 convolution classifies the patches.

Facts of the host: `head` gives a class map (B, C, h, w) per patch; every block returns `(tokens, attention)`; the CAM of its
inference is sqrt(A relu(F)) with A the class-to-patch attention, mean over the last `layers` blocks and all heads, and F the
class map. It returns that CAM detached, so it is rebuilt here from the live tensors.
"""

from __future__ import annotations

from typing import Any, Dict

import torch
from torch import Tensor, nn

from .._torch import full_precision
from .attention import attention_of, blocks_of, spread
from .sources import CamSource, Records

__all__ = ["MCTformer", "safe_sqrt"]

FLOOR = 1e-8


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, a straight line below 1e-8, so that the slope is at most 1e4, also at 0."""
    return torch.where(x > FLOOR, x.clamp_min(FLOOR).sqrt(), x / FLOOR**0.5)


class MCTformer(CamSource):
    """The CAM of MCTformer+.

    Args:
        cam: `"fused"`: sqrt(A relu(F)), what the host calls `fused`; `"patch"`: relu(F), its `patchcam`; `"refined"`: the
            fused CAM after the patch-to-patch attention (sum over blocks, mean over heads), as the host's CAM files hold it.
        layers: blocks, counted from the last, whose attention counts; the host's `--layer-index`.
    """

    name = "MCTformer"
    image_stats = "imagenet"

    def __init__(self, cam: str = "fused", layers: int = 12):
        if cam not in ("fused", "patch", "refined"):
            raise ValueError(f"`cam` must be 'fused', 'patch' or 'refined'; got {cam!r}.")
        if layers < 1:
            raise ValueError(f"`layers` must be at least 1; got {layers!r}.")
        self.kind, self.layers = cam, layers

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        found = self.find(model, {"head": nn.Conv2d, "blocks": nn.ModuleList, "patch_embed": nn.Module}, self.name)
        return {"head": found["head"]} if self.kind == "patch" else {"head": found["head"], **blocks_of(found)}

    def cam(self, img: Tensor, output: Any, records: Records) -> Tensor:
        with full_precision(records["head"].device):  # the host may run under autocast
            return self._cam(records)

    def _cam(self, records: Records) -> Tensor:
        maps = records["head"].float().relu()  # (B, C, h, w)
        if self.kind == "patch":
            return maps
        batch, classes, height, width = maps.shape
        attention = attention_of(records, self.name)
        rows = [a[:, :, :classes, classes:].float().mean(1) for a in attention[-self.layers :]]
        fused = safe_sqrt(torch.stack(rows).mean(0).reshape(maps.shape) * maps)
        if self.kind == "fused":
            return fused
        affinity = torch.stack([a[:, :, classes:, classes:].float().mean(1) for a in attention]).sum(0)  # (B, N, N)
        return spread(affinity, fused)
