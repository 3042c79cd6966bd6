"""Watching a host's training loop: one mechanism for every host.

While a `LoopWatcher` is entered

- forward hooks record what the host's CAM is made of, in the host's own forward pass; there is no second one;
- a `torch.overrides.TorchFunctionMode` sees the host's label loss, takes the labels from it and returns its result with a loss
  added, so that whatever the host does next with its loss (autocast, GradScaler, accumulation) holds for both.

On exit all of it is gone, also after an exception. Nothing is patched.
Flow: a host's loop -> `recorder`, `label_loss` -> **loop** -> `attachment`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor, nn

from .._checks import check_number
from .._hooks import unwrap
from .._text import describe, listing
from ..errors import HostError
from .branch_training import BranchTraining
from .label_loss import LabelLoss, LossTap
from .recorder import Capture, Recorder, models_being_probed
from .sources import CamSource, Records, check_model

__all__ = ["LoopWatcher"]


class LoopWatcher:
    """A host's training loop, watched for the time of a `with`. A subclass says what is done in a step.

    A step is one forward pass of the model in training mode with gradients, and the label loss after it. If the model runs
    several times before its label loss, the last pass counts, so that a batch whose loss the host skips is forgotten. For a
    host that needs several passes per step (two scales, say) `passes` is their number, and the first of them counts. Forward
    passes without gradients or in eval mode, and label losses there, are left alone.

    Args:
        source: where the host's CAM comes from.
        model: the object that the loop calls, or None if it is not known yet; see `bind`.
        classes: names of the classes, in the order of the host's label columns.
        mode: `"add"` a loss to the host's label loss, or `"replace"` its label losses.
        label_loss: how the host computes its label loss; see `label_loss.LossTap`.
        passes: forward passes per label loss.
        branch: a cluster branch to be put into the host, or None.

    Attributes:
        steps: steps so far.
    """

    def __init__(
        self,
        source: CamSource,
        model: Optional[nn.Module],
        classes: Sequence[str],
        *,
        mode: str = "add",
        label_loss: LabelLoss = None,
        passes: int = 1,
        branch: Optional[BranchTraining] = None,
    ):
        if mode not in ("add", "replace"):
            raise ValueError(f"`mode` must be 'add' (to the host's label loss) or 'replace' (it); got {mode!r}.")
        check_number("passes", passes, 1, whole=True)
        self.source, self.classes, self.mode, self.passes = source, list(classes), mode, passes
        self.branch, self.steps = branch, 0
        self._tap = LossTap(label_loss, self._on_label_loss, self._on_other_loss, self._on_backward)
        self._entered = False
        self._recorder: Optional[Recorder] = None
        self._clear()
        if model is not None:
            check_model(source, model)
        self.model = model

    def _clear(self) -> None:
        self._captures: List[Capture] = []  # the last `passes` of the current step
        self._added = self._backward_since = False  # in the current step
        self._forwards = self._backwards = 0
        self._steps_before = self.steps
        self._losses: "Counter[str]" = Counter()  # all that were seen, for messages

    def step(self, capture: Capture, labels: Tensor) -> Optional[Tensor]:
        """What is done in a step; to be overridden. It counts `steps`.

        Args:
            capture: the forward pass that counts.
            labels: (B, C) as the host's label loss got them.

        Returns:
            The loss to be added to the host's, or None to leave the host's as it is.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Any:
        if self._entered:
            raise HostError("This attachment is entered already; use one `with` at a time.")
        self._clear()
        try:
            if self.branch is not None:
                self.branch.begin()
            if self.model is not None:
                self.bind(self.model)
            self._tap.__enter__()
            self._entered = True
        except BaseException:
            self.release()
            raise
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        try:
            if self._entered:
                self._entered = False
                self._tap.__exit__(kind, value, traceback)
        finally:
            self.release()
        if kind is None:
            self._check_end()
            if self.branch is not None:
                self.branch.end()
        self._captures = []

    def bind(self, model: nn.Module, under_way: bool = False) -> None:
        """Put the hooks on a model. A `with` does it on entry, the runner when the host's model is found.

        Args:
            model: the host.
            under_way: whether its forward pass has begun already, so that this pass counts as well.
        """
        self.model = model
        if self.branch is not None:  # before the recorder, which is to see the host's own tokens
            self.branch.enter(model)
        self._recorder = Recorder(model, self.source, self._on_forward, self._training)
        self._recorder.__enter__()
        if under_way:
            self._recorder.begin(model, ())

    def release(self) -> None:
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
        if self._captures and not self._added and self._backward_since:
            raise self._no_label_loss()
        self._forwards += 1
        if self._added:
            self._captures = []
        if self.branch is not None:
            capture = capture._replace(tokens=self.branch.branch.pop_tokens())
        self._captures = [*self._captures, capture][-self.passes :]
        self._added = self._backward_since = False

    def _on_backward(self) -> None:
        self._backward_since = True
        self._backwards += 1

    def _on_other_loss(self, name: str, target: Any) -> None:
        self._losses[f"{name} with targets {describe(target)}"] += 1

    def _on_label_loss(self, name: str, result: Any, target: Any) -> Any:
        """The host's label loss was computed: its result, or what takes its place."""
        if not (isinstance(result, Tensor) and result.requires_grad and self._training()):
            return result
        labels = self._labels(target)
        self._on_other_loss(name, target)
        if labels is None:
            return result
        if result.ndim:
            raise HostError(
                f"The label loss must be a scalar for the refiner's loss to be added; {name} gave shape "
                f"{tuple(result.shape)} (reduction='none'). Pass attach(..., label_loss=criterion) with a module whose output "
                "is the reduced loss, or add the loss yourself: loss = loss + refiner(img, cam, labels)."
            )
        if not self._captures:
            raise HostError(
                f"The label loss {name} was computed, but no CAM was captured before it: {self._model_name()} "
                f"ran {self._forwards} times in training mode with gradients. Give `attach` the very object that your loop "
                "calls (the DataParallel or DistributedDataParallel wrapper, if there is one)."
            )
        extra = None
        if not self._added:
            first = self._captures[0]
            extra = self.step(first, labels)
            self._added = True
            # The graph is the host's alone again.
            self._captures = [first._replace(output=None, records=Records({}), tokens=None)]
            if extra is None:
                return result
        rest = result if self.mode == "add" else 0.0 * result
        return rest if extra is None else extra.to(result.device) + rest

    def _labels(self, target: Any) -> Optional[Tensor]:
        """Labels (B, C), or None if this is no label loss over these classes. What counts as a label is not decided here."""
        num_classes = len(self.classes)
        if not isinstance(target, Tensor) or target.ndim < 2 or len(target) == 0:
            return None
        if self._captures and len(target) != len(self._captures[0].img):
            return None
        flat = target.detach().reshape(len(target), -1)
        if flat.shape[1] == num_classes + 1 and bool((flat[:, 0] == 1).all()):
            flat = flat[:, 1:]  # background first, present in every image
        return flat if flat.shape[1] == num_classes else None

    # ------------------------------------------------------------------------------------------------ what went wrong

    def _check_end(self) -> None:
        if self._captures and not self._added and self._backward_since:
            raise self._no_label_loss()
        if self.steps == self._steps_before and self._forwards:
            raise self._no_label_loss()
        if self.steps == self._steps_before and self._backwards:
            raise HostError(
                f"{self.source.name} trained without the refiner's loss: backward() ran {self._backwards} times, but "
                f"{self._model_name()} never ran in training mode with gradients. Give `attach` the very object that your loop "
                "calls, and call model.train()."
            )

    def _no_label_loss(self) -> HostError:
        seen = [f"{name} ({count}x)" for name, count in self._losses.most_common(10)]
        return HostError(
            f"{self.source.name} trained without the refiner's loss: its CAM was captured {self._forwards} times, backward() "
            f"ran {self._backwards} times, but no label loss over {len(self.classes)} classes was seen. Looked for "
            f"{listing(self._tap.names(), quote=False)}; "
            f"losses seen: {listing(seen, quote=False)}. If your host computes its label loss in another way, pass that "
            "module: attach(..., label_loss=criterion). If the number of classes differs, build the refiner with the host's."
        )

    def _model_name(self) -> str:
        return "no model" if self.model is None else type(unwrap(self.model)).__name__
