"""`semples refine`: refine a folder of CAM files, without training."""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional

from ..class_names import read_class_names
from ..config import parse_assignments
from ..errors import CamFileError
from ..masks import CLIP_STEPS, Threshold, check_align, check_threshold
from .arguments import AUTO, add_classes, build_refiner, check_device, read_threshold
from .printing import print_failed

if TYPE_CHECKING:
    from ..files.cam_folder import LoadedCam
    from ..files.refine_folder import Proposals
    from ..sam import SamProposals

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Reads the CAM files of MCTformer, WeakTr, TransCAM, SEAM and IRN (.npy), plain arrays and .npz; writes OUT/cams (same
layout), OUT/labels (palette PNGs, 0 background, 1 + class index) and OUT/summary.json.
The same command resumes an interrupted run; under torchrun the processes share the work.

Without a CLIP the CAMs are aligned to the edges of the images. With one (--clip, --prompts or --suppress) they are first
aligned to CLIP, by --clip-steps gradient steps on the refiner's losses; each step encodes two views per image and class. With
--prompts, the configuration in that file counts, and --set overrides it. With --masks or --sam, each class becomes the union of
the masks that its CAM chooses."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `semples`."""
    parser = commands.add_parser(
        "refine",
        help="refine a folder of CAM files, without training",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="images, named as the CAM files")
    add("--cams", type=Path, required=True, metavar="DIR", help="CAM files")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    add("--labels", type=Path, metavar="FILE", help="image-level labels: cls_labels.npy, .npz, .json, .csv, COCO instances, "
        "or a folder of VOC XML (default: the classes in each CAM file)")  # fmt: skip
    add_classes(parser)
    add("--prompts", type=Path, metavar="FILE", help="learned background prompts; CLIP is used")
    add("--clip", metavar="NAME", help="CLIP model or weights file; CLIP is used (default: that of the prompts, else ViT-B/32)")
    add("--threshold", type=read_threshold, default=0.4, metavar="T|LOW:HIGH|auto", help="background score; with two, pixels "
        "between them are 255, which training leaves out; auto: chosen by CLIP on 200 of the images, without masks (default: "
        "%(default)s)")  # fmt: skip
    add("--align", choices=["pamr", "crf", "none"], default="pamr",
        help="how masks follow the edges of the image; crf needs pydensecrf (default: %(default)s)")  # fmt: skip
    add("--masks", type=Path, metavar="DIR", help="masks without a class, such as those of Segment Anything: ID.json (COCO run "
        "lengths), ID.png (label map) or ID/ (PNGs) per image; after --align, each class becomes the union of the masks that "
        "its CAM chooses at --threshold")  # fmt: skip
    add("--sam", metavar="MODEL", help="make these masks with a Segment Anything model, a name on the Hugging Face hub or a "
        "folder, on --device; needs transformers")  # fmt: skip
    add("--suppress", action="store_true", help="weight the CAMs by CLIP's dense features")
    add("--clip-steps", type=int, metavar="N",
        help=f"gradient steps on the refiner's losses, 0 for none (default: {CLIP_STEPS} where CLIP is used)")  # fmt: skip
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="option of RefinerConfig, such as lambda_area=1; may be given several times")  # fmt: skip
    add("--batch-size", type=int, default=8, metavar="N", help="images at once (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="processes beside this one, one thread each: with a GPU they read "
        "and write, else each refines its own share (default: %(default)s)")  # fmt: skip
    add("--max-pixels", type=int, default=1_000_000, metavar="N",
        help="images with more pixels are large (default: %(default)s)")  # fmt: skip
    add("--large", choices=["tiles", "shrink"], default="tiles", help="large images: align the masks tile by tile at full "
        "size (pamr and none; CLIP sees the image at --max-pixels), or refine at --max-pixels and enlarge the masks "
        "(default: %(default)s)")  # fmt: skip
    add("--soft-masks", action="store_true", help="also write OUT/masks, 8-bit masks of the present classes")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run, interrupted=lambda _: "`semples refine` goes on from here with the same command.")


