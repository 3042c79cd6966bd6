"""Watching a host's training loop: one mechanism for every host.

While a `LoopWatcher` is entered

- forward hooks record what the host's CAM is made of, in the host's own forward pass; there is no second one;
- a `torch.overrides.TorchFunctionMode` sees the host's losses. The label loss whose autograd graph contains a recorded forward
  pass comes back with a loss added, so that whatever the host does next with its loss (autocast, GradScaler, accumulation)
  holds for both. A loss of another network is left alone.

On exit all of it is gone, also after an exception or Ctrl-C.
Flow: a host's loop -> `finder`, `recorder`, `labels`, `label_loss`, `graph` -> **loop** -> `attachment`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from typing import Any, Callable, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn

from .._checks import check_number, hard_labels, warn
from .._hooks import unwrap
from .._text import describe, listing
from ..errors import HostError
from .branch_training import BranchTraining
from .finder import ModelFinder
from .graph import found_in
from .interrupts import HeldInterrupts
from .label_loss import AT_BACKWARD, LabelLoss, LossTap
from .labels import Labels, LabelSource, multi_hot
from .recorder import Capture, Recorder, models_being_probed
from .sources import CamSource, check_model

__all__ = ["ForwardPass", "LoopWatcher"]

ForwardPass = Union[str, int]
MOST_PASSES = 8  # of one step that are remembered
_active: "weakref.WeakSet[LoopWatcher]" = weakref.WeakSet()
_PARTS = "_semples_parts"  # on a loss that was added to: (what is left of the host's loss, the sum of what was added)


class LoopWatcher:
    """A host's training loop, watched for the time of a `with`. A subclass says what is done in a step.

    A step is the forward passes of the model in training mode with gradients up to its label loss. Which of them the label loss
    was computed from is read off the autograd graph, so that a batch whose loss the host skips, and losses of other networks,
    do not count. Of several label losses in a step the first gets the loss added. Forward passes without gradients or in eval
    mode, and label losses there, are left alone.

    Args:
        source: where the host's CAM comes from.
        model: the object that the loop calls, or None for the first network that runs in training mode and fits `source`.
        classes: names of the classes, in the order of the host's label columns.
        network: with `model=None`: the class name of the network to wait for.
        mode: `"add"` a loss to the host's label loss, or `"replace"` its label losses.
        label_loss: where the loss is added; see `label_loss.LossTap`.
        labels: where labels come from; see `labels.LabelSource`. With labels from elsewhere the loss is added at `"backward"`
            unless `label_loss` says otherwise.
        forward_pass: which forward pass of a step gives the CAM: `"first"` of those in the label loss, `"last"`, or its number
            from 0.
        branch: a cluster branch to be put into the host, or None.
        on_model: with `model=None`: called with the network when it is found, in the moment before its first forward pass.

    Attributes:
        model: the host.
        steps: steps so far.
        others: label losses over these classes that belong to networks without an attachment, by name, with their number.
    """

    def __init__(
        self,
        source: CamSource,
        model: Optional[nn.Module],
        classes: Sequence[str],
        *,
        network: Optional[str] = None,
        mode: str = "add",
        label_loss: LabelLoss = None,
        labels: Labels = None,
        forward_pass: ForwardPass = "first",
        branch: Optional[BranchTraining] = None,
        on_model: Optional[Callable[[nn.Module], None]] = None,
    ):
        if mode not in ("add", "replace"):
            raise ValueError(f"`mode` must be 'add' (to the host's label loss) or 'replace' (it); got {mode!r}.")
        if isinstance(forward_pass, str) and forward_pass not in ("first", "last"):
            raise ValueError(f"`forward_pass` must be 'first', 'last' or a number from 0; got {forward_pass!r}.")
        if not isinstance(forward_pass, str):
            check_number("forward_pass", forward_pass, 0, whole=True)
        if model is not None and network is not None:
            raise ValueError("`network` is for model=None, where the network is not known yet; got both.")
        labels = source.labels if labels is None else labels
        label_loss = AT_BACKWARD if label_loss is None and labels is not None else label_loss
        self.source, self.classes, self.mode, self.forward_pass = source, list(classes), mode, forward_pass
        self.branch, self.steps, self.network, self.on_model = branch, 0, network, on_model
        self.labels = LabelSource(labels, len(self.classes))
        self._tap = LossTap(label_loss, self._on_label_loss, self._on_other_loss, self._on_backward)
        if self._tap.at_backward and mode == "replace":
            raise ValueError("mode='replace' needs a label loss to replace: name it, label_loss=...; got 'backward'.")
        self._interrupts = HeldInterrupts(type(self).__enter__, type(self).__exit__)
        self._entered = False
        self._stack = contextlib.ExitStack()
        self._recorder: Optional[Recorder] = None
        self._finder: Optional[ModelFinder] = None
        if model is not None:
            check_model(source, model)
        self._waits = model is None
        self.script, self.what = "The loop", source.name  # for messages
        self.model = model
        self._clear()

    def _clear(self) -> None:
        self._begin_step()
        self._forwards = self._backwards = 0
        self._steps_before = self.steps
        self._losses: "Counter[str]" = Counter()  # all that were seen, for messages
        self.others: "Counter[str]" = Counter()
        self._last_own: Any = None  # weak references to label losses
        self._last_other: Any = None
        self._said: Set[str] = set()
        if self._waits:
            self.model = None

    def _begin_step(self) -> None:
        self._captures: List[Capture] = []
        self._added = False  # the step is done
        self._replacing = False  # and its other label losses are dropped
        self._no_positives = False  # the step is done, but with labels without any positive
        self._backward_since = False  # backward() ran on all of this step's passes, and nothing was added
        self._inside = False  # the loss was added while the forward pass was still running
        self._problem: Optional[Exception] = None  # with a label loss of this step
        self._targets: Optional[Tensor] = None  # labels of a label loss of this step, for "backward"

    def step(self, capture: Capture, labels: Tensor) -> Optional[Tensor]:
        """What is done in a step; to be overridden. It counts `steps`.

        Args:
            capture: the forward pass that counts.
            labels: (b, C) of its images; with b less than the batch, of the first b.

        Returns:
            The loss to be added to the host's, or None to leave the host's as it is.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Any:
        if self._entered:
            raise HostError("This attachment is entered already; use one `with` at a time.")
        self._clear()
        self._interrupts.begin()
        try:
            self._enter()
        except BaseException:
            self._leave()
            self._interrupts.end()
            raise
        if self._interrupts.waiting:
            self._leave()
            self._interrupts.end()
        return self

    def _enter(self) -> None:
        self._stack.callback(self._release)
        if self.branch is not None:
            self.branch.begin()
        if self.model is not None:
            self.bind(self.model)
        else:
            self._finder = ModelFinder(self.source.modules, self._found, network=self.network, by_parts=bool(self.source.calls))
            self._stack.enter_context(self._finder)
        self._stack.enter_context(self.labels.watching())
        self._stack.enter_context(self._tap)
        _active.add(self)
        self._stack.callback(_active.discard, self)
        self._entered = True

    def _leave(self) -> None:
        self._entered = False
        self._stack.close()

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        try:
            self._leave()
            if kind is None:
                self._check_end()
                if self.branch is not None:
                    self.branch.end()
        finally:
            self._captures = []
            self._interrupts.end()

    def _found(self, model: nn.Module, inputs: Any, keywords: Mapping[str, Any]) -> None:
        if self.on_model is not None:
            self.on_model(model)
        self.bind(model)
        if inputs is not None and self._recorder is not None:  # else its forward pass cannot be seen before the next one
            self._recorder.begin(model, inputs, keywords)

    def bind(self, model: nn.Module) -> None:
        """Put the hooks on a model; done on entry, or when the model is found."""
        self.model = model
        if self.branch is not None:  # before the recorder, which is to see the host's own tokens
            self.branch.enter(model)
        self._recorder = Recorder(model, self.source, self._on_forward, self._training)
        self._recorder.__enter__()

    def _release(self) -> None:
        """Take the hooks off the model."""
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None
        if self.branch is not None:
            self.branch.leave()

    # ------------------------------------------------------------------------------------------------ what the loop does

    def _training(self) -> bool:
        if self.model is None or not torch.is_grad_enabled():
            return False
        inner = unwrap(self.model)
        return inner.training and inner not in models_being_probed

    def _on_forward(self, capture: Capture) -> None:
        self._forwards += 1
        if self._inside:  # its loss was computed inside this very forward pass
            self._inside = False
            return
        if self.branch is not None:
            capture = capture._replace(tokens=self.branch.branch.pop_tokens())
        if self._backward_since and not self._added:
            raise self._problem or self._no_label_loss()
        if self._added:
            self._begin_step()
        self._captures = [*self._captures, capture][-MOST_PASSES:]

    def _on_other_loss(self, name: str, target: Any) -> None:
        self._losses[f"{name} with targets {describe(target)}"] += 1
        if self._tap.at_backward and self._captures:
            labels = self._targets_of(target)
            if labels is not None and not len(self._captures[-1].img) % len(labels):
                self._targets = labels

    def _on_label_loss(self, name: str, result: Any, target: Any) -> Any:
        """A label loss was computed, by whatever network: its result, or what takes its place."""
        if not (isinstance(result, Tensor) and result.requires_grad and torch.is_grad_enabled()):
            return result
        self._on_other_loss(name, target)
        labels = self._targets_of(target)
        if labels is None and self.labels.where is None:
            return result
        passes = self._passes()
        owned = found_in(result, [capture.nodes for capture in passes])
        if not owned:
            if len(passes) > len(self._captures) and not passes[-1].nodes:
                self._problem = self._problem or HostError(
                    f"{self._model_name()} computes its loss inside its forward, before there is an output to make a CAM of. "
                    "Make it of the outputs of modules: cam=function, modules=[...], or features=... with classifier=..."
                )
            elif labels is not None:
                self._count_other(name, result, labels, passes)
            return result
        self._claim(name, result)
        index = self._index(owned, passes)
        counted = passes[owned[0] if index is None else index]
        if self.labels.where is not None:
            labels = self.labels.of(counted, unwrap(self._model()))
        if labels is None or len(counted.img) % len(labels):
            return result
        problem = self._wrong_with(name, result, labels)
        if problem is not None:
            self._problem = self._problem or problem
            return result
        if index is not None and (not self._added or (self._no_positives and bool(labels.any()))):
            return self._do_step(passes, index, labels, result)
        return self._sum(result, None) if self._replacing else result

    def _index(self, owned: Sequence[int], passes: Sequence[Capture]) -> Optional[int]:
        """Which of the step's forward passes counts, or None if it is not among those that the loss was computed from."""
        if self.forward_pass == "first":
            return owned[0]
        index = len(passes) - 1 if self.forward_pass == "last" else int(self.forward_pass)
        return index if index in owned else None

    def _passes(self) -> List[Capture]:
        """The forward passes of this step, with the one that is still running."""
        running = None if self._recorder is None else self._recorder.running()
        if running is None:
            return self._captures
        if self._added:
            self._begin_step()
        return [*self._captures, running]

    def _do_step(self, passes: List[Capture], index: int, labels: Tensor, result: Tensor) -> Tensor:
        capture = passes[index]
        if len(passes) > len(self._captures):  # the pass that is still running
            self._inside = True
            if self.branch is not None:
                capture = capture._replace(tokens=self.branch.branch.pop_tokens())
        if self._no_positives:
            self.steps -= 1  # the label loss before, which had no positive label, was not that of the step
        positives = bool(labels.any())
        if len(capture.img) > len(labels):
            self._say(
                f"{self.source.name} ran on {len(capture.img)} images with labels for {len(labels)}: the refiner's loss is "
                f"that of the first {len(labels)}."
            )
        extra = self.step(capture, labels)
        self._added, self._no_positives = True, not positives
        self._replacing = self.mode == "replace" and extra is not None
        self._captures = list(passes) if self._no_positives else [c.without_graph() for c in passes]
        return result if extra is None else self._sum(result, extra)

    def _sum(self, result: Tensor, extra: Optional[Tensor]) -> Tensor:
        """The host's loss, or nothing of it, with the loss added; several attachments may do so to the same loss."""
        rest, added = getattr(result, _PARTS, (result, None))
        if self._replacing:
            rest = 0.0 * rest
        if extra is not None:
            extra = extra.to(result.device)
            added = extra if added is None else extra + added
        total = rest if added is None else added + rest
        setattr(total, _PARTS, (rest, added))
        return total

    def _on_backward(self, loss: Tensor) -> Tensor:
        """`loss.backward()` or `scaler.scale(loss)` is called: the loss, or what takes its place."""
        self._backwards += 1
        if self.model is None and self.network is None:
            raise self.none_fits()
        if self._added or not self._captures or not isinstance(loss, Tensor) or not loss.requires_grad:
            return loss
        passes = self._captures
        owned = found_in(loss, [capture.nodes for capture in passes])
        if not owned:
            return loss  # of another network
        if not self._tap.at_backward:
            rest = [capture for index, capture in enumerate(passes) if index not in owned]
            if not rest and self._problem is not None:
                raise self._problem
            self._captures, self._backward_since = rest, not rest  # an adversarial pass has a backward() of its own
            return loss
        index = self._index(owned, passes)
        if index is None:
            return loss
        labels = self._targets if self.labels.where is None else self.labels.of(passes[index], unwrap(self._model()))
        if labels is None:
            raise HostError(
                "The refiner's loss is to be added at backward(), but no labels were seen before it. Say where they come from: "
                "labels='loader', 'forward:NAME' or a function."
            )
        problem = self._wrong_with("backward()", loss, labels)
        if problem is not None:
            raise problem
        return self._do_step(passes, index, labels, loss)

    # ------------------------------------------------------------------------------------------------ labels

    def _targets_of(self, target: Any) -> Optional[Tensor]:
        """Labels (b, C) of a label loss, or None if this is no label loss over these classes."""
        if not isinstance(target, Tensor) or target.ndim < 2 or len(target) == 0:
            return None
        return multi_hot(target, len(self.classes), len(target))

    def _wrong_with(self, name: str, result: Tensor, labels: Tensor) -> Optional[Exception]:
        if result.ndim:
            return HostError(
                f"The label loss must be a scalar for the refiner's loss to be added; {name} gave shape "
                f"{tuple(result.shape)} (reduction='none'). Pass attach(..., label_loss=criterion) with a module whose output "
                "is the reduced loss, label_loss='backward', or add the loss yourself: loss = loss + refiner(img, cam, labels)."
            )
        try:
            hard_labels(labels)
        except ValueError as error:
            return error
        return None

    # ------------------------------------------------------------------------------------------------ other networks

    def _count_other(self, name: str, result: Tensor, labels: Tensor, passes: Sequence[Capture]) -> None:
        if self._wrong_with(name, result, labels) is not None:
            return
        if self._waits and self.model is not None and not self._forwards:
            return  # of the pass in which the network was found
        never = not self._forwards and not passes and len(_active) == 1
        if never and not self._waits and unwrap(self._model()).training:
            raise HostError(
                f"The label loss {name} was computed, but no CAM was captured before it: {self._model_name()} "
                f"ran {self._forwards} times in training mode with gradients. Give `attach` the very object that your loop "
                "calls (the DataParallel or DistributedDataParallel wrapper, if there is one), or None for the first network "
                "that fits. A loop that calls another method than the model itself needs that name: calls=['method']."
            )
        if hasattr(result, _PARTS) or any(watcher is not self and watcher._owns_last(result) for watcher in _active):
            return
        self.others[name] += 1
        self._last_other = weakref.ref(result)

    def _owns_last(self, result: Tensor) -> bool:
        return self._last_own is not None and self._last_own() is result

    def _claim(self, name: str, result: Tensor) -> None:
        """This loss belongs to this attachment; those that have counted it as nobody's take that back."""
        self._last_own = weakref.ref(result)
        for watcher in _active:
            if watcher is not self and watcher._last_other is not None and watcher._last_other() is result:
                watcher.others[name] -= 1
                watcher._last_other = None

    # ------------------------------------------------------------------------------------------------ what went wrong

    def _say(self, message: str) -> None:
        """A warning, once per `with`."""
        if message not in self._said:
            self._said.add(message)
            warn(message)

    def _check_end(self) -> None:
        if self.model is None:
            if self._backwards:
                raise self.none_fits()
            return
        if self._backward_since and not self._added:
            raise self._problem or self._no_label_loss()
        if self.steps == self._steps_before and self._forwards:
            raise self._problem or self._no_label_loss()
        if self.steps == self._steps_before and self._backwards:
            raise HostError(
                f"{self.source.name} trained without the refiner's loss: backward() ran {self._backwards} times, but "
                f"{self._model_name()} never ran in training mode with gradients. Give `attach` the very object that your loop "
                "calls, and call model.train()."
            )
        others = sum(self.others.values())
        if others:
            warn(
                f"{others} label losses over {len(self.classes)} classes did not come from {self._model_name()} and were left "
                "alone: another network was trained without the refiner. Attach it as well if it is to be."
            )

    def none_fits(self) -> HostError:
        """The error for a host that was waited for and never ran."""
        assert self._finder is not None
        return self._finder.none_fits(self.script, self.what)

    def _no_label_loss(self) -> HostError:
        seen = [f"{name} ({count}x)" for name, count in self._losses.most_common(10)]
        return HostError(
            f"{self.source.name} trained without the refiner's loss: its CAM was captured {self._forwards} times, backward() "
            f"ran {self._backwards} times, but no label loss over {len(self.classes)} classes was seen. Looked for "
            f"{listing(self._tap.names(), quote=False)}; "
            f"losses seen: {listing(seen, quote=False)}. If your host computes its label loss in another way, pass that "
            "module: attach(..., label_loss=criterion). If it has none over classes, say where labels come from: "
            "labels='loader' or 'forward:NAME'. If the number of classes differs, build the refiner with the host's."
        )

    def _model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _model_name(self) -> str:
        return "no model" if self.model is None else type(unwrap(self.model)).__name__


def first_part(values: Tuple[Tensor, ...], count: int) -> Tuple[Tensor, ...]:
    """The first `count` rows of each, for passes on a multiple of the label batch."""
    return tuple(value if len(value) == count else value[:count] for value in values)
