"""The table of `docs/clips.md`, made anew from small random models of the real classes and compared with the page."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, Callable, List

import pytest

from semples_plugin import ClipError
from tests import clip_contract as contract
from tests.clip_zoo import KINDS, case

PAGE = Path(__file__).parents[1] / "docs" / "clips.md"
COLUMNS = ["images", "texts", "prompts", "dense features", "learned", "equal to the package's own"]


def holds(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except ClipError:
        return False


def row_of(kind: str, folder: Path, make_batch: Any) -> List[str]:
    made = case(kind, folder)
    encoder = made.load()

    def learned() -> bool:
        prompt, host = contract.learn_and_train(encoder, make_batch)
        return prompt[-1] < prompt[0] and host[-1] < host[0]

    views = contract.random_views(encoder)
    images, texts = contract.distance_of_images(made, encoder), contract.distance_of_texts(made, encoder)
    prompts = contract.distance_of_prompts(made, encoder)
    cells = [
        encoder.encode_image(views).shape == (2, encoder.embed_dim),
        encoder.encode_text(contract.TEXTS).shape == (3, encoder.embed_dim),
        holds(lambda: bool((contract.gradient_of_context(encoder).abs().amax(2) > 0).all())),
        holds(lambda: bool(encoder.encode_dense(views).isfinite().all())),
        holds(learned),
        max(images, texts, prompts) < 1e-5,
    ]
    return ["yes" if cell else "no" for cell in cells]


def page_rows() -> List[List[str]]:
    """Rows of the page's table whose first line is `| CLIP | images | ...`, without header and rule."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| CLIP | images"))
    table = []
    for line in lines[header:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    assert table[0] == ["CLIP", *COLUMNS] and all(re.fullmatch("-+", cell) for cell in table[1])
    return table[2:]


def test_the_page_has_every_kind() -> None:
    assert [row[0] for row in page_rows()] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_row_of_the_page(kind: str, tmp_path: Path, make_batch: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        expected = row_of(kind, tmp_path / "tokenizer", make_batch)
    assert dict(zip(COLUMNS, next(row[1:] for row in page_rows() if row[0] == kind))) == dict(zip(COLUMNS, expected))
