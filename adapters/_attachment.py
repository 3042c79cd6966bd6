"""Hook lifetime, label tap and loss tap: one mechanism for every host.

While an `Attachment` is entered

- forward hooks record what the host's CAM is made of, in the host's own forward pass; there is no second one;
- a `torch.overrides.TorchFunctionMode` sees the host's label loss, takes the labels from it and returns its result with the
  refiner's loss added, so that whatever the host does next with its loss (autocast, GradScaler, accumulation) holds for both.

On exit all of it is gone, also after an exception. Nothing is patched.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections import Counter
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._checks import check_number, check_stats
from .._hooks import Hook, unwrap
from ..cluster_branch import ClusterBranch, Seen
from ..errors import DetachedCamError, HostError
from ..refiner import PromptRefiner

__all__ = ["AdapterError", "Attachment", "CamSource", "Records", "unwrap"]

LABEL_LOSSES: Tuple[Callable[..., Tensor], ...] = (
    F.multilabel_soft_margin_loss,
    F.binary_cross_entropy_with_logits,
    F.binary_cross_entropy,
)
_WITH_KWARGS = "with_kwargs" in inspect.signature(nn.Module.register_forward_hook).parameters  # torch >= 2.0
LogStep = Callable[[int, Dict[str, float]], None]
probed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # models that `probe` runs right now: no training step


class AdapterError(HostError):
    """A host and the refiner do not meet: another model than expected, no CAM, no label loss, no gradient."""


class Records:
    """Outputs of the watched modules in one forward pass of the host; `records["head"]` is the first one of `head`.

    A module that ran more than once (local crops after the image, say) has them in order in `records.all("head")`.
    """

    def __init__(self, watched: Mapping[str, nn.Module]):
        self._outputs: Dict[str, List[Any]] = {name: [] for name in watched}

    def add(self, name: str, output: Any) -> None:
        self._outputs[name].append(output)

    def names(self) -> List[str]:
        """The watched modules, in the order of `CamSource.modules`."""
        return list(self._outputs)

    def all(self, name: str) -> List[Any]:
        if name not in self._outputs:
            raise AdapterError(f"Module {name!r} is not watched; watched are {_listing(self._outputs)}.")
        return self._outputs[name]

    def __getitem__(self, name: str) -> Any:
        outputs = self.all(name)
        if not outputs:
            ran = [other for other, seen in self._outputs.items() if seen]
            raise AdapterError(
                f"The CAM needs the output of {name!r}, which did not run in this forward pass; of the watched modules "
                f"{_listing(ran)} ran. Hooks see only calls of the module itself, not of its methods or its weight."
            )
        return outputs[0]


class CamSource:
    """Where a host's differentiable CAM comes from. One subclass per host; derive your own for a host of your own.

    Attributes:
        name: of the host, for messages.
        background_channel: whether channel 0 of `cam(...)` is background.
        image_stats: statistics of the host's images as `PromptRefiner` takes them, or None if they are not known.
    """

    name = "host"
    background_channel = False
    image_stats: Any = None

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        """Modules of the (unwrapped) model whose outputs `cam` needs.

        Raises:
            AdapterError: if `model` is not of the kind this source is for.
        """
        return {}

    def cam(self, img: Tensor, output: Any, records: Records) -> Tensor:
        """Class activation maps (B, C, h, w) of one forward pass, attached to its graph.

        Args:
            img: (B, 3, H, W) the host's input.
            output: what the host's `forward` returned.
            records: what the modules of `modules` returned.
        """
        raise NotImplementedError

    def image(self, inputs: Tuple[Any, ...], keywords: Mapping[str, Any]) -> Optional[Tensor]:
        """The image batch among the arguments of the host's `forward`; by default the first one that looks like it."""
        for value in (*inputs, *keywords.values()):
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3 and value.is_floating_point():
                return value
        return None

    def run(self, model: nn.Module, img: Tensor) -> Any:
        """One call of the host with nothing but images, for `probe` and `cam_of`."""
        return model(img)

    @staticmethod
    def find(model: nn.Module, names: Mapping[str, Type[nn.Module]], host: str) -> Dict[str, nn.Module]:
        """Sub-modules by name, of the given types, or an `AdapterError` that says what the model has instead."""
        found = {}
        for name, kind in names.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                module = None
            if not isinstance(module, kind):
                what = "is missing" if module is None else f"is a {type(module).__name__}"
                raise AdapterError(
                    f"This is no {host} model: expected the module {name!r} ({kind.__name__}), which {what} in "
                    f"{type(model).__name__}. Its modules are {_listing([n for n, _ in model.named_children()])}. "
                    'For another network use attach("generic", ...).'
                )
            found[name] = module
        return found


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
        options = {"with_kwargs": True} if _WITH_KWARGS else {}
        try:
            self.handles.append(self.model.register_forward_pre_hook(Hook(self.begin)))
            self.handles.append(self.model.register_forward_hook(Hook(self._end), **options))
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
            raise AdapterError(
                f"{type(module).__name__} runs as a replica of torch.nn.DataParallel. Give `attach` the DataParallel wrapper "
                "itself, as your loop calls it."
            )
        self.records = Records(self.watched) if self.wanted() else None

    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.records is None:
            return
        if getattr(module, "_is_replica", False):
            raise AdapterError(
                f"The CAM of {self.source.name} is made inside the network ({name!r}), and torch.nn.DataParallel runs that in "
                "one thread per GPU. Use DistributedDataParallel (one process per GPU) or one GPU "
                "(CUDA_VISIBLE_DEVICES=0)."
            )
        self.records.add(name, output)

    def _end(self, module: nn.Module, inputs: Any, *rest: Any) -> None:
        keywords, output = rest if _WITH_KWARGS else ({}, rest[0])
        records, self.records = self.records, None
        if records is None:
            return
        img = self.source.image(inputs if isinstance(inputs, tuple) else (inputs,), keywords)
        if img is None:
            given = [_describe(value) for value in (*inputs, *keywords.values())]
            raise AdapterError(
                f"{type(unwrap(self.model)).__name__} was called without an image batch: expected a float tensor "
                f"(B, 3, H, W) among its arguments, got {_listing(given, quote=False)}. Give a CamSource with its own "
                f"`image(...)`.{'' if _WITH_KWARGS else ' Before torch 2.0 only positional arguments are seen.'}"
            )
        self.on_forward(img, output, records)


