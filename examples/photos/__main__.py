"""The whole chain on real photos: a CAM network trained on image-level labels, three stages, CAM files, and the commands
`semples refine`, `evaluate` and `report`.

    python -m examples.photos --photos VOCdevkit/VOC2012 --labels image_labels.json --squeezenet squeezenet1_1.safetensors \\
        --captioned flickr8k --out runs/photos

`--photos` is laid out as VOC. `--labels` maps image ids to class names. `--captioned` holds `images/` and `captions.csv`; a
compact CLIP is trained on them. `--clip FILE` takes a CLIP that is trained already. Finished parts in `--out` are not computed
again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch

from semples_plugin import cli

from .. import train_clip
from ..seeds import spread
from . import experiment
from .experiment import CLASSES, Settings

TOWER = f"{Path(__file__).with_name('squeezenet.py')}:clip_tower"
ROWS = [
    ("host alone", "host", False),
    ("+ match", "match", False),
    ("+ match + refine", "refine", False),
    ("host alone, masks aligned to edges", "host", True),
    ("+ match, masks aligned to edges", "match", True),
    ("+ match + refine, masks aligned to edges", "refine", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder with JPEGImages, SegmentationClass, ImageSets")
    parser.add_argument("--labels", type=Path, required=True, help="JSON: image id -> class names")
    parser.add_argument("--squeezenet", type=Path, required=True, help="SqueezeNet 1.1 features, safetensors")
    parser.add_argument("--captioned", type=Path, help="folder with images/ and captions.csv, to train the CLIP")
    parser.add_argument("--clip", type=Path, help="weights of a CLIP that this command trained before")
    parser.add_argument("--clip-steps", type=int, default=1000, help="training steps of the CLIP (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 1 (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/photos"), help="folder for everything that is written (%(default)s)"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["SQUEEZENET"] = str(args.squeezenet.resolve())
    clip_file = args.clip or args.out / "photo_clip.pt"
    if not clip_file.exists():
        if args.captioned is None:
            parser.error("Give --captioned to train a CLIP, or --clip to use one.")
        train_photo_clip(args.photos, args.labels, args.captioned, clip_file, args.clip_steps, args.out)
    clip = train_clip.load_feature_clip(clip_file, TOWER)
    settings = Settings()
    low, high = experiment.load_backbone(args.squeezenet)
    data = experiment.load_split(args.photos, args.labels, "train", low, settings)
    test = experiment.load_split(args.photos, args.labels, "val", low, settings)
    precision = experiment.zero_shot(clip, test, settings)
    chance = {name: float(test.labels[:, k].float().mean()) for k, name in enumerate(CLASSES)}
    print("zero-shot average precision of the CLIP on val (chance): " + ", ".join(
        f"{name} {precision[name]:.2f} ({chance[name]:.2f})" for name in CLASSES))  # fmt: skip
    half = test.ids[::2]  # the background threshold is chosen on these; figures come from the others
    truth = args.out / "truth"
    experiment.write_masks(test, args.photos, truth)
    (args.out / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (args.out / "choose.txt").write_text("\n".join(half) + "\n", encoding="utf-8")
    (args.out / "test.txt").write_text("\n".join(i for i in test.ids if i not in half) + "\n", encoding="utf-8")
    records = []
    for seed in range(1, args.seeds + 1):
        folder = args.out / f"seed_{seed}"
        folder.mkdir(exist_ok=True)

        def write(name: str, host: Any, folder: Path = folder) -> None:
            experiment.write_cams(host, test, args.photos, folder / "cams" / name)

        refiner = experiment.stages(high, clip, data, settings, seed, folder, write)
        print("\n".join(f"  {prompt}" for prompt in refiner.nearest_words()))
        records.append({name: row(args.out, folder, args.photos, source, aligned) for name, source, aligned in ROWS})
        (folder / "rows.json").write_text(json.dumps(records[-1], indent=1) + "\n", encoding="utf-8")
    last = args.out / f"seed_{args.seeds}"
    run_cli(["report", "--images", str(args.photos / "JPEGImages"), "--before", str(last / "cams" / "host"), "--after",
             str(refined(last, "refine")), "--gt", str(truth), "--classes", str(args.out / "classes.txt"), "--list",
             str(args.out / "test.txt"), "--out", str(args.out / "report.html"),
             "--title", "Photos: host alone, and after match, refine and edge alignment"])  # fmt: skip
    text = table(records)
    (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"Report: {args.out / 'report.html'}")


def train_photo_clip(photos: Path, labels: Path, captioned: Path, path: Path, steps: int, out: Path) -> None:
    """Train a CLIP on captioned photos, and on captions made of the image-level labels of the train photos."""
    ids = (photos / "ImageSets" / "Segmentation" / "train.txt").read_text(encoding="utf-8").split()
    own = out / "label_captions.csv"
    with own.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *experiment.captions(labels, ids)])
    train_clip.main(["--images", str(captioned / "images"), "--captions", str(captioned / "captions.csv"),
                     "--images", str(photos / "JPEGImages"), "--captions", str(own), "--tower", TOWER, "--size", "128",
                     "--text-width", "128", "--text-layers", "2", "--dim", "256", "--steps", str(steps), "--batch-size", "128",
                     "--fade", "0.3", "--variants", "3", "--out", str(path)])  # fmt: skip


def run_cli(arguments: Sequence[str]) -> str:
    """Run a command of `semples` and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cli.main(list(arguments))
    if status:
        raise SystemExit(f"semples {' '.join(arguments)} ended with status {status}")
    return printed.getvalue()


def refined(folder: Path, source: str) -> Path:
    return folder / f"{source}_masks" / "cams"


def row(out: Path, folder: Path, photos: Path, source: str, aligned: bool) -> Dict[str, Any]:
    """Figures on the test half of val, at the background threshold that is best on the other half."""
    cams = folder / "cams" / source
    common = ["--classes", str(out / "classes.txt")]
    if aligned:
        target = refined(folder, source)
        run_cli(["refine", "--images", str(photos / "JPEGImages"), "--cams", str(cams), "--out", str(target.parent), *common])
        cams = target
    truth = ["--pred", str(cams), "--gt", str(out / "truth"), *common, "--json"]
    chosen = json.loads(run_cli(["evaluate", *truth, "--list", str(out / "choose.txt"), "--thresholds", "0:100"]))["threshold"]
    result = json.loads(run_cli(["evaluate", *truth, "--list", str(out / "test.txt"), "--threshold", str(chosen)]))
    return {"threshold": chosen, "miou": result["miou"], "iou": {c["name"]: c["iou"] for c in result["classes"]}}


def table(records: List[Dict[str, Any]]) -> str:
    """One line per row: mIoU with its spread over the seeds, and the mean IoU of every label, in percent."""
    names = ["background", *CLASSES]
    lines = [f"{'':44s} {'mIoU':>12s}  " + "  ".join(f"{name:>10s}" for name in names)]
    for name in records[0]:
        miou = spread([100 * r[name]["miou"] for r in records], "±")
        each = [100 * np.mean([r[name]["iou"][c] or 0.0 for r in records]) for c in names]
        lines.append(f"{name:44s} {miou:>12s}  " + "  ".join(f"{value:10.1f}" for value in each))
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
