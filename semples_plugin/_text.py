"""Text for messages: values in words, and text of strangers made fit for a terminal."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

__all__ = ["describe", "listing", "printable"]


def printable(text: str, most: Optional[int] = None) -> str:
    """Text for a terminal: control characters as escapes, cut to `most` characters.

    Example:
        >>> printable("a\\x1b[2Jb")
        'a\\\\x1b[2Jb'
    """
    cut = text if most is None or len(text) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def describe(value: Any) -> str:
    """A tensor's shape, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    return type(value).__name__


def listing(names: Any, quote: bool = True, longest: int = 12) -> str:
    """Names separated by commas, at most `longest` of them; "none" without any."""
    names = [repr(name) if quote else str(name) for name in names]
    more = f" and {len(names) - longest} more" if len(names) > longest else ""
    return (", ".join(names[:longest]) + more) or "none"
