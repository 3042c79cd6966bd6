"""One self-contained HTML page of what a refinement changed: figures, curves, pictures, prompts. Opens from a file, offline."""

from __future__ import annotations

import base64
import html
import random
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from .._files import write_atomically
from ..errors import CamFileError
from ..metrics import best_class
from ..prompts import NearestWords
from .cams import cam_paths, read_cam_file
from .evaluate_folder import Result, evaluate_cams
from .images import find_image, read_image, read_label_png, voc_palette

__all__ = ["write_report"]

THRESHOLDS = [i / 100 for i in range(100)]
BEFORE, AFTER = "#b3541e", "#1f6f8b"

STYLE = """
:root { --ink: #1c2328; --soft: #5b6770; --line: #d9dee2; --before: #b3541e; --after: #1f6f8b; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 1180px; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .note { color: var(--soft); font-size: .9rem; max-width: 46rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.figure { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; min-width: 9.5rem; flex: 1 1 9.5rem; }
.figure b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; } svg { display: block; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .45rem .8rem; max-width: 46rem; margin: .6rem 0; }
.bars dt { text-align: right; font-size: .9rem; align-self: center; } .bars dd { margin: 0; }
.bars div { display: flex; align-items: center; gap: .4rem; height: .85rem; }
.bars i { height: .7rem; border-radius: 2px; } .bars span { font-size: .78rem; color: var(--soft); }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .soft { fill: var(--soft); }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 1em; vertical-align: -.05em; }
.key i:first-child { margin-left: 0; }
.rows { display: grid; gap: 1rem; }
.row { border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.row header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .92rem; margin-bottom: .5rem; }
.row header code { font-size: .88rem; overflow-wrap: anywhere; } .row header span { color: var(--soft); }
.pictures { display: grid; grid-template-columns: repeat(5, 1fr); gap: .4rem; }
.pictures figure { margin: 0; } .pictures img { width: 100%; display: block; border-radius: 4px; background: #eee; }
figcaption { font-size: .78rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 640px) { body { padding: .8rem; } .pictures { grid-template-columns: repeat(2, 1fr); }
  .pictures figure:first-child { grid-column: 1 / -1; } }
"""


def write_report(
    path: Path,
    images: Path,
    before: Path,
    after: Path,
    gt: Path,
    classes: Sequence[str],
    *,
    ids: Optional[Sequence[str]] = None,
    split: str = "",
    title: str = "What the refinement changed",
    rows: int = 8,
    readings: Optional[Sequence[NearestWords]] = None,
) -> Dict[str, str]:
    """Write the page.

    Args:
        path: of the HTML file.
        images, before, after, gt: folders of images, of the host's and of the refined CAM files, and of ground-truth PNGs.
        classes: class names, without background.
        ids: images to count; by default all of `before`.
        split: name of the split, for the record.
        title: of the page.
        rows: images of each kind: most improved, most worsened, random.
        readings: learned prompts in words.

    Returns:
        Id -> reason for images that could not be counted.
    """
    names = ["background", *classes]
    paths = (cam_paths(before), cam_paths(after))
    ids = list(paths[0]) if ids is None else list(ids)
    first = evaluate_cams(before, gt, names, ids, THRESHOLDS, chosen=True)._replace(split=split)
    second = evaluate_cams(after, gt, names, ids, THRESHOLDS, chosen=True)._replace(split=split)
    both = sorted(set(first.per_image) & set(second.per_image))
    failed = {**first.failed, **second.failed}
    gain = {name: second.per_image[name] - first.per_image[name] for name in both}
    order = sorted(both, key=lambda name: (-gain[name], name))
    groups = [
        ("Most improved", [n for n in order if gain[n] > 0][:rows]),
        ("Most worsened", [n for n in reversed(order) if gain[n] < 0][:rows]),
        ("Random", sorted(random.Random(0).sample(both, min(rows, len(both))))),
    ]
    parts = [_summary(first, second, gain), _bars(first, second), _curves(first, second)]
    if readings:
        parts.append(_prompts(readings))
    for heading, chosen in groups:
        cards = []
        for name in chosen:
            try:
                cards.append(_card(name, images, *paths, gt, classes, first, second))
            except (CamFileError, OSError, ValueError) as error:
                failed[name] = str(error)
        if cards:
            parts.append(f'<section><h2>{heading}</h2><div class="rows">{"".join(cards)}</div></section>')
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode("utf-8")))
    return failed


