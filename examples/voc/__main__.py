"""The chain on PASCAL VOC 2012 or MS COCO 2014, from a host in three stages to a segmentation network and one page of figures.

    python -m examples.voc --voc VOCdevkit/VOC2012 --host mctformer --repo MCTformer --out runs/voc
    python -m examples.voc --coco MSCOCO --host mctformer --repo MCTformer --out runs/coco
    python -m examples.voc ... --dry-run                      every command, with rough times and sizes; runs nothing
    python -m examples.voc ... --rehearsal --cpu --limit 6    the same chain, tiny and with random weights

Each step has a record in OUT/steps and is skipped when it is done. The same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import List, Optional, Sequence

from semples_plugin.cli.arguments import read_threshold
from semples_plugin.config import config_for, parse_assignments
from semples_plugin.errors import SemplesError
from semples_plugin.masks import check_threshold

from . import crf
from .chain import Chain, ChainError, Step
from .commands import make_steps
from .datasets import Coco, Voc
from .segmentation import Training
from .settings import INPUT_SIZE, Settings

REHEARSAL = Training(steps=12, batch_size=2, crop=64, warmup=2, every=4, workers=0)
OF_THE_CHAIN = (
    "--data-set --data-path --label-file-path --img-list --output_dir --finetune --resume --seed --input-size --epochs "
    "--device --num_workers --gen_attention_maps --cam-npy-dir --attention-dir --scales"
).split()  # arguments of the host's script that the chain sets
SMALL = {"input_size": 64, "epochs": 2, "batch_size": 3}  # of the host in a rehearsal


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.voc",
        usage="%(prog)s [options] [-- arguments of the host's training script]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--voc", type=Path, metavar="DIR", help="the folder VOCdevkit/VOC2012")
    data.add_argument("--coco", type=Path, metavar="DIR", help="the folder with train2014, val2014 and annotations")
    add("--host", choices=["mctformer"], default="mctformer", help="default: %(default)s (MCTformer+)")
    add("--repo", type=Path, required=True, metavar="DIR", help="clone of the host; nothing in it is changed")
    add("--out", type=Path, metavar="DIR", help="default: runs/voc or runs/coco")
    add("--labels", type=Path, metavar="FILE", help="image-level labels; default: the host's voc12/cls_labels.npy, or those "
        "of COCO's annotation files")  # fmt: skip
    add("--clip", default="ViT-B/32", metavar="NAME", help="CLIP model or weights file; default: %(default)s")
    add("--finetune", type=Path, metavar="FILE", help="the weights that the host starts from, DeiT-S; default: downloaded")
    add("--checkpoint", type=Path, metavar="FILE", help="a trained host from which match and refine start, as in the paper")
    add("--host-first", action="store_true", help="train the host with nothing attached first, as long as the others, and "
        "start those from it, as in the paper")  # fmt: skip
    add("--mode", choices=["add", "replace"], default="add", help="add to the host's label loss, or replace it, as in the "
        "paper; default: %(default)s")  # fmt: skip
    add("--python", default=sys.executable, metavar="FILE", help="interpreter of the host's environment; default: this one")
    add("--seeds", type=int, default=1, metavar="N", help="the chain for seeds 0 to N - 1; default: %(default)s")
    add("--gpus", type=int, metavar="N", help="default: all; the host is trained on one of them")
    add("--processes", type=int, metavar="N", help="that refine CAM files side by side; default: half as many as cores, in a "
        "rehearsal 1")  # fmt: skip
    add("--cpu", action="store_true", help="without a GPU: for rehearsals")
    add("--epochs", type=int, metavar="N", help="of the host; default: its own")
    add("--input-size", type=int, metavar="N", help="of the host; default: its own, in a rehearsal 64")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="option of the refiner, such as lambda_area=1")
    add("--online", type=int, metavar="N", help="one training in the place of match, prompt and refine: prompts are learned "
        "along the way, and join over N steps")  # fmt: skip
    add("--controls", action="store_true", help="take the host alone to the segmentation network too, and train with the area "
        "term alone, if it has a weight")  # fmt: skip
    add("--threshold", type=float, default=0.4, metavar="T", help="background score of the masks; default: %(default)s")
    add("--label-thresholds", default="0.3:0.5", metavar="LOW:HIGH", help="of the pseudo labels; default: %(default)s")
    add("--crf", choices=["auto", "off"], default="auto", help="auto: a dense CRF where pydensecrf is installed")
    add("--segmenter", default="nvidia/mit-b2", metavar="NAME", help="SegFormer of the Hugging Face hub, or a folder; "
        "default: %(default)s")  # fmt: skip
    add("--steps", type=int, metavar="N", help=f"of the segmentation network; default: {Training().steps}")
    add("--batch-size", type=int, metavar="N", help=f"of the segmentation network; default: {Training().batch_size}")
    add("--dry-run", action="store_true", help="print every command with rough times and sizes, and run nothing")
    add("--tflops", type=float, default=10.0, metavar="N", help="sustained by one GPU, for the times of a dry run; "
        "default: %(default)s, an assumption")  # fmt: skip
    add("--rehearsal", action="store_true", help="tiny sizes, few steps, random weights: the figures mean nothing")
    add("--limit", type=int, metavar="N", help="images of each list")
    return parser


def read_settings(options: argparse.Namespace, host_arguments: Sequence[str] = ()) -> Settings:
    """Settings from the command line.

    Args:
        host_arguments: what follows `--`.

    Raises:
        ValueError: for values that cannot be.
    """
    for word in host_arguments:
        if word.partition("=")[0] in OF_THE_CHAIN:
            raise ValueError(f"{word} after -- is set by the chain; --help lists its own options, such as --epochs.")
    low_high = read_threshold(options.label_thresholds)
    if not isinstance(low_high, tuple):
        raise ValueError(f"--label-thresholds takes two, such as 0.3:0.5; got {options.label_thresholds}.")
    check_threshold("--label-thresholds", low_high)
    check_threshold("--threshold", options.threshold)
    for name in ("seeds", "gpus", "processes", "online", "epochs", "input-size", "steps", "batch-size", "limit"):
        value = getattr(options, name.replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1; got {value}.")
    if options.limit is not None and not options.rehearsal:
        raise ValueError("--limit is for a --rehearsal; figures of a part of a data set compare with nothing.")
    if not options.tflops > 0:
        raise ValueError(f"--tflops must be above 0; got {options.tflops:g}.")
    for name in ("labels", "finetune", "checkpoint"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise ValueError(f"--{name}: there is no file {path}.")
    given = parse_assignments("--set", options.set)
    config_for("voc" if options.coco is None else "coco").replace(**given)  # refuses what is no option
    if "online_steps" in given:
        raise ValueError("--set online_steps changes the steps of the chain, so it has an option of its own: --online N.")
    training = REHEARSAL if options.rehearsal else Training()
    training = training._replace(
        **{name: value for name, value in (("steps", options.steps), ("batch_size", options.batch_size)) if value is not None}
    )
    gpus = 0 if options.cpu else _gpus(options.gpus, options.dry_run)
    if training.batch_size % max(1, gpus):
        raise ValueError(
            f"--batch-size must be a multiple of the number of GPUs; got {training.batch_size} and {gpus}. Give --gpus or "
            "another --batch-size."
        )
    if options.input_size not in (None, INPUT_SIZE) and not options.rehearsal and options.checkpoint is None:
        raise ValueError(
            f"--input-size {options.input_size}: the host takes the weights of DeiT-S at {INPUT_SIZE} pixels only. Give a "
            "--checkpoint that was trained at this size."
        )
    if options.host_first and options.checkpoint is not None:
        raise ValueError("--host-first trains what the others start from, which --checkpoint gives; take one of them.")
    small = SMALL if options.rehearsal else dict.fromkeys(SMALL)
    clip = str(Path(options.clip).resolve()) if Path(options.clip).is_file() else options.clip
    segmenter = str(Path(options.segmenter).resolve()) if Path(options.segmenter).is_dir() else options.segmenter
    absolute = {name: path and path.resolve() for name, path in vars(options).items() if isinstance(path, Path)}
    labels = absolute.get("labels")
    kind, root = (Voc, "voc") if options.coco is None else (Coco, "coco")
    data = kind(absolute[root], absolute["repo"], labels)
    return Settings(
        data=data,
        out=(options.out or Path("runs") / data.option).resolve(),
        clip=None if options.rehearsal else clip,
        finetune=absolute.get("finetune"),
        checkpoint=absolute.get("checkpoint"),
        python=options.python,
        seeds=options.seeds,
        gpus=gpus,
        cpu=options.cpu,
        rehearsal=options.rehearsal,
        limit=options.limit,
        host_first=options.host_first,
        mode=options.mode,
        host_arguments=tuple(host_arguments),
        epochs=options.epochs or small["epochs"],
        input_size=options.input_size or small["input_size"],
        batch_size=small["batch_size"],
        refiner=(*options.set, *(["prompt_length=4"] if options.rehearsal else [])),
        online=options.online,
        controls=options.controls,
        threshold=options.threshold,
        low=low_high[0],
        high=low_high[1],
        segmenter=segmenter,
        training=training,
        use_crf=options.crf == "auto" and crf.available(),
        processes=options.processes or (1 if options.rehearsal else max(1, (os.cpu_count() or 1) // 2)),
        tflops=options.tflops,
    )


def _gpus(given: Optional[int], dry_run: bool) -> int:
    import torch

    there = torch.cuda.device_count()
    if given is not None and given > there and not dry_run:
        raise ValueError(f"--gpus {given}: there are {there}.")
    return max(1, there) if given is None else given


def describe(chain: Chain, steps: Sequence[Step]) -> str:
    """What a dry run prints."""
    lines: List[str] = ["Nothing is run. Times and sizes are estimates; what each was reckoned from stands beside it.", ""]
    for number, step in enumerate(steps, 1):
        record = chain.record(step)
        took = "" if record is None else f" (a run in {chain.out} took {record['seconds']:g} s)"
        lines.append(f"[{number}/{len(steps)}] {step.name}: {step.what}")
        lines.append(f"    left out: {step.note}" if step.note else f"    estimate: {step.estimate}{took}")
        lines += [f"    $ {command}" for command in step.commands]
    return "\n".join(lines)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line. Returns 0 when all is done, 1 when something is missing or a step failed."""
    parser = make_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    try:
        settings = read_settings(options, words[end + 1 :])
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    chain = Chain(settings.out, lambda line: print(line, flush=True))
    try:
        steps = make_steps(settings)
        if options.dry_run:
            print(describe(chain, steps))
            return 0
        chain.run(steps)
    except (ChainError, SemplesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"All done: {settings.out / 'ledger.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
