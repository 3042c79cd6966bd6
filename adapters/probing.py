"""Which of a host's parameters the refiner's loss reaches, and where its gradient stops. Flow: `recorder` -> **probing**."""

from __future__ import annotations

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .._hooks import unwrap
from .._text import listing
from ..errors import HostError
from ..refiner import PromptRefiner
from .graph import tensors_in
from .recorder import Capture, Recorder, models_being_probed
from .sources import CamSource, check_model, check_source, foreground_cams

__all__ = ["Probe", "Reach", "probe_host"]


class Reach(NamedTuple):
    """One part of the host.

    Attributes:
        name: of the module.
        parameters: number of its trainable values.
        reached: number of them in tensors that the loss has a gradient for.
        gradient: norm of that gradient, NaN if it holds NaN or inf.
        relative: the same over the norm of the parameters.
    """

    name: str
    parameters: int
    reached: int
    gradient: float
    relative: float


class Probe(NamedTuple):
    """What `probe` found; print it.

    Attributes:
        verdict: one line: attached, attached but zero, detached at ..., NaN at ...
        attached: whether the loss moves any parameter of the host.
        loss: value of the refiner's loss, NaN if there was none.
        rows: one `Reach` per part of the host, in the host's order.
        names: names of all parameters with a finite, non-zero gradient.
        cam: shapes of the CAMs, and how they relate to the host's own class scores where that is known.
    """

    verdict: str
    attached: bool
    loss: float
    rows: List[Reach]
    names: List[str]
    cam: str = ""

    def __str__(self) -> str:
        width = max([len("module"), *(len(row.name) for row in self.rows)])
        lines = [f"{'module':<{width}}  {'parameters':>12}  {'reached':>12}  {'gradient':>10}  {'/ weights':>10}"]
        for row in self.rows:
            numbers = f"{row.gradient:>10.2e}  {row.relative:>10.2e}" if row.reached else f"{'-':>10}  {'-':>10}"
            lines.append(f"{row.name:<{width}}  {row.parameters:>12,}  {row.reached:>12,}  {numbers}")
        return "\n".join([*lines, f"CAM {self.cam}", f"loss {self.loss:.4f}", f"verdict: {self.verdict}"])


class _Trace:
    """Outputs of all modules of the host in one forward pass, in the order in which they were finished."""

    def __init__(self, model: nn.Module):
        self.outputs: List[Tuple[str, Tensor]] = []
        self.handles = [
            module.register_forward_hook(self._hook(name or "the model's output")) for name, module in model.named_modules()
        ]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs += [(name, tensor) for tensor in tensors_in(output) if tensor.is_floating_point()]

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def probe_host(
    source: CamSource, model: nn.Module, refiner: PromptRefiner, img: Tensor, labels: Tensor, *, depth: int = 1
) -> Probe:
    """See `semples_plugin.adapters.probe`."""
    if not bool((labels != 0).any()):
        raise ValueError("`labels` must hold at least one positive label, or there is no loss to follow; got none.")
    check_model(source, model)
    check_source(source, refiner)
    inner = unwrap(model)
    captures: List[Capture] = []
    modes = {module: module.training for module in model.modules()}
    frozen = {p: p.requires_grad for p in model.parameters()}  # some hosts change it in train()
    buffers = {name: value.clone() for name, value in inner.named_buffers()}
    device = next((p.device for p in inner.parameters()), img.device)
    recorder = Recorder(model, source, captures.append, torch.is_grad_enabled)
    trace = _Trace(inner)
    devices = [device] if device.type == "cuda" else []
    try:
        models_being_probed.add(inner)
        with recorder, torch.enable_grad(), torch.random.fork_rng(devices):
            model.train()
            source.run(model, img.to(device))
        if not captures:
            raise HostError(f"{type(inner).__name__} was called, but its forward hooks did not fire; nothing was captured.")
        with torch.enable_grad():
            cams = foreground_cams(source, captures[0].img, captures[0].output, captures[0].records)
            found = _judge(source, inner, refiner, captures[0], cams, labels, trace.outputs, depth)
        agreement = source.agreement(captures[0].records)
        shapes = listing([tuple(cam.shape) for cam in cams], quote=False)
        return found._replace(cam=f"{shapes}, {agreement}" if agreement else shapes)
    finally:
        models_being_probed.discard(inner)
        trace.remove()
        for module, training in modes.items():
            module.training = training
        for parameter, before in frozen.items():
            parameter.requires_grad_(before)
        with torch.no_grad():
            for name, value in inner.named_buffers():
                value.copy_(buffers[name])


