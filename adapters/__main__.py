"""Run a host's own training script, unedited, with the refiner attached.

    python -m semples_plugin.adapters mctformer --repo MCTformer -- main.py --data-path VOCdevkit/VOC2012 ...

Stages: match (train with L_match), prompt (learn the background prompts with the trained host), refine (train again from the
start with L_match + lambda L_refine); `all` runs the three, each in a process of its own, and continues an interrupted run.
`online` is one stage instead of three, with --set online_steps=N: prompts are learned along the way.
`plain` runs the script with nothing attached, for baselines (with --checkpoint from there) and for the host's CAM files.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .._checks import check_classes, check_number
from ..class_names import read_class_names
from ..clusters.branch import ClusterBranch
from ..clusters.categories import CategoryClusters
from ..config import config_for, parse_assignments
from ..errors import SemplesError
from ..refiner import PromptRefiner
from .registry import make_source, names
from .runner.dry_run import dry_run
from .runner.job import ONLINE, STAGES, Job, Target
from .runner.record import forget
from .runner.stages import run_all, run_stage
from .sources import CamSource

__all__ = ["main", "make_parser"]


def make_parser() -> argparse.ArgumentParser:
    """The command line of the runner, without the script and its arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m semples_plugin.adapters",
        usage="%(prog)s HOST --repo DIR [options] -- SCRIPT [the script's own arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    assignments: Dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    add("host", metavar="HOST", help=f"{', '.join(names())}; with --source any name")
    add("--repo", type=Path, required=True, metavar="DIR", help="folder of the host; the runner changes nothing in it")
    add("--stage", choices=["all", *STAGES, ONLINE, "plain"], default="all", help="default: %(default)s; with "
        "--set online_steps=N `all` is the one stage online")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="folder for prompts, weights, logs and record; default: runs/HOST")
    add("--cwd", type=Path, metavar="DIR", help="folder that the script runs in; default: the host's")
    add("--classes", default="voc", metavar="voc|coco|FILE", help="names in the order of the labels, and with coco the COCO "
        "configuration; FILE: one name per line, a JSON list, or a JSON mapping name -> name for CLIP; "
        "default: %(default)s")  # fmt: skip
    add("--clip", default="ViT-B/32", metavar="NAME", help="CLIP model or weights file; default: %(default)s")
    add("--prompts", type=Path, metavar="FILE", help="learned prompts: only the refine stage is run")
    add("--checkpoint", type=Path, metavar="FILE", help="the host's own checkpoint, from which match and refine start, "
        "and plain; default: what the script starts from")  # fmt: skip
    add("--mode", choices=["add", "replace"], default="add", help="add to the host's label loss, or replace it; "
        "default: %(default)s")  # fmt: skip
    add("--network", metavar="CLASS", help="class name of the network; default: the first that fits the adapter")
    add("--label-loss", metavar="NAME", help="loss of torch.nn.functional that the refiner's is added to, or backward; "
        "default: "
        "the multi-label losses over the classes")  # fmt: skip
    add("--labels", metavar="WHERE", help="loader, loader:KEY, forward:NAME or package.module:function; "
        "default: the targets of "
        "the label loss")  # fmt: skip
    add("--forward-pass", default="first", metavar="first|last|N", help="which forward pass of a step gives the CAM; default: "
        "%(default)s of those in the label loss")  # fmt: skip
    add("--first-step", type=int, default=1, metavar="N", help="the first step with the refiner's loss; default: %(default)s")
    add("--last-step", type=int, metavar="N", help="the last one; default: that of the script")
    add("--source", metavar="PACKAGE.MODULE:CLASS", help="a CamSource of your own; --host-option gives its arguments")
    add("--attach", action="append", default=[], metavar="'HOST NAME=VALUE ...'", help="a further network of the script, with "
        "options of its adapter and network, label_loss, labels, forward_pass, first_step, last_step")  # fmt: skip
    add("--allow-others", action="store_true", help="the script may train further networks without the refiner")
    add("--dry-run", type=int, nargs="?", const=3, metavar="STEPS", help="run a few steps, print what was attached to "
        "what, and "
        "write no weights; default: %(const)s steps")  # fmt: skip
    add("--weight", type=float, default=1.0, help="factor on the refiner's loss; default: %(default)s")
    add("--set", help="option of RefinerConfig, such as lambda_area=1", **assignments)
    add("--host-option", help="option of the host's adapter, such as cam=patch", **assignments)
    add("--clusters", metavar="voc|coco|FILE", help="category clusters: train a cluster branch (PCC, CPC) with the host")
    add("--branch-option", help="option of ClusterBranch, such as lambda_contrast=0", **assignments)
    add("--branch-lr", type=float, default=1e-3, metavar="LR", help="learning rate of the branch; default: %(default)s")
    add("--cluster-prompts", action="store_true", help="repel a prompt from all classes of its cluster")
    add("--branch", type=Path, metavar="FILE", help="with --stage plain: OUT/refine.clusters.safetensors, a trained branch to "
        "be put into the host")  # fmt: skip
    add("--prompt-epochs", type=int, metavar="N", help="epochs over the cached features; default: those of the configuration")
    add("--seed", type=int, default=0, help="of Python, NumPy, torch and the prompts; hosts may set their own; "
        "default: %(default)s")  # fmt: skip
    add("--log-every", type=int, default=10, metavar="N", help="steps between two lines of OUT/STAGE.jsonl; "
        "default: %(default)s")  # fmt: skip
    add("--cpu", action="store_true", help="run a host with hard-coded .cuda() on the CPU: for smoke tests")
    add("--restart", action="store_true", help="delete what an earlier run left in OUT")
    return parser


