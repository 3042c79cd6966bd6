from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest

from semples_plugin import PromptRefiner
from semples_plugin.config import parse_assignments
from semples_plugin.files import check_page
from tests.cli.running import run
from tests.files.refine_world import CLASSES, World, tensors
from tests.files.test_report import Page

Result = Tuple[int, str, str]


@pytest.fixture
def check(some: World, clip_file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run_check(*extra: Any) -> Result:
        own: List[Any] = ["check", "--images", some.images, "--cams", some.cams, "--classes", some.classes, "--clip", clip_file]
        return run(capsys, *own, "--quiet", *extra)

    return run_check


def test_the_figures_are_those_of_the_refiner(check: Callable[..., Result], some: World, clip_file: Path) -> None:
    status, out, err = check("--json", "--set", "lambda_area=0.5", "--batch-size", 4)
    assert (status, err) == (0, "")
    found = json.loads(out)
    refiner = PromptRefiner(CLASSES, clip=clip_file, image_stats=None, lambda_area=0.5)
    by_size = [[f"img{i}" for i in range(first, 9, 2)][at : at + 4] for first in (0, 1) for at in (0, 4)]
    batches = [tensors(some, names) for names in by_size if names]
    cams = iter([cam for _, cam, _ in batches])
    report = refiner.check([(img, labels) for img, _, labels in batches], lambda _: next(cams), progress=False)
    expected = json.loads(json.dumps(report.as_dict()))
    assert found.pop("failed") == {} and found == expected
    assert found["images"] == 9 and found["pairs"] == 18 and [one["name"] for one in found["classes"]] == CLASSES


def test_the_table_and_the_options_are_printed(check: Callable[..., Result]) -> None:
    status, out, err = check("--set", "class_weights={'bird': 0.5}")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("9 images, 18 pairs, CLIP clip.pt [") and max(map(len, lines)) <= 120
    words = shlex.split(lines[-1].split(": ", 1)[1])
    assert words[0] == "--set" and lines[-1].startswith("as options: ")
    assert parse_assignments("--set", words[1::2])["class_weights"] == {"bird": 0.5}


def test_the_page_shows_figures_and_pairs_and_loads_nothing(check: Callable[..., Result], some: World) -> None:
    path = some.root / "new" / "check.html"
    status, out, err = check("--out", path, "--rows", 2)
    assert (status, err) == (0, "") and out.splitlines()[-1] == str(path)
    page = Page(path)
    pictures = page.all("img")
    assert len(pictures) == 6 * 4 and all(str(one["src"]).startswith("data:image/jpeg;base64,") for one in pictures)
    assert page.all("script") == page.all("link") == [] and "http" not in re.sub('base64,[^"]*', "", page.source)
    for word in ("9 images", "boat", "cannot tell", "AUC of kept against", "kept view, cosine", "removed view", "CAM of"):
        assert word in page.text
    assert "Learned background prompts" not in page.text
    first = path.read_bytes()
    assert check("--out", path, "--rows", 2)[0] == 0 and path.read_bytes() == first


def test_class_names_and_ids_are_escaped_on_the_page(check: Callable[..., Result], some: World) -> None:
    some.classes.write_text("<script>x</script>\ntrain & co\nbird")
    some.add("<b>&amp;", keys=(0,))
    path = some.root / "check.html"
    assert check("--out", path, "--rows", 30)[0] == 0
    page = Page(path)
    assert page.all("script") == [] and "<script>x</script>" in page.text and "<b>&amp;" in page.text


def test_learned_prompts_are_checked_as_well(
    check: Callable[..., Result], some: World, make_refiner: Callable[..., Any]
) -> None:
    prompts = some.root / "prompts.safetensors"
    make_refiner(learned=True, lambda_area=0.25).save(prompts)
    path = some.root / "check.html"
    status, out, _ = check("--prompts", prompts, "--out", path)
    assert status == 0 and "stage refine" in out and "learned prompts: cosines" in out and "area weight: 0.25 now" in out
    assert "Learned background prompts" in Page(path).text


def test_list_limit_and_labels_choose_images_and_classes(check: Callable[..., Result], some: World) -> None:
    (some.root / "list.txt").write_text("img1\nimg4\n/JPEGImages/img5.jpg /x/img5.png\n")
    (some.root / "labels.json").write_text(json.dumps({f"img{i}": ["train"] if i == 4 else [] for i in range(9)}))

    def figures(*extra: Any) -> Tuple[int, int]:
        found = json.loads(check("--json", *extra)[1])
        return found["images"], found["pairs"]

    assert figures("--list", some.root / "list.txt") == (3, 7)
    assert figures("--list", some.root / "list.txt", "--labels", some.root / "labels.json") == (3, 1)
    assert figures("--limit", 3) == (3, 3)  # img0, img3, img6
    assert figures("--limit", 100) == (9, 18)


def test_what_cannot_be_read_is_named_and_the_rest_is_checked(check: Callable[..., Result], some: World) -> None:
    (some.cams / "img2.npy").write_bytes(b"broken")
    some.cam("lonely")
    (some.root / "list.txt").write_text("\n".join([*(f"img{i}" for i in range(9)), "lonely", "nobody"]))
    status, out, err = check("--list", some.root / "list.txt")
    assert status == 1 and out.startswith("8 images, ")
    lines = err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["img2", "lonely", "nobody"]
    assert "no image lonely.jpg" in lines[1] and "there is no CAM file of it in" in lines[2]


@pytest.mark.parametrize(
    "extra, reason",
    [
        (["--limit", "0"], "--limit, --batch-size and --rows must be at least 1"),
        (["--rows", "0"], "--limit, --batch-size and --rows must be at least 1"),
        (["--cams", "ROOT/none"], "there is no folder"),
        (["--images", "ROOT/cams"], "has an image"),
        (["--list", "ROOT/list.txt"], "None of the 1 listed images can be checked: there is no CAM file"),
        (["--list", "ROOT/empty.txt"], "None of the 0 listed images can be checked: no id"),
        (["--labels", "ROOT/labels.json"], "None of the 9 images can be read: the labels do not name this image"),
        (["--set", "lambda_aera=1"], "did you mean 'lambda_area'?"),
        (["--set", "image_stats=imagenet"], "--set image_stats is not possible"),
        (["--set", "class_weights={'ship': 0}"], "`class_weights` must name known classes; got 'ship'"),
        (["--prompts", "ROOT/none"], "No prompt file at"),
        (["--device", "nonsense"], "--device 'nonsense' cannot be used"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_write_no_page(
    extra: List[str], reason: str, check: Callable[..., Result], some: World
) -> None:
    (some.root / "list.txt").write_text("nobody")
    (some.root / "empty.txt").write_text("")
    (some.root / "labels.json").write_text(json.dumps({"other": ["boat"]}))
    page = some.root / "check.html"
    status, out, err = check("--out", page, *[item.replace("ROOT", str(some.root)) for item in extra])
    assert (status, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("error: ") and reason in err
    assert not page.exists() and list(some.root.glob("*.part")) == []


def test_an_interrupt_while_the_page_is_written_leaves_the_old_page(
    check: Callable[..., Result], some: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = some.root / "check.html"
    page.write_text("old")

    def broken(path: Path) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_page, "read_image", broken)
    assert check("--out", page)[0] == 130
    assert page.read_text() == "old" and list(some.root.glob(".*part")) == []


def test_a_masked_out_place_has_the_color_that_clip_sees(
    check: Callable[..., Result], some: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills: List[Any] = []

    def write(path: Path, found: Any, fill: Any, rows: int) -> Dict[str, str]:
        fills.append(fill)
        return {}

    monkeypatch.setattr(check_page, "write_check_page", write)
    for stats in ("True", "False"):
        assert check("--out", some.root / "check.html", "--set", f"clip_stats={stats}")[0] == 0
    assert fills == [pytest.approx((0.48, 0.46, 0.41), abs=0.01), (0.0, 0.0, 0.0)]
