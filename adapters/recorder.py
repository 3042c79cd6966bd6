"""Forward hooks that record one forward pass of a host. Flow: a host's modules -> **recorder** -> `sources.CamSource.cam`."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor, nn

from .._hooks import Hook, unwrap
from .._text import describe, listing
from ..clusters.branch import HostTokens
from ..errors import HostError
from .graph import Nodes, nodes_of
from .sources import CamSource, Records

__all__ = ["Capture", "Recorder", "models_being_probed"]

models_being_probed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # their forward passes are no training steps


class Capture(NamedTuple):
    """One forward pass of the host.

    Attributes:
        img: (B, 3, H, W) its input.
        output: what its `forward` returned; None while it is still running.
        records: what the watched modules returned.
        inputs, keywords: the arguments of its `forward`.
        nodes: graph nodes by which a loss on this pass is known.
        tokens: what it left for a cluster branch, or None without one.
    """

    img: Tensor
    output: Any
    records: Records
    inputs: Tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = {}
    nodes: Nodes = frozenset()
    tokens: Optional[HostTokens] = None

    def without_graph(self) -> "Capture":
        """The pass after its loss was added: the host's graph is the host's alone again."""
        return self._replace(output=None, records=Records({}), inputs=(), keywords={}, tokens=None)


class Recorder:
    """Forward hooks on a host for the time of a `with`: each wanted forward pass calls `on_forward(capture)`.

    The hooks are on the wrapper and on the network in it, since some loops call `wrapper.forward(...)`, which runs no hook of
    the wrapper. The methods in `CamSource.calls` are replaced on the network itself, since no hook sees them.

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
        self.model, self.inner, self.source, self.on_forward, self.wanted = model, unwrap(model), source, on_forward, wanted
        self.watched = source.modules(self.inner)
        self.records: Optional[Records] = None
        self._owner: Optional[nn.Module] = None  # the wrapper or the network, whose forward pass this is
        self._arguments: Tuple[Tuple[Any, ...], Mapping[str, Any]] = ((), {})
        self._undo: List[Callable[[], Any]] = []

    def __enter__(self) -> "Recorder":
        try:
            for module in dict.fromkeys((self.model, self.inner)):
                self._undo.append(module.register_forward_pre_hook(Hook(self.begin), with_kwargs=True).remove)
                self._undo.append(module.register_forward_hook(Hook(self._end), with_kwargs=True).remove)
            for name, module in self.watched.items():
                self._undo.append(module.register_forward_hook(Hook(functools.partial(self._record, name))).remove)
            for name in self.source.calls:
                self._replace_method(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        self.records = self._owner = None
        self._arguments = ((), {})

    def begin(self, module: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        """A forward pass of the host begins. To be called by hand if it began before the hooks were there."""
        if self._owner is self.model is not self.inner and module is not self.model:
            return  # the network inside its wrapper
        if getattr(module, "_is_replica", False):
            raise HostError(
                f"{type(module).__name__} runs as a replica of torch.nn.DataParallel. Give `attach` the DataParallel wrapper "
                "itself, as your loop calls it."
            )
        self._owner = module
        self.records = Records(self.watched) if self.wanted() else None
        self._arguments = (inputs if isinstance(inputs, tuple) else (inputs,), dict(keywords))

    def running(self) -> Optional[Capture]:
        """The forward pass that is under way, as far as it came: for hosts that compute their loss inside `forward`."""
        return None if self.records is None else self._capture(None, self.records)

    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.records is None:
            return
        if getattr(module, "_is_replica", False):
            raise HostError(
                f"The CAM of {self.source.name} is made inside the network ({name!r}), and torch.nn.DataParallel runs that in "
                "one thread per GPU. Use DistributedDataParallel (one process per GPU) or one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        self.records.add(name, output, inputs)

    def _end(self, module: nn.Module, inputs: Any, keywords: Any, output: Any) -> None:
        if module is not self._owner:
            return
        records, self.records, self._owner = self.records, None, None
        if records is not None:
            self._arguments = (inputs if isinstance(inputs, tuple) else (inputs,), keywords)
            self.on_forward(self._capture(output, records))
        self._arguments = ((), {})

    def _capture(self, output: Any, records: Records) -> Capture:
        inputs, keywords = self._arguments
        img = self.source.image(inputs, keywords)
        if img is None:
            given = [describe(value) for value in (*inputs, *keywords.values())]
            raise HostError(
                f"{type(self.inner).__name__} was called without an image batch: expected a float tensor "
                f"(B, 3, H, W) among its arguments, got {listing(given, quote=False)}. Give a CamSource with its own "
                "`image(...)`."
            )
        return Capture(img, output, records, inputs, keywords, records.nodes | nodes_of(output))

    def _replace_method(self, name: str) -> None:
        inner = self.inner
        method = getattr(inner, name, None)
        if not callable(method):
            raise HostError(f"{type(inner).__name__} has no method {name!r} to be watched (`calls`).")
        kept: Dict[str, Any] = {key: value for key, value in vars(inner).items() if key == name}

        @functools.wraps(method)
        def call(*inputs: Any, **keywords: Any) -> Any:
            if self._owner is not None:  # inside a forward pass
                return method(*inputs, **keywords)
            self.begin(inner, inputs, keywords)
            try:
                output = method(*inputs, **keywords)
                self._end(inner, inputs, keywords, output)
            finally:
                self._owner = self.records = None
            return output

        def undo() -> None:
            vars(inner).pop(name, None)
            vars(inner).update(kept)

        self._undo.append(undo)
        vars(inner)[name] = call
