"""How a host's label loss is recognized: a torch function mode sees every loss that the host computes.

Flow: a host's loss -> **label_loss** -> `loop.LoopWatcher`.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["LABEL_LOSSES", "LabelLoss", "LossTap"]

LABEL_LOSSES: Tuple[Callable[..., Tensor], ...] = (
    F.multilabel_soft_margin_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
)
LabelLoss = Union[None, nn.Module, Callable[..., Tensor]]


class LossTap(TorchFunctionMode):
    """Sees the losses that a host computes for the time of a `with`. Nothing is patched.

    Args:
        label_loss: an nn.Module `criterion(logits, labels)`, a function of torch.nn.functional, or None for `LABEL_LOSSES`.
        on_label_loss: (name, result, target) -> what takes the place of the result.
        on_other_loss: (name, target), for losses that are not looked for.
        on_backward: called before each `loss.backward()`.

    Raises:
        TypeError: if `label_loss` is none of these.
    """

    def __init__(
        self,
        label_loss: LabelLoss,
        on_label_loss: Callable[[str, Any, Any], Any],
        on_other_loss: Callable[[str, Any], None],
        on_backward: Callable[[], None],
    ):
        super().__init__()
        self.criterion = label_loss if isinstance(label_loss, nn.Module) else None
        self.functions = _functions(label_loss)
        self.on_label_loss, self.on_other_loss, self.on_backward = on_label_loss, on_other_loss, on_backward
        self._handle: Any = None

    def names(self) -> List[str]:
        """Names of the losses that are looked for."""
        if self.criterion is not None:
            return [type(self.criterion).__name__]
        return [getattr(function, "__name__", type(function).__name__) for function in self.functions]

    def __enter__(self) -> "LossTap":
        if self.criterion is not None:
            self._handle = self.criterion.register_forward_hook(self._on_criterion)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        super().__exit__(*error)

    def _on_criterion(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self.on_label_loss(type(module).__name__, output, inputs[1] if len(inputs) > 1 else None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self.on_backward()
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in self.functions:
            return self.on_label_loss(name, result, _target(args, kwargs))
        if ("_loss" in name or "cross_entropy" in name) and torch.is_grad_enabled():
            self.on_other_loss(name, _target(args, kwargs))
        return result


def _target(args: Tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("target")


def _functions(label_loss: Any) -> Tuple[Callable[..., Tensor], ...]:
    if label_loss is None:
        return LABEL_LOSSES
    if isinstance(label_loss, nn.Module):
        return ()
    if callable(label_loss) and getattr(label_loss, "__module__", "").startswith("torch"):
        return (label_loss,)
    raise TypeError(
        "`label_loss` must be a torch.nn.Module called as criterion(logits, labels), or a function of torch.nn.functional; got "
        f"{label_loss!r}. A loss of your own becomes one by wrapping it in a small nn.Module."
    )
