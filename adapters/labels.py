"""Where a host's image-level labels come from: its label loss, an argument of its forward, its loader, or a function.

Flow: a host's loop -> **labels** -> `loop.LoopWatcher`.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
from typing import Any, Callable, Deque, Iterator, List, Mapping, NamedTuple, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._text import describe, listing
from ..errors import HostError
from .patches import replaced
from .recorder import Capture

__all__ = ["LabelSource", "Labels", "multi_hot"]

Labels = Union[None, str, Callable[[Capture], Any]]
REMEMBERED = 8  # batches of the loader: a prefetcher may be some batches ahead of the loop


class _Batch(NamedTuple):
    """What is kept of a batch of the loader: its values, and a few pixels of its images to know them again."""

    values: Any
    images: List[Any]


class LabelSource:
    """Image-level labels of a forward pass.

    Args:
        where: None: the target of the label loss; `"forward:NAME"`: the argument of that name of the model's forward;
            `"loader"`: the batch that the images came from, its first part that fits, `"loader:KEY"`: that part (a number or a
            key); or a function (capture) -> labels.
        num_classes: C.

    Raises:
        TypeError, ValueError: if `where` is none of these.
    """

    def __init__(self, where: Labels, num_classes: int):
        kind, _, key = where.partition(":") if isinstance(where, str) else ("", "", "")
        if isinstance(where, str) and (kind not in ("forward", "loader") or (kind == "forward" and not key)):
            raise ValueError(f"`labels` must be 'loader', 'loader:KEY', 'forward:NAME' or a function; got {where!r}.")
        if where is not None and not isinstance(where, str) and not callable(where):
            raise TypeError(f"`labels` must be a string, a function or None; got {type(where).__name__}.")
        self.where, self.num_classes = where, num_classes
        self._kind, self._key = kind, key
        self._batches: Deque[_Batch] = collections.deque(maxlen=REMEMBERED)

    def __str__(self) -> str:
        if self.where is None:
            return "the target of the label loss"
        return f"the function {getattr(self.where, '__name__', self.where)}" if callable(self.where) else self.where

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See the batches of every torch DataLoader in this `with`, if labels come from there."""
        if self._kind != "loader":
            yield
            return
        iterate = DataLoader.__iter__

        @functools.wraps(iterate)
        def watched(loader: Any) -> Iterator[Any]:
            for batch in iterate(loader):
                self._batches.append(_Batch(batch, [_sample(v) for v in _values(batch) if _is_image(v)]))
                yield batch

        try:
            with replaced(DataLoader, __iter__=watched):
                yield
        finally:
            self._batches.clear()

    def of(self, capture: Capture, model: nn.Module) -> Tensor:
        """Labels (b, C) of a forward pass, where `where` is not None; its batch is b or a multiple of it.

        Raises:
            HostError: if there are none there.
        """
        if callable(self.where):
            found, place = self.where(capture), f"the function {getattr(self.where, '__name__', 'labels')}"
        elif self._kind == "forward":
            found, place = _argument(capture, model, self._key), f"the argument {self._key!r} of {type(model).__name__}"
        else:
            found, place = self._from_loader(capture), "the loader"
        labels = multi_hot(found, self.num_classes, len(capture.img), indices=True)
        if labels is None:
            raise HostError(
                f"Labels from {place} must be (B, {self.num_classes}) for the {len(capture.img)} images of the forward pass, "
                f"or (B,) class indices; got {describe(found)}."
            )
        return labels

    def _from_loader(self, capture: Capture) -> Any:
        pixels = _sample(capture.img)
        same = [batch for batch in self._batches if any(_begins(pixels, image) for image in batch.images)]
        for batch in reversed(same or self._batches):  # the newest
            if self._key:
                return _part(batch.values, self._key)
            for value in _values(batch.values):
                if multi_hot(value, self.num_classes, len(capture.img)) is not None:
                    return value
        raise HostError(
            f"No DataLoader of torch gave a batch with labels (B, {self.num_classes}) for this forward pass of "
            f"{len(capture.img)} images; of {len(self._batches)} remembered batches the last holds "
            f"{listing([describe(v) for v in _values(self._batches[-1].values)] if self._batches else [], quote=False)}. Say "
            "which part holds them, labels='loader:1', or give a function: labels=lambda capture: ..."
        )


def multi_hot(value: Any, num_classes: int, num_images: int, indices: bool = False) -> Optional[Tensor]:
    """`value` as labels (b, C), or None if it is nothing of the kind. What counts as a label is not decided here.

    Args:
        value: (b, C), or (b, C + 1) whose first column is background and 1 throughout, perhaps with further axes of length 1.
        num_classes: C.
        num_images: a multiple of b.
        indices: whether class indices (b,) count as well.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.ndim < 1 or len(value) == 0 or num_images % len(value):
        return None
    value = value.detach()
    if value.ndim == 1:
        whole = indices and not value.is_floating_point() and value.dtype != torch.bool
        if not whole or bool(((value < 0) | (value >= num_classes)).any()):
            return None
        return nn.functional.one_hot(value.long(), num_classes)
    flat = value.reshape(len(value), -1)
    if flat.shape[1] == num_classes + 1 and bool((flat[:, 0] == 1).all()):
        flat = flat[:, 1:]
    return flat if flat.shape[1] == num_classes else None


def _argument(capture: Capture, model: nn.Module, name: str) -> Any:
    """An argument of the model's forward by its name."""
    signature = inspect.signature(model.forward)
    given = dict(capture.keywords)
    with contextlib.suppress(TypeError):  # a wrapper's arguments may not be those of the network
        given = {**given, **signature.bind_partial(*capture.inputs, **capture.keywords).arguments}
    if name not in given:
        raise HostError(
            f"{type(model).__name__} was called without an argument {name!r}; given were {listing(given)}. Its forward takes "
            f"{listing(signature.parameters)}."
        )
    return given[name]


def _values(batch: Any) -> List[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return list(batch) if isinstance(batch, (tuple, list)) else [batch]


def _part(batch: Any, key: str) -> Any:
    try:
        return batch[key] if isinstance(batch, Mapping) else batch[int(key)]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        has = listing(batch) if isinstance(batch, Mapping) else f"{len(_values(batch))} parts"
        raise HostError(f"The loader's batch has no part {key!r}; it has {has}.") from error


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point() and len(value) > 0


def _sample(img: Tensor) -> Tensor:
    """A few pixels of every image."""
    rows, columns = max(1, img.shape[2] // 4), max(1, img.shape[3] // 4)
    return img.detach()[:, :, ::rows, ::columns].float().cpu().clone()


def _begins(pixels: Tensor, image: Tensor) -> bool:
    """Whether a batch begins with these images."""
    count = min(len(pixels), len(image))
    return pixels.shape[1:] == image.shape[1:] and torch.equal(pixels[:count], image[:count])
