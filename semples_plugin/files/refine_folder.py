"""A folder of CAM files -> refined CAM files and pseudo labels. A bad file fails its own image, not the run.

Flow: plan (read the size of every image, group the images by size into chunks) -> for each chunk: read, refine, write ->
summary. The chunks depend on the folder alone, not on what is done already or on the number of processes. An interrupted run
that is started again therefore ends with the same bytes. What is done with a chunk is in `refine_images`; with `workers` other
processes do all of it, or only read and write while this one keeps the GPU at work.
"""

from __future__ import annotations

import collections
import json
import time
from pathlib import Path
from typing import Any, Callable, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .. import masks
from .._files import remove_parts, write_atomically
from ..errors import CamFileError
from ..refiner import PromptRefiner
from .cam_folder import CamItem, chunks, plan
from .refine_images import ChunkResult, Job, Options, Proposals, done, read, refine, refine_chunk, write
from .workers import Workers

__all__ = ["Options", "Proposals", "Summary", "refine_folder", "write_summary"]

LARGE = ("tiles", "shrink")


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
    workers: int = 0,
    build: Optional[Callable[[], PromptRefiner]] = None,
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
        workers: number of processes that work beside this one, each with one thread; 0 for none. On a CPU each of them reads,
            refines and writes its own chunks. With a refiner or proposals on another device they read and write, and this
            process refines. The results do not depend on their number. A script that calls this needs
            `if __name__ == "__main__":`, and `proposals` that can be pickled.
        build: makes in a worker what `refiner` is here, such as `functools.partial(PromptRefiner.load, path)`: a refiner is
            not sent to other processes. Needed for `workers` and a `refiner` on the CPU; each worker holds its own CLIP.
        shard: (index, number) of this process among those that share the work.
        progress: whether to show a progress bar.
        settings: everything else that decides the result (prompts, CLIP), as JSON can hold it. `out/settings.json` records it.

    Raises:
        ValueError: if `options` needs a refiner and there is none, workers need `build` and there is none, or there are more
            than 254 classes, which label maps of 8 bits do not hold.
        CamFileError: if the folder has no CAM file, or `out` holds results of other settings.
        WorkerError: if a worker was killed. What is written until then is whole, and counts when the run is started again.
    """
    from tqdm import tqdm

    masks.check_align(options.align, 1)
    masks.check_class_count(num_classes)
    if (options.suppress or options.clip_steps) and refiner is None:
        raise ValueError("`suppress` and `clip_steps` use CLIP, so they need a refiner; got none.")
    if options.large not in LARGE:
        raise ValueError(f"`large` must be 'tiles' or 'shrink'; got {options.large!r}.")
    devices = [getattr(what, "device", "cpu") for what in (refiner, proposals) if what is not None]
    here = any(str(device).partition(":")[0] != "cpu" for device in devices)  # where the images are refined
    if workers and refiner is not None and not here and build is None:
        raise ValueError("`workers` and a `refiner` on the CPU need `build`, which makes the refiner anew in each; got none.")
    start = time.monotonic()
    items, failed = plan(cams, images)
    _remember(out, {**options._asdict(), **(settings or {})})
    _remove_parts(out)
    every = chunks(items, options.batch_size, options.max_pixels)
    mine = [chunk for i, chunk in enumerate(every) if i % shard[1] == shard[0]]
    failed = {name: why for i, (name, why) in enumerate(sorted(failed.items())) if i % shard[1] == shard[0]}
    todo = [_Part(chunk, {item.name for item in chunk if not done(out, item.name, options)}) for chunk in mine]
    todo = [part for part in todo if part.wanted]
    count = sum(map(len, mine))
    skipped = count - sum(len(part.wanted) for part in todo)
    job = Job(out, num_classes, options, labels, refiner, proposals, build)
    results: Dict[int, ChunkResult] = {}
    number = min(workers, len(todo))
    run = _one_by_one(job, todo) if not number else (_refined_here if here else _refined_by_workers)(job, todo, number)
    ahead = count - sum(len(part.chunk) for part in todo)  # images of parts that are done
    with tqdm(total=count, initial=ahead, desc="refining", disable=not progress) as bar:
        try:
            for i, result in run:
                results[i] = result
                bar.update(len(todo[i].chunk))
        except BaseException:
            run.close()  # ends the workers, whose parts can be removed then
            _remove_parts(out)
            raise
    for i in sorted(results):
        failed.update(results[i].failed)
    refined, empty = (sum(getattr(result, name) for result in results.values()) for name in ("refined", "empty"))
    return Summary(refined, skipped, empty, failed, time.monotonic() - start)


class _Part(NamedTuple):
    """A chunk, and which of its images are to be written."""

    chunk: List[CamItem]
    wanted: "set[str]"

    def __str__(self) -> str:
        names = sorted(self.wanted)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_Results = Generator[Tuple[int, ChunkResult], None, None]  # number of a part, its result


def _one_by_one(job: Job, parts: Sequence[_Part]) -> _Results:
    for i, part in enumerate(parts):
        yield i, refine_chunk(job, part.chunk, part.wanted)


def _refined_by_workers(job: Job, parts: Sequence[_Part], number: int) -> _Results:
    """Each worker reads, refines and writes whole parts."""
    with Workers(number, job) as workers:
        for i, part in enumerate(parts):
            workers.submit(i, str(part), refine_chunk, part.chunk, part.wanted)
        for _ in parts:
            yield workers.next()


def _refined_here(job: Job, parts: Sequence[_Part], number: int) -> _Results:
    """Workers read what comes next and write what is done, while this process refines."""
    waiting = collections.deque(enumerate(parts))
    counts: Dict[int, List[int]] = {}  # part -> images that are still being written, written, without label
    failed: Dict[int, Dict[str, str]] = {}
    reading, writing = 0, 0
    with Workers(number, job.without_models()) as workers:
        while waiting or reading or writing:
            while waiting and reading <= number and writing <= number * job.options.batch_size:  # bounds the memory
                i, part = waiting.popleft()
                workers.submit((i, None), str(part), read, part.chunk)
                reading += 1
            (i, name), value = workers.next()
            if name is None:
                reading -= 1
                loaded, failed[i] = value
                refined, empty = refine(job, loaded, parts[i].wanted, failed[i])
                counts[i] = [0, 0, empty]
                for one in refined:
                    workers.submit((i, one.item.name), one.item.name, write, one)
                    writing += 1
                    counts[i][0] += 1
            else:
                writing -= 1
                counts[i][0] -= 1
                if value is None:
                    counts[i][1] += 1
                else:
                    failed[i][name] = value
            if not counts[i][0]:
                yield i, ChunkResult(counts[i][1], counts[i][2], failed[i])


def _remove_parts(out: Path) -> None:
    for folder in (out, *(out / name for name in ("cams", "labels", "masks"))):
        remove_parts(folder)


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


def write_summary(path: Path, summary: Summary) -> None:
    """Write the summary as JSON."""
    text = json.dumps(summary._asdict(), indent=2, ensure_ascii=False)
    data = (text + "\n").encode("utf-8", "backslashreplace")  # names of files need not be text
    write_atomically(path, lambda file: file.write(data))
