"""Memory and throughput of `semples refine` on many images.

    python benchmarks/refine_folder.py --images 2000                                   # generated images of many sizes
    python benchmarks/refine_folder.py --images 64 --photos DIR --rounds 3             # photos, brought to 375 x 500
    python benchmarks/refine_folder.py --images 16 --photos DIR --workers 0 --against OLD   # another checkout of the package
    python benchmarks/refine_folder.py --images 1 --sizes 4000 --workers 0             # memory of a large image
    python benchmarks/refine_folder.py --device cuda --clip ViT-B/32 --clip-steps 5 --workers 0 2 8    # a GPU and its workers

Makes images and CAM files in a temporary folder and refines them with each number of workers, in turns, and repeats that.
Prints images per second of wall time (from the first written file to the last, so without the start), the same of CPU time (of
all processes, with and without the start), how many processes could run at a time (on a busy machine they wait for one another,
and wall time does not tell), and the resident memory of the largest process. Checks that all runs wrote the same bytes. Linux
only.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PHOTO = (375, 500)


class Run(NamedTuple):
    """Figures of one run: images per second of wall time and of CPU time, processes that could run, MiB of the largest."""

    wall: float
    cpu: float
    cpu_with_start: float
    at_work: float
    memory: float


def generate(folder: Path, count: int, sizes: List[int], photos: Optional[Path]) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "cams"):
        (folder / part).mkdir()
    files = sorted(photos.rglob("*.jpg")) if photos else []
    for i in range(count):
        height, width = sizes[i % len(sizes)], sizes[(i // 2) % len(sizes)]
        if files:
            image = cv2.imread(str(files[i * len(files) // count]))
            height, width = PHOTO if image.shape[0] < image.shape[1] else PHOTO[::-1]
            cv2.imwrite(str(folder / "images" / f"{i:05d}.jpg"), cv2.resize(image, (width, height)))
        else:
            image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / "images" / f"{i:05d}.png"), image)
        size = (width, height) if width * height < 1e6 else (64, 64)
        cams = {int(k): cv2.resize(rng.random((6, 6), np.float32), size) for k in rng.choice(20, 1 + i % 2, False)}
        np.save(folder / "cams" / f"{i:05d}.npy", np.array(cams, dtype=object))


class Sample(NamedTuple):
    """A process and its children at one moment: MiB of the largest, and how many of them run or wait for a processor."""

    memory: float
    running: int


def sample(pid: int) -> Sample:
    memory, running = 0.0, 0
    try:
        for one in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())):
            lines = Path(f"/proc/{one}/status").read_text(encoding="ascii").splitlines()
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
            memory = max(memory, int(facts.get("VmRSS", "0 kB").split()[0]) / 1024)
            running += facts["State"].split()[0] == "R"
    except (OSError, KeyError):  # one has ended
        pass
    return Sample(memory, running)


def call(package: Path, arguments: List[str], out: Path) -> "tuple[float, List[Sample]]":
    """CPU seconds of `semples refine`, and samples since it wrote its first file."""
    environment: Dict[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "semples_plugin", "refine", "--quiet", *arguments, "--out", str(out)]
    samples = [Sample(0, 0)]
    with subprocess.Popen(command, env=environment, cwd=package, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (out / "cams").exists():
                samples.append(sample(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit("semples refine failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, samples


def measure(folder: Path, out: Path, workers: int, package: Path, batch_size: int, extra: List[str]) -> Run:
    """Refine, then once more with nothing to do, which is the start; `extra`: further options of `semples refine`."""
    arguments = ["--images", str(folder / "images"), "--cams", str(folder / "cams"), "--batch-size", str(batch_size), *extra]
    cpu, samples = call(package, [*arguments, *(["--workers", str(workers)] if workers else [])], out)
    start, _ = call(package, arguments, out)
    start *= 1 + workers  # every worker imports the same
    times = sorted(path.stat().st_mtime for path in (out / "cams").iterdir())
    first = min(batch_size * max(1, workers), len(times) // 4)
    wall = (len(times) - 1 - first) / max(1e-9, times[-1] - times[first])
    return Run(
        wall,
        len(times) / max(1e-9, cpu - start),
        len(times) / cpu,
        statistics.mean(one.running for one in samples),
        max(one.memory for one in samples),
    )


def same(a: Path, b: Path) -> bool:
    return all(
        filecmp.cmp(path, b / part / path.name, shallow=False) for part in ("cams", "labels") for path in (a / part).iterdir()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of images (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160], help="side lengths in pixels, taken in turn")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="take photos (.jpg, in any folder below) instead")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers to compare")
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, in turns (%(default)s)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured without workers in each round")
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (%(default)s)")
    parser.add_argument("--clip", metavar="NAME", help="CLIP model or weights file; without it only edges are aligned")
    parser.add_argument("--clip-steps", type=int, metavar="N", help="of `semples refine`, with --clip")
    parser.add_argument("--device", help="where CLIP runs, such as cuda")
    options = parser.parse_args()
    extra: List[str] = []
    clip = str(Path(options.clip).resolve()) if options.clip and Path(options.clip).exists() else options.clip
    for name, value in (("--clip", clip), ("--clip-steps", options.clip_steps), ("--device", options.device)):
        extra += [] if value is None else [name, str(value)]
    runs: Dict[str, List[Run]] = {}
    equal = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, options.images, options.sizes, options.photos)
        outs = []
        for turn in range(options.rounds):
            for workers in options.workers:
                outs.append(folder / f"out-{turn}-{workers}")
                runs.setdefault(f"{workers} workers", []).append(
                    measure(folder, outs[-1], workers, ROOT, options.batch_size, extra)
                )
                equal = equal and same(outs[0], outs[-1])
            if options.against:
                other = measure(folder, folder / f"other-{turn}", 0, options.against.resolve(), options.batch_size, extra)
                runs.setdefault("other checkout", []).append(other)
            for what, found in runs.items():
                run = found[-1]
                print(f"{what}: {run.wall:.2f} images/s; of CPU time {run.cpu:.2f} without the start, "
                      f"{run.cpu_with_start:.2f} with it; {run.at_work:.2f} processes could run; the largest "
                      f"{run.memory:.0f} MiB", flush=True)  # fmt: skip
    for what, found in runs.items():
        print(f"median of {len(found)}, {what}: {statistics.median(run.wall for run in found):.2f} images/s; "
              f"{statistics.median(run.cpu for run in found):.2f} per second of CPU time")  # fmt: skip
    for one, two, kind in (("1 workers", "2 workers", "wall"), ("other checkout", "0 workers", "cpu")):
        if one in runs and two in runs:
            ratios = [getattr(b, kind) / getattr(a, kind) for a, b in zip(runs[one], runs[two])]
            print(f"{two} to {one}, {kind}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(f"same bytes: {equal}")


if __name__ == "__main__":
    main()
