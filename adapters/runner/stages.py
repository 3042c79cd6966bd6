"""The stages of a run, each in this process: match, refine and online (training), prompt (learning the prompts), plain.

Flow: `job` -> **stages** -> `process`, `collector`, `record`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
from torch import nn

from ..._files import write_atomically
from ..._hooks import unwrap
from ...clusters.branch import ClusterBranch
from ...errors import HostError
from ...refiner import PromptRefiner
from ..attachment import Attachment
from ..branch_training import BranchTraining
from ..finder import ModelFinder
from ..loop import LoopWatcher
from .collector import Collector, one_pass
from .job import ONLINE, Job, Target
from .process import host_process, run_script
from .record import Record, is_main, now, versions

__all__ = ["run_all", "run_stage"]


def run_stage(job: Job, stage: str) -> None:
    """Run one stage in this process. `"plain"` runs the script with nothing attached and nothing recorded."""
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


def run_all(job: Job, stages: Sequence[str], command: Callable[[str], List[str]]) -> int:
    """Run every stage in a process of its own and skip those that the record calls done. Returns an exit status."""
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


def _plain(job: Job) -> None:
    """Run the script as it is, from a checkpoint if there is one, or with a trained cluster branch in its model."""
    branch = None if job.branch is None else ClusterBranch.load(job.branch).eval().requires_grad_(False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(host_process(job))
        if job.checkpoint is not None:
            _plain_from(job, job.checkpoint)
            return
        if branch is None:
            run_script(job)
            return

        def found(model: nn.Module, *arguments: Any) -> None:
            stack.enter_context(branch.insert(model))
            print(f"semples: {job.branch} is in {type(unwrap(model)).__name__}", file=sys.stderr)

        finder = stack.enter_context(ModelFinder(branch.insert, found, training=False))
        run_script(job)
        if finder.model is None:
            raise finder.none_fits(job.script[0], "a transformer for this branch")


def _plain_from(job: Job, checkpoint: Path) -> None:
    """Run a training script whose network starts from a checkpoint, as match and refine do, and then nothing else."""
    target = job.targets[0]

    def found(model: nn.Module, *arguments: Any) -> None:
        _load_weights(checkpoint, unwrap(model))
        print(f"semples: {type(unwrap(model)).__name__} starts from {checkpoint}", file=sys.stderr)

    finder = ModelFinder(
        target.source.modules, found, network=target.options.get("network"), by_parts=bool(target.source.calls)
    )
    with finder:
        run_script(job)
    if finder.model is None:
        raise finder.none_fits(job.script[0], f"a network that the adapter {target.host!r} knows")


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


def _when_found(
    watcher: LoopWatcher,
    job: Job,
    target: Target,
    start: Optional[Path],
    make_branch: Optional[Callable[[nn.Module], BranchTraining]] = None,
) -> None:
    """Load the host's weights and make its branch in the moment in which its network is found."""

    def found(model: nn.Module) -> None:
        name = type(unwrap(model)).__name__
        if start is not None:
            _load_weights(start, unwrap(model), own=start.parent == job.out)
            print(f"semples: {name} starts from {start}", file=sys.stderr)
        if make_branch is not None:
            watcher.branch = make_branch(unwrap(model))
            watcher.branch.begin()
        print(f"semples: attached to {name}", file=sys.stderr)

    watcher.on_model = found
    watcher.script, watcher.what = job.script[0], f"a network that the adapter {target.host!r} knows"


