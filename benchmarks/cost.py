"""What a training step of the refiner costs, over batch size, positives per image, CLIP model, precision and device.

    OMP_NUM_THREADS=1 python benchmarks/cost.py                       # a CPU
    python benchmarks/cost.py --device cuda --images 64 --dtypes float32 float16 bfloat16 --clips ViT-B/32 ViT-B/16 --compile

The floor is what no implementation of the loss can do without: two image encodes per (image, class) pair, forward, and backward
to the input. A row says how the step compares with the floor, how many views are encoded, how many operations are counted, and
which share of the machine's own rate of matrix products (measured in the same run) the step reaches. CLIP has random weights:
nothing is downloaded. Stages: match; refine; online (match, refine and a step of the prompts).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from functools import partial
from statistics import median
from typing import Any, Callable, Dict, List, Tuple

import torch
from literal import make_batch
from reference_step import NAMES, flops, resident, timed
from torch import Tensor

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import load_clip, openai_clip_module

SIZES = {  # OpenAI's architectures: embedding, image size, layers, width, patch, of the image tower; then of the text tower
    "ViT-B/32": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "tiny": (64, 64, 2, 64, 16, 77, 49408, 64, 1, 2),
}
CLASSES = 20


def make_clip(name: str) -> Any:
    torch.manual_seed(0)
    return openai_clip_module("model").CLIP(*SIZES[name]).eval()


class Setting:
    """One row of the table: a refiner and a batch, and the functions that are timed."""

    def __init__(self, clip: str, dtype: str, images: int, positives: int, stage: str, device: str, compiled: bool):
        self.device = device
        encoder = load_clip(make_clip(clip), device, getattr(torch, dtype))
        if compiled:
            encoder.model.visual = torch.compile(encoder.model.visual)
        options: Dict[str, Any] = {"online_steps": 100} if stage == "online" else {}
        self.refiner = PromptRefiner(NAMES[:CLASSES], encoder, clip_dtype=dtype, **options).to(device)
        if stage == "refine":
            self.refiner.prompts.take(self.refiner.prompts.context, torch.ones_like(self.refiner.prompts.alive))
        batch = make_batch(images, images * positives, CLASSES, 448)
        self.img, self.labels = batch.img.to(device), batch.labels.to(device)
        self.cam = batch.host(batch.img).to(device).requires_grad_(True)
        self.pairs, self.views = images * positives, 2 * images * positives
        size = encoder.image_size
        self.floor_views = torch.randn(self.views, 3, size, size, device=device, requires_grad=True)

    def step(self) -> None:
        self.cam.grad = None
        self.refiner(self.img, self.cam, self.labels).backward()

    def floor(self) -> None:
        """The image encodes alone, with the chunks that bound the refiner's memory."""
        self.floor_views.grad = None
        self.refiner.encoder.encode_image(self.floor_views, self.refiner.config.max_views).sum().backward()

    def encodes(self) -> Tuple[int, int]:
        """Views and prompts that one step sends through the towers, in forward passes."""
        counts = [0, 0]
        visual, encode = self.refiner.encoder.model.visual, self.refiner.encoder.encode_prompt

        def count(context: Tensor, template: str) -> Tensor:
            counts[1] += len(context)
            return encode(context, template)

        hook = visual.register_forward_pre_hook(lambda module, inputs: counts.__setitem__(0, counts[0] + len(inputs[0])))
        self.refiner.encoder.encode_prompt = count  # type: ignore[method-assign]
        try:
            self.step()
        finally:
            hook.remove()
            self.refiner.encoder.encode_prompt = encode  # type: ignore[method-assign]
        return counts[0], counts[1]


def matrix_rate(device: str, dtype: str) -> float:
    """Operations per second of one large matrix product, the best of some."""
    size = 4096 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    run = partial(torch.matmul, a, a)
    run()
    clock = 0 if device == "cuda" else 1
    return 2 * size**3 / min(timed(device, run)[clock] for _ in range(5))


def row_of(arguments: argparse.Namespace, clip: str, dtype: str, images: int, positives: int, stage: str) -> Dict[str, Any]:
    setting = Setting(clip, dtype, images, positives, stage, arguments.device, arguments.compile)
    clock = 0 if arguments.device == "cuda" else 1  # CPU seconds leave out other work on the machine
    setting.step()
    setting.floor()
    times: List[float] = []
    floors: List[float] = []
    for _ in range(arguments.steps):  # in turns, so that other work slows both down
        times.append(timed(arguments.device, setting.step)[clock])
        floors.append(timed(arguments.device, setting.floor)[clock])
    counted = float("nan") if arguments.compile else flops(setting.step)
    views, prompts = setting.encodes()
    seconds, floor = median(times), median(floors)
    return {
        "clip": clip, "dtype": dtype, "images": images, "positives": positives, "stage": stage, "seconds": seconds,
        "floor": floor, "times_floor": median(a / b for a, b in zip(times, floors)), "views": views,
        "views_needed": setting.views, "prompts": prompts, "gflop": counted / 1e9,
        "rate_share": counted / seconds / matrix_rate(arguments.device, dtype),
    }  # fmt: skip


def memory_of(arguments: argparse.Namespace, *what: Any) -> float:
    """Peak memory of a step beside CLIP's weights, in MiB, in this new process."""
    setting = Setting(*what, arguments.device, arguments.compile)
    if arguments.device == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
        setting.step()
        return torch.cuda.max_memory_allocated() / 2**20 - before
    before = resident("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
    except OSError:
        pass
    setting.step()
    return resident("VmHWM") - before


def child(number: int) -> float:
    run = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--child", str(number)], stdout=subprocess.PIPE, check=True, encoding="utf-8"
    )
    return float(run.stdout.splitlines()[-1])


def as_line(row: Dict[str, Any]) -> str:
    cells = [
        row["clip"], row["dtype"], row["images"], row["positives"], row["stage"], f"{row['seconds']:.3f}",
        f"{row['floor']:.3f}",
        f"{row['times_floor']:.2f}", f"{row['views']} / {row['views_needed']}", row["prompts"], f"{row['gflop']:.0f}",
        f"{100 * row['rate_share']:.0f} %", f"{row['memory']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--clips", nargs="+", choices=SIZES, default=["ViT-B/32", "ViT-B/16"])
    add("--dtypes", nargs="+", choices=("float32", "float16", "bfloat16"), default=["float32"])
    add("--images", nargs="+", type=int, default=[2, 4], help="batch sizes")
    add("--positives", nargs="+", type=int, default=[1, 2], help="positive labels per image")
    add("--stages", nargs="+", choices=("match", "refine", "online"), default=["refine"])
    add("--steps", type=int, default=5, help="measured steps of each row")
    add("--compile", action="store_true", help="torch.compile of the frozen image tower")
    add("--json", help="also write the rows to this file")
    add("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    grid = list(itertools.product(arguments.clips, arguments.dtypes, arguments.images, arguments.positives, arguments.stages))
    if arguments.child is not None:
        print(memory_of(arguments, *grid[arguments.child]))
        return
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {where}; medians of {arguments.steps} steps, in turns with the floor\n")
    names = [
        "CLIP",
        "precision",
        "images",
        "positives",
        "stage",
        "seconds",
        "floor",
        "step / floor",
        "views / needed",
        "prompts",
    ]
    names += ["GFLOP", "of matrix rate", "MiB beside weights"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    rows = []
    for number, what in enumerate(grid):
        rows.append({**row_of(arguments, *what), "memory": child(number)})
        print(as_line(rows[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"torch": torch.__version__, "device": where, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
