from __future__ import annotations

import doctest
import importlib
import pkgutil
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
