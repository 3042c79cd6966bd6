"""What a language model's answer says, checked against the class names. Flow: `chat` -> **answers** -> `language_model`."""

from __future__ import annotations

import json
import unicodedata
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .._checks import partition_faults
from ..errors import ClusterError
from .categories import refuse_double_keys

__all__ = ["Reading", "answer_schema", "read_answer"]

FORM = '{"clusters": [{"name": "...", "classes": ["...", "..."]}]}'
LONGEST_NAME = 60  # characters of a cluster's name
LONGEST_FINDING = 4000  # characters
MOST_FINDINGS = 20
MOST_STARTS = 100  # places in an answer at which a JSON object may begin


class Reading(NamedTuple):
    """What `read_answer` returns.

    Attributes:
        clusters: cluster name -> classes, or None if they are no partition of the classes.
        draft: the clusters with the known classes alone, also of an invalid answer; None if nothing could be read.
        findings: one sentence each, at most `MOST_FINDINGS` and how many more; a valid answer may have some on its form.
    """

    clusters: Optional[Dict[str, List[str]]]
    draft: Optional[Dict[str, List[str]]]
    findings: List[str]


def answer_schema(classes: Sequence[str]) -> Dict[str, Any]:
    """`response_format` that asks for `FORM` with these class names (structured outputs)."""

    def fixed(**properties: Any) -> Dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    cluster = fixed(name={"type": "string"}, classes={"type": "array", "items": {"type": "string", "enum": list(classes)}})
    schema = fixed(clusters={"type": "array", "items": cluster})
    return {"type": "json_schema", "json_schema": {"name": "clusters", "strict": True, "schema": schema}}


def read_answer(text: str, classes: Sequence[str], max_clusters: Optional[int] = None) -> Reading:
    """Read the clusters of an answer and check them against the class names; no text makes it fail.

    Example:
        >>> read_answer('{"clusters": [{"name": "animals", "classes": ["cat", "Dog"]}]}', ["cat", "dog"]).clusters
        {'animals': ['cat', 'dog']}
    """
    try:
        return _read(text, classes, max_clusters)
    except (ClusterError, RecursionError) as error:
        return Reading(None, None, _shorten([f"The answer could not be read: {error}"]))


def _read(text: str, classes: Sequence[str], max_clusters: Optional[int]) -> Reading:
    remarks: List[str] = []
    faults: List[str] = []
    found: Dict[str, Any] = {}
    spellings: Dict[str, List[str]] = {}
    for name in classes:
        spellings.setdefault(_fold(name), []).append(name)

    def match(member: Any) -> Any:
        """The class that is meant: of the same spelling, or else the only one of the same letters."""
        meant = spellings.get(_fold(member), []) if isinstance(member, str) and member not in classes else []
        if len(meant) != 1:
            return member
        remarks.append(f"{member!r:.80} was read as {meant[0]!r}; spell the classes exactly as in the array.")
        return meant[0]

    for given, members in _pairs(_find_object(text, remarks), remarks):
        title = _title(given)
        if title and title != given:
            remarks.append(f"The cluster name {given!r:.80} was read as {title!r}; use short names of plain characters.")
        if title in found:
            faults.append(f"Two clusters are named {title!r}; every cluster needs a name of its own.")
            title = f"{title} ({len(found) + 1})"
        found[title] = [match(member) for member in members] if isinstance(members, list) else members
    faults += partition_faults(found, classes, max_clusters)
    findings = _shorten(list(dict.fromkeys(faults + remarks)))
    if not faults:
        return Reading(found, found, findings)
    lists = {title: members for title, members in found.items() if isinstance(members, list)}
    known = {title: [name for name in dict.fromkeys(classes) if name in members] for title, members in lists.items()}
    return Reading(None, known if len(known) <= len(classes) else None, findings)


def _find_object(text: str, remarks: List[str]) -> Dict[str, Any]:
    """The last JSON object that may hold clusters; models put prose, thoughts or a fence around it."""

    def refuse_constant(name: str) -> Any:
        raise ClusterError(f"{name} is not JSON; expected only objects, lists and texts.")

    decoder = json.JSONDecoder(object_pairs_hook=refuse_double_keys, parse_constant=refuse_constant)
    objects, rest, why, start = [], text, "", text.find("{")
    for _ in range(MOST_STARTS if start >= 0 else 0):
        try:
            value, end = decoder.raw_decode(text, start)
            if "clusters" in value or (value and all(isinstance(members, list) for members in value.values())):
                objects.append(value)
                rest = text[:start] + text[end:]
        except ClusterError:
            raise
        except (ValueError, RecursionError) as error:
            why, end = why or f" ({error})", start + 1
        start = text.find("{", end)
        if start < 0:
            break
    if not objects:
        raise ClusterError(f"it holds no JSON object of clusters{why}. Expected only {FORM}; got {text[:60]!r}.")
    if rest.strip():
        remarks.append("There is text around the JSON; answer with JSON alone.")
    if len(objects) > 1:
        remarks.append(f"There are {len(objects)} JSON objects, and the last one was read; answer with one.")
    return objects[-1]


def _pairs(content: Dict[str, Any], remarks: List[str]) -> List[Tuple[Any, Any]]:
    """(name, classes) of every cluster."""
    clusters = content.get("clusters", content)
    if isinstance(clusters, list) and all(isinstance(entry, dict) and {"name", "classes"} <= set(entry) for entry in clusters):
        return [(entry["name"], entry["classes"]) for entry in clusters]
    if isinstance(clusters, dict) and all(isinstance(members, list) for members in clusters.values()):
        remarks.append(f"The answer maps names to classes; use the form {FORM}.")
        return list(clusters.items())
    raise ClusterError(f"it has another shape than {FORM}; got {json.dumps(clusters)[:80]}.")


def _title(name: Any) -> str:
    """A cluster name on one line, of limited length and without control characters; empty if it is no text."""
    start = name[: 100 * LONGEST_NAME] if isinstance(name, str) else ""
    plain = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in start)
    return " ".join(plain.split())[:LONGEST_NAME].strip()


def _fold(name: str) -> str:
    return " ".join(name.split()).casefold()


def _shorten(findings: List[str]) -> List[str]:
    more = len(findings) - MOST_FINDINGS
    return [text[:LONGEST_FINDING] for text in findings[:MOST_FINDINGS]] + [f"There are {more} more findings."] * (more > 0)
