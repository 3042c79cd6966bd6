"""WeakTr (2023): an adaptive fusion weighs the attention heads of a ViT with class tokens.

Facts of the host: `head` gives a class map (B, C, h, w) per patch; every block returns `(tokens, attention, features)`;
`adaptive_attention_fusion.attn_head_ffn` gives one weight per head of every block, (B, heads x blocks), heads outermost. The
CAM of its inference is A relu(F) with A the weighted mean of class-to-patch attention and F the class map. The host detaches
attention and class map there, so the CAM is rebuilt here from the live tensors: the loss reaches the backbone through the
class map and the attention, and the fusion through its weights.
"""

from __future__ import annotations

from typing import Any, Dict

import torch
from torch import Tensor, nn

from .._torch import full_precision
from .attention import attention_of, blocks_of, spread
from .sources import CamSource, Records

__all__ = ["WeakTr"]

WEIGHTS = "adaptive_attention_fusion.attn_head_ffn"


class WeakTr(CamSource):
    """The CAM of WeakTr.

    Args:
        cam: `"fused"`: A relu(F), what the host calls `fused`; `"patch"`: relu(F), its `patchcam`; `"refined"`: the fused CAM
            after the weighted patch-to-patch attention, as the host's CAM files hold it.
    """

    name = "WeakTr"
    image_stats = "imagenet"

    def __init__(self, cam: str = "fused"):
        if cam not in ("fused", "patch", "refined"):
            raise ValueError(f"`cam` must be 'fused', 'patch' or 'refined'; got {cam!r}.")
        self.kind = cam

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        found = self.find(model, {"head": nn.Conv2d, "blocks": nn.ModuleList, WEIGHTS: nn.Module}, self.name)
        if self.kind == "patch":
            return {"head": found["head"]}
        return {"head": found["head"], WEIGHTS: found[WEIGHTS], **blocks_of(found)}

    def cam(self, img: Tensor, output: Any, records: Records) -> Tensor:
        with full_precision(records["head"].device):  # the host may run under autocast
            return self._cam(records)

    def _cam(self, records: Records) -> Tensor:
        maps = records["head"].float().relu()  # (B, C, h, w)
        if self.kind == "patch":
            return maps
        batch, classes, height, width = maps.shape
        attention = attention_of(records, self.name)
        heads, blocks = attention[0].shape[1], len(attention)
        weights = records[WEIGHTS].float().view(batch, heads, blocks) / (heads * blocks)

        def fuse(rows: slice, columns: slice) -> Tensor:
            parts = [
                torch.einsum("bh,bhnm->bnm", weights[:, :, k], a[:, :, rows, columns].float()) for k, a in enumerate(attention)
            ]
            return torch.stack(parts).sum(0)

        fused = fuse(slice(0, classes), slice(classes, None)).reshape(maps.shape) * maps
        if self.kind == "fused":
            return fused
        return spread(fuse(slice(classes, None), slice(classes, None)), fused)
