"""Learnable background prompts: one or more per class, read as nearest words.

A background prompt p_k describes what co-occurs with class k (SemPLeS, section 3.2). `BackgroundPrompts` holds the context
vectors; `prompt_learning` learns them. Flow: `regions` -> `clip_encoder` -> **prompts** -> `refiner`.
"""

from __future__ import annotations

from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_known, partition_faults
from ._files import PathLike
from ._torch import full_precision
from .clip_encoder import ClipEncoder
from .errors import ClusterError

__all__ = [
    "BackgroundPrompts",
    "NearestWords",
    "default_vocabulary",
    "encode_contexts",
    "hand_written_prompts",
    "nearest_words",
    "prompt_title",
    "read_vocabulary",
    "related_classes",
]


class NearestWords(NamedTuple):
    """A prompt in words.

    Attributes:
        name: of the class.
        class_similarity: cos(u_f, u_b).
        words: the nearest vocabulary entries, each with its cosine to u_b.
        alive: False for a prompt that failed or had nothing to learn from; its words mean nothing, and L_refine leaves it out.
        number: from 1, where a class has several prompts; else None.
    """

    name: str
    class_similarity: float
    words: List[Tuple[str, float]]
    alive: bool = True
    number: Optional[int] = None

    @property
    def title(self) -> str:
        """The class, with the prompt's number where it has several."""
        return prompt_title(self.name, self.number)

    def __str__(self) -> str:
        words = ", ".join(f"{word} {similarity:.2f}" for word, similarity in self.words)
        note = "" if self.alive else ", not in use: failed or without data"
        return f"{self.title} (cos to class {self.class_similarity:.2f}{note}): {words}"


def prompt_title(name: str, number: Optional[int]) -> str:
    """A class name, with the number of its prompt where it has several."""
    return name if number is None else f"{name} {number}"


class BackgroundPrompts(nn.Module):
    """The context vectors of all classes, and which of them were learned.

    `context` (C, N, L, Dt); `learned` (), whether stage (b) has run; `alive` (C, N), which prompts it learned with success.

    Args:
        num_classes: C.
        length: L, context vectors per prompt.
        dim: Dt, size of a token embedding of the CLIP in use.
        seed: of the initial values, U[0, 1) as in the reference recipe; drawn on the CPU, so they are the same on every device.
        per_class: N, prompts per class.
    """

    learned: Tensor
    alive: Tensor

    def __init__(self, num_classes: int, length: int, dim: int, seed: int = 0, per_class: int = 1):
        super().__init__()
        self.seed = seed
        self.context = nn.Parameter(torch.empty(num_classes, per_class, length, dim), requires_grad=False)
        self.register_buffer("learned", torch.zeros((), dtype=torch.bool))
        self.register_buffer("alive", torch.zeros(num_classes, per_class, dtype=torch.bool))
        self.reset()

    def initial(self, attempt: int = 0) -> Tensor:
        """(C, N, L, Dt) initial values of an attempt, from 0: each takes the generator's next values."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(attempt):
            torch.rand(self.context.shape, generator=generator)
        return torch.rand(self.context.shape, generator=generator).to(self.context.device)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial values of the seed; nothing is learned."""
        self.context.copy_(self.initial())
        self.learned.fill_(False)
        self.alive.fill_(False)

    @torch.no_grad()
    def take(self, context: Tensor, alive: Tensor) -> None:
        """Learned values: context (C, N, L, Dt), also with another N or L than before, and alive (C, N)."""
        device = self.context.device
        if context.shape == self.context.shape:
            self.context.copy_(context)
        else:
            self.context = nn.Parameter(context.to(device), requires_grad=False)
        self.alive = alive.to(device, torch.bool)
        self.learned.fill_(True)


