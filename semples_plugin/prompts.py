"""Learnable background prompts: one per class, learned on cached features, read as nearest words.

A background prompt p_k describes what co-occurs with class k (SemPLeS, section 3.2). `BackgroundPrompts` holds the context
vectors, `learn` is stage (b) on features that were collected once. Flow: `regions` -> `clip_encoder` -> **prompts** ->
`refiner`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from ._checks import check_known, img_and_labels, partition_faults
from ._files import PathLike
from ._torch import full_precision
from .clip_encoder import ClipEncoder
from .config import RefinerConfig
from .errors import ClusterError

__all__ = [
    "BackgroundPrompts",
    "NearestWords",
    "PromptFit",
    "broadcast_context",
    "collect",
    "default_vocabulary",
    "gather_pairs",
    "hand_written_prompts",
    "learn",
    "nearest_words",
    "read_vocabulary",
    "related_classes",
]


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


@torch.no_grad()
def collect(
    loader: Iterable[Any],
    cam_of: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor, Tensor, Tensor], Tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    passes: int = 1,
    progress: bool = True,
) -> Tuple[Tensor, Tensor]:
    """What stage (b) learns from: the background feature of every positive pair of the data.

    Args:
        loader, cam_of, passes, progress: as for `PromptRefiner.fit_prompts`.
        encode: `PromptRefiner.encode_backgrounds`.
        num_classes: C.

    Returns:
        v_b (P, D), and image number and class of each, (P, 2); both empty for data without labels.
    """
    from tqdm import tqdm

    features: List[Tensor] = []
    numbers: List[Tensor] = []
    count = 0
    for _ in range(passes):
        batches = 0
        for batch in tqdm(loader, desc="collecting background features", disable=not progress):
            batches += 1
            img, labels = img_and_labels(batch, num_classes)
            cam = cam_of(img)
            if isinstance(cam, Tensor) and isinstance(img, Tensor) and isinstance(labels, Tensor):
                img, labels = img.to(cam.device), labels.to(cam.device)
            found, pairs = encode(img, cam, labels)
            features.append(found)
            numbers.append(pairs + torch.tensor([count, 0]))
            count += len(img)
        if batches == 0 and count:
            raise ValueError("With passes > 1 `loader` must start again each time; a generator is used up after one pass.")
    if not features:
        return torch.zeros(0, 0), torch.zeros(0, 2, dtype=torch.long)
    return torch.cat(features), torch.cat(numbers)


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
