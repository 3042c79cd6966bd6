"""Writing files whole or not at all, and tensors with JSON facts as safetensors (the same content gives the same bytes)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

from torch import Tensor

__all__ = ["PathLike", "read_tensors", "write_atomically", "write_tensors"]

PathLike = Union[str, "os.PathLike[str]"]


def write_tensors(path: PathLike, tensors: Mapping[str, Tensor], kind: str, version: int, facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON facts; safetensors writes its metadata in any order, here they are sorted."""
    from safetensors.torch import save

    metadata = {"format": kind, "version": str(version), "facts": json.dumps(facts, ensure_ascii=False)}
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata=metadata)
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    write_atomically(Path(path), lambda file: file.write(len(header).to_bytes(8, "little") + header + data[8 + length :]))


def read_tensors(path: PathLike) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Tensors and metadata (`format`, `version`, `facts` as JSON) of a safetensors file.

    Raises:
        ValueError: if the file is damaged or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            found: Optional[Dict[str, str]] = file.metadata()
            return {name: file.get_tensor(name) for name in file.keys()}, found or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """`path` holds all that `write(file)` wrote, or what it held before, also after a power cut in between."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
