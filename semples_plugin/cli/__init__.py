"""`semples`: folders of CAM files in, better masks, figures and pictures out.

    semples refine --images JPEGImages --cams cam-npy --out refined      # CAMs -> refined CAMs and pseudo labels
    semples evaluate --pred refined/labels --gt SegmentationClass        # how good are they?
    semples report --images JPEGImages --before cam-npy --after refined/cams --gt SegmentationClass --out report.html
    semples check --images JPEGImages --cams cam-npy --out check.html   # would the loss help?
    semples prompts show voc_prompts.safetensors                         # what do the learned prompts say?
    semples clusters --classes voc --model llama3.1 --base-url http://localhost:11434/v1 --out clusters.json

Exit status: 0 all done, 1 something failed (the summary says what), 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import sys
from typing import Optional, Sequence

from .. import __version__
from .._text import printable
from ..errors import SemplesError
from . import check, clusters, evaluate, prompts, refine, report
from .printing import escaped_output

__all__ = ["build_parser", "main"]

LONGEST = 4000  # characters of an error
_EXTRAS = {"PIL": "cli", "cv2": "cli", "jinja2": "cli", "openai": "clusters", "scipy": "clusters", "sklearn": "clusters"}


def build_parser() -> argparse.ArgumentParser:
    """The parser of `semples` with all its commands. Each command sets `run`, a function of the parsed options."""
    parser = argparse.ArgumentParser(prog="semples", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(interrupted=_starts_again)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (refine, evaluate, report, check, prompts, clusters):
        command.add_parser(commands)
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run `semples` with these arguments, by default those of the process; returns the exit status."""
    options = build_parser().parse_args(arguments)
    with escaped_output():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print(f"interrupted; {options.interrupted(options)}", file=sys.stderr)
        return 130
    except (SemplesError, OSError, ValueError, TypeError) as error:
        print(f"error: {printable(' '.join(str(error).splitlines()), LONGEST)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRAS:
            raise
        needed = f"pip install 'semples-plugin[{_EXTRAS[name]}]'"
        print(f"error: {name} is missing. Install what the command line needs: {needed}.", file=sys.stderr)
        return 2


def _starts_again(options: argparse.Namespace) -> str:
    return f"`semples {options.command}` starts anew with the same command."