def encode_contexts(encoder: ClipEncoder, context: Tensor, template: str) -> Tensor:
    """Text features (..., D) of context vectors (..., L, Dt), at most 64 prompts at once."""
    flat = context.flatten(0, -3)
    features = torch.cat([encoder.encode_prompt(part, template) for part in flat.split(64)])
    return features.view(*context.shape[:-2], features.shape[-1])


def related_classes(clusters: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Tensor:
    """(C, C) bool: whether two classes are in one cluster; true on the diagonal.

    Args:
        clusters: cluster name -> its classes; every class in exactly one cluster.
        classes: C class names.

    Raises:
        ClusterError: if the clusters are no partition of the classes; all faults are listed.
    """
    faults = partition_faults(clusters, classes)
    if faults:
        raise ClusterError(
            f"`clusters` must put each of the {len(classes)} classes into exactly one cluster; " + " ".join(faults)
        )
    number = {name: k for k, members in enumerate(clusters.values()) for name in members}
    index = torch.tensor([number[name] for name in classes])
    return index[:, None] == index


def hand_written_prompts(
    texts: Union[None, Sequence[str], Mapping[str, Sequence[str]]], classes: Sequence[str]
) -> Tuple[List[str], Tensor]:
    """All hand-written background prompts (K), and which class has which, (C, K) float of 0 and 1.

    Args:
        texts: a list for all classes, a mapping class name -> list, or None.
        classes: C class names.
    """
    if isinstance(texts, str):
        raise TypeError(f"`background_texts` must be a list or a mapping class name -> list; got the string {texts!r}.")
    if isinstance(texts, Mapping):
        check_known("background_texts", texts, classes)
        given = dict(texts)
    else:
        given = dict.fromkeys(classes, list(texts or ()))
    for name, own in given.items():
        if isinstance(own, str):
            raise TypeError(
                f"`background_texts` must hold a list of texts for every class; got the string {own!r} for {name!r}."
            )
    table = {name: list(given.get(name, ())) for name in classes}
    every = list(dict.fromkeys(text for own in table.values() for text in own))
    owner = torch.zeros(len(classes), len(every))
    for k, name in enumerate(classes):
        for text in table[name]:
            owner[k, every.index(text)] = 1
    return every, owner


# -------------------------------------------------------------------------------------------------- in words


def nearest_words(
    classes: Sequence[str],
    text_features: Tensor,
    prompt_features: Tensor,
    alive: Tensor,
    words: Sequence[str],
    word_features: Tensor,
    top: int,
) -> List[NearestWords]:
    """The `top` words with the highest cosine to each background prompt; one entry per prompt, class by class.

    Args:
        classes: C class names.
        text_features: (C, D), u_f.
        prompt_features: (C, N, D), u_b.
        alive: (C, N) bool, which prompts are in use.
        words: V words.
        word_features: (V, D), their text features.
        top: words per prompt.
    """
    per_class = prompt_features.shape[1]
    u_b = F.normalize(prompt_features, dim=-1)
    own = F.cosine_similarity(text_features[:, None], u_b, dim=-1).flatten().tolist()  # (C * N,)
    with full_precision(u_b.device):
        nearest = (u_b.flatten(0, 1) @ F.normalize(word_features, dim=-1).T).topk(min(top, len(words)), dim=1)
    rows = zip(own, nearest.indices.tolist(), nearest.values.tolist(), alive.flatten().tolist())
    found = []
    for row, (cosine, indices, values, in_use) in enumerate(rows):
        number = row % per_class + 1 if per_class > 1 else None
        near = [(words[i], value) for i, value in zip(indices, values)]
        found.append(NearestWords(classes[row // per_class], cosine, near, in_use, number))
    return found


def default_vocabulary() -> List[str]:
    """Our own list of places, materials, plants, furniture and other things that objects occur with."""
    return read_vocabulary(Path(__file__).with_name("vocabulary.txt"))


def read_vocabulary(path: PathLike) -> List[str]:
    """Words of a text file: one per line; blank lines and lines that begin with # are passed over."""
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
