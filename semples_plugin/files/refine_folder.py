"""A folder of CAM files -> refined CAM files and pseudo labels. A bad file fails its own image, not the run.

Flow: plan (read the size of every image, group the images by size into chunks) -> for each chunk: read, refine, write ->
summary. The chunks depend on the folder alone, not on what is done already or on the number of processes. An interrupted run
that is started again therefore ends with the same bytes. Every file appears whole or not at all.
"""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks, regions
from .._files import remove_parts, write_atomically
from ..errors import CamFileError
from ..mask_proposals import ProposalAlign
from ..refiner import PromptRefiner
from .cam_folder import LoadedCam, cam_tensor, chunks, load, plan
from .cams import CamFile, write_cam_file
from .images import write_label_png

__all__ = ["Options", "Proposals", "Summary", "refine_folder", "write_summary"]


class Options(NamedTuple):
    """How a folder is refined.

    Attributes:
        threshold: background score of the pseudo labels, or two, (low, high): pixels between them are 255.
        align: `"pamr"` or `"crf"` to align the masks to the edges of the image, or None.
        suppress: weight the CAMs by CLIP's dense features; needs a refiner.
        clip_steps: gradient steps on the refiner's losses; needs a refiner.
        batch_size: images per chunk.
        max_pixels: images with more pixels are refined at a smaller size, and their masks are enlarged again.
        soft_masks: whether to write the refined masks also as 8-bit `.npz` files.
    """

    threshold: masks.Threshold = 0.4
    align: Optional[str] = "pamr"
    suppress: bool = False
    clip_steps: int = 0
    batch_size: int = 8
    max_pixels: int = 1_000_000
    soft_masks: bool = False


Proposals = Callable[[LoadedCam], Any]  # an image -> its masks (M, h, w) bool, at the size of `img`


class Summary(NamedTuple):
    """What happened to the images.

    Attributes:
        refined: number of images that this run refined.
        skipped: number of images that were done before.
        empty: how many of the refined images have no positive label.
        failed: id -> reason, for images that could not be refined.
        seconds: duration of the run.
    """

    refined: int
    skipped: int
    empty: int
    failed: Dict[str, str]
    seconds: float


def refine_folder(
    cams: Path,
    images: Path,
    out: Path,
    num_classes: int,
    options: Options,
    *,
    labels: Optional[Dict[str, np.ndarray]] = None,
    refiner: Optional[PromptRefiner] = None,
    proposals: Optional[Proposals] = None,
    shard: Tuple[int, int] = (0, 1),
    progress: bool = True,
    settings: Optional[Dict[str, Any]] = None,
) -> Summary:
    """Refine every CAM file of a folder. Images that are done already are skipped.

    Args:
        cams: folder of CAM files.
        images: folder of images, named as the CAM files.
        out: folder for the results: `cams/`, `labels/` and, with `soft_masks`, `masks/`.
        num_classes: C.
        options: how to refine.
        labels: image id -> (C,) multi-hot; by default the classes that each CAM file holds.
        refiner: a `PromptRefiner` built with `image_stats=None`; needed for `suppress` and `clip_steps`.
        proposals: gives the masks without a class of an image, array or tensor; the refined masks are then their unions, see
            `mask_proposals.choose_proposals`, chosen after `align` at the background threshold (of two, the higher). An error
            of it fails its own image.
        shard: (index, number) of this process among those that share the work.
        progress: whether to show a progress bar.
        settings: everything else that decides the result (prompts, CLIP), as JSON can hold it. `out/settings.json` records it.

    Raises:
        ValueError: if `options` needs a refiner and there is none.
        CamFileError: if the folder has no CAM file, or `out` holds results of other settings.
    """
    from tqdm import tqdm

    masks.check_align(options.align, 1)
    if (options.suppress or options.clip_steps) and refiner is None:
        raise ValueError("`suppress` and `clip_steps` use CLIP, so they need a refiner; got none.")
    start = time.monotonic()
    items, failed = plan(cams, images)
    _remember(out, {**options._asdict(), **(settings or {})})
    for part in (out, *(out / name for name in ("cams", "labels", "masks"))):
        remove_parts(part)
    mine = [chunk for i, chunk in enumerate(chunks(items, options.batch_size)) if i % shard[1] == shard[0]]
    failed = {name: why for i, (name, why) in enumerate(sorted(failed.items())) if i % shard[1] == shard[0]}
    refined = skipped = empty = 0
    bar = tqdm(total=sum(map(len, mine)), desc="refining", disable=not progress)
    for chunk in mine:
        todo = [item for item in chunk if not _done(out, item.name, options)]
        skipped += len(chunk) - len(todo)
        if todo:
            loaded, broken = load(chunk, labels, num_classes, options.max_pixels)
            failed.update(broken)
            aligns = _aligns(loaded, options, proposals, failed)
            loaded = [one for one in loaded if one.item.name in aligns]
            if loaded:
                empty += sum(not one.labels.any() for one in loaded if one.item in todo)
                wanted = {item.name for item in todo}
                refined += _refine_chunk(loaded, wanted, out, num_classes, options, refiner, aligns, failed)
        bar.update(len(chunk))
    bar.close()
    return Summary(refined, skipped, empty, failed, time.monotonic() - start)


