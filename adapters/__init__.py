"""The refiner inside other people's training loops, without an edit to their code.

    from semples_plugin import PromptRefiner, adapters

    refiner = PromptRefiner(classes)
    print(adapters.probe("mctformer", model, refiner, img, labels))  # does the loss reach the host?
    with adapters.attach("mctformer", model, refiner):
        train_one_epoch(model, loader, optimizer, ...)  # the host's own loop

Hosts: `names()`; for any other network `"generic"` with module names, or a `CamSource` of your own. Whole scripts of hosts are
run, unedited, by `python -m semples_plugin.adapters`.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Type, Union

import torch
from torch import Tensor, nn

from ..clusters.branch import ClusterBranch
from ..errors import HostError
from ..refiner import PromptRefiner
from .attachment import Attachment, LogStep
from .generic import Generic
from .mctformer import MCTformer
from .probing import Probe, Reach, probe_host
from .recorder import Capture, Recorder, check_model
from .sources import CamSource, Records
from .transcam import TransCAM
from .weaktr import WeakTr

__all__ = ["HostError", "Attachment", "CamSource", "Probe", "Reach", "Records", "attach", "cam_of", "names", "probe"]

_HOSTS: Dict[str, Type[CamSource]] = {"generic": Generic, "mctformer": MCTformer, "transcam": TransCAM, "weaktr": WeakTr}


def names() -> List[str]:
    """The hosts that `attach` knows by name."""
    return sorted(_HOSTS)


def source(host: Union[str, CamSource], **options: Any) -> CamSource:
    """The `CamSource` of a host by name, with its options; a `CamSource` passes through."""
    if isinstance(host, CamSource):
        if options:
            raise TypeError(
                f"Options such as {next(iter(options))!r} belong to hosts given by name; set them on your CamSource."
            )
        return host
    if host not in _HOSTS:
        raise ValueError(f"The host must be one of {', '.join(map(repr, names()))} or a CamSource; got {host!r}.")
    return _HOSTS[host](**options)


def attach(
    host: Union[str, CamSource],
    model: nn.Module,
    refiner: Optional[PromptRefiner],
    *,
    mode: str = "add",
    weight: float = 1.0,
    label_loss: Union[None, nn.Module, Callable[..., Tensor]] = None,
    on_step: Optional[LogStep] = None,
    passes: int = 1,
    branch: Optional[ClusterBranch] = None,
    branch_optimizer: Optional[torch.optim.Optimizer] = None,
    **options: Any,
) -> Attachment:
    """Train a host with the refiner's loss, through the host's own loop: `with attach("mctformer", model, refiner): ...`.

    Per step the host runs forward once, as without it: hooks record what its CAM is made of, and the loss is added to the
    result of its label loss, once, however many label losses it has. Outside the `with` nothing is left.

    Args:
        host: a name of `names()`, or a `CamSource`.
        model: the object that the loop calls: the network, or its DataParallel / DistributedDataParallel wrapper.
        refiner: a `PromptRefiner` for the host's classes, in the order of its label columns; None for `branch` alone.
        mode: `"add"` to the host's label loss, or `"replace"` its label losses, as the reference does (their gradient becomes
            zero; other terms of the host stay). What the host multiplies its label loss with holds for both.
        weight: factor on the refiner's loss; that of `branch` has weights of its own.
        label_loss: how the host computes its label loss: an nn.Module `criterion(logits, labels)`, or a function of
            torch.nn.functional. By default multilabel_soft_margin_loss and the binary cross-entropies, also inside torch's own
            criterion modules; among these, losses over (B, C) or (B, C + 1) targets count.
        on_step: called after each step with its number and the terms as floats (`loss` among them), for a log; it costs one
            transfer from the device per term.
        passes: forward passes per label loss, for hosts that look at an image several times; the CAM of the first counts.
        branch: a `ClusterBranch` for the host (PCC, CPC): its tokens are put into the host and its loss is added as well.
            Insert it for inference too, with `branch.insert(model)`.
        branch_optimizer: of the branch's parameters; it is stepped after every backward pass. None if they are in the host's
            optimiser; an error tells if they were never trained.
        **options: of the host by that name, such as `cam="patch"`; see the modules of this package.

    Returns:
        An `Attachment`: `steps`, `terms` and `loss` of the last step.

    Raises:
        HostError: if the model is not such a host; in the `with`, if a step had no CAM or its label loss was not seen.
        DetachedCamError: if the CAM is cut off from the host's graph.
    """
    alone = refiner is None and host == "generic" and not options  # a branch alone asks for no CAM
    parts = CamSource() if alone else source(host, **options)
    return Attachment(
        parts, model, refiner, mode=mode, weight=weight, label_loss=label_loss, on_step=on_step, passes=passes,
        branch=branch, branch_optimizer=branch_optimizer,
    )  # fmt: skip


def probe(
    host: Union[str, CamSource],
    model: nn.Module,
    refiner: PromptRefiner,
    img: Tensor,
    labels: Tensor,
    *,
    depth: int = 1,
    **options: Any,
) -> Probe:
    """Send one batch through and tell which host parameters the refiner's loss reaches, and how strongly.

    The host runs once in training mode; afterwards its modes, buffers, gradients and the random state are as before.

    Args:
        host, model, refiner, options: as for `attach`.
        img: (B, 3, H, W), as the host sees it.
        labels: (B, C) multi-hot, with at least one positive.
        depth: how many parts of a module's name make a row.

    Returns:
        `Probe`: print it for a table and a verdict, one of: attached, attached but zero, detached at module X, NaN at module Y.
    """
    if not bool((labels != 0).any()):
        raise ValueError("`labels` must hold at least one positive label, or there is no loss to follow; got none.")
    parts = source(host, **options)
    check_model(parts, model)
    return probe_host(parts, model, refiner, img, labels, depth=depth)


def cam_of(host: Union[str, CamSource], model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """The host's CAM as a function img (B, 3, H, W) -> cam (B, C, h, w), without gradients, background channel dropped.

    For `refiner.fit_prompts(loader, cam_of("weaktr", model.eval()))` and `refiner.refine_masks(img, cam, labels)`.
    """
    parts = source(host, **options)
    check_model(parts, model)

    @torch.no_grad()
    def function(img: Tensor) -> Tensor:
        captures: List[Capture] = []
        device = next((p.device for p in model.parameters()), img.device)
        with Recorder(model, parts, lambda *seen: captures.append(Capture(*seen)), lambda: True):
            parts.run(model, img.to(device))
        cam = parts.cam(captures[0].img, captures[0].output, captures[0].records)
        return cam[:, 1:] if parts.background_channel else cam

    return function