def _judge(
    source: CamSource,
    model: nn.Module,
    refiner: PromptRefiner,
    capture: Capture,
    cams: List[Tensor],
    labels: Tensor,
    outputs: List[Tuple[str, Tensor]],
    depth: int,
) -> Probe:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    nothing: Dict[str, Optional[Tensor]] = dict.fromkeys(parameters)
    bad = next((name for name, value in outputs if not bool(torch.isfinite(value).all())), None)
    if bad is not None or not all(bool(torch.isfinite(cam).all()) for cam in cams):
        where = f"module {bad!r}, the first whose output is not finite" if bad else f"the CAM itself ({source.name})"
        return _probe(f"NaN at {where}", False, math.nan, nothing, parameters, depth)
    if not all(cam.requires_grad for cam in cams):
        return _probe(f"detached at {_cut(outputs, capture.records.names())}", False, math.nan, nothing, parameters, depth)
    count = len(labels) if len(capture.img) % len(labels) == 0 else len(capture.img)  # a multiple: the first part counts
    outs = [refiner.compute(capture.img.detach()[:count].to(cam.device), cam[:count], labels.to(cam.device)) for cam in cams]
    summed = torch.stack([out.loss.to(cams[0].device) for out in outs]).sum()
    inside = [(name, value) for name, value in outputs if value.requires_grad]
    wanted = [*parameters.values(), *(value for _, value in inside)]
    found = torch.autograd.grad(summed, wanted, allow_unused=True) if wanted else ()
    gradients: Dict[str, Optional[Tensor]] = dict(zip(parameters, found))
    loss = float(summed.detach())
    broken = [name for name, g in gradients.items() if g is not None and not bool(torch.isfinite(g).all())]
    if broken:
        # The gradient runs from the last module to the first: NaN enters where the last module in that order has it.
        entered = [
            n for (n, _), g in zip(inside, found[len(parameters) :]) if g is not None and not bool(torch.isfinite(g).all())
        ]
        place = f"module {entered[-1]!r}, where it enters the gradient" if entered else f"parameter {broken[0]!r}"
        return _probe(f"NaN at {place}", False, loss, gradients, parameters, depth)
    reached = {name for name, g in gradients.items() if g is not None}
    if not reached:
        return _probe(
            f"detached at {_cut(outputs, capture.records.names())}: no trainable parameter lies before the CAM",
            False,
            loss,
            gradients,
            parameters,
            depth,
        )
    moved = [name for name in reached if bool(gradients[name].any())]  # type: ignore[union-attr]
    if not moved:
        verdict = (
            f"attached, but the gradient is zero: the terms are flat here ({_flat(outs[0].terms)}). A cosine at the edge of "
            "its clamp or a CAM that is flat or all negative does that; try another batch"
        )
        return _probe(verdict, False, loss, gradients, parameters, depth)
    total, held = sum(p.numel() for p in parameters.values()), sum(parameters[name].numel() for name in reached)
    verdict = f"attached: the loss reaches {held:,} of {total:,} trainable values ({len(reached)} of {len(parameters)} tensors)"
    missed: List[str] = []
    for group, names in _groups(list(parameters), depth).items():
        absent = [name for name in names if name not in reached]
        missed += [group] if absent == names else absent
    if missed:
        verdict += f"; not {', '.join(missed[:6])}{' ...' if len(missed) > 6 else ''}"
    return _probe(verdict, True, loss, gradients, parameters, depth)


def _probe(
    verdict: str,
    attached: bool,
    loss: float,
    gradients: Dict[str, Optional[Tensor]],
    parameters: Dict[str, nn.Parameter],
    depth: int,
) -> Probe:
    rows = []
    for group, names in _groups(list(parameters), depth).items():
        grads = [gradients[name] for name in names]
        squares = sum(float(g.double().square().sum()) for g in grads if g is not None)
        weights = math.sqrt(sum(float(parameters[name].detach().double().square().sum()) for name in names))
        norm = math.sqrt(squares) if math.isfinite(squares) else math.nan
        reached = sum(g.numel() for g in grads if g is not None)
        count = sum(parameters[name].numel() for name in names)
        rows.append(Reach(group, count, reached, norm, norm / weights if weights else math.inf if norm else 0.0))
    alive = [n for n, g in gradients.items() if g is not None and bool(torch.isfinite(g).all()) and bool(g.any())]
    return Probe(verdict, attached, loss, rows, alive)


def _groups(names: List[str], depth: int) -> Dict[str, List[str]]:
    """Parameter names by the first `depth` parts of their module's name; lists of blocks count one deeper."""
    groups: Dict[str, List[str]] = {}
    for name in names:
        parts = name.split(".")
        take = depth + 1 if len(parts) > depth and parts[depth].isdigit() else depth
        groups.setdefault(".".join(parts[: max(1, min(take, len(parts) - 1))]), []).append(name)
    return groups


def _cut(outputs: List[Tuple[str, Tensor]], watched: Sequence[str]) -> str:
    """Where the graph ends: after the last module on the way to the CAM whose output still has one.

    The way ends at the first watched module without a graph, or else at the last watched one; what runs later is another
    branch of the host. Without watched modules (the CAM is the model's output) it is the whole forward pass.
    """
    dead = [i for i, (name, value) in enumerate(outputs) if name in watched and not value.requires_grad]
    last = [i for i, (name, _) in enumerate(outputs) if name in watched]
    end = dead[0] if dead else last[-1] + 1 if last else len(outputs)
    alive = [name for name, value in outputs[:end] if value.requires_grad and name != "the model's output"]
    if not alive:
        return "its first module: no module's output carries a graph (all parameters frozen, or the forward runs under no_grad)"
    return f"module {alive[-1]!r}: the last one whose output carries a graph; what follows it on the way to the CAM is detached"


def _flat(terms: Dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in terms.items())
