"""Small helpers around torch and transformers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ContextManager, Dict, List

import torch

__all__ = ["full_precision", "missing_weights"]


def full_precision(device: torch.device) -> ContextManager[Any]:
    """No autocast on `device`: text features and similarities stay in float32."""
    if device.type in ("cuda", "cpu", "xpu"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def missing_weights(loading_info: Dict[str, Any]) -> List[str]:
    """Names of the weights that transformers filled at random, since the file lacks them or has them in another shape.

    Args:
        loading_info: second result of `from_pretrained(..., output_loading_info=True)`.
    """
    mismatched = [key if isinstance(key, str) else key[0] for key in loading_info["mismatched_keys"]]  # or (key, shape, shape)
    return sorted({key for key in [*loading_info["missing_keys"], *mismatched] if not key.endswith("position_ids")})
