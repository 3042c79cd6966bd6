from __future__ import annotations

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from semples_plugin import cli
from semples_plugin.files.evaluate_folder import evaluate_cams
from semples_plugin.files.report import THRESHOLDS, write_report
from semples_plugin.prompts import NearestWords

CLASSES = ["boat", "<b>&", "bird", "absent \"one'"]
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed where it should be; texts and attributes are collected."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.open: List[str] = []
        self.tags: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.texts: List[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> List[Dict[str, Optional[str]]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Data:
    """Images, ground truth, CAM files before and after. img0 gets better, img1 worse, img2 stays as it is."""

    def __init__(self, root: Path, count: int = 3):
        self.root = root
        for part in ("images", "gt", "before", "after"):
            (root / part).mkdir(parents=True)
        generator = np.random.default_rng(0)
        for i in range(count):
            height, width = 20 + i, 30
            picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            cv2.imwrite(str(root / "images" / f"img{i}.png"), picture)
            gt = np.zeros((height, width), np.uint8)
            gt[4:14, 5:15], gt[0] = 2, 255
            Image.fromarray(gt).save(root / "gt" / f"img{i}.png")
            good = np.where(gt == 2, 0.9, 0.05).astype(np.float32)
            bad = np.where(np.roll(gt, 4, axis=1) == 2, 0.8, 0.1).astype(np.float32)
            shown = [(bad, good), (good, bad), (bad, bad)][i % 3]
            for part, cam in zip(("before", "after"), shown):
                np.save(root / part / f"img{i}.npy", {1: cam, 2: cam / 4})  # type: ignore[arg-type]
        (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")

    def write(self, **options: Any) -> Tuple[Page, Dict[str, str]]:
        path = self.root / "page" / "report.html"
        folders = (self.root / part for part in ("images", "before", "after", "gt"))
        failed = write_report(path, *folders, CLASSES, **options)
        return Page(path), failed

    def run(self, *extra: Any) -> int:
        own: List[Any] = ["report", "--out", self.root / "report.html", "--classes", self.root / "classes.txt"]
        for part in ("images", "before", "after", "gt"):
            own += [f"--{part}", self.root / part]
        return cli.main([str(item) for item in (*own, *extra)])


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


def test_the_page_is_inert_and_self_contained(data: Data) -> None:
    page, failed = data.write(split="val", title="My <title> & more")
    assert failed == {} and page.source.startswith("<!DOCTYPE html>")
    assert "http:" not in page.source and "https:" not in page.source and "url(" not in page.source
    assert not page.all("script") and not page.all("link") and not page.all("iframe") and "@import" not in page.source
    for _, attributes in page.tags:
        assert not {"href", "srcset", "data", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    pictures = page.all("img")
    assert len(pictures) == 5 * (1 + 1 + 3)  # one better, one worse, three at random
    for attributes in pictures:
        head, _, data_part = (attributes["src"] or "").partition(",")
        assert head == "data:image/jpeg;base64" and attributes["alt"]
        assert cv2.imdecode(np.frombuffer(base64.b64decode(data_part), np.uint8), cv2.IMREAD_COLOR) is not None
    assert page.all("meta")[0] == {"charset": "utf-8"} and page.all("html")[0]["lang"]
    assert page.texts[0] == page.texts[1] == "My <title> & more"


def test_class_names_are_escaped(data: Data) -> None:
    page, _ = data.write(prompts=[NearestWords("<b>&", 0.5, [("<i>", 0.25), ('"&amp;', 0.125)])], split="<u>")
    assert not any(text in page.source for text in ("<b>&<", "<b>&,", "<i>", "<u>"))
    assert "<b>&" in page.text and "<i>" in page.text and '"&amp;' in page.text and "Split <u>, 3 images" in page.text
    assert any(attributes["alt"] == "CAM of <b>& of img0" for attributes in page.all("img"))
    assert "Absent and not in the mean: boat, bird, absent \"one'." in page.text


def test_figures_are_those_of_the_evaluation(data: Data) -> None:
    page, _ = data.write(split="val")
    names = ["background", *CLASSES]
    before, after = (evaluate_cams(data.root / part, data.root / "gt", names, None, THRESHOLDS, chosen=True)
                     for part in ("before", "after"))  # fmt: skip
    b, a = 100 * before.miou, 100 * after.miou
    assert f"{b:.1f} → {a:.1f} mean IoU, %" in page.text
    assert f"{a - b:+.1f}".replace("-0.0", "+0.0").replace("+0.0", "0.0") in page.text.replace("+0.0", "0.0")
    for key, label in (("false_positive", "false-positive share, %"), ("false_negative", "false-negative share, %")):
        shares = [
            100 * np.mean([getattr(score, key) for score in result.classes if score.iou is not None])
            for result in (before, after)
        ]
        assert f"{shares[0]:.1f} → {shares[1]:.1f} {label}" in page.text
    assert "1 / 1 images better / worse" in page.text
    assert f"Background thresholds {before.threshold:.2f} (before) and {after.threshold:.2f} (after)" in page.text
    for x, y in zip(before.classes, after.classes):
        if x.iou is not None and y.iou is not None:
            assert f"{x.name} {100 * x.iou:.1f} {100 * y.iou:.1f}" in page.text
    for name in ("img0", "img1", "img2"):
        assert f"{name} {100 * before.per_image[name]:.1f} → {100 * after.per_image[name]:.1f}" in page.text
    improved, worsened, chance = (page.text.index(word) for word in ("Most improved", "Most worsened", "Random"))
    assert improved < page.text.index("img0") < worsened < page.text.index("img1") < chance < page.text.index("img2")
    points = [attributes["points"] or "" for attributes in page.all("polyline")]
    assert [len(line.split()) for line in points] == [100, 100]


def test_the_change_has_a_sign(data: Data) -> None:
    for i in range(3):
        (data.root / "after" / f"img{i}.npy").write_bytes((data.root / "before" / "img1.npy").read_bytes())
        cv2.imwrite(str(data.root / "images" / f"img{i}.png"), np.zeros((21, 30, 3), np.uint8))
        Image.open(data.root / "gt" / "img1.png").save(data.root / "gt" / f"img{i}.png")
        np.save(data.root / "before" / f"img{i}.npy", {1: np.full((21, 30), 0.5), 2: np.zeros((21, 30))})  # type: ignore
    page, _ = data.write()
    change = re.search(r"([+-]\d+\.\d) change, points", page.text)
    assert change and float(change[1]) > 10 and "Most improved" in page.text and "Most worsened" not in page.text


def test_rows_and_ids_choose_the_images(data: Data) -> None:
    page, _ = data.write(rows=1)
    assert len(page.all("article")) == 3
    page, _ = data.write(rows=0)
    assert not page.all("article") and "mean IoU" in page.text
    page, failed = data.write(ids=["img2", "img0"])
    assert failed == {} and "2 images" in page.text and "img1" not in page.text
    first = page.source
    assert data.write(ids=["img2", "img0"])[0].source == first  # the same page twice


@pytest.mark.parametrize("layout", ["npz", "array"])
def test_npz_and_array_cams_are_shown(layout: str, data: Data) -> None:
    for path in list((data.root / "after").iterdir()):
        cams = np.load(path, allow_pickle=True).item()
        path.unlink()
        if layout == "npz":
            np.savez(path.with_suffix(".npz"), keys=np.array([1, 2]), cam=np.stack([cams[1], cams[2]]))
        else:
            np.save(path, np.stack([cams.get(k, np.zeros_like(cams[1])) for k in range(4)]))
    page, failed = data.write()
    assert failed == {} and len(page.all("article")) == 5


def test_a_missing_image_is_named_and_the_page_is_written(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (data.root / "images" / "img0.png").unlink()
    assert data.run() == 1
    captured = capsys.readouterr()
    assert captured.out == f"{data.root / 'report.html'}\n"
    assert captured.err.startswith("failed: img0: no image img0.jpg") and captured.err.count("\n") == 1
    page = Page(data.root / "report.html")
    assert "Split gt, 3 images" in page.text and len(page.all("article")) == 3  # its figures count, its pictures are missing


@pytest.mark.parametrize("part", ["before", "after", "gt"])
def test_an_image_that_cannot_be_counted_is_named(part: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(path for path in (data.root / part).iterdir() if path.stem == "img1")
    path.write_bytes(b"no")
    assert data.run() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("failed: img1: ") and captured.err.count("\n") == 1
    page = Page(data.root / "report.html")
    assert "Most improved" in page.text and "Most worsened" not in page.text and len(page.all("article")) == 3


def test_an_image_of_another_size_than_its_ground_truth_is_named(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite(str(data.root / "images" / "img0.png"), np.zeros((50, 70, 3), np.uint8))
    assert data.run() in (0, 1)  # its pictures are made to fit, or it is named
    captured = capsys.readouterr()
    assert captured.err == "" or (captured.err.startswith("failed: img0: ") and captured.err.count("\n") == 1)
    assert len(Page(data.root / "report.html").all("article")) >= 3


def test_an_image_without_any_class_is_shown(data: Data) -> None:
    for part in ("before", "after"):
        np.save(data.root / part / "img0.npy", {})  # type: ignore[arg-type]
    page, failed = data.write()
    assert failed == {} and "no class" in page.text


def test_a_page_without_counted_images_is_written(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data.root / "gt").iterdir():
        path.unlink()
    assert data.run() == 1
    assert capsys.readouterr().err.count("\n") == 3
    assert "0 images" in Page(data.root / "report.html").text


def test_wrong_arguments_write_no_page(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    for extra in (
        ["--before", data.root / "none"],
        ["--classes", "none"],
        ["--list", data.root / "none"],
        ["--prompts", "none"],
    ):
        assert data.run(*extra) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (data.root / "report.html").exists() and not list(data.root.rglob("*.part"))


def test_learned_prompts_are_shown_in_words(
    data: Data, make_refiner: Callable[..., Any], aligned_clip: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    refiner = make_refiner(CLASSES, learned=True)
    refiner.save(data.root / "prompts.safetensors")
    torch.save(aligned_clip.state_dict(), data.root / "clip.pt")
    (data.root / "val.txt").write_text("img0.png\nimg1\n")
    assert data.run("--prompts", data.root / "prompts.safetensors", "--clip", data.root / "clip.pt", "--rows", 1,
                    "--list", data.root / "val.txt", "--title", "Mine") == 0  # fmt: skip
    assert capsys.readouterr().err == ""
    page = Page(data.root / "report.html")
    assert "Learned background prompts, in words" in page.text and "Split val, 2 images" in page.text
    for reading in refiner.nearest_words(top=5):
        words = ", ".join(f"{word} {value:.2f}" for word, value in reading.words)
        assert f"{reading.name} {words} {reading.class_similarity:.2f}" in re.sub(r" ,", ",", page.text)


def test_a_missing_jinja2_is_named_with_its_remedy(
    data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"A page needs Jinja2: pip install 'semples-plugin\[cli\]'"):
        data.write()
    assert data.run() == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "jinja2 is missing" in captured.err and "'semples-plugin[cli]'" in captured.err
    assert captured.err.count("\n") == 1 and not (data.root / "report.html").exists()