class Capture(NamedTuple):
    """One forward pass of the host, and what it left for a cluster branch."""

    img: Tensor
    output: Any
    records: Records
    seen: Optional[Seen] = None


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
        clusters: Optional[ClusterBranch] = None,
        cluster_optimizer: Optional[torch.optim.Optimizer] = None,
    ):
        if not isinstance(refiner, PromptRefiner) and (refiner is not None or clusters is None):
            raise TypeError(
                f"`refiner` must be a PromptRefiner, or None together with `clusters`; got {type(refiner).__name__}."
            )
        if mode not in ("add", "replace"):
            raise ValueError(f"`mode` must be 'add' (to the host's label loss) or 'replace' (it); got {mode!r}.")
        check_number("weight", weight, 0)
        check_number("passes", passes, 1, whole=True)
        if on_step is not None and not callable(on_step):
            raise TypeError(f"`on_step` must be a callable (step, terms); got {type(on_step).__name__}.")
        if refiner is not None:
            _check_source(source, refiner)
        self.clusters = None if clusters is None else ClusterTraining(clusters, cluster_optimizer, refiner)
        if clusters is None and cluster_optimizer is not None:
            raise ValueError("`cluster_optimizer` is for the parameters of `clusters`; got no `clusters`.")
        self.source, self.refiner, self.mode, self.weight, self.on_step = source, refiner, mode, weight, on_step
        self.classes = list(refiner.classes if refiner is not None else clusters.clusters.classes)  # type: ignore[union-attr]
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
            raise AdapterError("This attachment is entered already; use one `with` at a time.")
        self._clear()
        try:
            if self.clusters is not None:
                self.clusters.begin()
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
            if self.clusters is not None:
                self.clusters.end()
        self._captures = []

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None
        if self.clusters is not None:
            self.clusters.leave()

    def bind(self, model: nn.Module, under_way: bool = False) -> None:
        """Put the hooks on a model; a `with` does it on entry, the runner when the host's model turns up.

        Args:
            model: the host.
            under_way: whether its forward pass has begun, so that it counts as well.
        """
        self._model = model
        if self.clusters is not None:  # before the recorder, which is to see the host's own tokens
            self.clusters.enter(model)
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
        seen = None if self.clusters is None else self.clusters.branch.take()
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
        self._seen[f"{name} with targets {_describe(target)}"] += 1
        if labels is None:
            return result
        if result.ndim:
            raise AdapterError(
                f"The label loss must be a scalar for the refiner's loss to be added; {name} gave shape "
                f"{tuple(result.shape)} (reduction='none'). Pass attach(..., label_loss=criterion) with a module whose output "
                "is the reduced loss, or add the loss yourself: loss = loss + refiner(img, cam, labels)."
            )
        if not self._captures:
            raise AdapterError(
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
        return flat.round() if flat.shape[1] == num_classes else None  # smoothed labels become 0 and 1

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
        if self.clusters is not None and capture.seen is not None:  # `seen` is always there with a branch
            branch = self.clusters.branch.compute(labels, capture.seen)
            losses.append(branch.loss)
            terms.update(branch.terms)
            terms["loss"] = branch.loss if "loss" not in terms else terms["loss"] + branch.loss.to(terms["loss"].device)
        self.steps += 1
        self._tensors = {name: term.detach() for name, term in terms.items()}
        if self.on_step is not None:
            self.on_step(self.steps, {**self.terms, "loss": float(self._tensors["loss"])})
        extra = losses[0] if len(losses) == 1 else losses[0] + losses[1].to(losses[0].device)
        if self.clusters is not None:
            self.clusters.watch(extra)
        return extra

    @property
    def terms(self) -> Dict[str, float]:
        return {name: float(value) for name, value in self._tensors.items() if name != "loss"}

    @property
    def loss(self) -> Optional[float]:
        return float(self._tensors["loss"]) if self._tensors else None

    # ------------------------------------------------------------------------------------------------ what went wrong

    def _never_tapped(self) -> AdapterError:
        seen = [f"{name} ({count}x)" for name, count in self._seen.most_common(10)]
        return AdapterError(
            f"{self.source.name} trained without the refiner's loss: its CAM was captured {self._forwards} times, backward() "
            f"ran {self._backwards} times, but no label loss over {len(self.classes)} classes was seen. Looked for "
            f"{_listing([self._name_of(f) for f in self._watched_losses()], quote=False)}; "
            f"losses seen: {_listing(seen, quote=False)}. If your host computes its label loss in another way, pass that "
            "module: attach(..., label_loss=criterion). If the number of classes differs, build the refiner with the host's."
        )

    def _check_end(self) -> None:
        if self._captures and not self._added and self._backward_since:
            raise self._never_tapped()
        if self.steps == self._before and self._forwards:
            raise self._never_tapped()
        if self.steps == self._before and self._backwards:
            name = type(unwrap(self._model)).__name__ if self._model is not None else "no model"
            raise AdapterError(
                f"{self.source.name} trained without the refiner's loss: backward() ran {self._backwards} times, but {name} "
                "never ran in training mode with gradients. Give `attach` the very object that your loop calls, and call "
                "model.train()."
            )

    def _watched_losses(self) -> List[Any]:
        return [self._criterion] if self._criterion is not None else list(self._functions)

    @staticmethod
    def _name_of(loss: Any) -> str:
        return getattr(loss, "__name__", type(loss).__name__)


class ClusterTraining:
    """A cluster branch inside a host's training loop: its place in the host, and the steps of its own parameters.

    The host's optimiser does not know the branch's parameters. With an optimiser of their own they are stepped at the end of
    every backward pass. The factor that the host puts on its loss (a
    gradient scaler's, one over the accumulated batches) is measured at the added loss and divided out again; a step whose
    gradient is not finite is left out, as a gradient scaler does. Under `torch.distributed` gradients are averaged.
    """

    def __init__(self, branch: ClusterBranch, optimizer: Optional[torch.optim.Optimizer], refiner: Optional[PromptRefiner]):
        if not isinstance(branch, ClusterBranch):
            raise TypeError(
                f"`clusters` must be a ClusterBranch; got {type(branch).__name__}. Make one: ClusterBranch(clusters, model)."
            )
        if refiner is not None and tuple(refiner.classes) != branch.clusters.classes:
            raise ValueError(
                "The refiner and the cluster branch must have the same classes in the same order; got "
                f"{_listing(refiner.classes)} and {_listing(branch.clusters.classes)}. Use clusters.ordered(refiner.classes)."
            )
        self.branch, self.optimizer = branch, optimizer
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            lacking = [name for name, p in branch.named_parameters() if id(p) not in held]
            if lacking:
                raise ValueError(
                    f"`cluster_optimizer` must hold the parameters of `clusters`; it lacks {_listing(lacking)}. Make it with "
                    "torch.optim.AdamW(branch.parameters(), lr=...)."
                )
            surplus = len(held) - len(list(branch.parameters()))
            if surplus > 0:
                raise ValueError(
                    f"`cluster_optimizer` must hold the parameters of `clusters` alone; it holds {surplus} more, which "
                    "would be stepped twice if they are the host's. If the host's own optimiser has the branch's parameters, "
                    "pass cluster_optimizer=None."
                )
        self._place: Any = None
        self._before: List[Tensor] = []
        self._factors: List[Tensor] = []
        self._reached = False
        self._left_out = 0

    # ------------------------------------------------------------------------------------------------ life

    def begin(self) -> None:
        self._factors, self._reached, self._left_out = [], False, 0
        if self.optimizer is None:
            self._before = [p.detach().clone() for p in self.branch.parameters()]
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def enter(self, model: nn.Module) -> None:
        ours = {id(p) for p in self.branch.parameters() if p.requires_grad}
        if self.optimizer is None and _processes() > 1 and not ours <= {id(p) for p in model.parameters()}:
            raise AdapterError(
                "The host runs in several processes, and nobody averages the gradients of the cluster branch over them. Give "
                "`attach` an optimiser for them: cluster_optimizer=torch.optim.AdamW(branch.parameters(), lr=1e-3)."
            )
        self._place = self.branch.insert(model)
        self._place.__enter__()

    def leave(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            place.__exit__(None, None, None)

    def end(self) -> None:
        """The loop is over without an error: a check that the parameters did move."""
        before, self._before = self._before, []
        moved = not all(torch.equal(a.to(b.device), b) for a, b in zip(before, self.branch.parameters()))
        if self.optimizer is None and self._reached and not moved:
            raise AdapterError(
                "The cluster branch was not trained: backward() ran, but none of its parameters changed. Give `attach` an "
                "optimiser for them, attach(..., cluster_optimizer=torch.optim.AdamW(branch.parameters(), lr=1e-3)), or add "
                'them to the host\'s: optimizer.add_param_group({"params": branch.parameters()}).'
            )
        if self._left_out:
            warnings.warn(
                f"{self._left_out} steps of the cluster branch were left out, since its gradients were not finite. A few are "
                "normal with a gradient scaler; if they are all, look at the host's loss.",
                stacklevel=3,
            )

    # ------------------------------------------------------------------------------------------------ steps

    def watch(self, loss: Tensor) -> None:
        """Have the branch stepped at the end of the backward pass that reaches the added loss."""
        if loss.requires_grad:
            loss.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Tensor) -> None:
        self._reached = True
        if self.optimizer is not None:
            self._factors.append(gradient.detach().clone())
            # At the end of this backward pass, as DistributedDataParallel does: in every process at the same place.
            torch.autograd.Variable._execution_engine.queue_callback(self._update)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _update(self) -> None:
        """One step of the branch's own optimiser."""
        factors, self._factors = self._factors, []
        gradients = [p.grad for p in self.branch.parameters() if p.grad is not None]
        if self.optimizer is None or not factors or not gradients:
            return
        factor = torch.stack([f.float().to(factors[0].device) for f in factors]).mean()
        for gradient in gradients:
            gradient /= factor.to(gradient.device)
        _average(gradients)
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self.optimizer.step()
        else:
            self._left_out += 1
        self.optimizer.zero_grad(set_to_none=True)


def _average(gradients: List[Tensor]) -> None:
    """Mean over all processes, in place."""
    if _processes() > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= _processes()


def _processes() -> int:
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
            self.attachment._seen[f"{name} with targets {_describe(_target(args, kwargs))}"] += 1
        return result


def img_and_cam(source: CamSource, refiner: PromptRefiner, capture: Capture) -> Tuple[Tensor, Tensor]:
    """img and CAM of a forward pass as the refiner takes them: on one device, a background channel only if it expects one."""
    cam = source.cam(capture.img, capture.output, capture.records)
    if not isinstance(cam, Tensor):
        raise AdapterError(f"The CAM of {source.name} must be a tensor (B, C, h, w); got {_describe(cam)}.")
    if source.background_channel and not refiner.background_channel:
        cam = cam[:, 1:]
    return capture.img.detach().to(cam.device), cam


def check_model(source: CamSource, model: Any) -> None:
    """Raise if `model` is no network, or not of the kind that `source` is for."""
    if not isinstance(model, nn.Module):
        hint = " Some hosts' model.eval() and model.train() return None; call them before." if model is None else ""
        raise TypeError(f"`model` must be the host's torch.nn.Module; got {type(model).__name__}.{hint}")
    source.modules(unwrap(model))


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


def _check_source(source: CamSource, refiner: PromptRefiner) -> None:
    if not isinstance(source, CamSource):
        raise TypeError(f"The host must be a name or a CamSource; got {type(source).__name__}.")
    if refiner.background_channel and not source.background_channel:
        raise ValueError(
            f"The refiner was built with background_channel=True, but the CAM of {source.name} has none. Build it with "
            "background_channel=False."
        )
    if source.image_stats is not None and refiner.image_stats != check_stats(source.image_stats):
        warnings.warn(
            f"{source.name} normalises its images with {source.image_stats!r}; the refiner was built for "
            f"image_stats={refiner.image_stats!r}.",
            stacklevel=4,
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    return type(value).__name__


def _listing(names: Any, quote: bool = True, longest: int = 12) -> str:
    names = [repr(name) if quote else str(name) for name in names]
    more = f" and {len(names) - longest} more" if len(names) > longest else ""
    return (", ".join(names[:longest]) + more) or "none"
