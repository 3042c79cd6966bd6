"""The rows of the ablation: what each adds to the host's loss, how its prompts are made, and what it is compared with."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional

__all__ = ["BASE", "HOST", "LEARNED", "MATCH", "ROWS", "Row"]

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
    Row(OF_REFINE, LEARNED + ", T = -log(1 - c), lambda_t = 1", LEARNED, prompts="learned",
        options={"repel": "log1m", "lambda_t": 1.0}, all_seeds=False),
    *_scan(OF_REFINE, LEARNED, "prompts_per_class", [2], "learned"),
]  # fmt: skip
