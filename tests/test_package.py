from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import List

import pytest

import semples_plugin

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = ["clip", "cv2", "safetensors", "timm", "torchvision", "tqdm", "PIL", "matplotlib", "open_clip", "ftfy", "regex"]
FOREIGN += ["openai", "yaml", "sklearn", "scipy"]


def fresh_modules(code: str) -> List[str]:
    """Names of all modules that a fresh process has loaded after `code`."""
    path = os.pathsep.join(p for p in sys.path if p and Path(p) != ROOT / "tests" / "hosts" / "site")  # it imports torchvision
    root = str(Path(semples_plugin.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, path])}
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sorted(sys.modules), sep='\\n')"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout.split()


def test_public_names() -> None:
    assert semples_plugin.__all__ == [
        "COCO",
        "VOC",
        "ClipError",
        "DetachedCamError",
        "PromptFileError",
        "PromptRefiner",
        "RefinerConfig",
        "SemplesError",
    ]
    assert all(hasattr(semples_plugin, name) for name in semples_plugin.__all__)
    assert semples_plugin.__version__.count(".") == 2


def test_import_brings_torch_and_numpy_only() -> None:
    before, after = fresh_modules("import torch, numpy"), fresh_modules("import semples_plugin")
    new = {name.split(".")[0] for name in set(after) - set(before)}
    assert "semples_plugin.refiner" in after
    assert not new & set(FOREIGN)
    assert {name for name in new if "site-packages" in str(importlib.util.find_spec(name).origin)} <= {
        "semples_plugin",
        "torch",
        "numpy",
    }


def test_clip_works_without_its_heavy_imports() -> None:
    code = """
import torch
from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import openai_clip_module
clip = openai_clip_module('model').CLIP(32, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
refiner = PromptRefiner(['boat', 'train'], clip=clip, image_stats=None)
assert refiner.text_features.shape == (2, 32) and refiner.text_features.isfinite().all()
assert refiner(torch.rand(1, 3, 32, 32), torch.rand(1, 2, 4, 4, requires_grad=True), torch.ones(1, 2)) > 0"""
    loaded = {name.split(".")[0] for name in fresh_modules(code)}
    assert "regex" in loaded  # the tokenizer ran
    assert not loaded & {"clip", "torchvision", "PIL", "pkg_resources", "cv2", "matplotlib"}


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    for needed in ("setuptools", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed, so no wheel can be built without a download")
    if not (ROOT / "setup.cfg").is_file():
        pytest.skip("the tests do not lie beside the sources")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
        else:
            (source / name).write_text("placeholder\n")
    for name in ("semples_plugin", "adapters", "examples", "tests", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.pt"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet"]
    result = subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"semples_plugin-{semples_plugin.__version__}-py3")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "semples_plugin").glob("**/*.py")}
    adapters = {f"semples_plugin/{file.relative_to(ROOT)}" for file in (ROOT / "adapters").glob("**/*.py")}
    assert {"semples_plugin/adapters/__init__.py", "semples_plugin/adapters/runner/__init__.py"} <= adapters
    data = {"vocabulary.txt", "py.typed", "clusters/voc.json", "clusters/coco.json"}
    data |= {"clusters/prompt_initial.txt", "clusters/prompt_refine.txt"}
    data |= {str(file.relative_to(ROOT / "semples_plugin")) for file in (ROOT / "semples_plugin").glob("**/*.html")}
    assert modules | adapters | {f"semples_plugin/{name}" for name in data} <= names
    assert {name.split("/")[0] for name in names} == {
        "semples_plugin",
        f"semples_plugin-{semples_plugin.__version__}.dist-info",
    }
    metadata = zipfile.ZipFile(wheel).read(f"semples_plugin-{semples_plugin.__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch>=2.0" in metadata and "Requires-Python: >=3.9" in metadata


def private_uses(path: Path) -> List[str]:
    """Names with a leading underscore that a file takes from another file of ours: `from .x import _y`, or `x._y`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in OURS):
            for alias in node.names:
                modules.add(alias.asname or alias.name)
                if alias.name.startswith("_") and not alias.name.startswith("__") and not is_module(path, node, alias.name):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.value.id}.{node.attr}")
    return found


OURS = ("semples_plugin", "examples", "benchmarks")


def is_module(path: Path, node: ast.ImportFrom, name: str) -> bool:
    folder = path.parents[node.level - 1] if node.level else ROOT
    return (folder.joinpath(*(node.module or "").split(".")) / f"{name}.py").is_file()


def test_no_file_takes_a_private_name_of_another() -> None:
    files = [
        path for name in ("semples_plugin", "adapters", "examples", "benchmarks") for path in (ROOT / name).glob("**/*.py")
    ]
    assert len(files) > 50
    assert [use for path in files for use in private_uses(path)] == []
