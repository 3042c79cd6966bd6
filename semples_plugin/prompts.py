"""Learnable background prompts: one per class, learned on cached features, read as nearest words, saved without CLIP.

A background prompt p_k describes what co-occurs with class k (SemPLeS, section 3.2). `BackgroundPrompts` holds the context
vectors, `learn` is stage (b) on features that were collected once. Flow: `regions` -> `clip_encoder` -> **prompts** ->
`refiner`.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from ._checks import partition_faults
from ._files import PathLike, read_tensors, write_tensors
from ._torch import full_precision
from .clip_encoder import ClipEncoder
from .config import VOC, RefinerConfig
from .errors import ClusterError, PromptFileError

__all__ = [
    "BackgroundPrompts",
    "NearestWords",
    "PromptFile",
    "PromptFit",
    "broadcast_context",
    "default_vocabulary",
    "gather_pairs",
    "hand_written_prompts",
    "learn",
    "nearest_words",
    "read_file",
    "read_vocabulary",
    "related_classes",
    "same_or_error",
    "write_file",
]

FORMAT = "semples-plugin prompts"
FORMAT_VERSION = 2


class PromptFit(NamedTuple):
    """What stage (b) did.

    Attributes:
        losses: mean L_prompt of every epoch.
        similarity: cos(v_b, u_b), mean over all pairs, after the last epoch.
        class_similarity: cos(u_f, u_b), mean over classes, after the last epoch.
        num_pairs: number of positive (image, class) pairs that were encoded.
    """

    losses: List[float]
    similarity: float
    class_similarity: float
    num_pairs: int


class NearestWords(NamedTuple):
    """A prompt in words: the class, cos(u_f, u_b), and the nearest vocabulary entries with their cosine to u_b."""

    name: str
    class_similarity: float
    words: List[Tuple[str, float]]

    def __str__(self) -> str:
        words = ", ".join(f"{word} {similarity:.2f}" for word, similarity in self.words)
        return f"{self.name} (cos to class {self.class_similarity:.2f}): {words}"


class BackgroundPrompts(nn.Module):
    """The context vectors of all classes, and whether they were learned yet.

    Args:
        num_classes: C.
        length: L, context vectors per prompt.
        dim: Dt, size of a token embedding of the CLIP in use.
        seed: of the initial values, U[0, 1) as in the reference recipe; drawn on the CPU, so they are the same on every device.
    """

    def __init__(self, num_classes: int, length: int, dim: int, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.context = nn.Parameter(torch.empty(num_classes, length, dim), requires_grad=False)  # (C, L, Dt)
        self.register_buffer("learned", torch.zeros((), dtype=torch.bool))
        self.learned: Tensor
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial values of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        self.context.copy_(torch.rand(self.context.shape, generator=generator))
        self.learned.fill_(False)


def learn(
    prompts: BackgroundPrompts,
    encoder: ClipEncoder,
    config: RefinerConfig,
    text_features: Tensor,
    features: Tensor,
    pairs: Tensor,
    *,
    related: Optional[Tensor] = None,
    progress: bool = True,
) -> PromptFit:
    """Stage (b): L_prompt = < -log c(v_b, u_b) > + lambda_T T(u_f, u_b) (SemPLeS, L_prompt); only p is trained.

    The host and the image encoder are frozen, so v_b is a constant per view and comes in as a table. Only the text encoder
    runs in the loop: once per step for each class of the step's images, at the prompt's own length.

    Args:
        prompts: trained in place (AdamW, cosine schedule to 0 over all steps).
        encoder: the frozen CLIP.
        config: template, lambda_t, repel, epochs, prompt_batch_size (images), prompt_lr, weight_decay, seed are used.
        text_features: (C, D), u_f.
        features: (P, D), v_b of every positive pair of the data.
        pairs: (P, 2) image number and class of each row of `features`.
        related: (C, C) bool, see `related_classes`: T then holds every class of the cluster; or None.
        progress: show a progress bar.

    Returns:
        `PromptFit`.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    from tqdm import tqdm

    epochs, batch_size = config.epochs, config.prompt_batch_size
    images, image_of = torch.unique(pairs[:, 0], return_inverse=True)
    classes = pairs[:, 1].to(text_features.device)
    steps_per_epoch = math.ceil(len(images) / batch_size)
    history: List[float] = []
    context = prompts.context
    context.requires_grad_(True)
    optimizer = torch.optim.AdamW([context], lr=config.prompt_lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(epochs), desc="learning prompts", disable=not progress)
    try:
        with torch.enable_grad():  # also when called under no_grad
            for _ in bar:
                order = torch.randperm(len(images), generator=generator)
                rank = torch.empty_like(order)
                rank[order] = torch.arange(len(order))
                step_of = (rank[image_of.cpu()] // batch_size).to(features.device)  # (P,) step in which each pair is used
                total = 0.0
                for step in range(steps_per_epoch):
                    chosen = (step_of == step).nonzero()[:, 0]
                    present, index = torch.unique(classes[chosen], return_inverse=True)
                    u_b = encoder.encode_prompt(context[present], config.prompt_template)[index]  # (P', D)
                    loss = losses.prompt_background(features[chosen], u_b)
                    if related is None:
                        repel = losses.prompt_repel(text_features[classes[chosen]], u_b, config.repel)
                    else:
                        repel = losses.prompt_repel_cluster(text_features, u_b, related[classes[chosen]], config.repel)
                    loss = loss + config.lambda_t * repel
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += loss.item()
                if not math.isfinite(total):
                    raise FloatingPointError(
                        f"The prompts diverged (loss {total}). Use a smaller `lr`, or clip_dtype=torch.float32."
                    )
                history.append(total / steps_per_epoch)
                bar.set_postfix(loss=f"{history[-1]:.3f}")
    finally:
        context.requires_grad_(False)
        context.grad = None
    prompts.learned.fill_(True)
    with torch.no_grad():
        u_b = encoder.encode_prompt(context, config.prompt_template)
        similarity = F.cosine_similarity(features, u_b[classes]).mean().item()
        class_similarity = F.cosine_similarity(text_features, u_b).mean().item()
    return PromptFit(history, similarity, class_similarity, len(features))


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
        unknown = sorted(set(texts) - set(classes))
        if unknown:
            raise ValueError(f"`background_texts` must name known classes; got {', '.join(map(repr, unknown))}.")
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


# -------------------------------------------------------------------------------------------------- several processes


def gather_pairs(features: Tensor, pairs: Tensor) -> Tuple[Tensor, Tensor]:
    """Features and pairs of all processes, images numbered through, in rank order; unchanged without `torch.distributed`."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return features, pairs
    shares: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (features, pairs))
    start, numbered = 0, []
    for _, share in shares:
        numbered.append(share + torch.tensor([start, 0]))
        start += int(share[:, 0].max()) + 1 if len(share) else 0
    return torch.cat([f for f, _ in shares]), torch.cat(numbered)


def broadcast_context(context: Tensor) -> None:
    """Rank 0's prompts to all processes: the same data and seed give the same prompts up to the machines' rounding."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        shared = context.detach().cuda() if dist.get_backend() == "nccl" else context.detach().clone()
        dist.broadcast(shared, 0)
        with torch.no_grad():
            context.copy_(shared)


# -------------------------------------------------------------------------------------------------- in words


def nearest_words(
    classes: Sequence[str],
    text_features: Tensor,
    prompt_features: Tensor,
    words: Sequence[str],
    word_features: Tensor,
    top: int,
) -> List[NearestWords]:
    """The `top` words with the highest cosine to each background prompt.

    Args:
        classes: C class names.
        text_features, prompt_features: (C, D), u_f and u_b.
        words: N words.
        word_features: (N, D), their text features.
        top: words per class.
    """
    u_b = F.normalize(prompt_features, dim=-1)
    own = F.cosine_similarity(text_features, u_b, dim=-1).tolist()
    with full_precision(u_b.device):
        nearest = (u_b @ F.normalize(word_features, dim=-1).T).topk(min(top, len(words)), dim=1)
    rows = zip(classes, own, nearest.indices.tolist(), nearest.values.tolist())
    return [NearestWords(name, cosine, [(words[i], c) for i, c in zip(*found)]) for name, cosine, *found in rows]


def default_vocabulary() -> List[str]:
    """Our own list of places, materials, plants, furniture and other things that objects occur with."""
    return read_vocabulary(Path(__file__).with_name("vocabulary.txt"))


def read_vocabulary(path: PathLike) -> List[str]:
    """Words of a text file: one per line; blank lines and lines that begin with # are passed over."""
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


# -------------------------------------------------------------------------------------------------------------- files


class PromptFile(NamedTuple):
    """What a prompt file holds: everything that `PromptRefiner.load` needs but the CLIP weights.

    Attributes:
        context: (C, L, Dt) context vectors.
        classes: C class names.
        prompt_names: C names that CLIP is prompted with.
        clip: name of the CLIP, as it was asked for.
        clip_fingerprint: of its weights, see `ClipEncoder.fingerprint`.
        config: the whole configuration of the refiner.
    """

    context: Tensor
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
    except (KeyError, TypeError, ValueError) as error:
        raise PromptFileError(f"{name} lacks its class names or settings ({error}); it is damaged.") from error
    shape_fits = context.ndim == 3 and context.shape[0] == len(content.classes) == len(content.prompt_names)
    if not shape_fits or not bool(torch.isfinite(context).all()):
        raise PromptFileError(
            f"{name} is damaged: context {tuple(context.shape)} for {len(content.classes)} classes, or values "
            "that are not finite. Learn the prompts again."
        )
    return content


def same_or_error(path: PathLike, what: str, expected: Sequence[str], got: Sequence[str]) -> None:
    """Raise `PromptFileError` that names the first difference between two lists."""
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
