"""Parts of CAM files for the tests: random maps, and `.npy` files with any header and body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 6


def maps(count: int, height: int = 4, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, height, width)).astype(np.float32)


def npy(path: Path, body: bytes, descr: str = "|O", shape: Any = (), fortran: bool = False) -> Path:
    """A .npy file with this header and these bytes behind it."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
        file.write(body)
    return path


def saved(path: Path, content: Any) -> Path:
    np.save(path, content, allow_pickle=True)
    return path
