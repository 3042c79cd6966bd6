"""Finding the host's network while its code runs, where nobody hands it over. Flow: **finder** -> `loop`."""

from __future__ import annotations

import sys
from typing import Any, Callable, Dict, Mapping, Optional

import torch
from torch import nn

from .._hooks import unwrap
from .._text import listing
from ..errors import HostError

__all__ = ["ModelFinder"]


class ModelFinder:
    """Waits, for the time of a `with`, for the host's network: the first that runs forward and passes `check`.

    Args:
        check: raises HostError if a network is not the host's.
        found: called with the network, or its wrapper, and its arguments, when its forward pass begins.
        training: count only forward passes in training mode with gradients.
        network: class name of the network; by default any.

    Attributes:
        model: the network, or None until it is found.
    """

    def __init__(
        self,
        check: Callable[[nn.Module], Any],
        found: Callable[[nn.Module, Any, Mapping[str, Any]], None],
        training: bool = True,
        network: Optional[str] = None,
    ):
        self.check, self.found, self.training, self.network = check, found, training, network
        self.model: Optional[nn.Module] = None
        self._refused: Dict[str, str] = {}  # type of each network that ran and is not the host's -> why
        self._first: Optional[str] = None  # the first of them, which is the outermost that ran
        self._handle: Any = None

    def __enter__(self) -> "ModelFinder":
        self._handle = nn.modules.module.register_module_forward_pre_hook(self._hook)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._handle.remove()

    def _hook(self, module: nn.Module, inputs: Any) -> None:
        inner = unwrap(module)
        if self.training and not (torch.is_grad_enabled() and inner.training):
            return
        name = type(inner).__name__
        if name in self._refused and self.network is not None and name != self.network:
            return
        try:
            if self.network is not None and name != self.network:
                raise HostError(f"{self.network} is waited for.")
            self.check(inner)
        except HostError as error:
            self._refused.setdefault(name, str(error))
            self._first = self._first or name
            return
        self._handle.remove()
        self.model = module
        self.found(module, inputs, _keywords_of_the_call())

    def none_fits(self, script: str, what: str) -> HostError:
        """The error for a script that ended without the network.

        Args:
            script: name of the script, for the message.
            what: the kind of network that was looked for, for the message.
        """
        verb, mode, it = ("trained", " in training mode", "the training script") if self.training else ("ran", "", "it")
        which = what if self.network is None else f"{self.network}, {what}"
        why = "" if self._first is None else f" {self._refused[self._first]}"
        return HostError(
            f"{script} {verb} without {which}. Modules that ran{mode}: {listing(self._refused, quote=False)}. Is this {it}, "
            f"and the right adapter?{why}"
        )


def _keywords_of_the_call() -> Mapping[str, Any]:
    """The keyword arguments of the module call that a hook on all modules was called from; torch does not hand them over."""
    frame = sys._getframe(1)
    for _ in range(5):
        if frame.f_code.co_name in ("inner", "_call_impl") and isinstance(frame.f_locals.get("kwargs"), dict):
            return dict(frame.f_locals["kwargs"])
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}
