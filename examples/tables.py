"""Tables of experiments over seeds, with differences paired by seed: as Markdown, as CSV, and as a figure."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from .seeds import Difference, paired_difference, spread

__all__ = ["Line", "as_csv", "as_markdown", "draw"]


class Line(NamedTuple):
    """One row of a table.

    Attributes:
        group: heading above it.
        name: of the row.
        figures: name of a figure -> its values in percent, seed by seed; the same seeds for all figures of a row.
        against: name of the row that it is compared with, or "".
        note: further columns of text, by name.
    """

    group: str
    name: str
    figures: Dict[str, Dict[int, float]]
    against: str = ""
    note: Dict[str, str] = {}


def difference(lines: Sequence[Line], line: Line, figure: str) -> Optional[Difference]:
    """Mean of the differences to the row that the line is compared with, over the seeds that both have; None below 2."""
    other = next((each for each in lines if each.name == line.against), None)
    if other is None or figure not in other.figures or figure not in line.figures:
        return None
    seeds = [seed for seed in line.figures[figure] if seed in other.figures[figure]]
    if len(seeds) < 2:
        return None
    return paired_difference([line.figures[figure][s] for s in seeds], [other.figures[figure][s] for s in seeds])


def as_markdown(lines: Sequence[Line], figures: Sequence[str], compared: Sequence[str]) -> str:
    """A Markdown table: mean and standard deviation of the figures, and differences of some of them with 95 % intervals."""
    notes = list(dict.fromkeys(name for line in lines for name in line.note))
    head = ["", *figures, *(f"{name}, difference" for name in compared), "to", "seeds", *notes]
    rows = [head, ["---"] * len(head)]
    group = ""
    for line in lines:
        if line.group != group:
            group = line.group
            rows.append([f"**{group}**", *[""] * (len(head) - 1)])
        cells = [spread(list(line.figures[name].values()), "±") if line.figures.get(name) else "" for name in figures]
        found = [difference(lines, line, name) for name in compared]
        gains = ["" if d is None else f"{d.mean:+.1f} ({d.low:+.1f} to {d.high:+.1f})" for d in found]
        seeds = str(max((len(values) for values in line.figures.values()), default=0))
        rows.append([line.name, *cells, *gains, line.against, seeds, *(line.note.get(name, "") for name in notes)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def as_csv(lines: Sequence[Line]) -> str:
    """A line per row, figure and seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["group", "row", "figure", "seed", "percent"])
    for line in lines:
        for name, values in line.figures.items():
            for seed, value in values.items():
                writer.writerow([line.group, line.name, name, seed, f"{value:.4f}"])
    return out.getvalue()


def draw(lines: Sequence[Line], figure: str, title: str, path: Path) -> None:
    """A picture: every seed as a dot and the mean as a bar, row by row, and beside it the paired differences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [line for line in lines if line.figures.get(figure)]
    height = 0.26 * len(shown) + 1.3
    plot, (left, right) = pyplot.subplots(1, 2, sharey=True, figsize=(11, height), gridspec_kw={"width_ratios": [3, 2]})
    places = np.arange(len(shown))[::-1]
    colors: Dict[str, str] = {}
    for place, line in zip(places, shown):
        color = colors.setdefault(line.group, f"C{len(colors) % 10}")
        values = list(line.figures[figure].values())
        left.plot(values, [place] * len(values), "o", color=color, markersize=3.5, alpha=0.6)
        left.plot([np.mean(values)] * 2, [place - 0.35, place + 0.35], color=color, linewidth=2)
        found = difference(shown, line, figure)
        if found is not None:
            right.plot([found.low, found.high], [place, place], color=color, linewidth=1.5)
            right.plot([found.mean], [place], "o", color=color, markersize=4)
    number = {line.name: i for i, line in enumerate(shown, 1)}
    names: List[str] = []
    for line in shown:
        to = f"   [to {number[line.against]}]" if line.against in number else ""
        names.append(f"{line.name}{to}   {number[line.name]}")
    left.set_yticks(places, names, fontsize=7.5)
    left.set_ylim(-0.7, len(shown) - 0.3)
    left.set_xlabel(f"{figure} in percent: dots are seeds, bars means", fontsize=8)
    right.axvline(0, color="0.6", linewidth=0.8)
    right.set_xlabel("difference to the row in [ ],\npaired by seed, 95 % interval", fontsize=8)
    for axis in (left, right):
        axis.tick_params(axis="x", labelsize=7.5)
        axis.grid(axis="x", color="0.9")
    plot.suptitle(title, fontsize=10)
    plot.tight_layout()
    plot.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(plot)
