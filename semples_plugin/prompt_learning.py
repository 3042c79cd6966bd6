"""Stage (b): collect the background features of the data once, and learn the background prompts on them.

A prompt that fails is learned again from other initial values; one that still fails is named in `PromptFit` and is not used.
Flow: `clip_encoder` -> `prompts` -> **prompt_learning** -> `refiner`.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from ._checks import img_and_labels
from .clip_encoder import ClipEncoder
from .config import RefinerConfig
from .prompts import BackgroundPrompts, encode_contexts, prompt_title

__all__ = [
    "FittedPrompt",
    "PromptFit",
    "broadcast_prompts",
    "collect",
    "failure_message",
    "gather_pairs",
    "group_features",
    "in_several_processes",
    "learn",
    "says_something",
]


class FittedPrompt(NamedTuple):
    """What stage (b) did for one prompt.

    Attributes:
        name: of the class.
        number: from 1, where a class has several prompts; else None.
        num_pairs: positive (image, class) pairs that it was learned from.
        attempts: how often it was learned, each time from other initial values; 0 without pairs.
        similarity: cos(v_b, u_b), mean over its pairs, of the attempt that was kept; None without pairs.
        empty_similarity: the same for a prompt without context vectors, such as "a photo of ."; None without pairs.
        class_similarity: cos(u_f, u_b).
        alive: whether the prompt is used: it has pairs, and `similarity` is above `empty_similarity` and above the clamp, 1e-4.
    """

    name: str
    number: Optional[int]
    num_pairs: int
    attempts: int
    similarity: Optional[float]
    empty_similarity: Optional[float]
    class_similarity: float
    alive: bool

    @property
    def title(self) -> str:
        """The class, with the prompt's number where it has several."""
        return prompt_title(self.name, self.number)


class PromptFit(NamedTuple):
    """What stage (b) did.

    Attributes:
        losses: mean L_prompt of every epoch of the first attempt, which learns all prompts.
        similarity: cos(v_b, u_b), mean over all pairs, of the prompts that were kept.
        class_similarity: cos(u_f, u_b), mean over the prompts that have pairs.
        num_pairs: number of positive (image, class) pairs that were encoded.
        prompts: the figures of every prompt, class by class.
    """

    losses: List[float]
    similarity: float
    class_similarity: float
    num_pairs: int
    prompts: List[FittedPrompt]

    @property
    def failed(self) -> List[FittedPrompt]:
        """The prompts that had pairs to learn from and are of no use all the same."""
        return [prompt for prompt in self.prompts if prompt.num_pairs and not prompt.alive]


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


class _Pairs(NamedTuple):
    """What the prompts learn from, one row per pair.

    Attributes:
        features: (P, D) v_b.
        classes: (P,) class index.
        prompts: (P,) the prompt that the pair pulls, class * N + group.
        images: (P,) image, numbered through from 0.
    """

    features: Tensor
    classes: Tensor
    prompts: Tensor
    images: Tensor


