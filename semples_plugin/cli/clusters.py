"""`semples clusters`: sort the classes into clusters that share features."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Dict, Optional

from .._checks import check_classes
from ..class_names import read_class_names
from .arguments import add_classes

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Asks a language model and refines its clusters until they no longer change (--model), groups CLIP's text features (--clip),
or checks a file written by hand (--file). The API key is read from a variable of the environment. OUT is replaced only by
complete clusters; if a language model fails, the questions and answers until then are in OUT with the ending .partial.json."""

MODEL_DEFAULTS: Dict[str, Any] = {  # of the options that matter only with --model
    "base_url": None,
    "api_key_env": None,
    "max_rounds": 8,
    "max_clusters": None,
    "initial_prompt": None,
    "refine_prompt": None,
    "max_tokens": None,
    "timeout": 60.0,
    "retries": 3,
    "accept_unconverged": False,
}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `semples`."""
    parser = commands.add_parser(
        "clusters",
        help="sort the classes into clusters that share features",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    add_classes(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the clusters, .json")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--model", metavar="NAME", help="ask this language model")
    add("--clip", metavar="NAME|FILE", help="group the text features of this CLIP")
    add("--file", type=Path, metavar="FILE", help="JSON: cluster name -> list of classes")
    parser.add_argument("--num-clusters", type=int, metavar="K",
                        help="with --clip: how many clusters (default: the number with the best silhouette)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the content of OUT as JSON, and nothing else")
    add = parser.add_argument_group("with --model").add_argument
    add("--base-url", metavar="URL", help="address of the server, such as http://localhost:11434/v1 (default: OpenAI's)")
    add("--api-key-env", metavar="NAME", help="variable that holds the API key (default: OPENAI_API_KEY)")
    add("--max-rounds", type=int, metavar="N", help="the most rounds (default: %(default)s)")
    add("--max-clusters", type=int, metavar="K", help="the most clusters (default: any number)")
    add("--initial-prompt", type=Path, metavar="FILE", help="text of the first question, with {classes}")
    add("--refine-prompt", type=Path, metavar="FILE", help="text of the later ones, with {classes} {clusters} {findings}")
    add("--max-tokens", type=int, metavar="N", help="the most tokens of an answer (default: the server's limit)")
    add("--timeout", type=float, metavar="S", help="seconds to wait for an answer (default: %(default)s)")
    add("--retries", type=int, metavar="N", help="how often a question is asked again (default: %(default)s)")
    add("--accept-unconverged", action="store_true", help="take the last clusters if they still change")
    parser.set_defaults(run=run, interrupted=_interrupted, **MODEL_DEFAULTS)


def run(options: argparse.Namespace) -> int:
    """Write the clusters and print them; returns 0."""
    from ..clusters.categories import CategoryClusters

    classes, out = read_class_names(options.classes), options.out
    given = [name for name, default in MODEL_DEFAULTS.items() if getattr(options, name) != default]
    if given and options.model is None:
        raise ValueError(f"--{given[0].replace('_', '-')} matters only with --model, which asks a language model.")
    if options.num_clusters is not None and options.clip is None:
        raise ValueError("--num-clusters matters only with --clip; --max-clusters limits what a language model may answer.")
    if out.suffix.lower() != ".json" or out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a .json file in a folder that exists; got {out}.")
    if options.file is not None:
        clusters = CategoryClusters.load(options.file, list(classes))
    elif options.clip is not None:
        clusters = _from_clip(options, classes)
    else:
        clusters = _from_model(options, classes)
    clusters.save(out)
    if options.model is not None:
        _partial(out).unlink(missing_ok=True)  # of an earlier run that failed
    if options.json:
        print(json.dumps(json.loads(out.read_text(encoding="utf-8"))))  # ASCII: control characters appear as escapes
        return 0
    for line in str(clusters).split("\n"):
        print(line)
    print(f"{len(clusters)} clusters of {len(classes)} classes{_origin(options, clusters)}: {out}")
    return 0


def _from_clip(options: argparse.Namespace, classes: Any) -> Any:
    import torch

    from ..clip_backends import load_clip
    from ..clusters.text_features import clusters_from_text_features

    names, prompt_names = check_classes(classes)
    encoder = load_clip(options.clip)
    with torch.no_grad():
        features = encoder.encode_text([f"a photo of a {name}." for name in prompt_names])  # (C, D)
    return clusters_from_text_features(names, features, options.num_clusters, clip=encoder.id)


def _from_model(options: argparse.Namespace, classes: Any) -> Any:
    from ..clusters.language_model import clusters_from_language_model

    return clusters_from_language_model(
        list(classes),
        options.model,
        base_url=options.base_url,
        api_key=_api_key(options.api_key_env),
        max_rounds=options.max_rounds,
        max_clusters=options.max_clusters,
        initial_prompt=options.initial_prompt,
        refine_prompt=options.refine_prompt,
        max_tokens=options.max_tokens,
        timeout=options.timeout,
        max_retries=options.retries,
        accept_unconverged=options.accept_unconverged,
        record=_partial(options.out),
        listener=None if options.json else _print_round,
    )


def _api_key(variable: Optional[str]) -> Optional[str]:
    if variable is not None and not os.environ.get(variable):
        raise ValueError(  # does not repeat what was given, which may be the key
            "--api-key-env must name a variable that holds the API key; the one that is given does not. Set it, and never "
            "give the key itself."
        )
    return None if variable is None else os.environ[variable]


def _print_round(one: Any) -> None:
    """Print one round of the questions: its number of clusters, and what changed or was found to be wrong."""
    if one.clusters is None:
        print(f"round {one.number}: no valid clusters")
    else:
        print(f"round {one.number}: {len(one.clusters)} clusters{', as before' if one.changed == [] else ''}")
    for line in one.changed or ():
        print(f"  {line}")
    for line in one.findings:
        print(f"  {line}" if one.clusters is None else f"  (accepted) {line}")


def _origin(options: argparse.Namespace, clusters: Any) -> str:
    """How the clusters were found, for the last line."""
    record = clusters.provenance
    if options.model is not None:
        rounds = len(record["rounds"])
        return (
            f"; fixed point after {rounds} rounds" if record["converged"] else f"; no fixed point in {rounds} rounds, accepted"
        )
    if options.clip is not None:
        score = record["silhouettes"].get(str(len(clusters)))
        return f"; number of clusters: {record['num_clusters']}{'' if score is None else f', silhouette {score:.2f}'}"
    return ""


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial.json")


def _interrupted(options: argparse.Namespace) -> str:
    if options.model is None:
        return "`semples clusters` starts anew with the same command."
    partial = _partial(options.out)
    record = f" The record of all answers so far is in {partial}." if partial.is_file() else ""
    return f"{options.out} is as it was.{record}"
