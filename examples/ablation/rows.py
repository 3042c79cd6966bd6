"""The rows of the ablation: what each adds to the host's loss, how its prompts are made, and what it is compared with."""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from semples_plugin.config import RefinerConfig

__all__ = ["AREA", "BASE", "HOST", "LEARNED", "MATCH", "ROWS", "Row", "distinct_rows"]

BASE = "base"  # the host that all rows start from; not a row of the table
HOST = "host alone"
AREA = "area term alone, no CLIP"
MATCH = "+ match"
LEARNED = "+ match + refine, learned prompts"


class Row(NamedTuple):
    """One row.

    Attributes:
        group: heading.
        name: of the row.
        against: the row that it is compared with.
        loss: `"none"`; `"refiner"`; `"area"`, its area term without CLIP; `"random clip"`, CLIP with shuffled weights; `"wrong
            texts"`, every class has the text of the next one.
        prompts: None; `"learned"`; `"random"`, initial values; `"class-free"`, one prompt for all classes; `"shuffled"`, every
            class has the learned prompt of the next one.
        options: of the refiner, added to those of the experiment.
        weight: factor on the refiner's loss.
        texts: hand-written background prompts: `"all"`, the same list for all classes, or `"own"`, those of the class.
        raw: images go to CLIP with ImageNet's statistics, as in the reference recipe, instead of CLIP's own.
        steps: factor on the number of steps.
        all_seeds: whether it is run with all seeds, or with the first three only.
    """

    group: str
    name: str
    against: str = ""
    loss: str = "refiner"
    prompts: Optional[str] = None
    options: Dict[str, Any] = {}
    weight: float = 1.0
    texts: Optional[str] = None
    raw: bool = False
    steps: float = 1.0
    all_seeds: bool = True


def _scan(group: str, of: str, option: str, values: List[Any], prompts: Optional[str] = None) -> List[Row]:
    return [Row(group, f"{of}, {option} = {v}", of, prompts=prompts, options={option: v}, all_seeds=False) for v in values]


PLUS = {"match_form": "linear", "view_sharpness": 8.0, "lambda_b": 2.0}
CONTROLS, METHOD, PROMPTS = "controls", "the method", "other background prompts"
OF_MATCH, OF_REFINE = "options of match", "options of the prompts and of refine"

ROWS = [
    Row(CONTROLS, HOST, loss="none"),
    Row(CONTROLS, AREA, HOST, loss="area"),
    Row(CONTROLS, "+ match, CLIP with random weights", AREA, loss="random clip"),
    Row(CONTROLS, "+ match, texts of the wrong classes", AREA, loss="wrong texts"),
    Row(METHOD, MATCH, AREA),
    Row(METHOD, LEARNED, MATCH, prompts="learned"),
    Row(METHOD, "+ match + refine, online prompts, one shorter run", LEARNED, options={"online_steps": 0.5}, steps=0.934),
    Row(PROMPTS, "+ match + refine, hand-written prompts, all stuff", LEARNED, texts="all"),
    Row(PROMPTS, "+ match + refine, hand-written prompts, own stuff", LEARNED, texts="own"),
    Row(PROMPTS, "+ match + refine, random prompts", LEARNED, prompts="random"),
    Row(PROMPTS, "+ match + refine, one prompt for all classes", LEARNED, prompts="class-free"),
    Row(PROMPTS, "+ match + refine, prompts shuffled", LEARNED, prompts="shuffled"),
    *_scan(OF_MATCH, MATCH, "lambda_area", [0.0, 2.0]),
    *_scan(OF_MATCH, MATCH, "lambda_b", [1.2, 4.8]),
    *_scan(OF_MATCH, MATCH, "eps", [1e-4]),
    Row(OF_MATCH, "+ match, ImageNet's image statistics", MATCH, raw=True, all_seeds=False),
    Row(OF_MATCH, "+ match, views cropped around the CAM", MATCH, options={"view_crop": 0.25}, all_seeds=False),
    Row(OF_MATCH, "+ match, linear form on cut masks, weight 5", MATCH, options=PLUS, weight=5.0, all_seeds=False),
    *_scan(OF_REFINE, LEARNED, "prompt_length", [2, 16], "learned"),
    *_scan(OF_REFINE, LEARNED, "lambda_refine", [0.5, 4.0], "learned"),
    *_scan(OF_REFINE, LEARNED, "lambda_t", [0.02, 1.0], "learned"),
    Row(OF_REFINE, LEARNED + ", T = -log(1 - c), lambda_t = 1", LEARNED + ", lambda_t = 1.0", prompts="learned",
        options={"repel": "log1m", "lambda_t": 1.0}, all_seeds=False),
    *_scan(OF_REFINE, LEARNED, "prompts_per_class", [2], "learned"),
]  # fmt: skip


def distinct_rows(config: RefinerConfig) -> Tuple[List[Row], Dict[str, str]]:
    """The rows without those that would repeat the row that they are compared with.

    Args:
        config: of all rows, before a row's options.

    Returns:
        rows: a row whose partner was left out is compared with the partner's own partner.
        left_out: name of a row -> why it was left out.
    """
    by_name = {row.name: row for row in ROWS}
    left_out = {}
    for row in ROWS:
        partner = by_name.get(row.against)
        if row.loss == "area" and not config.lambda_area:
            left_out[row.name] = "lambda_area is 0; give it a weight with --set lambda_area=1"
        elif partner is not None and _settings(row, config) == _settings(partner, config):
            left_out[row.name] = f"with these options it is the same as {partner.name!r}"
    rows = []
    for row in ROWS:
        against = row.against
        while against in left_out:
            against = by_name[against].against
        if row.name not in left_out:
            rows.append(row._replace(against=against))
    return rows, left_out


def _settings(row: Row, config: RefinerConfig) -> Row:
    """A row with all options and without names: equal for rows that train alike."""
    options = {**dataclasses.asdict(config), **row.options}
    return row._replace(group="", name="", against="", all_seeds=True, options=options)
