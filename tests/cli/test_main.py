from __future__ import annotations

import argparse
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from semples_plugin import cli
from tests.cli.running import Data, run


def commands() -> Dict[str, argparse.ArgumentParser]:
    """Words of each command -> its parser."""
    found: Dict[str, argparse.ArgumentParser] = {}

    def walk(words: str, parser: argparse.ArgumentParser) -> None:
        found[words] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, part in action.choices.items():
                    walk(f"{words} {name}".strip(), part)

    walk("", cli.build_parser())
    return found


@pytest.mark.parametrize(
    "command, words",
    [
        ("", ["refine", "evaluate", "report", "prompts", "clusters", "Exit status", "semples refine --images",
              "pseudo labels"]),
        ("refine", ["--images", "--cams", "--out", "--labels", "cls_labels.npy", "COCO", "VOC XML", "--classes", "--suppress",
                    "--clip-steps", "MCTformer", "IRN", "1 + class index", "torchrun", "interrupted", "0.4"]),
        ("evaluate", ["--pred", "--gt", "--list", "255", "--threshold", "chosen on ground truth", "--csv", "--json", "0:100"]),
        ("report", ["--before", "--after", "--gt", "--out", "--prompts", "--rows", "--images", "ground-truth"]),
        ("check", ["--images", "--cams", "--labels", "--prompts", "--clip", "--list", "--limit", "--out", "--json",
                   "No pixel mask"]),
        ("prompts", ["show"]),
        ("prompts show", ["FILE", "--clip", "--vocabulary", "--top", "--json", "nearest words"]),
    ],
)  # fmt: skip
def test_help_names_the_options(command: str, words: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *command.split(), "--help")
    assert (status, err) == (0, "")
    flat = " ".join(out.split())
    for word in words:
        assert word in flat
    assert out.startswith(f"usage: semples {command}".rstrip())


def test_every_option_is_explained() -> None:
    found = commands()
    assert set(found) == {"", "refine", "evaluate", "report", "check", "prompts", "prompts show", "clusters"}
    bare = [
        f"{words} {'/'.join(action.option_strings) or action.dest}"
        for words, parser in found.items()
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert bare == []


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the following arguments are required: COMMAND"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["refine"], "the following arguments are required: --images, --cams, --out"),
        (
            ["refine", "--images", "a", "--cams", "b", "--out", "c", "--threshold", "much"],
            "must be a number, two such as 0.3:0.5, or auto; got 'much'",
        ),
        (["refine", "--images", "a", "--cams", "b", "--out", "c", "--align", "edges"], "invalid choice: 'edges'"),
        (["refine", "--images", "a", "--cams", "b", "--out", "c", "--bogus"], "unrecognized arguments: --bogus"),
        (["evaluate", "--pred", "a"], "the following arguments are required: --gt"),
        (["report"], "the following arguments are required: --images, --before, --after, --gt, --out"),
        (["check"], "the following arguments are required: --images, --cams"),
        (["prompts"], "the following arguments are required: ACTION"),
        (["prompts", "show"], "the following arguments are required: FILE"),
    ],
)
def test_usage_errors(arguments: List[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("usage: semples") and reason in err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["refine", "--cams", "DATA/none"], "there is no folder"),
        (["refine", "--cams", "DATA/val"], "holds no .npy or .npz file"),
        (["refine", "--batch-size", "0"], "--batch-size and --max-pixels at least 1"),
        (["refine", "--max-pixels", "0"], "--batch-size and --max-pixels at least 1"),
        (["refine", "--threshold", "nan"], "threshold"),
        (["refine", "--labels", "DATA/none.npy"], "No label file at"),
        (["refine", "--labels", "DATA/classes.txt"], "Labels are read from"),
        (["refine", "--classes", "pascal"], "class names must be voc, coco or a readable file; got 'pascal'"),
        (["refine", "--classes", "DATA/val"], "class names must be voc, coco or a readable file"),
        (["refine", "--classes", "DATA/latin1.txt"], "class names must be voc, coco or a readable file"),
        (["refine", "--classes", "DATA/empty.txt"], "class"),
        (["refine", "--classes", "DATA/twice.txt"], "twice"),
        (["refine", "--classes", "DATA/broken.json"], "is not readable JSON"),
        (["refine", "--classes", "DATA/deep.json"], "is not readable JSON"),
        (["refine", "--classes", "DATA/number.json"], "must hold a list of names, or a mapping"),
        (["refine", "--classes", "DATA/numbers.json"], "name"),
        (["evaluate", "--classes", "DATA/numbers.json"], "name"),
        (["evaluate", "--classes", "DATA/empty.txt"], "class"),
        (["evaluate", "--pred", "DATA/none"], "--pred and --gt must be folders"),
        (["evaluate", "--gt", "DATA/classes.txt"], "--pred and --gt must be folders"),
        (["evaluate", "--list", "DATA/none.txt"], "none.txt"),
        (["evaluate", "--list", "DATA/latin1.txt"], ""),
        (["evaluate", "--csv", "DATA/none/table.csv"], "table.csv"),
        (["prompts", "show", "DATA/none"], "No prompt file at"),
        (["prompts", "show", "DATA"], "No prompt file at"),
        (["prompts", "show", "DATA/classes.txt"], "is damaged or no safetensors file"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    arguments: List[str], reason: str, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.root / "images").mkdir()
    for name, content in {
        "empty.txt": "\n \n", "twice.txt": "twice\nboat\ntwice\n", "broken.json": "[1,", "number.json": "7",
        "numbers.json": "[1, 2, 3, 4]", "deep.json": "[" * 100_000,
    }.items():  # fmt: skip
        (data.root / name).write_text(content)
    (data.root / "latin1.txt").write_bytes("Möwe".encode("latin1"))
    arguments = [item.replace("DATA", str(data.root)) for item in arguments]
    usual: Dict[str, List[Tuple[str, Path]]] = {
        "refine": [("--images", data.root / "images"), ("--cams", data.cams), ("--out", data.root / "out")],
        "evaluate": [("--pred", data.cams), ("--gt", data.gt)],
        "prompts": [],
    }
    for option, value in [*usual[arguments[0]], *([("--classes", data.classes)] if arguments[0] != "prompts" else [])]:
        if option not in arguments:
            arguments += [option, str(value)]
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and err.startswith("error: ") and reason in err and err.count("\n") == 1