def _aligns(
    loaded: List[LoadedCam], options: Options, proposals: Optional[Proposals], failed: Dict[str, str]
) -> Dict[str, Any]:
    """How the masks of each image are aligned; images whose proposals cannot be had are in `failed` instead."""
    if proposals is None:
        return {one.item.name: options.align for one in loaded}
    found: Dict[str, Any] = {}
    threshold = options.threshold[1] if isinstance(options.threshold, (tuple, list)) else options.threshold
    for one in loaded:
        try:
            found[one.item.name] = ProposalAlign(proposals(one), threshold=threshold, first=options.align)
        except CamFileError as error:
            failed[one.item.name] = str(error)
        except Exception as error:  # as of a model; one image must not end the run
            failed[one.item.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return found


def _remember(out: Path, settings: Dict[str, Any]) -> None:
    path = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2, sort_keys=True)
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if before.strip() != text:
            raise CamFileError(
                f"{out} holds results of other settings ({_differences(before, settings)}). Choose another folder."
            )
        return
    if any((out / part).exists() for part in ("cams", "labels", "masks")):
        raise CamFileError(f"{out} holds results without a settings.json. Choose another folder.")
    write_atomically(path, lambda file: file.write(text.encode()))


def _differences(before: str, settings: Dict[str, Any]) -> str:
    try:
        old = dict(json.loads(before))
    except (ValueError, TypeError):
        return "its settings.json is damaged"
    new = json.loads(json.dumps(settings))
    keys = [key for key in sorted({**old, **new}) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys)


def _targets(out: Path, name: str, options: Options) -> Dict[str, Path]:
    """The files of one image."""
    files = {"cams": out / "cams" / f"{name}.npy", "labels": out / "labels" / f"{name}.png"}
    if options.soft_masks:
        files["masks"] = out / "masks" / f"{name}.npz"
    return files


def _done(out: Path, name: str, options: Options) -> bool:
    files = _targets(out, name, options)
    cam = files.pop("cams")
    return (_whole(cam) or _whole(cam.with_suffix(".npz"))) and all(_whole(path) for path in files.values())


def _whole(path: Path) -> bool:
    """Whether there is such a file; an empty one is what a full disk leaves."""
    return path.is_file() and path.stat().st_size > 0


