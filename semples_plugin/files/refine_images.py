"""One chunk of images and CAM files -> refined CAM files and pseudo labels. A bad file fails its own image, not the run.

Flow: `cam_folder` -> **refine_images** (read, refine, write) -> `refine_folder`, in its process or in worker processes. Every
file appears whole or not at all.
"""

from __future__ import annotations

import copy
import errno
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks, regions
from .._files import write_atomically
from ..errors import CamFileError
from ..mask_proposals import ProposalAlign
from ..refiner import PromptRefiner
from .cam_folder import CamItem, LoadedCam, cam_tensor, load
from .cams import CamFile, write_cam_file
from .images import write_label_png
from .large_images import label_map, masks_of_large

__all__ = ["ChunkResult", "Job", "Options", "Proposals", "Refined", "done", "read", "refine", "refine_chunk", "write"]


class Options(NamedTuple):
    """How a folder is refined.

    Attributes:
        threshold: background score of the pseudo labels, or two, (low, high): pixels between them are 255.
        align: `"pamr"` or `"crf"` to align the masks to the edges of the image, or None.
        suppress: weight the CAMs by CLIP's dense features; needs a refiner.
        clip_steps: gradient steps on the refiner's losses; needs a refiner.
        batch_size: images per chunk.
        max_pixels: larger images are refined in the way that `large` says, one at a time.
        large: `"tiles"` to align the masks of larger images tile by tile at full size, while CLIP sees the image at
            `max_pixels`; `"shrink"` to do everything at `max_pixels` and enlarge the masks. Tiles need `align="pamr"` or None
            and no proposals; otherwise larger images are shrunk.
        soft_masks: whether to write the refined masks also as 8-bit `.npz` files.
    """

    threshold: masks.Threshold = 0.4
    align: Optional[str] = "pamr"
    suppress: bool = False
    clip_steps: int = 0
    batch_size: int = 8
    max_pixels: int = 1_000_000
    large: str = "tiles"
    soft_masks: bool = False


Proposals = Callable[[LoadedCam], Any]  # an image -> its masks (M, h, w) bool, at the size of `img`


class Job:
    """What all chunks of a run share. A copy in another process builds its own refiner, once it is needed.

    Attributes:
        tiles: whether large images are aligned tile by tile.
    """

    def __init__(
        self,
        out: Path,
        num_classes: int,
        options: Options,
        labels: Optional[Dict[str, np.ndarray]] = None,
        refiner: Optional[PromptRefiner] = None,
        proposals: Optional[Proposals] = None,
        build: Optional[Callable[[], PromptRefiner]] = None,
    ):
        """See `refine_folder`; `build` makes a refiner that is equal to `refiner`."""
        self.out, self.num_classes, self.options, self.labels = out, num_classes, options, labels
        self.proposals, self._refiner, self._build = proposals, refiner, build
        self.tiles = options.large == "tiles" and options.align in ("pamr", None) and proposals is None  # of large images

    @property
    def refiner(self) -> Optional[PromptRefiner]:
        """The refiner of this process, or None if the job has none."""
        if self._refiner is None and self._build is not None:
            self._refiner = self._build()
        return self._refiner

    def is_large(self, item: CamItem) -> bool:
        """Whether an image has more pixels than are refined at once."""
        return item.size[0] * item.size[1] > self.options.max_pixels

    def without_models(self) -> "Job":
        """The job for a worker that only reads and writes, which needs no model of its own."""
        job = copy.copy(self)
        job.proposals, job._refiner, job._build = None, None, None
        return job

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_refiner": None}


class Refined(NamedTuple):
    """The refined masks of an image, and what its CAM file is to look like."""

    item: CamItem
    cams: Dict[int, np.ndarray]  # present class -> (H, W) float32
    layout: str
    low: Optional[Tuple[int, int]]


class ChunkResult(NamedTuple):
    """How many images of a chunk were refined, how many of them have no positive label, and id -> reason of the failed."""

    refined: int
    empty: int
    failed: Dict[str, str]


