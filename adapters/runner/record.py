"""`record.json` of a run: what was asked for, with which versions, and how far each stage came.

Flow: `stages` -> **record**.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch

from ... import __version__
from ..._files import write_atomically
from ...errors import HostError
from .job import Job

__all__ = ["Record", "commit", "forget", "is_main", "now", "versions"]


class Record:
    """`record.json` of a run: what was asked for, with which versions, and how far each stage came.

    The file on disk is always complete: it is replaced as a whole.
    """

    def __init__(self, out: Path):
        self.path = out / "record.json"
        self.content: Dict[str, Any] = {}
        if self.path.exists():
            try:
                self.content = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise HostError(f"{self.path} is not readable JSON ({error}). Choose another --out, or --restart.") from error
            if not isinstance(self.content, dict):
                raise HostError(f"{self.path} is no record of a run. Choose another --out, or --restart.")

    def open(self, job: Job) -> None:
        """Begin or continue a run.

        Raises:
            HostError: if the folder holds finished stages of a run with other arguments.
        """
        before = self.content.get("run")
        finished = [stage for stage in self.content.get("stages", {}) if self.state(stage) == "done"]
        if finished and before is not None and before != job.facts:
            keys = [key for key in {**before, **job.facts} if before.get(key) != job.facts.get(key)]
            what = "; ".join(f"{key} was {before.get(key)!r}, is {job.facts.get(key)!r}" for key in sorted(keys))
            raise HostError(f"{self.path.parent} holds another run: {what}. Choose another --out, or --restart.")
        self.content.update(run=job.facts, host_commit=commit(job.repo))
        self.content.setdefault("versions", {}).update(versions())
        self.content.setdefault("stages", {})
        self.save()

    def state(self, stage: str) -> str:
        """`"done"`, `"running"`, `"interrupted"`, `"failed: ..."` or `"not started"`."""
        return self.content.get("stages", {}).get(stage, {}).get("state", "not started")

    def stage(self, stage: str, **values: Any) -> None:
        """Note values of a stage and write the file."""
        self.content.setdefault("stages", {}).setdefault(stage, {}).update(values)
        self.save()

    def save(self) -> None:
        """Write the file, in the main process only."""
        if is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write((_json(self.content) + "\n").encode()))


def forget(out: Path, stages: Sequence[str], whole: bool) -> None:
    """Delete the files that these stages wrote, and with `whole` the record of the run; other files stay."""
    for stage in stages:
        for name in (
            f"{stage}.pt",
            f"{stage}.jsonl",
            *(path.name for end in ("pt", "jsonl") for path in out.glob(f"{stage}.[0-9]*.{end}")),
            f"{stage}.clusters.safetensors",
            *(["prompts.safetensors"] if stage in ("prompt", "online") else []),
        ):
            (out / name).unlink(missing_ok=True)
    if whole:
        (out / "record.json").unlink(missing_ok=True)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def is_main() -> bool:
    """Whether this is the only process, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit(repo: Path) -> Dict[str, Any]:
    """The host's commit, and its files that differ from it; None where the folder is no git repository."""

    def git(*arguments: str) -> Optional[str]:
        try:
            done = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.rstrip("\n") if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed_files": None if changed is None else changed.splitlines()}


def versions() -> Dict[str, str]:
    """Versions of Python, of this package, and of the libraries that are loaded."""
    found = {"python": platform.python_version(), "semples_plugin": __version__, "torch": torch.__version__}
    found["numpy"] = np.__version__
    for name in ("timm", "torchvision"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = module.__version__
    return found