def _split(arguments: Sequence[str]) -> Tuple[List[str], List[str]]:
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Returns:
        Exit status: 0 done, 1 a stage failed, 2 wrong arguments; a script's own status where it has one.
    """
    ours, script = _split(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(ours)
    try:
        job = _job(options, script)
    except (TypeError, ValueError, FileNotFoundError, SemplesError) as error:
        parser.error(str(error))
    if options.stage == "all" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("--stage all starts processes of its own; under torchrun run --stage match, prompt and refine in turn.")
    online = job.facts["refiner"]["online_steps"] is not None
    stages = ["refine"] if options.prompts else [ONLINE] if online else list(STAGES)  # match is only for learning prompts
    if options.restart and int(os.environ.get("RANK", "0")) == 0:
        forget(job.out, stages if options.stage == "all" else [options.stage], options.stage == "all")
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        if options.dry_run is not None:
            return dry_run(job)
        if options.stage != "all":
            run_stage(job, options.stage)
            return 0
        rest = [part for part in ours if part != "--restart"]
        return run_all(
            job, stages, lambda stage: [sys.executable, "-m", "semples_plugin.adapters", *rest, "--stage", stage, "--", *script]
        )
    except SemplesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _clusters(text: str, classes: List[str]) -> CategoryClusters:
    if text.lower() in ("voc", "coco"):
        return CategoryClusters.bundled(text).ordered(classes)
    return CategoryClusters.load(text, classes)


def _branch_options(clusters: CategoryClusters, seed: int, assignments: Sequence[str]) -> Dict[str, Any]:
    """Arguments of a cluster branch, checked now and not after the host has read its data."""
    options = {"seed": seed, **parse_assignments("--branch-option", assignments)}
    known = [name for name in inspect.signature(ClusterBranch).parameters if name not in ("clusters", "dim")]
    for name in options:
        if name not in known:
            raise ValueError(f"--branch-option must name one of {', '.join(known)}; got {name!r}.")
    if options.get("attention_bias") == "-inf":  # no Python literal
        options["attention_bias"] = float("-inf")
    ClusterBranch(clusters, 8, **options)
    return options


def _check(options: argparse.Namespace, script: List[str]) -> None:
    """Refuse arguments that are wrong, or that do not go together, before anything is read or run."""
    repo = options.repo.resolve()
    if not script:
        raise ValueError("Give the host's script and its arguments after --, e.g. -- main.py --epochs 1.")
    if not (repo / script[0]).is_file():
        raise ValueError(f"There is no {script[0]} in {repo}.")
    for name in ("prompts", "checkpoint", "branch"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name}: there is no file {path}.")
    if options.cwd is not None and not options.cwd.is_dir():
        raise ValueError(f"--cwd: there is no folder {options.cwd}.")
    for name in ("log-every", "prompt-epochs", "dry-run"):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}.")
    check_number("--weight", options.weight, 0)
    check_number("--branch-lr", options.branch_lr, 0)
    if options.stage == "prompt" and options.prompts is not None:
        raise ValueError("--stage prompt writes OUT/prompts.safetensors; --prompts is for the refine stage.")
    if options.clusters is not None and options.stage == "plain":
        raise ValueError(
            "--stage plain trains nothing; a trained branch is put into the host by --branch OUT/refine.clusters.safetensors."
        )
    if options.branch is not None and options.checkpoint is not None and options.stage == "plain":
        raise ValueError(
            "--stage plain takes --checkpoint for a training script or --branch for one that writes CAM files; got both."
        )
    if options.branch is not None and options.stage != "plain":
        raise ValueError("--branch is for --stage plain; the other stages make and keep their own.")
    if (options.branch_option or options.cluster_prompts) and options.clusters is None:
        raise ValueError("--branch-option and --cluster-prompts need --clusters FILE.")
    out = _out(options)
    if options.checkpoint and options.prompts is None and options.stage in ("all", "match"):
        if options.checkpoint.resolve() == out / "match.pt":
            raise ValueError(
                f"--checkpoint {options.checkpoint} is what the match stage writes; give a copy of it, or another --out."
            )


def _out(options: argparse.Namespace) -> Path:
    return (options.out or Path("runs") / options.host).resolve()


OF_ATTACH = ("network", "label_loss", "labels", "forward_pass", "first_step", "last_step")


def _targets(options: argparse.Namespace) -> List[Tuple[Target, Dict[str, Any]]]:
    """The networks to attach to, each with the options of its adapter, for the record."""
    given = parse_assignments("--host-option", options.host_option)
    if options.stage == "plain" and options.checkpoint is None:
        return [(Target(options.host, CamSource(), {}), given)]
    if options.source is not None:
        source = _loaded("--source", options.source)(**given)
        if not isinstance(source, CamSource):
            raise ValueError(f"--source must name a CamSource; {options.source} gives {type(source).__name__}.")
    else:
        source = make_source(options.host, **given)
    common = {"mode": options.mode, "weight": options.weight}
    first = _for_attach({name: getattr(options, name) for name in OF_ATTACH if getattr(options, name) is not None})
    found = [
        (Target(options.host, source, {**common, **first}), {**given, **({"source": options.source} if options.source else {})})
    ]
    for text in options.attach:
        host, *assignments = shlex.split(text)
        values = parse_assignments("--attach", assignments)
        own = {name: values.pop(name) for name in OF_ATTACH if name in values}
        found.append((Target(host, make_source(host, **values), {**common, **_for_attach(own)}), values))
    return found


def _for_attach(options: Dict[str, Any]) -> Dict[str, Any]:
    """Options of `attach` as they are, from what a command line can say."""
    labels, which = options.get("labels"), options.get("forward_pass")
    if isinstance(labels, str) and ":" in labels and labels.partition(":")[0] not in ("loader", "forward"):
        options["labels"] = _loaded("--labels", labels)
    if isinstance(which, str) and which.isdigit():
        options["forward_pass"] = int(which)
    return options


def _loaded(option: str, text: str) -> Any:
    """`package.module:name` of the user's own code."""
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{option} must be package.module:name that Python can import from here; got {text!r} ({error})."
        ) from error


