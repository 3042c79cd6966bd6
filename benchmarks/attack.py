"""An attack on the readers of files, on `semples refine` and on `attach`: one table.

    python benchmarks/attack.py [--seconds 60] [--kills 20]

- every test of tests/files/test_hostile.py: crafted files, pipes, names, memory, full disks;
- mutations: valid CAM, label, prompt, cluster and weights files with bytes changed, cut, doubled or swapped, read in a process
  of their own; a reader may refuse a file by an error of this package and nothing else. Peak memory and the longest time per
  kind;
- kills: `semples refine` is killed at random moments and started again until it is done; the results are compared byte by byte;
- threads and interrupts: tests/test_threads.py, and the interrupts of tests/adapters/test_any_host.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
Reader = Callable[[Path], Any]


def seeds(folder: Path) -> Dict[str, Tuple[Path, Reader]]:
    """A valid file of every kind, and its reader."""
    from semples_plugin import PromptRefiner
    from semples_plugin.clip_backends import load_clip, openai_clip_module
    from semples_plugin.clusters import CategoryClusters, ClusterBranch
    from semples_plugin.files.cams import read_cam_file
    from semples_plugin.files.images import write_label_png
    from semples_plugin.files.labels import read_labels
    from semples_plugin.files.proposals import read_proposals
    from semples_plugin.prompt_files import read_file

    torch.manual_seed(0)
    classes, rng = ["boat", "train", "bird"], np.random.default_rng(0)
    maps = rng.random((3, 16, 16)).astype(np.float32)
    np.save(folder / "dict.npy", dict(enumerate(maps)))  # type: ignore[arg-type]
    np.save(folder / "tensor.npy", {0: torch.from_numpy(maps[0])})  # type: ignore[arg-type]
    np.savez(folder / "cam.npz", keys=np.arange(3), cam=maps)
    np.save(folder / "labels.npy", {"a": np.array([1, 0, 1])})  # type: ignore[arg-type]
    (folder / "labels.json").write_text(json.dumps({"a": ["boat"], "b": [0, 1, 1]}))
    for part in ("map", "runs"):  # folders of their own: an image has one file of masks
        (folder / part).mkdir()
    write_label_png(folder / "map" / "masks.png", rng.integers(0, 9, (16, 16)))
    runs = [{"segmentation": {"size": [16, 16], "counts": counts}} for counts in ("`14<000000000`3", [3, 13, 240])]
    (folder / "runs" / "masks.json").write_text(json.dumps(runs))
    model = openai_clip_module("model").CLIP(32, 32, 1, 64, 8, 77, 49408, 64, 1, 1).eval()
    torch.save(model.state_dict(), folder / "state.pt")
    traced = torch.jit.trace(model, (torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long)), check_trace=False)
    torch.jit.save(traced, str(folder / "archive.pt"))
    refiner = PromptRefiner(classes, clip=model, image_stats=None, prompt_length=2)
    data = [(torch.rand(3, 3, 32, 32), torch.eye(3))]
    refiner.fit_prompts(data, lambda img: torch.rand(3, 3, 4, 4), epochs=1, progress=False)
    refiner.save(folder / "prompts.safetensors")
    clusters = CategoryClusters({"vehicle": ["boat", "train"], "animal": ["bird"]}, classes)
    clusters.save(folder / "clusters.json")
    ClusterBranch(clusters, 8).save(folder / "branch.safetensors")
    cams: Reader = lambda path: read_cam_file(path, 3)  # noqa: E731
    label: Reader = lambda path: read_labels(path, classes)  # noqa: E731
    masks: Reader = lambda path: read_proposals(path.parent, path.stem, (16, 16), (16, 16))  # noqa: E731
    readers: Dict[str, Reader] = {
        "dict.npy": cams, "tensor.npy": cams, "cam.npz": cams, "labels.npy": label, "labels.json": label, "state.pt": load_clip,
        "archive.pt": load_clip, "prompts.safetensors": read_file, "clusters.json": CategoryClusters.load,
        "branch.safetensors": ClusterBranch.load, "map/masks.png": masks,
        "runs/masks.json": masks,
    }  # fmt: skip
    return {name: (folder / name, reader) for name, reader in readers.items()}


def mutate(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        kind, at = rng.randrange(5), rng.randrange(max(1, len(changed)))
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[at : at + rng.randint(1, 16)] = b""
        elif kind == 2:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
        elif kind == 3:
            changed[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little")])
        else:
            changed = changed[: max(1, at)] if rng.random() < 0.2 else changed
    return bytes(changed)


def fuzz(seconds: float) -> List[str]:
    """In this process: mutations in turn over all kinds until the time is over."""
    from semples_plugin.errors import SemplesError

    rng, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as name:
        kinds = seeds(Path(name))
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
        for kind, (path, reader) in kinds.items():
            data, end = path.read_bytes(), time.monotonic() + seconds / len(kinds)
            counts: Dict[str, int] = {}
            longest = 0.0
            target = path.with_name("mutated" + path.suffix)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            while time.monotonic() < end:
                target.write_bytes(mutate(data, rng))
                begun = time.monotonic()
                try:
                    reader(target)
                    outcome = "read"
                except SemplesError:
                    outcome = "refused"
                except Exception as error:
                    outcome = f"LEAKED {type(error).__name__}"
                longest = max(longest, time.monotonic() - begun)
                counts[outcome] = counts.get(outcome, 0) + 1
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            rows.append(f"mutated {kind:20s} {words}; longest {longest:.2f} s, memory +{grown:.0f} MiB")
    return rows


def kills(count: int) -> str:
    """`semples refine`, killed `count` times."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("images", "cams"):
            (folder / part).mkdir()
        for i in range(150):
            picture = cv2.blur(rng.integers(0, 256, (240, 320, 3), dtype=np.uint8), (9, 9))
            cv2.imwrite(str(folder / "images" / f"{i:03d}.jpg"), picture)
            cam = {int(k): rng.random((240, 320)).astype(np.float32) for k in rng.choice(20, 3, replace=False)}
            np.save(folder / "cams" / f"{i:03d}.npy", cam)  # type: ignore[arg-type]

        def command(out: str) -> List[str]:
            places = ["--images", folder / "images", "--cams", folder / "cams", "--out", folder / out]
            return [sys.executable, "-m", "semples_plugin", "refine", *map(str, places), "--quiet", "--batch-size", "1"]

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command("whole"), check=True, **quiet)
        done = 0
        for _ in range(count):
            process = subprocess.Popen(command("killed"), **quiet)
            try:
                process.wait(random.Random(done).uniform(1.5, 2.5))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
        subprocess.run(command("killed"), check=True, **quiet)
        same = contents(folder / "whole") == contents(folder / "killed")
        left = len(list((folder / "killed").rglob("*.part")))
        return f"kills: {done} of {count} hit a running `semples refine`; results byte-identical: {same}; parts left: {left}"


def contents(folder: Path) -> Dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".png"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tests(*names: str) -> List[str]:
    """Outcome of every test, as pytest says it."""
    command = [sys.executable, "-m", "pytest", "-v", "-v", "-v", "--no-header", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line.split(" [")[0].strip() for line in done.stdout.splitlines() if "::" in line]
    return [line for line in lines if "PASSED" in line or "FAILED" in line]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of mutations (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    rows = tests("tests/files/test_hostile.py", "tests/test_threads.py", "tests/adapters/test_any_host.py")
    rows = [row for row in rows if "any_host" not in row or "nothing_is_left" in row or "interrupt" in row]
    print(*rows, sep="\n", flush=True)
    print(kills(options.kills), flush=True)
    mutated = fuzz(options.seconds)
    print(*mutated, sep="\n", flush=True)
    return int(any("FAILED" in row or "LEAKED" in row for row in [*rows, *mutated]))


if __name__ == "__main__":
    sys.exit(main())
