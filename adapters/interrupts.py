"""Ctrl-C during `__enter__` or `__exit__` waits until they are done, so that no hook is left behind."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Callable, Optional

__all__ = ["HeldInterrupts"]


class HeldInterrupts:
    """Holds back SIGINT while one of the given functions runs; at any other time it does what it did before.

    Python may raise KeyboardInterrupt at the first line of an `__exit__`, before any `try` in it. So the handler stands for the
    whole time of a `with` and looks at where the program is when the signal comes. It is set in the main thread only.

    Args:
        functions: during which a signal waits, such as `__enter__` and `__exit__` of a class.
    """

    def __init__(self, *functions: Callable[..., Any]):
        self._codes = {function.__code__ for function in functions}  # type: ignore[attr-defined]
        self._before: Any = None
        self._set = self._waiting = False

    def begin(self) -> None:
        """Set the handler; to be called first in `__enter__`."""
        self._waiting = False
        before = signal.getsignal(signal.SIGINT)
        if callable(before) and threading.current_thread() is threading.main_thread():
            self._before, self._set = before, True
            signal.signal(signal.SIGINT, self._handle)

    def end(self) -> None:
        """Put the handler back; to be called last in `__exit__`. A signal that waited is delivered now."""
        if self._set:
            self._set = False
            signal.signal(signal.SIGINT, self._before)
        self.deliver()

    @property
    def waiting(self) -> bool:
        """Whether a signal was held back."""
        return self._waiting

    def deliver(self) -> None:
        """Do what the signal would have done, if one was held back."""
        if self._waiting:
            self._waiting = False
            self._before(signal.SIGINT, None)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        place = frame
        while place is not None:
            if place.f_code in self._codes:
                self._waiting = True
                return
            place = place.f_back
        self._before(number, frame)
