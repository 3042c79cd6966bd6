"""Small hosts for experiments: each is called as `host(img)` with images in [0, 1] and says how the refiner attaches to it.

`demo` is the network of the demo. The others are the real networks of public repositories, built small by their own
constructors, with random weights; nothing of them is edited.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner, adapters
from semples_plugin.adapters.runner import compat
from semples_plugin.adapters.transcam import TransCAM
from semples_plugin.clusters import ClusterBranch

from .demo.host import HostCam, Split, train_host

__all__ = ["HOSTS", "SmallHost", "make_host", "train_attached"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallHost(nn.Module):
    """A network, how its loop gets logits from it, and where the refiner finds its CAM.

    Args:
        net: the host's own network, the object that `adapters.attach` is given.
        adapter: name of the adapter, or a CamSource.
        options: of the adapter.
        logits: (net, img) -> the logits (B, C) that get a label loss each.
        imagenet: whether the network takes ImageNet's image statistics; else it takes images in [0, 1].
        enlarge: factor on the size of the images, for networks with a large stride.
        width: size of a token of a transformer, or None.
        branch_options: of `ClusterBranch`, where its blocks and its patch embedding are; None if no branch can be put into it.
    """

    def __init__(
        self,
        net: nn.Module,
        adapter: Union[str, adapters.CamSource],
        options: Dict[str, Any],
        logits: Callable[[nn.Module, Tensor], List[Tensor]],
        imagenet: bool = True,
        enlarge: int = 1,
        width: Optional[int] = None,
        branch_options: Optional[Dict[str, str]] = None,
    ):
        super().__init__()
        self.net, self.adapter, self.options, self.logits = net, adapter, options, logits
        self.image_stats, self.enlarge = "imagenet" if imagenet else None, enlarge
        self.width, self.branch_options = width, branch_options

    def prepare(self, img: Tensor) -> Tensor:
        if self.enlarge > 1:
            img = F.interpolate(img, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        if self.image_stats is None:
            return img
        mean, std = (torch.tensor(v, device=img.device)[:, None, None] for v in (MEAN, STD))
        return (img - mean) / std

    def forward(self, img: Tensor) -> Tuple[None, Tensor, "Any"]:
        return (None, *self.logits(self.net, self.prepare(img)))  # type: ignore[return-value]

    @torch.no_grad()
    def cams(self, images: Tensor) -> Tensor:
        """CAM (N, C, h, w) of images (N, 3, S, S) in [0, 1], on the CPU."""
        self.eval()
        device = next(self.parameters()).device
        cam_of = adapters.cam_of(self.adapter, self.net, **self.options)
        with where_it_runs():
            return torch.cat([cam_of(self.prepare(part.to(device))).float().cpu() for part in images.split(50)])

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.net.parameters() if p.requires_grad)


def train_attached(
    host: SmallHost,
    split: Split,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    title: str,
    refiner: Optional[PromptRefiner] = None,
    weight: float = 1.0,
    branch: Optional[ClusterBranch] = None,
    branch_lr: float = 3e-3,
) -> List[Dict[str, float]]:
    """Train a host by its classification loss, with refiner and branch attached if there are any; the terms of every step."""
    torch.manual_seed(seed)  # of dropout and stochastic depth
    terms: List[Dict[str, float]] = []
    if refiner is None and branch is None:
        with where_it_runs():
            train_host(host, split, steps, lr, batch_size, seed, title)
        return terms
    optimizer = None if branch is None else torch.optim.AdamW(branch.parameters(), lr=branch_lr)
    with where_it_runs(), adapters.attach(
        host.adapter, host.net, refiner, weight=weight, branch=branch, branch_optimizer=optimizer,
        on_step=lambda step, values: terms.append(values), **host.options,
    ):  # fmt: skip
        train_host(host, split, steps, lr, batch_size, seed, title)
    return terms


# ------------------------------------------------------------------------------------------------------- the hosts


def demo(num_classes: int, size: int, repos: Optional[Path]) -> SmallHost:
    """Four convolutions and a 1x1 classifier, the network of the demo: a CAM at a quarter of the size."""
    net = HostCam(num_classes)
    return SmallHost(net, "generic", {"cam": "head"}, lambda net, img: [net(img)[1]], imagenet=False)


def mctformer(num_classes: int, size: int, repos: Optional[Path]) -> SmallHost:
    """MCTformer+ with 4 blocks of width 96 and patches of 8 pixels."""
    models = _module(repos, "MCTformer", "models")
    net = models.MCTformerPlus(
        input_size=size, img_size=size, patch_size=8, embed_dim=96, depth=4, num_heads=3, mlp_ratio=4, qkv_bias=True,
        num_classes=num_classes,
    )  # fmt: skip
    return SmallHost(
        net, "mctformer", {}, _logits(num_classes), width=96, branch_options={"blocks": "blocks", "patch_embed": "patch_embed"}
    )


def weaktr(num_classes: int, size: int, repos: Optional[Path]) -> SmallHost:
    """WeakTr with 4 blocks of width 96 and patches of 8 pixels."""
    models = _module(repos, "WeakTr", "models")
    net = models.WeakTr(
        img_size=size, patch_size=8, embed_dim=96, depth=4, num_heads=3, mlp_ratio=4, qkv_bias=True, num_classes=num_classes,
        reduction=4, feat_reduction=4, pool="avg", AdaptiveAttentionFusion=models.AAF,
    )  # fmt: skip
    return SmallHost(
        net, "weaktr", {}, _logits(num_classes), width=96, branch_options={"blocks": "blocks", "patch_embed": "patch_embed"}
    )


def transcam(num_classes: int, size: int, repos: Optional[Path]) -> SmallHost:
    """TransCAM's Conformer with width 96, all its 12 blocks, on images of twice the size, since its stride is 16. Its forward
    has 21 classes written into it; the first ones are used."""
    conformer = _module(repos, "TransCAM", "network.conformer")
    net = conformer.Net(
        patch_size=16, channel_ratio=1, embed_dim=96, depth=12, num_heads=3, mlp_ratio=4, qkv_bias=True, num_classes=21
    )

    class FirstClasses(TransCAM):
        def cam(self, img: Tensor, output: Any, records: Any) -> Tensor:
            return super().cam(img, output, records)[:, : num_classes + 1]

    def logits(net: nn.Module, img: Tensor) -> List[Tensor]:
        conv, trans, _ = net("transcam", img)
        return [(conv + trans)[:, 1 : num_classes + 1]]

    return SmallHost(net, FirstClasses(), {}, logits, enlarge=2)


def toco(num_classes: int, size: int, repos: Optional[Path]) -> SmallHost:
    """ToCo's network on its own ViT with 4 blocks of width 96 and patches of 8 pixels, trained by its two label losses."""
    model = _module(repos, "ToCo", "model.model_seg_neg")
    vit = importlib.import_module("model.backbone.vit")

    def small(pretrained: bool = False, aux_layer: int = -3, **options: Any) -> nn.Module:
        return vit.VisionTransformer(
            img_size=size, patch_size=8, embed_dim=96, depth=4, num_heads=3, mlp_ratio=4, qkv_bias=True, aux_layer=aux_layer
        )

    model.encoder.small = small  # its network asks its own package for a backbone by name
    net = model.network("small", num_classes=num_classes + 1, pretrained=False, init_momentum=0.9, aux_layer=-2)

    def logits(net: nn.Module, img: Tensor) -> List[Tensor]:
        found = net(img)
        return [found[0], found[3]]

    return SmallHost(
        net,
        "toco",
        {"patch_size": 8},
        logits,
        width=96,
        branch_options={"blocks": "encoder.blocks", "patch_embed": "encoder.patch_embed"},
    )


