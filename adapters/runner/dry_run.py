"""A few steps of a script with the refiner attached, and one page of what was found. Flow: `job` -> **dry_run** ->
`process`."""

from __future__ import annotations

import contextlib
from typing import Dict, List, Optional, Set

import torch
from torch import Tensor, nn

from ..._hooks import unwrap
from ..._text import listing
from ...refiner import PromptRefiner
from ..attachment import Attachment
from ..recorder import Capture
from .job import Job, Target
from .process import host_process, run_script

__all__ = ["Inspection", "dry_run"]

MOST_BACKWARDS = 50  # of a script that never comes to a step


class _Enough(BaseException):
    """Enough steps were seen. Not an `Exception`, so that no `except Exception` of a host catches it."""


class Inspection(Attachment):
    """An attachment that ends the script after some steps and remembers what it saw.

    Args:
        target: the network to be looked for.
        refiner: gives the loss.
        steps: after which it has seen enough.

    Attributes:
        reached: names of the parameters that the refiner's loss of the first step has a gradient for.
        flat: whether that gradient is zero, as with a rectified CAM that is negative everywhere.
        grown: the weighted refiner's loss of the first step.
        losses: the host's loss of the first step, without and with the refiner's.
        batches: sizes of the image and the label batch of each step, without repetitions.
    """

    def __init__(self, target: Target, refiner: PromptRefiner, steps: int):
        super().__init__(target.source, None, refiner, **target.options)
        self.wanted = steps
        self.reached: Set[str] = set()
        self.flat = False
        self.grown: Optional[float] = None
        self.losses: List[float] = []
        self.batches: List[str] = []
        self.others_in_this_run: List["Inspection"] = [self]

    def step(self, capture: Capture, labels: Tensor) -> Optional[Tensor]:
        extra = super().step(capture, labels)
        sizes = f"{len(capture.img)} images of {capture.img.shape[2]} x {capture.img.shape[3]}, {len(labels)} rows of labels"
        if sizes not in self.batches:
            self.batches.append(sizes)
        if extra is not None and self.grown is None:
            self.grown = float(extra.detach())
            self.reached = self._reach(extra)
        return extra

    def _sum(self, result: Tensor, extra: Optional[Tensor]) -> Tensor:
        total = super()._sum(result, extra)
        if extra is not None and not self.losses:
            self.losses = [float(result.detach()), float(total.detach())]
        return total

    def _reach(self, extra: Tensor) -> Set[str]:
        assert self.model is not None
        named = [(name, p) for name, p in unwrap(self.model).named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(extra, [p for _, p in named], retain_graph=True, allow_unused=True)
        found = {name: gradient for (name, _), gradient in zip(named, gradients) if gradient is not None}
        self.flat = not any(bool(gradient.any()) for gradient in found.values())
        return set(found)

    def _on_forward(self, capture: Capture) -> None:
        if all(other.steps >= other.wanted for other in self.others_in_this_run):
            raise _Enough
        super()._on_forward(capture)

    def _on_backward(self, loss: Tensor) -> Tensor:
        loss = super()._on_backward(loss)
        if self._backwards > MOST_BACKWARDS and not self.steps:
            raise _Enough
        return loss

    def page(self) -> str:
        """What was seen, in lines of text."""
        if self.model is None:
            return f"network: none. {self.none_fits()}"
        network = unwrap(self.model)
        lines = [f"network: {type(network).__name__}, {_parameters(network):,} trainable values in training mode"]
        if not self.steps:
            return "\n".join([*lines, f"steps: none. {self._no_label_loss()}"])
        where = "at backward()" if self._tap.at_backward else f"at {listing(self._tap.names(), quote=False)}"
        lines += [
            f"steps: {self.steps}; {'; '.join(self.batches)}",
            f"CAM: {listing(self.cam_shapes, quote=False)}{', ' + self.agreement if self.agreement else ''}",
            f"labels: {self.labels}",
            f"loss: added {where}; {self._growth()}",
            f"terms of the last step: {', '.join(f'{name} {value:.4f}' for name, value in self.terms.items())}",
            f"reached: {self._reach_in_words(network)}",
            f"losses seen: {listing([f'{name} ({count}x)' for name, count in self._losses.most_common()], quote=False)}",
            f"label losses of other networks: {listing([f'{n} ({c}x)' for n, c in self.others.items() if c], quote=False)}",
        ]
        return "\n".join([*lines, *(f"later: {phase}" for phase in self.source.phases)])

    def _growth(self) -> str:
        if self.grown is None or not self.losses:
            return "in no step yet"
        before, after = self.losses
        return f"the first was {before:.4f} and became {after:.4f}, the refiner's is {self.grown:.4f}"

    def _reach_in_words(self, network: nn.Module) -> str:
        groups: Dict[str, List[bool]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(name.partition(".")[0], []).append(name in self.reached)
        words = [f"{group} ({sum(hits)} of {len(hits)} tensors)" for group, hits in groups.items() if any(hits)]
        missed = [group for group, hits in groups.items() if not any(hits)]
        zero = "; the gradient was zero in the first step" if self.flat else ""
        return listing(words, quote=False) + (f"; not {listing(missed, quote=False)}" if missed else "") + zero


def dry_run(job: Job) -> int:
    """Run the script until every target had its steps, and print the page. Returns an exit status: 1 if one had none."""
    assert job.dry_run is not None
    refiner = job.refiner()
    inspections = [Inspection(target, refiner, job.dry_run) for target in job.targets]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(host_process(job))
            for inspection, target in zip(inspections, job.targets):
                inspection.others_in_this_run = inspections
                inspection.script, inspection.what = job.script[0], f"a network that the adapter {target.host!r} knows"
                stack.enter_context(inspection)
            run_script(job)
    except _Enough:
        pass
    finally:  # also of a script that failed
        for inspection, target in zip(inspections, job.targets):
            print(f"{target.host}\n{inspection.page()}\n", flush=True)
    return 0 if all(inspection.steps for inspection in inspections) else 1


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
