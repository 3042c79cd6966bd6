"""What is lost by choosing without masks: the background threshold, the run (lambda, controls) and the step to stop at.

    python -m examples.choices --ablation runs/ablation --steps --jobs 2 --out runs/choices
    python -m examples.choices --photo-runs runs/photos/mobilenet --host mobilenet --photos VOCdevkit/VOC2012 \\
        --labels labels.json --weights mobilenet_v2.safetensors --clip photo_clip.pt --out runs/choices_mobilenet

Takes the weights that the ablation (in the demo world) or the photos experiment have kept. For every row and seed CLIP chooses
a threshold on the images that the experiment keeps for choosing (without their masks); beside it stands the threshold that is
best with their masks. Both are scored on the other images. The loss is the difference in mIoU. `semples_plugin.choices.AREA`
was chosen on seed 1, so the table is over the other seeds. Of the ablation's rows that change options, those with another
lambda are taken, on the seeds that have them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from semples_plugin import PromptRefiner
from semples_plugin.choices import AREA, THRESHOLDS, agreement_sums
from semples_plugin.masks import pseudo_labels
from semples_plugin.metrics import confusion_matrix, mean_iou
from semples_plugin.regions import positive_pairs

from .ablation.data import DemoWorld
from .ablation.experiment import kept_file, kept_host, newest_parts, soft_masks
from .ablation.rows import BASE, LEARNED, MATCH, ROWS
from .cells import Cell, run_cells
from .demo import experiment as demo
from .hosts import train_attached
from .photos import experiment as photos
from .photos import hosts as photo_hosts
from .photos import train_clip
from .seeds import source_hash
from .train_clip import load_feature_clip

# Option -> the rows that differ in its value alone, and the row that they change.
LAMBDAS: Dict[str, List[str]] = {}
for _row in ROWS:
    for _option in _row.options:
        if len(_row.options) == 1 and _option.startswith("lambda_"):
            LAMBDAS.setdefault(_option, [_row.against]).append(_row.name)
STEPS = (10, 25, 50, 100, 150)  # of the match row, for choosing where to stop


class Curves(NamedTuple):
    """One set of CAMs at every threshold: mIoU on the images for choosing, on the others, and what CLIP says of the first."""

    chosen: List[float]
    test: List[float]
    sums: List[List[float]]  # (T, 3), see `choices.agreement_sums`
    num_pairs: int

    def agreement(self, area: float) -> np.ndarray:
        kept, removed, areas = np.array(self.sums).T / self.num_pairs
        return kept - removed - area * areas


def curves(
    refiner: PromptRefiner,
    images: Tensor,
    labels: Tensor,
    masks: Tensor,
    truth: np.ndarray,
    test_masks: Tensor,
    test_truth: Any,
) -> Dict[str, Any]:
    """`Curves` as a dict.

    Args:
        refiner: its CLIP and options.
        images, labels, masks, truth: of the images for choosing: (N, 3, S, S), (N, C), (N, C, s, s) and label maps (N, s, s).
        test_masks, test_truth: of the others.
    """
    count = labels.shape[1] + 1

    def miou(soft: Tensor, known: np.ndarray, threshold: float) -> float:
        return mean_iou(confusion_matrix(pseudo_labels(soft, threshold).numpy(), known, count))

    sums = torch.zeros(len(THRESHOLDS), 3, dtype=torch.float64)
    for start in range(0, len(images), 50):
        part = slice(start, start + 50)
        with torch.no_grad():
            sums += agreement_sums(refiner, images[part], masks[part], positive_pairs(labels[part]), THRESHOLDS)
    return Curves(
        [miou(masks, truth, t) for t in THRESHOLDS],
        [miou(test_masks, test_truth, t) for t in THRESHOLDS],
        sums.tolist(),
        int(labels.sum()),
    )._asdict()


# ------------------------------------------------------------------------------------------------------- demo world


def demo_cell(cell: Cell, parts: Path) -> Dict[str, Any]:
    """Both kinds of masks of a row of the ablation; of the match row also after fewer steps."""
    torch.set_num_threads(1)
    data = DemoWorld()
    train, val, test = data.splits(cell.seed)
    refiner = demo.new_refiner(demo.Settings(), cell.seed)
    truths = [np.stack([scene.things for scene in split.scenes]) for split in (val, test)]

    def of(host: Any, edges: bool) -> Dict[str, Any]:
        masks = [soft_masks(split, host.cams(split.images), edges) for split in (val, test)]
        return curves(refiner, val.images, val.labels, masks[0], truths[0], masks[1], truths[1])

    if cell.row.startswith("step "):
        steps, settings = int(cell.row.split()[1]), demo.Settings()
        host = kept_host(parts, BASE, cell.seed, len(data.classes))
        title = f"seed {cell.seed}, {cell.row}"
        train_attached(host, train, steps, settings.stage_lr, settings.batch_size, cell.seed, title, refiner)
        return {"aligned": of(host, True)}
    host = kept_host(parts, cell.row, cell.seed, len(data.classes))
    return {name: of(host, edges) for name, edges in (("raw", False), ("aligned", True))}


def demo_cells(parts: Path, seeds: Sequence[int], steps: bool) -> List[Cell]:
    taken = [row.name for row in ROWS if row.all_seeds or any(row.name in names for names in LAMBDAS.values())]
    rows = [Cell(name, seed) for seed in seeds for name in taken if kept_file(parts, name, seed).is_file()]
    return rows + [Cell(f"step {n}", seed) for seed in seeds for n in STEPS if steps]


# ----------------------------------------------------------------------------------------------------------- photos


@functools.lru_cache(maxsize=1)
def _photo_data(root: Path, labels: Path, weights: Path, clip: Path, host: str) -> Tuple[Any, Any, np.ndarray, Any]:
    low, *backbone = photo_hosts.load_backbone(host, weights)
    settings = photos.Settings()
    val = photo_hosts.load_split(root, labels, "val", low, settings.size[host])
    truth = photos.read_truth(root, val.ids, settings.score_size)
    return backbone, val, truth, load_feature_clip(clip, train_clip.TOWER)


def photo_cell(
    cell: Cell, runs: Path, version: str, host: str, root: Path, labels: Path, weights: Path, clip: Path
) -> Dict[str, Any]:
    torch.set_num_threads(1)
    backbone, val, truth, model = _photo_data(root, labels, weights, clip, host)
    settings = photos.Settings()
    refiner = photos.new_refiner(model, settings.config, cell.seed)
    network = photo_hosts.PhotoHost(*backbone)
    network.load_state_dict(torch.load(runs / f"seed_{cell.seed}_{version}" / f"{cell.row}.pt", weights_only=True))
    cams = photos.rectified(photo_hosts.cams_of(network.eval(), val))
    masks = photos.normalized(cams, val, settings.score_size)
    found = {}
    for name, edges in (("raw", False), ("aligned", True)):
        pairs, dense = positive_pairs(val.labels), torch.zeros(len(val.ids), val.labels.shape[1], *masks.shape[1:])
        dense[pairs[:, 0], pairs[:, 1]] = photos.aligned(masks, val, settings.score_size) if edges else masks
        choose, rest = slice(0, None, 2), slice(1, None, 2)
        found[name] = curves(
            refiner, val.images[choose], val.labels[choose], dense[choose], truth[choose], dense[rest], truth[rest]
        )
    return found


def photo_version(runs: Path) -> str:
    """Which code made the newest weights of `examples.photos`: its folders are named seed_SEED_VERSION."""
    folders = sorted((path for path in runs.glob("seed_*_*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise ValueError(f"--photo-runs: {runs} holds no weights; run python -m examples.photos first")
    return folders[-1].name.split("_")[2]


# ----------------------------------------------------------------------------------------------------------- tables


def lost(one: Dict[str, Any], area: float) -> float:
    """Points of mIoU that CLIP's threshold loses against the one that is best with masks."""
    own = Curves(**one)
    return 100 * (own.test[int(np.argmax(own.chosen))] - own.test[int(np.argmax(own.agreement(area)))])


