"""Forward hooks that record one forward pass of a host. Flow: a host's modules -> **recorder** -> `sources.CamSource.cam`."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Callable, List, NamedTuple, Optional

from torch import Tensor, nn

from .._hooks import Hook, unwrap
from .._text import describe, listing
from ..clusters.branch import HostTokens
from ..errors import HostError
from .sources import CamSource, Records

__all__ = ["Capture", "Recorder", "models_being_probed"]

models_being_probed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # their forward passes are no training steps


class Capture(NamedTuple):
    """One forward pass of the host.

    Attributes:
        img: (B, 3, H, W) its input.
        output: what its `forward` returned.
        records: what the watched modules returned.
        tokens: what it left for a cluster branch, or None without one.
    """

    img: Tensor
    output: Any
    records: Records
    tokens: Optional[HostTokens] = None


class Recorder:
    """Forward hooks on a host for the time of a `with`: each wanted forward pass calls `on_forward(capture)`.

    Args:
        model: the object that the loop calls.
        source: says which modules to watch and which argument is the image.
        on_forward: called at the end of each wanted forward pass.
        wanted: called at the beginning of each forward pass; whether to record it.
    """

    def __init__(
        self,
        model: nn.Module,
        source: CamSource,
        on_forward: Callable[[Capture], None],
        wanted: Callable[[], bool] = lambda: True,
    ):
        self.model, self.source, self.on_forward, self.wanted = model, source, on_forward, wanted
        self.watched = source.modules(unwrap(model))
        self.records: Optional[Records] = None
        self.handles: List[Any] = []

    def __enter__(self) -> "Recorder":
        try:
            self.handles.append(self.model.register_forward_pre_hook(Hook(self.begin)))
            self.handles.append(self.model.register_forward_hook(Hook(self._end), with_kwargs=True))
            for name, module in self.watched.items():
                self.handles.append(module.register_forward_hook(Hook(functools.partial(self._record, name))))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.records = [], None

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """A forward pass of the host begins. To be called by hand if it began before the hooks were there."""
        if getattr(module, "_is_replica", False):
            raise HostError(
                f"{type(module).__name__} runs as a replica of torch.nn.DataParallel. Give `attach` the DataParallel wrapper "
                "itself, as your loop calls it."
            )
        self.records = Records(self.watched) if self.wanted() else None

    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.records is None:
            return
        if getattr(module, "_is_replica", False):
            raise HostError(
                f"The CAM of {self.source.name} is made inside the network ({name!r}), and torch.nn.DataParallel runs that in "
                "one thread per GPU. Use DistributedDataParallel (one process per GPU) or one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        self.records.add(name, output)

    def _end(self, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        records, self.records = self.records, None
        if records is None:
            return
        img = self.source.image(inputs if isinstance(inputs, tuple) else (inputs,), keywords)
        if img is None:
            given = [describe(value) for value in (*inputs, *keywords.values())]
            raise HostError(
                f"{type(unwrap(self.model)).__name__} was called without an image batch: expected a float tensor "
                f"(B, 3, H, W) among its arguments, got {listing(given, quote=False)}. Give a CamSource with its own "
                "`image(...)`."
            )
        self.on_forward(Capture(img, output, records))
