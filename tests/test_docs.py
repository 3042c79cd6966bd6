from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

import pytest
import torch

import semples_plugin
from semples_plugin import adapters

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


# ---------------------------------------------------------------------------------------------------- docstrings


def module_names() -> List[str]:
    """The package and all its modules; adapters come from a folder of their own."""
    found = {semples_plugin.__name__, adapters.__name__}
    for package in (semples_plugin, adapters):
        found |= {module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")}
    return sorted(name for name in found if not name.endswith("__main__"))


def run_examples(name: str, namespace: Dict[str, Any]) -> doctest.TestResults:
    return doctest.testmod(importlib.import_module(name), extraglobs=namespace)


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples_run(name: str, doctest_namespace: Dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    result = run_examples(name, doctest_namespace)
    assert result.failed == 0, capsys.readouterr().out


def test_refiner_has_an_example(doctest_namespace: Dict[str, Any]) -> None:
    assert run_examples("semples_plugin.refiner", doctest_namespace).attempted >= 5


# ---------------------------------------------------------------------------------------------------- snippets


class Snippet(NamedTuple):
    """A ```python block of a page, and what the ```text block right behind it says that it prints."""

    page: Path
    line: int
    code: str
    printed: Optional[str]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets() -> Iterator[Snippet]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.S | re.M):
            yield Snippet(page, text[: found.start()].count("\n") + 1, textwrap.dedent(found[1]), found[2])


RUN = [snippet for snippet in snippets() if snippet.printed is not None]
SHOWN = [snippet for snippet in snippets() if snippet.printed is None]


@pytest.mark.parametrize("snippet", RUN, ids=str)
def test_snippet_prints_what_the_page_says(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), torch.random.fork_rng():
        exec(compile(snippet.code, str(snippet), "exec"), {"__name__": "__main__"})
    assert output.getvalue().strip() == str(snippet.printed).strip()


@pytest.mark.parametrize("snippet", SHOWN, ids=str)
def test_snippet_is_python(snippet: Snippet) -> None:
    compile(snippet.code, str(snippet), "exec")


def test_readme_and_pages_have_snippets_that_run() -> None:
    assert {"README.md", "three-stages.md", "your-own-host.md", "clusters.md"} <= {snippet.page.name for snippet in RUN}


def commands() -> List[str]:
    """Lines of ```sh blocks, continued lines joined, without comments and variables in front."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                found.append(re.sub(r"^(\w+=\S+ )+", "", line.split(" # ")[0]).strip())
    return sorted({line for line in found if line})


@pytest.mark.parametrize("line", [line for line in commands() if re.match(r"semples |python -m semples_plugin", line)])
def test_options_of_commands_exist(line: str, capsys: pytest.CaptureFixture) -> None:
    words = line.split(" -- ")[0].replace("python -m semples_plugin.adapters", "adapters").split()
    name = "semples_plugin.adapters.__main__" if words[0] == "adapters" else "semples_plugin.cli"
    action = words[1:3] if words[1] == "prompts" else words[1:2]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main([*action, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert stop.value.code == 0
    assert {word for word in words if word.startswith("--")} <= known


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        used = set(re.findall(r"(?:`|^|=\w+ )make ([a-z][\w-]*)", page.read_text(encoding="utf-8"), re.M))
        assert used <= targets, page.name


# ---------------------------------------------------------------------------------------------------- pages


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9216


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """`make docs` checks those within docs/ as well, but not those of README.md."""
    for target, anchor in re.findall(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        path = page.parent / target
        assert path.is_file(), target
        if anchor:
            included = ROOT / "CONTRIBUTING.md" if path.name == "contributing.md" else path
            titles = re.findall(r"^#+ (.*)$", included.read_text(encoding="utf-8"), re.M)
            assert anchor[1:] in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if not re.search(rf": {page.name}$", text, re.M)]
    assert missing == []


# ---------------------------------------------------------------------------------------------------- messages

FIELD = "\0"  # stands for a field of an f-string


def static_text(node: ast.AST) -> str:
    """A string of the source with FIELD for everything that varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(static_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return static_text(node.left) + static_text(node.right)
    return FIELD


def source_trees() -> Iterator[ast.Module]:
    for folder in ("semples_plugin", "adapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(path.read_text(encoding="utf-8"))


def raised_messages() -> List[str]:
    """What `raise Error(...)` and `warn(...)` say, as far as it is written there."""
    found = set()
    for tree in source_trees():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else node
            if not (isinstance(call, ast.Call) and call.args):
                continue
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if isinstance(node, ast.Raise) and not name.startswith("_") or name == "warn" or name.endswith("Error"):
                found.add(static_text(call.args[0]))
    return sorted(text for text in found if len(text.replace(FIELD, "").split()) > 1)


def listed_messages() -> List[str]:
    """The message beginnings of the troubleshooting page: code spans of two backticks."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [" ".join(part.split()) for part in re.findall(r"(?<!`)``(?!`) ?(.+?) ?(?<!`)``(?!`)", text, re.S)]


def pattern(beginning: str) -> "re.Pattern[str]":
    """`...` of the page stands for a field and what may be around it."""
    return re.compile(f".*?{FIELD}.*?".join(re.escape(part) for part in beginning.split("...")), re.S)


def test_troubleshooting_names_messages_that_exist() -> None:
    written = {static_text(node) for tree in source_trees() for node in ast.walk(tree) if isinstance(node, ast.expr)}
    invented = [text for text in listed_messages() if not any(pattern(text).match(message) for message in written)]
    assert invented == []


def test_troubleshooting_names_every_message() -> None:
    patterns = [pattern(text) for text in listed_messages()]
    missing = [text for text in raised_messages() if not any(one.match(text) for one in patterns)]
    assert missing == []
