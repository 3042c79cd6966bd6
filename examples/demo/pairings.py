"""Does every learned prompt find the stuff that comes with its class? In the demo world, and with other homes for its things.

    python -m examples.demo.pairings --out runs/pairings

For every seed the host is trained by classification, then with the match term; then the background prompts are learned. The
table has a row per class and seed: whether the prompt is alive, its cosine to the backgrounds and to the class name, how often
it was learned, and the nearest of the names that this CLIP knows. The record of a finished seed is cached in the folder.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch

from ..seeds import cached_record, source_hash
from .experiment import Settings, new_refiner, refiner_loss, world_vocabulary
from .host import HostCam, make_split, train_host
from .world import WORLD, World

# No thing keeps its home, and each comes with the home of another.
OTHER_HOME = {
    "boat": "road", "train": "grass", "bird": "water", "sheep": "sand", "car": "rails", "cactus": "sky",
}  # fmt: skip
HOMES: Dict[str, World] = {"own": WORLD, "other": World(WORLD.things, OTHER_HOME, WORLD.neutral, WORLD.flyer)}


def run_seed(seed: int, world: World = WORLD, settings: Optional[Settings] = None) -> Dict[str, Any]:
    """The prompts of one seed as plain numbers, after host training and stages (a) and (b)."""
    settings = settings or Settings()
    torch.manual_seed(seed)
    train = make_split(settings.train, 10_000 + seed, world)
    host = HostCam()
    train_host(host, train, settings.host_steps, settings.host_lr, settings.host_batch_size, seed, "host: classification only")
    refiner = new_refiner(settings, seed)
    loss = refiner_loss(refiner)
    train_host(host, train, settings.stage_steps, settings.stage_lr, settings.batch_size, seed, "stage a: match", loss)
    fit = refiner.fit_prompts(train.batches(50), host.cam)
    rows = []
    for prompt, reading in zip(fit.prompts, refiner.nearest_words(world_vocabulary(), top=1)):
        ((word, cosine),) = reading.words
        rows.append({**prompt._asdict(), "stuff": world.home[prompt.name], "word": word, "word_similarity": cosine})
    return {"prompts": rows}


def summary(records: Dict[str, Dict[int, Dict[str, Any]]]) -> str:
    """The table of all pairings (homes -> seed -> record of `run_seed`), and how many prompts are alive and right."""
    lines = [f"{'homes':6s} {'seed':>4s}  {'thing on stuff':18s} {'alive':5s} {'cos(v_b,u_b)':>12s} {'empty':>6s} "
             f"{'cos(u_f,u_b)':>12s} {'attempts':>8s}  nearest word"]  # fmt: skip
    rows: List[Dict[str, Any]] = []
    for homes, of_seed in records.items():
        for seed, record in of_seed.items():
            for row in record["prompts"]:
                rows.append(row)
                pairing = f"{row['name']} on {row['stuff']}"
                lines.append(
                    f"{homes:6s} {seed:4d}  {pairing:18s} {'yes' if row['alive'] else 'NO':5s} {row['similarity']:12.2f} "
                    f"{row['empty_similarity']:6.2f} {row['class_similarity']:12.2f} {row['attempts']:8d}  "
                    f"{row['word']} {row['word_similarity']:.2f}{'' if row['word'] == row['stuff'] else '  (another)'}"
                )
    alive = sum(row["alive"] for row in rows)
    right = sum(row["word"] == row["stuff"] for row in rows)
    again = sum(row["attempts"] > 1 for row in rows)
    lines.append(
        f"\n{len(rows)} pairings: {alive} prompts alive, {again} learned more than once; the nearest word is the stuff "
        f"that comes with the class for {right}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo.pairings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds with the world's own homes, from 1 (%(default)s)")
    parser.add_argument("--other-seeds", type=int, default=2, help="seeds with other homes, from 1 (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pairings"), help="folder for the records and the table (%(default)s)"
    )
    args = parser.parse_args()
    made_with = source_hash(Path(__file__).parent)
    records: Dict[str, Dict[int, Dict[str, Any]]] = {}
    for homes, count in (("other", args.other_seeds), ("own", args.seeds)):
        folder = args.out / homes
        folder.mkdir(parents=True, exist_ok=True)
        run = partial(run_seed, world=HOMES[homes])
        records[homes] = {seed: cached_record(folder, seed, made_with, run) for seed in range(1, count + 1)}
    text = summary(records)
    (args.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
