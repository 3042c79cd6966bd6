"""What a run needs and does not find, all of it at once, with where it comes from; and the lists that the run works on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import numpy as np

from semples_plugin.clip_backends import published_clips

from .chain import write_json
from .datasets import MCTFORMER, DataSet, Lists, Missing

HOST_IMPORTS = ("torch", "torchvision", "timm", "sklearn", "cv2", "PIL", "scipy")


def check(
    data: DataSet,
    lists: Lists,
    clip: Optional[str],
    python: str,
    gpu: bool,
    out: Path,
    needed_bytes: int,
) -> List[Missing]:
    """All that is missing, in the order of the steps that would need it.

    Args:
        data: the data set.
        lists: of the data set.
        clip: name or file of the CLIP, None for a random one.
        python: interpreter of the host's environment.
        gpu: whether the host needs a GPU.
        out: folder of the run.
        needed_bytes: estimate of what the run writes.
    """
    found = [*data.missing(lists), *data.missing_labels(lists)]
    if not (data.repo / "main.py").is_file():
        found.append(Missing(f"the host's script {data.repo / 'main.py'}", MCTFORMER))
    found += _environment(python, gpu)
    if clip is not None and not (clip in published_clips() or clip.startswith(("open_clip:", "hf:")) or Path(clip).is_file()):
        known = ", ".join(published_clips())
        source = f"--clip takes a weights file, or what is downloaded: {known}, open_clip:ARCH/TAG, hf:NAME"
        found.append(Missing(f"CLIP {clip}", source))
    place = out
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    if free + written < needed_bytes:
        found.append(
            Missing(f"disk space: about {gigabytes(needed_bytes)} are needed in {out}, {gigabytes(free)} are free",
                    "choose another --out, or free some")
        )  # fmt: skip
    return found


def _environment(python: str, gpu: bool) -> List[Missing]:
    """What the host imports, tried in its own interpreter."""
    code = (
        "import importlib, json\nbad = {}\n"
        f"for name in {(*HOST_IMPORTS, 'semples_plugin.adapters')!r}:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except Exception as error:\n        bad[name] = f'{type(error).__name__}: {error}'\n"
        "import torch\nprint(json.dumps([bad, torch.cuda.is_available()]))"
    )
    try:
        done = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600)
        bad, has_gpu = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        return [
            Missing(f"a Python with torch at {python} ({type(error).__name__})", "--python: that of the host's environment")
        ]
    source = (
        f"in the host's environment ({python}): pip install timm scikit-learn opencv-python-headless scipy, and --editable ."
    )
    found = [Missing(f"import of {name}: {why}", source) for name, why in bad.items()]
    if gpu and not has_gpu:
        found.append(Missing("a GPU that torch can use", f"run on a machine with one ({python}), or rehearse with --cpu"))
    return found


def gigabytes(count: float) -> str:
    """Bytes in GB, in words."""
    return f"{count / 1e9:.1f} GB"


def write_lists(out: Path, data: DataSet, lists: Lists) -> None:
    """Write the lists and the image-level labels of their images, in the layout that the host reads.

    Args:
        out: folder. `all/` holds the host's lists for training and CAM files, `train/` the same with the images of train
            alone, `cls_labels.npy` the labels, and `images.json` every photo and mask with its size in bytes.
        data, lists: as for `check`.
    """
    known = data.read_labels()
    for folder, ids in (("all", lists.train_aug), ("train", lists.train)):
        write_host_lists(out / folder, data, ids, lists.val)
    for name, ids in zip(("train_aug", "train", "val"), lists):
        write_ids(out / f"{name}.txt", ids)
    wanted = list(dict.fromkeys([*lists.train_aug, *lists.val]))
    rows: Dict[str, np.ndarray] = {name: known[name].astype(np.float32) for name in wanted}
    with (out / "cls_labels.npy").open("wb") as file:
        np.save(file, np.array(rows, dtype=object), allow_pickle=True)
    write_json(out / "images.json", {"pairs": int(sum(row.sum() for row in rows.values())), **data.sizes(lists)})


def write_host_lists(folder: Path, data: DataSet, train: Sequence[str], val: Sequence[str]) -> None:
    """The lists of ids that the host reads."""
    for name in data.train_lists:
        write_ids(folder / name, train)
    write_ids(folder / "val_id.txt", val)


def write_ids(path: Path, ids: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")


def count_pairs(data: DataSet, ids: Sequence[str]) -> int:
    """Pairs of an image and one of its classes; 0 where the labels cannot be read."""
    try:
        known = data.read_labels()
    except (OSError, ValueError):
        return 0
    return int(sum(int(known[name].sum()) for name in ids if name in known))


def report(found: Sequence[Missing]) -> str:
    """All of it as text."""
    return "\n".join([f"{len(found)} things are missing:", *map(str, found)])
