"""An experiment over several seeds: one cached record per seed, and the mean and standard deviation over the records."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

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
    record = _read(folder, seed, made_with)
    return _write(folder, seed, {"made_with": made_with, **run(seed)}) if record is None else record


def cached_rows(
    folder: Path, seed: int, made_with: str, rows: Sequence[str], run: Callable[[int, List[str]], Dict[str, Any]]
) -> Dict[str, Any]:
    """The record of a seed for some rows of a table. Rows that the same code wrote into its file before are not computed again.

    Args:
        folder, seed, made_with: as for `cached_record`.
        rows: names of the rows that are asked for.
        run: (seed, names of rows) -> record; its `"rows"` hold a value for each name.

    Returns:
        The record with the rows that are asked for, in that order. The file keeps all others, too.
    """
    record = _read(folder, seed, made_with) or {"made_with": made_with, "rows": {}}
    missing = [name for name in rows if name not in record["rows"]]
    if missing:
        new = run(seed, missing)
        record = _write(folder, seed, {**record, **new, "rows": {**record["rows"], **new["rows"]}})
    return {**record, "rows": {name: record["rows"][name] for name in rows}}


def _read(folder: Path, seed: int, made_with: str) -> Optional[Dict[str, Any]]:
    path = folder / f"seed_{seed}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record if record["made_with"] == made_with else None


def _write(folder: Path, seed: int, record: Dict[str, Any]) -> Dict[str, Any]:
    path = folder / f"seed_{seed}.json"
    text = json.dumps(record, indent=1)
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
    return json.loads(text)  # the same types as when the record is read from its file


def select_rows(rows: Sequence[str], wanted: Optional[Sequence[str]]) -> Tuple[str, ...]:
    """The rows of a table that are asked for, in the order of the table.

    Args:
        rows: all names.
        wanted: names, or beginnings of names (a name that is another's beginning means itself alone); None for all rows.

    Raises:
        ValueError: if no row has such a name.
    """
    if wanted is None:
        return tuple(rows)
    chosen: Set[str] = set()
    for text in wanted:
        found = [text] if text in rows else [name for name in rows if name.startswith(text)]
        if not found:
            raise ValueError(f"--rows must name rows of the table or how they begin: {'; '.join(rows)}; got {text!r}.")
        chosen.update(found)
    return tuple(name for name in rows if name in chosen)


def source_hash(*folders: Path) -> str:
    """SHA-256 of what an experiment's figures depend on: the package, the shared example code, and the given folders.

    Python files, CLIP weights and JSON files count, in all sub-folders of the package and of the given folders.
    """
    digest = hashlib.sha256()
    examples = Path(__file__).parent
    paths = [examples / f"{name}.py" for name in ("controls", "hosts", "recipe", "seeds", "small")]
    for folder in (Path(semples_plugin.__file__).parent, *folders):
        paths += sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".pt", ".json"))
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def spread(values: Sequence[float], sign: str = "+-") -> str:
    """Mean and standard deviation (n - 1) with one decimal; the mean alone for a single value."""
    deviation = f" {sign} {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{deviation}"


class Difference(NamedTuple):
    """Mean of paired differences.

    Attributes:
        mean: over the seeds.
        low, high: ends of its 95 % interval by Student's t.
        deviations: how many standard deviations (n - 1) of the differences the mean is away from 0.
    """

    mean: float
    low: float
    high: float
    deviations: float

    def __str__(self) -> str:
        interval = f"95 % interval {self.low:+.1f} to {self.high:+.1f}"
        return f"{self.mean:+.1f} ({interval}; {self.deviations:.1f} standard deviations)"


def paired_difference(better: Sequence[float], worse: Sequence[float]) -> Difference:
    """Mean of the differences seed by seed with its 95 % interval.

    Args:
        better, worse: figures of n >= 2 seeds, in the same order.
    """
    difference = np.asarray(better, dtype=float) - np.asarray(worse, dtype=float)
    if len(difference) < 2:
        raise ValueError(f"A paired difference needs 2 or more seeds; got {len(difference)}.")
    mean, deviation = float(difference.mean()), float(difference.std(ddof=1))
    half = t_quantile(len(difference) - 1) * deviation / math.sqrt(len(difference))
    deviations = abs(mean) / deviation if deviation > 0 else math.inf if mean else 0.0
    return Difference(mean, mean - half, mean + half, deviations)


def t_quantile(freedom: int) -> float:
    """The t that Student's distribution with `freedom` (>= 1) degrees of freedom exceeds in absolute value in 5 % of cases.

    Bisection on the closed form of the distribution for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """

    def inside(angle: float) -> float:  # probability of |t| < sqrt(freedom) * tan(angle)
        odd = freedom % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= (k - 1) / k * math.cos(angle) ** 2
            total += term
        if odd:
            return 2 / math.pi * (angle + math.sin(angle) * total * (freedom > 1))
        return math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
