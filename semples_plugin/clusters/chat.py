"""A server that answers chat completions (any address that speaks OpenAI's interface), and its limits."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, List, Mapping, Optional, Tuple
from urllib.parse import parse_qsl, urlsplit

from .._text import printable
from ..errors import LanguageModelError

__all__ = ["LARGEST_ANSWER", "LARGEST_BODY", "LARGEST_KEPT", "Server"]
LARGEST_KEPT = 100_000  # characters of one answer that go into the record

LARGEST_BODY = 2_000_000  # bytes of one reply that are read
LARGEST_ANSWER = 1_000_000  # characters of one answer that are looked at


class Server:
    """An address that answers chat completions, and what it turned out to understand."""

    def __init__(
        self,
        model: str,
        base_url: Optional[str],
        api_key: Optional[str],
        names: List[str],
        sampling: Mapping[str, Any],
        timeout: float,
        max_retries: int,
    ):
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Asking a language model needs the openai client: pip install 'semples-plugin[clusters]'.", name="openai"
            ) from error
        self.openai: Any = openai
        self.version = f"openai {openai.__version__}"
        self.model, self.timeout, self.max_retries = model, timeout, max_retries
        self.reported: Optional[str] = None
        self.notes: List[str] = []
        given = base_url or os.environ.get("OPENAI_BASE_URL") or None
        key = (api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")).strip()
        if not key and given is None:
            raise LanguageModelError(
                "Expected an API key for OpenAI's server, or the address of another one; got neither. Set the variable "
                "OPENAI_API_KEY, or give base_url (--base-url), such as http://localhost:11434/v1 for Ollama."
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("The API key must be of printable ASCII characters without blanks; this one has others.")
        url, query = _address(given or "https://api.openai.com/v1")
        self.url = _public(url)
        self.secrets = [s for s in (key, urlsplit(url).password or "", *query.values()) if len(s) >= 8]
        try:
            self.client: Any = openai.OpenAI(
                base_url=url, api_key=key or "none", timeout=timeout, max_retries=max_retries, default_query=query or None
            )
        except Exception as error:
            if type(error).__name__ != "InvalidURL":
                raise
            raise ValueError(f"`base_url` must be an address such as http://localhost:11434/v1: {error}.") from None
        self.request: Dict[str, Any] = {"model": model, **{k: v for k, v in sampling.items() if v is not None}}
        self.formats = ["json_schema", "json_object", "none"]
        self.schema = _schema(names)

    def facts(self) -> Dict[str, Any]:
        return {"model_reported": self.reported, "response_format": self.formats[0], "notes": self.notes}

    def answer(self, messages: List[Dict[str, str]]) -> str:
        """The answer's text; what the server does not understand is left out and asked again, once each."""
        while True:
            request = {**self.request, "messages": messages}
            if self.formats[0] != "none":
                form: Dict[str, Any] = {"type": self.formats[0]}
                if self.formats[0] == "json_schema":
                    form["json_schema"] = self.schema
                request["response_format"] = form
            try:
                with self.client.chat.completions.with_streaming_response.create(**request) as response:
                    body = self._body(response)
            except self.openai.APIStatusError as error:
                note = self._concede(error)
                if note is None:
                    raise self._error(*self._status(error)) from None  # the original may quote the key
                self.notes.append(note)
                continue
            except self.openai.APITimeoutError:
                raise self._late() from None
            except self.openai.APIConnectionError as error:
                why = error.__cause__ or error
                raise self._error(
                    f"could not be reached: {type(why).__name__}: {self._quote(str(why))}",
                    "Is the server running, and is base_url (--base-url) right?",
                ) from None
            except self.openai.OpenAIError as error:
                raise self._error(f"failed: {type(error).__name__}: {self._quote(str(error))}", "") from None
            except LanguageModelError:
                raise
            except Exception as error:  # of the HTTP library while a body is read, which the client does not wrap
                if "Timeout" in type(error).__name__:
                    raise self._late() from None
                why = f"{type(error).__name__}: {self._quote(str(error))}"
                raise self._error(f"broke off in the middle of an answer: {why}", "Try again.") from None
            return self._content(body)

    def _body(self, response: Any) -> bytes:
        """The reply, read in parts, so that its size and its time are bounded."""
        end, parts, size = time.monotonic() + self.timeout, [], 0
        for part in response.iter_bytes():
            parts.append(part)
            size += len(part)
            if size > LARGEST_BODY:
                beginning = self._clean(b"".join(parts)[:LARGEST_KEPT].decode("utf-8", "replace"))
                raise self._error(
                    f"gave an answer that is too long: expected at most {LARGEST_BODY:,} bytes and stopped reading there",
                    "Give max_tokens (--max-tokens), or use another model.",
                    beginning,
                )
            if time.monotonic() > end:
                raise self._late()
        return b"".join(parts)

    def _content(self, body: bytes) -> str:
        text = self._clean(body.decode("utf-8", "replace"))
        reply: Dict[str, Any] = {}
        try:
            found = json.loads(body.decode("utf-8"))
            reply = found if isinstance(found, dict) else reply
        except (ValueError, RecursionError):
            pass  # told below
        choices = reply.get("choices")
        if not isinstance(choices, list):
            raise self._error(
                f"gave no chat completion: expected a JSON object with `choices`; got: {self._quote(text)}",
                "Is base_url (--base-url) right? It usually ends in /v1.",
                text,
            )
        choice = choices[0] if choices and isinstance(choices[0], dict) else {}
        message = choice.get("message")
        if not isinstance(message, dict):
            raise self._error(
                f"gave no answer: expected one choice with a message; got: {self._quote(text)}", "Try again.", text
            )
        if isinstance(reply.get("model"), str):
            self.reported = self._clean(reply["model"])[:200]
        content, reason, refusal = message.get("content"), choice.get("finish_reason"), message.get("refusal")
        answer = self._clean(content) if isinstance(content, str) else ""
        if refusal or reason == "content_filter":
            why = self._quote(refusal) if isinstance(refusal, str) else f"finish_reason {reason!r}"
            raise self._error(
                f"refused: {why}", "Look at the class names and your prompts, or use another model.", answer or text
            )
        if reason == "length":
            raise self._error(
                f"gave an answer that was cut off after {len(answer)} characters (finish_reason 'length')",
                "Raise max_tokens (--max-tokens) or the server's context length, or use another model.",
                answer,
            )
        if not isinstance(content, str):
            raise self._error(
                f"gave an answer without text; got: {self._quote(text)}", "Use a model that answers in text.", text
            )
        if len(answer) > LARGEST_ANSWER:
            raise self._error(
                f"gave an answer that is too long: expected at most {LARGEST_ANSWER:,} characters; got {len(answer):,}",
                "Give max_tokens (--max-tokens), or use another model.",
                answer,
            )
        return answer

    def _concede(self, error: Any) -> Optional[str]:
        """Leave out what the server says it does not understand; a note about it, or None if it is something else."""
        if error.status_code not in (400, 422):
            return None
        said = f"{error.param} {error.message} {error.body}"[:20_000].lower()
        why = f"(status {error.status_code}: {self._said(error)})"
        words = ("response_format", "json_schema", "json_object", "schema", "structured", "grammar", "guided")
        if self.formats[0] != "none" and any(word in said for word in words):
            old = self.formats.pop(0)
            return f"The server does not take response_format {old}; asked with {self.formats[0]} instead {why}."
        if "max_tokens" in self.request and "max_completion_tokens" in said:
            self.request["extra_body"] = {"max_completion_tokens": self.request.pop("max_tokens")}  # old clients lack the name
            return f"The server does not take max_tokens; asked with max_completion_tokens instead {why}."
        for name in ("temperature", "seed"):
            if name in self.request and name in said:
                del self.request[name]
                return f"The server does not take {name}; asked without it {why}."
        return None

    def _status(self, error: Any) -> Tuple[str, str]:
        said = f"status {error.status_code}: {self._said(error)}"
        if error.status_code in (401, 403):
            return (
                f"did not accept the API key: {said}",
                "Set OPENAI_API_KEY, or the variable of --api-key-env, to a valid one.",
            )
        if error.status_code == 404:
            return f"was not found: {said}", "Is the model's name right, and base_url (--base-url), which usually ends in /v1?"
        if error.status_code == 429:
            return (
                f"allows no more questions for now, also after {self.max_retries} retries: {said}",
                "Wait, look at your quota, or raise max_retries (--retries).",
            )
        if error.status_code >= 500:
            return f"failed, also after {self.max_retries} retries: {said}", "Look at the server's log, or try again later."
        return f"refused the question: {said}", "Look at the model's name and the options."

    def _said(self, error: Any) -> str:
        message = error.body.get("message") if isinstance(error.body, dict) else None
        return self._quote(message if isinstance(message, str) else error.response.text or str(error.message))

    def _late(self) -> LanguageModelError:
        return self._error(
            f"gave no complete answer within {self.timeout:g} s",
            "Is the server busy or loading the model? Raise timeout (--timeout) or max_retries (--retries).",
        )

    def _error(self, what: str, advice: str, answer: Optional[str] = None) -> LanguageModelError:
        end = "" if what.endswith((".", "!", "?")) else "."
        message = f"The language model {self.model!r:.100} at {printable(self.url)} {what}{end} {advice}"
        return LanguageModelError(message.strip(), answer)

    def _clean(self, text: str) -> str:
        """Text that can be written as UTF-8 and does not tell a secret."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        for secret in self.secrets:
            text = text.replace(secret, "[secret]")
        return text

    def _quote(self, text: str) -> str:
        return printable(" ".join(self._clean(text).split()), 200)


def _address(base_url: str) -> Tuple[str, Dict[str, str]]:
    """The address without its query, and the query."""
    try:
        parts = urlsplit(base_url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except (ValueError, AttributeError, TypeError):
        fits = False
    if not fits:
        shown = base_url.rpartition("@")[2].partition("?")[0] if isinstance(base_url, str) else base_url
        raise ValueError(f"`base_url` must be an address such as http://localhost:11434/v1; got {shown!r}.")
    return parts._replace(query="", fragment="").geturl(), dict(parse_qsl(parts.query))


def _public(url: str) -> str:
    """The address without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _schema(names: List[str]) -> Dict[str, Any]:
    def fixed(**properties: Any) -> Dict[str, Any]:
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

    members = {"type": "array", "items": {"type": "string", "enum": names}}
    cluster = fixed(name={"type": "string"}, classes=members)
    return {"name": "clusters", "strict": True, "schema": fixed(clusters={"type": "array", "items": cluster})}
