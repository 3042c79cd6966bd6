"""A baseline's own training loop with and without the refiner: python loop_worker.py HOST REPO CLIP OUT.json

Run in a folder made by `Hosts.folder`. Writes what it saw as JSON; test_loops.py judges it.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from worker_parts import PHOTOS, photos, seed  # of this folder

from semples_plugin import PromptRefiner, adapters
from semples_plugin._hooks import unwrap
from semples_plugin.adapters.runner import compat
from semples_plugin.class_names import VOC_CLASSES

SIZE, BATCH = 64, 2


# ---------------------------------------------------------------------------------------------------- the baselines


class Bench:
    """What the checks need of a baseline.

    Attributes:
        model: the object that the loop calls.
        once: a module that runs once per forward pass.
        sizes: height and width of images that its inference takes.
    """

    once = "patch_embed"
    sizes: Sequence[Tuple[int, int]] = ((SIZE, SIZE), (SIZE, 96), (80, 112))
    model: nn.Module

    def loader(self) -> DataLoader:
        raise NotImplementedError

    def epoch(self, loader: Any, keep: Callable[[Tensor], None]) -> None:
        """One epoch from a fresh optimizer; `keep(loss)` after every backward pass."""
        raise NotImplementedError

    def cams(self, img: Tensor) -> Dict[str, Tensor]:
        """The CAMs (B, C, h, w) of the baseline's own inference, by our name for them."""
        raise NotImplementedError