def _summary(first: Result, second: Result, gain: Mapping[str, float]) -> str:
    better, worse = sum(g > 0 for g in gain.values()), sum(g < 0 for g in gain.values())

    def mean(result: Result, key: str) -> float:
        values = [getattr(score, key) for score in result.classes if getattr(score, key) is not None]
        return 100 * float(np.mean(values)) if values else float("nan")

    figures = [
        (f"{100 * first.miou:.1f} → {100 * second.miou:.1f}", "mean IoU, %"),
        (f"{100 * (second.miou - first.miou) + 0.0:+.1f}".replace("-0.0", "0.0"), "change, points"),
        (f"{mean(first, 'false_positive'):.1f} → {mean(second, 'false_positive'):.1f}", "false-positive share, %"),
        (f"{mean(first, 'false_negative'):.1f} → {mean(second, 'false_negative'):.1f}", "false-negative share, %"),
        (f"{better} / {worse}", "images better / worse"),
    ]
    boxes = "".join(f'<div class="figure"><b>{value}</b><span>{label}</span></div>' for value, label in figures)
    absent = f" Absent and not in the mean: {html.escape(', '.join(second.absent))}." if second.absent else ""
    return (
        f'<p class="note">Split {html.escape(first.split)}, {second.images} images. Background thresholds '
        f"{first.threshold:.2f} (before) and {second.threshold:.2f} (after), each chosen on this ground truth, so that both "
        f"figures are best cases. One confusion matrix over the set; label 255 is not counted.{absent}</p>"
        f'<div class="figures">{boxes}</div>'
    )


def _key() -> str:
    return f'<p class="note key"><i style="background:{BEFORE}"></i>before<i style="background:{AFTER}"></i>after</p>'


def _bars(first: Result, second: Result) -> str:
    lines = []
    for a, b in zip(first.classes, second.classes):
        if a.iou is None and b.iou is None:
            continue
        bars = ""
        for value, colour in ((a.iou, BEFORE), (b.iou, AFTER)):
            length, label = (0.0, "-") if value is None else (100 * value, f"{100 * value:.1f}")
            bars += f'<div><i style="width:{length * 0.9:.2f}%;background:{colour}"></i><span>{label}</span></div>'
        lines.append(f"<dt>{html.escape(a.name)}</dt><dd>{bars}</dd>")
    return f'<section><h2>IoU per class, %</h2>{_key()}<dl class="bars">{"".join(lines)}</dl></section>'


