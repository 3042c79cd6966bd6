"""Does the verdict of `PromptRefiner.check` predict whether the loss helps a class?

    python -m examples.prediction runs/seeds runs/photos/squeezenet runs/photos/mobilenet

The folders are those of `python -m examples.demo.seeds` and `python -m examples.photos`. Their records hold what the check said
of every class before training, and the IoU per class afterwards. The gain is that of the row over "host alone". A row of the
table is a verdict; a column counts the classes that gained more than a point of IoU, lost more than one, or stayed in between.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

HOST = "host alone"
VERDICTS = ("will help", "cannot tell", "will not")
MARGIN = 1.0  # points of IoU


class Case(NamedTuple):
    """One class of one host, CLIP and seed: what was said, and the gain in points of IoU."""

    source: str
    row: str
    seed: str
    name: str
    verdict: str
    gain: float
    figures: Dict[str, Any]


def cases_of(folder: Path) -> List[Case]:
    """All cases in the records of a folder."""
    found = []
    for path in sorted(folder.glob("seed_*.json")):
        rows: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for name, row in rows.items():
            for k, figures in enumerate(row.get("check", ())):
                before, after = (one["iou"][k + 1] for one in (rows[HOST], row))
                gain = 100 * ((after or 0.0) - (before or 0.0))
                found.append(Case(folder.name, name, path.stem, figures["name"], figures["verdict"], gain, figures))
    return found


def rank_correlation(a: Sequence[Optional[float]], b: Sequence[float]) -> Optional[float]:
    """Spearman's rank correlation of the pairs whose first value is known; None for fewer than 3."""
    known = [(x, y) for x, y in zip(a, b) if x is not None]
    if len(known) < 3:
        return None
    ranks = [np.argsort(np.argsort(values)) for values in zip(*known)]
    return float(np.corrcoef(*ranks)[0, 1])


def table(cases: Sequence[Case]) -> str:
    """Counts per source, row and verdict, then how the check's figures rank with the gain."""
    lines = [f"{'':58s} {'gained':>7s} {'same':>6s} {'lost':>6s}   mean gain"]
    for source, row in dict.fromkeys((c.source, c.row) for c in cases):
        for verdict in VERDICTS:
            gains = np.array([c.gain for c in cases if (c.source, c.row, c.verdict) == (source, row, verdict)])
            if len(gains):
                up, down = int((gains > MARGIN).sum()), int((gains < -MARGIN).sum())
                title = f"{source}, {row}: {verdict}"
                lines.append(f"{title:58s} {up:7d} {len(gains) - up - down:6d} {down:6d}   {gains.mean():+9.1f}")
    told = [c for c in cases if c.verdict != "cannot tell"]
    right = sum((c.gain > 0) == (c.verdict == "will help") for c in told)
    lines.append(f"{len(cases)} cases; of {len(told)} with a verdict the sign of the gain was as said in {right}")
    for key in ("average_precision", "removed_auc", "shifted_auc", "cos_kept", "cos_removed"):
        value = rank_correlation([c.figures[key] for c in cases], [c.gain for c in cases])
        lines.append(f"rank correlation of {key} with the gain: " + ("-" if value is None else f"{value:+.2f}"))
    return "\n".join(lines)


def main(argv: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.prediction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="folders with records seed_*.json")
    args = parser.parse_args(argv or None)
    cases = [case for folder in args.folders for case in cases_of(folder)]
    if not cases:
        parser.error("no record in these folders holds what a check said")
    print(table(cases))


if __name__ == "__main__":
    main()
