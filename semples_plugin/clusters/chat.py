"""The client of a language model: one question, one answer, over any address that speaks OpenAI's chat completions.

The `openai` package connects, retries and types the errors. This module adds limits on the size and the total time of a reply,
leaves out arguments that a server does not understand, and keeps the key out of all texts that leave it.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import parse_qsl, urlsplit

from .._text import printable
from ..errors import LanguageModelError

__all__ = ["Chat"]

LARGEST_REPLY = 1_000_000  # bytes
_LATE = (
    "gave no complete answer within {timeout:g} s",
    "Is the server busy or loading the model? Raise timeout (--timeout) or max_retries (--retries).",
)
_KEY = ("did not accept the API key", "Set OPENAI_API_KEY, or the variable of --api-key-env, to a valid one.")
_FAULTS = {  # name of an error's class, the nearest ancestor counts: what happened, what to do
    "AuthenticationError": _KEY,
    "PermissionDeniedError": _KEY,
    "NotFoundError": ("was not found", "Check the model's name and base_url (--base-url), which usually ends in /v1."),
    "RateLimitError": ("allows no more questions, also after {retries} retries", "Wait, or raise max_retries (--retries)."),
    "InternalServerError": ("failed, also after {retries} retries", "Look at the server's log, or try again later."),
    "APIStatusError": ("refused the question", "Look at the model's name and the options."),
    "APITimeoutError": _LATE,  # of the client
    "TimeoutException": _LATE,  # of the client's HTTP library while a reply is read
    "TimeoutError": _LATE,  # of this module
    "APIConnectionError": ("could not be reached", "Is the server running, and is base_url (--base-url) right?"),
    "Exception": ("broke off in the middle of an answer", "Try again."),
}
_FORMAT_WORDS = ("response_format", "json_schema", "json_object", "schema", "structured", "grammar", "guided")


class Chat:
    """A language model at an address, and the arguments that its server turned out to understand.

    Args:
        model, base_url, api_key, timeout, max_retries: as of `clusters_from_language_model`.
        arguments: of every question, such as `temperature` and `response_format`; None leaves one out.
    """

    def __init__(
        self, model: str, base_url: Any, api_key: Optional[str], arguments: Dict[str, Any], timeout: float, max_retries: int
    ):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Asking a language model needs the openai client: pip install 'semples-plugin[clusters]'.", name="openai"
            ) from error
        given = base_url or os.environ.get("OPENAI_BASE_URL")
        key = (api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")).strip()
        if not key and not given:
            raise LanguageModelError(
                "Expected an API key for OpenAI's server, or the address of another one; got neither. Set the variable "
                "OPENAI_API_KEY, or give base_url (--base-url), such as http://localhost:11434/v1 for Ollama."
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("The API key must be of printable ASCII characters without blanks; this one has others.")
        try:
            address = urlsplit(given or "https://api.openai.com/v1")
            if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
                raise ValueError(given)
        except (ValueError, AttributeError, TypeError):
            shown = given.rpartition("@")[2].partition("?")[0] if isinstance(given, str) else given
            raise ValueError(f"`base_url` must be an address such as http://localhost:11434/v1; got {shown!r}.") from None
        query, address = dict(parse_qsl(address.query)), address._replace(query="", fragment="")
        options: Dict[str, Any] = {"timeout": timeout, "max_retries": max_retries, "default_query": query or None}
        try:
            self.client: Any = openai.OpenAI(base_url=address.geturl(), api_key=key or "none", **options)
        except Exception as error:
            if type(error).__name__ != "InvalidURL":  # of its HTTP library, whose name differs between versions
                raise
            raise ValueError(f"`base_url` must be an address such as http://localhost:11434/v1: {error}.") from None
        self.url = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()  # without user and password
        self.secrets = [text for text in (key, address.password or "", *query.values()) if len(text) >= 8]
        self.model, self.version, self.timeout, self.max_retries = model, f"openai {openai.__version__}", timeout, max_retries
        self.request = {"model": model, **{name: value for name, value in arguments.items() if value is not None}}
        self.reported: Optional[str] = None  # the model that the server says it asked
        self.notes: List[str] = []
        completion = {"max_completion_tokens": arguments.get("max_tokens")}  # old clients lack the name
        self.fallbacks: List[
            Tuple[str, Sequence[str], Dict[str, Any]]
        ] = [  # argument, words of a complaint about it, what is sent instead; each is used once
            ("response_format", _FORMAT_WORDS, {"response_format": {"type": "json_object"}}),
            ("response_format", _FORMAT_WORDS, {}),
            ("max_tokens", ("max_completion_tokens",), {"extra_body": completion}),
            ("temperature", ("temperature",), {}),
            ("seed", ("seed",), {}),
        ]

    def facts(self) -> Dict[str, Any]:
        """What a record says about the model and its server; never the key."""
        facts = {"model": self.model, "model_reported": self.reported, "base_url": self.url, "client": self.version}
        return {**facts, "response_format": self.request.get("response_format", {}).get("type", "none"), "notes": self.notes}

    def ask(self, system: str, question: str) -> str:
        """The text of the model's answer to a system message and a question.

        Raises:
            LanguageModelError: if there is no complete answer of text; with the answer so far, if there is any.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        while True:
            try:
                create = self.client.chat.completions.with_streaming_response.create
                with create(**self.request, messages=messages) as response:
                    body = self._read(response)
                return self._content(body)
            except LanguageModelError:
                raise
            except Exception as error:
                if not self._fall_back(error):
                    raise self._fault(error) from None  # the original may quote the key

    def _read(self, response: Any) -> bytes:
        """The reply, read in parts until it ends, is too large or takes too long."""
        end, body = time.monotonic() + self.timeout, bytearray()
        for part in response.iter_bytes():
            body += part
            if time.monotonic() > end:
                raise TimeoutError("the reply is incomplete")
            if len(body) > LARGEST_REPLY:
                break
        return bytes(body)

    def _content(self, body: bytes) -> str:
        text = self._clean(body.decode("utf-8", "replace"))
        advice = "Give max_tokens (--max-tokens), or use another model."
        if len(body) > LARGEST_REPLY:
            raise self._error(f"gave too long an answer: expected at most {LARGEST_REPLY:,} bytes; got more", advice, text)
        try:
            reply = json.loads(body)
            choice = reply["choices"][0]
            content, refusal = (choice["message"].get(name) for name in ("content", "refusal"))
            reason, self.reported = choice.get("finish_reason"), self._clean(str(reply.get("model")))[:200]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._error(
                f"gave no chat completion: expected JSON with a choice that has a message; got: {self._quote(text)}",
                "Is base_url (--base-url) right? It usually ends in /v1.",
                text,
            ) from None
        answer = self._clean(content) if isinstance(content, str) else ""
        if refusal or reason == "content_filter":
            why = refusal if isinstance(refusal, str) else f"finish_reason {reason!r}"
            advice = "Look at the class names and your prompts, or use another model."
            raise self._error(f"refused: {self._quote(why)}", advice, answer or text)
        if reason == "length":
            advice = "Raise max_tokens (--max-tokens) or the server's context length, or use another model."
            raise self._error(f"gave an answer that was cut off after {len(answer)} characters", advice, answer)
        if not isinstance(content, str):
            raise self._error(f"gave an answer without text: {self._quote(text)}", "Use a model that answers in text.", text)
        return answer

    def _fall_back(self, error: Any) -> bool:
        """Replace an argument that the server says it does not understand; whether there was one."""
        if getattr(error, "status_code", None) not in (400, 422):
            return False
        said = f"{error.param} {error.message} {error.body}"[:20_000].lower()
        for fallback in self.fallbacks:
            name, words, instead = fallback
            if name in self.request and any(word in said for word in words):
                self.fallbacks.remove(fallback)
                del self.request[name]
                self.request.update(instead)
                how = f"with {json.dumps(instead)} instead" if instead else "without it"
                self.notes.append(f"The server does not take this {name}; asked {how} ({self._details(error)}).")
                return True
        return False

    def _fault(self, error: Any) -> LanguageModelError:
        what, advice = next(_FAULTS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _FAULTS)
        what = what.format(timeout=self.timeout, retries=self.max_retries)
        return self._error(f"{what}: {self._details(error)}", advice)

    def _details(self, error: Any) -> str:
        if hasattr(error, "status_code"):
            message = error.body.get("message") if isinstance(error.body, dict) else error.response.text
            return f"status {error.status_code}: {self._quote(str(message or error.message))}"
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {self._quote(str(cause))}"

    def _error(self, what: str, advice: str, answer: Optional[str] = None) -> LanguageModelError:
        end = "" if what.endswith((".", "!", "?")) else "."
        return LanguageModelError(
            f"The language model {self.model!r:.100} at {printable(self.url)} {what}{end} {advice}", answer
        )

    def _clean(self, text: str) -> str:
        """Text that can be written as UTF-8 and does not contain a secret."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        for secret in self.secrets:
            text = text.replace(secret, "[secret]")
        return text

    def _quote(self, text: str) -> str:
        return printable(" ".join(self._clean(text).split()), 200)
