"""The baselines that the environment names, folders for them to run in, and their processes.

Module names of the baselines collide (`models`, `engine`, `utils`, `network`, ...), so their code never enters this process: it
runs in a worker of this folder, or in the runner. See README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch
from torch import nn

HERE = Path(__file__).parent
# Environment variable, public repository, and the file of image-level labels in it.
BASELINES = {
    "mctformer": ("MCTFORMER", "xulianuwa/MCTformer", "voc12/cls_labels.npy"),
    "weaktr": ("WEAKTR", "hustvl/WeakTr", "voc12/cls_labels.npy"),
    "transcam": ("TRANSCAM", "liruiwen/TransCAM", "voc12/cls_labels.npy"),
    "irn": ("IRN", "jiwoon-ahn/irn", "voc12/cls_labels.npy"),
    "toco": ("TOCO", "rulixiang/ToCo", "datasets/voc/cls_labels_onehot.npy"),
    "seam": ("SEAM", "YudeWang/SEAM", "voc12/cls_labels.npy"),
}


class Hosts:
    """Clones of the baselines and photos; a test that asks for one that the environment does not name is skipped."""

    def __init__(self, clip: Path):
        self.clip = clip
        self._results: Dict[Tuple[str, str], Dict[str, Any]] = {}

    # ------------------------------------------------------------------------------------------------ what is there

    def repo(self, name: str) -> Path:
        variable, repository, _ = BASELINES[name]
        path = os.environ.get(variable)
        if not path:
            pytest.skip(f"set {variable} to a clone of https://github.com/{repository}")
        assert (Path(path) / ".git").exists(), f"{variable}={path} is no clone of https://github.com/{repository}"
        return Path(path).resolve()

    def photos(self) -> Path:
        path = os.environ.get("VOC_PHOTOS")
        if not path:
            pytest.skip("set VOC_PHOTOS to the folder VOCdevkit/VOC2012 of Pascal VOC 2012")
        assert (Path(path) / "JPEGImages").is_dir(), f"VOC_PHOTOS={path} holds no folder JPEGImages"
        return Path(path).resolve()

    def git(self, name: str, *arguments: str) -> str:
        command = ["git", "-C", str(self.repo(name)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")

    def state(self, name: str) -> str:
        """All files of a clone that differ from its commit, the ignored ones too."""
        return self.git(name, "status", "--porcelain", "--ignored")

    def labels(self, name: str) -> Dict[str, np.ndarray]:
        """Image-level labels (20,) of the baseline's own file by photo, such as 2007_000392."""
        found = np.load(self.repo(name) / BASELINES[name][2], allow_pickle=True).item()
        names = {str(key).replace(".jpg", ""): value for key, value in found.items()}
        return {key if "_" in key else f"{key[:4]}_{key[4:]}": value for key, value in names.items()}

    # ------------------------------------------------------------------------------------------------ where it runs

    def folder(self, name: str, path: Path, count: int = 6) -> List[str]:
        """Make `path` a working folder: short image lists in the baseline's format, links to its labels and to the photos."""
        photos, labels = self.photos(), self.labels(name)
        ids = [file.stem for file in sorted((photos / "JPEGImages").glob("*.jpg")) if file.stem in labels][:count]
        assert len(ids) == count, f"VOC_PHOTOS holds {len(ids)} photos that {name} has labels for; {count} are needed"
        lists = path / "voc12"
        lists.mkdir(parents=True)
        (lists / "cls_labels.npy").symlink_to(self.repo(name) / BASELINES[name][2])
        for split in ("train_aug", "train", "val"):
            (lists / f"{split}_id.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
            pairs = "".join(f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in ids)
            numbers = "".join(i.replace("_", "") + "\n" for i in ids)  # NumPy >= 1.23 reads no underscores
            (lists / f"{split}.txt").write_text(numbers if name == "irn" else pairs, encoding="utf-8")
        (path / "voc12data" / "VOCdevkit").mkdir(parents=True)
        (path / "voc12data" / "VOCdevkit" / "VOC2012").symlink_to(photos)
        return ids

    # ------------------------------------------------------------------------------------------------ processes

    def prepare(self, script: str, name: str, path: Path) -> Dict[str, Any]:
        """What `python script name repo clip out.json` wrote in a working folder."""
        out = path / "out.json"
        command = [sys.executable, "-B", "-W", "ignore", HERE / script, name, self.repo(name), self.clip, out]
        self.finish([str(part) for part in command], path)
        return json.loads(out.read_text(encoding="utf-8"))

    def work(self, script: str, name: str, path: Path) -> Dict[str, Any]:
        """The same, with a working folder made before and the state of the clone; once per session."""
        if (script, name) not in self._results:
            before = self.state(name)
            self.folder(name, path)
            found = self.prepare(script, name, path)
            self._results[script, name] = {**found, "state before": before, "state after": self.state(name)}
        return self._results[script, name]

    def command(self, adapter: str, name: str, cwd: Path, *arguments: str) -> List[str]:
        """A command line of the runner; what follows the script comes after "--" in `arguments`."""
        command = [sys.executable, "-W", "ignore", "-m", "semples_plugin.adapters", adapter]
        command += ["--repo", str(self.repo(name)), "--cwd", str(cwd), "--out", str(cwd / "out"), "--clip", str(self.clip)]
        return [*command, "--set", "prompt_length=4", "--prompt-epochs", "2", "--log-every", "1", "--cpu", *arguments]

    def run(self, adapter: str, name: str, cwd: Path, *arguments: str) -> str:
        """Run the runner to its end; it must succeed. Returns what it wrote to stderr."""
        return self.finish(self.command(adapter, name, cwd, *arguments), cwd)

    def finish(self, command: List[str], cwd: Path) -> str:
        """Run a command that must succeed; returns its stderr."""
        done = subprocess.run(command, cwd=cwd, env=environment(cwd), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        return done.stderr

    def start(self, adapter: str, name: str, cwd: Path, *arguments: str) -> "subprocess.Popen[bytes]":
        """The same in the background, in a process group of its own."""
        command, log = self.command(adapter, name, cwd, *arguments), (cwd / "started.log").open("wb")
        with log:
            return subprocess.Popen(command, cwd=cwd, env=environment(cwd), stdout=log, stderr=log, start_new_session=True)


def environment(cwd: Path) -> Dict[str, str]:
    """Pre-trained weights are looked for in the working folder, so nothing is downloaded; see also site/sitecustomize.py."""
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "TORCH_HOME": str(cwd / "torch"), "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def hosts(aligned_clip: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Hosts:
    """Clones of the baselines; the refiner's CLIP is the tiny random one of the other tests, as a file."""
    clip = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(aligned_clip.state_dict(), clip)
    return Hosts(clip)
