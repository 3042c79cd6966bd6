"""The refiner's loss, and that of a cluster branch, added to a host's own. Flow: `loop` -> **attachment** -> refiner."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional

import torch
from torch import Tensor, nn

from .._checks import check_number
from ..clusters.branch import ClusterBranch
from ..errors import DetachedCamError
from ..refiner import PromptRefiner
from .branch_training import BranchTraining
from .label_loss import LabelLoss
from .loop import LoopWatcher
from .recorder import Capture
from .sources import CamSource, check_source, foreground_cam

__all__ = ["Attachment", "LogStep"]

LogStep = Callable[[int, Dict[str, float]], None]


class Attachment(LoopWatcher):
    """The refiner inside a host's training loop; what `attach(...)` returns. Use it in a `with`.

    Arguments as for `attach`; what a step is, see `LoopWatcher`.

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
        label_loss: LabelLoss = None,
        on_step: Optional[LogStep] = None,
        passes: int = 1,
        branch: Optional[ClusterBranch] = None,
        branch_optimizer: Optional[torch.optim.Optimizer] = None,
    ):
        if not isinstance(refiner, PromptRefiner) and (refiner is not None or branch is None):
            raise TypeError(f"`refiner` must be a PromptRefiner, or None together with `branch`; got {type(refiner).__name__}.")
        check_number("weight", weight, 0)
        if on_step is not None and not callable(on_step):
            raise TypeError(f"`on_step` must be a callable (step, terms); got {type(on_step).__name__}.")
        if branch is None and branch_optimizer is not None:
            raise ValueError("`branch_optimizer` is for the parameters of `branch`; got no `branch`.")
        if refiner is not None:
            check_source(source, refiner)
        training = None if branch is None else BranchTraining(branch, branch_optimizer, refiner)
        classes = refiner.classes if refiner is not None else branch.clusters.classes  # type: ignore[union-attr]
        super().__init__(source, model, classes, mode=mode, label_loss=label_loss, passes=passes, branch=training)
        self.refiner, self.weight, self.on_step = refiner, weight, on_step
        self._tensors: Dict[str, Tensor] = {}  # of the last step

    def step(self, capture: Capture, labels: Tensor) -> Tensor:
        """The weighted loss of one step: the refiner's, and that of the cluster branch."""
        losses: List[Tensor] = []
        terms: Dict[str, Tensor] = {}
        if self.refiner is not None:
            cam = foreground_cam(self.source, capture.img, capture.output, capture.records)
            if not cam.requires_grad:
                raise DetachedCamError(
                    f"The CAM of {self.source.name} is cut off from the host's graph, so the loss cannot train the host. "
                    "semples_plugin.adapters.probe(...) says at which module."
                )
            out = self.refiner.compute(capture.img.detach().to(cam.device), cam, labels.to(cam.device))
            losses.append(self.weight * out.loss)
            terms.update(out.terms, loss=out.loss)
        if self.branch is not None:
            added = self.branch.branch.compute(labels, capture.tokens)
            losses.append(added.loss)
            terms.update(added.terms)
            terms["loss"] = added.loss if "loss" not in terms else terms["loss"] + added.loss.to(terms["loss"].device)
        self.steps += 1
        self._tensors = {name: term.detach() for name, term in terms.items()}
        if self.on_step is not None:
            self.on_step(self.steps, {**self.terms, "loss": float(self._tensors["loss"])})
        total = losses[0] if len(losses) == 1 else losses[0] + losses[1].to(losses[0].device)
        if self.branch is not None:
            self.branch.watch(total)
        return total

    @property
    def terms(self) -> Dict[str, float]:
        return {name: float(value) for name, value in self._tensors.items() if name != "loss"}

    @property
    def loss(self) -> Optional[float]:
        return float(self._tensors["loss"]) if self._tensors else None
