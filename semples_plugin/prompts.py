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
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from ._safetensors import read_tensors, write_tensors
from .clip_encoder import ClipEncoder
from .errors import PromptFileError

__all__ = ["BackgroundPrompts", "PromptFit", "PromptReading", "default_vocabulary", "learn", "read_file", "write_file"]

FORMAT = "semples-plugin prompts"
FORMAT_VERSION = 1


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


class PromptReading(NamedTuple):
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
        init: `"uniform"`, U[0, 1) as in the reference recipe, or `"normal"`, N(0, 0.02) as CLIP's own token embeddings.
        seed: of the initial values, drawn on the CPU, so they are the same on every device.
    """

    def __init__(self, num_classes: int, length: int, dim: int, init: str = "uniform", seed: int = 0):
        super().__init__()
        if init not in ("uniform", "normal"):
            raise ValueError(f"`prompt_init` must be 'uniform' or 'normal'; got {init!r}.")
        self.init, self.seed = init, seed
        self.context = nn.Parameter(torch.empty(num_classes, length, dim), requires_grad=False)  # (C, L, Dt)
        self.register_buffer("learned", torch.zeros((), dtype=torch.bool))
        self.learned: Tensor
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the initial values of the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.init == "uniform":
            values = torch.rand(self.context.shape, generator=generator)
        else:
            values = 0.02 * torch.randn(self.context.shape, generator=generator)
        self.context.copy_(values)
        self.learned.fill_(False)


def learn(
    prompts: BackgroundPrompts,
    encoder: ClipEncoder,
    template: str,
    text_features: Tensor,
    features: Tensor,
    pairs: Tensor,
    *,
    lambda_t: float,
    form: str,
    epochs: int,
    batch_size: int,
    rate: float,
    weight_decay: float,
    related: Optional[Tensor],
    seed: int,
    progress: bool,
) -> PromptFit:
    """Stage (b): L_prompt = < -log c(v_b, u_b) > + lambda_T T(u_f, u_b) (SemPLeS, L_prompt); only p is trained.

    The host and the image encoder are frozen, so v_b is a constant per view and comes in as a table. Only the text encoder
    runs in the loop: once per step for each class of the step's images, at the prompt's own length.

    Args:
        prompts: trained in place (AdamW, cosine schedule to 0 over all steps).
        encoder: the frozen CLIP.
        template: layout of the prompt, with one `{}`.
        text_features: (C, D), u_f.
        features: (P, D), v_b of every positive pair of the data.
        pairs: (P, 2) image number and class of each row of `features`.
        lambda_t: weight of T.
        form: of T, "log" or "log1m".
        epochs, batch_size, rate, weight_decay: of the optimisation; `batch_size` counts images.
        related: (C, C) bool, whether two classes are in one cluster: T then holds every class of the cluster; or None.
        seed: of the order of the images.
        progress: show a progress bar.

    Returns:
        `PromptFit`.
    """
    images, image_of = torch.unique(pairs[:, 0], return_inverse=True)
    classes = pairs[:, 1].to(text_features.device)
    steps_per_epoch = math.ceil(len(images) / batch_size)
    history: List[float] = []
    context = prompts.context
    context.requires_grad_(True)
    optimizer = torch.optim.AdamW([context], lr=rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    bar = progress_bar(range(epochs), "learning prompts", progress)
    try:
        with torch.enable_grad():  # also when called under no_grad
            for _ in bar:
                order = torch.randperm(len(images), generator=generator)
                rank = torch.empty_like(order)
                rank[order] = torch.arange(len(order))
                step_of = (rank[image_of.cpu()] // batch_size).to(features.device)  # (P,) step in which each pair is seen
                total = 0.0
                for step in range(steps_per_epoch):
                    chosen = (step_of == step).nonzero()[:, 0]
                    seen, index = torch.unique(classes[chosen], return_inverse=True)
                    u_b = encoder.encode_prompt(context[seen], template)[index]  # (P', D)
                    loss = losses.prompt_background(features[chosen], u_b)
                    if related is None:
                        repel = losses.prompt_repel(text_features[classes[chosen]], u_b, form)
                    else:
                        repel = losses.prompt_repel_cluster(text_features, u_b, related[classes[chosen]], form)
                    loss = loss + lambda_t * repel
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    total += loss.item()
                if not math.isfinite(total):
                    raise FloatingPointError(
                        f"The prompts diverged (loss {total}). Use a smaller `rate`, or clip_dtype=torch.float32."
                    )
                history.append(total / steps_per_epoch)
                bar.set_postfix(loss=f"{history[-1]:.3f}")
    finally:
        context.requires_grad_(False)
        context.grad = None
    prompts.learned.fill_(True)
    with torch.no_grad():
        u_b = encoder.encode_prompt(context, template)
        similarity = F.cosine_similarity(features, u_b[classes]).mean().item()
        class_similarity = F.cosine_similarity(text_features, u_b).mean().item()
    return PromptFit(history, similarity, class_similarity, len(features))


def progress_bar(items: Any, title: str, show: bool) -> Any:
    """`items` with a progress bar on stderr (rate and time left)."""
    from tqdm import tqdm

    return tqdm(items, desc=title, disable=not show)


def default_vocabulary() -> List[str]:
    """Our own list of places, materials, plants, furniture and other things that objects occur with."""
    return read_vocabulary(Path(__file__).with_name("vocabulary.txt"))


def read_vocabulary(path: Union[str, "os.PathLike[str]"]) -> List[str]:
    """Words of a text file: one per line; blank lines and lines that begin with # are passed over."""
    lines = (line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


# -------------------------------------------------------------------------------------------------------------- files


def write_file(path: Union[str, "os.PathLike[str]"], context: Tensor, facts: Dict[str, Any]) -> None:
    """Write context vectors and what belongs to them as safetensors; the file appears complete or not at all."""
    write_tensors(path, {"context": context}, FORMAT, FORMAT_VERSION, facts)


def read_file(path: Union[str, "os.PathLike[str]"]) -> Tuple[Tensor, Dict[str, Any]]:
    """Context vectors (C, L, Dt) and facts of a prompt file.

    Raises:
        FileNotFoundError: if there is no such file.
        PromptFileError: if the file is damaged or is not a prompt file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No prompt file at {os.fspath(path)}. Write one with refiner.save_prompts(path).")
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise PromptFileError(
            f"{os.fspath(path)} is damaged or no safetensors file ({error}). Expected a file of refiner.save_prompts(path)."
        ) from error
    context = tensors.get("context")
    if metadata.get("format") != FORMAT or context is None:
        raise PromptFileError(
            f"{os.fspath(path)} is a safetensors file, but not one of prompts: expected format {FORMAT!r} and a tensor "
            f"`context`; got format {metadata.get('format')!r}. Write one with refiner.save_prompts(path)."
        )
    if metadata.get("version") != str(FORMAT_VERSION):
        raise PromptFileError(
            f"{os.fspath(path)} has prompt format {metadata.get('version')!r}; this version reads {FORMAT_VERSION}. "
            "Use the version of semples-plugin that wrote it, or learn the prompts again."
        )
    try:
        facts = json.loads(metadata["facts"])
        shape_fits = context.ndim == 3 and context.shape[0] == len(facts["classes"]) == len(facts["prompt_names"])
        complete = all(key in facts for key in ("clip", "clip_fingerprint", "template", "prompt_template"))
    except (KeyError, TypeError, ValueError) as error:
        raise PromptFileError(f"{os.fspath(path)} lacks its class names or settings ({error}); it is damaged.") from error
    if not (shape_fits and complete) or not bool(torch.isfinite(context).all()):
        raise PromptFileError(
            f"{os.fspath(path)} is damaged: context {tuple(context.shape)} for {len(facts['classes'])} classes, or values "
            "that are not finite. Learn the prompts again."
        )
    return context, facts


def same_or_error(path: Any, what: str, expected: Sequence[str], got: Sequence[str]) -> None:
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