def refine_chunk(job: Job, chunk: Sequence[CamItem], wanted: "set[str]") -> ChunkResult:
    """Read, refine and write a chunk.

    Args:
        job: of the run.
        chunk: images of one size. All of them are refined, so that the bytes do not depend on what is done already.
        wanted: ids of those that are written.

    Raises:
        CamFileError: if there is no use to go on, as with a full disk.
    """
    loaded, failed = read(job, chunk)
    results, empty = refine(job, loaded, wanted, failed)
    count = 0
    for one in results:
        why = write(job, one)
        if why is None:
            count += 1
        else:
            failed[one.item.name] = why
    return ChunkResult(count, empty, failed)


def read(job: Job, chunk: Sequence[CamItem]) -> Tuple[List[LoadedCam], Dict[str, str]]:
    """What could be read of a chunk, and id -> reason for the others."""
    return load(chunk, job.labels, job.num_classes, job.options.max_pixels, keep_large=job.tiles)


def refine(job: Job, loaded: Sequence[LoadedCam], wanted: "set[str]", failed: Dict[str, str]) -> Tuple[Iterator[Refined], int]:
    """The refined masks of the wanted images, one after the other, and how many of these have no positive label.

    Args:
        job: of the run.
        loaded: the chunk.
        wanted: ids.
        failed: gets id -> reason of the images that cannot be refined, at the latest when all results were taken.
    """
    aligns = _aligns(loaded, job, failed)
    loaded = [one for one in loaded if one.item.name in aligns]
    empty = sum(not one.labels.any() for one in loaded if one.item.name in wanted)
    return _refined(job, loaded, wanted, aligns, failed), empty


def _aligns(loaded: Sequence[LoadedCam], job: Job, failed: Dict[str, str]) -> Dict[str, Any]:
    """How the masks of each image are aligned; images whose proposals cannot be had are in `failed` instead."""
    options, proposals = job.options, job.proposals
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


def _refined(
    job: Job, loaded: List[LoadedCam], wanted: "set[str]", aligns: Dict[str, Any], failed: Dict[str, str]
) -> Iterator[Refined]:
    """`refine`, by halves of the chunk where memory is short."""
    if not loaded:
        return
    result: Optional[List[Refined]] = None
    try:
        result = _results(job, loaded, wanted, aligns)
    except Exception as error:
        if not _out_of_memory(error):
            raise
    if result is not None:  # go on outside of this `except`, whose error holds the tensors of the failed try
        yield from result
    elif len(loaded) == 1:
        size = "{} x {}".format(*loaded[0].item.size)
        advice = "--large shrink" if job.tiles and job.is_large(loaded[0].item) else "a smaller --max-pixels"
        failed[loaded[0].item.name] = (
            f"not enough memory for its {size} pixels and {int(loaded[0].labels.sum())} classes; give {advice}"
        )
    else:
        half = len(loaded) // 2
        for part in (loaded[:half], loaded[half:]):
            yield from _refined(job, part, wanted, aligns, failed)


def _results(job: Job, loaded: List[LoadedCam], wanted: "set[str]", aligns: Dict[str, Any]) -> List[Refined]:
    refiner = job.refiner
    tiled = loaded[0].picture is not None
    no_masks: Iterable[Optional[Tensor]] = [None] * len(loaded)
    small = no_masks if tiled and refiner is None else _masks_of(loaded, job, {} if tiled else aligns)
    results = []
    for one, own in zip(loaded, small):
        if one.item.name not in wanted:
            continue
        if tiled:
            cams = masks_of_large(one, own, job.options.align, refiner.device if refiner else "cpu")
        else:
            assert own is not None
            cams = _at_full_size(own, one)
        results.append(Refined(one.item, cams, one.content.layout, one.content.low))
    return results


def _at_full_size(small: Tensor, one: LoadedCam) -> Dict[int, np.ndarray]:
    present = one.labels.nonzero()[0].tolist()
    if not present:
        return {}
    full = F.interpolate(small[None], size=one.item.size, mode="bilinear", align_corners=False)[0]  # (K, H, W)
    return {k: value for k, value in zip(present, full.cpu().numpy())}


