"""What a language model's answer says, checked against the class names."""

from __future__ import annotations

import json
import unicodedata
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from .._checks import partition_faults
from ..errors import ClusterError
from .categories import _unique

__all__ = ["FORM", "LARGEST_NAME", "LONGEST_FINDING", "MOST_FINDINGS", "MOST_OBJECTS", "Reading", "read_answer"]

FORM = '{"clusters": [{"name": "...", "classes": ["...", "..."]}]}'
LARGEST_NAME = 60  # characters of a cluster's name
MOST_FINDINGS = 20
LONGEST_FINDING = 4000  # characters
MOST_OBJECTS = 100  # places in an answer at which a JSON object may begin
Reading = Tuple[Optional[Dict[str, List[str]]], Optional[Dict[str, List[str]]], List[str]]


def read_answer(text: str, classes: Sequence[str], max_clusters: Optional[int] = None) -> Reading:
    """What an answer says, checked against the class names.

    Args:
        text: of the model.
        classes: the class names.
        max_clusters: the most clusters allowed.

    Returns:
        Clusters, or None if they are not valid; those of the answer that are known classes, or None if none could be read;
        findings, one sentence each (at most `MOST_FINDINGS`, and how many more).

    Example:
        >>> read_answer('{"clusters": [{"name": "animals", "classes": ["cat", "Dog"]}]}', ["cat", "dog"])[0]
        {'animals': ['cat', 'dog']}
    """
    remarks: List[str] = []
    try:
        return _read(text, classes, max_clusters, remarks)
    except ClusterError as error:
        return None, None, _few([str(error)])
    except RecursionError:
        return None, None, ["The answer is nested too deeply; expected only " + FORM + "."]


def _read(text: str, classes: Sequence[str], max_clusters: Optional[int], remarks: List[str]) -> Reading:
    pairs = _pairs(_find_json(text, remarks), remarks)
    faults: List[str] = []
    found: Dict[str, Any] = {}
    known = _known(classes)
    for given, members in pairs:
        name, copy = _title(given), 1
        if name and name != given:
            remarks.append(f"The cluster name {given!r:.80} was read as {name!r}; use short names of plain characters.")
        title = name
        while title in found:
            copy += 1
            title = f"{name} ({copy})"
        if copy == 2 and name:
            faults.append(f"Two clusters are named {name!r}; every cluster needs a name of its own.")
        found[title] = [_match(member, classes, known, remarks) for member in members] if isinstance(members, list) else members
    faults += partition_faults(found, classes, max_clusters)
    findings = _few(faults + list(dict.fromkeys(remarks)))
    if not faults:
        return found, found, findings
    allowed = set(classes)
    draft = {
        title: list(dict.fromkeys(m for m in members if isinstance(m, str) and m in allowed))
        for title, members in found.items()
        if isinstance(members, list)
    }
    return None, draft if len(draft) <= len(classes) else None, findings


def _find_json(text: str, remarks: List[str]) -> Any:
    """The JSON object of an answer, also with prose, thoughts or a fence around it."""

    def constant(name: str) -> Any:
        raise ClusterError(f"{name} is no JSON; expected only objects, lists and texts.")

    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=constant)
    why = "it is empty"
    try:
        return decoder.decode(text)
    except ClusterError as error:
        raise ClusterError(f"The answer's JSON is at fault: {error}") from error
    except (ValueError, RecursionError) as error:
        why = str(error) if text.strip() else why
    objects, at = [], 0
    for _ in range(MOST_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except ClusterError as error:
            raise ClusterError(f"The answer's JSON is at fault: {error}") from error
        except (ValueError, RecursionError):
            at += 1
            continue
        if "clusters" in value or (value and all(isinstance(members, list) for members in value.values())):
            objects.append(value)
    if not objects:
        raise ClusterError(f"The answer is not JSON ({why}). Expected only {FORM}; got {text[:60]!r}.")
    remarks.append("There is text around the JSON; answer with JSON alone.")
    if len(objects) > 1:
        remarks.append(f"There are {len(objects)} JSON objects, and the last one was read; answer with one.")
    return objects[-1]


def _pairs(content: Any, remarks: List[str]) -> List[Tuple[Any, Any]]:
    """(name, classes) of every cluster."""
    if isinstance(content, dict):
        clusters = content.get("clusters", content)
        if isinstance(clusters, list) and clusters is not content:
            if all(isinstance(entry, dict) and "name" in entry and "classes" in entry for entry in clusters):
                return [(entry["name"], entry["classes"]) for entry in clusters]
        if isinstance(clusters, dict) and all(isinstance(members, list) for members in clusters.values()):
            remarks.append(f"The answer maps names to classes; use the form {FORM}.")
            return list(clusters.items())
        content = clusters
    raise ClusterError(f"The answer has another shape than {FORM}; got {json.dumps(content)[:80]}.")


def _title(name: Any) -> str:
    """A cluster name without control characters, of one line and limited length."""
    if not isinstance(name, str):
        return ""  # told by partition_faults
    plain = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in name[: 100 * LARGEST_NAME])
    return " ".join(plain.split())[:LARGEST_NAME].strip()


def _fold(name: str) -> str:
    return " ".join(name.split()).casefold()


def _known(classes: Sequence[str]) -> Dict[str, Optional[str]]:
    """Class of every folded name; None for one that several classes share."""
    known: Dict[str, Optional[str]] = {}
    for name in classes:
        known[_fold(name)] = None if _fold(name) in known else name
    return known


def _match(member: Any, classes: Sequence[str], known: Mapping[str, Optional[str]], remarks: List[str]) -> Any:
    if not isinstance(member, str) or member in classes:
        return member
    name = known.get(_fold(member))
    if name is None:
        return member
    remarks.append(f"{member!r:.80} was read as {name!r}; spell the classes exactly as in the array.")
    return name


def _few(findings: List[str]) -> List[str]:
    findings = [text if len(text) <= LONGEST_FINDING else f"{text[:LONGEST_FINDING]}..." for text in findings]
    more = len(findings) - MOST_FINDINGS
    return findings if more <= 0 else [*findings[:MOST_FINDINGS], f"There are {more} more findings."]
