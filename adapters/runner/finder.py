"""Finding the host's model while its script runs: no script hands it over, so the first fitting one is taken."""

from __future__ import annotations

from typing import Any, Callable, List, Optional

import torch
from torch import nn

from ..._hooks import unwrap
from ...errors import HostError

__all__ = ["ModelFinder"]


class ModelFinder:
    """Waits, for the time of a `with`, for the host's model: the first that runs forward and passes `check`.

    Args:
        check: raises HostError if a network is not the host's.
        found: called with the model, or its wrapper, when its forward pass begins.
        training: count only forward passes in training mode with gradients.

    Attributes:
        model: the model, or None until it is found.
    """

    def __init__(self, check: Callable[[nn.Module], Any], found: Callable[[nn.Module], None], training: bool = True):
        self.check, self.found, self.training = check, found, training
        self.model: Optional[nn.Module] = None
        self.refused: List[str] = []  # types of the modules that ran and are not the host's

    def __enter__(self) -> "ModelFinder":
        self.handle = nn.modules.module.register_module_forward_pre_hook(self._hook)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()

    def _hook(self, module: nn.Module, inputs: Any) -> None:
        inner = unwrap(module)
        if self.training and not (torch.is_grad_enabled() and inner.training):
            return
        try:
            self.check(inner)
        except HostError:
            if type(inner).__name__ not in self.refused:
                self.refused.append(type(inner).__name__)
            return
        self.handle.remove()
        self.model = module
        self.found(module)

    def model_of(self, script: str, what: str) -> nn.Module:
        """The model, at the end of the script.

        Args:
            script: name of the script, for the message.
            what: the kind of model that was looked for, for the message.

        Raises:
            HostError: if there was none.
        """
        if self.model is not None:
            return self.model
        verb, mode, it = ("training", " in training mode", "the training script") if self.training else ("running", "", "it")
        raise HostError(
            f"{script} ended without {verb} {what}. Modules that ran{mode}: "
            f"{', '.join(self.refused[:12]) or 'none'}. Is this {it}, and the right adapter?"
        )