def best(one: Dict[str, Any], area: Optional[float]) -> Tuple[float, float]:
    """Score of a run at its best threshold (by agreement; with None by mIoU on the images for choosing), and its test mIoU."""
    own = Curves(**one)
    values = np.array(own.chosen) if area is None else own.agreement(area)
    at = int(np.argmax(values))
    return float(values[at]), own.test[at]


def lost_by_run(runs: Sequence[Dict[str, Any]], area: float, candidates: Optional[int] = None) -> float:
    """Points of mIoU that are lost if CLIP chooses run and threshold, against the choice with masks.

    Args:
        runs: curves of each.
        area: weight of the area in the agreement.
        candidates: CLIP chooses from so many of the first runs; None for all.
    """
    with_masks = max((best(one, None) for one in runs), key=lambda pair: pair[0])[1]
    by_clip = max((best(one, area) for one in runs[:candidates]), key=lambda pair: pair[0])[1]
    return 100 * (with_masks - by_clip)


def summary(found: Dict[Cell, Dict[str, Any]], area: float, seeds: Sequence[int]) -> str:
    """Mean and worst loss of every kind of choice."""
    lines = [
        f"area weight {area:g}, seeds {', '.join(map(str, seeds))}",
        "",
        "| choice | cases | mean loss | worst loss | worst case |",
    ]
    lines.append("|---|---|---|---|---|")

    def line(what: str, cases: Dict[str, float]) -> None:
        if cases:
            worst = max(cases, key=lambda name: cases[name])
            lines.append(f"| {what} | {len(cases)} | {np.mean(list(cases.values())):.1f} | {cases[worst]:.1f} | {worst} |")

    own = {cell: record for cell, record in found.items() if cell.seed in seeds}
    rows = {cell: record for cell, record in own.items() if not cell.row.startswith("step ")}
    for kind in ("raw", "aligned"):
        line(f"threshold, {kind}", {f"{c.row}, seed {c.seed}": lost(r[kind], area) for c, r in rows.items()})
        fixed = {f"{c.row}, seed {c.seed}": _lost_at(r[kind], 0.4) for c, r in rows.items()}
        line(f"threshold, {kind}: 0.4 for all, for comparison", fixed)

    def runs(what: str, names: Sequence[str], kind: str, candidates: Optional[int] = None) -> None:
        cases = {}
        for seed in seeds:
            of_seed = [own[Cell(name, seed)][kind] for name in names if Cell(name, seed) in own]
            if len(of_seed) == len(names):
                cases[f"seed {seed}"] = lost_by_run(of_seed, area, candidates)
        line(what, cases)

    for kind in ("raw", "aligned"):
        for option, names in LAMBDAS.items():
            runs(f"{option} and threshold, {kind}", names, kind)
            runs(f"{option} and threshold, {kind}: the recipe's {option}, for comparison", names, kind, 1)
    runs("match or refine, and threshold, aligned", (MATCH, LEARNED), "aligned")
    options = {name for names in LAMBDAS.values() for name in names[1:]}
    every = list(dict.fromkeys(cell.row for cell in rows if cell.row not in options))
    if len(every) > 1:
        runs("row, controls among them, and threshold, aligned", every, "aligned")
    runs("step to stop match at, and threshold, aligned", [f"step {n}" for n in STEPS], "aligned")
    return "\n".join(lines)


