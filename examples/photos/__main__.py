"""The photos experiment: CAM networks trained on image-level labels, trained on with the refiner and with its controls.

    python -m examples.photos --photos VOCdevkit/VOC2012 --labels image_labels.json --clip photo_clip.pt \\
        --squeezenet squeezenet1_1.safetensors --mobilenet mobilenet_v2.safetensors --seeds 5 --out runs/photos

`--photos` is laid out as VOC; `--labels` maps image ids to class names. `python -m examples.photos.train_clip` makes the CLIP.
Finished parts in `--out` are not computed again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch

from semples_plugin import cli

from ..seeds import cached_rows, paired_difference, select_rows, source_hash, spread
from ..train_clip import load_feature_clip
from . import experiment, hosts, train_clip
from .experiment import ALONE, AREA, BEST_AREA, LEARNED, MATCH, ROWS, Settings
from .hosts import CLASSES, HOSTS


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder with JPEGImages, SegmentationClass, ImageSets")
    parser.add_argument("--labels", type=Path, required=True, help="JSON: image id -> class names")
    parser.add_argument("--squeezenet", type=Path, required=True, help="SqueezeNet 1.1 features, safetensors")
    parser.add_argument("--mobilenet", type=Path, required=True, help="MobileNetV2 features, safetensors")
    parser.add_argument("--clip", type=Path, required=True, help="CLIP of `python -m examples.photos.train_clip`")
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS), help="CAM networks (both)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 1 (%(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="rows, or how their names begin; all by default")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/photos"), help="folder for everything that is written (%(default)s)"
    )
    args = parser.parse_args(argv or None)
    try:
        rows = select_rows(ROWS, args.rows)
    except ValueError as error:
        parser.error(str(error))
    os.environ["MOBILENET"] = str(args.mobilenet.resolve())
    clip = load_feature_clip(args.clip, train_clip.TOWER)
    for name in args.hosts:
        folder = args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        text = run_host(name, args, clip, rows, folder, Settings())
        (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text)


def run_host(
    name: str, args: argparse.Namespace, clip: torch.nn.Module, rows: Sequence[str], folder: Path, settings: Settings
) -> str:
    """All seeds of one host, and its report page; returns the table."""
    low, *backbone = hosts.load_backbone(name, getattr(args, name))
    splits = [hosts.load_split(args.photos, args.labels, split, low, settings.size[name]) for split in ("train", "val")]
    val = splits[1]
    data = experiment.Data(*splits, experiment.read_truth(args.photos, val.ids, settings.score_size))
    precision = experiment.zero_shot(clip, val, settings.config)
    chance = {c: float(val.labels[:, k].float().mean()) for k, c in enumerate(CLASSES)}
    known = ", ".join(f"{c} {precision[c]:.2f} ({chance[c]:.2f})" for c in CLASSES)
    made_with = source_hash(Path(__file__).parent)
    records = []
    for seed in range(1, args.seeds + 1):
        parts = folder / f"seed_{seed}_{made_with[:8]}"  # parts of other code are not taken over
        parts.mkdir(exist_ok=True)

        def run(seed: int, wanted: List[str], parts: Path = parts) -> Dict[str, Any]:
            return {"rows": experiment.run(tuple(backbone), clip, data, settings, name, seed, parts, tuple(wanted))}

        records.append(cached_rows(folder, seed, made_with, rows, run))
    if {ALONE, MATCH} <= set(rows):
        write_report(args, val, folder, parts, backbone)
    return f"{name}: zero-shot average precision of the CLIP on val (chance): {known}\n" + table(records)


def write_report(args: argparse.Namespace, val: hosts.Photos, folder: Path, parts: Path, backbone: Sequence[Any]) -> None:
    """CAM files and a report page of the last seed: host alone, and match."""
    for part in ("alone", "match"):
        host = hosts.PhotoHost(*backbone)
        host.load_state_dict(torch.load(parts / f"{part}.pt", weights_only=True))
        cams = experiment.rectified(hosts.cams_of(host.eval(), val))
        experiment.write_cams(cams, val, args.photos, parts / "cams" / part)
    experiment.write_truth(args.photos, val.ids, folder / "truth")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (folder / "test.txt").write_text("\n".join(val.ids[1::2]) + "\n", encoding="utf-8")
    run_cli(["report", "--images", str(args.photos / "JPEGImages"), "--before", str(parts / "cams" / "alone"), "--after",
             str(parts / "cams" / "match"), "--gt", str(folder / "truth"), "--classes", str(folder / "classes.txt"),
             "--list", str(folder / "test.txt"), "--out", str(folder / "report.html"),
             "--title", "Photos: host alone, and with match"])  # fmt: skip


def run_cli(arguments: Sequence[str]) -> None:
    """Run a command of `semples`, and end with its status if it fails."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(list(arguments))
    if status:
        raise SystemExit(f"semples {' '.join(arguments)} ended with status {status}")


def table(records: List[Dict[str, Any]]) -> str:
    """One line per row: mIoU with its spread over the seeds, the mean IoU of every label in percent, and paired differences."""
    names = ["background", *CLASSES]
    miou = {name: [100 * r["rows"][name]["miou"] for r in records] for name in records[0]["rows"]}
    iou = {name: np.array([[100 * (v or 0.0) for v in r["rows"][name]["iou"]] for r in records]) for name in miou}
    lines = [f"{'':52s} {'mIoU':>12s}  " + "  ".join(f"{name:>10s}" for name in names)]
    for name in miou:
        each = "  ".join(f"{value:10.1f}" for value in iou[name].mean(0))
        lines.append(f"{name:52s} {spread(miou[name], '±'):>12s}  {each}")
    lines.append(f"{len(records)} seeds")
    if len(records) > 1:
        lines += differences(miou, iou, names)
    return "\n".join(lines)


def differences(miou: Dict[str, List[float]], iou: Dict[str, np.ndarray], names: Sequence[str]) -> List[str]:
    """Paired differences of the rows with CLIP to the best of the controls, in mIoU and per label."""
    lines = []
    for end in ("", ", aligned"):
        controls = [name for name in (ALONE, AREA, BEST_AREA) if name + end in miou]
        if not controls:
            continue
        control = max(controls, key=lambda name: np.mean(miou[name + end])) + end
        for row in (name + end for name in (*ROWS[3:],) if name + end in miou):
            lines.append(f"[{row}] - [{control}]: {paired_difference(miou[row], miou[control])}")
            each = (iou[row] - iou[control]).mean(0)
            lines.append("    per label: " + ", ".join(f"{name} {value:+.1f}" for name, value in zip(names, each)))
        if {LEARNED + end, MATCH + end} <= set(miou):
            lines.append(f"[{LEARNED + end}] - [{MATCH + end}]: {paired_difference(miou[LEARNED + end], miou[MATCH + end])}")
    return lines


if __name__ == "__main__":
    main()
