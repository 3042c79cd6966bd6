"""Memory and throughput of `semples refine` on many images.

    python benchmarks/refine_folder.py --images 2000

Generates images and CAM files in a temporary folder and refines them with one process and with two (one thread each). Samples
the resident memory of the processes and checks that both runs wrote the same bytes. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

import cv2
import numpy as np


def generate(folder: Path, count: int, sizes: List[int]) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "cams"):
        (folder / part).mkdir()
    for i in range(count):
        height, width = sizes[i % len(sizes)], sizes[(i // 2) % len(sizes)]
        image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / "images" / f"{i:05d}.png"), image)
        cams = {int(k): cv2.resize(rng.random((6, 6), np.float32), (width, height)) for k in rng.choice(20, 1 + i % 2, False)}
        np.save(folder / "cams" / f"{i:05d}.npy", np.array(cams, dtype=object))


def resident(pid: int) -> float:
    """Resident memory of a process in MiB; 0 after its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)
    except (OSError, ValueError):
        return 0.0


def run(folder: Path, out: Path, processes: int) -> float:
    """Refine with `processes` processes, print memory over the run, return images per second (start of Python included)."""
    command = [sys.executable, "-m", "semples_plugin", "refine", "--quiet", "--images", str(folder / "images")]
    command += ["--cams", str(folder / "cams"), "--out", str(out)]
    count = len(list((folder / "cams").iterdir()))
    start = time.monotonic()
    running = []
    for rank in range(processes):
        environment: Dict[str, str] = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    samples: List[float] = []
    marks: Dict[int, float] = {}
    while any(p.poll() is None for p in running):
        samples.append(max(resident(p.pid) for p in running))
        done = len(list((out / "labels").iterdir())) if (out / "labels").exists() else 0
        for share in (10, 25, 50, 75, 95):
            if done >= share * count / 100:
                marks.setdefault(share, samples[-1])
        time.sleep(0.2)
    seconds = time.monotonic() - start
    if any(p.returncode for p in running):
        raise SystemExit("semples refine failed")
    memory = ", ".join(f"{share} %: {value:.0f}" for share, value in sorted(marks.items()))
    print(f"{processes} process(es): {count / seconds:.1f} images/s ({seconds:.0f} s); largest process, MiB at {memory}")
    return count / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of images (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 128, 160], help="side lengths in pixels, taken in turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, options.images, options.sizes)
        throughput = [run(folder, folder / f"out{processes}", processes) for processes in (1, 2)]
        same = all(
            filecmp.cmp(path, folder / "out2" / part / path.name, shallow=False)
            for part in ("cams", "labels")
            for path in (folder / "out1" / part).iterdir()
        )
        print(f"speed-up {throughput[1] / throughput[0]:.2f}; same bytes: {same}")


if __name__ == "__main__":
    main()
