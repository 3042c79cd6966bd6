"""The package against a literal implementation of the reference step: loss, time, floating-point operations, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/reference_step.py
    python benchmarks/reference_step.py --device cuda --images 32 --pairs 48 --fit-images 128 --classes 20

`Reference` below is written from the method's description (SemPLeS, arXiv 2401.11791), the straightforward way: every
region is encoded where a term needs it (three image encodes per pair), texts and prompts are encoded at CLIP's full 77
tokens in every step and for every pair, and CLIP's parameters require gradients. The package computes the same losses;
see README.md beside this file for what each figure means. CLIP is ViT-B/32 with random weights: nothing is downloaded.

Exits with 1 if the losses differ by more than 1e-5, relatively.
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
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import OpenAIClip, openai_clip_module

LAMBDA_B, LAMBDA_T, LAMBDA = 2.4, 0.02, 0.05  # the recipe for VOC
EPS, PROMPT_EPS, LENGTH = 0.1, 1e-4, 30
RATE, WEIGHT_DECAY, BATCH = 2.5e-2, 0.03, 128
NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep sofa train tv"
).split()
TOLERANCE = 1e-5  # relative, of the losses
LOWEST, HIGHEST = 0.05, 0.95  # every cosine lies between: far from the clamp, which has no gradient


# ------------------------------------------------------------------------------------------------------- inputs


class Batch(NamedTuple):
    """`img` (B, 3, H, W) with ImageNet statistics, multi-hot `labels` (B, C), and the host that makes the CAM."""

    img: Tensor
    labels: Tensor
    host: nn.Module


def random_clip() -> Any:
    """OpenAI's CLIP class in the size of ViT-B/32, random weights, all cosines well inside (0, 1).

    Features of random towers are unrelated, so cosines would be near 0 and the clamp would stop gradients. The biases of
    the last layer norms therefore add one and the same vector to the features of both towers.
    """
    torch.manual_seed(0)
    model = openai_clip_module("model").CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    with torch.no_grad():
        model.ln_final.bias.normal_(std=0.7)
        shift = model.ln_final.bias @ model.text_projection  # (512,)
        model.visual.ln_post.bias.copy_(shift @ torch.linalg.pinv(model.visual.proj))
    return model.eval()


def make_batch(images: int, pairs: int, classes: int, size: int, seed: int = 0) -> Batch:
    """Random images with `pairs` labels in all, dealt out evenly to images and classes, and a host of one convolution."""
    torch.manual_seed(seed)
    labels = torch.zeros(images, classes)
    for i in range(pairs):
        image, turn = i % images, i // images
        labels[image, (image + turn) % classes] = 1
    torch.manual_seed(1)
    host = nn.Conv2d(3, classes, 16, stride=16).requires_grad_(False).eval()
    torch.manual_seed(2 + seed)
    return Batch(torch.randn(images, 3, size, size).clamp(-2, 2), labels, host)


# ---------------------------------------------------------------------------------------------------- reference


class Reference:
    """One training step as described, without any saving.

    Args:
        model: CLIP; its parameters will require gradients.
        names: C class names.
        context: (C, L, Dt) the learned prompts.
    """

    def __init__(self, model: Any, names: List[str], context: Tensor):
        self.model = model.requires_grad_(True)
        self.context = context
        self.cosines: List[Tensor] = []
        encode = openai_clip_module("simple_tokenizer").SimpleTokenizer().encode
        start, end = [49406], [49407]
        device = context.device
        self.tokens = torch.zeros(len(names), 77, dtype=torch.long, device=device)
        for k, name in enumerate(names):
            ids = [*start, *encode(f"a photo of a {name}."), *end]
            self.tokens[k, : len(ids)] = torch.tensor(ids)
        prefix, suffix = [*start, *encode("a photo of ")], [*encode(" ."), *end]
        self.first = len(prefix)
        self.layout = torch.zeros(77, dtype=torch.long, device=device)  # zeros where the context comes, and behind the end
        self.layout[: self.first] = torch.tensor(prefix)
        after = self.first + context.shape[1]
        self.layout[after : after + len(suffix)] = torch.tensor(suffix)

    def refine_loss(self, img: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """L_match + lambda L_refine of stage (c); the prompts are frozen."""
        foreground, background, classes = self.regions(img, cam, labels, EPS)
        match = self.match_loss(foreground, background, classes)
        v_f = self.model.encode_image(foreground)  # the third image encode: this term has its own
        u_b = self.encode_prompts(classes)
        return match + LAMBDA * -torch.log(1 - self.cosine(v_f, u_b)).mean()

    def match_loss(self, foreground: Tensor, background: Tensor, classes: Tensor) -> Tensor:
        v_f = self.model.encode_image(foreground)
        v_b = self.model.encode_image(background)
        u_f = self.model.encode_text(self.tokens[classes])
        return -torch.log(self.cosine(v_f, u_f)).mean() + LAMBDA_B * -torch.log(1 - self.cosine(v_b, u_f)).mean()

    def prompt_loss(self, img: Tensor, labels: Tensor, host: nn.Module) -> Tensor:
        """L_prompt of stage (b); the host is frozen."""
        with torch.no_grad():
            cam = host(img)
        _, background, classes = self.regions(img, cam, labels, PROMPT_EPS)
        v_b = self.model.encode_image(background)
        u_f = self.model.encode_text(self.tokens[classes])
        u_b = self.encode_prompts(classes)
        return -torch.log(self.cosine(v_b, u_b)).mean() + LAMBDA_T * torch.log(self.cosine(u_f, u_b)).mean()

    def regions(self, img: Tensor, cam: Tensor, labels: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
        """Foreground and background images (P, 3, 224, 224) and class (P,) of every positive pair."""
        x = F.interpolate(img, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        foreground, background, classes = [], [], []
        for i in range(labels.shape[0]):
            for k in range(labels.shape[1]):
                if labels[i, k] == 1:
                    up = F.interpolate(cam[i : i + 1, k : k + 1], size=(224, 224), mode="bilinear", align_corners=True)[0, 0]
                    mask = (up - up.min()) / (up.max() - up.min() + eps)  # (224, 224)
                    foreground.append(mask * x[i])
                    background.append((1 - mask) * x[i])
                    classes.append(k)
        return torch.stack(foreground), torch.stack(background), torch.tensor(classes, device=img.device)

    def encode_prompts(self, classes: Tensor) -> Tensor:
        """u_b (P, D): the prompts of the pairs' classes in a row of 77 tokens, as CLIP's own `encode_text` goes on."""
        model, before, after = self.model, self.first, self.first + self.context.shape[1]
        x = model.token_embedding(self.layout.expand(len(classes), -1))  # (P, 77, Dt)
        x = torch.cat([x[:, :before], self.context[classes], x[:, after:]], dim=1)
        x = x + model.positional_embedding
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return model.ln_final(x)[:, int(self.layout.argmax())] @ model.text_projection

    def cosine(self, a: Tensor, b: Tensor) -> Tensor:
        cosine = F.cosine_similarity(a, b, dim=-1)
        self.cosines.append(cosine.detach())
        return cosine.clamp(1e-4, 0.9999)


class PromptOptimizer:
    """Steps of stage (b) as the reference takes them: AdamW on the context, cosine schedule over `total` steps."""

    def __init__(self, reference: Reference, total: int):
        self.reference = reference
        reference.context.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([reference.context], lr=RATE, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=total)

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        self.reference.model.zero_grad(set_to_none=True)
        loss = self.reference.prompt_loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def reference_refine_step(reference: Reference, batch: Batch, cam: Tensor) -> float:
    reference.model.zero_grad(set_to_none=True)  # nobody uses these gradients; keeping them would cost the reference more
    cam.grad = None
    loss = reference.refine_loss(batch.img, cam, batch.labels)
    loss.backward()
    return loss.item()


# --------------------------------------------------------------------------------------------------------- ours


def make_refiner(model: Any, classes: int, device: str) -> PromptRefiner:
    """The package on the same CLIP (not a copy), fed as the reference feeds it: ImageNet statistics (`clip_stats=False`)."""
    encoder = OpenAIClip(model, "random ViT-B/32")
    return PromptRefiner(NAMES[:classes], clip=encoder, recipe="voc", clip_stats=False).to(device)


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
    """MiB of `VmRSS` (now) or `VmHWM` (peak) of this process; NaN elsewhere than on Linux.

    Not `ru_maxrss`, which a child process inherits from its parent.
    """
    try:
        with open("/proc/self/status") as status:
            return next(float(line.split()[1]) / 1024 for line in status if line.startswith(key))
    except OSError:
        return math.nan


def memory_of(what: str, args: argparse.Namespace) -> Dict[str, float]:
    """Peak memory of one step in this fresh process, MiB: `total` with CLIP's weights, `step` what came on top of them."""
    cuda = args.device == "cuda"
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 8)).to(args.device)
    layers(torch.randn(2, 3, 32, 32, device=args.device)).sum().backward()  # libraries that torch loads at first use
    del layers
    start = torch.cuda.memory_allocated() / 2**20 if cuda else resident("VmRSS")
    batch, _ = batches(args)
    model = random_clip().to(args.device)
    who, stage = what.split("-")
    step: Callable[[], Any]
    if who == "reference":
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
            refiner.prompts.learned.fill_(True)  # as after stage (b)
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
    """The batch of the measured steps, and the data set of stage (b) with as many labels per image."""
    device = args.device
    small = make_batch(args.images, args.pairs, args.classes, args.size)
    large = make_batch(args.fit_images, round(args.fit_images * args.pairs / args.images), args.classes, args.size, seed=1)
    return tuple(Batch(b.img.to(device), b.labels.to(device), b.host.to(device)) for b in (small, large))  # type: ignore


