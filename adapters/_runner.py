"""A host's own script, unedited, with the refiner attached: one stage of it in this process.

The script is run as `__main__` from its own folder, as `python main.py ...` would. The host's model is the first one of the
adapter's kind that runs forward in training mode; the hooks are put on there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import __version__
from ..cam_files import write_atomically
from ..cluster_branch import ClusterBranch
from ..errors import HostError
from ..refiner import PromptRefiner
from . import _compat
from ._attachment import AdapterError, Attachment, CamSource, Capture, ClusterTraining, img_and_cam, unwrap

STAGES = ("match", "prompt", "refine")


class Job(NamedTuple):
    """What one run of the runner is asked for; paths are absolute.

    Attributes:
        host: name of the adapter.
        source: the adapter.
        script: the host's script and its arguments.
        repo: folder of the host; `script` is relative to it.
        cwd: where the script runs.
        out: folder of the run.
        refiner: makes the `PromptRefiner`.
        facts: what identifies the run, for its record.
        prompts: prompt file, read by the refine stage and written by the prompt stage.
        checkpoint: the host's own checkpoint, from which match and refine start; by default what the script starts from.
        prompt_epochs: epochs of the prompt stage, or None for the recipe's.
        mode, weight, passes: as for `attach`.
        seed: of Python, NumPy and torch before the script starts.
        cpu: run a host with hard-coded `.cuda()` on the CPU.
        log_every: steps between two lines of the log of terms.
        clusters: makes the cluster branch that is trained with a host, or None.
        cluster_rate: learning rate of its own parameters.
        branch: file of a trained branch that the plain stage puts into the host, or None.
    """

    host: str
    source: CamSource
    script: List[str]
    repo: Path
    cwd: Path
    out: Path
    refiner: Callable[[], PromptRefiner]
    facts: Dict[str, Any]
    prompts: Path
    checkpoint: Optional[Path]
    prompt_epochs: Optional[int]
    mode: str
    weight: float
    passes: int
    seed: int
    cpu: bool
    log_every: int
    clusters: Optional[Callable[[nn.Module], ClusterBranch]] = None
    cluster_rate: float = 1e-3
    branch: Optional[Path] = None


# ---------------------------------------------------------------------------------------------------- the record of a run


class Record:
    """`record.json` of a run: what was asked for, with which versions, and how far each stage came. Always a whole file."""

    def __init__(self, out: Path):
        self.path = out / "record.json"
        self.content: Dict[str, Any] = {}
        if self.path.exists():
            try:
                self.content = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise AdapterError(
                    f"{self.path} is not readable JSON ({error}). Choose another --out, or --restart."
                ) from error
            if not isinstance(self.content, dict):
                raise AdapterError(f"{self.path} is no record of a run. Choose another --out, or --restart.")

    def open(self, job: Job) -> None:
        """Check that the folder belongs to this very run, or make it so."""
        before = self.content.get("run")
        finished = [stage for stage in self.content.get("stages", {}) if self.state(stage) == "done"]
        if finished and before is not None and before != job.facts:
            keys = [key for key in {**before, **job.facts} if before.get(key) != job.facts.get(key)]
            what = "; ".join(f"{key} was {before.get(key)!r}, is {job.facts.get(key)!r}" for key in sorted(keys))
            raise AdapterError(f"{self.path.parent} holds another run: {what}. Choose another --out, or --restart.")
        self.content.update(run=job.facts, host_commit=_commit(job.repo))
        self.content.setdefault("versions", {}).update(_versions())
        self.content.setdefault("stages", {})
        self.save()

    def state(self, stage: str) -> str:
        return self.content.get("stages", {}).get(stage, {}).get("state", "not started")

    def stage(self, stage: str, **values: Any) -> None:
        self.content.setdefault("stages", {}).setdefault(stage, {}).update(values)
        self.save()

    def save(self) -> None:
        if _is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write((_json(self.content) + "\n").encode()))


def forget(out: Path, stages: Sequence[str], whole: bool) -> None:
    """Delete what these stages wrote, by name, and with `whole` the record of the run."""
    for stage in stages:
        for name in (
            f"{stage}.pt",
            f"{stage}.jsonl",
            f"{stage}.clusters.safetensors",
            *(["prompts.safetensors"] if stage == "prompt" else []),
        ):
            (out / name).unlink(missing_ok=True)
    if whole:
        (out / "record.json").unlink(missing_ok=True)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _commit(repo: Path) -> Dict[str, Any]:
    """The host's commit, and its files that differ from it; None where the folder is no git repository."""

    def git(*arguments: str) -> Optional[str]:
        try:
            done = subprocess.run(["git", "-C", str(repo), *arguments], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.rstrip("\n") if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed_files": None if changed is None else changed.splitlines()}


def _versions() -> Dict[str, str]:
    versions = {"python": platform.python_version(), "semples_plugin": __version__, "torch": torch.__version__}
    versions["numpy"] = np.__version__
    for name in ("timm", "torchvision"):
        module = sys.modules.get(name)
        if module is not None:
            versions[name] = module.__version__
    return versions


# ---------------------------------------------------------------------------------------------------- the host's process


@contextlib.contextmanager
def _as_script(job: Job) -> Iterator[None]:
    """Working folder, `sys.argv` and `sys.path` as `python script ...` has them."""
    script = job.repo / job.script[0]
    cwd, argv, path = os.getcwd(), sys.argv[:], sys.path[:]
    try:
        os.chdir(job.cwd)
        sys.argv = [job.script[0], *job.script[1:]]
        sys.path[0] = str(script.parent)  # of this process it was the folder it was started from
        yield
    finally:
        os.chdir(cwd)
        sys.argv, sys.path[:] = argv, path


def _run_script(job: Job) -> None:
    try:
        runpy.run_path(str(job.repo / job.script[0]), run_name="__main__")
    except SystemExit as leave:
        if leave.code not in (None, 0):
            raise


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _Finder:
    """Waits for the host's model: the first that runs forward, by default in training with gradients, and passes `check`."""

    def __init__(self, check: Callable[[nn.Module], Any], found: Callable[[nn.Module], None], training: bool = True):
        self.check, self.found, self.training = check, found, training
        self.model: Optional[nn.Module] = None
        self.seen: List[str] = []

    def __enter__(self) -> "_Finder":
        self.handle = nn.modules.module.register_module_forward_pre_hook(self._hook)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()

    def _hook(self, module: nn.Module, inputs: Any) -> None:
        inner = unwrap(module)
        if self.training and not (torch.is_grad_enabled() and inner.training):
            return
        try:
            self.check(inner)
        except HostError:
            if type(inner).__name__ not in self.seen:
                self.seen.append(type(inner).__name__)
            return
        self.handle.remove()
        self.model = module
        self.found(module)

    def missing(self, script: str, what: str) -> AdapterError:
        verb, mode, it = ("training", " in training mode", "the training script") if self.training else ("running", "", "it")
        return AdapterError(
            f"{script} ended without {verb} {what}. Modules that ran{mode}: "
            f"{', '.join(self.seen[:12]) or 'none'}. Is this {it}, and the right adapter?"
        )


class _PassOver(BaseException):
    """The host's loader was gone through once; not an `Exception`, so that a host's `except Exception` lets it pass."""


class _Collector(Attachment):
    """Instead of adding a loss, keeps what stage (b) learns from. The host's weights are the same for every batch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.features: List[Tensor] = []
        self.pairs: List[Tensor] = []
        self.images = 0
        self.over = False

    def bind(self, model: nn.Module, under_way: bool = False) -> None:
        super().bind(model, under_way)
        inner = unwrap(model)
        self._weights = {name: value.detach().clone() for name, value in inner.state_dict().items()}
        self._handles.append(model.register_forward_pre_hook(lambda module, inputs: self._restore(inner)))
        self._restore(inner)

    def _restore(self, model: nn.Module) -> None:
        """Undo the host's last step, and keep dropout, stochastic depth and batch statistics still."""
        if self.over:
            raise _PassOver
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if not torch.equal(value, self._weights[name]):  # in place only where it must be: a graph may be alive
                    value.copy_(self._weights[name])
        for module in model.modules():
            leaf = next(module.children(), None) is None or type(module).__module__.startswith("torch.nn.")
            if leaf and module is not model:
                module.training = False

    def _step(self, capture: Capture, labels: Tensor) -> None:
        assert self.refiner is not None  # a collector is never made without
        img, cam = img_and_cam(self.source, self.refiner, capture)
        features, pairs = self.refiner.encode_backgrounds(img, cam.detach(), labels.to(cam.device))
        self.features.append(features)
        self.pairs.append(pairs + torch.tensor([self.images, 0]))
        self.images += len(img)
        self.steps += 1

    def collected(self) -> Tuple[Tensor, Tensor]:
        return torch.cat(self.features), torch.cat(self.pairs)


@contextlib.contextmanager
def _one_pass(collector: _Collector) -> Iterator[None]:
    """Ends the script when a DataLoader that fed the collector is exhausted."""
    iterate = DataLoader.__iter__

    def once(loader: Any) -> Iterator[Any]:
        before = collector.steps
        yield from iterate(loader)
        if collector.steps > before:
            collector.over = True
            raise _PassOver

    with _compat.replaced(DataLoader, __iter__=once):
        yield


def _load_weights(path: Path, model: nn.Module) -> None:
    """Host weights from a checkpoint: a state dict, or a dict that holds one under "model" or "state_dict"."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise AdapterError(
            f"{path} is no checkpoint of plain weights ({error}). Give one that holds tensors only: "
            "torch.save(model.state_dict(), path)."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise AdapterError(f"{path} must hold a state dict; it holds a {type(content).__name__}.")
    weights = {name[7:] if name.startswith("module.") else name: value for name, value in content.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise AdapterError(f"{path} does not fit {type(model).__name__}: {error}") from error


def run_stage(job: Job, stage: str) -> None:
    """One stage of a run, in this process. `"plain"` runs the script with nothing attached and nothing recorded."""
    if stage == "plain":
        _plain(job)
        return
    record = Record(job.out)
    record.open(job)
    record.stage(stage, state="running", started=_now(), host_commit=record.content["host_commit"])
    try:
        values = _prompt(job) if stage == "prompt" else _train(job, stage)
    except BaseException as error:
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}"
        record.stage(stage, state=how, finished=_now())
        raise
    record.content["versions"] = _versions()
    record.stage(stage, state="done", finished=_now(), versions=_versions(), **values)


def _plain(job: Job) -> None:
    """The script as it is, or with a trained cluster branch in its model."""
    branch = None if job.branch is None else ClusterBranch.load(job.branch).eval().requires_grad_(False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process(job))
        if branch is None:
            _run_script(job)
            return

        def found(model: nn.Module) -> None:
            stack.enter_context(branch.insert(model))
            print(f"semples: {job.branch} is in {type(unwrap(model)).__name__}", file=sys.stderr)

        finder = stack.enter_context(_Finder(branch.insert, found, training=False))
        _run_script(job)
        if finder.model is None:
            raise finder.missing(job.script[0], "a transformer for this branch")


@contextlib.contextmanager
def _process(job: Job) -> Iterator[List[str]]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_script(job))
        shims = stack.enter_context(_compat.old_libraries())
        if job.cpu:
            stack.enter_context(_compat.on_cpu())
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave the host's folder as it is
        stack.callback(setattr, sys, "dont_write_bytecode", bytecode)
        for note in shims:
            print(f"semples: {note}", file=sys.stderr)
        _seed(job.seed)
        yield shims


def _refiner(job: Job) -> PromptRefiner:
    try:
        return job.refiner()
    except (TypeError, ValueError) as error:
        raise AdapterError(str(error)) from error


def _start(job: Job, stage: str) -> Optional[Path]:
    """The host weights that a stage starts from, or None for what the script itself starts from.

    Match and refine both start from the host's own checkpoint; the prompts are learned with the host that match has trained.
    """
    matched = job.out / "match.pt"
    if stage != "prompt":
        return job.checkpoint
    if matched.exists():
        return matched
    if job.checkpoint is None:
        raise AdapterError(
            f"The prompt stage needs trained host weights, but there is no {matched}. Run --stage match, or give them: "
            "--checkpoint FILE."
        )
    return job.checkpoint


def _attached(
    job: Job,
    attachment: Attachment,
    start: Optional[Path],
    clusters: Optional[Callable[[nn.Module], ClusterTraining]] = None,
) -> _Finder:
    def found(model: nn.Module) -> None:
        if start is not None:
            _load_weights(start, unwrap(model))
            print(f"semples: {type(unwrap(model)).__name__} starts from {start}", file=sys.stderr)
        if clusters is not None:
            attachment.clusters = clusters(unwrap(model))
            attachment.clusters.begin()
        attachment.bind(model, under_way=True)
        print(f"semples: attached to {type(unwrap(model)).__name__}", file=sys.stderr)

    return _Finder(job.source.modules, found)


def _train(job: Job, stage: str) -> Dict[str, Any]:
    """Stages (a) and (c)."""
    start = _start(job, stage)
    refiner = _refiner(job)
    if stage == "refine":
        if not job.prompts.is_file():
            raise AdapterError(
                f"The refine stage needs learned prompts, but there is no {job.prompts}. Run --stage prompt, or "
                "give them: --prompts FILE."
            )
        refiner.load_prompts(job.prompts)
    log = _log(job.out / f"{stage}.jsonl", job.log_every)
    attachment = Attachment(job.source, None, refiner, mode=job.mode, weight=job.weight, passes=job.passes)

    def clusters(model: nn.Module) -> ClusterTraining:
        assert job.clusters is not None
        branch = job.clusters(model).to(next(model.parameters()).device)
        return ClusterTraining(branch, torch.optim.AdamW(branch.parameters(), lr=job.cluster_rate), refiner)

    with log as write:
        attachment.on_step = write if _is_main() else None
        attached = _attached(job, attachment, start, clusters if job.clusters is not None else None)
        with _process(job) as shims, attachment, attached as finder:
            _run_script(job)
            if finder.model is None:
                raise finder.missing(job.script[0], f"a model that the adapter {job.host!r} knows")
    weights = unwrap(finder.model).state_dict()
    if _is_main():
        if attachment.clusters is not None:  # before the weights: the next stage looks for those
            attachment.clusters.branch.save(_branch_file(job, stage))
        write_atomically(job.out / f"{stage}.pt", lambda file: torch.save({"model": weights}, file))
    print(f"semples: {stage}: {attachment.steps} steps, weights in {job.out / f'{stage}.pt'}", file=sys.stderr)
    return {"steps": attachment.steps, "weights": f"{stage}.pt", "shims": shims}


def _branch_file(job: Job, stage: str) -> Path:
    return job.out / f"{stage}.clusters.safetensors"


@contextlib.contextmanager
def _log(path: Path, every: int) -> Iterator[Any]:
    """A line of JSON per `every` steps; a stage that starts again starts its log again."""
    if not _is_main():
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", buffering=1) as file:

        def write(step: int, terms: Dict[str, float]) -> None:
            if (step - 1) % every == 0:
                file.write(json.dumps({"step": step, **terms}) + "\n")

        yield write


def _prompt(job: Job) -> Dict[str, Any]:
    """Stage (b): one pass over the host's own loader with the trained host held still, then the prompts on cached features."""
    start = _start(job, "prompt")
    refiner = _refiner(job)
    collector = _Collector(job.source, None, refiner, passes=job.passes)

    def clusters(model: nn.Module) -> ClusterTraining:
        branch = ClusterBranch.load(_branch_file(job, "match")).eval().requires_grad_(False)
        return ClusterTraining(branch.to(next(model.parameters()).device), None, refiner)

    with _process(job) as shims, contextlib.suppress(_PassOver), collector, _one_pass(collector):
        matched = job.clusters is not None and start == job.out / "match.pt"  # a host of its own knows no branch
        with _attached(job, collector, start, clusters if matched else None) as finder:
            _run_script(job)
            if finder.model is None:
                raise finder.missing(job.script[0], f"a model that the adapter {job.host!r} knows")
    if not collector.features:
        raise AdapterError(f"{job.script[0]} trained, but gave no batch with labels to learn prompts from.")
    features, pairs = collector.collected()
    print(f"semples: learning prompts from {len(pairs)} pairs of {collector.images} images", file=sys.stderr)
    fit = refiner.fit_prompts_on(features, pairs, epochs=job.prompt_epochs, progress=_is_main())
    seen = {refiner.classes[k] for k in pairs[:, 1].unique().tolist()}  # prompts of other classes learned nothing
    readings = {reading.name: [word for word, _ in reading.words] for reading in refiner.read_prompts() if reading.name in seen}
    if _is_main():
        job.prompts.parent.mkdir(parents=True, exist_ok=True)
        refiner.save_prompts(job.prompts)
        for name, words in readings.items():
            print(f"semples: background of {name}: {', '.join(words)}", file=sys.stderr)
    return {"images": collector.images, "pairs": fit.num_pairs, "nearest_words": readings, "shims": shims}


def run_all(job: Job, stages: Sequence[str], command: Callable[[str], List[str]]) -> int:
    """Every stage in a process of its own; those that the record calls done are skipped. Returns an exit status."""
    Record(job.out).open(job)
    for stage in stages:
        record = Record(job.out)
        if record.state(stage) == "done":
            print(f"semples: {stage}: done before, skipped", file=sys.stderr)
            continue
        print(f"semples: {stage}: starting", file=sys.stderr)
        status = subprocess.run(command(stage)).returncode
        if status or Record(job.out).state(stage) != "done":
            print(f"semples: {stage} ended with status {status}; the same command goes on from here.", file=sys.stderr)
            return status or 1
    return 0
