"""Category clusters named by a language model, refined until they no longer change (PCC, arXiv 2412.13823).

The model answers an initial prompt with clusters. A refinement prompt with these clusters and the findings about them follows
again and again, until two valid answers in a row group the classes in the same way (a fixed point) or the rounds are used up.
The paper publishes neither code nor prompts: this is re-implemented from its description, and `prompt_initial.txt` and
`prompt_refine.txt` are our own words. Any address that speaks OpenAI's chat completions will do: a hosted model, vLLM, Ollama,
llama.cpp. Needs `pip install 'semples-plugin[clusters]'`. Flow: `chat` -> `answers` -> **language_model** -> `categories`.
"""

from __future__ import annotations

import json
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

from .._checks import check_classes, check_number
from .._files import PathLike, write_atomically
from .._text import printable
from ..errors import LanguageModelError
from .answers import answer_schema, read_answer
from .categories import RECORD_FORMAT, CategoryClusters
from .chat import Chat

__all__ = ["Listener", "Round", "clusters_from_language_model"]

LONGEST_RECORDED = 100_000  # characters of one answer in the record


class Round(NamedTuple):
    """One question and its answer.

    Attributes:
        number: from 1.
        question: the text that was asked.
        answer: the text as it came; `printable` makes it fit for a terminal.
        clusters: the clusters of a valid answer, or None.
        findings: one sentence each, which the next question contains; those of a valid answer only concern its form.
        changed: what moved since the valid clusters before, one sentence each; None if there were none.
    """

    number: int
    question: str
    answer: str
    clusters: Optional[CategoryClusters]
    findings: List[str]
    changed: Optional[List[str]]

    def as_dict(self) -> Dict[str, Any]:
        """As the record holds it, a long answer cut."""
        clusters = None if self.clusters is None else self.clusters.as_dict()
        cut = f" [cut; {len(self.answer)} characters in all]" if len(self.answer) > LONGEST_RECORDED else ""
        return {**self._asdict(), "answer": self.answer[:LONGEST_RECORDED] + cut, "clusters": clusters}


Listener = Callable[[Round], None]


