"""`semples prompts show`: what a file of learned prompts holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

__all__ = ["add_parser", "nearest_words", "run"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `semples`."""
    actions = commands.add_parser("prompts", help="learned prompts").add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    parser = actions.add_parser("show", help="what a prompt file holds and, with --clip, the nearest words")
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="prompt file")
    add("--clip", metavar="NAME", help="CLIP model or weights file, for the nearest words")
    add("--vocabulary", type=Path, metavar="FILE", help="words to choose from, one per line (default: a built-in list)")
    add("--top", type=int, default=5, metavar="N", help="words per class (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the file holds; returns 0."""
    from ..prompt_files import read_file

    found = read_file(options.file)
    words = None
    if options.clip is not None:
        words = nearest_words(options.file, options.clip, options.vocabulary, options.top)
    if options.json:
        shown: Dict[str, Any] = {**found._asdict(), "config": found.config.as_dict(), "vectors": list(found.context.shape)}
        del shown["context"]
        if words is not None:
            shown["nearest_words"] = {
                w.title: {"class_similarity": w.class_similarity, "words": w.words, "alive": w.alive} for w in words
            }
        print(json.dumps(shown, ensure_ascii=False))
        return 0
    classes, per_class, length = found.context.shape[:3]
    print(f"{options.file}: {classes * per_class} prompts of {length} vectors, CLIP {found.clip}")
    print(f"classes: {', '.join(found.classes)}")
    lost = [name for name, alive in zip(found.classes, found.alive) if not any(alive)]
    if lost:
        print(f"without a prompt in use (failed or without data): {', '.join(lost)}")
    print(f"layout: {found.config.prompt_template!r}, class text: {found.config.text_template!r}")
    if words is None:
        print("Give --clip to see the nearest words.")
    for line in words or ():
        print(f"  {line}")
    return 0


def nearest_words(file: Path, clip: Optional[str], vocabulary: Optional[Path] = None, top: int = 5) -> List[Any]:
    """The prompts of a file in words: a `NearestWords` per prompt.

    Args:
        file: prompt file.
        clip: CLIP model or weights file; None for the one that the file names.
        vocabulary: file of words; None for the built-in list.
        top: words per class.
    """
    from ..prompts import read_vocabulary
    from ..refiner import PromptRefiner

    words = None if vocabulary is None else read_vocabulary(vocabulary)
    return PromptRefiner.load(file, clip=clip).nearest_words(words, top=top)