def _lost_at(one: Dict[str, Any], threshold: float) -> float:
    own = Curves(**one)
    return 100 * (own.test[int(np.argmax(own.chosen))] - own.test[THRESHOLDS.index(threshold)])


def identity(args: argparse.Namespace, version: str) -> str:
    """Identifies what a cell's record depends on: code, inputs, and the version of the weights that were kept."""
    here = Path(__file__).parent
    digest = hashlib.sha256(source_hash(*(here / name for name in ("ablation", "demo", "photos"))).encode())
    for path in (here / "choices.py", here / "train_clip.py"):
        digest.update(path.read_bytes())
    if args.ablation is not None:
        facts = [str(args.ablation.resolve()), version]
    else:
        facts = [version, args.host, *(str(path.resolve()) for path in (args.photo_runs, args.photos))]
        facts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in (args.labels, args.weights, args.clip)]
    digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.choices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ablation", type=Path, help="folder of `python -m examples.ablation`")
    add("--steps", action="store_true", help="with --ablation: also train match for fewer steps")
    add("--photo-runs", type=Path, help="folder of one host of `python -m examples.photos`")
    add("--host", choices=photo_hosts.HOSTS, default="mobilenet", help="with --photo-runs (%(default)s)")
    add("--photo-rows", nargs="+", default=["alone", "best_area", "match", "refine"], help="with --photo-runs")
    for name, what in (("photos", "folder in VOC's layout"), ("labels", "JSON, image id -> class names"), ("clip", "CLIP"),
                       ("weights", "the host's pretrained features")):  # fmt: skip
        add(f"--{name}", type=Path, help=f"with --photo-runs: {what}")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="seeds (%(default)s)")
    add("--area", type=float, default=AREA, help="weight of the area in the agreement (%(default)s)")
    add("--jobs", type=int, default=1, help="cells that are computed at a time (%(default)s)")
    add("--out", type=Path, default=Path("runs/choices"), help="folder for everything that is written (%(default)s)")
    args = parser.parse_args(argv or None)
    if (args.ablation is None) == (args.photo_runs is None):
        parser.error("give --ablation or --photo-runs")
    run: Any
    if args.ablation is None and None in (args.photos, args.labels, args.clip, args.weights):
        parser.error("--photo-runs needs --photos, --labels, --clip and --weights")
    try:
        parts = None if args.ablation is None else newest_parts(args.ablation)
        version = photo_version(args.photo_runs) if parts is None else parts.name
    except ValueError as error:
        parser.error(str(error))
    if parts is not None:
        cells, run = demo_cells(parts, args.seeds, args.steps), functools.partial(demo_cell, parts=parts)
    else:
        cells = [Cell(row, seed) for seed in args.seeds for row in args.photo_rows]
        run = functools.partial(
            photo_cell, runs=args.photo_runs, version=version, host=args.host, root=args.photos, labels=args.labels,
            weights=args.weights, clip=args.clip,
        )  # fmt: skip
    found = run_cells(args.out, cells, identity(args, version), run, args.jobs)
    seeds = [seed for seed in args.seeds if seed != 1] or args.seeds
    text = summary(found, args.area, seeds)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    (args.out / "curves.json").write_text(
        json.dumps([[*cell, record] for cell, record in found.items()]) + "\n", encoding="utf-8"
    )
    print(text)


if __name__ == "__main__":
    main()