def clusters_from_language_model(
    classes: Sequence[str],
    model: str,
    *,
    base_url: Optional[str] = None,
    api_key: Optional[str] = None,
    max_rounds: int = 8,
    max_clusters: Optional[int] = None,
    initial_prompt: Union[None, str, "os.PathLike[str]"] = None,
    refine_prompt: Union[None, str, "os.PathLike[str]"] = None,
    temperature: Optional[float] = 0.0,
    seed: Optional[int] = 0,
    max_tokens: Optional[int] = None,
    timeout: float = 60.0,
    max_retries: int = 3,
    accept_unconverged: bool = False,
    record: Optional[PathLike] = None,
    listener: Optional[Listener] = None,
) -> CategoryClusters:
    """Ask a language model for clusters until they no longer change.

    Args:
        classes: C class names in the order of your label columns.
        model: the name by which the server knows the model.
        base_url: address of the server, such as `"http://localhost:11434/v1"`; by default that of the variable
            OPENAI_BASE_URL, else OpenAI's.
        api_key: by default that of the variable OPENAI_API_KEY, which then goes to whatever server `base_url` names. A server
            of your own needs none.
        max_rounds: the most rounds, at least 2: a fixed point needs two valid answers in a row.
        max_clusters: the most clusters allowed; by default any number.
        initial_prompt: the first question: a text, or a `Path` to one. It must contain `{classes}` and may contain `{limit}`.
        refine_prompt: every later question, with `{classes}`, `{clusters}` and `{findings}`, and perhaps `{limit}`.
        temperature, seed: of the sampling; None leaves them to the server.
        max_tokens: the most tokens of an answer; by default the server's limit.
        timeout: seconds to wait for an answer.
        max_retries: how often a question is asked again after a time-out, a rate limit or a fault of the server.
        accept_unconverged: return the last valid clusters if there is no fixed point; their provenance says so.
        record: file that receives all questions and answers, as JSON, if this ends in an error.
        listener: called with each `Round`.

    Returns:
        The clusters. Their provenance holds the prompts, all answers and the settings; never the key.

    Raises:
        LanguageModelError: if the model cannot be reached, refuses, gives no valid clusters, or reaches no fixed point; with
            the record and the last valid clusters.
    """
    names = check_classes(classes)[0]
    if not isinstance(model, str) or not model.strip():
        raise ValueError(f"`model` must be the name of a language model, such as 'llama3.1'; got {model!r}.")
    check_number("max_rounds", max_rounds, 2, whole=True, advice=", since a fixed point needs two answers")
    check_number("max_retries", max_retries, 0, whole=True)
    check_number("timeout", timeout, 0.001)
    sampling = {"temperature": temperature, "seed": seed, "max_tokens": max_tokens}
    limits = {"max_rounds": max_rounds, "max_clusters": max_clusters}
    for name, value in {**sampling, **limits}.items():
        if value is not None:
            check_number(name, value, int(name.startswith("max")), whole=name != "temperature")
    prompts = {
        "system": Path(__file__).with_name("prompt_system.txt").read_text(encoding="utf-8").strip(),
        "initial": _prompt("initial", initial_prompt, ["classes"]),
        "refine": _prompt("refine", refine_prompt, ["classes", "clusters", "findings"]),
    }
    try:
        json.dumps([names, prompts], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Class names and prompts must be text that UTF-8 can hold; remove what it cannot ({error})."
        ) from error
    if record is not None and not Path(record).absolute().parent.is_dir():
        raise FileNotFoundError(f"The record {os.fspath(record)} must be in a folder that exists. Make it first.")
    chat = Chat(model, base_url, api_key, {**sampling, "response_format": answer_schema(names)}, timeout, max_retries)
    facts = {"source": "language model", "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    conversation = _Conversation(names, max_clusters, prompts)

    def provenance(converged: bool) -> Dict[str, Any]:
        rounds = [one.as_dict() for one in conversation.rounds]
        return {**facts, **chat.facts(), **sampling, **limits, "prompts": prompts, "converged": converged, "rounds": rounds}

    try:
        with chat.client:
            converged = conversation.run(chat, max_rounds, listener)
        if conversation.clusters is None or not (converged or accept_unconverged):
            raise LanguageModelError(conversation.why_not_converged())
    except BaseException as error:  # also Ctrl-C
        content = {"format": RECORD_FORMAT, "version": 1, "error": str(error) or type(error).__name__, "classes": names}
        content["provenance"] = provenance(False)
        where = "" if record is None else _write_record(Path(record), content)
        if isinstance(error, LanguageModelError):
            error.args = (f"{error}{where}",)
            error.record, error.clusters = content, conversation.clusters
        raise
    return CategoryClusters(conversation.clusters, names, provenance(converged))


class _Conversation:
    """The rounds so far, and the questions that follow from them."""

    def __init__(self, names: List[str], max_clusters: Optional[int], prompts: Mapping[str, str]):
        self.names, self.max_clusters, self.prompts = names, max_clusters, prompts
        self.rounds: List[Round] = []
        self.clusters: Optional[CategoryClusters] = None  # the last valid ones
        self.draft: Mapping[str, Sequence[str]] = {}  # for the next question

    def run(self, chat: Chat, max_rounds: int, listener: Optional[Listener]) -> bool:
        """Ask until there is a fixed point; whether there is one."""
        for number in range(1, max_rounds + 1):
            question = self._question()
            try:
                answer = chat.ask(self.prompts["system"], question)
            except LanguageModelError as error:
                if error.answer is not None:
                    self.rounds.append(Round(number, question, error.answer, None, [str(error)], None))
                raise
            found, draft, findings = read_answer(answer, self.names, self.max_clusters)
            clusters = None if found is None else CategoryClusters(found, self.names)
            changed = None if clusters is None or self.clusters is None else clusters.changes_since(self.clusters)
            self.rounds.append(Round(number, question, answer, clusters, findings, changed))
            self.clusters = self.clusters if clusters is None else clusters
            self.draft = draft if draft is not None else self.clusters or {}
            if listener is not None:
                listener(self.rounds[-1])
            if changed == [] and self.rounds[-2].clusters is not None:
                return True
        return False

    def _question(self) -> str:
        """The next prompt; its markers are replaced in one pass, so that nothing in a name or finding is a marker."""
        most, clusters = self.max_clusters, [{"name": name, "classes": list(found)} for name, found in self.draft.items()]
        findings = self.rounds[-1].findings if self.rounds else []
        data = {"classes": self.names, "clusters": {"clusters": clusters}, "findings": findings}
        values = {name: json.dumps(value, ensure_ascii=False) for name, value in data.items()}
        values["limit"] = "Make as many clusters as the shared features call for."
        if most is not None:
            values["limit"] = f"Make at most {most} cluster{'' if most == 1 else 's'}."
        template = self.prompts["refine" if self.rounds else "initial"]
        return re.sub(r"\{(" + "|".join(values) + r")\}", lambda found: values[found.group(1)], template)

    def why_not_converged(self) -> str:
        """What was expected and got, and what to do, after rounds without a fixed point."""
        last, same = self.rounds[-1], {}  # type: Round, Dict[Any, List[str]]
        for one in self.rounds:
            if one.clusters is not None:
                same.setdefault(one.clusters.groups(), []).append(str(one.number))
        cycles = ", rounds ".join(" and ".join(numbers) for numbers in same.values() if len(numbers) > 1)
        what = f"is not valid: {' '.join(last.findings[:5])}" if last.clusters is None else f"changed: {last.changed}"
        return (
            f"Expected two valid answers in a row with the same clusters; {sum(map(len, same.values()))} of "
            f"{len(self.rounds)} answers were valid, and there was no fixed point."
            + (f" The model repeats itself: rounds {cycles} gave the same clusters." if cycles else "")
            + f" The last answer {what} Use another model or prompt, raise `max_rounds` (--max-rounds), or take the last valid "
            "clusters, if there are any, by accept_unconverged=True (--accept-unconverged)."
        )


def _write_record(path: Path, content: Mapping[str, Any]) -> str:
    """Write the record; a sentence that says where it is, for the error."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
    except OSError as error:
        return f" The record could not be written to {path}: {error}."
    return f" The record of all answers so far is in {path}."


def _prompt(name: str, given: Union[None, str, "os.PathLike[str]"], markers: List[str]) -> str:
    """The text of a prompt, by default of our own file, checked for its markers."""
    argument, path = f"{name}_prompt", Path(__file__).with_name(f"prompt_{name}.txt") if given is None else given
    try:
        text = path if isinstance(path, str) else Path(path).read_text(encoding="utf-8")
    except (TypeError, UnicodeDecodeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"`{argument}` must be a text, or a Path to a text file in UTF-8; got {given!r} ({error}).") from error
    missing = [f"{{{marker}}}" for marker in markers if f"{{{marker}}}" not in text]
    if missing:
        raise ValueError(
            f"`{argument}` must contain {', '.join(missing)}, where the data go; got {printable(text, 60)!r}. A file "
            "is given as a Path, not as a string."
        )
    return text
