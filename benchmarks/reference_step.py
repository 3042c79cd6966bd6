"""The package against a literal implementation of the reference step: loss, time, floating-point operations, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/reference_step.py
    python benchmarks/reference_step.py --device cuda --images 32 --pairs 48 --fit-images 128 --classes 20

`literal.py` holds the implementation that the package is compared with. The package computes the same losses. README.md says
what each figure means. CLIP is ViT-B/32 with random weights: nothing is downloaded.

Exits with 1 if the relative difference of a loss is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from functools import partial
from statistics import median
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from literal import BATCH, LENGTH, Batch, PromptOptimizer, Reference, make_batch, random_clip, reference_refine_step
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import OpenAIClip
from semples_plugin.config import VOC

NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa train tv"
).split()
TOLERANCE = 1e-5  # relative difference of the losses
LOWEST, HIGHEST = 0.05, 0.95  # every cosine must lie between, away from the clamp, which has no gradient


# --------------------------------------------------------------------------------------------------------- ours


def make_refiner(model: Any, classes: int, device: str) -> PromptRefiner:
    """The package on the same CLIP (not a copy) and with the reference's image statistics, ImageNet's (`clip_stats=False`)."""
    encoder = OpenAIClip(model, "random ViT-B/32")
    return PromptRefiner(NAMES[:classes], clip=encoder, config=VOC, clip_stats=False).to(device)


def our_refine_step(refiner: PromptRefiner, batch: Batch, cam: Tensor) -> float:
    cam.grad = None
    loss = refiner(batch.img, cam, batch.labels)
    loss.backward()
    return loss.item()


def our_fit(refiner: PromptRefiner, batch: Batch, epochs: int, chunk: Optional[int] = None) -> List[float]:
    loader = list(zip(batch.img.split(chunk or len(batch.img)), batch.labels.split(chunk or len(batch.img))))
    return refiner.fit_prompts(loader, batch.host, epochs=epochs, progress=False).losses


# ---------------------------------------------------------------------------------------------------- measuring


def timed(device: str, step: Callable[[], Any]) -> Tuple[float, float]:
    """Wall seconds and CPU seconds (of all threads) of one call."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(times: List[Tuple[float, float]]) -> str:
    """Shortest to longest wall time."""
    return f"{min(wall for wall, _ in times):.2f} to {max(wall for wall, _ in times):.2f} s"


def flops(step: Callable[[], Any]) -> float:
    """Counted floating-point operations of matrix products and convolutions; NaN where torch cannot count (< 2.3).

    Attention runs in its plain form while counting, because the fused form is not counted on every device.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode
    except ImportError:
        step()
        return math.nan
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def resident(key: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, in MiB; NaN on other systems than Linux.

    Not `ru_maxrss`, which a child process inherits from its parent.
    """
    try:
        with open("/proc/self/status") as status:
            return next(float(line.split()[1]) / 1024 for line in status if line.startswith(key))
    except OSError:
        return math.nan


def memory_of(what: str, args: argparse.Namespace) -> Dict[str, float]:
    """Peak memory of one step in this new process, in MiB: `total` with CLIP's weights, `step` without them."""
    cuda = args.device == "cuda"
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 8)).to(args.device)
    layers(torch.randn(2, 3, 32, 32, device=args.device)).sum().backward()  # loads the libraries that torch loads on first use
    del layers
    start = torch.cuda.memory_allocated() / 2**20 if cuda else resident("VmRSS")
    batch, _ = batches(args)
    model = random_clip().to(args.device)
    variant, stage = what.split("-")
    step: Callable[[], Any]
    if variant == "reference":
        reference = Reference(model, NAMES[: args.classes], torch.rand(args.classes, LENGTH, 512, device=args.device))
        if stage == "b":
            step = partial(PromptOptimizer(reference, 1).step, batch)
        else:
            step = partial(reference_refine_step, reference, batch, new_cam(batch))
    else:
        refiner = make_refiner(model, args.classes, args.device)
        if stage == "b":
            step = partial(our_fit, refiner, batch, 1)
        else:
            refiner.prompts.take(refiner.prompts.context, torch.ones_like(refiner.prompts.alive))  # as after stage (b)
            step = partial(our_refine_step, refiner, batch, new_cam(batch))
    if cuda:
        weights = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        weights = resident("VmRSS")
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak counts from here
        except OSError:
            pass  # building CLIP needs less than any step
        step()
        peak = resident("VmHWM")
    return {"total": peak - start, "step": peak - weights}


def memory(what: str) -> Dict[str, float]:
    """`memory_of` in a child process with the same arguments."""
    run = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", what], stdout=subprocess.PIPE, check=True, encoding="utf-8"
    )
    return json.loads(run.stdout.splitlines()[-1])


def batches(args: argparse.Namespace) -> Tuple[Batch, Batch]:
    """The batch of the measured steps, and the data set of stage (b) with the same number of labels per image."""
    device = args.device
    small = make_batch(args.images, args.pairs, args.classes, args.size)
    large = make_batch(args.fit_images, round(args.fit_images * args.pairs / args.images), args.classes, args.size, seed=1)
    return tuple(Batch(b.img.to(device), b.labels.to(device), b.host.to(device)) for b in (small, large))  # type: ignore