def _name_of(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _job(options: argparse.Namespace, script: List[str]) -> Job:
    _check(options, script)
    repo, out = options.repo.resolve(), _out(options)
    cwd = (options.cwd or repo).resolve()
    prompts, checkpoint, branch_file = (
        None if path is None else path.resolve() for path in (options.prompts, options.checkpoint, options.branch)
    )
    classes = read_class_names(options.classes)
    class_names = list(zip(*check_classes(classes)))  # with the names for CLIP
    clip = str(Path(options.clip).resolve()) if Path(options.clip).is_file() else options.clip
    given = parse_assignments("--set", options.set)
    if "seed" in given or ("epochs" in given and options.prompt_epochs is not None):
        raise ValueError("--set seed and --set epochs have options of their own, --seed and --prompt-epochs; give each once.")
    overrides = {"seed": options.seed, **given}
    clusters, branch_options = None, {}
    if options.clusters is not None:
        clusters = _clusters(options.clusters, list(classes))
        branch_options = _branch_options(clusters, options.seed, options.branch_option)
        if options.cluster_prompts:
            overrides["clusters"] = clusters.as_dict()
    config = config_for(options.classes).replace(**overrides)
    if (options.stage == ONLINE) != bool(config.online_steps) and options.stage not in ("all", "plain"):
        raise ValueError(
            "--set online_steps=N learns the prompts along the way, in the one stage online; got "
            f"--stage {options.stage} and online_steps={config.online_steps}. Use --stage all or online with --set "
            "online_steps=N, and leave it out for the three stages."
        )
    targets = _targets(options)
    described = [{"host": target.host, "adapter": given, **target.options} for target, given in targets]
    facts = {
        **described[0],
        "attach": described[1:],
        "script": script,
        "repo": str(repo),
        "cwd": str(cwd),
        "classes": class_names,
        "prompts": prompts and str(prompts),
        "checkpoint": checkpoint and str(checkpoint),
        "clip": clip,
        "refiner": config.as_dict(),
        "allow_others": options.allow_others,
        "prompt_epochs": options.prompt_epochs,
        "seed": options.seed,
        "cpu": options.cpu,
    }
    if clusters is not None:  # the record of a run without clusters does not mention them
        as_json = {key: str(value) if value == float("-inf") else value for key, value in branch_options.items()}
        facts["clusters"] = {"members": clusters.as_dict(), "options": as_json, "lr": options.branch_lr}
    facts = json.loads(
        json.dumps(facts, allow_nan=False, default=_name_of)
    )  # as they will be read from the record: a tuple becomes a list
    return Job(
        targets=[target for target, _ in targets],
        script=script,
        repo=repo,
        cwd=cwd,
        out=out,
        refiner=lambda: PromptRefiner(classes, clip, config),
        facts=facts,
        prompts=prompts or out / "prompts.safetensors",
        checkpoint=checkpoint,
        prompt_epochs=options.prompt_epochs,
        seed=options.seed,
        cpu=options.cpu,
        log_every=options.log_every,
        make_branch=None if clusters is None else lambda model: ClusterBranch(clusters, model, **branch_options),
        branch_lr=options.branch_lr,
        branch=branch_file,
        allow_others=options.allow_others,
        dry_run=options.dry_run,
    )


if __name__ == "__main__":
    sys.exit(main())
