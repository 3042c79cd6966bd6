"""Writing files whole or not at all, reading those of strangers, and tensors with JSON facts as safetensors."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union

from torch import Tensor

__all__ = [
    "PathLike",
    "fits_storage",
    "open_regular",
    "read_bytes",
    "read_tensors",
    "remove_parts",
    "write_atomically",
    "write_tensors",
]

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

    open_regular(path).close()
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
            file.flush()
            os.fsync(file.fileno())  # before the name changes, or a power cut leaves an empty file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Delete what processes that no longer run left behind in a folder while they wrote."""
    for part in folder.glob(".*.part"):
        found = re.fullmatch(r"\..*\.(\d+)\.part", part.name)
        if found and int(found[1]) != os.getpid() and not _runs(int(found[1])):
            part.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def open_regular(path: PathLike) -> BinaryIO:
    """Open a file of strangers for reading. Pipes, devices and folders are refused once opened, so none of them can hang.

    Raises:
        FileNotFoundError: if there is no such file, or a link leads nowhere.
        ValueError: if it is no regular file.
    """
    flags = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{os.fspath(path)} is a folder, a pipe or a device; a regular file was expected.")
    return os.fdopen(descriptor, "rb")


def fits_storage(held: int, offset: int, size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor that a file describes lies inside its storage of `held` values and has no more values than that."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    inside = len(size) == len(stride) and min((0, offset, *size, *stride)) >= 0 and (0 in size or last < held)
    return inside and math.prod(size) <= held


def read_bytes(path: PathLike, most: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        FileNotFoundError, ValueError: as `open_regular`; also if it holds more than `most` bytes.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{os.fspath(path)} holds more than {most / 2**20:.0f} MiB.")
    return data