def resnet10t(num_classes: int, size: int, repos: Optional[Path]) -> SmallHost:
    """timm's ResNet-10-T with an output stride of 8 and random weights, and the classical CAM of its classifier."""
    timm = importlib.import_module("timm.models.resnet")
    net = timm.resnet10t(pretrained=False, num_classes=num_classes, output_stride=8)
    return SmallHost(net, "generic", {"features": "layer4", "classifier": "fc"}, _logits(num_classes))


HOSTS: Dict[str, Callable[[int, int, Optional[Path]], SmallHost]] = {
    "demo": demo, "mctformer": mctformer, "weaktr": weaktr, "transcam": transcam, "toco": toco, "resnet10t": resnet10t,
}  # fmt: skip


class MissingHost(ValueError):
    """Raised when there is no such host, or its repository is not where it was said to be."""


def make_host(name: str, num_classes: int, size: int = 64, repos: Optional[Path] = None) -> SmallHost:
    """A host with fresh weights, drawn from torch's generator.

    Args:
        name: of the host, or `package.module:function` for a function of yours that takes the other arguments and returns a
            `SmallHost`.
        num_classes: C.
        size: side of the images in pixels.
        repos: folder that holds clones of the hosts' repositories, by their names.
    """
    make = HOSTS.get(name)
    if make is None:
        module, _, function = name.partition(":")
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise MissingHost(
                f"The host must be one of {', '.join(HOSTS)}, or package.module:function of a function that returns a "
                f"SmallHost; got {name!r} ({error})."
            ) from error
    with compat.old_libraries(), where_it_runs():
        return make(num_classes, size, repos)


def _module(repos: Optional[Path], repo: str, name: str) -> Any:
    """A module of a host. Hosts have modules of the same names (`models`), so those of other hosts are forgotten first."""
    if repos is None or not (repos / repo).is_dir():
        raise MissingHost(f"--repos must be a folder with a clone of {repo} in it; got {repos}.")
    own = f"{(repos / repo).resolve()}{os.sep}"
    others = tuple(place for place in (f"{one.resolve()}{os.sep}" for one in repos.iterdir() if one.is_dir()) if place != own)
    sys.path[:] = [own, *(path for path in sys.path if not f"{path}{os.sep}".startswith((own, *others)))]
    for known, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(others):
            del sys.modules[known]
    return importlib.import_module(name)


@contextlib.contextmanager
def where_it_runs() -> Iterator[None]:
    """Hosts with hard-coded `.cuda()` on a machine without a GPU."""
    with contextlib.nullcontext() if torch.cuda.is_available() else compat.on_cpu():
        yield


def _logits(num_classes: int) -> Callable[[nn.Module, Tensor], List[Tensor]]:
    """All outputs (B, C) of a network, each of which gets a label loss."""

    def logits(net: nn.Module, img: Tensor) -> List[Tensor]:
        found = net(img)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        return [out for out in outputs if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == num_classes]

    return logits
