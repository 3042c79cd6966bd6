"""Finding the host's network while its code runs, where nobody hands it over. Flow: **finder** -> `loop`."""

from __future__ import annotations

import contextlib
import sys
import weakref
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
        by_parts: whether the network is called by a method, which no hook sees: then it is found when a part of it runs that
            was registered in this `with`, and `found` gets no arguments.

    Attributes:
        model: the network, or None until it is found.
    """

    def __init__(
        self,
        check: Callable[[nn.Module], Any],
        found: Callable[[nn.Module, Any, Mapping[str, Any]], None],
        training: bool = True,
        network: Optional[str] = None,
        by_parts: bool = False,
    ):
        self.check, self.found, self.training, self.network = check, found, training, network
        self.model: Optional[nn.Module] = None
        self._refused: Dict[str, str] = {}  # type of each network that ran and is not the host's -> why
        self._first: Optional[str] = None  # the first of them, which is the outermost that ran
        self._by_parts = by_parts
        self._parents: "weakref.WeakKeyDictionary[nn.Module, nn.Module]" = weakref.WeakKeyDictionary()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ModelFinder":
        hooks = nn.modules.module
        self._stack.callback(hooks.register_module_forward_pre_hook(self._hook).remove)
        if self._by_parts:
            self._stack.callback(hooks.register_module_module_registration_hook(self._registered).remove)
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        self._parents.clear()

    def _registered(self, parent: nn.Module, name: str, part: Any) -> None:
        if isinstance(part, nn.Module) and part is not parent:
            self._parents[part] = parent

    def _whole(self, part: nn.Module) -> nn.Module:
        """The network that a part was registered in, however deep."""
        for _ in range(100):
            if part not in self._parents:
                break
            part = self._parents[part]
        return part

    def _hook(self, module: nn.Module, inputs: Any) -> None:
        whole = self._whole(module) if self._by_parts else module
        inner = unwrap(whole)
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
        self._stack.close()
        self.model = whole
        if whole is module:
            self.found(module, inputs, _keywords_of_the_call())
        else:
            self.found(whole, None, {})

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