def _train(job: Job, stage: str) -> Dict[str, Any]:
    """Stages (a) and (c), or both in one with prompts that are learned along the way."""
    start = _start(job, stage)
    refiner = _refiner(job)
    if stage == "refine":
        if not job.prompts.is_file():
            raise HostError(
                f"The refine stage needs learned prompts, but there is no {job.prompts}. Run --stage prompt, or "
                "give them: --prompts FILE."
            )
        refiner.load_prompts(job.prompts)
    attachments = [Attachment(target.source, None, refiner, **target.options) for target in job.targets]
    first = attachments[0]

    def make_branch(model: nn.Module) -> BranchTraining:
        assert job.make_branch is not None
        branch = job.make_branch(model).to(next(model.parameters()).device)
        return BranchTraining(branch, torch.optim.AdamW(branch.parameters(), lr=job.branch_lr), refiner)

    for attachment, target in zip(attachments, job.targets):
        own = attachment is first
        _when_found(attachment, job, target, start if own else None, make_branch if own and job.make_branch else None)
    with contextlib.ExitStack() as stack:
        for number, attachment in enumerate(attachments, 1):
            write = stack.enter_context(_log(job.out / f"{stage}{_number(number)}.jsonl", job.log_every))
            attachment.on_step = write if is_main() else None
        notes = stack.enter_context(host_process(job))
        for attachment in attachments:
            stack.enter_context(attachment)
        run_script(job)
        for attachment in attachments:
            if attachment.model is None:
                raise attachment.none_fits()
    learned = {}
    if stage == ONLINE:
        learned = _keep_prompts(job, refiner, [k for k, alive in enumerate(refiner.prompts.alive.any(1).tolist()) if alive])
    if is_main() and first.branch is not None:  # before the weights: the next stage looks for those
        first.branch.branch.save(_branch_file(job, stage))
    for number, attachment in reversed(list(enumerate(attachments, 1))):  # the first, which the next stage looks for, last
        file = job.out / f"{stage}{_number(number)}.pt"
        if is_main():
            assert attachment.model is not None
            weights = unwrap(attachment.model).state_dict()
            write_atomically(file, lambda out, weights=weights: torch.save({"model": weights}, out))  # type: ignore[misc]
        print(f"semples: {stage}: {attachment.steps} steps, weights in {file}", file=sys.stderr)
    others = sum(first.others.values())
    if others and not job.allow_others:
        raise HostError(
            f"{job.script[0]} also trained another network: {others} label losses over the {len(refiner.classes)} classes did "
            f"not come from {' or '.join(type(unwrap(a.model)).__name__ for a in attachments if a.model is not None)}. Attach "
            'it as well: --attach "HOST network=NAME ...", or say that it is to stay as it is: --allow-others. The weights '
            f"that were trained are in {job.out}."
        )
    values = {"networks": [type(unwrap(a.model)).__name__ for a in attachments if a.model is not None]}
    return {"steps": first.steps, "weights": f"{stage}.pt", "shims": notes, **values, **learned}


def _number(number: int) -> str:
    """Part of the file names of a second and further network."""
    return "" if number == 1 else f".{number}"


def _branch_file(job: Job, stage: str) -> Path:
    return job.out / f"{stage}.clusters.safetensors"


@contextlib.contextmanager
def _log(path: Path, every: int) -> Iterator[Any]:
    """Write a line of JSON every `every` steps. A stage that starts again starts its log again."""
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
    """Stage (b): one pass over the host's own loader with the trained host frozen, then the prompts from its features."""
    start = _start(job, "prompt")
    refiner = _refiner(job)
    target = job.targets[0]
    collector = Collector(target.source, refiner, **target.watching())

    def make_branch(model: nn.Module) -> BranchTraining:
        branch = ClusterBranch.load(_branch_file(job, "match")).eval().requires_grad_(False)
        return BranchTraining(branch.to(next(model.parameters()).device), None, refiner)

    # A checkpoint that the user gives was trained without a branch.
    with_branch = job.make_branch is not None and start == job.out / "match.pt"
    _when_found(collector, job, target, start, make_branch if with_branch else None)
    with host_process(job) as notes, one_pass(collector), collector:
        run_script(job)
        if collector.model is None:
            raise collector.none_fits()
    if not collector.features:
        raise HostError(f"{job.script[0]} trained, but gave no batch with labels to learn prompts from.")
    features, pairs = collector.collected()
    print(f"semples: learning prompts from {len(pairs)} pairs of {collector.images} images", file=sys.stderr)
    fit = refiner.fit_prompts_on(features, pairs, epochs=job.prompt_epochs, progress=is_main())
    words = _keep_prompts(job, refiner, pairs[:, 1].unique().tolist())  # prompts of other classes learned nothing
    failed = [prompt.title for prompt in fit.failed]
    return {"images": collector.images, "pairs": fit.num_pairs, **words, "failed": failed, "shims": notes}


def _keep_prompts(job: Job, refiner: PromptRefiner, classes: Sequence[int]) -> Dict[str, Any]:
    """Write the prompts, print what those of some classes say, and return that for the record."""
    names = {refiner.classes[k] for k in classes}
    readings = [found for found in refiner.nearest_words() if found.name in names]
    if is_main():
        job.prompts.parent.mkdir(parents=True, exist_ok=True)
        refiner.save(job.prompts)
        for found in readings:
            note = "" if found.alive else " (failed, not used)"
            print(f"semples: background of {found.title}{note}: {', '.join(word for word, _ in found.words)}", file=sys.stderr)
    return {"nearest_words": {found.title: [word for word, _ in found.words] for found in readings}}


def _load_weights(path: Path, model: nn.Module, own: bool = False) -> None:
    """Host weights from a checkpoint: a state dict, or a dict that holds one under "model" or "state_dict".

    Args:
        path: of the checkpoint.
        model: the host.
        own: whether a stage before wrote it. Then it may hold what the network makes in its first forward pass only.
    """
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
    if own:
        known = model.state_dict()
        weights = {name: value for name, value in weights.items() if name in known}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise HostError(f"{path} does not fit {type(model).__name__}: {error}") from error
