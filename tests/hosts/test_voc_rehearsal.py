"""The chain of `examples.voc` with the real MCTformer+: a rehearsal, once whole and once killed twice, with the same files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
OWN = ("ledger.html", "steps/ledger.json", "steps/digests.json")  # the second holds the digest of the first
TIMES = re.compile(rb'"(started|finished|seconds|went_on|stamp)": [^\n]*')


def command(hosts: Any, out: Path) -> List[str]:
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "examples.voc",
        "--voc",
        str(hosts.photos()),
        "--repo",
        str(hosts.repo("mctformer")),
    ]
    return [*words, "--out", str(out), "--rehearsal", "--cpu", "--limit", "4"]


def environment() -> Dict[str, str]:
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(hosts: Any, out: Path) -> str:
    done = subprocess.run(command(hosts, out), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def kill_at(hosts: Any, out: Path, path: Path) -> None:
    """Start the chain and kill all its processes when there is such a file."""
    process = subprocess.Popen(
        command(hosts, out),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 1200
        while not path.exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def contents(out: Path) -> Dict[str, bytes]:
    """All files without times in records; logs, the page and summaries of one process not at all."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and not name.startswith("logs") and name not in OWN and path.name != "summary.json":
            found[name] = TIMES.sub(b"", path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
    return found


def test_a_rehearsal_runs_to_the_end_and_again_after_kills(hosts: Any, tmp_path: Path) -> None:
    if not (hosts.photos() / "SegmentationClass").is_dir() or not (hosts.photos() / "ImageSets").is_dir():
        pytest.skip("VOC_PHOTOS has no SegmentationClass and ImageSets")
    before, out = hosts.state("mctformer"), tmp_path / "run"
    assert "All done" in run(hosts, out)
    ledger = json.loads((out / "ledger.json").read_text(encoding="utf-8"))
    assert ledger["banner"].startswith("Rehearsal")
    rows = {(section["title"], row["name"]): row for section in ledger["sections"] for row in section["rows"]}
    assert all(0 <= row["mean"] <= 100 for row in rows.values() if not row["why"])
    assert not any(row["why"] for (title, name), row in rows.items() if title in ("Seeds", "Masks") and "CRF" not in name)
    (gain,) = rows["Masks", "fixed threshold"]["gain"]
    assert gain == pytest.approx(
        rows["Masks", "fixed threshold"]["mean"] - rows["Masks", "host alone: fixed threshold"]["mean"]
    )
    assert rows["Segmentation", "network alone"]["split"] == "val"
    whole = contents(out)
    again = run(hosts, out)
    assert again.count("done before, skipped") == again.count("[") - 2  # all but the check and the ledger
    out.rename(tmp_path / "whole")
    kill_at(hosts, out, out / "seed0" / "runner" / "match.jsonl")
    kill_at(hosts, out, out / "seed0" / "masks" / "cams")
    run(hosts, out)
    killed = contents(out)
    assert killed.keys() == whole.keys()
    assert [name for name in whole if killed[name] != whole[name]] == []
    assert hosts.state("mctformer") == before
