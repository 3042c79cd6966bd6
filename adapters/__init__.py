"""The refiner inside other people's training loops, without an edit to their code.

    from semples_plugin import PromptRefiner, adapters

    refiner = PromptRefiner(classes)
    print(adapters.probe("mctformer", model, refiner, img, labels))  # does the loss reach the host?
    with adapters.attach("mctformer", model, refiner):
        train_one_epoch(model, loader, optimizer, ...)  # the host's own loop

Hosts: `names()`; for any other network `"generic"` with module names, or a `CamSource` of your own.
`python -m semples_plugin.adapters` runs whole scripts of hosts, unedited.
"""

from __future__ import annotations

from typing import Any, Callable, List, Optional, Union

import torch
from torch import Tensor, nn

from ..clusters.branch import ClusterBranch
from ..errors import HostError
from ..refiner import PromptRefiner
from .attachment import Attachment, LogStep
from .label_loss import LabelLoss
from .labels import Labels
from .loop import ForwardPass
from .probing import Probe, Reach, probe_host
from .recorder import Capture, Recorder
from .registry import make_source, names
from .sources import CamSource, Records, check_model, foreground_cams

__all__ = [
    "Attachment",
    "CamSource",
    "Capture",
    "HostError",
    "Probe",
    "Reach",
    "Records",
    "attach",
    "cam_of",
    "make_source",
    "names",
    "probe",
]


def attach(
    host: Union[str, CamSource],
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
    **options: Any,
) -> Attachment:
    """Train a host with the refiner's loss, in the host's own loop: `with attach("mctformer", model, refiner): ...`.

    Per step the host runs forward once, as without it: hooks record what its CAM is made of, and the loss is added to the
    result of its label loss, once, however many label losses it has. A label loss counts if its autograd graph contains the
    recorded forward pass; losses of other networks are left alone. Outside the `with` nothing is left. Labels must be hard;
    label smoothing within 0.2 of 0 or 1 is undone for the added losses.

    Args:
        host: a name of `names()`, or a `CamSource`.
        model: the object that the loop calls: the network, or its DataParallel / DistributedDataParallel wrapper. None for a
            host that builds it inside: the first network that runs in training mode and fits is taken, see
            `Attachment.model`.
        refiner: a `PromptRefiner` for the host's classes, in the order of its label columns; None for `branch` alone.
        network: with `model=None`: class name of the network, if the first that fits is not the one.
        mode: `"add"` to the host's label loss, or `"replace"` its label losses, as the reference does (their gradient becomes
            zero; other terms of the host stay). A factor that the host puts on its label loss holds for the added loss too.
        weight: factor on the refiner's loss; that of `branch` has weights of its own.
        label_loss: where the loss is added. How the host computes its label loss: an nn.Module `criterion(logits, labels)`, or
            a function of torch.nn.functional or its name. By default multilabel_soft_margin_loss and the binary
            cross-entropies, also inside torch's own criterion modules; among these, losses over (B, C) or (B, C + 1) targets
            count. Or `"backward"`: at `loss.backward()`, before a gradient scaler scales it, for hosts without a label loss; a
            loop that divides its loss by N accumulated batches needs `weight=1/N` there.
        labels: where the image-level labels are, if not in the label loss: `"forward:NAME"`, an argument of the model's
            forward; `"loader"` or `"loader:KEY"`, the batch of the torch DataLoader that the images came from, or its part KEY;
            or a function of the recorded pass: `lambda capture: capture.keywords["cls_label"]`. The default of `label_loss` is
            then `"backward"`.
        forward_pass: which forward pass of a step gives the CAM: `"first"` of those in the label loss, `"last"`, or its number
            from 0. On a batch that is a multiple of the labels (images and their augmented copies) the first part counts.
        first_step, last_step: the steps, from 1, in which the refiner's loss is added; by default all.
        on_step: called after each step with its number and the terms as floats (`loss` among them), for a log; it costs one
            transfer from the device per term.
        branch: a `ClusterBranch` for the host (PCC, CPC): its tokens are put into the host and its loss is added as well.
            Insert it for inference too, with `branch.insert(model)`.
        branch_optimizer: of the branch's parameters; it steps them after every backward pass. None if they are in the host's
            optimizer; an error says so if nobody trained them.
        **options: of the host by that name, such as `cam="patch"`; see the modules of this package.

    Returns:
        An `Attachment`: `steps`, `terms` and `loss` of the last step.

    Raises:
        HostError: if the model is not such a host; in the `with`, if no network fits, a step had no CAM, or its label loss was
            not seen.
        DetachedCamError: in the `with`, if the CAM is cut off from the host's graph.
        ValueError: in the `with`, if labels are soft (mixup, cutmix).

    Example:
        >>> refiner = PromptRefiner(["boat", "train", "bird"], clip=tiny_clip)
        >>> with attach("generic", model, refiner, features="norm", classifier="head") as attached:  # model: your network
        ...     loss = host_loss(model(img), labels)  # the host's label loss, with the refiner's added
        >>> attached.steps, sorted(attached.terms)
        (1, ['match_background', 'match_foreground'])
    """
    branch_alone = refiner is None and host == "generic" and not options  # it needs no CAM
    source = CamSource() if branch_alone else make_source(host, **options)
    return Attachment(
        source, model, refiner, network=network, mode=mode, weight=weight, label_loss=label_loss, labels=labels,
        forward_pass=forward_pass, first_step=first_step, last_step=last_step, on_step=on_step, branch=branch,
        branch_optimizer=branch_optimizer,
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
    """Send one batch through and report which host parameters the refiner's loss reaches, and how strongly.

    The host runs once in training mode; afterwards its modes, buffers, gradients and the random state are as before.

    Args:
        host, model, refiner, options: as for `attach`.
        img: (B, 3, H, W), as the host sees it.
        labels: (B, C) multi-hot, with at least one positive.
        depth: how many parts of a module's name make a row.

    Returns:
        `Probe`: print it for a table and a verdict, one of: attached, attached but zero, detached at module X, NaN at module Y.

    Raises:
        HostError: if the model is not such a host.
        ValueError: if `labels` holds no positive label.
    """
    return probe_host(make_source(host, **options), model, refiner, img, labels, depth=depth)


def cam_of(host: Union[str, CamSource], model: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """The host's CAM as a function img (B, 3, H, W) -> cam (B, C, h, w), without gradients and without background channel.

    Of a host with several CAMs it is the first.

    For `refiner.fit_prompts(loader, cam_of("weaktr", model.eval()))` and `refiner.refine_masks(img, cam, labels)`.

    Args:
        host, model, options: as for `attach`.

    Raises:
        HostError: if the model is not such a host.
    """
    source = make_source(host, **options)
    check_model(source, model)

    @torch.no_grad()
    def function(img: Tensor) -> Tensor:
        captures: List[Capture] = []
        device = next((p.device for p in model.parameters()), img.device)
        with Recorder(model, source, captures.append):
            source.run(model, img.to(device))
        capture = captures[0]
        return foreground_cams(source, capture.img, capture.output, capture.records)[0]

    return function
