"""A cluster branch in a real host: python clusters_worker.py HOST REPO CLIP OUT.json

HOST is mctformer, weaktr, run in a folder made by `Hosts.folder`, or timm: its own VisionTransformer, which needs no folder and
no REPO. Writes what it saw as JSON; test_clusters_hosts.py judges it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.nn.functional as F
from loop_worker import BATCH, SIZE, Checks, hooked  # of this folder
from torch import Tensor, nn
from torch.utils.data import DataLoader
from worker_parts import photos, seed

from semples_plugin import PromptRefiner, adapters
from semples_plugin.adapters.runner import compat
from semples_plugin.class_names import VOC_CLASSES
from semples_plugin.clusters.branch import ClusterBranch
from semples_plugin.clusters.categories import CategoryClusters

NEVER = float("-inf")


def make_branch(model: nn.Module, attention_bias: float = 0.0) -> ClusterBranch:
    return ClusterBranch(CategoryClusters.bundled("voc"), model, attention_bias=attention_bias, threshold=0.2)


def make_optimizer(branch: ClusterBranch) -> torch.optim.Optimizer:
    return torch.optim.AdamW(branch.parameters(), lr=1e-3)


def flat(value: Any) -> List[Tensor]:
    """The tensors in what a host returns."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (tuple, list)) else []


def compare(ours: List[Tensor], its: List[Tensor]) -> Dict[str, Any]:
    return {
        "shapes": [list(x.shape) for x in ours],
        "same shapes": [x.shape for x in ours] == [x.shape for x in its],
        "difference": max(float((a - b).abs().max()) for a, b in zip(ours, its)),
        "largest": max(float(b.abs().max()) for b in its),
        "identical": all(torch.equal(a, b) for a, b in zip(ours, its)),
    }


class Attention:
    """Attention maps that the blocks of a host give to it, for the time of a `with`."""

    def __init__(self, model: nn.Module):
        self.blocks, self.maps, self.handles = model.blocks, [], []  # type: Any, List[Tensor], List[Any]

    def __enter__(self) -> "Attention":
        keep = lambda module, inputs, output: self.maps.extend(flat(output)[1:])  # noqa: E731
        self.handles = [block.register_forward_hook(keep) for block in self.blocks]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()


def training(model: nn.Module, img: Tensor) -> List[Tensor]:
    """Outputs of a training forward pass and the attention in it, with the same random numbers each time."""
    seed()
    with Attention(model) as attention:
        return [*flat(model.train()(img)), *attention.maps]


