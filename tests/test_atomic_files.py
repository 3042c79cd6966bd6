from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from semples_plugin._files import write_atomically


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")

    def half(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]
