"""An experiment over several seeds: one cached record per seed, and the mean and standard deviation over the records."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import numpy as np

import semples_plugin


def cached_record(folder: Path, seed: int, made_with: str, run: Callable[[int], Dict[str, Any]]) -> Dict[str, Any]:
    """The record of a seed: read from its file if the same code wrote it, else computed by `run(seed)` and written.

    Args:
        folder: holds one JSON file per seed.
        seed: of the experiment.
        made_with: `source_hash` of the code.
        run: seed -> record, a dict that JSON can hold.
    """
    path = folder / f"seed_{seed}.json"
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["made_with"] == made_with:
            return record
    text = json.dumps({"made_with": made_with, **run(seed)}, indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
    return json.loads(text)  # the same types as when the record is read from its file


def source_hash(*folders: Path) -> str:
    """SHA-256 of what an experiment's figures depend on: the package, the shared example code, and the given folders.

    Python files, CLIP weights and JSON files count, in all sub-folders of the package and of the given folders.
    """
    digest = hashlib.sha256()
    examples = Path(__file__).parent
    paths = [examples / "recipe.py", examples / "seeds.py"]
    for folder in (Path(semples_plugin.__file__).parent, *folders):
        paths += sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".pt", ".json"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def spread(values: Sequence[float], sign: str = "+-") -> str:
    """Mean and standard deviation (n - 1) with one decimal; the mean alone for a single value."""
    deviation = f" {sign} {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


def paired_difference(better: Sequence[float], worse: Sequence[float]) -> str:
    """Spread of the differences seed by seed, and how many of their standard deviations the mean is away from 0."""
    difference = np.asarray(better) - np.asarray(worse)
    ratio = abs(difference.mean()) / max(difference.std(ddof=1), 1e-9)
    return f"{spread(difference)}, {ratio:.1f} standard deviations"
