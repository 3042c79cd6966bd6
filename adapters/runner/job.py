"""What one run of the runner is asked for. Flow: `__main__` -> **job** -> `stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from torch import nn

from ...clusters.branch import ClusterBranch
from ...refiner import PromptRefiner
from ..sources import CamSource

__all__ = ["Job", "ONLINE", "STAGES", "Target"]

STAGES = ("match", "prompt", "refine")
ONLINE = "online"  # the one stage of a run that learns its prompts along the way


class Target(NamedTuple):
    """One network of a script that the refiner is attached to.

    Attributes:
        host: name of the adapter.
        source: the adapter.
        options: of `attach`: `network`, `label_loss`, `labels`, `forward_pass`, `first_step`, `last_step`, `mode`, `weight`.
    """

    host: str
    source: CamSource
    options: Dict[str, Any]

    def watching(self) -> Dict[str, Any]:
        """The options that say where the network and its labels are, for a pass without a loss."""
        return {key: self.options[key] for key in ("network", "label_loss", "labels", "forward_pass") if key in self.options}


class Job(NamedTuple):
    """What one run of the runner is asked for; paths are absolute.

    Attributes:
        targets: the networks that are trained with the refiner. Prompts are learned with the first; the checkpoint is its.
        script: the host's script and its arguments.
        repo: folder of the host; `script` is relative to it.
        cwd: where the script runs.
        out: folder of the run.
        refiner: makes the `PromptRefiner`.
        facts: what identifies the run, for its record.
        prompts: prompt file, read by the refine stage and written by the prompt stage.
        checkpoint: the host's own checkpoint, from which match, refine and plain start; by default what the script starts from.
        prompt_epochs: epochs of the prompt stage, or None for those of the configuration.
        seed: of Python, NumPy and torch before the script starts.
        cpu: run a host with hard-coded `.cuda()` on the CPU.
        log_every: steps between two lines of the log of terms.
        make_branch: makes the cluster branch that is trained with a host, or None.
        branch_lr: learning rate of the branch's parameters.
        branch: file of a trained branch that the plain stage puts into the host, or None.
        allow_others: whether the script may train networks over the same classes without the refiner.
        dry_run: steps of each target after which the script is stopped and described, or None for a whole run.
    """

    targets: List[Target]
    script: List[str]
    repo: Path
    cwd: Path
    out: Path
    refiner: Callable[[], PromptRefiner]
    facts: Dict[str, Any]
    prompts: Path
    checkpoint: Optional[Path]
    prompt_epochs: Optional[int]
    seed: int
    cpu: bool
    log_every: int
    make_branch: Optional[Callable[[nn.Module], ClusterBranch]] = None
    branch_lr: float = 1e-3
    branch: Optional[Path] = None
    allow_others: bool = False
    dry_run: Optional[int] = None
