"""What every CLIP must do behind the protocol: checks that the tests of the backends share."""

from __future__ import annotations

from typing import Any, Callable, List, Tuple

import torch
from torch import Tensor

from semples_plugin import PromptRefiner
from semples_plugin.clip_encoder import ClipEncoder
from tests.clip_zoo import Case

TEXTS = ["a photo of the boat .", "water", "Red train on rails"]
TEMPLATE = "a photo of {} ."


def random_views(encoder: ClipEncoder, count: int = 2) -> Tensor:
    size = encoder.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def distance(got: Tensor, own: Tensor) -> float:
    """Largest difference, in units of the largest value if that is below 1."""
    return ((got - own).abs().max() / own.abs().max().clamp(max=1)).item()


@torch.no_grad()
def distance_of_images(case: Case, encoder: ClipEncoder) -> float:
    """To the package's own image features, which must not be all alike."""
    views = random_views(encoder)
    own = case.image(views)
    assert own.isfinite().all() and distance(own[0], own[1]) > 1e-3
    return distance(encoder.encode_image(views), own)


@torch.no_grad()
def distance_of_texts(case: Case, encoder: ClipEncoder) -> float:
    own = case.text(TEXTS)
    assert own.isfinite().all() and distance(own[0], own[1]) > 1e-3
    return distance(encoder.encode_text(TEXTS), own)


def token_embedding(model: Any) -> Any:
    """The token embedding, found by its class and size and not as the encoders find it."""
    names = ("token_embedding", "word_embeddings", "embed_tokens", "shared")
    return next(
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and name.split(".")[-1] in names and "decoder" not in name
    )


@torch.no_grad()
def distance_of_prompts(case: Case, encoder: ClipEncoder) -> float:
    """To the package's own text path, with a hook on its token embedding that changes the words which the context replaces."""
    text = "a photo of big red boat ."
    words = encoder.token_ids(" big red boat")
    context = torch.randn(len(words), encoder.context_dim, generator=torch.Generator().manual_seed(2))
    seen: List[int] = []

    def replace(module: Any, args: Tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = args[0][0].tolist()
        place = next(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
        seen.append(place)
        output = output.clone()
        output[:, place : place + len(words)] = context
        return output

    handle = token_embedding(case.model).register_forward_hook(replace)
    try:
        own = case.text([text])
    finally:
        handle.remove()
    assert len(seen) == 1
    return distance(encoder.encode_prompt(context[None], TEMPLATE), own)


def gradient_of_context(encoder: ClipEncoder) -> Tensor:
    context = torch.randn(2, 3, encoder.context_dim, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
    encoder.encode_prompt(context, TEMPLATE).square().sum().backward()
    assert context.grad is not None
    return context.grad


def learn_and_train(encoder: ClipEncoder, make_batch: Callable[..., Any], **options: Any) -> Tuple[List[float], List[float]]:
    """L_prompt of every epoch of stage (b), and the refiner's loss while a host (one convolution) is trained with it."""
    options = {"image_stats": None, "prompt_length": 4, "match_form": "linear", "prompt_restarts": 0, **options}
    refiner = PromptRefiner(["boat", "train", "bird"], clip=encoder, **options)
    img, _, labels = make_batch()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        host = torch.nn.Conv2d(3, 3, 5, stride=5)
    fit = refiner.fit_prompts([(img, labels)], lambda x: host(x).detach(), epochs=20, lr=0.3, progress=False)
    assert fit.failed == []
    optimizer = torch.optim.Adam(host.parameters(), lr=0.05)
    values = []
    for _ in range(6):
        loss = refiner(img, host(img), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(not p.requires_grad and p.grad is None for p in encoder.model.parameters())
    return list(fit.losses), values
