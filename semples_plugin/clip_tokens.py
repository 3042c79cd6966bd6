"""Texts to token rows, for every tokenizer that a CLIP comes with.

`Tokens` is what a `ClipEncoder` with a tokenizer of its own holds; `tokens_of` reads one from OpenAI's and open_clip's BPE,
from open_clip's wrapper of a Hugging Face tokenizer, and from a tokenizer or processor of `transformers`.
Flow: **clip_tokens** -> `clip_towers` -> `clip_huggingface`, `clip_open_clip`.
"""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

from .errors import ClipError

__all__ = ["Tokens", "tokens_of"]


class Tokens(NamedTuple):
    """A tokenizer, as prompts need it: a row is `start`, the text's ids, `end`; then it is padded.

    Attributes:
        encode: a text to its ids, without what `start` and `end` hold.
        start: ids in front of every text; empty for SigLIP.
        end: ids behind every text.
        pad: id of padding.
        plain: an id that is no special token; it stands where a prompt's context vectors go.
        last: id at the very last position, behind the padding (CLIPS); or None.
        left: whether padding goes in front.
    """

    encode: Callable[[str], List[int]]
    start: Tuple[int, ...]
    end: Tuple[int, ...]
    pad: int
    plain: int
    last: Optional[int] = None
    left: bool = False

    def pad_row(self, row: Sequence[int], length: int) -> List[int]:
        """The row at its full length; a row that is too long stays as it is."""
        tail = [] if self.last is None else [self.last]
        padding = [self.pad] * (length - len(row) - len(tail))
        return [*padding, *row, *tail] if self.left else [*row, *padding, *tail]


def tokens_of(tokenizer: Any, lower: bool = False) -> Tokens:
    """The `Tokens` of a tokenizer.

    Args:
        tokenizer: open_clip's (`open_clip.get_tokenizer(...)`), or a tokenizer or processor of `transformers`.
        lower: whether a tokenizer of `transformers` gets its texts in lower case; open_clip's do what their model needs.

    Raises:
        ClipError: if it is none of these, or if it changes a text's ids by what stands around them.
    """
    if hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "encode"):  # open_clip's BPE
        return _plain_bpe(tokenizer)
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and hasattr(tokenizer, "clean_fn"):  # open_clip's wrapper
        return _open_clip_wrapper(tokenizer, inner)
    if inner is not None and callable(getattr(inner, "convert_tokens_to_ids", None)):  # a processor
        tokenizer = inner
    if callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
        return _hugging_face(tokenizer, str.lower if lower else str)
    raise ClipError(
        f"`tokenizer` must be one of open_clip, or a tokenizer or processor of transformers; got {type(tokenizer).__name__}. "
        "Pass what open_clip.get_tokenizer(...) or AutoTokenizer.from_pretrained(...) returns."
    )


def _plain_bpe(tokenizer: Any) -> Tokens:
    start, end = int(tokenizer.sot_token_id), int(tokenizer.eot_token_id)
    return Tokens(lambda text: list(tokenizer.encode(text)), (start,), (end,), pad=0, plain=_plain({start, end, 0}))


def _hugging_face(tokenizer: Any, clean: Callable[[str], str]) -> Tokens:
    """Start and end are what the tokenizer itself puts around a word."""

    def encode(text: str) -> List[int]:
        return list(tokenizer(clean(text), add_special_tokens=False)["input_ids"])

    word = encode("a")
    row = list(tokenizer(clean("a"))["input_ids"])
    places = [i for i in range(len(row) - len(word) + 1) if row[i : i + len(word)] == word]
    if not word or not places:
        raise ClipError(
            f"The tokenizer {type(tokenizer).__name__} must put its special tokens around a text; 'a' is {word} without and "
            f"{row} with them. Use the tokenizer that the model was trained with."
        )
    start, end = row[: places[0]], row[places[0] + len(word) :]
    pad = tokenizer.pad_token_id
    pad = 0 if pad is None else int(pad)
    left = getattr(tokenizer, "padding_side", "right") == "left"
    return Tokens(encode, tuple(start), tuple(end), pad, _plain({*tokenizer.all_special_ids, *start, *end, pad}), left=left)


def _open_clip_wrapper(wrapper: Any, inner: Any) -> Tokens:
    tokens = _hugging_face(inner, wrapper.clean_fn)
    if getattr(wrapper, "tokenizer_mode", "") == "clips":
        start, end, last = int(inner.bos_token_id), int(inner.eos_token_id), int(inner.cls_token_id)
        return tokens._replace(start=(start,), end=(end,), last=last, left=False)
    if getattr(wrapper, "strip_sep_token", False):
        tokens = tokens._replace(end=tuple(0 if i == inner.sep_token_id else i for i in tokens.end))
    return tokens


def _plain(special: Any) -> int:
    """The smallest id that is not special: below the end token, where that is found as the highest id."""
    return next(i for i in range(len(special) + 1) if i not in special)
