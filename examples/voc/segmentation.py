"""A segmentation network trained on pseudo labels, and its predictions: SegFormer of `transformers`, one process per GPU.

    python -m examples.voc.segmentation train --photos DIR --labels DIR --list FILE --segmenter FOLDER --out DIR
    python -m examples.voc.segmentation predict --photos DIR --list FILE --segmenter DIR/model --out DIR [--crf-out DIR]
    torchrun --nproc_per_node 4 -m examples.voc.segmentation train ...

What a step does depends on its number alone: its images, how they are cropped, and the random numbers in the network are all
drawn from (seed, process, step). A run that goes on from a checkpoint therefore ends as one that was never killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin._files import remove_parts, write_atomically
from semples_plugin.cli.arguments import read_ids
from semples_plugin.files.images import find_image, read_image, read_label_png, write_label_png
from semples_plugin.masks import UNCERTAIN

from . import crf

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Training(NamedTuple):
    """How the network is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: images per step, of all processes together.
        crop: side of the square crops in pixels.
        lr: learning rate of the encoder; the decoder's is ten times as high. Both fall to 0 as (1 - step / steps) ** 0.9.
        warmup: steps in which the learning rate rises to it.
        every: steps between two checkpoints.
        seed: of images, crops and the network's random numbers.
        workers: processes that read images.
    """

    steps: int = 20_000
    batch_size: int = 16
    crop: int = 512
    lr: float = 6e-5
    warmup: int = 1500
    every: int = 500
    seed: int = 0
    workers: int = 4


# ---------------------------------------------------------------------------------------------------- images


class Batches(torch.utils.data.Dataset):
    """Item t is the batch of step t of one process: images (B, 3, S, S) and labels (B, S, S) int64, 255 not counted."""

    def __init__(self, ids: Sequence[str], photos: Path, labels: Path, how: Training, rank: int = 0, world: int = 1):
        self.ids, self.photos, self.labels, self.how, self.rank, self.world = list(ids), photos, labels, how, rank, world
        if how.batch_size % world:
            raise ValueError(f"--batch-size must be a multiple of the {world} processes; got {how.batch_size}.")
        self.each = how.batch_size // world

    def __len__(self) -> int:
        return self.how.steps

    def __getitem__(self, step: int) -> Tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.how.seed, self.rank, step])
        pairs = [self._crop(self._id(step, i), rng) for i in range(self.each)]
        return torch.stack([img for img, _ in pairs]), torch.stack([label for _, label in pairs])

    def _id(self, step: int, i: int) -> str:
        """The images in an order that is new in each pass over them, shared out among the processes."""
        place = step * self.how.batch_size + self.rank * self.each + i
        order = np.random.default_rng([self.how.seed, place // len(self.ids)]).permutation(len(self.ids))
        return self.ids[order[place % len(self.ids)]]

    def _crop(self, name: str, rng: np.random.Generator) -> Tuple[Tensor, Tensor]:
        """Scaled by 0.5 to 2, mirrored at random, cut to S x S; what the image does not fill is 255."""
        side = self.how.crop
        img = as_tensor(read_image(find_image(self.photos, name)))  # (3, H, W)
        label = torch.from_numpy(read_label_png(self.labels / f"{name}.png").astype(np.int64))  # (H, W)
        scale = float(rng.uniform(0.5, 2))
        size = [max(1, round(n * scale)) for n in label.shape]
        img = F.interpolate(img[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
        label = F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        if rng.random() < 0.5:
            img, label = img.flip(-1), label.flip(-1)
        down, right = max(0, side - size[0]), max(0, side - size[1])
        img, label = F.pad(img, (0, right, 0, down)), F.pad(label, (0, right, 0, down), value=UNCERTAIN)
        y, x = (int(rng.integers(n - side + 1)) for n in label.shape)
        return img[:, y : y + side, x : x + side], label[y : y + side, x : x + side]


def as_tensor(photo: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W), normalized as SegFormer expects."""
    img = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1).float() / 255
    return (img - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# ---------------------------------------------------------------------------------------------------- network


def load_network(segmenter: str, num_labels: Optional[int] = None) -> nn.Module:
    """SegFormer from a folder or a name of the Hugging Face hub, with a new head if need be.

    Args:
        num_labels: with background; by default as many as it has.

    Raises:
        ModuleNotFoundError: if `transformers` is not installed.
    """
    segformer = _segformer()
    torch.manual_seed(0)  # of a head that is new
    how = {} if num_labels is None else {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    return segformer.SegformerForSemanticSegmentation.from_pretrained(segmenter, **how)


def random_network(num_labels: int, seed: int = 0) -> nn.Module:
    """A tiny SegFormer with random weights, for rehearsals."""
    segformer = _segformer()
    torch.manual_seed(seed)
    config = segformer.SegformerConfig(
        num_labels=num_labels, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32, mlp_ratios=[2, 2, 2, 2],
    )  # fmt: skip
    return segformer.SegformerForSemanticSegmentation(config)


def _segformer() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("SegFormer needs transformers: pip install transformers.", name="transformers") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def save_network(model: nn.Module, folder: Path) -> None:
    """Configuration and weights of a network; the folder appears whole or not at all."""
    part = folder.with_name(f".{folder.name}.new")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(part)  # type: ignore[operator]
    os.replace(part, folder)


def parameter_groups(model: nn.Module, lr: float) -> List[Dict[str, Any]]:
    """AdamW's groups: the decoder learns ten times as fast; norms and biases have no weight decay."""
    groups: Dict[Tuple[float, float], List[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        key = (lr * 10 if "decode_head" in name else lr, 0.0 if parameter.ndim == 1 else 0.01)
        groups.setdefault(key, []).append(parameter)
    return [{"params": p, "lr": rate, "base": rate, "weight_decay": decay} for (rate, decay), p in sorted(groups.items())]


def schedule(step: int, how: Training) -> float:
    """Factor on the learning rate in a step, from 0: a linear rise, then (1 - step / steps) ** 0.9."""
    rise = min(1.0, (step + 1) / max(1, min(how.warmup, how.steps // 10)))
    return rise * (1 - step / how.steps) ** 0.9


# ---------------------------------------------------------------------------------------------------- training


def train(ids: Sequence[str], photos: Path, labels: Path, segmenter: str, out: Path, how: Training, cpu: bool = False) -> None:
    """Train to the end, from the checkpoint in `out` if there is one; then `out/model` and `out/log.jsonl` are complete."""
    with _processes(cpu) as (rank, world, device):
        out.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            remove_parts(out)
        if (out / "model").is_dir():
            if rank == 0:
                (out / "checkpoint.pt").unlink(missing_ok=True)
            return
        model = load_network(segmenter).to(device).train()
        if world > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = torch.optim.AdamW(parameter_groups(model, how.lr))
        amp = device.type == "cuda"
        scaler = _scaler(amp)
        log: List[Dict[str, float]] = []
        first, checkpoint = 0, out / "checkpoint.pt"
        facts = {**how._asdict(), "ids": len(ids), "world": world}
        if checkpoint.is_file():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if state["facts"] != facts:
                raise ValueError(
                    f"{checkpoint} is of a training with other settings, {state['facts']}; delete it to begin anew."
                )
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            first, log = state["step"], state["log"]
            print(f"goes on at step {first} of {how.steps}", flush=True)
        parallel = model if world == 1 else nn.parallel.DistributedDataParallel(model, [device] if amp else None)
        batches = torch.utils.data.DataLoader(
            Batches(ids, photos, labels, how, rank, world), batch_size=None, sampler=range(first, how.steps),
            num_workers=how.workers, pin_memory=amp,
        )  # fmt: skip
        for step, (img, label) in enumerate(batches, first):
            torch.manual_seed((how.seed * world + rank) * 10**9 + step)  # of dropout
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * schedule(step, how)
            img, label = img.to(device, non_blocking=True), label.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.float16, enabled=amp):
                logits = parallel(pixel_values=img).logits  # (B, L, S / 4, S / 4)
            loss = pixel_loss(logits.float(), label)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            log.append({"step": step + 1, "loss": float(loss.detach())})
            if (step + 1) % how.every == 0 and step + 1 < how.steps and rank == 0:
                content = {"facts": facts, "step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                           "scaler": scaler.state_dict(), "log": log}  # fmt: skip
                write_atomically(checkpoint, lambda file, content=content: torch.save(content, file))  # type: ignore[misc]
                _write_log(out, log)
                print(f"step {step + 1} of {how.steps}: loss {log[-1]['loss']:.4f}", flush=True)
        if rank == 0:
            _write_log(out, log)
            save_network(model, out / "model")
            checkpoint.unlink(missing_ok=True)


def _scaler(enabled: bool) -> Any:
    """A gradient scaler; torch 2.0 has it under its old name only."""
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda", enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def pixel_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not 255; 0, attached, where there is none.

    Args:
        logits: (B, L, h, w), enlarged to the size of the labels.
        label: (B, H, W) int64.
    """
    full = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(full, label, ignore_index=UNCERTAIN, reduction="sum")
    return total / (label != UNCERTAIN).sum().clamp(min=1)


def _write_log(out: Path, log: Sequence[Dict[str, float]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in log)
    write_atomically(out / "log.jsonl", lambda file: file.write(text.encode()))


@contextlib.contextmanager
def _processes(cpu: bool) -> Iterator[Tuple[int, int, torch.device]]:
    """(rank, number of processes, device), under torchrun with their group."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available() and not cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        yield rank, world, device
        if world > 1:
            torch.distributed.barrier()
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- prediction


@torch.no_grad()
def predict(ids: Sequence[str], photos: Path, segmenter: str, out: Path, crf_out: Optional[Path], cpu: bool = False) -> None:
    """Write a label PNG per image, and one after a dense CRF into `crf_out`. Images that have theirs already are left out."""
    with _processes(cpu) as (rank, world, device):
        model = load_network(segmenter).to(device).eval()
        folders = [out, *([] if crf_out is None else [crf_out])]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                remove_parts(folder)
        for name in ids[rank::world]:
            if all((folder / f"{name}.png").is_file() for folder in folders):
                continue
            photo = read_image(find_image(photos, name))
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                logits = model(pixel_values=as_tensor(photo)[None].to(device)).logits
            full = F.interpolate(logits.float(), photo.shape[:2], mode="bilinear", align_corners=False)[0]  # (L, H, W)
            write_label_png(out / f"{name}.png", full.argmax(0).cpu().numpy())
            if crf_out is not None:
                shares, labels = full.softmax(0).cpu().numpy(), full.argmax(0).unique().cpu().numpy()
                found = crf.dense_crf(photo, shares[labels] / shares[labels].sum(0))  # among the labels that are there
                write_label_png(crf_out / f"{name}.png", labels[found])


# ---------------------------------------------------------------------------------------------------- command line


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("train", "predict"):
        one = commands.add_parser(name)
        one.add_argument("--photos", type=Path, required=True)
        one.add_argument("--list", type=Path, required=True)
        one.add_argument("--segmenter", required=True, help="folder of a SegFormer, with its head")
        one.add_argument("--out", type=Path, required=True)
        one.add_argument("--cpu", action="store_true")
        if name == "train":
            one.add_argument("--labels", type=Path, required=True, help="pseudo labels, PNG; 255 is not counted")
            for field, default in Training._field_defaults.items():
                one.add_argument(f"--{field.replace('_', '-')}", type=type(default), default=default)
        else:
            one.add_argument("--crf-out", type=Path, help="also write the labels after a dense CRF; needs pydensecrf")
    options = parser.parse_args(arguments)
    ids = read_ids(options.list) or []
    if options.command == "predict":
        predict(ids, options.photos, options.segmenter, options.out, options.crf_out, options.cpu)
        return
    how = Training(**{field: getattr(options, field) for field in Training._fields})
    train(ids, options.photos, options.labels, options.segmenter, options.out, how, options.cpu)


if __name__ == "__main__":
    main()
