"""examples/quickstart.ipynb: what is stored in it, and a run from a clean state."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, Dict, List

import cv2
import numpy as np
import pytest

NEEDED = "the notebook test needs nbclient, nbformat and ipykernel: pip install 'semples-plugin[test]'"
NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"
# Appended to the notebook by the test: the values that its figures and its table show.
REPORT = """
import json
scores = {title: measure(masks, test, 0.5) for title, masks in (("before", before), ("after", after))}
print(json.dumps({"match": match, "refine": refine, "miou": {title: row.miou for title, row in scores.items()},
                  "share": {title: row.mean_share for title, row in scores.items()}}))
"""


def read_notebook() -> Any:
    return pytest.importorskip("nbformat", reason=NEEDED).read(NOTEBOOK, as_version=4)


def figures(notebook: Any) -> List[np.ndarray]:
    """The pictures (H, W, 3) among the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    return [cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR) for picture in pictures]


def mean(history: List[Dict[str, float]], name: str) -> float:
    return float(np.mean([terms[name] for terms in history]))


def test_the_stored_notebook_is_complete_and_small() -> None:
    notebook = read_notebook()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for cell in code for output in cell.outputs)
    assert len(figures(notebook)) == 2
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert str(Path.home()) not in text and str(NOTEBOOK.parent) not in text


def test_the_notebook_runs_from_a_clean_state() -> None:
    notebook = read_notebook()
    nbclient = pytest.importorskip("nbclient", reason=NEEDED)
    pytest.importorskip("ipykernel", reason=NEEDED)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells.append(pytest.importorskip("nbformat").v4.new_code_cell(REPORT))
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    report = json.loads(notebook.cells[-1].outputs[0].text)
    match, refine = report["match"], report["refine"]
    for name in ("match_foreground", "match_background"):
        assert mean(match[-10:], name) < 0.95 * mean(match[:5], name)
    assert mean(refine[-5:], "match_foreground") < mean(match[:5], "match_foreground")
    assert mean(refine[-5:], "refine") < 0.8 * mean(refine[:2], "refine")
    assert report["miou"]["after"] > report["miou"]["before"] + 0.1
    assert report["share"]["after"] < 0.5 * report["share"]["before"]
    pictures = figures(notebook)
    assert len(pictures) == 2 and all(picture.shape[1] > 300 and picture.std() > 20 for picture in pictures)
