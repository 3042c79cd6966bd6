"""Attention of a host's transformer blocks: where to find it, and how a CAM is spread by it. For MCTformer and WeakTr."""

from __future__ import annotations

from typing import Dict, List, Mapping

import torch
from torch import Tensor, nn

from ..errors import HostError
from .sources import Records

__all__ = ["attention_of", "blocks_of", "spread"]


def blocks_of(found: Mapping[str, nn.Module]) -> Dict[str, nn.Module]:
    """The transformer blocks of a host by name, first to last.

    Args:
        found: what `CamSource.find` found, with the list of blocks under `blocks`.
    """
    return {f"blocks.{i}": block for i, block in found["blocks"].named_children()}


def attention_of(records: Records, host: str) -> List[Tensor]:
    """Attention (B, heads, N, N) of every block, first to last; a block's output is `(tokens, attention, ...)`.

    Raises:
        HostError: if a block returned something else.
    """
    maps = []
    for name in records.names():
        if not name.startswith("blocks."):
            continue
        output = records[name]
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4):
            raise HostError(
                f"Expected {name} of {host} to return (tokens, attention (B, heads, N, N)); got {type(output).__name__}."
            )
        maps.append(output[1])
    return maps


def spread(affinity: Tensor, cam: Tensor) -> Tensor:
    """cam (B, C, h, w) times affinity (B, h w, h w): every patch gathers from the patches it attends to."""
    return torch.einsum("bnm,bcm->bcn", affinity, cam.flatten(2)).reshape(cam.shape)