def new_cam(batch: Batch) -> Tensor:
    """(B, C, h, w) that requires grad, as if it came from a host in training."""
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
    for _ in range(args.steps):  # in turns: whatever slows the machine down meets both
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
        last = flops(lambda: refiner.encoder.encode_prompt(refiner.prompts.context, refiner.prompt_template))
        seen = flops(lambda: data.host(data.img[:1]))
    per_step = (many - one) / (count - 1)
    ours = seen * len(data.img) + view * pairs + per_step * steps + last
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
    """Ratio of counted operations of stage (b) in batches of `images`, every class in every step (the worst case for ours)."""
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
    reference = Reference(model, refiner.prompt_names, refiner.prompts.context.detach().clone())
    rows, cost = stage_b(args, reference, refiner, batch, data)
    reference.context = refiner.prompts.context.detach().clone()  # learned by the run above
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
        print(f"FAILED: cosines must lie between {LOWEST} and {HIGHEST} for the comparison to mean anything")
    for row in rows:
        if row.name in ("loss", "loss, step 1"):
            failed |= row.difference > TOLERANCE
            verdict = "equal" if row.difference <= TOLERANCE else "NOT EQUAL"
            print(f"loss ({row.stage}): {verdict}, difference {row.difference:.1e}, allowed {TOLERANCE:.0e}")
    clock = "CPU seconds" if args.device == "cpu" else "wall seconds"  # the first does not see what else is running
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