class EngineBench(Bench):
    """MCTformer and WeakTr: `engine.train_one_epoch`, with the data sets, optimizer and scaler of their main.py."""

    arguments: Sequence[str] = ()

    def __init__(self) -> None:
        self.engine, self.datasets, main = (importlib.import_module(name) for name in ("engine", "datasets", "main"))
        self.models = importlib.import_module("models")
        sizes = ["--input-size", str(SIZE), "--batch-size", str(BATCH), "--data-set", "VOC12", "--device", "cpu"]
        self.args = main.get_args_parser().parse_args([*sizes, *self.arguments])

    def dataset(self) -> Any:
        raise NotImplementedError

    def options(self) -> Dict[str, Any]:
        return {}

    def loader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=BATCH, shuffle=True, drop_last=True)

    def epoch(self, loader: Any, keep: Callable[[Tensor], None]) -> None:
        timm_optim, timm_utils = importlib.import_module("timm.optim"), importlib.import_module("timm.utils")

        class Scaler(timm_utils.NativeScaler):
            def __call__(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
                super().__call__(loss, *args, **kwargs)
                keep(loss)

        optimizer = timm_optim.create_optimizer(self.args, self.model)
        device, clip = torch.device("cpu"), self.args.clip_grad
        self.engine.train_one_epoch(self.model, loader, optimizer, device, 0, Scaler(), clip, **self.options())

    def cams(self, img: Tensor) -> Dict[str, Tensor]:
        with torch.no_grad():
            found = {ours: self.model(img, return_att=True, attention_type=its)[1] for ours, its in (_FUSED, _PATCH)}
            affinity = self.model(img, return_att=True)[2].sum(0)  # (B, N, N)
        found["refined"] = (affinity @ found["fused"].flatten(2).mT).mT.reshape(found["fused"].shape)
        return found


_FUSED, _PATCH = ("fused", "fused"), ("patch", "patchcam")


class MCTformer(EngineBench):
    arguments = ("--data-path", str(PHOTOS), "--img-list", "voc12")

    def __init__(self) -> None:
        super().__init__()
        seed()
        self.model = self.models.deit_small_MCTformerPlus(input_size=SIZE, num_classes=20, drop_path_rate=0.1)

    def dataset(self) -> Any:
        return self.datasets.build_dataset(is_train=True, args=self.args)[0]

    def options(self) -> Dict[str, Any]:
        return {"args": self.args}


class WeakTr(EngineBench):
    arguments = ("--data-path", str(Path("voc12data").resolve()), "--finetune", "")

    def __init__(self) -> None:
        super().__init__()
        seed()
        fusion = {"reduction": self.args.reduction, "pool": self.args.pool_type, "feat_reduction": self.args.feat_reduction}
        self.model = self.models.deit_small_WeakTr_patch16_224(num_classes=20, drop_path_rate=0.1, **fusion)

    def dataset(self) -> Any:
        return self.datasets.build_dataset(is_train=True, data_set="VOC12", args=self.args)[0]


class TransCAM(Bench):
    """Its loop is a script: here the real network and data set, and a loop that calls and labels them as the script does."""

    once = "conv1"
    sizes = ((SIZE, SIZE), (96, 96))  # squares only: its forward takes the root of the number of patches

    def __init__(self) -> None:
        self.data, self.tool = importlib.import_module("voc12.data"), importlib.import_module("tool.imutils")
        seed()
        self.model = nn.DataParallel(importlib.import_module("network.conformer_CAM").Net_ti()).cuda()

    def loader(self) -> DataLoader:
        transforms = importlib.import_module("torchvision.transforms")
        steps = [np.asarray, self.tool.Normalize(), self.tool.RandomCrop(SIZE), self.tool.HWC_to_CHW, torch.from_numpy]
        dataset = self.data.VOC12ClsDataset("voc12/train_aug.txt", voc12_root=str(PHOTOS), transform=transforms.Compose(steps))
        return DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)

    def epoch(self, loader: Any, keep: Callable[[Tensor], None]) -> None:
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5)
        for _, img, label in loader:
            with_background = F.pad(label, (1, 0), value=1.0).cuda()[:, :, None, None]  # (B, 21, 1, 1)
            conv, trans, _ = self.model("transcam", img)
            logits = (conv + trans)[:, :, None, None]
            loss = F.multilabel_soft_margin_loss(logits[:, 1:], with_background[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            keep(loss)
            optimizer.step()

    def cams(self, img: Tensor) -> Dict[str, Tensor]:
        with torch.no_grad():
            cam, patch = (self.model(method, img)[2][:, 1:] for method in ("transcam", "convcam"))
        return {"raw": cam, "fused": cam.clamp_min(0), "patch": patch.clamp_min(0)}


BENCHES = {"mctformer": MCTformer, "weaktr": WeakTr, "transcam": TransCAM}


# ---------------------------------------------------------------------------------------------------- the checks


class Run(NamedTuple):
    """One epoch of the loop.

    Attributes:
        losses: the host's loss of every step, the refiner's included where it is attached.
        first: gradients of the first step by parameter.
        weights: state dict at the end.
        forwards: how often the module `Bench.once` ran.
        noise: state of torch's random generator at the end.
    """

    losses: List[float]
    first: Dict[str, Tensor]
    weights: Dict[str, Tensor]
    forwards: int
    noise: Tensor

    def same(self, other: "Run") -> bool:
        """Bit for bit."""
        pairs = [(self.first, other.first), (self.weights, other.weights)]
        tensors = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
        return tensors and self.losses == other.losses and torch.equal(self.noise, other.noise)


class BrokenLoader(Exception):
    pass


class Broken:
    """A loader that ends with an exception after its first batch."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield next(iter(self.loader))
        raise BrokenLoader


def hooked(model: nn.Module) -> List[str]:
    """Modules of the model with hooks of any kind, and the kinds that all modules have."""
    here = [name for name, module in model.named_modules() if any("_hooks" in k and v for k, v in vars(module).items())]
    everywhere = vars(torch.nn.modules.module)
    return here + [name for name in everywhere if name.startswith("_global_") and name.endswith("_hooks") and everywhere[name]]


class Checks:
    def __init__(self, name: str, clip: str):
        self.name = name
        self.bench: Bench = BENCHES[name]()
        self.inner = unwrap(self.bench.model)
        self.start = {key: value.clone() for key, value in self.inner.state_dict().items()}
        self.refiner = PromptRefiner(VOC_CLASSES, clip=clip, prompt_length=4)

    def run(self, wrap: Callable[[DataLoader], Any] = lambda loader: loader) -> Run:
        """One epoch from the first weights and the same seed."""
        self.inner.load_state_dict(self.start)
        self.inner.zero_grad()
        seed()
        losses: List[float] = []
        first: Dict[str, Tensor] = {}
        calls: List[None] = []

        def keep(loss: Tensor) -> None:
            losses.append(loss.item())
            if len(losses) == 1:
                first.update({name: p.grad.clone() for name, p in self.inner.named_parameters() if p.grad is not None})

        count = self.inner.get_submodule(self.bench.once).register_forward_hook(lambda *_: calls.append(None))
        try:
            self.bench.epoch(wrap(self.bench.loader()), keep)
        finally:
            count.remove()
        weights = {name: value.clone() for name, value in self.inner.state_dict().items()}
        return Run(losses, first, weights, len(calls), torch.get_rng_state())

    def loops(self) -> Dict[str, Any]:
        plain = self.run()
        terms: List[Dict[str, float]] = []
        on_step = lambda step, values: terms.append(values)  # noqa: E731
        with adapters.attach(self.name, self.bench.model, self.refiner, on_step=on_step) as attachment:
            inside = hooked(self.bench.model)
            attached = self.run()
        after = hooked(self.bench.model)
        again = self.run()
        with adapters.attach(self.name, self.bench.model, self.refiner, mode="replace") as replacing:
            replaced = self.run()
        error: Optional[str] = None
        try:
            with adapters.attach(self.name, self.bench.model, self.refiner):
                self.run(Broken)
        except BrokenLoader as broken:
            error = type(broken).__name__
        after_error = hooked(self.bench.model)
        change = sum(float((attached.first[name] - g).double().square().sum()) for name, g in plain.first.items())
        size = sum(float(g.double().square().sum()) for g in plain.first.values())
        return {
            "batches": len(self.bench.loader()),
            "steps": attachment.steps,
            "forwards": attached.forwards,
            "plain forwards": plain.forwards,
            "plain losses": plain.losses,
            "losses": attached.losses,
            "terms": terms,
            "replaced steps": replacing.steps,
            "replaced losses": replaced.losses,
            "gradient difference": (change / size) ** 0.5,
            "same noise": torch.equal(plain.noise, attached.noise),
            "same after": plain.same(again),
            "same after error": plain.same(self.run()),
            "error": error,
            "hooked inside": inside,
            "hooked after": after,
            "hooked after error": after_error,
        }

    def probes(self, kinds: Sequence[str]) -> Dict[str, Any]:
        self.inner.load_state_dict(self.start)
        img, labels = photos(SIZE, SIZE, BATCH)
        found = {}
        trainable = {name: p.numel() for name, p in self.inner.named_parameters() if p.requires_grad}
        for kind in kinds:
            probe = adapters.probe(self.name, self.bench.model, self.refiner, img, labels, cam=kind)
            found[kind] = {
                "attached": probe.attached,
                "verdict": probe.verdict,
                "missed": sorted(trainable.keys() - set(probe.names)),
                "reached": sum(trainable[name] for name in probe.names),
                "all": sum(trainable.values()),
            }
        return found

    def cams(self) -> Dict[str, Any]:
        """Largest difference between our CAM and the host's, by kind and image size."""
        self.inner.load_state_dict(self.start)
        self.inner.eval()
        found: Dict[str, Any] = {}
        for height, width in self.bench.sizes:
            img, _ = photos(height, width, BATCH)
            for kind, its in self.bench.cams(img).items():
                ours = adapters.cam_of(self.name, self.bench.model, cam=kind)(img)
                same = list(ours.shape) == list(its.shape)
                difference = float((ours - its).abs().max()) if same else None
                found[f"{kind} {height}x{width}"] = {"difference": difference, "largest": float(its.abs().max())}
        return found


def main(name: str, repo: str, clip: str, out: str) -> None:
    sys.path.insert(0, repo)
    with compat.old_libraries(), compat.on_cpu():
        checks = Checks(name, clip)
        kinds = ("fused", "raw", "patch") if name == "transcam" else ("fused", "patch", "refined")
        found = {**checks.loops(), "probes": checks.probes(kinds), "cams": checks.cams()}
    Path(out).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
