"""Helpers for everything that hooks into a host.

`Hook`: a forward hook that does nothing in a copy of the host. `unwrap`: the network inside a parallel wrapper. `follow`: move
a module to the host's device.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple, Union

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["Hook", "follow", "unwrap"]


class Hook:
    """A hook of this package on a host. In a copy of the host, or in a host loaded from a file, it does nothing.

    Args:
        function: what the hook does.
        owner: name of the part that set it, so that a second hook of the same part can be refused.
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
    """Move a module of this package to a device, or to the device of a host (that of its first parameter, if it has any)."""
    if isinstance(place, nn.Module):
        first = next(unwrap(place).parameters(), None)
        if first is None:
            return
        place = first.device
    device = place
    if any(p.device != device for p in module.parameters()):
        module.to(device)
