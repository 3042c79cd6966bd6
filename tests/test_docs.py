from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest

import semples_plugin

MODULES = ["semples_plugin", *(f"semples_plugin.{module.name}" for module in pkgutil.iter_modules(semples_plugin.__path__))]


def run_examples(name: str, namespace: Dict[str, Any]) -> doctest.TestResults:
    return doctest.testmod(importlib.import_module(name), extraglobs=namespace)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_docstring_examples_run(name: str, doctest_namespace: Dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    result = run_examples(name, doctest_namespace)
    assert result.failed == 0, capsys.readouterr().out


def test_refiner_has_an_example(doctest_namespace: Dict[str, Any]) -> None:
    assert run_examples("semples_plugin.refiner", doctest_namespace).attempted >= 5


@pytest.mark.parametrize("title", ["A complete run on a CPU", "Your own host"])
def test_the_snippet_of_the_readme_prints_what_it_says(title: str) -> None:
    root = Path(__file__).parents[1]
    section = (root / "README.md").read_text(encoding="utf-8").split(f"### {title}")[1]
    code, printed = (re.search(rf"```{kind}\n(.*?)```", section, re.S).group(1) for kind in ("python", "text"))  # type: ignore[union-attr]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == printed.strip()
