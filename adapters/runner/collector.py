"""One pass over the host's own loader with the trained host frozen: the features that prompts are learned from."""

from __future__ import annotations

import contextlib
from typing import Any, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..._hooks import unwrap
from ...refiner import PromptRefiner
from ..loop import LoopWatcher, first_part
from ..patches import replaced
from ..recorder import Capture
from ..sources import CamSource, foreground_cams

__all__ = ["Collector", "one_pass"]


class _PassOver(BaseException):
    """The host's loader was gone through once. Not an `Exception`, so that no `except Exception` of a host catches it."""


class Collector(LoopWatcher):
    """Collects what stage (b) learns from and adds no loss. The host's weights are the same for every batch.

    Args:
        source: where the host's CAM comes from.
        refiner: encodes the backgrounds.
        **options: of `LoopWatcher`: where the host and its labels are.

    Attributes:
        images: number of images so far.
    """

    def __init__(self, source: CamSource, refiner: PromptRefiner, **options: Any):
        super().__init__(source, None, refiner.classes, **options)
        self.refiner = refiner
        self.features: List[Tensor] = []
        self.pairs: List[Tensor] = []
        self.images = 0
        self.over = False
        self._weights: Dict[str, Tensor] = {}
        self._hold: Any = None

    def bind(self, model: nn.Module) -> None:
        super().bind(model)
        inner = unwrap(model)
        self._weights = {name: value.detach().clone() for name, value in inner.state_dict().items()}
        self._hold = model.register_forward_pre_hook(lambda module, inputs: self._restore(inner))
        self._restore(inner)

    def _release(self) -> None:
        super()._release()
        if self._hold is not None:
            self._hold.remove()
            self._hold = None

    def _restore(self, model: nn.Module) -> None:
        """Undo the host's last step, and switch dropout, stochastic depth and batch statistics off."""
        if self.over:
            raise _PassOver
        with torch.no_grad():
            for name, value in model.state_dict().items():
                before = self._weights.setdefault(name, value.detach().clone())  # some networks grow in their first pass
                if not torch.equal(value, before):  # in place only where it must be: a graph may be alive
                    value.copy_(before)
        for module in model.modules():
            leaf = next(module.children(), None) is None or type(module).__module__.startswith("torch.nn.")
            if leaf and module is not model:
                module.training = False

    def step(self, capture: Capture, labels: Tensor) -> None:
        for cam in foreground_cams(self.source, capture.img, capture.output, capture.records):
            img, cam = first_part((capture.img.detach().to(cam.device), cam.detach()), len(labels))
            features, pairs = self.refiner.encode_backgrounds(img, cam, labels.to(cam.device))
            self.features.append(features)
            self.pairs.append(pairs + torch.tensor([self.images, 0]))
        self.images += len(labels)
        self.steps += 1

    def collected(self) -> Tuple[Tensor, Tensor]:
        """Features (P, D) and pairs (P, 2), image number and class of each, of all batches."""
        return torch.cat(self.features), torch.cat(self.pairs)


@contextlib.contextmanager
def one_pass(collector: Collector) -> Iterator[None]:
    """End the script in this `with` when the DataLoader that fed the collector is exhausted."""
    iterate = DataLoader.__iter__

    def once(loader: Any) -> Iterator[Any]:
        before = collector.steps
        yield from iterate(loader)
        if collector.steps > before:
            collector.over = True
            raise _PassOver

    with contextlib.suppress(_PassOver), replaced(DataLoader, __iter__=once):
        yield
