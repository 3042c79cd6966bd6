"""Forward hooks that record one forward pass of a host."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from .._checks import check_stats, warn
from .._hooks import Hook, unwrap
from .._text import describe, listing
from ..clusters.branch import Seen
from ..errors import HostError
from ..refiner import PromptRefiner
from .sources import CamSource, Records

__all__ = ["Capture", "Recorder", "check_model", "check_source", "img_and_cam", "probed"]

probed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models that `probe` runs right now: no training step


class Recorder:
    """Forward hooks on a host: after each wanted forward pass, `on_forward(img, output, records)`."""

    def __init__(
        self,
        model: nn.Module,
        source: CamSource,
        on_forward: Callable[[Tensor, Any, Records], None],
        wanted: Callable[[], bool],
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
        self.on_forward(img, output, records)


class Capture(NamedTuple):
    """One forward pass of the host, and what it left for a cluster branch."""

    img: Tensor
    output: Any
    records: Records
    seen: Optional[Seen] = None


def img_and_cam(source: CamSource, refiner: PromptRefiner, capture: Capture) -> Tuple[Tensor, Tensor]:
    """img and CAM (B, C, h, w) of a forward pass as the refiner takes them: on one device, without background channel."""
    cam = source.cam(capture.img, capture.output, capture.records)
    if not isinstance(cam, Tensor):
        raise HostError(f"The CAM of {source.name} must be a tensor (B, C, h, w); got {describe(cam)}.")
    if source.background_channel:
        cam = cam[:, 1:]
    return capture.img.detach().to(cam.device), cam


def check_model(source: CamSource, model: Any) -> None:
    """Raise if `model` is no network, or not of the kind that `source` is for."""
    if not isinstance(model, nn.Module):
        hint = " Some hosts' model.eval() and model.train() return None; call them before." if model is None else ""
        raise TypeError(f"`model` must be the host's torch.nn.Module; got {type(model).__name__}.{hint}")
    source.modules(unwrap(model))


def check_source(source: CamSource, refiner: PromptRefiner) -> None:
    if not isinstance(source, CamSource):
        raise TypeError(f"The host must be a name or a CamSource; got {type(source).__name__}.")
    if source.image_stats is not None and refiner.image_stats != check_stats(source.image_stats):
        warn(
            f"{source.name} normalises its images with {source.image_stats!r}; the refiner was built for "
            f"image_stats={refiner.image_stats!r}."
        )
