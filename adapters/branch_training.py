"""A cluster branch inside a host's training loop, and the steps of its own parameters. Flow: **branch_training** -> `loop`."""

from __future__ import annotations

from typing import Any, List, Optional

import torch
from torch import Tensor, nn

from .._checks import warn
from .._text import listing
from ..clusters.branch import ClusterBranch
from ..errors import HostError
from ..refiner import PromptRefiner

__all__ = ["BranchTraining"]


class BranchTraining:
    """A cluster branch inside a host's training loop: its place in the host, and the steps of its own parameters.

    The host's optimizer does not know the branch's parameters. An optimizer of their own steps them at the end of every
    backward pass. The factor that the host puts on its loss (a gradient scaler's, one over the accumulated batches) is
    measured at the added loss and divided out again. A step whose gradient is not finite is left out, as a gradient scaler
    leaves it out. Under `torch.distributed` gradients are averaged.

    Args:
        branch: the branch.
        optimizer: of its parameters alone, or None if they are in the host's optimizer.
        refiner: the refiner beside it, which must have the same classes, or None.
    """

    def __init__(self, branch: ClusterBranch, optimizer: Optional[torch.optim.Optimizer], refiner: Optional[PromptRefiner]):
        if not isinstance(branch, ClusterBranch):
            raise TypeError(
                f"`branch` must be a ClusterBranch; got {type(branch).__name__}. Make one: ClusterBranch(clusters, model)."
            )
        if refiner is not None and tuple(refiner.classes) != branch.clusters.classes:
            raise ValueError(
                "The refiner and the cluster branch must have the same classes in the same order; got "
                f"{listing(refiner.classes)} and {listing(branch.clusters.classes)}. Use clusters.ordered(refiner.classes)."
            )
        self.branch, self.optimizer = branch, optimizer
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            lacking = [name for name, p in branch.named_parameters() if id(p) not in held]
            if lacking:
                raise ValueError(
                    f"`branch_optimizer` must hold the parameters of `branch`; it lacks {listing(lacking)}. Make it with "
                    "torch.optim.AdamW(branch.parameters(), lr=...)."
                )
            surplus = len(held) - len(list(branch.parameters()))
            if surplus > 0:
                raise ValueError(
                    f"`branch_optimizer` must hold the parameters of `branch` alone; it holds {surplus} more, which "
                    "would be stepped twice if they are the host's. If the host's own optimizer has the branch's parameters, "
                    "pass branch_optimizer=None."
                )
        self._place: Any = None
        self._before: List[Tensor] = []
        self._factors: List[Tensor] = []
        self._reached = False
        self._left_out = 0

    # ------------------------------------------------------------------------------------------------ life

    def begin(self) -> None:
        """A `with` begins."""
        self._factors, self._reached, self._left_out = [], False, 0
        if self.optimizer is None:
            self._before = [p.detach().clone() for p in self.branch.parameters()]
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def enter(self, model: nn.Module) -> None:
        """Put the branch into the host.

        Raises:
            HostError: if several processes would train it without averaging its gradients, or the host cannot take it.
        """
        ours = {id(p) for p in self.branch.parameters() if p.requires_grad}
        if self.optimizer is None and _num_processes() > 1 and not ours <= {id(p) for p in model.parameters()}:
            raise HostError(
                "The host runs in several processes, and nobody averages the gradients of the cluster branch over them. Give "
                "`attach` an optimizer for them: branch_optimizer=torch.optim.AdamW(branch.parameters(), lr=1e-3)."
            )
        self._place = self.branch.insert(model)
        self._place.__enter__()

    def leave(self) -> None:
        """Take the branch out of the host."""
        place, self._place = self._place, None
        if place is not None:
            place.__exit__(None, None, None)

    def end(self) -> None:
        """A `with` ended without an error: check that the parameters have changed, and report steps that were left out.

        Raises:
            HostError: if the backward pass reached the branch, but nobody stepped its parameters.
        """
        before, self._before = self._before, []
        moved = not all(torch.equal(a.to(b.device), b) for a, b in zip(before, self.branch.parameters()))
        if self.optimizer is None and self._reached and not moved:
            raise HostError(
                "The cluster branch was not trained: backward() ran, but none of its parameters changed. Give `attach` an "
                "optimizer for them, attach(..., branch_optimizer=torch.optim.AdamW(branch.parameters(), lr=1e-3)), or add "
                'them to the host\'s: optimizer.add_param_group({"params": branch.parameters()}).'
            )
        if self._left_out:
            warn(
                f"{self._left_out} steps of the cluster branch were left out, since its gradients were not finite. A few are "
                "normal with a gradient scaler; if they are all, look at the host's loss."
            )

    # ------------------------------------------------------------------------------------------------ steps

    def watch(self, loss: Tensor) -> None:
        """Step the branch at the end of the backward pass that reaches the added loss."""
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
        """One step of the branch's own optimizer."""
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
    if _num_processes() > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= _num_processes()


def _num_processes() -> int:
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