def reached(model: nn.Module, branch: ClusterBranch) -> Dict[str, Any]:
    """Which parameters have gradients and which blocks have none; the gradients are cleared."""
    there = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    blocks = [name for name, _ in model.named_parameters() if name.startswith("blocks.")]
    lacking = [name for name, p in branch.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    token = branch.tokens.tokens.grad
    every = [p.grad for p in (*model.parameters(), *branch.parameters()) if p.grad is not None]
    found = {
        "tokens": 0.0 if token is None else float(token.norm()),
        "blocks": len(blocks),
        "blocks missed": [name for name in blocks if name not in there],
        "branch missed": lacking,
        "finite": all(bool(g.isfinite().all()) for g in every),
    }
    model.zero_grad(set_to_none=True)
    branch.zero_grad(set_to_none=True)
    return found


def reach(model: nn.Module, img: Tensor, labels: Tensor) -> Dict[str, Any]:
    """Gradients of the branch's loss, and of the host's outputs alone, which depend on the tokens by attention only."""
    found = {}
    for name, bias in (("free", 0.0), ("never", NEVER)):
        branch = make_branch(model, bias)
        with branch.insert(model.train()):
            seed()
            sum(x.float().square().sum() for x in flat(model(img))).backward()  # type: ignore[union-attr]
            found[f"outputs {name}"] = reached(model, branch)
            seed()
            model(img)
            branch(labels).backward()
            found[f"branch {name}"] = reached(model, branch)
    return found


# ---------------------------------------------------------------------------------------------------- MCTformer, WeakTr


class Short:
    """A loader's first batch."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield next(iter(self.loader))


class ClusterChecks(Checks):
    def passive(self) -> Dict[str, Any]:
        """With attention_bias=-inf: the host's outputs in training and inference, compared with those without tokens."""
        self.inner.load_state_dict(self.start)
        img, _ = photos(SIZE, SIZE, BATCH)
        branch = make_branch(self.inner, NEVER)
        with torch.no_grad():
            its = training(self.inner, img)
            with branch.insert(self.inner):
                found = {"training": compare(training(self.inner, img), its)}
            self.inner.eval()
            for height, width in self.bench.sizes:
                img, _ = photos(height, width, BATCH)
                its = flat(self.inner(img, return_att=True))
                with branch.insert(self.inner):
                    found[f"inference {height}x{width}"] = compare(flat(self.inner(img, return_att=True)), its)
        return found

    def inference(self) -> Dict[str, Any]:
        """With bias 0: the host's CAMs by kind and size, with tokens and without; ours against the host's, both with tokens."""
        self.inner.load_state_dict(self.start)
        self.inner.eval()
        branch, found = make_branch(self.inner), {}
        for height, width in self.bench.sizes:
            img, _ = photos(height, width, BATCH)
            without = self.bench.cams(img)
            with branch.insert(self.bench.model):
                cams = self.bench.cams(img)
                patches = list(branch.cam(branch.pop_tokens()).shape)
                ours = {kind: adapters.cam_of(self.name, self.bench.model, cam=kind)(img) for kind in cams}
            for kind, cam in cams.items():
                changed = compare([cam], [without[kind]])
                rebuilt = compare([ours[kind]], [cam])
                found[f"{kind} {height}x{width}"] = {"host": changed, "rebuilt": rebuilt, "own cam": patches}
        return found

    def training(self) -> Dict[str, Any]:
        """The host's loop: alone, with tokens in it, with the refiner, the branch, and both."""
        branch = make_branch(self.inner)
        with branch.insert(self.bench.model):
            tokens = self.run(Short)
            with adapters.attach(self.name, self.bench.model, self.refiner) as refiner:
                refined = self.run(Short)
        options = {"branch": branch, "branch_optimizer": make_optimizer(branch)}
        with adapters.attach(self.name, self.bench.model, None, **options) as alone:
            pcc = self.run(Short)
        plain = self.run()
        branch = make_branch(self.inner)  # as it was
        before = {name: value.detach().clone() for name, value in branch.named_parameters()}
        terms: List[Dict[str, float]] = []
        options = {"branch": branch, "branch_optimizer": make_optimizer(branch)}
        with adapters.attach(
            self.name, self.bench.model, self.refiner, on_step=lambda step, values: terms.append(values), **options
        ) as attachment:
            inside = hooked(self.bench.model)
            both = self.run()
        after = hooked(self.bench.model)
        moved = {name: float((value - before[name]).abs().max()) for name, value in branch.named_parameters()}
        return {
            "batches": len(self.bench.loader()),
            "steps": attachment.steps,
            "forwards": both.forwards,
            "plain forwards": plain.forwards,
            "first": {
                "tokens": tokens.losses[0],
                "refiner": refined.losses[0],
                "branch": pcc.losses[0],
                "both": both.losses[0],
            },
            "refiner's": refiner.loss,
            "branch's": alone.loss,
            "terms": terms,
            "moved": moved,
            "hooked inside": inside,
            "hooked after": after,
            "marked after": [name for name, module in self.inner.named_modules() if "_holds_cluster_tokens" in vars(module)],
            "same after": plain.same(self.run()),
        }

    def checkpoint(self) -> Dict[str, Any]:
        """A file of the host's state dict, loaded with the tokens in place and without."""
        self.inner.load_state_dict(self.start)
        img, _ = photos(SIZE, SIZE, BATCH)
        with torch.no_grad():
            before = [*training(self.inner, img), *flat(self.inner.eval()(img, return_att=True))]
            branch = make_branch(self.inner)
            with branch.insert(self.bench.model):
                torch.save(self.inner.state_dict(), "inside.pt")
                inside = torch.load("inside.pt")
                loaded = [str(self.inner.load_state_dict(inside, strict=True))]
                during = [*training(self.inner, img), *flat(self.inner.eval()(img, return_att=True))]
            for parameter in self.inner.parameters():
                parameter.zero_()
            loaded.append(str(self.inner.load_state_dict(torch.load("inside.pt"), strict=True)))
            after = [*training(self.inner, img), *flat(self.inner.eval()(img, return_att=True))]
        return {
            "keys": list(inside) == list(self.start),
            "loaded": loaded,
            "during": compare(during, before),
            "after": compare(after, before),
        }


# ---------------------------------------------------------------------------------------------------- timm


def timm_host(fused: bool) -> nn.Module:
    vision = importlib.import_module("timm.models.vision_transformer")
    seed()
    model = vision.vit_tiny_patch16_224(pretrained=False, num_classes=20, dynamic_img_size=True, drop_path_rate=0.1)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def images(size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(BATCH, 20)
    labels[0, :2] = labels[1, 7] = 1
    return torch.randn(BATCH, 3, *size, generator=generator), labels


def timm_passive(model: nn.Module) -> Dict[str, Any]:
    """As `ClusterChecks.passive`; in float64 as well, where rounding is smaller."""
    branch, found = make_branch(model, NEVER), {}
    cases = [((224, 224), torch.float32), ((96, 160), torch.float32), ((96, 160), torch.float64)]
    for (height, width), dtype in cases:
        model.to(dtype)
        img = images((height, width))[0].to(dtype)
        for mode in ("training", "inference"):
            its = timm_outputs(model.train(mode == "training"), img)
            with branch.insert(model):
                ours = timm_outputs(model, img)
                grid = list(branch.pop_tokens().grid)
            outputs, features = (compare([a], [b]) for a, b in zip(ours, its))
            found[f"{mode} {height}x{width} {dtype}"] = {"outputs": outputs, "features": features, "grid": grid}
    model.float()
    return found


@torch.no_grad()
def timm_outputs(model: nn.Module, img: Tensor) -> List[Tensor]:
    """Logits, and the tokens that they are made of."""
    found = []
    for function in (model, model.forward_features):
        seed()
        found.append(function(img))  # type: ignore[operator]
    return found


def timm_training(model: nn.Module, refiner: PromptRefiner) -> Dict[str, Any]:
    """A loop of our own; the CAM is the classical one."""
    branch = make_branch(model)
    img, labels = images((96, 96))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = {name: value.detach().clone() for name, value in branch.named_parameters()}
    terms: List[Dict[str, float]] = []
    with adapters.attach(
        "generic", model.train(), refiner, features="norm", classifier="head", branch=branch,
        branch_optimizer=make_optimizer(branch), on_step=lambda step, values: terms.append(values),
    ) as attached:  # fmt: skip
        for _ in range(5):
            loss = F.multilabel_soft_margin_loss(model(img), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = {name: float((value - before[name]).abs().max()) for name, value in branch.named_parameters()}
    return {"steps": attached.steps, "terms": terms, "moved": moved, "hooked after": hooked(model)}


def timm_checks(clip: str) -> Dict[str, Any]:
    refiner = PromptRefiner(VOC_CLASSES, clip=clip, prompt_length=4)
    found = {}
    for name, fused in (("fused", True), ("unfused", False)):
        model = timm_host(fused)
        parts = {"passive": timm_passive(model), "reach": reach(model, *images((96, 96)))}
        found[name] = {**parts, "training": timm_training(model, refiner)}
    return found


def main(name: str, repo: str, clip: str, out: str) -> None:
    with compat.old_libraries(), compat.on_cpu():
        if name == "timm":
            found = timm_checks(clip)
        else:
            sys.path.insert(0, repo)
            checks = ClusterChecks(name, clip)
            found = {
                "passive": checks.passive(),
                "reach": reach(checks.inner, *photos(SIZE, SIZE, BATCH)),
                "inference": checks.inference(),
                "training": checks.training(),
                "checkpoint": checks.checkpoint(),
            }
    Path(out).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
