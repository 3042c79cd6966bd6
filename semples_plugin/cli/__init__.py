"""`semples`: folders of CAM files in, better masks, figures and pictures out.

    semples refine --images JPEGImages --cams cam-npy --out refined      # CAMs -> refined CAMs and pseudo labels
    semples evaluate --pred refined/labels --gt SegmentationClass        # how good are they?
    semples report --images JPEGImages --before cam-npy --after refined/cams --gt SegmentationClass --out report.html
    semples prompts show voc_prompts.safetensors                         # what do the learned prompts say?
    semples clusters --classes voc --model llama3.1 --base-url http://localhost:11434/v1 --out clusters.json

Exit status: 0 all done, 1 something failed (the summary says what), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from .. import __version__
from .._checks import check_classes
from ..class_names import read_class_names
from ..config import parse_assignments
from ..errors import SemplesError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="semples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    part = commands.add_parser(
        "refine",
        help="refine a folder of CAM files, without training",
        formatter_class=raw,
        description="Reads the CAM files of MCTformer, WeakTr, TransCAM, SEAM and IRN (.npy), plain arrays and .npz; writes\n"
        "OUT/cams (same layout), OUT/labels (palette PNGs, 0 background, 1 + class index) and OUT/summary.json.\n"
        "An interrupted run is taken up by the same command; under torchrun the processes share the work.",
    )
    part.add_argument("--images", type=Path, required=True, metavar="DIR", help="images, named as the CAM files")
    part.add_argument("--cams", type=Path, required=True, metavar="DIR", help="CAM files")
    part.add_argument("--out", type=Path, required=True, metavar="DIR", help="results")
    part.add_argument("--labels", type=Path, metavar="FILE", help="image-level labels: cls_labels.npy, .npz, .json, .csv, COCO "
                      "instances, or a folder of VOC XML (the classes in each CAM file)")  # fmt: skip
    part.add_argument("--classes", default="voc", metavar="voc|coco|FILE", help="class names, one per line or JSON (voc)")
    part.add_argument("--prompts", type=Path, metavar="FILE", help="learned background prompts, for --suppress and --optimize")
    part.add_argument("--clip", metavar="NAME", help="CLIP model or weights file (that of the prompts, else ViT-B/32)")
    part.add_argument("--threshold", type=float, default=0.4, help="background score (0.4)")
    part.add_argument("--align", choices=["pamr", "none"], default="pamr", help="follow the edges of the image (pamr)")
    part.add_argument("--suppress", action="store_true", help="weigh the CAMs with CLIP's dense features")
    part.add_argument("--optimize", type=int, default=0, metavar="N", help="gradient steps on the refiner's losses (0)")
    part.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="argument of PromptRefiner")
    part.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at once (8)")
    part.add_argument("--max-pixels", type=int, default=1_000_000, metavar="N", help="refine larger images at this size (1e6)")
    part.add_argument("--soft-masks", action="store_true", help="also write OUT/masks, 8-bit masks of the present classes")
    part.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
    part.add_argument("--json", action="store_true", help="print the summary as JSON")
    part.add_argument("--quiet", action="store_true", help="no progress bar")

    part = commands.add_parser(
        "evaluate",
        help="compare pseudo labels or CAM files with ground truth",
        formatter_class=raw,
        description="The VOC metric: one confusion matrix over the set, label 255 ignored. FP and FN are shares of the\n"
        "union, so that IoU + FP + FN = 100. For CAM files every background\n"
        "threshold is tried and the best one reported, with a note that it was chosen on ground truth; --threshold fixes it.",
    )
    part.add_argument("--pred", type=Path, required=True, metavar="DIR", help="label PNGs, or CAM files")
    part.add_argument("--gt", type=Path, required=True, metavar="DIR", help="ground-truth PNGs")
    part.add_argument("--list", type=Path, metavar="FILE", help="ids to evaluate, one per line (all predictions)")
    part.add_argument("--split", default="", help="name of the split, for the record (name of --list, else of --gt)")
    part.add_argument("--classes", default="voc", metavar="voc|coco|FILE", help="class names (voc)")
    part.add_argument("--threshold", type=float, help="background threshold for CAM files, chosen elsewhere")
    part.add_argument("--thresholds", default="0:100", metavar="FROM:TO", help="hundredths to try, TO excluded (0:100)")
    part.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    part.add_argument("--json", action="store_true", help="print everything as JSON")

    part = commands.add_parser("report", help="one HTML page of what a refinement changed")
    part.add_argument("--images", type=Path, required=True, metavar="DIR", help="images")
    part.add_argument("--before", type=Path, required=True, metavar="DIR", help="CAM files of the host")
    part.add_argument("--after", type=Path, required=True, metavar="DIR", help="refined CAM files")
    part.add_argument("--gt", type=Path, required=True, metavar="DIR", help="ground-truth PNGs")
    part.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page")
    part.add_argument("--list", type=Path, metavar="FILE", help="ids, one per line (all CAM files)")
    part.add_argument("--split", default="", help="name of the split, for the record")
    part.add_argument("--classes", default="voc", metavar="voc|coco|FILE", help="class names (voc)")
    part.add_argument("--prompts", type=Path, metavar="FILE", help="learned prompts to show with their nearest words")
    part.add_argument("--clip", metavar="NAME", help="the CLIP of the prompts")
    part.add_argument("--title", default="What the refinement changed", help="of the page")
    part.add_argument("--rows", type=int, default=8, help="images of each kind: improved, worse, random (8)")

    part = commands.add_parser("prompts", help="learned prompts")
    actions = part.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="what a prompt file holds; with its CLIP at hand, the nearest words")
    show.add_argument("file", type=Path, metavar="FILE", help="prompt file")
    show.add_argument("--clip", metavar="NAME", help="CLIP model or weights file, for the nearest words")
    show.add_argument("--vocabulary", type=Path, metavar="FILE", help="words to choose from, one per line")
    show.add_argument("--top", type=int, default=5, metavar="N", help="words per class (5)")
    show.add_argument("--json", action="store_true", help="print JSON")

    part = commands.add_parser(
        "clusters",
        help="sort the classes into clusters that share features",
        formatter_class=raw,
        description="Asks a language model and refines its clusters until they no longer change (--model), groups CLIP's text\n"
        "features (--clip), or checks a file written by hand (--file). The API key is read from a variable of the\n"
        "environment. OUT is replaced only by complete clusters; if a language model fails, what was said until then is in\n"
        "OUT with the ending .partial.json.",
    )
    part.add_argument("--classes", default="voc", metavar="voc|coco|FILE", help="class names, one per line or JSON (voc)")
    part.add_argument("--out", type=Path, required=True, metavar="FILE", help="the clusters, .json")
    source = part.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="NAME", help="ask this language model")
    source.add_argument("--clip", metavar="NAME|FILE", help="group the text features of this CLIP")
    source.add_argument("--file", type=Path, metavar="FILE", help="JSON or YAML: cluster name -> list of classes")
    part.add_argument("--num-clusters", type=int, metavar="K", help="with --clip: how many (that of the best silhouette)")
    asked = part.add_argument_group("with --model")
    asked.add_argument("--base-url", metavar="URL", help="address of the server, such as http://localhost:11434/v1 (OpenAI's)")
    asked.add_argument("--api-key-env", metavar="NAME", help="variable that holds the API key (OPENAI_API_KEY)")
    asked.add_argument("--max-rounds", type=int, metavar="N", help="the most rounds (8)")
    asked.add_argument("--max-clusters", type=int, metavar="K", help="the most clusters (any number)")
    asked.add_argument("--initial-prompt", type=Path, metavar="FILE", help="text of the first question, with {classes}")
    asked.add_argument("--refine-prompt", type=Path, metavar="FILE", help="of the later ones: {classes} {clusters} {findings}")
    asked.add_argument("--max-tokens", type=int, metavar="N", help="the most tokens of an answer (the server's limit)")
    asked.add_argument("--timeout", type=float, metavar="S", help="seconds to wait for an answer (60)")
    asked.add_argument("--retries", type=int, metavar="N", help="how often a question is asked again (3)")
    asked.add_argument("--accept-unconverged", action="store_true", default=None, help="take clusters that still change")
    part.add_argument("--json", action="store_true", help="print the content of OUT as JSON, and nothing else")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    commands = {"refine": _refine, "evaluate": _evaluate, "report": _report, "prompts": _prompts, "clusters": _clusters}
    try:
        return commands[options.command](options)
    except KeyboardInterrupt:
        print(_interrupted(options), file=sys.stderr)
        return 130
    except (SemplesError, OSError, ValueError, TypeError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in ("cv2", "PIL", "openai", "scipy", "sklearn", "yaml"):
            raise
        extra = "cli" if name in ("cv2", "PIL") else "clusters"
        print(f"error: {name} is missing. Install what the command line needs: pip install 'semples-plugin[{extra}]'.",
              file=sys.stderr)  # fmt: skip
        return 2


def _interrupted(options: argparse.Namespace) -> str:
    if options.command == "refine":
        return "interrupted; `semples refine` goes on from here with the same command."
    if options.command == "clusters" and options.model is not None:
        partial = _partial(options.out)
        kept = f" What was said so far is in {partial}." if partial.is_file() else ""
        return f"interrupted; {options.out} is as it was.{kept}"
    return f"interrupted; `semples {options.command}` starts anew with the same command."


# ---------------------------------------------------------------------------------------------------- refine


def _refine(options: argparse.Namespace) -> int:
    from ..files.labels import read_labels
    from ..files.refine_folder import Options, refine_folder, write_summary

    classes = read_class_names(options.classes)
    settings = parse_assignments("--set", options.set)
    if options.optimize < 0 or options.batch_size < 1 or options.max_pixels < 1:
        raise ValueError("--optimize must be at least 0, --batch-size and --max-pixels at least 1.")
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold must be from 0 to 1; got {options.threshold}.")
    ask_clip = options.suppress or options.optimize > 0
    for name in ("images", "cams"):
        inner, outer = options.out.resolve(), getattr(options, name).resolve()
        if inner == outer or outer in inner.parents:
            raise ValueError(f"--out {options.out} is inside --{name} {outer}; choose a folder of its own.")
    if not ask_clip and (options.prompts or options.clip or settings or options.device != "cpu"):
        raise ValueError(
            "--prompts, --clip, --set and --device matter only with --suppress or --optimize N; without them CLIP is not used."
        )
    labels = None if options.labels is None else read_labels(options.labels, list(classes))
    refiner = _refiner(options, classes, settings) if ask_clip else None
    how = Options(
        threshold=options.threshold,
        align=None if options.align == "none" else options.align,
        suppress=options.suppress,
        optimize=options.optimize,
        batch_size=options.batch_size,
        max_pixels=options.max_pixels,
        soft_masks=options.soft_masks,
    )
    facts: Dict[str, Any] = {
        "classes": list(classes),
        "cams": str(options.cams.resolve()),
        "images": str(options.images.resolve()),
    }
    facts["labels"] = None if options.labels is None else str(options.labels.resolve())
    if refiner is not None:
        facts.update(clip=refiner.encoder.id, prompts=_digest(options.prompts), refiner=settings)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    summary = refine_folder(
        options.cams, options.images, options.out, len(classes), how,
        labels=labels, refiner=refiner, shard=(rank, world), progress=not options.quiet and rank == 0, settings=facts,
    )  # fmt: skip
    write_summary(options.out / ("summary.json" if world == 1 else f"summary-{rank}-of-{world}.json"), summary)
    if options.json:
        print(json.dumps(summary._asdict(), ensure_ascii=False))
    else:
        rate = f", {summary.refined / summary.seconds:.1f} images/s" if summary.refined else ""
        print(f"{summary.refined} refined, {summary.kept} done before, {len(summary.failed)} failed{rate}: {options.out}")
        print(f"labels: background threshold {how.threshold:g}")
        if summary.empty:
            print(f"{summary.empty} images have no positive label; their pseudo labels are all background")
    _tell(summary.failed, options.out / "summary.json" if world == 1 else None)
    return 1 if summary.failed else 0


def _refiner(options: argparse.Namespace, classes: Any, settings: Mapping[str, Any]) -> Any:
    from ..refiner import PromptRefiner

    given = {"image_stats": None, **settings}
    if options.prompts is None:
        refiner = PromptRefiner(classes, clip=options.clip or "ViT-B/32", **given)
    else:
        refiner = PromptRefiner.load(options.prompts, clip=options.clip, **given)
        if refiner.classes != list(classes):
            raise ValueError(
                f"{options.prompts} was learned for {len(refiner.classes)} classes ({', '.join(refiner.classes[:3])}, ...) and "
                f"--classes names {len(classes)} ({', '.join(list(classes)[:3])}, ...). They must be the same, in this order."
            )
    try:
        return refiner.to(options.device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"--device {options.device!r} cannot be used: {why}") from error


def _digest(path: Optional[Path]) -> Optional[str]:
    import hashlib

    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _tell(failed: Mapping[str, str], where: Optional[Path], most: int = 20) -> None:
    """The failed images, the first of them if they are many."""
    for name, why in sorted(failed.items())[:most]:
        print(f"failed: {name}: {why}", file=sys.stderr)
    if len(failed) > most:
        print(f"failed: and {len(failed) - most} more{f', all in {where}' if where else ''}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- evaluate


def _ids(path: Optional[Path]) -> Optional[List[str]]:
    """Ids of a list file; of lines such as `/JPEGImages/2007_000032.jpg /Seg/...png` the stem of the first file."""
    if path is None:
        return None
    lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Path(line).stem if line.lower().endswith((".jpg", ".png", ".npy")) else line for line in lines]


def _evaluate(options: argparse.Namespace) -> int:
    from ..files.evaluate_folder import evaluate_cams, evaluate_labels

    names = ["background", *read_class_names(options.classes)]
    ids, split = _ids(options.list), options.split or (options.list.stem if options.list else options.gt.name)
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold must be from 0 to 1; got {options.threshold:g}.")
    if not options.pred.is_dir() or not options.gt.is_dir():
        raise ValueError(f"--pred and --gt must be folders; got {options.pred} and {options.gt}.")
    if any(options.pred.glob("*.np[yz]")):
        low, _, high = options.thresholds.partition(":")
        if not (low.isdigit() and high.isdigit() and int(low) < int(high) <= 100):
            raise ValueError(f"--thresholds takes two whole hundredths such as 0:60; got {options.thresholds!r}.")
        tried = [options.threshold] if options.threshold is not None else [i / 100 for i in range(int(low), int(high))]
        result = evaluate_cams(options.pred, options.gt, names, ids, tried, chosen=options.threshold is None)
    else:
        result = evaluate_labels(options.pred, options.gt, names, ids)
    result = result._replace(split=split)
    if options.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["class", "iou", "precision", "recall", "false_positive", "false_negative"])
        writer.writerows([["" if value is None else value for value in score] for score in result.classes])
        options.csv.write_text(text.getvalue(), encoding="utf-8")
    if not result.images:
        raise ValueError(
            f"None of the {len(result.failed)} images could be counted: {next(iter(result.failed.values()))}. "
            "Are --pred and --gt swapped, or of different images?"
        )
    print(json.dumps(result.as_json(), ensure_ascii=False) if options.json else str(result))
    _tell(result.failed, None)
    return 1 if result.failed else 0


# ---------------------------------------------------------------------------------------------------- report, prompts


def _report(options: argparse.Namespace) -> int:
    from ..files.report import write_report

    classes = read_class_names(options.classes)
    readings = _readings(options.prompts, options.clip, None, 5) if options.prompts else None
    if readings is not None and [reading.name for reading in readings] != list(classes):
        raise ValueError(f"{options.prompts} was learned for other classes than --classes names ({len(classes)}).")
    failed = write_report(
        options.out, options.images, options.before, options.after, options.gt, list(classes), ids=_ids(options.list),
        split=options.split or (options.list.stem if options.list else options.gt.name), title=options.title,
        rows=options.rows, readings=readings,
    )  # fmt: skip
    print(options.out)
    _tell(failed, None)
    return 1 if failed else 0


def _readings(file: Path, clip: Optional[str], vocabulary: Optional[Path], top: int) -> List[Any]:
    from ..refiner import PromptRefiner

    words = None
    if vocabulary is not None:
        words = [line.strip() for line in vocabulary.read_text(encoding="utf-8").splitlines() if line.strip()]
    return PromptRefiner.load(file, clip=clip, image_stats=None).nearest_words(words, top=top)


def _prompts(options: argparse.Namespace) -> int:
    from ..prompts import read_file

    found = read_file(options.file)
    shown: Dict[str, Any] = {**found._asdict(), "config": found.config.as_dict(), "vectors": list(found.context.shape)}
    del shown["context"]
    if options.clip is not None:
        readings = _readings(options.file, options.clip, options.vocabulary, options.top)
        shown["nearest_words"] = {r.name: {"class_similarity": r.class_similarity, "words": r.words} for r in readings}
    if options.json:
        print(json.dumps(shown, ensure_ascii=False))
        return 0
    print(f"{options.file}: {found.context.shape[0]} prompts of {found.context.shape[1]} vectors, CLIP {found.clip}")
    print(f"classes: {', '.join(found.classes)}")
    print(f"layout: {found.config.prompt_template!r}, class text: {found.config.text_template!r}")
    if options.clip is None:
        print("Give --clip to see the nearest words.")
    else:
        for reading in readings:
            print(f"  {reading}")
    return 0


# ---------------------------------------------------------------------------------------------------- clusters

_ASKED = {
    "base_url": "base_url", "max_rounds": "max_rounds", "max_clusters": "max_clusters", "max_tokens": "max_tokens",
    "initial_prompt": "initial_prompt", "refine_prompt": "refine_prompt", "timeout": "timeout", "retries": "max_retries",
    "accept_unconverged": "accept_unconverged", "api_key_env": "api_key",
}  # fmt: skip


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial.json")


def _clusters(options: argparse.Namespace) -> int:
    from ..clusters.categories import CategoryClusters
    from ..clusters.language_model import clusters_from_language_model

    classes, out = read_class_names(options.classes), options.out
    given = {name: getattr(options, name) for name in _ASKED if getattr(options, name) is not None}
    if given and options.model is None:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} matters only with --model, which asks a language model.")
    if options.num_clusters is not None and options.clip is None:
        raise ValueError("--num-clusters matters only with --clip; --max-clusters limits what a language model may answer.")
    if out.suffix.lower() != ".json" or out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"--out must be a .json file in a folder that exists; got {out}.")
    if options.file is not None:
        clusters = CategoryClusters.load(options.file, list(classes))
    elif options.clip is not None:
        clusters = _clip_clusters(options, classes)
    else:
        if "api_key_env" in given and not os.environ.get(given["api_key_env"]):
            raise ValueError(
                "--api-key-env must name a variable that holds the API key; the one that is given does not. Set it, and never "
                "give the key itself."
            )
        if "api_key_env" in given:
            given["api_key_env"] = os.environ[given["api_key_env"]]
        clusters = clusters_from_language_model(
            list(classes), options.model, record=_partial(out), listener=None if options.json else _show_round,
            **{_ASKED[name]: value for name, value in given.items()},
        )  # fmt: skip
    clusters.save(out)
    if options.model is not None:
        _partial(out).unlink(missing_ok=True)  # of an earlier run that failed
    if options.json:
        print(json.dumps(json.loads(out.read_text(encoding="utf-8"))))  # escapes what a terminal might obey
        return 0
    for line in str(clusters).split("\n"):
        _say(line)
    record = clusters.provenance
    how = f"{len(clusters)} clusters of {len(classes)} classes"
    if options.model is not None:
        rounds = len(record["rounds"])
        end = f"fixed point after {rounds} rounds" if record["converged"] else f"no fixed point in {rounds} rounds, accepted"
        how = f"{how}; {end}"
    elif options.clip is not None:
        scores = record["silhouettes"]
        score = f", silhouette {scores[str(len(clusters))]:.2f}" if str(len(clusters)) in scores else ""
        how = f"{how}; number of clusters: {record['num_clusters']}{score}"
    _say(f"{how}: {out}")
    return 0


def _clip_clusters(options: argparse.Namespace, classes: Any) -> Any:
    import torch

    from ..clip_backends import load_clip
    from ..clusters.text_features import clusters_from_text_features

    names, prompt_names = check_classes(classes)
    encoder = load_clip(options.clip)
    with torch.no_grad():
        features = encoder.encode_text([f"a photo of a {name}." for name in prompt_names])
    return clusters_from_text_features(names, features, options.num_clusters, clip=encoder.id)


def _show_round(one: Any) -> None:
    """A line per round, and one for all that was found or moved."""
    if one.clusters is None:
        _say(f"round {one.number}: no valid clusters")
    else:
        _say(f"round {one.number}: {len(one.clusters)} clusters{', as before' if one.changed == [] else ''}")
    for line in one.changed or ():
        _say(f"  {line}")
    for line in one.findings:
        _say(f"  {line}" if one.clusters is None else f"  (accepted) {line}")


def _say(text: str) -> None:
    """Print a line that holds text of others: control characters, and what stdout cannot show, as escapes."""
    from .._text import printable

    encoding = sys.stdout.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), flush=True)


if __name__ == "__main__":
    sys.exit(main())