def learn(
    prompts: BackgroundPrompts,
    encoder: ClipEncoder,
    config: RefinerConfig,
    classes: Sequence[str],
    text_features: Tensor,
    features: Tensor,
    pairs: Tensor,
    *,
    related: Optional[Tensor] = None,
    progress: bool = True,
) -> PromptFit:
    """Stage (b): L_prompt = < -log c(v_b, u_b) > + lambda_T T(u_f, u_b) (SemPLeS, L_prompt); only p is trained.

    The host and the image encoder are frozen, so v_b is a constant per view and comes in as a table. Only the text encoder
    runs in the loop: once per step for each prompt of the step's images, at the prompt's own length.

    Two things are ours and not in the paper. A prompt has failed if the mean of cos(v_b, u_b) over its pairs is not above that
    of a prompt without context vectors, which says nothing of any class; such prompts, and no others, are learned again from
    the generator's next initial values, and the attempt with the highest mean is kept. With N prompts per class the
    pairs of each class are put into N groups once, see `group_features`, and u_b is the prompt of the pair's group.

    Args:
        prompts: gets the result at the end (AdamW, cosine schedule to 0 over all steps); unchanged if learning stops early.
        encoder: the frozen CLIP.
        config: template, lambda_t, repel, epochs, prompt_batch_size (images), prompt_lr, weight_decay, prompt_restarts and seed
            are used.
        classes: C class names, for the figures.
        text_features: (C, D), u_f.
        features: (P, D), v_b of every positive pair of the data.
        pairs: (P, 2) image number and class of each row of `features`.
        related: (C, C) bool, see `prompts.related_classes`: T then holds every class of the cluster; or None.
        progress: show a progress bar.

    Returns:
        `PromptFit`.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    per_class = prompts.context.shape[1]
    owner = pairs[:, 1].to(text_features.device)
    target = owner * per_class + group_features(features, pairs[:, 1], per_class, config.seed).to(owner.device)
    images = torch.unique(pairs[:, 0], return_inverse=True)[1]
    data = _Pairs(features, owner, target, images.to(owner.device))
    count = torch.bincount(target.cpu(), minlength=len(classes) * per_class)  # (C * N,)

    context = prompts.initial().flatten(0, 1)  # (C * N, L, Dt); prompts without pairs stay there
    with torch.no_grad():
        empty = encoder.encode_prompt(context[:1, :0], config.prompt_template)  # (1, D), the layout alone
    empty_similarity = _mean_similarity(data, empty.expand(len(context), -1))
    best = torch.full_like(empty_similarity, -math.inf)
    kept = torch.zeros(len(context), encoder.embed_dim, device=context.device)  # (C * N, D) u_b
    attempts = torch.zeros_like(count)
    history: List[float] = []
    for attempt in range(1 + config.prompt_restarts):
        failed = (count > 0) & ~says_something(best, empty_similarity)  # (C * N,)
        if not bool(failed.any()):
            break
        title = "learning prompts" if attempt == 0 else f"learning {int(failed.sum())} failed prompts again"
        tried = prompts.initial(attempt).flatten(0, 1)
        values = _descend(tried, failed.to(tried.device), encoder, config, text_features, data, related, progress, title)
        history = history or values
        with torch.no_grad():
            u_b = encode_contexts(encoder, tried, config.prompt_template)  # (C * N, D)
        similarity = _mean_similarity(data, u_b)
        better = failed & (similarity > best)
        attempts += failed
        best = torch.where(better, similarity, best)
        taken = (better if attempt else better | (count == 0)).to(
            context.device
        )  # prompts without pairs: u_b of their first values
        context = torch.where(taken[:, None, None], tried, context)
        kept = torch.where(taken[:, None], u_b, kept)
    alive = (count > 0) & says_something(best, empty_similarity)
    prompts.take(context.view_as(prompts.context), alive.view(-1, per_class))

    mean = F.cosine_similarity(features, kept[target]).mean().item()
    own = F.cosine_similarity(text_features.repeat_interleave(per_class, 0), kept).cpu()  # (C * N,)
    figures = []
    for row, pairs_of in enumerate(count.tolist()):
        number = row % per_class + 1 if per_class > 1 else None
        near, nothing = (float(value[row]) if pairs_of else None for value in (best, empty_similarity))
        figures.append(
            FittedPrompt(
                classes[row // per_class],
                number,
                pairs_of,
                int(attempts[row]),
                near,
                nothing,
                float(own[row]),
                bool(alive[row]),
            )
        )
    return PromptFit(history, mean, own[count > 0].mean().item(), len(features), figures)


def says_something(similarity: Tensor, empty_similarity: Tensor) -> Tensor:
    """Whether a prompt says something of its backgrounds: it is nearer to them than a prompt without content."""
    return (similarity > empty_similarity) & (similarity > losses.COSINE_MIN)


def failure_message(fit: PromptFit) -> str:
    """What the warning about failed prompts says: which, how it was seen, and what to try."""
    failed = "; ".join(
        f"{p.title!r}: cosine to its backgrounds {p.similarity:.2f}, of a prompt without content {p.empty_similarity:.2f}, "
        f"{p.attempts} attempts"
        for p in fit.failed
    )
    return (
        f"{len(fit.failed)} of {len(fit.prompts)} background prompts failed and are left out of L_refine ({failed}). Try more "
        "`epochs`, another `prompt_lr`, a smaller `lambda_t` or more `prompt_restarts`, and look at the CAMs of these classes."
    )


def _descend(
    context: Tensor,
    chosen: Tensor,
    encoder: ClipEncoder,
    config: RefinerConfig,
    text_features: Tensor,
    data: _Pairs,
    related: Optional[Tensor],
    progress: bool,
    title: str,
) -> List[float]:
    """Learn the chosen prompts in place, `context` (R, L, Dt), `chosen` (R,) bool; the mean loss of every epoch.

    Every attempt takes the same steps with the same batches of images; pairs of prompts that are not chosen are passed over.
    """
    from tqdm import tqdm

    epochs, batch_size = config.epochs, config.prompt_batch_size
    num_images = int(data.images.max()) + 1
    steps_per_epoch = math.ceil(num_images / batch_size)
    history: List[float] = []
    learned = context[chosen].requires_grad_(True)
    place = chosen.cumsum(0) - 1  # (R,) of a chosen prompt within `learned`
    optimizer = torch.optim.AdamW([learned], lr=config.prompt_lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(epochs), desc=title, disable=not progress)
    with torch.enable_grad():  # also when called under no_grad
        for _ in bar:
            order = torch.randperm(num_images, generator=generator)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(num_images)
            step_of = (rank // batch_size).to(data.images.device)[data.images]  # (P,) step in which each pair is used
            total, steps = 0.0, 0
            for step in range(steps_per_epoch):
                rows = ((step_of == step) & chosen[data.prompts]).nonzero()[:, 0]
                optimizer.zero_grad(set_to_none=True)
                if len(rows):
                    present, index = torch.unique(place[data.prompts[rows]], return_inverse=True)
                    u_b = encoder.encode_prompt(learned[present], config.prompt_template)[index]  # (P', D)
                    loss = losses.prompt_background(data.features[rows], u_b)
                    if related is None:
                        repel = losses.prompt_repel(text_features[data.classes[rows]], u_b, config.repel)
                    else:
                        near = related[data.classes[rows]]
                        repel = losses.prompt_repel_cluster(text_features, u_b, near, config.repel)
                    loss = loss + config.lambda_t * repel
                    loss.backward()
                    total, steps = total + loss.item(), steps + 1
                optimizer.step()
                schedule.step()
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"The prompts diverged (loss {total}). Use a smaller `lr`, or clip_dtype=torch.float32."
                )
            history.append(total / steps)
            bar.set_postfix(loss=f"{history[-1]:.3f}")
    context[chosen] = learned.detach()
    return history


def _mean_similarity(data: _Pairs, u_b: Tensor) -> Tensor:
    """(R,) float64 on the CPU: mean of cos(v_b, u_b) over the pairs of every prompt; 0 without pairs."""
    cosine = F.cosine_similarity(data.features, u_b[data.prompts]).cpu().double()
    target = data.prompts.cpu()
    total = torch.zeros(len(u_b), dtype=torch.float64).index_add_(0, target, cosine)
    return total / torch.bincount(target, minlength=len(u_b)).clamp(min=1)


def group_features(features: Tensor, classes: Tensor, count: int, seed: int = 0, rounds: int = 30) -> Tensor:
    """The group of every feature among those of its class: spherical k-means from k-means++ starting points.

    Groups that are fixed before learning leave no prompt without pairs, as pulling each pair to its nearest prompt
    can. A class with fewer different features than groups leaves the last groups empty.

    Args:
        features: (P, D).
        classes: (P,).
        count: N, groups per class.
        seed: of the starting points.
        rounds: of k-means at most.

    Returns:
        (P,) in 0 .. N - 1, on the CPU.
    """
    classes = classes.cpu()
    groups = torch.zeros(len(features), dtype=torch.long)
    if count == 1:
        return groups
    generator = torch.Generator().manual_seed(seed)
    everything = F.normalize(features.detach().float(), dim=1).cpu()
    for k in classes.unique().tolist():
        x = everything[classes == k]
        centers = x[torch.randint(len(x), (1,), generator=generator)]  # (1, D)
        while len(centers) < count:
            distance = (1 - (x @ centers.T).amax(1)).clamp(min=0)  # (P_k,)
            distance[distance < 1e-6] = 0  # the same feature again
            if not bool(distance.any()):
                break
            centers = torch.cat([centers, x[torch.multinomial(distance, 1, generator=generator)]])
        found = (x @ centers.T).argmax(1)
        for _ in range(rounds):
            total = torch.zeros_like(centers).index_add_(0, found, x)
            empty = torch.bincount(found, minlength=len(centers)) == 0
            centers = torch.where(empty[:, None], centers, F.normalize(total, dim=1))
            last, found = found, (x @ centers.T).argmax(1)
            if torch.equal(last, found):
                break
        groups[classes == k] = found
    return groups


# -------------------------------------------------------------------------------------------------- several processes


def in_several_processes() -> bool:
    """Whether `torch.distributed` runs with more than one process."""
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_pairs(features: Tensor, pairs: Tensor) -> Tuple[Tensor, Tensor]:
    """Features and pairs of all processes, images numbered through, in rank order; unchanged without `torch.distributed`."""
    dist = torch.distributed
    if not in_several_processes():
        return features, pairs
    shares: List[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (features, pairs))
    start, numbered = 0, []
    for _, share in shares:
        numbered.append(share + torch.tensor([start, 0]))
        start += int(share[:, 0].max()) + 1 if len(share) else 0
    return torch.cat([f for f, _ in shares]), torch.cat(numbered)


def broadcast_prompts(prompts: BackgroundPrompts) -> None:
    """Rank 0's prompts to all processes: the same data and seed give the same prompts up to the machines' rounding."""
    dist = torch.distributed
    if not in_several_processes():
        return
    shared = []
    for value in (prompts.context.detach(), prompts.alive.to(torch.uint8)):
        value = value.cuda() if dist.get_backend() == "nccl" else value.clone()
        dist.broadcast(value, 0)
        shared.append(value)
    prompts.take(*shared)
