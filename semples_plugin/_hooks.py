"""What everything that hooks into a host needs: hooks that do not outlive it in copies, wrappers, devices."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple, Union

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["Hook", "follow", "unwrap"]


class Hook:
    """A hook of ours on a host. In a copy of the host, or a file of the whole host, it does nothing.

    Args:
        function: what the hook does.
        owner: whose it is, so that a second one of the same kind can be refused.
    """

    def __init__(self, function: Optional[Callable[..., Any]] = None, owner: Any = None):
        self.function, self.owner = function, owner

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> Tuple[Any, ...]:
        return Hook, ()


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel / DistributedDataParallel."""
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return model


def follow(module: nn.Module, place: Union[torch.device, nn.Module]) -> None:
    """Move a module of ours, all of it, to a device, or to where the host is (if it has parameters)."""
    if isinstance(place, nn.Module):
        first = next(unwrap(place).parameters(), None)
        if first is None:
            return
        place = first.device
    device = place
    if any(p.device != device for p in module.parameters()):
        module.to(device)
