"""The host's script in this process, run as `python main.py ...` would run it, with all of it undone afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import sys
from typing import Iterator, List

import numpy as np
import torch

from . import compat
from .job import Job

__all__ = ["host_process", "run_script"]


@contextlib.contextmanager
def host_process(job: Job) -> Iterator[List[str]]:
    """Working folder, arguments, import path, seeds and libraries as the host's script expects them, for a `with`.

    Yields what was done for old libraries, for the record of the run.

    Raises:
        HostError: if the script needs a torchvision that does not go with the installed torch.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_script(job))
        stack.enter_context(compat.explained_torchvision())
        notes = stack.enter_context(compat.old_libraries())
        if job.cpu:
            stack.enter_context(compat.on_cpu())
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave the host's folder as it is
        stack.callback(setattr, sys, "dont_write_bytecode", bytecode)
        for note in notes:
            print(f"semples: {note}", file=sys.stderr)
        _seed(job.seed)
        yield notes


def run_script(job: Job) -> None:
    """Run the script to its end, as `__main__`; `sys.exit(0)` is an end like any other."""
    try:
        runpy.run_path(str(job.repo / job.script[0]), run_name="__main__")
    except SystemExit as leave:
        if leave.code not in (None, 0):
            raise


@contextlib.contextmanager
def _as_script(job: Job) -> Iterator[None]:
    """Working folder, `sys.argv` and `sys.path` as `python script ...` has them."""
    script = job.repo / job.script[0]
    cwd, argv, path = os.getcwd(), sys.argv[:], sys.path[:]
    try:
        os.chdir(job.cwd)
        sys.argv = [job.script[0], *job.script[1:]]
        sys.path[0] = str(script.parent)  # it held the folder that this process was started from
        yield
    finally:
        os.chdir(cwd)
        sys.argv, sys.path[:] = argv, path


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
