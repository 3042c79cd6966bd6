"""Where the refiner's loss is added: a torch function mode sees every loss that the host computes, and its `backward()`.

Flow: a host's loss -> **label_loss** -> `loop.LoopWatcher`.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .patches import replaced

__all__ = ["AT_BACKWARD", "LABEL_LOSSES", "LabelLoss", "LossTap"]

LABEL_LOSSES: Tuple[Callable[..., Tensor], ...] = (
    F.multilabel_soft_margin_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
)
AT_BACKWARD = "backward"
LabelLoss = Union[None, str, nn.Module, Callable[..., Tensor]]


class LossTap(TorchFunctionMode):
    """Sees the losses that a host computes for the time of a `with`.

    Nothing is patched, with one exception: at `"backward"` the `scale` method of torch's gradient scalers, since the loss has
    to be added before it is scaled.

    Args:
        label_loss: an nn.Module `criterion(logits, labels)`, a function of torch.nn.functional or its name, None for
            `LABEL_LOSSES`, or `"backward"` for the tensor that `backward()` is called on.
        on_label_loss: (name, result, target) -> what takes the place of the result.
        on_other_loss: (name, target), for losses that are not looked for.
        on_backward: called before each `loss.backward()` with the loss; what it returns takes the place of the loss.

    Raises:
        TypeError, ValueError: if `label_loss` is none of these.
    """

    def __init__(
        self,
        label_loss: LabelLoss,
        on_label_loss: Callable[[str, Any, Any], Any],
        on_other_loss: Callable[[str, Any], None],
        on_backward: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.at_backward = isinstance(label_loss, str) and label_loss == AT_BACKWARD
        self.criterion = label_loss if isinstance(label_loss, nn.Module) else None
        self.functions = () if self.at_backward else _functions(label_loss)
        self.on_label_loss, self.on_other_loss, self.on_backward = on_label_loss, on_other_loss, on_backward
        self._stack = contextlib.ExitStack()

    def names(self) -> List[str]:
        """Names of the losses that are looked for."""
        if self.criterion is not None:
            return [type(self.criterion).__name__]
        return [getattr(function, "__name__", type(function).__name__) for function in self.functions]

    def __enter__(self) -> "LossTap":
        with contextlib.ExitStack() as stack:
            if self.criterion is not None:
                handle = self.criterion.register_forward_hook(self._on_criterion)
                stack.callback(handle.remove)
            if self.at_backward:
                for scaler in {torch.cuda.amp.GradScaler, getattr(torch.amp, "GradScaler", torch.cuda.amp.GradScaler)}:
                    if "scale" in vars(scaler):
                        stack.enter_context(replaced(scaler, scale=self._scaling(scaler.scale)))
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._stack.close()

    def _scaling(self, scale: Callable[..., Any]) -> Callable[..., Any]:
        def scaled(scaler: Any, outputs: Any) -> Any:
            return scale(scaler, self.on_backward(outputs) if isinstance(outputs, Tensor) else outputs)

        return scaled

    def _on_criterion(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self.on_label_loss(type(module).__name__, output, inputs[1] if len(inputs) > 1 else None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return func(self.on_backward(args[0]), *args[1:], **kwargs)
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
    if isinstance(label_loss, str):
        function = getattr(F, label_loss, None)
        if not callable(function) or not ("loss" in label_loss or "cross_entropy" in label_loss):
            raise ValueError(
                f"`label_loss` must name a loss of torch.nn.functional, such as 'cross_entropy', or be 'backward'; got "
                f"{label_loss!r}."
            )
        return (function,)
    if callable(label_loss) and getattr(label_loss, "__module__", "").startswith("torch"):
        return (label_loss,)
    raise TypeError(
        "`label_loss` must be a torch.nn.Module called as criterion(logits, labels), or a function of torch.nn.functional; got "
        f"{label_loss!r}. A loss of your own becomes one by wrapping it in a small nn.Module."
    )
