"""Steps and their records: each step runs once, is skipped while its inputs stay the same, and goes on after a kill.

A step is done when `OUT/steps/NAME.json` exists, was made from the same inputs (`fingerprint`), and the files that it made are
as they were. The record is written last and as a whole, so a step that was killed has none. Flow: `commands` -> **chain**.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from semples_plugin._files import remove_parts, write_atomically

LIBRARIES = ("torch", "numpy", "transformers", "timm", "torchvision", "opencv-python-headless", "Pillow", "semples-plugin")


class ChainError(RuntimeError):
    """A step failed, or cannot begin; the message says what to do."""


class Command(NamedTuple):
    """One process.

    Attributes:
        words: the command line.
        environment: variables that are added to the environment.
        stdout: file for its standard output, which appears whole or not at all; by default it goes to the step's log.
    """

    words: Sequence[str]
    environment: Dict[str, str] = {}
    stdout: Optional[Path] = None

    def __str__(self) -> str:
        before = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        after = [] if self.stdout is None else [">", shlex.quote(str(self.stdout))]
        return " ".join([*before, *map(shlex.quote, self.words), *after])


class Step(NamedTuple):
    """One step.

    Attributes:
        name: of its record, such as `seed0/match`.
        what: what it does, in words.
        makes: files and folders that it makes. They are deleted before it begins anew.
        needs: files and folders that it reads; their content is part of its inputs.
        facts: whatever else decides the result, as JSON can hold it.
        groups: its commands: the groups run one after another, the commands of a group side by side.
        before, after: run in this process before and after the commands.
        decides: command lines that are compared in the place of its own, where the number of processes or GPUs decides nothing.
        resumes: whether the commands go on by themselves in what a killed run of them left.
        always: run it each time, also when it is done.
        clears: further files and folders that are deleted before it begins anew.
        estimate: what a dry run says about time and disk.
        note: why it is left out; it then does nothing but note this.
    """

    name: str
    what: str
    makes: Sequence[Path]
    needs: Sequence[Path] = ()
    facts: Dict[str, Any] = {}
    groups: Sequence[Sequence[Command]] = ()
    before: Optional[Callable[[], None]] = None
    after: Optional[Callable[[], None]] = None
    decides: Optional[Sequence[str]] = None
    resumes: bool = False
    always: bool = False
    clears: Sequence[Path] = ()
    estimate: str = ""
    note: Optional[str] = None

    @property
    def commands(self) -> List[str]:
        """The command lines, as a shell takes them."""
        return [str(command) for group in self.groups for command in group]


class Chain:
    """Runs steps in one folder.

    Args:
        out: folder of the run.
        say: gets one line for every step.

    Raises:
        ChainError: from `run`, if a step fails or another process works in the folder.
    """

    def __init__(self, out: Path, say: Callable[[str], None] = print):
        self.out, self.say = out, say
        self.digests = Digests(out / "steps" / "digests.json")

    def record(self, step: Step) -> Optional[Dict[str, Any]]:
        """The record of a step, or None."""
        return read_json(self._path(step))

    def run(self, steps: Sequence[Step]) -> List[str]:
        """Run what is not done. Returns the names of the steps that ran."""
        ran = []
        with self._lock() as lock:
            for number, step in enumerate(steps, 1):
                title = f"[{number}/{len(steps)}] {step.name}"
                why = self._why(step)
                if why is None:
                    self.say(f"{title}: done before, skipped")
                    continue
                self.say(f"{title}: {step.what} ({step.note or why})")
                self._run(step, lock)
                ran.append(step.name)
        return ran

    # ------------------------------------------------------------------------------------------------ one step

    def _path(self, step: Step) -> Path:
        return self.out / "steps" / f"{step.name}.json"

    def _begun(self, step: Step) -> Path:
        return self._path(step).with_suffix(".begun")

    def _why(self, step: Step) -> Optional[str]:
        """Why a step has to run, or None."""
        record = self.record(step)
        if record is None:
            return "goes on" if self._goes_on(step) else "new"
        if record.get("fingerprint") != self._fingerprint(step):
            return "its inputs changed"
        if record.get("outputs") != self._outputs(step):
            return "its files changed"
        return "each time" if step.always else None

    def _goes_on(self, step: Step) -> bool:
        begun = self._begun(step)
        return step.resumes and begun.is_file() and begun.read_text(encoding="utf-8") == self._fingerprint(step)

    def _fingerprint(self, step: Step) -> str:
        missing = [str(path) for path in step.needs if not path.exists()]
        if missing:
            raise ChainError(f"{step.name} needs {', '.join(missing)}, which no step before it made.")
        inputs = {
            "facts": step.facts,
            "commands": step.commands if step.decides is None else list(step.decides),
            "needs": {self._name(path): self.digests.of(path) for path in step.needs},
            "note": step.note,
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _outputs(self, step: Step) -> Dict[str, Optional[str]]:
        return {self._name(path): self.digests.of(path) if path.exists() else None for path in step.makes}

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.out) if self.out in path.parents else str(path)

    def _run(self, step: Step, lock: int) -> None:
        fingerprint, goes_on = self._fingerprint(step), self._goes_on(step)
        self._path(step).unlink(missing_ok=True)  # before anything changes: a killed step must not look done
        if not goes_on:
            for path in (*step.makes, *step.clears):
                delete(path)
        for path in step.makes:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(path.parent)
        self._path(step).parent.mkdir(parents=True, exist_ok=True)
        remove_parts(self._path(step).parent)
        write_atomically(self._begun(step), lambda file: file.write(fingerprint.encode()))
        started, begin = now(), time.monotonic()
        if step.note is None:
            if step.before is not None:
                step.before()
            log = self.out / "logs" / f"{step.name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            for group in step.groups:
                run_group(step.name, group, log, lock)
            if step.after is not None:
                step.after()
            absent = [str(path) for path in step.makes if not path.exists()]
            if absent:
                raise ChainError(f"{step.name} ended without an error, but did not make {', '.join(absent)}. See {log}.")
        record = {
            "step": step.name,
            "what": step.what,
            "note": step.note,
            "fingerprint": fingerprint,
            "commands": step.commands,
            "facts": step.facts,
            "outputs": self._outputs(step),
            "went_on": goes_on,
            "started": started,
            "finished": now(),
            "seconds": round(time.monotonic() - begin, 2),
            "versions": versions(),
        }
        write_json(self._path(step), record)
        self._begun(step).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        """A lock on the folder that the processes of the steps hold too: one that outlives a kill of this process keeps it."""
        import fcntl

        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ChainError(
                    f"Another process works in {self.out}: this command, or one that it started before it was killed. Wait for "
                    "its end, or end it."
                ) from error
            yield file.fileno()


def run_group(name: str, group: Sequence[Command], log: Path, lock: Optional[int] = None) -> None:
    """Run commands side by side to their end.

    Raises:
        ChainError: with the end of the log, if one fails. The others are ended then, as on Ctrl-C.
    """
    running: List["subprocess.Popen[bytes]"] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(log.open("ab"))
        try:
            for command in group:
                file.write(f"$ {command}\n".encode())
                file.flush()
                target = file if command.stdout is None else stack.enter_context(part_of(command.stdout).open("wb"))
                running.append(
                    subprocess.Popen(
                        list(command.words),
                        env={**os.environ, **command.environment},
                        stdin=subprocess.DEVNULL,
                        stdout=target,
                        stderr=file,
                        pass_fds=() if lock is None else (lock,),
                    )
                )
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running):
                    break
                time.sleep(0.05)
        finally:
            end(running)
    for process, command in zip(running, group):
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            lines += [f"{name} ended with status {process.returncode}: {command}"]
            raise ChainError("\n".join([*lines, f"The whole log: {log}. The same command goes on from here."]))
    for command in group:
        if command.stdout is not None:
            os.replace(part_of(command.stdout), command.stdout)


def part_of(path: Path) -> Path:
    """Where standard output goes until its process has ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End what still runs: politely, then not."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Digests:
    """SHA-256 of files and folders. One is read again only if names, sizes or times in it have changed since."""

    def __init__(self, path: Path):
        self.path = path
        self.known: Dict[str, Any] = read_json(path) or {}

    def of(self, path: Path) -> str:
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.endswith(".part")) if path.is_dir() else [path]
        stamp = hashlib.sha256()
        for file in files:
            stat = file.stat()
            stamp.update(f"{file.relative_to(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        before = self.known.get(str(path))
        if before is not None and before["stamp"] == stamp.hexdigest():
            return str(before["digest"])
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode())
        self.known[str(path)] = {"stamp": stamp.hexdigest(), "digest": total.hexdigest()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.known)
        return total.hexdigest()


def sha256(path: Path) -> str:
    """Of the content of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def delete(path: Path) -> None:
    """A file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Optional[Dict[str, Any]]:
    """An object, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def now() -> str:
    """The time, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> Dict[str, str]:
    """Versions of Python and of the libraries in this environment."""
    found = {"python": platform.python_version(), "interpreter": sys.executable}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