def new_cam(batch: Batch) -> Tensor:
    """CAM (B, C, h, w) that requires grad, as a host in training gives it."""
    return batch.host(batch.img).detach().requires_grad_(True)


# ------------------------------------------------------------------------------------------------------- report


class Row(NamedTuple):
    """One line of the table; the ratio is reference / ours."""

    stage: str
    name: str
    reference: float
    ours: float

    def __str__(self) -> str:
        if self.name.startswith("loss"):
            return f"  {self.name:<42} {self.reference:>12.7g} {self.ours:>12.7g}   difference {self.difference:.1e}"
        return f"  {self.name:<42} {self.reference:>12.4g} {self.ours:>12.4g}   {self.ratio:.2f}x"

    @property
    def ratio(self) -> float:
        return self.reference / self.ours

    @property
    def difference(self) -> float:
        return abs(self.reference - self.ours) / abs(self.reference)


def stage_c(args: argparse.Namespace, reference: Reference, refiner: PromptRefiner, batch: Batch) -> List[Row]:
    """Match + refine: loss, gradient, operations, time."""
    cam, our_cam = new_cam(batch), new_cam(batch)
    loss: List[float] = []
    counted = flops(lambda: loss.append(reference_refine_step(reference, batch, cam)))  # also warms up
    our_counted = flops(lambda: loss.append(our_refine_step(refiner, batch, our_cam)))
    rows = [Row("c", "loss", *loss)]
    assert cam.grad is not None and our_cam.grad is not None
    error = ((cam.grad - our_cam.grad).norm() / cam.grad.norm()).item()
    print(f"  stage (c): gradients to cam differ by {error:.1e} (norm of the difference / norm)")
    times: List[Tuple[float, float]] = []
    our_times: List[Tuple[float, float]] = []
    for _ in range(args.steps):  # in turns, so that other work on the machine slows both down
        times.append(timed(args.device, partial(reference_refine_step, reference, batch, cam)))
        our_times.append(timed(args.device, partial(our_refine_step, refiner, batch, our_cam)))
    print(f"  stage (c): steps of the reference took {spread(times)}, ours {spread(our_times)}")
    for i, clock in enumerate(("wall", "CPU")):
        rows.append(Row("c", f"{clock} seconds per step", *(median(t[i] for t in ts) for ts in (times, our_times))))
    rows.append(Row("c", "counted GFLOP per step", counted / 1e9, our_counted / 1e9))
    return rows


def stage_b(
    args: argparse.Namespace, reference: Reference, refiner: PromptRefiner, batch: Batch, data: Batch
) -> Tuple[List[Row], Dict[str, float]]:
    """Prompts: loss of the first steps on `batch`, operations, time of all epochs on `data`."""
    count = max(args.steps, 2)
    loss: List[float] = []
    our_loss: List[float] = []
    one = flops(lambda: our_fit(refiner, batch, 1))
    many = flops(lambda: our_loss.extend(our_fit(refiner, batch, count)))
    optimizer = PromptOptimizer(reference, count)
    counted = flops(lambda: loss.append(optimizer.step(batch)))
    times = [timed(args.device, lambda: loss.append(optimizer.step(batch))) for _ in range(count - 1)]
    rows = [Row("b", f"loss, step {i + 1}", *both) for i, both in enumerate(zip(loss, our_loss))]

    our_wall, our_cpu = timed(args.device, lambda: our_fit(refiner, data, args.epochs, chunk=32))
    times += [timed(args.device, lambda: optimizer.step(batch)) for _ in range(count - 1)]  # before and after ours
    wall, cpu = (median(column) for column in zip(*times))

    pairs, small_pairs = int(data.labels.sum()), int(batch.labels.sum())
    scale = pairs / small_pairs * args.epochs
    steps = args.epochs * math.ceil(len(data.img) / BATCH)
    with torch.no_grad():
        view = flops(lambda: refiner.encoder.encode_image(torch.zeros(1, 3, 224, 224, device=args.device)))
        last = flops(lambda: refiner.encoder.encode_prompt(refiner.prompts.context[:, 0], refiner.config.prompt_template))
        host = flops(lambda: data.host(data.img[:1]))
    per_step = (many - one) / (count - 1)
    ours = host * len(data.img) + view * pairs + per_step * steps + last
    rows.append(Row("b", "wall seconds, all epochs", wall * scale, our_wall))
    rows.append(Row("b", "CPU seconds, all epochs", cpu * scale, our_cpu))
    rows.append(Row("b", "counted TFLOP, all epochs", counted * scale / 1e12, ours / 1e12))
    print(
        f"  stage (b), reference: measured {len(times)} steps of {small_pairs} pairs ({spread(times)}), "
        f"scaled to {pairs} pairs x {args.epochs} epochs"
    )
    print(f"  stage (b), ours: measured in full, features collected and {args.epochs} epochs run")
    return rows, {"reference_pair": counted / small_pairs, "view": view, "class_step": per_step / args.classes}


