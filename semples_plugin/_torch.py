"""Small helpers around torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ContextManager

import torch

__all__ = ["full_precision"]


def full_precision(device: torch.device) -> ContextManager[Any]:
    """No autocast on `device`: text features and similarities stay in float32."""
    if device.type in ("cuda", "cpu", "xpu"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
