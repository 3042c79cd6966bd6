"""A table of experiments that is computed cell by cell: each cell has a file of its own, and several processes share the work.

A cell is a row of the table with one seed. A run that was stopped goes on where it was: a cell is computed again only if the
code or the options that made it have changed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import torch

__all__ = ["Cell", "read_cell", "run_cells", "slug", "write_file"]


class Cell(NamedTuple):
    """One row of the table with one seed.

    Attributes:
        row: name of the row.
        seed: of the experiment.
        level: cells of a lower level are finished before, so that a cell may read files that those wrote.
    """

    row: str
    seed: int
    level: int = 0


def slug(name: str) -> str:
    """A file name for a row: letters, digits and hyphens, and four digits of its hash."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    return f"{text}-{hashlib.sha256(name.encode()).hexdigest()[:4]}"


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write(part)` write a file beside `path`, and put it in its place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    os.replace(part, path)


def cell_file(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"seed_{cell.seed}" / f"{slug(cell.row)}.json"


def read_cell(folder: Path, cell: Cell, made_with: str) -> Optional[Dict[str, Any]]:
    """The record of a cell that the same code and options made, or None."""
    path = cell_file(folder, cell)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["result"] if record["made_with"] == made_with else None


def run_cells(
    folder: Path, cells: Sequence[Cell], made_with: str, run: Callable[[Cell], Dict[str, Any]], jobs: int = 1
) -> Dict[Cell, Dict[str, Any]]:
    """The records of all cells: read from their files, or computed by `run(cell)`, level by level, in `jobs` processes.

    Args:
        folder: of the experiment; the records are in its `cells`.
        cells: of the table.
        made_with: identifies code and options, see `seeds.source_hash`.
        run: cell -> record, a dict that JSON can hold; can be pickled. What it computes must not depend on the process.
        jobs: number of processes. Each has one thread; on a machine with GPUs they take turns on these.

    Returns:
        Record of every cell.

    Raises:
        RuntimeError: if cells failed; it names them. All others are computed first, up to the next level.
    """
    found = {cell: read_cell(folder, cell, made_with) for cell in cells}
    missing = [cell for cell in cells if found[cell] is None]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them done before", file=sys.stderr, flush=True)
    for level in sorted({cell.level for cell in missing}):
        part, failed = [cell for cell in missing if cell.level == level], []
        for cell, record in _computed(part, run, jobs):
            if isinstance(record, Exception):
                failed.append(cell)
                print(f"\nFAILED: {cell.row}, seed {cell.seed}\n{record}", file=sys.stderr, flush=True)
                continue
            text = json.dumps({"made_with": made_with, "row": cell.row, "seed": cell.seed, "result": record}, indent=1)
            write_file(cell_file(folder, cell), lambda part, text=text: part.write_text(text + "\n", encoding="utf-8"))  # type: ignore[misc]
            found[cell] = json.loads(text)["result"]  # the same types as when it is read
            print(f"\ndone: {cell.row}, seed {cell.seed}", file=sys.stderr, flush=True)
        if failed:
            names = "; ".join(f"{cell.row}, seed {cell.seed}" for cell in failed)
            raise RuntimeError(f"{len(failed)} cells failed, their errors are above: {names}. The others are kept.")
    return {cell: found[cell] for cell in cells}  # type: ignore[misc]


def _computed(cells: List[Cell], run: Callable[[Cell], Dict[str, Any]], jobs: int) -> Any:
    if jobs <= 1:
        for cell in cells:
            yield cell, _tried(run, cell)
        return
    context = multiprocessing.get_context("spawn")
    number = context.Value("i", 0)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(number,)) as pool:
        futures = {pool.submit(_tried, run, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _tried(run: Callable[[Cell], Dict[str, Any]], cell: Cell) -> Union[Dict[str, Any], Exception]:
    """The record of a cell, or what went wrong."""
    try:
        return run(cell)
    except Exception as error:
        error.args = (f"{error}\n{traceback.format_exc()}",)  # of this process
        return error


def _begin(number: Any) -> None:
    """Of a worker process: one thread, and its GPU."""
    with number.get_lock():
        index, number.value = number.value, number.value + 1
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
