"""Hook lifetime, label tap and loss tap: one mechanism for every host.

While an `Attachment` is entered

- forward hooks record what the host's CAM is made of, in the host's own forward pass; there is no second one;
- a `torch.overrides.TorchFunctionMode` sees the host's label loss, takes the labels from it and returns its result with the
  refiner's loss added, so that whatever the host does next with its loss (autocast, GradScaler, accumulation) holds for both.

On exit all of it is gone, also after an exception. Nothing is patched.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._checks import check_number
from .._hooks import unwrap
from .._text import describe, listing
from ..clusters.branch import ClusterBranch
from ..errors import DetachedCamError, HostError
from ..refiner import PromptRefiner
from .branch_training import BranchTraining
from .recorder import Capture, Recorder, check_model, check_source, img_and_cam, probed
from .sources import CamSource, Records

__all__ = ["Attachment", "unwrap"]
LABEL_LOSSES: Tuple[Callable[..., Tensor], ...] = (
    F.multilabel_soft_margin_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
)
LogStep = Callable[[int, Dict[str, float]], None]


class Attachment:
    """The refiner inside a host's training loop; what `attach(...)` returns. Use it in a `with`.

    A step is one forward pass of the model in training mode with gradients, and the label loss after it. If the model runs
    several times before its label loss, the last pass counts, so that a batch whose loss the host skips is forgotten; a host
    that needs several passes per step (two scales, say) is told by `passes`, and the first of them counts. Forward passes
    without gradients or in eval mode, and label losses there, are left alone.

    Attributes:
        terms: unweighted terms of the last step by name, as floats; empty before the first.
        loss: the refiner's loss in the last step, as a float, or None before the first.
        steps: steps so far.
    """

    def __init__(
        self,
        source: CamSource,
        model: Optional[nn.Module],
        refiner: Optional[PromptRefiner],
        *,
        mode: str = "add",
        weight: float = 1.0,
        label_loss: Union[None, nn.Module, Callable[..., Tensor]] = None,
        on_step: Optional[LogStep] = None,
        passes: int = 1,
        branch: Optional[ClusterBranch] = None,
        branch_optimizer: Optional[torch.optim.Optimizer] = None,
    ):
        if not isinstance(refiner, PromptRefiner) and (refiner is not None or branch is None):
            raise TypeError(f"`refiner` must be a PromptRefiner, or None together with `branch`; got {type(refiner).__name__}.")
        if mode not in ("add", "replace"):
            raise ValueError(f"`mode` must be 'add' (to the host's label loss) or 'replace' (it); got {mode!r}.")
        check_number("weight", weight, 0)
        check_number("passes", passes, 1, whole=True)
        if on_step is not None and not callable(on_step):
            raise TypeError(f"`on_step` must be a callable (step, terms); got {type(on_step).__name__}.")
        if refiner is not None:
            check_source(source, refiner)
        self.branch = None if branch is None else BranchTraining(branch, branch_optimizer, refiner)
        if branch is None and branch_optimizer is not None:
            raise ValueError("`branch_optimizer` is for the parameters of `branch`; got no `branch`.")
        self.source, self.refiner, self.mode, self.weight, self.on_step = source, refiner, mode, weight, on_step
        self.classes = list(refiner.classes if refiner is not None else branch.clusters.classes)  # type: ignore[union-attr]
        self.steps, self.passes = 0, passes
        self._tensors: Dict[str, Tensor] = {}
        self._criterion = label_loss if isinstance(label_loss, nn.Module) else None
        self._functions = _functions(label_loss)
        self._recorder: Optional[Recorder] = None
        self._mode: Optional[_Tap] = None
        self._handles: List[Any] = []
        self._clear()
        self._model: Optional[nn.Module] = None
        if model is not None:
            check_model(source, model)
            self._model = model

    def _clear(self) -> None:
        self._captures: List[Capture] = []  # the last `passes` of the current step
        self._added = self._backward_since = False  # in the current step
        self._forwards = self._backwards = 0
        self._before = self.steps
        self._seen: "Counter[str]" = Counter()

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> "Attachment":
        if self._mode is not None:
            raise HostError("This attachment is entered already; use one `with` at a time.")
        self._clear()
        try:
            if self.branch is not None:
                self.branch.begin()
            if self._criterion is not None:
                self._handles.append(self._criterion.register_forward_hook(self._on_criterion))
            if self._model is not None:
                self.bind(self._model)
            self._mode = _Tap(self)
            self._mode.__enter__()
        except BaseException:
            self._mode = None
            self._remove()
            raise
        return self

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        mode, self._mode = self._mode, None
        try:
            if mode is not None:
                mode.__exit__(kind, value, traceback)
        finally:
            self._remove()
        if kind is None:
            self._check_end()
            if self.branch is not None:
                self.branch.end()
        self._captures = []

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None
        if self.branch is not None:
            self.branch.leave()

    def bind(self, model: nn.Module, under_way: bool = False) -> None:
        """Put the hooks on a model; a `with` does it on entry, the runner when the host's model turns up.

        Args:
            model: the host.
            under_way: whether its forward pass has begun, so that it counts as well.
        """
        self._model = model
        if self.branch is not None:  # before the recorder, which is to see the host's own tokens
            self.branch.enter(model)
        self._recorder = Recorder(model, self.source, self._on_forward, self._training)
        self._recorder.__enter__()
        if under_way:
            self._recorder.begin(model, ())

    # ------------------------------------------------------------------------------------------------ what is seen

    def _training(self) -> bool:
        model = self._model
        return torch.is_grad_enabled() and model is not None and unwrap(model).training and unwrap(model) not in probed

    def _on_forward(self, img: Tensor, output: Any, records: Records) -> None:
        if self._captures and not self._added and self._backward_since:
            raise self._never_tapped()
        self._forwards += 1
        if self._added:
            self._captures = []
        seen = None if self.branch is None else self.branch.branch.take()
        self._captures = [*self._captures, Capture(img, output, records, seen)][-self.passes :]
        self._added = self._backward_since = False

    def _on_backward(self) -> None:
        self._backward_since = True
        self._backwards += 1

    def _on_criterion(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self._on_loss(type(module).__name__, output, inputs[1] if len(inputs) > 1 else None)

    def _on_loss(self, name: str, result: Any, target: Any) -> Any:
        """The host's label loss was computed: its result, or what takes its place."""
        if not (isinstance(result, Tensor) and result.requires_grad and self._training()):
            return result
        labels = self._labels(target)
        self._seen[f"{name} with targets {describe(target)}"] += 1
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
                f"The label loss {name} was computed, but no CAM was captured before it: "
                f"{type(unwrap(self._model)).__name__ if self._model is not None else 'no model'} "
                f"ran {self._forwards} times in training mode with gradients. Give `attach` the very object that your loop "
                "calls (the DataParallel or DistributedDataParallel wrapper, if there is one)."
            )
        if not self._added:
            first = self._captures[0]
            extra = self._step(first, labels)
            self._added = True
            self._captures = [first._replace(output=None, records=Records({}), seen=None)]  # the graph is the host's again
            if extra is not None:
                extra = extra.to(result.device)
                return extra + (result if self.mode == "add" else 0.0 * result)
            return result
        return result if self.mode == "add" else 0.0 * result

    def _labels(self, target: Any) -> Optional[Tensor]:
        """Labels (B, C), or None if this is no label loss over the refiner's classes."""
        num_classes = len(self.classes)
        if not isinstance(target, Tensor) or target.ndim < 2 or len(target) == 0:
            return None
        if self._captures and len(target) != len(self._captures[0].img):
            return None
        flat = target.detach().reshape(len(target), -1)
        if flat.shape[1] == num_classes + 1 and bool((flat[:, 0] == 1).all()):
            flat = flat[:, 1:]  # background first, present in every image
        return flat if flat.shape[1] == num_classes else None

    # ------------------------------------------------------------------------------------------------ what is done

    def _step(self, capture: Capture, labels: Tensor) -> Optional[Tensor]:
        """The refiner's loss of one step, weighted, and that of the cluster branch."""
        losses: List[Tensor] = []
        terms: Dict[str, Tensor] = {}
        if self.refiner is not None:
            img, cam = img_and_cam(self.source, self.refiner, capture)
            if not cam.requires_grad:
                raise DetachedCamError(
                    f"The CAM of {self.source.name} is cut off from the host's graph, so the loss cannot train the host. "
                    "semples_plugin.adapters.probe(...) says at which module."
                )
            out = self.refiner.compute(img, cam, labels.to(cam.device))
            losses.append(self.weight * out.loss)
            terms.update(out.terms, loss=out.loss)
        if self.branch is not None and capture.seen is not None:  # `seen` is always there with a branch
            added = self.branch.branch.compute(labels, capture.seen)
            losses.append(added.loss)
            terms.update(added.terms)
            terms["loss"] = added.loss if "loss" not in terms else terms["loss"] + added.loss.to(terms["loss"].device)
        self.steps += 1
        self._tensors = {name: term.detach() for name, term in terms.items()}
        if self.on_step is not None:
            self.on_step(self.steps, {**self.terms, "loss": float(self._tensors["loss"])})
        extra = losses[0] if len(losses) == 1 else losses[0] + losses[1].to(losses[0].device)
        if self.branch is not None:
            self.branch.watch(extra)
        return extra

    @property
    def terms(self) -> Dict[str, float]:
        return {name: float(value) for name, value in self._tensors.items() if name != "loss"}

    @property
    def loss(self) -> Optional[float]:
        return float(self._tensors["loss"]) if self._tensors else None

    # ------------------------------------------------------------------------------------------------ what went wrong

    def _never_tapped(self) -> HostError:
        seen = [f"{name} ({count}x)" for name, count in self._seen.most_common(10)]
        return HostError(
            f"{self.source.name} trained without the refiner's loss: its CAM was captured {self._forwards} times, backward() "
            f"ran {self._backwards} times, but no label loss over {len(self.classes)} classes was seen. Looked for "
            f"{listing([self._name_of(f) for f in self._watched_losses()], quote=False)}; "
            f"losses seen: {listing(seen, quote=False)}. If your host computes its label loss in another way, pass that "
            "module: attach(..., label_loss=criterion). If the number of classes differs, build the refiner with the host's."
        )

    def _check_end(self) -> None:
        if self._captures and not self._added and self._backward_since:
            raise self._never_tapped()
        if self.steps == self._before and self._forwards:
            raise self._never_tapped()
        if self.steps == self._before and self._backwards:
            name = type(unwrap(self._model)).__name__ if self._model is not None else "no model"
            raise HostError(
                f"{self.source.name} trained without the refiner's loss: backward() ran {self._backwards} times, but {name} "
                "never ran in training mode with gradients. Give `attach` the very object that your loop calls, and call "
                "model.train()."
            )

    def _watched_losses(self) -> List[Any]:
        return [self._criterion] if self._criterion is not None else list(self._functions)

    @staticmethod
    def _name_of(loss: Any) -> str:
        return getattr(loss, "__name__", type(loss).__name__)


class _Tap(TorchFunctionMode):
    """Sees every torch function that the host calls; touches the label losses only."""

    def __init__(self, attachment: Attachment):
        super().__init__()
        self.attachment = attachment

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Optional[Dict[str, Any]] = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self.attachment._on_backward()
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in self.attachment._functions:
            return self.attachment._on_loss(name, result, _target(args, kwargs))
        if ("_loss" in name or "cross_entropy" in name) and torch.is_grad_enabled():  # for the message of `_never_tapped`
            self.attachment._seen[f"{name} with targets {describe(_target(args, kwargs))}"] += 1
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