def _refine_chunk(
    loaded: List[LoadedCam],
    wanted: "set[str]",
    out: Path,
    num_classes: int,
    options: Options,
    refiner: Optional[PromptRefiner],
    aligns: Dict[str, Any],
    failed: Dict[str, str],
) -> int:
    try:
        result = _masks_of(loaded, num_classes, options, refiner, aligns)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        result = None  # go on outside of this `except`, whose error holds the tensors of the failed try
    if result is None and len(loaded) == 1:
        size = "{} x {}".format(*loaded[0].item.size)
        failed[loaded[0].item.name] = (
            f"not enough memory for its {size} pixels and {int(loaded[0].labels.sum())} classes; give a smaller --max-pixels"
        )
        return 0
    if result is None:
        half = len(loaded) // 2
        return sum(
            _refine_chunk(part, wanted, out, num_classes, options, refiner, aligns, failed)
            for part in (loaded[:half], loaded[half:])
        )
    count = 0
    for i, one in enumerate(loaded):
        if one.item.name in wanted:
            if not (out / "settings.json").exists():
                raise CamFileError(
                    f"{out} was removed or emptied while its images were refined; {one.item.name} and the rest are lost."
                )
            try:
                _write(out, one, result[i : i + 1], options)
                count += 1
            except Exception as error:
                failed[one.item.name] = f"could not be written: {' '.join(str(error).split())}"
                if isinstance(error, OSError) and error.errno in _NO_USE_TO_GO_ON:
                    raise CamFileError(
                        f"{one.item.name} could not be written to {out}: {error.strerror}. The images before it are done; the "
                        "same command goes on from here."
                    ) from error
    return count


_NO_USE_TO_GO_ON = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "not enough memory" in text or "can't allocate" in text)
    )


def _masks_of(
    loaded: List[LoadedCam], num_classes: int, options: Options, refiner: Optional[PromptRefiner], aligns: Dict[str, Any]
) -> Tensor:
    """Refined masks (B, C, h, w) of a chunk."""
    device = refiner.device if refiner is not None else torch.device("cpu")
    img = torch.stack([one.img for one in loaded]).to(device)  # (B, 3, h, w)
    present = torch.from_numpy(np.stack([one.labels for one in loaded])).to(device)  # (B, C)
    cam = torch.stack([cam_tensor(one.content, img.shape[2:], num_classes) for one in loaded]).to(device)  # (B, C, h, w)
    align = [aligns[one.item.name] for one in loaded]
    if refiner is None:
        return masks.cam_to_masks(img, cam, regions.positive_pairs(present), align=align)
    return refiner.refine_masks(img, cam, present, suppress=options.suppress, align=align, clip_steps=options.clip_steps).masks


def _write(out: Path, one: LoadedCam, result: Tensor, options: Options) -> None:
    """Write all files of one image, the CAM file last: where it exists, the others exist too."""
    present = one.labels.nonzero()[0].tolist()
    full = F.interpolate(result[:, present], size=one.item.size, mode="bilinear", align_corners=False) if present else None
    if full is None:
        label_map, cams = np.zeros(one.item.size, np.uint8), {}
    else:
        index = masks.pseudo_labels(full, options.threshold)[0].cpu().numpy()
        uncertain = index == masks.UNCERTAIN
        label_map = np.array([0, *(k + 1 for k in present)], np.uint8)[np.where(uncertain, 0, index)]
        label_map[uncertain] = masks.UNCERTAIN
        cams = {k: full[0, i].cpu().numpy() for i, k in enumerate(present)}
    if not all(np.isfinite(value).all() for value in cams.values()):
        raise CamFileError("its refined masks are not finite, so nothing is written; look at the range of its CAM")
    files = _targets(out, one.item.name, options)
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_label_png(files["labels"], label_map)
    if options.soft_masks:
        levels = np.stack([np.round(value * 255) for value in cams.values()]) if cams else np.zeros((0, *one.item.size))
        content: Dict[str, np.ndarray] = {"keys": np.array(present, np.int64), "masks": levels.astype(np.uint8)}
        write_atomically(files["masks"], lambda file: _savez(file, content))
    if one.content.layout == "array":
        cams = {k: cams.get(k, np.zeros(one.item.size, np.float32)) for k in one.content.cams}
    target = files["cams"].with_suffix(".npz") if one.content.layout == "npz" else files["cams"]
    write_cam_file(target, CamFile(cams, one.content.layout, one.content.low))


def _savez(file: Any, content: Dict[str, np.ndarray]) -> None:
    np.savez_compressed(file, **content)  # type: ignore[arg-type]


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON."""
    text = json.dumps(summary._asdict(), indent=2, ensure_ascii=False)
    data = (text + "\n").encode("utf-8", "backslashreplace")  # names of files need not be text
    write_atomically(path, lambda file: file.write(data))
