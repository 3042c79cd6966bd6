"""Attributes of classes and objects that are replaced for the time of a `with`."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

__all__ = ["replaced"]


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Replace attributes of a module, class or object for the time of a `with`; those it lacked are removed again."""
    missing = object()
    before = {name: vars(owner).get(name, missing) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            if value is not missing:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
