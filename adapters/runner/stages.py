"""A host's own script, unedited, with the refiner attached: one stage of it in this process.

The script is run as `__main__` from its own folder, as `python main.py ...` would. The host's model is the first one of the
adapter's kind that runs forward in training mode; the hooks are put on there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..._files import write_atomically
from ..._hooks import unwrap
from ...clusters.branch import ClusterBranch
from ...errors import HostError
from ...refiner import PromptRefiner
from ..attachment import Attachment
from ..branch_training import BranchTraining
from ..recorder import Capture, img_and_cam
from . import compat
from .job import Job
from .record import Record, is_main, now, versions


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

    def missing(self, script: str, what: str) -> HostError:
        verb, mode, it = ("training", " in training mode", "the training script") if self.training else ("running", "", "it")
        return HostError(
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

    with compat.replaced(DataLoader, __iter__=once):
        yield


def _load_weights(path: Path, model: nn.Module) -> None:
    """Host weights from a checkpoint: a state dict, or a dict that holds one under "model" or "state_dict"."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise HostError(
            f"{path} is no checkpoint of plain weights ({error}). Give one that holds tensors only: "
            "torch.save(model.state_dict(), path)."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise HostError(f"{path} must hold a state dict; it holds a {type(content).__name__}.")
    weights = {name[7:] if name.startswith("module.") else name: value for name, value in content.items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise HostError(f"{path} does not fit {type(model).__name__}: {error}") from error


def run_stage(job: Job, stage: str) -> None:
    """One stage of a run, in this process. `"plain"` runs the script with nothing attached and nothing recorded."""
    if stage == "plain":
        _plain(job)
        return
    record = Record(job.out)
    record.open(job)
    record.stage(stage, state="running", started=now(), host_commit=record.content["host_commit"])
    try:
        values = _prompt(job) if stage == "prompt" else _train(job, stage)
    except BaseException as error:
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}"
        record.stage(stage, state=how, finished=now())
        raise
    record.content["versions"] = versions()
    record.stage(stage, state="done", finished=now(), versions=versions(), **values)


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
        shims = stack.enter_context(compat.old_libraries())
        if job.cpu:
            stack.enter_context(compat.on_cpu())
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
        raise HostError(str(error)) from error


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
        raise HostError(
            f"The prompt stage needs trained host weights, but there is no {matched}. Run --stage match, or give them: "
            "--checkpoint FILE."
        )
    return job.checkpoint


def _attached(
    job: Job,
    attachment: Attachment,
    start: Optional[Path],
    clusters: Optional[Callable[[nn.Module], BranchTraining]] = None,
) -> _Finder:
    def found(model: nn.Module) -> None:
        if start is not None:
            _load_weights(start, unwrap(model))
            print(f"semples: {type(unwrap(model)).__name__} starts from {start}", file=sys.stderr)
        if clusters is not None:
            attachment.branch = clusters(unwrap(model))
            attachment.branch.begin()
        attachment.bind(model, under_way=True)
        print(f"semples: attached to {type(unwrap(model)).__name__}", file=sys.stderr)

    return _Finder(job.source.modules, found)


def _train(job: Job, stage: str) -> Dict[str, Any]:
    """Stages (a) and (c)."""
    start = _start(job, stage)
    refiner = _refiner(job)
    if stage == "refine":
        if not job.prompts.is_file():
            raise HostError(
                f"The refine stage needs learned prompts, but there is no {job.prompts}. Run --stage prompt, or "
                "give them: --prompts FILE."
            )
        refiner.load_prompts(job.prompts)
    log = _log(job.out / f"{stage}.jsonl", job.log_every)
    attachment = Attachment(job.source, None, refiner, mode=job.mode, weight=job.weight, passes=job.passes)

    def clusters(model: nn.Module) -> BranchTraining:
        assert job.clusters is not None
        branch = job.clusters(model).to(next(model.parameters()).device)
        return BranchTraining(branch, torch.optim.AdamW(branch.parameters(), lr=job.branch_lr), refiner)

    with log as write:
        attachment.on_step = write if is_main() else None
        attached = _attached(job, attachment, start, clusters if job.clusters is not None else None)
        with _process(job) as shims, attachment, attached as finder:
            _run_script(job)
            if finder.model is None:
                raise finder.missing(job.script[0], f"a model that the adapter {job.host!r} knows")
    weights = unwrap(finder.model).state_dict()
    if is_main():
        if attachment.branch is not None:  # before the weights: the next stage looks for those
            attachment.branch.branch.save(_branch_file(job, stage))
        write_atomically(job.out / f"{stage}.pt", lambda file: torch.save({"model": weights}, file))
    print(f"semples: {stage}: {attachment.steps} steps, weights in {job.out / f'{stage}.pt'}", file=sys.stderr)
    return {"steps": attachment.steps, "weights": f"{stage}.pt", "shims": shims}


def _branch_file(job: Job, stage: str) -> Path:
    return job.out / f"{stage}.clusters.safetensors"


@contextlib.contextmanager
def _log(path: Path, every: int) -> Iterator[Any]:
    """A line of JSON per `every` steps; a stage that starts again starts its log again."""
    if not is_main():
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

    def clusters(model: nn.Module) -> BranchTraining:
        branch = ClusterBranch.load(_branch_file(job, "match")).eval().requires_grad_(False)
        return BranchTraining(branch.to(next(model.parameters()).device), None, refiner)

    with _process(job) as shims, contextlib.suppress(_PassOver), collector, _one_pass(collector):
        matched = job.clusters is not None and start == job.out / "match.pt"  # a host of its own knows no branch
        with _attached(job, collector, start, clusters if matched else None) as finder:
            _run_script(job)
            if finder.model is None:
                raise finder.missing(job.script[0], f"a model that the adapter {job.host!r} knows")
    if not collector.features:
        raise HostError(f"{job.script[0]} trained, but gave no batch with labels to learn prompts from.")
    features, pairs = collector.collected()
    print(f"semples: learning prompts from {len(pairs)} pairs of {collector.images} images", file=sys.stderr)
    fit = refiner.fit_prompts_on(features, pairs, epochs=job.prompt_epochs, progress=is_main())
    seen = {refiner.classes[k] for k in pairs[:, 1].unique().tolist()}  # prompts of other classes learned nothing
    readings = {
        reading.name: [word for word, _ in reading.words] for reading in refiner.nearest_words() if reading.name in seen
    }
    if is_main():
        job.prompts.parent.mkdir(parents=True, exist_ok=True)
        refiner.save(job.prompts)
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
