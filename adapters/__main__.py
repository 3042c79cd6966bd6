"""Run a host's own training script, unedited, with the refiner attached.

    python -m semples_plugin.adapters mctformer --repo MCTformer -- main.py --data-path VOCdevkit/VOC2012 ...

Stages: match (train with L_match), prompt (learn the background prompts with the host so trained), refine (train again from
the start with L_match + lambda L_refine); `all` runs the three, each in a process of its own, and goes on where it was
interrupted. `plain` runs the script with nothing attached, for baselines and for the host's CAM files.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .._checks import check_classes, check_number
from ..class_names import read_class_names
from ..clusters.branch import ClusterBranch
from ..clusters.categories import CategoryClusters
from ..config import COCO, VOC, parse_assignments
from ..errors import SemplesError
from ..refiner import PromptRefiner
from . import CamSource, names, source
from .runner.job import STAGES, Job
from .runner.record import forget
from .runner.stages import run_all, run_stage

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m semples_plugin.adapters",
        usage="%(prog)s HOST --repo DIR [options] -- SCRIPT [the script's own arguments]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("host", metavar="HOST", choices=names(), help=", ".join(names()))
    parser.add_argument(
        "--repo", type=Path, required=True, metavar="DIR", help="the host's folder; nothing in it is changed by us"
    )
    parser.add_argument("--stage", choices=["all", *STAGES, "plain"], default="all", help="(all)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="prompts, weights, logs, record (runs/HOST)")
    parser.add_argument("--cwd", type=Path, metavar="DIR", help="folder that the script runs in (the host's)")
    parser.add_argument("--classes", default="voc", metavar="voc|coco|FILE", help="names in label order; FILE: "
                        "one per line, or JSON list, or JSON mapping name -> name for CLIP (voc)")  # fmt: skip
    parser.add_argument("--clip", default="ViT-B/32", metavar="NAME", help="CLIP model or weights file (ViT-B/32)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="learned prompts: only the refine stage is run")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the host's own checkpoint, from which match and refine start (what the script starts from)",
    )
    parser.add_argument(
        "--mode", choices=["add", "replace"], default="add", help="add to the host's label loss, or replace it (add)"
    )
    parser.add_argument("--passes", type=int, default=1, metavar="N", help="forward passes of the host per label loss (1)")
    parser.add_argument("--weight", type=float, default=1.0, help="factor on the refiner's loss (1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="argument of PromptRefiner, e.g. lambda_area=1"
    )
    parser.add_argument(
        "--host-option", action="append", default=[], metavar="NAME=VALUE", help="of the adapter, e.g. cam=patch"
    )
    parser.add_argument(
        "--clusters", metavar="voc|coco|FILE", help="category clusters: train a cluster branch (PCC, CPC) with the host"
    )
    parser.add_argument(
        "--branch-option", action="append", default=[], metavar="NAME=VALUE", help="of ClusterBranch, e.g. lambda_contrast=0"
    )
    parser.add_argument("--branch-lr", type=float, default=1e-3, help="learning rate of the branch's own parameters (1e-3)")
    parser.add_argument("--cluster-prompts", action="store_true", help="push prompts away from all classes of the cluster")
    parser.add_argument(
        "--branch", type=Path, metavar="FILE", help="with --stage plain: OUT/refine.clusters.safetensors, to be in the host"
    )
    parser.add_argument("--prompt-epochs", type=int, metavar="N", help="epochs over the cached features (the recipe's)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of Python, NumPy, torch and the prompts; hosts may set their own (0)"
    )
    parser.add_argument(
        "--log-every", type=int, default=10, metavar="N", help="steps between two lines of OUT/STAGE.jsonl (10)"
    )
    parser.add_argument("--cpu", action="store_true", help="run a host with hard-coded .cuda() on the CPU: for smoke tests")
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run left in OUT")
    return parser


def _split(arguments: Sequence[str]) -> Tuple[List[str], List[str]]:
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Exit status: 0 done, 1 a stage failed, 2 wrong arguments; a script's own status where it has one."""
    ours, script = _split(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(ours)
    try:
        job = _job(options, script, parser)
    except (TypeError, ValueError, FileNotFoundError, SemplesError) as error:
        parser.error(str(error))
    if options.stage == "all" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("--stage all starts processes of its own; under torchrun run --stage match, prompt and refine in turn.")
    stages = ["refine"] if options.prompts else list(STAGES)  # match only serves to learn prompts
    if options.restart and int(os.environ.get("RANK", "0")) == 0:
        forget(job.out, stages if options.stage == "all" else [options.stage], options.stage == "all")
    if options.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
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


def _check_options(clusters: CategoryClusters, options: Dict[str, Any]) -> None:
    """Complete and check the arguments of a cluster branch."""
    known = [name for name in inspect.signature(ClusterBranch).parameters if name not in ("clusters", "dim")]
    for name in options:
        if name not in known:
            raise ValueError(f"--branch-option must name one of {', '.join(known)}; got {name!r}.")
    if options.get("attention_bias") == "-inf":  # no Python literal
        options["attention_bias"] = float("-inf")
    ClusterBranch(clusters, 8, **options)


def _job(options: argparse.Namespace, script: List[str], parser: argparse.ArgumentParser) -> Job:
    if not script:
        parser.error("Give the host's script and its arguments after --, e.g. -- main.py --epochs 1.")
    repo = options.repo.resolve()
    if not (repo / script[0]).is_file():
        parser.error(f"There is no {script[0]} in {repo}.")
    for name in ("prompts", "checkpoint", "branch"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name}: there is no file {path}.")
    if options.cwd is not None and not options.cwd.is_dir():
        parser.error(f"--cwd: there is no folder {options.cwd}.")
    if options.log_every < 1:
        parser.error(f"--log-every must be at least 1; got {options.log_every}.")
    if options.stage == "prompt" and options.prompts is not None:
        parser.error("--stage prompt writes OUT/prompts.safetensors; --prompts is for the refine stage.")
    if options.clusters is not None and options.stage == "plain":
        parser.error(
            "--stage plain trains nothing; a trained branch is put into the host by --branch OUT/refine.clusters.safetensors."
        )
    if options.branch is not None and options.stage != "plain":
        parser.error("--branch is for --stage plain; the other stages make and keep their own.")
    if (options.branch_option or options.cluster_prompts) and options.clusters is None:
        parser.error("--branch-option and --cluster-prompts need --clusters FILE.")
    check_number("cluster-rate", options.branch_lr, 0)
    classes = read_class_names(options.classes)
    clusters = None if options.clusters is None else _clusters(options.clusters, list(classes))
    branch_options = {"seed": options.seed, **parse_assignments("--branch-option", options.branch_option)}
    if clusters is not None:
        _check_options(clusters, branch_options)  # told now, not after the host has read its data
    told = list(zip(*check_classes(classes)))
    check_number("weight", options.weight, 0)
    check_number("passes", options.passes, 1, whole=True)
    if options.prompt_epochs is not None and options.prompt_epochs < 1:
        parser.error(f"--prompt-epochs must be at least 1; got {options.prompt_epochs}.")
    settings = parse_assignments("--set", options.set)
    adapter_options = parse_assignments("--host-option", options.host_option)
    clip = str(Path(options.clip).resolve()) if Path(options.clip).is_file() else options.clip
    config = COCO if options.classes.lower() == "coco" else VOC
    refiner_options = {"seed": options.seed, **settings}
    if options.cluster_prompts and clusters is not None:
        refiner_options["clusters"] = clusters.as_dict()
    out = (options.out or Path("runs") / options.host).resolve()
    if options.checkpoint and options.prompts is None and options.stage in ("all", "match"):
        if options.checkpoint.resolve() == out / "match.pt":
            parser.error(
                f"--checkpoint {options.checkpoint} is what the match stage writes; give a copy of it, or another --out."
            )
    facts = {
        "host": options.host,
        "script": script,
        "repo": str(repo),
        "cwd": str((options.cwd or repo).resolve()),
        "classes": told,
        "prompts": options.prompts and str(options.prompts.resolve()),
        "checkpoint": options.checkpoint and str(options.checkpoint.resolve()),
        "clip": clip,
        "refiner": config.replace(**refiner_options).as_dict(),
        "adapter": adapter_options,
        "mode": options.mode,
        "weight": options.weight,
        "passes": options.passes,
        "prompt_epochs": options.prompt_epochs,
        "seed": options.seed,
        "cpu": options.cpu,
    }
    if clusters is not None:  # a record of a run without them says nothing of them
        told_options = {key: str(value) if value == float("-inf") else value for key, value in branch_options.items()}
        facts["clusters"] = {"members": clusters.as_dict(), "options": told_options, "rate": options.branch_lr}
    facts = json.loads(json.dumps(facts, allow_nan=False))  # as the record will give them back
    return Job(
        host=options.host,
        source=CamSource() if options.stage == "plain" else source(options.host, **adapter_options),
        script=script,
        repo=repo,
        cwd=(options.cwd or repo).resolve(),
        out=out,
        refiner=lambda: PromptRefiner(classes, clip, config, **refiner_options),
        facts=facts,
        prompts=(options.prompts or out / "prompts.safetensors").resolve(),
        checkpoint=options.checkpoint.resolve() if options.checkpoint else None,
        prompt_epochs=options.prompt_epochs,
        mode=options.mode,
        weight=options.weight,
        passes=options.passes,
        seed=options.seed,
        cpu=options.cpu,
        log_every=options.log_every,
        clusters=None if clusters is None else lambda model: ClusterBranch(clusters, model, **branch_options),
        branch_lr=options.branch_lr,
        branch=options.branch.resolve() if options.branch else None,
    )


if __name__ == "__main__":
    sys.exit(main())
