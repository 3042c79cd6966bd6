"""What several commands print: failed images, and text of others without its control characters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Mapping, Optional

from .._text import printable

__all__ = ["print_failed", "print_line"]


def print_failed(failed: Mapping[str, str], summary: Optional[Path] = None, most: int = 20) -> None:
    """Print the failed images on stderr, one per line.

    Args:
        failed: image id -> reason.
        summary: the file that lists all of them, if there is one.
        most: how many are printed.
    """
    for name, reason in sorted(failed.items())[:most]:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if len(failed) > most:
        where = f", all in {summary}" if summary else ""
        print(f"failed: and {len(failed) - most} more{where}", file=sys.stderr)


def print_line(text: str) -> None:
    """Print a line that may hold text of others: control characters, and what stdout cannot show, appear as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)
