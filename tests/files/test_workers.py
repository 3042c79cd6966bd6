from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from semples_plugin.errors import CamFileError, WorkerError
from semples_plugin.files.workers import Workers
from tests.files.worker_tasks import die, fail, scaled, sleep, threads, unsendable


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2, 10) as two:
        yield two


def test_tasks_are_shared_and_come_back_with_their_tags(workers: Workers) -> None:
    for i in range(7):
        workers.submit(i, f"number {i}", scaled, i)
    results = dict(workers.next() for _ in range(7))
    assert {tag: value for tag, (value, _) in results.items()} == {i: 10 * i for i in range(7)}
    assert len({pid for _, pid in results.values()} | {os.getpid()}) == 3  # both work, this process does not
    workers.submit("threads", "", threads)
    assert workers.next() == ("threads", (1, 1))


def test_what_a_task_raises_is_raised_here_and_its_worker_goes_on(workers: Workers) -> None:
    workers.submit(0, "", fail)
    with pytest.raises(CamFileError, match="^a reason$"):
        workers.next()
    workers.submit(0, "", unsendable)
    with pytest.raises(WorkerError, match="pickle"):
        workers.next()
    for i in range(3):
        workers.submit(i, "", scaled, i)
    assert sorted(workers.next()[0] for _ in range(3)) == [0, 1, 2]


def test_a_killed_worker_is_an_error_that_names_its_task(workers: Workers) -> None:
    workers.submit(0, "image 7", die)
    with pytest.raises(WorkerError, match=r"ended while it worked on image 7 \(signal 9\).*fewer --workers take less memory"):
        workers.next()


def test_a_worker_killed_while_idle_is_noticed(workers: Workers) -> None:
    workers.submit(0, "", scaled, 1)
    idle = workers.next()[1][1]
    os.kill(idle, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"A worker process ended.*\(signal 9\)"):
        for i in range(3):
            workers.submit(i, "", sleep, 1)
            workers.next()


def test_leaving_stops_those_at_work_and_no_process_is_left(tmp_path: Path) -> None:
    before = time.monotonic()
    with Workers(2, None) as workers:
        workers.submit(0, "", sleep, 100, tmp_path / "pid")
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.05)
    assert time.monotonic() - before < 60
    with pytest.raises(OSError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_ctrl_c_goes_to_this_process_alone(workers: Workers) -> None:
    workers.submit(0, "", scaled, 1)
    pid = workers.next()[1][1]
    os.kill(pid, signal.SIGINT)
    for i in range(4):
        workers.submit(i, "", scaled, i)
    results: Any = [workers.next() for _ in range(4)]
    assert len(results) == 4


STARTING = """
import os, signal
from semples_plugin.files.workers import Workers
from tests.files.worker_tasks import scaled

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
    with Workers(2, 10) as workers:
        for process in workers._processes.values():
            os.kill(process.pid, signal.SIGINT)  # long before the worker has imported anything
        for i in range(4):
            workers.submit(i, "", scaled, i)
        print(sorted(workers.next()[0] for _ in range(4)))
"""


def test_ctrl_c_while_the_workers_start(tmp_path: Path) -> None:
    script = tmp_path / "starting.py"
    script.write_text(STARTING)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("[0, 1, 2, 3]\n", "", 0)
