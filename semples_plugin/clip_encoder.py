"""Frozen CLIP behind one small protocol: images, texts and prompts become features here and nowhere else.

`ClipEncoder` is the protocol, and its text half runs a causal text tower in OpenAI's layout; `clip_towers` runs any other.
`clip_backends`, `clip_open_clip` and `clip_huggingface` implement it and load models.
Flow: `regions` -> **clip_encoder** -> `losses`.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._torch import full_precision
from .errors import ClipError

__all__ = ["CLIP_MEAN", "CLIP_STD", "ClipEncoder", "Recorder", "with_submodule"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder:
    """What the rest of the package needs of a CLIP model. Not an `nn.Module`: nothing of it is registered or saved.

    Attributes:
        model: the CLIP module.
        name: how the model was asked for, for messages and prompt files.
        image_size: input height and width in pixels.
        mean, std: image statistics of its input, three values each, for images in [0, 1].
        context_length: number of text positions (77 for OpenAI's models).
        embed_dim: D, size of image and text features.
        context_dim: Dt, size of a token embedding (and so of a prompt's context vectors).
        logit_scale: factor that CLIP was trained to multiply cosines with (about 100 for OpenAI's models).
    """

    def __init__(self, model: Any, name: str, image_size: int, mean: Sequence[float], std: Sequence[float]):
        self.model, self.name, self.image_size = model, name, image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.context_length, self.context_dim, self.embed_dim = self._sizes()
        self.logit_scale = float(model.logit_scale.detach().float().exp())
        self._fingerprint = _fingerprint(model)

    def __deepcopy__(self, memo: Dict[int, Any]) -> "ClipEncoder":
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "A CLIP encoder is not pickled: its weights would go into your file. Save refiner.state_dict() or call "
            "refiner.save(path), and build the PromptRefiner anew in the other process."
        )

    # What a backend provides: the module that holds the text tower, its transformer, tokens, dense features' layout.

    @property
    def _text(self) -> Any:
        return self.model

    def _sizes(self) -> Tuple[int, int, int]:
        """Number of text positions, Dt, D."""
        text = self._text
        parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
        missing = [part for part in parts if getattr(text, part, None) is None]
        if missing:
            raise ClipError(
                f"CLIP {self.name!r} has a text tower of type {type(text).__name__} without {', '.join(missing)}; background "
                "prompts need a text tower in OpenAI's layout. Use a CLIP that has one, such as 'ViT-B/32'."
            )
        projection = text.text_projection
        embed_dim = projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
        return int(text.positional_embedding.shape[0]), int(text.token_embedding.weight.shape[1]), int(embed_dim)

    def _transform(self, x: Tensor, mask: Tensor) -> Tensor:
        """Text transformer on (N, T, Dt) with an additive attention mask (T, T)."""
        raise NotImplementedError

    def token_ids(self, text: str) -> List[int]:
        """Token ids of a text, without start and end tokens."""
        raise NotImplementedError

    def _around(self) -> Tuple[List[int], List[int]]:
        """What stands before and behind the ids of every text."""
        return [49406], [49407]

    @property
    def _places(self) -> int:
        """How many positions a text may take, with what stands around it."""
        return self.context_length

    @property
    def _image_tower(self) -> nn.Module:
        return self.model.visual

    # ------------------------------------------------------------------------------------------------ state

    @property
    def id(self) -> str:
        """Name and fingerprint of the weights: prompts learned with one CLIP mean nothing to another."""
        return f"{self.name} [{self._fingerprint}]"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these weights from others (a sample of every parameter, at half precision)."""
        return self._fingerprint

    @property
    def device(self) -> torch.device:
        return self._text.positional_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return next(p for p in self._image_tower.parameters() if p.ndim == 4).dtype

    def freeze(self) -> "ClipEncoder":
        """Evaluation mode, and no parameter takes a gradient."""
        self.model.eval().requires_grad_(False)
        return self

    def to(self, device: Union[torch.device, str]) -> "ClipEncoder":
        self.model.to(device)
        return self

    # ------------------------------------------------------------------------------------------------ images

    def encode_image(self, views: Tensor, max_views: Optional[int] = None) -> Tensor:
        """Features of views that already have CLIP's size and statistics, attached to `views`.

        Args:
            views: (N, 3, S, S), S = `image_size`.
            max_views: encode at most so many at once. With more, each chunk is checkpointed: its activations are
                computed again in the backward pass, so memory is bounded by one chunk.

        Returns:
            (N, D) float32, not normalized. (0, D) for no views.
        """
        if views.shape[0] == 0:
            return views.new_zeros((0, self.embed_dim), dtype=torch.float32) + 0 * views.sum()
        if max_views is None or views.shape[0] <= max_views:
            return self._image_features(views)
        run: Callable[[Tensor], Tensor] = self._image_features
        if torch.is_grad_enabled() and views.requires_grad:
            parts = [checkpoint(run, v, use_reentrant=False, preserve_rng_state=False) for v in views.split(max_views)]
        else:
            parts = [run(v) for v in views.split(max_views)]
        return torch.cat(parts)

    def _image_features(self, views: Tensor) -> Tensor:
        features = self.model.visual(views.to(self.dtype))
        return (features[0] if isinstance(features, tuple) else features).float()

    @torch.no_grad()
    def encode_dense(self, views: Tensor) -> Tensor:
        """Features of every position: the value path of the last attention (MaskCLIP, Zhou et al., ECCV 2022).

        For a ViT the value projection of the last block replaces its attention (no residual, no MLP), then the final
        layer norm and projection; for OpenAI's ResNets the value path of the attention pool.

        Args:
            views: (N, 3, S, S) with CLIP's size and statistics.

        Returns:
            (N, D, g, g) float32, not normalized, g = number of patches per side.
        """
        visual = self.model.visual
        if getattr(visual, "attnpool", None) is not None:
            path = ["attnpool"]
        elif hasattr(visual, "transformer") and hasattr(visual, "ln_post") and getattr(visual, "attn_pool", None) is None:
            path = ["transformer", "resblocks", str(len(visual.transformer.resblocks) - 1)]
        else:
            raise ClipError(
                f"CLIP {self.name!r} has an image tower of type {type(visual).__name__}; dense features need OpenAI's ViT or "
                "ResNet layout. Call refine_masks(..., suppress=False)."
            )
        target: Any = visual.get_submodule(".".join(path))
        recorder = Recorder()
        with_submodule(visual, path, recorder)(views.to(self.dtype))
        x = recorder.seen
        if path == ["attnpool"]:  # x: (N, C, g, g)
            value = F.linear(x.flatten(2).transpose(1, 2), target.v_proj.weight, target.v_proj.bias)
            value = F.linear(value, target.c_proj.weight, target.c_proj.bias)  # (N, g*g, D)
            return value.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:]).float()
        if not getattr(target.attn, "batch_first", False):
            x = x.transpose(0, 1)  # (T, N, W) -> (N, T, W)
        width = x.shape[-1]
        value = F.linear(target.ln_1(x[:, 1:]), target.attn.in_proj_weight[-width:], target.attn.in_proj_bias[-width:])
        value = visual.ln_post(target.attn.out_proj(value))
        if visual.proj is not None:
            value = value @ visual.proj  # (N, g*g, D)
        side = int(value.shape[1] ** 0.5)
        return value.transpose(1, 2).reshape(x.shape[0], -1, side, side).float()

    # ------------------------------------------------------------------------------------------------ texts

    def tokenize(self, texts: Sequence[str]) -> List[List[int]]:
        """Token ids with start and end token, each text at its own length.

        Raises:
            ValueError: if a text does not fit into CLIP's context; a silently cut class name would name another class.
        """
        start, end = self._around()
        rows = [[*start, *self.token_ids(text), *end] for text in texts]
        for text, row in zip(texts, rows):
            if len(row) > self._places:
                raise ValueError(
                    f"Every text must fit into CLIP's {self._places} tokens; {text[:60]!r}... needs {len(row)}, so the "
                    "tokenizer would cut it. Use a shorter name."
                )
        return rows

    def encode_text(self, texts: Sequence[str], chunk: int = 256) -> Tensor:
        """Features of texts: (N, D) float32, not normalized. A causal tower gets them padded to the longest text only."""
        rows = self.tokenize(texts)
        parts = [self.encode_tokens(rows[i : i + chunk]) for i in range(0, len(rows), chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, self.embed_dim, device=self.device)

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Features of token rows (start and end token included): (N, D) float32."""
        length = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        end = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        return self._text_features(self._text.token_embedding(ids.to(self.device)), end)

    def max_prompt_length(self, template: str) -> int:
        """How many context vectors fit into `template` (71 for "a photo of {} .")."""
        prefix, suffix = self._split(template)
        return self._places - len(prefix) - len(suffix)

    def encode_prompt(self, context: Tensor, template: str) -> Tensor:
        """Features of learnable prompts: start token, template with the context in place of `{}`, end token.

        Attention is causal, so tokens behind the end token cannot matter: the sequence ends with it.

        Args:
            context: (N, L, Dt).
            template: a text with one `{}`.

        Returns:
            (N, D) float32, attached to `context`, not normalized.
        """
        prefix, suffix = self._split(template)
        embed = self._text.token_embedding
        n = context.shape[0]
        parts = [
            embed(torch.tensor(prefix, device=self.device)).expand(n, -1, -1),  # (N, prefix, Dt)
            context.to(self.device),
            embed(torch.tensor(suffix, device=self.device)).expand(n, -1, -1),  # (N, suffix, Dt)
        ]
        tokens = torch.cat([p.float() for p in parts], dim=1)
        end = torch.full((n,), tokens.shape[1] - 1, device=self.device)
        return self._text_features(tokens, end)

    def _split(self, template: str) -> Tuple[List[int], List[int]]:
        if template.count("{}") != 1:
            raise ValueError(f"A template must hold `{{}}` once; got {template!r}.")
        before, after = template.split("{}")
        start, end = self._around()
        return [*start, *self.token_ids(before.rstrip())], [*self.token_ids(after), *end]

    def _text_features(self, tokens: Tensor, end: Tensor) -> Tensor:
        """Text tower from token embeddings (N, T, Dt), read at positions `end` (N,), at full precision."""
        text = self._text
        length = tokens.shape[1]
        with full_precision(tokens.device):
            x = (tokens + text.positional_embedding[:length]).to(self._text_dtype)
            mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
            x = text.ln_final(self._transform(x, mask))  # (N, T, Dt)
            x = x[torch.arange(x.shape[0], device=x.device), end]
            projection = text.text_projection
            x = projection(x) if isinstance(projection, nn.Linear) else x @ projection.to(x.dtype)
            return x.float()  # (N, D)

    @property
    def _text_dtype(self) -> torch.dtype:
        return next(p for n, p in self._text.transformer.named_parameters() if n.endswith("in_proj_weight")).dtype


class Recorder(nn.Module):
    """Stands in for a module: keeps the input of the call and hands it on."""

    seen: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = x
        return x


def with_submodule(module: nn.Module, path: Sequence[str], new: nn.Module) -> Any:
    """A shallow copy of `module` with `new` at `path`. Weights are shared, and `module` itself stays as it is.

    A hook would be seen by every thread that runs `module` at the same time; this copy belongs to the caller alone.
    """
    twin = copy.copy(module)
    child = new if len(path) == 1 else with_submodule(module._modules[path[0]], path[1:], new)  # type: ignore[arg-type]
    twin._modules = {**module._modules, path[0]: child}
    return twin


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        digest.update(name.encode())
        digest.update(values[:: max(1, values.numel() // 1024)].cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]
