"""The refiner's loss, and that of a cluster branch, added to a host's own. Flow: `loop` -> **attachment** -> refiner."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .._checks import check_number, warn
from ..clusters.branch import ClusterBranch
from ..errors import DetachedCamError, HostError
from ..refiner import PromptRefiner
from .branch_training import BranchTraining
from .label_loss import LabelLoss
from .labels import Labels
from .loop import ForwardPass, LoopWatcher, first_part
from .recorder import Capture
from .sources import CamSource, check_source, foreground_cams

__all__ = ["Attachment", "LogStep"]

LogStep = Callable[[int, Dict[str, float]], None]


class Attachment(LoopWatcher):
    """The refiner inside a host's training loop; what `attach(...)` returns. Use it in a `with`.

    Arguments as for `attach`; what a step is, see `LoopWatcher`.

    Attributes:
        terms: unweighted terms of the last step by name, as floats; empty before the first.
        loss: the refiner's loss in the last step, as a float, or None before the first.
        steps: steps so far.
        cam_shapes: shapes of the CAMs of the last step.
        agreement: how the CAM of the first step related to the class scores that the host computed itself; "" if not known.
    """

    def __init__(
        self,
        source: CamSource,
        model: Optional[nn.Module],
        refiner: Optional[PromptRefiner],
        *,
        network: Optional[str] = None,
        mode: str = "add",
        weight: float = 1.0,
        label_loss: LabelLoss = None,
        labels: Labels = None,
        forward_pass: ForwardPass = "first",
        first_step: int = 1,
        last_step: Optional[int] = None,
        on_step: Optional[LogStep] = None,
        branch: Optional[ClusterBranch] = None,
        branch_optimizer: Optional[torch.optim.Optimizer] = None,
        on_model: Optional[Callable[[nn.Module], None]] = None,
    ):
        if not isinstance(refiner, PromptRefiner) and (refiner is not None or branch is None):
            raise TypeError(f"`refiner` must be a PromptRefiner, or None together with `branch`; got {type(refiner).__name__}.")
        check_number("weight", weight, 0)
        check_number("first_step", first_step, 1, whole=True)
        if last_step is not None:
            check_number("last_step", last_step, first_step, whole=True)
        if on_step is not None and not callable(on_step):
            raise TypeError(f"`on_step` must be a callable (step, terms); got {type(on_step).__name__}.")
        if branch is None and branch_optimizer is not None:
            raise ValueError("`branch_optimizer` is for the parameters of `branch`; got no `branch`.")
        if refiner is not None:
            check_source(source, refiner)
        training = None if branch is None else BranchTraining(branch, branch_optimizer, refiner)
        classes = refiner.classes if refiner is not None else branch.clusters.classes  # type: ignore[union-attr]
        super().__init__(
            source, model, classes, network=network, mode=mode, label_loss=label_loss, labels=labels, forward_pass=forward_pass,
            branch=training, on_model=on_model,
        )  # fmt: skip
        self.refiner, self.weight, self.on_step = refiner, weight, on_step
        self.first_step, self.last_step = first_step, last_step
        self.cam_shapes: List[Tuple[int, ...]] = []
        self.agreement = ""
        self._tensors: Dict[str, Tensor] = {}  # of the last step

    def step(self, capture: Capture, labels: Tensor) -> Optional[Tensor]:
        """The weighted loss of one step: the refiner's, and that of the cluster branch."""
        if not self.first_step <= self.steps + 1 <= (self.last_step or self.steps + 1):
            self.steps += 1
            return None
        losses: List[Tensor] = []
        terms: Dict[str, Tensor] = {}
        if self.refiner is not None:
            found = self._refiner_terms(self.refiner, capture, labels)
            losses.append(self.weight * found["loss"])
            terms.update(found)
        if self.branch is not None:
            if len(capture.img) != len(labels):
                raise HostError(
                    f"A cluster branch needs labels for all images of the forward pass; got {len(labels)} for "
                    f"{len(capture.img)}. End it before: last_step={self.steps}."
                )
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

    def _refiner_terms(self, refiner: PromptRefiner, capture: Capture, labels: Tensor) -> Dict[str, Tensor]:
        """The refiner's loss and terms, summed over the CAMs of the pass."""
        cams = foreground_cams(self.source, capture.img, capture.output, capture.records)
        if not self.cam_shapes:
            self.agreement = self.source.agreement(capture.records)
            if self.agreement.startswith("not "):
                warn(f"The CAM of {self.source.name} is {self.agreement}.")
        self.cam_shapes = [tuple(cam.shape) for cam in cams]
        terms: Dict[str, Tensor] = {}
        for cam in cams:
            if not cam.requires_grad:
                raise DetachedCamError(
                    f"The CAM of {self.source.name} is cut off from the host's graph, so the loss cannot train the host. "
                    "semples_plugin.adapters.probe(...) says at which module."
                )
            img, cam = first_part((capture.img.detach().to(cam.device), cam), len(labels))
            out = refiner.compute(img, cam, labels.to(cam.device))
            for name, value in {**out.terms, "loss": out.loss}.items():
                terms[name] = value if name not in terms else terms[name] + value.to(terms[name].device)
        return terms

    @property
    def terms(self) -> Dict[str, float]:
        return {name: float(value) for name, value in self._tensors.items() if name != "loss"}

    @property
    def loss(self) -> Optional[float]:
        return float(self._tensors["loss"]) if self._tensors else None