def _curves(first: Result, second: Result) -> str:
    left, top, width, height = 46, 12, 600, 240
    values = [v for result in (first, second) for _, v in result.curve if v == v]
    high = max(0.1, float(np.ceil(max(values, default=1.0) * 10) / 10))

    def point(t: float, v: float) -> str:
        return f"{left + t * width:.1f},{top + (1 - v / high) * height:.1f}"

    lines = []
    for i in range(6):
        y, x = top + height * i / 5, left + width * i / 5
        lines.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#d9dee2"/>')
        lines.append(f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{100 * high * (1 - i / 5):.0f}</text>')
        lines.append(f'<text class="soft" x="{x}" y="{top + height + 18}" text-anchor="middle">{i / 5:.1f}</text>')
    for result, colour in ((first, BEFORE), (second, AFTER)):
        path = " ".join(point(t, v) for t, v in result.curve if v == v)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        cx, cy = point(result.threshold or 0.0, result.miou).split(",")
        lines.append(f'<circle cx="{cx}" cy="{cy}" r="4" fill="{colour}"/>')
    box = f"0 0 {left + width + 16} {top + height + 28}"
    svg = f'<svg viewBox="{box}" width="{left + width + 16}" role="img" aria-label="mean IoU over the threshold">'
    chart = f'<div class="wide">{svg}{"".join(lines)}</svg></div>'
    return f"<section><h2>Mean IoU (%) over the background threshold</h2>{_key()}{chart}</section>"


def _prompts(readings: Sequence[NearestWords]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(r.name)}</td><td>"
        + ", ".join(f"{html.escape(word)} <small>{value:.2f}</small>" for word, value in r.words)
        + f'</td><td class="number">{r.class_similarity:.2f}</td></tr>'
        for r in readings
    )
    return (
        "<section><h2>Learned background prompts, in words</h2><div class='wide'><table><thead><tr><th>class</th>"
        "<th>nearest words</th><th>cosine to class</th></tr></thead><tbody>" + rows + "</tbody></table></div></section>"
    )


# ---------------------------------------------------------------------------------------------------- pictures


def _card(
    name: str,
    images: Path,
    before: Mapping[str, Path],
    after: Mapping[str, Path],
    gt: Path,
    classes: Sequence[str],
    first: Result,
    second: Result,
) -> str:
    picture = read_image(find_image(images, name))
    target = read_label_png(gt / f"{name}.png")
    if picture.shape[:2] != target.shape:
        raise CamFileError(f"its image has size {picture.shape[:2]}, its ground truth {target.shape}")
    shown = []
    contents = [read_cam_file(paths[name], len(classes)) for paths in (before, after)]
    for content, result in zip(contents, (first, second)):
        best, label_map = best_class(content.cams, target.shape)
        shown.append((content.cams, np.where(best > np.float32(result.threshold or 0.0), label_map, 0)))
    present = sorted({*contents[0].cams, *contents[1].cams})
    key = max(present, key=lambda k: float((target == k + 1).sum()), default=None)
    label = "none" if key is None else classes[key]
    pictures: List[Tuple[str, np.ndarray]] = [
        ("image", picture),
        (f"CAM of {label}", _heat(picture, shown[0][0].get(key) if key is not None else None)),
        (f"refined, {label}", _heat(picture, shown[1][0].get(key) if key is not None else None)),
        ("pseudo label", _colours(shown[1][1])),
        ("ground truth", _colours(target)),
    ]
    figures = "".join(
        f'<figure><img alt="{html.escape(caption)} of {html.escape(name)}" loading="lazy" src="{_data_uri(value)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, value in pictures
    )
    a, b = 100 * first.per_image[name], 100 * second.per_image[name]
    labels = ", ".join(classes[k] for k in present) or "no class"
    note = f"IoU of this image ({b - a:+.1f}); {html.escape(labels)}"
    header = f"<header><code>{html.escape(name)}</code><b>{a:.1f} → {b:.1f}</b><span>{note}</span></header>"
    return f'<article class="row">{header}<div class="pictures">{figures}</div></article>'


def _heat(picture: np.ndarray, cam: Optional[np.ndarray]) -> np.ndarray:
    """A CAM in [0, 1] over the grey image."""
    import cv2

    grey = np.repeat(picture.mean(2, keepdims=True), 3, 2) * 0.55
    if cam is None:
        return grey.astype(np.uint8)
    heat = cv2.applyColorMap((np.clip(cam, 0, 1) * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    weight = np.clip(cam, 0, 1)[..., None]
    return (grey * (1 - 0.75 * weight) + heat * 0.75 * weight).clip(0, 255).astype(np.uint8)


def _colours(labels: np.ndarray) -> np.ndarray:
    palette = np.array(voc_palette(), np.uint8).reshape(256, 3)
    return palette[labels]


def _data_uri(picture: np.ndarray, side: int = 320) -> str:
    import cv2

    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
