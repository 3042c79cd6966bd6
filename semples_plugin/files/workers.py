"""Worker processes that are given one task at a time. One that is killed ends the run with an error that names its task.

Flow: **workers** -> `refine_folder`. Workers are started anew (`spawn`), so that neither threads nor a GPU of this process
reach them. They compute with one thread each. They end when this process ends, however it ends, and leave Ctrl-C to it.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Callable, Deque, Dict, Iterator, NamedTuple, Tuple

from ..errors import WorkerError

__all__ = ["Workers"]

CLOSING = 5.0  # seconds that a worker has to end by itself


class _Task(NamedTuple):
    tag: Any
    what: str
    function: Callable[..., Any]
    arguments: Tuple[Any, ...]


class Workers:
    """Processes that compute `function(shared, *arguments)`.

    Used in a `with`. Its end waits for no task that is still running: leave it when all are done, or to give up.

    Example:
        >>> with Workers(2, {"scale": 10}) as workers:  # doctest: +SKIP
        ...     for i in range(4):
        ...         workers.submit(i, f"number {i}", scaled, i)
        ...     results = dict(workers.next() for _ in range(4))
    """

    def __init__(self, number: int, shared: Any):
        """Start the processes.

        Args:
            number: of processes.
            shared: handed to every task; pickled once per process.
        """
        context = multiprocessing.get_context("spawn")
        self._processes: Dict[Connection, Any] = {}
        self._busy: Dict[Connection, _Task] = {}
        self._waiting: Deque[_Task] = collections.deque()
        try:
            with _interrupts_held_back():  # until a worker ignores Ctrl-C by itself
                for _ in range(number):
                    mine, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, shared), daemon=True)
                    process.start()
                    theirs.close()
                    self._processes[mine] = process
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def submit(self, tag: Any, what: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a task done as soon as a worker is free.

        Args:
            tag: comes back with the result.
            what: the task in words, for the error if its worker is killed.
            function: of a module, so that it can be pickled; called as `function(shared, *arguments)`.
            arguments: that can be pickled.
        """
        self._waiting.append(_Task(tag, what, function, arguments))
        self._hand_out()

    def next(self) -> Tuple[Any, Any]:
        """The tag and the result of a task that is done, in any order; waits for one.

        Raises:
            WorkerError: if a worker was killed.
            Exception: what the task raised.
        """
        ready = wait([*self._busy, *(process.sentinel for process in self._processes.values())])
        for connection in [one for one in self._busy if one in ready]:
            try:
                fine, result = connection.recv()
            except (EOFError, OSError):
                raise self._killed(connection) from None
            task = self._busy.pop(connection)
            self._hand_out()
            if not fine:
                raise result
            return task.tag, result
        raise self._killed(next(one for one, process in self._processes.items() if process.sentinel in ready))

    def close(self) -> None:
        """End all processes; those at work are stopped."""
        self._waiting.clear()
        with _interrupts_held_back():
            for connection, process in self._processes.items():
                if connection in self._busy:
                    process.terminate()
                connection.close()
            for process in self._processes.values():
                process.join(CLOSING)
                if process.is_alive():
                    process.kill()
                    process.join()
        self._processes.clear()
        self._busy.clear()

    def _hand_out(self) -> None:
        for connection in self._processes:
            if connection not in self._busy and self._waiting:
                task = self._waiting.popleft()
                self._busy[connection] = task
                try:
                    connection.send((task.function, task.arguments))
                except (BrokenPipeError, ConnectionResetError):
                    raise self._killed(connection) from None

    def _killed(self, connection: Connection) -> WorkerError:
        process = self._processes[connection]
        process.join(CLOSING)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        task = self._busy.get(connection)
        at_work = f" while it worked on {task.what}" if task else ""
        return WorkerError(
            f"A worker process ended{at_work} ({how}); the system may have been short of memory. The same command goes on from "
            "here; fewer --workers take less memory."
        )


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C comes after this `with`. Processes that are started in it never get one."""
    mask = getattr(signal, "pthread_sigmask", None)  # not on Windows
    if mask:
        resource_tracker.ensure_running()  # the first process would start it, which lets Ctrl-C through again
    before = mask(signal.SIG_BLOCK, {signal.SIGINT}) if mask else None
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, shared: Any) -> None:
    """What a worker does: tasks until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _one_thread()
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply = True, function(shared, *arguments)
        except Exception as error:
            reply = False, error
        try:
            connection.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # a result, or an error, that cannot be pickled
            connection.send((False, WorkerError(f"{type(error).__name__}: {error}")))


def _one_thread() -> None:
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
