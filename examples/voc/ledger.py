"""One page with the figures of a run, those of seeds, masks, pseudo labels and segmentation kept apart.

Flow: `commands` -> **ledger**.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import semples_plugin
from semples_plugin._files import write_atomically
from semples_plugin.adapters.runner.job import ONLINE, STAGES

from .chain import read_json, write_json
from .settings import ALONE, AREA, START

WHAT_CONTROLS = (
    "Host alone: its own script with nothing attached, from the same start, for as many epochs. Area term alone: the "
    "same with the area term at its weight, and no CLIP. Both figures of a gain have the same random seed."
)
BEST = "chosen on the ground truth of this split, so this is a best case"


class Row(NamedTuple):
    """A figure: the step and the file of `figures/` that hold it, its name, its threshold policy ("" for label maps).

    Attributes:
        control: "" for the method, or one of `Settings.runs`.
        why: why it is not run; "" if it is.
        compared: whether the same figure of the host alone is there to compare with.
    """

    step: str
    file: str
    name: str
    policy: str
    control: str = ""
    why: str = ""
    compared: bool = False


class Section(NamedTuple):
    """Figures of one kind, which must not be compared with those of another, and the steps that led to them."""

    title: str
    what: str
    rows: Sequence[Row]
    steps: Sequence[str]


TITLES = {ALONE: "host alone", AREA: "area term alone"}
NO_CRF = "pydensecrf is not installed, or --crf off"


def _controlled(rows: Sequence[Row], facts: Dict[str, Any], always: bool = False) -> List[Row]:
    """The rows, each with those of its controls after it.

    Args:
        always: whether the host alone is taken that far without --controls, too.
    """
    found = []
    for row in rows:
        no_crf = NO_CRF if row.file == "crf" and not facts["crf"] else ""
        found.append(row._replace(why=no_crf, compared=always or facts["controls"]))
        for control, title in TITLES.items():
            if control == AREA and not facts["controls"]:
                continue
            why = no_crf
            if not (facts["controls"] or always):
                why = "only with --controls"
            elif control == AREA and not facts["area_weight"]:
                why = "the area term has no weight, so this is the host alone"
            found.append(
                row._replace(name=f"{title}: {row.name}", control=control, why=why, compared=control == AREA and not why)
            )
    return found


def sections(facts: Dict[str, Any]) -> List[Section]:
    """The sections of the page, in the order of the chain."""
    fixed, (low, high) = f"background threshold {facts['threshold']:g}, fixed beforehand", facts["label_thresholds"]
    scales = ", ".join(f"{scale:g}" for scale in facts["scales"])
    return [
        Section("Seeds", f"CAM files of the host after the stages, as its own script writes them. {WHAT_CONTROLS}",
                _controlled([Row("seeds", "single", "scale 1.0, and its mirror image", BEST),
                             Row("seeds", "multi", f"scales {scales}, and their mirror images", BEST)], facts, always=True),
                ["train", *([ONLINE] if facts["online_steps"] else STAGES), "cams-single", "cams", "seeds"]),
        Section("Masks", "The CAMs of several scales, aligned to the edges of the photos.",
                _controlled([Row("mask-figures", "best", "best threshold", BEST),
                             Row("mask-figures", "fixed", "fixed threshold", fixed),
                             Row("mask-figures", "crf", "with a dense CRF", fixed)], facts, always=True),
                ["masks", "masks-crf", "mask-figures"]),
        Section("Pseudo labels", "What the segmentation network is trained on. Pixels at 255 are not counted.",
                _controlled([Row("label-figures", "labels", "two thresholds",
                                 f"background up to {low:g}, class above {high:g}, 255 between; fixed beforehand")], facts),
                ["labels", "label-figures"]),
        Section("Segmentation", "The network that was trained on the pseudo labels, one scale, images it has not seen.",
                _controlled([Row("evaluation", "plain", "network alone", ""),
                             Row("evaluation", "crf", "with a dense CRF", "")], facts),
                ["segmentation", "predictions", "evaluation"]),
    ]  # fmt: skip


def collect(out: Path, facts: Dict[str, Any]) -> Dict[str, Any]:
    """All figures of a run, without times: equal runs give equal files."""
    return {"banner": banner(facts), "facts": facts, "sections": [_section(out, facts, section) for section in sections(facts)]}


def _section(out: Path, facts: Dict[str, Any], section: Section) -> Dict[str, Any]:
    run = read_json(out / "seed0" / "runner" / "record.json") or {}
    taken = {name: values["steps"] for name, values in run.get("stages", {}).items() if "steps" in values}
    taken["segmentation"] = facts["steps"]
    return {
        "title": section.title,
        "what": section.what,
        "steps": {name: taken[name] for name in section.steps if name in taken},
        "records": [
            f"seed{seed}/{control}{name}"
            for seed in range(facts["seeds"])
            for control in (f"{START}/", "", *(f"{control}/" for control in TITLES))
            for name in section.steps
        ],
        "rows": [_row(out, facts, row) for row in section.rows],
    }


def banner(facts: Dict[str, Any]) -> Optional[str]:
    """What must be read before any figure, or None."""
    if not facts["rehearsal"]:
        return None
    return f"Rehearsal: random weights, {facts['steps']} steps. The figures mean nothing."


def _row(out: Path, facts: Dict[str, Any], row: Row) -> Dict[str, Any]:
    found, alone = (_read(out, facts["seeds"], row._replace(control=control)) for control in (row.control, ALONE))
    alone = alone if row.compared else []
    there = [one for one in found if one is not None]
    values = [100 * one["miou"] for one in there]
    gains = [100 * (a["miou"] - b["miou"]) for a, b in zip(found, alone) if a and b]
    return {
        "name": row.name,
        "control": row.control,
        "why": row.why,
        "gain": gains,
        "mean_gain": statistics.mean(gains) if gains else None,
        "deviation_of_gain": statistics.stdev(gains) if len(gains) > 1 else None,
        "policy": row.policy,
        "miou": values,
        "mean": statistics.mean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "thresholds": [one["threshold"] for one in there],
        "uncertain": [100 * one["uncertain"] for one in there],
        "split": there[0]["split"] if there else None,
        "images": there[0]["images"] if there else None,
        "absent": there[0]["absent"] if there else [],
    }


def _read(out: Path, seeds: int, row: Row) -> List[Optional[Dict[str, Any]]]:
    """The file of a figure of every seed, None where there is none; one of another run of the chain does not count."""
    folders = [out / f"seed{seed}" / row.control / "figures" / row.step for seed in range(seeds)]
    return [None if row.why else read_json(folder / f"{row.file}.json") for folder in folders]


def write(out: Path, facts: Dict[str, Any], records: Sequence[Dict[str, Any]]) -> None:
    """Write `ledger.json` (figures and settings) and `ledger.html` (the same with commands, times and versions)."""
    content = collect(out, facts)
    write_json(out / "ledger.json", content)
    by_name = {record["step"]: record for record in records}
    run = read_json(out / "seed0" / "runner" / "record.json") or {}
    host = {f"{name} (host)": version for name, version in run.get("versions", {}).items()}
    page = template().render(**content, records=by_name, versions={**_versions(records), **host}).encode()
    write_atomically(out / "ledger.html", lambda file: file.write(page))


def _versions(records: Sequence[Dict[str, Any]]) -> Dict[str, str]:
    """Name -> version, or all versions where steps ran with several."""
    found: Dict[str, List[str]] = {}
    for record in records:
        for name, version in record["versions"].items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: ", ".join(values) for name, values in found.items()}


def template() -> Any:
    """The page; its style is that of the other pages.

    Raises:
        ModuleNotFoundError: if Jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The ledger needs Jinja2: pip install 'semples-plugin[cli]'.", name="jinja2") from error
    folders = [Path(__file__).parent, Path(semples_plugin.__file__).parent / "files"]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True, loader=jinja2.FileSystemLoader(folders)
    )
    return environment.get_template("ledger.html")
