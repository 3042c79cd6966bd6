"""What the commands print: text of others never reaches the terminal raw.

`escaped_output` is around every command: names, paths and reasons may hold control characters (which can rewrite a terminal)
and bytes that are no text. They appear as escapes.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

from .._text import printable

__all__ = ["escaped_output", "print_failed"]

LONGEST = 500  # characters of a reason


class _Escaped:
    """A text stream that writes control characters, and what the stream cannot show, as escapes."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        pieces = re.split("([\n\t\r])", text)  # newline, tab and carriage return (of progress bars) stay
        parts = [piece if piece in "\n\t\r" else printable(piece) for piece in pieces]
        self._stream.write("".join(parts).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def escaped_output() -> Iterator[None]:
    """Escape what is printed in this `with`."""
    with contextlib.redirect_stdout(_Escaped(sys.stdout)), contextlib.redirect_stderr(_Escaped(sys.stderr)):  # type: ignore[type-var]
        yield


def print_failed(failed: Mapping[str, str], summary: Optional[Path] = None, most: int = 20) -> None:
    """Print the failed images on stderr, one per line.

    Args:
        failed: image id -> reason.
        summary: the file that lists all of them, if there is one.
        most: how many are printed.
    """
    for name, reason in sorted(failed.items())[:most]:
        print(f"failed: {printable(name, LONGEST)}: {printable(reason, LONGEST)}", file=sys.stderr)
    if len(failed) > most:
        where = f", all in {summary}" if summary else ""
        print(f"failed: and {len(failed) - most} more{where}", file=sys.stderr)