def run(options: argparse.Namespace) -> int:
    """Refine the folder; returns 1 if an image failed, else 0."""
    from ..files.choose_folder import choose_folder
    from ..files.labels import read_labels
    from ..files.refine_folder import Options, refine_folder, write_summary

    classes = read_class_names(options.classes)
    overrides = parse_assignments("--set", options.set)
    clip_steps = options.clip_steps
    if clip_steps is None:
        clip_steps = CLIP_STEPS if options.clip or options.prompts or options.suppress else 0
    uses_clip = options.suppress or clip_steps > 0
    _check(options, overrides, uses_clip)
    check_align(None if options.align == "none" else options.align, 1)
    labels = None if options.labels is None else read_labels(options.labels, list(classes))
    auto = options.threshold == AUTO
    refiner = build_refiner(options, classes, overrides) if uses_clip or auto else None
    how = Options(
        threshold=0.0 if auto else options.threshold,
        align=None if options.align == "none" else options.align,
        suppress=options.suppress,
        clip_steps=clip_steps,
        batch_size=options.batch_size,
        max_pixels=options.max_pixels,
        large=options.large,
        soft_masks=options.soft_masks,
    )
    quiet = options.quiet or int(os.environ.get("RANK", "0")) > 0
    choice = None
    if auto:
        assert refiner is not None
        choice = choose_folder(options.cams, options.images, refiner, how, labels=labels, progress=not quiet)
        how = how._replace(threshold=choice.threshold)
    settings: Dict[str, Any] = {
        "classes": list(classes),
        "cams": str(options.cams.resolve()),
        "images": str(options.images.resolve()),
        "labels": None if options.labels is None else str(options.labels.resolve()),
    }
    proposals = _proposals(options)
    if proposals is not None:
        settings.update(masks=None if options.masks is None else str(options.masks.resolve()), sam=options.sam)
    if refiner is not None:
        settings.update(clip=refiner.encoder.id, prompts=_sha256(options.prompts), refiner=overrides)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    summary = refine_folder(
        options.cams,
        options.images,
        options.out,
        len(classes),
        how,
        labels=labels,
        refiner=refiner if uses_clip else None,
        proposals=proposals,
        workers=options.workers,
        build=functools.partial(build_refiner, _of_refiner(options), classes, overrides) if uses_clip else None,
        shard=(rank, world),
        progress=not quiet,
        settings=settings,
    )
    write_summary(options.out / ("summary.json" if world == 1 else f"summary-{rank}-of-{world}.json"), summary)
    if options.json:
        print(json.dumps(summary._asdict(), ensure_ascii=False))
    else:
        speed = f", {summary.refined / summary.seconds:.1f} images/s" if summary.refined else ""
        counts = f"{summary.refined} refined, {summary.skipped} done before, {len(summary.failed)} failed"
        print(f"{counts}{speed}: {options.out}")
        if refiner is not None:
            print(f"CLIP: {refiner.encoder.name}, {how.clip_steps} steps{', suppression' if how.suppress else ''}")
        chosen = "" if choice is None else f", chosen by CLIP on {choice.num_pairs} (image, class) pairs"
        print(f"labels: background threshold {_in_words(how.threshold)}{chosen}")
        if proposals is not None:
            print(f"masks: of {options.sam or options.masks}, chosen at {_high(how.threshold):g}")
        if summary.empty:
            print(f"{summary.empty} images have no positive label; their pseudo labels are all background")
    print_failed(summary.failed, options.out / "summary.json" if world == 1 else None)
    return 1 if summary.failed else 0


def _proposals(options: argparse.Namespace) -> Optional["Proposals"]:
    """What gives the masks without a class of an image, by `--masks` or `--sam`; None without them."""
    if options.masks is not None:
        folder: Path = options.masks
        if not folder.is_dir():
            raise CamFileError(f"Expected a folder of masks; there is no folder {folder}.")
        return _Folder(folder)
    if options.sam is None:
        return None
    check_device(options.device)
    sam = _Sam(options.sam, options.device)
    sam.load()  # so that a wrong model ends the run here
    if options.workers and options.device.partition(":")[0] == "cpu":
        sam.release()  # each worker loads its own
    return sam


class _Folder:
    """`--masks`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, one: "LoadedCam") -> Any:
        from ..files.proposals import read_proposals

        return read_proposals(self.folder, one.item.name, one.item.size, one.img.shape[1:])


class _Sam:
    """`--sam`; each process that calls it loads the model at its first call."""

    def __init__(self, model: str, device: str):
        self.model, self.device = model, device
        self._sam: Optional["SamProposals"] = None

    def __call__(self, one: "LoadedCam") -> Any:
        return self.load()(one.img)

    def load(self) -> "SamProposals":
        from ..sam import SamProposals

        if self._sam is None:
            self._sam = SamProposals(self.model, self.device)
        return self._sam

    def release(self) -> None:
        self._sam = None

    def __reduce__(self) -> Any:
        return _Sam, (self.model, self.device)


def _of_refiner(options: argparse.Namespace) -> argparse.Namespace:
    """What `build_refiner` reads of the options; all of them cannot be sent to a worker."""
    return argparse.Namespace(**{name: getattr(options, name) for name in ("classes", "prompts", "clip", "device")})


def _high(threshold: Threshold) -> float:
    return threshold[1] if isinstance(threshold, tuple) else threshold


def _in_words(threshold: Threshold) -> str:
    return f"{threshold[0]:g} to {threshold[1]:g}, 255 between" if isinstance(threshold, tuple) else f"{threshold:g}"


def _check(options: argparse.Namespace, overrides: Mapping[str, Any], uses_clip: bool) -> None:
    if (options.clip_steps or 0) < 0 or options.workers < 0 or options.batch_size < 1 or options.max_pixels < 1:
        raise ValueError("--clip-steps and --workers must be at least 0, --batch-size and --max-pixels at least 1.")
    auto = options.threshold == AUTO
    if not auto:
        check_threshold("--threshold", options.threshold)
    elif options.masks is not None or options.sam is not None:
        raise ValueError("--threshold auto chooses for masks that are made of the CAMs; with --masks or --sam give a number.")
    if options.masks is not None and options.sam is not None:
        raise ValueError("--masks and --sam both give masks without a class; choose one.")
    for name in ("images", "cams", "masks"):
        if getattr(options, name) is None:
            continue
        inner, outer = options.out.resolve(), getattr(options, name).resolve()
        if inner == outer or outer in inner.parents:
            raise ValueError(f"--out {options.out} is inside --{name} {outer}; choose a folder of its own.")
    device = options.device != "cpu" and options.sam is None
    if not (uses_clip or auto) and (options.prompts or options.clip or overrides or device):
        raise ValueError(
            "--prompts, --clip, --set and --device matter only where CLIP is used: give --clip NAME, --prompts FILE or "
            "--suppress, and no --clip-steps 0 without --suppress or --threshold auto."
        )


def _sha256(path: Optional[Path]) -> Optional[str]:
    import hashlib

    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
