"""The demo's picture: scenes with their CAMs, the curve of the losses, and the learned prompts in words."""

from __future__ import annotations

from pathlib import Path
from typing import List

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .experiment import ALIGNED, HOST, LEARNED, MATCH, Result
from .world import HOME, STUFF, THINGS


def _overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A heat map (H, W) in [0, 1] over a gray version of the image (H, W, 3)."""
    gray = image.mean(2, keepdims=True) / 255 * 0.45
    color = plt.get_cmap("inferno")(heat)[..., :3]
    return np.clip(gray * (1 - 0.6 * heat[..., None]) + color * heat[..., None] + 0.08, 0, 1)


def _chosen(result: Result) -> List[int]:
    """Indices of one test scene per class: the first that shows this class alone on its usual stuff."""
    chosen = []
    for k, name in enumerate(THINGS):
        home = STUFF.index(HOME[name])
        fits = (
            i for i, s in enumerate(result.test.scenes)
            if s.labels.sum() == 1 and s.labels[k] and (s.stuff == home).mean() > 0.25 and (s.things == k + 1).mean() > 0.03
        )  # fmt: skip
        chosen.append(next(fits, None))
    return [i for i in chosen if i is not None]


def draw_figure(result: Result, path: Path) -> None:
    """Write the picture as PNG."""
    scenes = _chosen(result)
    columns = ["image", "CAM: host alone", "CAM: + match", "CAM: + match + refine", "refined mask", "ground truth"]
    figure = plt.figure(figsize=(17.5, 1.7 * len(scenes) + 0.6))
    grid = figure.add_gridspec(
        len(scenes), len(columns) + 3, width_ratios=[1] * len(columns) + [0.15, 1.5, 1.5], wspace=0.06, hspace=0.08
    )
    for row, i in enumerate(scenes):
        scene = result.test.scenes[i]
        k = int(scene.labels.argmax())
        pictures = [scene.image]
        pictures += [_overlay(scene.image, result.masks[name][i, k].numpy()) for name in (HOST, MATCH, LEARNED, ALIGNED)]
        pictures.append(_overlay(scene.image, (scene.things == k + 1).astype(float)))
        for column, picture in enumerate(pictures):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(columns[column], fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{THINGS[k]}\n(usual: {HOME[THINGS[k]]})", fontsize=9)

    half = max(len(scenes) // 2, 1)
    axis = figure.add_subplot(grid[:half, len(columns) + 1 :])
    curves = (
        ("match_foreground", MATCH, "C0", "match, foreground (stage a)"),
        ("match_background", MATCH, "C1", "match, background (stage a)"),
        ("refine", LEARNED, "C3", "refine (stage c)"), ("match_foreground", LEARNED, "C2", "match, foreground (stage c)"),
    )  # fmt: skip
    for term, name, color, label in curves:
        values = np.array([record[term] for record in result.histories[name]])
        smooth = np.convolve(values, np.ones(9) / 9, mode="valid")
        axis.plot(np.arange(len(smooth)) + 5, smooth, color=color, label=label)
    axis.set_title("terms of the loss, unweighted (mean of 9 steps)", fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc=(0.5, 0.2))

    axis = figure.add_subplot(grid[half:, len(columns) + 1 :])
    axis.axis("off")
    lines = ["Learned background prompts, nearest words (cosine)", ""]
    for prompt in result.nearest_words:
        lines.append(f"{prompt.title}:  " + ",  ".join(f"{word} {value:.2f}" for word, value in prompt.words[:3]))
        lines.append(f"      cosine to the class name {prompt.class_similarity:.2f}")
    lines += ["", "mIoU on held-out scenes"]
    lines += [f"{100 * row.miou:5.1f}   {name}" for name, row in result.rows.items()]
    axis.text(0.02, 0.9, "\n".join(lines), va="top", ha="left", fontsize=9.5, linespacing=1.45, transform=axis.transAxes)
    figure.savefig(path, dpi=100, bbox_inches="tight", facecolor="white")
    plt.close(figure)
