"""A baseline's own evaluation: python evaluation_worker.py REPO CAMS GT IDS OUT.json; per-class IoU at 60 thresholds."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path


def main(repo: str, cams: str, gt: str, ids: str, out: str) -> None:
    sys.dont_write_bytecode = True
    sys.path.insert(0, repo)
    evaluation = importlib.import_module("evaluation")
    names = Path(ids).read_text(encoding="utf-8").split()
    rows = []
    for i in range(60):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = evaluation.do_python_eval(cams, gt, names, 21, "npy", i / 100)
        rows.append([float(found[name]) for name in evaluation.categories])
    Path(out).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
