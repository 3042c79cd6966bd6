from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from semples_plugin import cli
from semples_plugin.cli.arguments import read_ids
from semples_plugin.clusters.language_model import clusters_from_language_model
from semples_plugin.config import parse_assignments
from semples_plugin.files.refine_folder import Options
from semples_plugin.files.report import write_report

ROOT = Path(__file__).resolve().parents[2]


def test_assignments_are_python_literals_or_texts() -> None:
    given = ["a=1", "b=0.5", "c=None", "d=log1m", "e=['x', 'y']", "f=a=b", "g="]
    assert parse_assignments("--set", given) == {
        "a": 1, "b": 0.5, "c": None, "d": "log1m", "e": ["x", "y"], "f": "a=b", "g": "",
    }  # fmt: skip
    for wrong in ("a", "=1", "a b=1", "1a=2"):
        with pytest.raises(ValueError, match="--set takes NAME=VALUE; got"):
            parse_assignments("--set", [wrong])


def test_ids_of_a_list_file(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a\n\n b.JPG \n/JPEGImages/c.jpg /Labels/c.png\nd.e 1\nf.npy\n")
    assert read_ids(tmp_path / "val.txt") == ["a", "b", "c", "d.e", "f"] and read_ids(None) is None


def test_defaults_are_those_of_the_library() -> None:
    parse = cli.build_parser().parse_args
    refine = parse(["refine", "--images", "a", "--cams", "b", "--out", "c"])
    expected_options = {**Options()._asdict(), "clip_steps": None}  # it depends on whether there is a CLIP
    assert {name: getattr(refine, name) for name in Options._fields} == expected_options
    clusters = parse(["clusters", "--model", "a", "--out", "c.json"])
    expected = inspect.signature(clusters_from_language_model).parameters
    for name in ("base_url", "max_rounds", "max_clusters", "initial_prompt", "refine_prompt", "max_tokens", "timeout",
                 "accept_unconverged"):  # fmt: skip
        assert getattr(clusters, name) == expected[name].default
    assert clusters.retries == expected["max_retries"].default
    report = parse(["report", "--images", "a", "--before", "b", "--after", "c", "--gt", "d", "--out", "e"])
    expected = inspect.signature(write_report).parameters
    assert (report.title, report.rows) == (expected["title"].default, expected["rows"].default)


def test_help_imports_no_heavy_packages() -> None:
    code = "import sys; old = {*sys.modules}; from semples_plugin import cli; cli.build_parser(); print(*{*sys.modules} - old)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"PIL", "clip", "cv2", "jinja2", "openai", "sklearn"} & set(modules)
    assert not [name for name in modules if name.startswith(("semples_plugin.files.", "semples_plugin.clusters."))]