def at_recipe_size(cost: Dict[str, float], images: int, labels: float, classes: int, epochs: int) -> float:
    """Ratio of counted operations of stage (b), in batches of `images` that show every class: the worst case for ours."""
    pairs = images * labels
    return pairs * cost["reference_pair"] / (classes * cost["class_step"] + pairs * cost["view"] / epochs)


def report(args: argparse.Namespace) -> int:
    batch, data = batches(args)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"CLIP ViT-B/32 with random weights, float32, torch {torch.__version__}, {where}")
    print(f"{args.images} images, {args.pairs} pairs, {args.classes} classes; medians of {args.steps} steps in turns\n")
    peaks = {what: memory(what) for what in ("reference-c", "ours-c", "reference-b", "ours-b")}

    model = random_clip().to(args.device)
    refiner = make_refiner(random_clip(), args.classes, args.device)
    reference = Reference(model, refiner.prompt_names, refiner.prompts.context[:, 0].detach().clone())
    rows, cost = stage_b(args, reference, refiner, batch, data)
    reference.context = refiner.prompts.context[:, 0].detach().clone()  # learned by the run above
    rows = stage_c(args, reference, refiner, batch) + rows
    for stage in "cb":
        theirs, ours = peaks[f"reference-{stage}"], peaks[f"ours-{stage}"]
        rows.append(Row(stage, "peak memory MiB, with CLIP's weights", theirs["total"], ours["total"]))
        rows.append(Row(stage, "peak memory MiB, beside the weights", theirs["step"], ours["step"]))
    cosines = torch.cat(reference.cosines)
    low, high = cosines.min().item(), cosines.max().item()
    print(f"  cosines between {low:.2f} and {high:.2f}\n")

    fit = f"{args.epochs} epochs of {int(data.labels.sum())} pairs"
    for stage, title in (("c", "stage (c), match + refine"), ("b", f"stage (b), prompts, {fit}")):
        print(f"{title:<44} {'reference':>12} {'ours':>12}")
        print("\n".join(str(row) for row in rows if row.stage == stage) + "\n")
    failed = not LOWEST < low < high < HIGHEST
    if failed:
        print(f"FAILED: cosines must lie between {LOWEST} and {HIGHEST}; at the clamp the gradients are 0")
    for row in rows:
        if row.name in ("loss", "loss, step 1"):
            failed |= row.difference > TOLERANCE
            verdict = "equal" if row.difference <= TOLERANCE else "NOT EQUAL"
            print(f"loss ({row.stage}): {verdict}, difference {row.difference:.1e}, allowed {TOLERANCE:.0e}")
    clock = "CPU seconds" if args.device == "cpu" else "wall seconds"  # CPU seconds leave out other work on the machine
    for start, stage, wanted in ((clock, "c", 2.5), (clock, "b", 50), ("peak", "c", 2), ("peak", "b", 2)):
        row = next(row for row in rows if row.stage == stage and row.name.startswith(start))
        verdict = "reached" if row.ratio >= wanted else "NOT REACHED"
        what = "memory" if start == "peak" else clock
        print(f"{what} ({stage}): {row.ratio:.1f}x less, expected {wanted}x: {verdict}")
    sizes = {"VOC, 20 classes, 1.5 labels per image": (1.5, 20), "COCO, 80 classes, 2.9 labels per image": (2.9, 80)}
    ratios = {name: at_recipe_size(cost, BATCH, *size, args.epochs) for name, size in sizes.items()}
    for name, ratio in ratios.items():
        print(f"operations (b) at {BATCH} images per step, {name}: {ratio:.0f}x less (computed from the counts)")
    if args.json:
        result = {
            "arguments": vars(args),
            "torch": torch.__version__,
            "device": where,
            "cosines": [low, high],
            "rows": [{**row._asdict(), "ratio": row.ratio} for row in rows],
            "recipe_sizes": ratios,
        }
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=4, help="images of a measured step")
    parser.add_argument("--pairs", type=int, default=6, help="positive (image, class) pairs of a measured step")
    parser.add_argument("--classes", type=int, default=4, help="number of classes, at most 20")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each")
    parser.add_argument("--fit-images", type=int, default=26, help="images of the data set in stage (b)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of stage (b)")
    parser.add_argument("--size", type=int, default=256, help="height and width of the host's images")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 1 <= args.classes <= len(NAMES):
        parser.error(f"--classes must be from 1 to {len(NAMES)}")
    if not args.images <= args.pairs <= args.images * args.classes:
        parser.error("--pairs must give every image from one label to --classes labels")
    if not make_batch(args.images, args.pairs, args.classes, 16).labels.any(0).all():
        parser.error("--images and --pairs are too few for every class to occur")
    torch.backends.cudnn.allow_tf32 = False  # losses are compared in float32; matrix products are float32 by default
    if args.child:
        print(json.dumps(memory_of(args.child, args)))
        return 0
    return report(args)


if __name__ == "__main__":
    sys.exit(main())
