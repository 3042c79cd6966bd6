"""The ablation and the compatibility table, on a few scenes and steps; cells, tables and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pytest
import torch

from examples.ablation import __main__ as ablation
from examples.ablation.data import DemoWorld
from examples.ablation.experiment import Run, Settings
from examples.ablation.rows import AREA, BASE, HOST, LEARNED, MATCH, ROWS, distinct_rows
from examples.cells import Cell, run_cells
from examples.compatibility import __main__ as compatibility
from examples.compatibility import experiment as compatibility_experiment
from examples.compatibility.experiment import ADDONS
from examples.controls import AreaOnly
from examples.demo.experiment import CLIP_FILE
from examples.demo.host import HostCam
from examples.hosts import MissingHost, SmallHost, make_host
from examples.recipe import COMPACT_CLIP
from examples.small import small_iou
from examples.tables import Line, as_csv, as_markdown, difference, draw
from semples_plugin import PromptRefiner
from semples_plugin.config import VOC
from tests.voc_photos import write_photos


def count(cell: Cell) -> Dict[str, Any]:
    return {"value": cell.seed + len(cell.row)}


def test_cells_are_computed_once_and_again_for_other_code(tmp_path: Path) -> None:
    cells = [Cell("a row", 1), Cell("a row", 2), Cell("another", 1, 1)]
    calls = []

    def run(cell: Cell) -> Dict[str, Any]:
        calls.append(cell)
        return count(cell)

    first = run_cells(tmp_path, cells[1:], "code", run)
    assert calls == [cells[1], cells[2]] and first[cells[2]] == {"value": 8}
    assert run_cells(tmp_path, cells, "code", run) == {cell: count(cell) for cell in cells} and calls[2:] == [cells[0]]
    run_cells(tmp_path, cells, "other code", run)
    assert len(calls) == 6
    assert not list(tmp_path.rglob("*.part"))


def odd_only(cell: Cell) -> Dict[str, Any]:
    if cell.seed % 2 == 0:
        raise ValueError(f"seed {cell.seed} is even")
    return count(cell)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails_leaves_the_others(jobs: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cells = [Cell("row", seed) for seed in (1, 2, 3)]
    with pytest.raises(RuntimeError, match="1 cells failed, their errors are above: row, seed 2. The others are kept."):
        run_cells(tmp_path, cells, "code", odd_only, jobs)
    assert "seed 2 is even" in capfd.readouterr().err and len(list(tmp_path.rglob("*.json"))) == 2


def test_cells_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    cells = [Cell("row", seed, level) for seed in (1, 2) for level in (0,)]
    assert run_cells(tmp_path, cells, "code", count, jobs=2) == {cell: count(cell) for cell in cells}


LINES = [
    Line("controls", "alone", {"mIoU": {1: 40.0, 2: 42.0, 3: 44.0}}),
    Line("method", "+ match", {"mIoU": {1: 50.0, 2: 51.0}}, "alone", {"prompts not in use": "1"}),
]


def test_tables_pair_by_seed_and_say_what_they_compare(tmp_path: Path) -> None:
    found = difference(LINES, LINES[1], "mIoU")
    assert found is not None and found.mean == pytest.approx(9.5)
    text = as_markdown(LINES, ["mIoU"], ["mIoU"])
    assert "| alone | 42.0 ± 2.0 |  |  | 3 |  |" in text
    assert f"| + match | 50.5 ± 0.7 | +9.5 ({found.low:+.1f} to {found.high:+.1f}) | alone | 2 | 1 |" in text
    assert as_csv(LINES).splitlines()[:2] == ["group,row,figure,seed,percent", "controls,alone,mIoU,1,40.0000"]
    draw(LINES, "mIoU", "a title", tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 5000


def small(folder: Path) -> Settings:
    return Settings("demo", None, str(CLIP_FILE), COMPACT_CLIP.replace(epochs=2), 64, 2, 2, 2e-3, 8, 8, 4.0, 0.25, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(small(tmp_path_factory.mktemp("parts")), DemoWorld(16, 8, 8), 1)


def test_every_row_has_a_loss_of_its_own_and_a_row_to_compare_with(run: Run) -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(row.against in names for row in ROWS if row.name != HOST)
    for row in ROWS:
        refiner = run.refiner(row)
        assert (refiner is None) == (row.loss == "none") and isinstance(refiner, AreaOnly) == (row.loss == "area")
        if row.loss == "wrong texts":
            assert refiner is not None and refiner.prompt_names == [*refiner.classes[1:], refiner.classes[0]]


def test_rows_that_repeat_the_row_they_are_compared_with_are_left_out() -> None:
    rows, left_out = distinct_rows(COMPACT_CLIP)
    assert rows == ROWS and not left_out
    form, strong = (f"{LEARNED}, {end}" for end in ("T = -log(1 - c), lambda_t = 1", "lambda_t = 1.0"))
    assert {row.name: row.against for row in rows}[form] == strong  # the rows differ in the form of T alone

    rows, left_out = distinct_rows(VOC)  # its lambda_area is 0, its lambda_t 0.02
    against = {row.name: row.against for row in rows}
    assert set(left_out) == {AREA, f"{MATCH}, lambda_area = 0.0", f"{LEARNED}, lambda_t = 0.02"}
    assert "give it a weight with --set lambda_area=1" in left_out[AREA]
    assert against[MATCH] == HOST and against[f"{MATCH}, lambda_area = 2.0"] == MATCH
    assert all(other in against for other in against.values() if other)

    against = {row.name: row.against for row in distinct_rows(VOC.replace(lambda_area=1, lambda_t=1))[0]}
    assert against[MATCH] == AREA and strong not in against and against[form] == LEARNED


def test_a_cell_has_figures_and_its_weights_are_kept(run: Run) -> None:
    run.cell(BASE)
    first = run.cell(MATCH)
    assert {"mIoU", "mIoU, aligned", "co-occurrence share", "threshold", "last terms"} <= set(first)
    assert set(first["last terms"]) == {"match_foreground", "match_background", "area", "loss"}
    again = run.cell(MATCH)  # from its weights
    assert again["mIoU"] == first["mIoU"]
    learned = run.cell(LEARNED)
    assert "refine" in learned["last terms"] and len(learned["words"]) == 6


@pytest.mark.parametrize("kind", ["random", "class-free", "shuffled"])
def test_other_prompts(kind: str, run: Run) -> None:
    rows = {row.prompts: row for row in ROWS if row.all_seeds}
    made, learned = run.refiner(rows[kind]), run.refiner(rows["learned"])
    assert made is not None and learned is not None
    run.give_prompts(rows[kind], made)
    run.give_prompts(rows["learned"], learned)
    context = made.prompts.context
    if kind == "random":
        assert torch.equal(context, made.prompts.initial()) and bool(made.prompts.alive.all())
    elif kind == "class-free":
        assert torch.equal(context, context[:1].expand_as(context))
    else:
        assert torch.equal(context, learned.prompts.context.roll(1, 0))


def test_the_area_alone_never_calls_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    refiner = AreaOnly(["boat", "train"], CLIP_FILE, COMPACT_CLIP)
    monkeypatch.setattr(refiner.encoder, "encode_image", lambda *_: pytest.fail("CLIP was called"))
    cam = torch.rand(2, 2, 16, 16, requires_grad=True)
    labels = torch.tensor([[1, 0], [1, 1]])
    loss = refiner(torch.rand(2, 3, 64, 64), cam, labels)
    loss.backward()
    whole = PromptRefiner(["boat", "train"], CLIP_FILE, COMPACT_CLIP).compute(torch.rand(2, 3, 64, 64), cam, labels)
    torch.testing.assert_close(loss, refiner.config.lambda_area * whole.terms["area"])
    assert cam.grad is not None and bool(cam.grad.any())


def test_the_ablation_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "demo_world", lambda: DemoWorld(16, 8, 8))
    arguments = ["--out", str(tmp_path), "--seeds", "2", "--host-steps", "1", "--steps", "1", "--rows", HOST, MATCH]
    ablation.main(arguments)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| host alone |" in text and "| + match |" in text and "+ match + refine" not in text
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(cells) == 6
    ablation.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == cells
    assert sorted(path.name for path in tmp_path.glob("table*")) == ["table.csv", "table.md", "table.png", "table_aligned.png"]


def test_the_ablation_on_a_folder_in_the_layout_of_voc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = write_photos(tmp_path / "photos")
    arguments = [
        "--data", str(photos), "--labels", str(photos / "labels.json"), "--classes", "cat", "dog", "--clip", str(CLIP_FILE),
        "--set", "prompt_length=4", "--out", str(tmp_path / "out"), "--seeds", "2", "--host-steps", "1", "--steps", "1",
        "--batch-size", "2", "--host-batch-size", "2", "--rows",
    ]  # fmt: skip
    ablation.main([*arguments, HOST, AREA])
    text = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "photos, 2 classes" in text and "| host alone |" in text and f"| {AREA} |" not in text
    assert f"Left out: {AREA} (lambda_area is 0; give it a weight with --set lambda_area=1)." in text
    with pytest.raises(SystemExit):
        ablation.main([*arguments, AREA])
    assert "no row is left. Left out: area term alone, no CLIP (lambda_area is 0" in capsys.readouterr().err


def test_the_compatibility_table_on_the_hosts_that_need_no_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility_experiment, "DemoWorld", lambda train: DemoWorld(train, 8, 8))
    compatibility.main(
        ["--hosts", "demo", "--seeds", "2", "--host-steps", "1", "--steps", "1", "--train", "16", "--out", str(tmp_path)]
    )
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert all(f"| demo: {addon} |" in text for addon in ADDONS)
    assert text.count("no transformer blocks over patches") == 2 and "the refiner's loss reaches 100 % of them" in text
    record = json.loads(next(tmp_path.rglob("*semples*.json")).read_text(encoding="utf-8"))["result"]
    size = sum(p.numel() for p in HostCam().parameters())
    assert record["verdict"].startswith("attached") and record["parameters"] == size and "prompt" in record["last terms"]


def test_a_host_without_its_repository_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingHost, match="--repos must be a folder with a clone of MCTformer in it"):
        make_host("mctformer", 6, repos=tmp_path)


def test_a_host_of_your_own_and_one_that_is_not_there() -> None:
    assert isinstance(make_host("examples.hosts:demo", 4), SmallHost)
    with pytest.raises(MissingHost, match="must be one of demo, mctformer.*got 'nobody.home:make'"):
        make_host("nobody.home:make", 4)


def test_small_things_are_the_smaller_half_of_the_pairs() -> None:
    truth, guess = np.zeros((2, 8, 8), int), np.zeros((2, 8, 8), int)
    truth[0, :4, :4], truth[1, :2, :2], truth[1, 4:] = 1, 1, 2  # 16, 4 and 32 pixels
    truth[1, 2, :] = 255
    guess[1, :3, :4] = 1  # 4 right, 4 wrong, 4 not counted
    assert small_iou(guess, truth, np.array([[1, 0], [1, 1]])) == pytest.approx(0.5)