def _masks_of(loaded: List[LoadedCam], job: Job, aligns: Dict[str, Any]) -> Iterator[Tensor]:
    """Refined masks (K, h, w) of the present classes of each image. Memory does not grow with the classes that are absent."""
    refiner, options = job.refiner, job.options
    if refiner is None:
        for one in loaded:  # the alignment works on one image after the other anyway
            cam = cam_tensor(one.content, one.img.shape[1:], one.labels.nonzero()[0].tolist())[None]  # (1, K, h, w)
            pairs = regions.positive_pairs(torch.ones(cam.shape[:2]))
            yield masks.cam_to_masks(one.img[None], cam, pairs, align=[aligns.get(one.item.name)])[0]
        return
    present = torch.from_numpy(np.stack([one.labels for one in loaded]))  # (B, C)
    classes = present.any(0).nonzero()[:, 0].tolist() or [0]  # U, those of the chunk
    present = present[:, classes].to(refiner.device)  # (B, U)
    img = torch.stack([one.img for one in loaded]).to(refiner.device)  # (B, 3, h, w)
    cam = torch.stack([cam_tensor(one.content, img.shape[2:], classes) for one in loaded]).to(img)  # (B, U, h, w)
    align = [aligns.get(one.item.name) for one in loaded]
    result = refiner.refine_masks(
        img, cam, present, suppress=options.suppress, align=align, clip_steps=options.clip_steps, classes=classes
    )
    for own, labels in zip(result.masks, present):
        yield own[labels > 0]


def write(job: Job, one: Refined) -> Optional[str]:
    """Write all files of one image, the CAM file last: where it exists, the others exist too.

    Returns:
        Why it could not be written, or None if it was.

    Raises:
        CamFileError: if no further image could be written either.
    """
    if not (job.out / "settings.json").exists():
        raise CamFileError(
            f"{job.out} was removed or emptied while its images were refined; {one.item.name} and the rest are lost."
        )
    try:
        _write(job.out, one, job.options, job.num_classes)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_USE_TO_GO_ON:
            raise CamFileError(
                f"{one.item.name} could not be written to {job.out}: {error.strerror}. The images before it are done; the "
                "same command goes on from here."
            ) from error
        return f"could not be written: {' '.join(str(error).split())}"
    return None


def _write(out: Path, one: Refined, options: Options, num_classes: int) -> None:
    cams, size = one.cams, one.item.size
    if not all(np.isfinite(value).all() for value in cams.values()):
        raise CamFileError("its refined masks are not finite, so nothing is written; look at the range of its CAM")
    files = _targets(out, one.item.name, options)
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    write_label_png(files["labels"], label_map(cams, size, options.threshold))
    if options.soft_masks:
        levels = np.zeros((len(cams), *size), np.uint8)
        for level, value in zip(levels, cams.values()):
            level[:] = np.round(value * 255)
        content: Dict[str, np.ndarray] = {"keys": np.array(list(cams), np.int64), "masks": levels}
        write_atomically(files["masks"], lambda file: _savez(file, content))
    cams = {k: value.view(np.float32) for k, value in cams.items()}  # one dtype object: a pickle names it once, by any worker
    if one.layout == "array":
        absent = np.zeros(size, np.float32)
        cams = {k: cams.get(k, absent) for k in range(num_classes)}
    target = files["cams"].with_suffix(".npz") if one.layout == "npz" else files["cams"]
    write_cam_file(target, CamFile(cams, one.layout, one.low))


_NO_USE_TO_GO_ON = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "not enough memory" in text or "can't allocate" in text)
    )


def _targets(out: Path, name: str, options: Options) -> Dict[str, Path]:
    """The files of one image."""
    files = {"cams": out / "cams" / f"{name}.npy", "labels": out / "labels" / f"{name}.png"}
    if options.soft_masks:
        files["masks"] = out / "masks" / f"{name}.npz"
    return files


def done(out: Path, name: str, options: Options) -> bool:
    """Whether all files of an image are there."""
    files = _targets(out, name, options)
    cam = files.pop("cams")
    return (_whole(cam) or _whole(cam.with_suffix(".npz"))) and all(_whole(path) for path in files.values())


def _whole(path: Path) -> bool:
    """Whether there is such a file; an empty one is what a full disk leaves."""
    return path.is_file() and path.stat().st_size > 0


def _savez(file: Any, content: Dict[str, np.ndarray]) -> None:
    np.savez_compressed(file, **content)  # type: ignore[arg-type]
