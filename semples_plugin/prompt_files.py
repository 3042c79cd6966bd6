"""Prompt files: learned prompts with all that `PromptRefiner.load` needs, as safetensors, without CLIP's weights.

Flow: `refiner` -> **prompt_files** -> `refiner`.
"""

from __future__ import annotations

import json
import os
import reprlib
from typing import List, NamedTuple, Sequence

import torch
from torch import Tensor

from ._files import PathLike, read_tensors, write_tensors
from .clip_encoder import ClipEncoder
from .config import VOC, RefinerConfig
from .errors import PromptFileError

__all__ = ["PromptFile", "check_fits", "read_file", "write_file"]

FORMAT = "semples-plugin prompts"
FORMAT_VERSION = 3


class PromptFile(NamedTuple):
    """What a prompt file holds: everything that `PromptRefiner.load` needs but the CLIP weights.

    Attributes:
        context: (C, N, L, Dt) context vectors.
        alive: C lists of N bool: which prompts are in use, see `prompt_learning.PromptFit`.
        classes: C class names.
        prompt_names: C names that CLIP is prompted with.
        clip: name of the CLIP, as it was asked for.
        clip_fingerprint: of its weights, see `ClipEncoder.fingerprint`.
        config: the whole configuration of the refiner.
    """

    context: Tensor
    alive: List[List[bool]]
    classes: List[str]
    prompt_names: List[str]
    clip: str
    clip_fingerprint: str
    config: RefinerConfig


def write_file(path: PathLike, content: PromptFile) -> None:
    """Write learned prompts as safetensors; the file appears complete or not at all."""
    facts = {**content._asdict(), "config": content.config.as_dict()}
    write_tensors(path, {"context": facts.pop("context")}, FORMAT, FORMAT_VERSION, facts)


def read_file(path: PathLike) -> PromptFile:
    """The content of a prompt file.

    Raises:
        FileNotFoundError: if there is no such file.
        PromptFileError: if the file is damaged or is not a prompt file.
    """
    name = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No prompt file at {name}. Write one with refiner.save(path).")
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise PromptFileError(
            f"{name} is damaged or no safetensors file ({error}). Expected a file of refiner.save(path)."
        ) from error
    context = tensors.get("context")
    if metadata.get("format") != FORMAT or context is None:
        raise PromptFileError(
            f"{name} is a safetensors file, but not one of prompts: expected format {FORMAT!r} and a tensor "
            f"`context`; got format {metadata.get('format')!r}. Write one with refiner.save(path)."
        )
    if metadata.get("version") != str(FORMAT_VERSION):
        raise PromptFileError(
            f"{name} has prompt format {metadata.get('version')!r}; this version reads {FORMAT_VERSION}. "
            "Use the version of semples-plugin that wrote it, or learn the prompts again."
        )
    try:
        facts = json.loads(metadata["facts"])
        content = PromptFile(context=context, **{**facts, "config": VOC.replace(**facts["config"])})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise PromptFileError(f"{name} lacks its class names or settings ({str(error)[:200]}); it is damaged.") from error
    lists = {"classes": content.classes, "prompt_names": content.prompt_names}
    for field, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise PromptFileError(f"{name} is damaged: `{field}` must be a list of names; got {reprlib.repr(value)}.")
    texts = (content.clip, content.clip_fingerprint, content.config.prompt_template, content.config.text_template)
    if not all(isinstance(text, str) for text in texts):
        raise PromptFileError(f"{name} is damaged: its CLIP and templates must be texts; got {reprlib.repr(texts)}.")
    if context.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise PromptFileError(f"{name} is damaged: its vectors must be floats of 16 to 64 bits; got {context.dtype}.")
    shape_fits = context.ndim == 4 and context.shape[0] == len(content.classes) == len(content.prompt_names)
    if not shape_fits or not bool(torch.isfinite(context).all()):
        raise PromptFileError(
            f"{name} is damaged: context {tuple(context.shape)} for {len(content.classes)} classes, or values "
            "that are not finite. Learn the prompts again."
        )
    per_class, alive = context.shape[1], content.alive
    rows_fit = isinstance(alive, list) and [isinstance(row, list) and len(row) for row in alive] == [per_class] * len(context)
    if not rows_fit or not all(isinstance(value, bool) for row in alive for value in row):
        raise PromptFileError(
            f"{name} is damaged: `alive` must hold {per_class} values of true or false for each of {len(context)} classes; got "
            f"{str(alive):.80}. Learn the prompts again."
        )
    return content


def check_fits(path: PathLike, content: PromptFile, classes: List[str], prompt_names: List[str], clip: ClipEncoder,
               config: RefinerConfig) -> None:  # fmt: skip
    """Raise `PromptFileError` that names the first difference if the prompts of a file do not fit a refiner.

    Args:
        path: of the file, for the message.
        content: of the file.
        classes, prompt_names, clip, config: of the refiner.
    """
    there = content.config
    _same(path, "classes", classes, content.classes)
    _same(path, "prompt names", prompt_names, content.prompt_names)
    if content.clip_fingerprint != clip.fingerprint:
        _same(path, "CLIP weights", (clip.id,), (f"{content.clip} [{content.clip_fingerprint}]",))
    templates = [(c.text_template, c.prompt_template) for c in (config, there)]
    _same(path, "templates", *templates)
    _same(path, "image statistics for CLIP", (f"clip_stats={config.clip_stats}",), (f"clip_stats={there.clip_stats}",))
    _same(path, "CLIP token size", (str(clip.context_dim),), (str(content.context.shape[3]),))


def _same(path: PathLike, what: str, expected: Sequence[str], got: Sequence[str]) -> None:
    if list(expected) == list(got):
        return
    if len(expected) != len(got):
        detail = f"the file has {len(got)}, this refiner {len(expected)}"
    else:
        i = next(i for i, (a, b) in enumerate(zip(expected, got)) if a != b)
        detail = f"number {i} is {got[i]!r} in the file and {expected[i]!r} here"
    raise PromptFileError(
        f"The prompts in {os.fspath(path)} were learned with other {what}: {detail}. Use PromptRefiner.load(path), or learn "
        "prompts for these."
    )
