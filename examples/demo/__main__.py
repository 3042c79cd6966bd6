"""The demo in one command: a host trained by classification only, then the three stages, a table and a picture.

python -m examples.demo --out runs/demo

The control rows (the area term alone, a CLIP with random weights, match without the area term) are in the table over seeds,
`python -m examples.demo.seeds`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from . import experiment
from .figure import draw_figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the picture and the table (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the scenes, the host, the batches and the prompts (%(default)s)"
    )
    args = parser.parse_args()
    print("The demo world: six things, each nearly always on its own stuff. Training sees image-level labels only.")
    print("This takes a few minutes on two cores.")
    settings = experiment.Settings()
    start = time.time()
    result = experiment.run(settings, args.seed, experiment.ONE_SEED)
    table = experiment.format_table(result.rows)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_figure(result, args.out / "demo.png")
    (args.out / "table.txt").write_text(table + "\n", encoding="utf-8")
    rows = {name: row._asdict() for name, row in result.rows.items()}
    (args.out / "table.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print()
    print(table)
    print(
        f"\n{len(result.test.scenes)} held-out scenes, seed {args.seed}. Background threshold of each row: chosen on "
        f"{settings.val} other scenes with masks; no mask is seen in training."
    )
    fit = result.fit
    print(
        f"\nThe prompts were learned on {fit.num_pairs} image-class pairs. Cosine: {fit.similarity:.2f} to the backgrounds, "
        f"{fit.class_similarity:.2f} to the class names.\nWhat they say (nearest of the {len(experiment.world_vocabulary())} "
        "names this CLIP knows, cosine):"
    )
    for prompt in result.nearest_words:
        print(f"  {prompt}")
    print(f"\nPicture: {args.out / 'demo.png'}   Table: {args.out / 'table.txt'}   ({time.time() - start:.0f} s)")


if __name__ == "__main__":
    main()
