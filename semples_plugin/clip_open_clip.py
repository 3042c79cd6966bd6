"""CLIPs of open_clip: by name, or a loaded model of any of its architectures.

A causal text tower that ends with its end token runs as OpenAI's does, cut at the longest text. Every other one is called
whole: bidirectional as MobileCLIP's, read at the last position as SigLIP's and CLIPA's, with a class token as CoCa's, of
transformers as BiomedCLIP's. Flow: `clip_encoder`, `clip_towers` -> **clip_open_clip** -> `clip_backends`.
"""

from __future__ import annotations

import os
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._text import listing
from .clip_encoder import CLIP_MEAN, CLIP_STD, ClipEncoder, Recorder, with_submodule
from .clip_tokens import Tokens, tokens_of
from .clip_towers import TowerClip
from .errors import ClipError

__all__ = ["OpenClip", "OpenClipTower", "is_open_clip", "load_open_clip", "wrap_open_clip"]


def is_open_clip(model: nn.Module) -> bool:
    """Whether the model, or a class that it is derived from, is one of open_clip's."""
    return any(base.__module__.split(".")[0] == "open_clip" for base in type(model).__mro__)


def load_open_clip(name: str, dtype: torch.dtype) -> ClipEncoder:
    """What open_clip's own loader makes of a name.

    Args:
        name: `"open_clip:<architecture>/<tag or file>"`, `"open_clip:hf-hub:<name>"` or `"open_clip:local-dir:<folder>"`.
        dtype: of the weights.

    Raises:
        ClipError: if open_clip is missing, the name says no weights, or open_clip cannot load them.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ClipError(f"{name!r} needs open_clip: `pip install open_clip_torch` ({error}).") from error
    architecture, tag = name[len("open_clip:") :], ""
    options: Dict[str, Any] = {}
    if not architecture.startswith(("hf-hub:", "local-dir:")):  # these hold slashes and say where their weights are
        architecture, _, tag = architecture.partition("/")
        if not tag:
            raise ClipError(
                f"{name!r} must name its weights, 'open_clip:<architecture>/<tag or file>'; got an architecture alone, whose "
                f"weights would be random. Tags of it: {listing(open_clip.list_pretrained_tags_by_model(architecture))}."
            )
        if os.path.isfile(tag):
            options["force_preprocess_cfg"] = _statistics_of(architecture)
    try:
        model = open_clip.create_model(architecture, pretrained=tag or None, require_pretrained=True, **options)
        tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise ClipError(
            f"{name!r} could not be loaded by open_clip ({error}) Names and tags are in open_clip.list_pretrained()."
        ) from error
    return wrap_open_clip(model, name, dtype, tokenizer)


def _statistics_of(architecture: str) -> Dict[str, Any]:
    """Mean and standard deviation of images that all published weights of an architecture share, since a file holds none."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    published = [get_pretrained_cfg(architecture, tag) for tag in list_pretrained_tags_by_model(architecture)]
    found = {(one.get("mean"), one.get("std")) for one in published}
    mean, std = found.pop() if len(found) == 1 else (None, None)
    return {"mean": mean, "std": std} if mean and std else {}


def wrap_open_clip(model: Any, name: str, dtype: torch.dtype, tokenizer: Any = None) -> ClipEncoder:
    """The encoder of a loaded model; the model is converted in place.

    Args:
        model: of open_clip.
        name: for messages.
        dtype: of the weights.
        tokenizer: see `clip_backends.load_clip`.

    Raises:
        ClipError: if it has no text tower, or needs a tokenizer.
    """
    text = _text_of(model)
    if tokenizer is None:
        tokenizer = _bpe_of(text, name)
    tokens = tokens_of(tokenizer)
    model = model.float()  # the fingerprint is that of the float32 weights
    encoder = OpenClip(model, name, tokenizer) if _is_plain(text, tokenizer) else OpenClipTower(model, name, tokens)
    model.to(dtype)
    return encoder


def _text_of(model: Any) -> Any:
    return model.text if isinstance(getattr(model, "text", None), nn.Module) else model


def _bpe_of(text: Any, name: str) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    size = getattr(text, "vocab_size", tokenizer.vocab_size)
    if hasattr(text, "config") or size != tokenizer.vocab_size:
        raise ClipError(
            f"CLIP {name!r} has a vocabulary of {size} tokens and not that of OpenAI's CLIP, so it needs its tokenizer. Pass "
            "it: load_clip(model, tokenizer=open_clip.get_tokenizer(...))."
        )
    return tokenizer


def _is_plain(text: Any, tokenizer: Any) -> bool:
    """Whether the text tower is causal, in OpenAI's layout, and read at the end token, which is its highest id."""
    parts = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask")
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
    return (
        all(getattr(text, part, None) is not None for part in parts)
        and pool == "argmax"
        and getattr(text, "cls_emb", None) is None
        and hasattr(tokenizer, "sot_token_id")
    )


class _OpenClipImages(ClipEncoder):
    """The image half of both kinds."""

    def _image(self, model: Any) -> Tuple[int, Any, Any]:
        """Input size, mean and standard deviation."""
        size = model.visual.image_size
        mean = getattr(model.visual, "image_mean", None) or CLIP_MEAN
        std = getattr(model.visual, "image_std", None) or CLIP_STD
        return int(size[0] if isinstance(size, (tuple, list)) else size), mean, std

    @torch.no_grad()
    def encode_dense(self, views: Tensor) -> Tensor:
        """Features of every position, as in `ClipEncoder.encode_dense`; timm's towers as well.

        With an attention pool (SigLIP) it is the pool's value path; for a vision transformer of timm with a class token or a
        mean the value path of the last block; for a network with a feature map and a mean over it (ConvNeXt, MobileCLIP-S) the
        head at each place alone.

        Raises:
            ClipError: for image towers of other layouts.
        """
        trunk = getattr(self.model.visual, "trunk", None)
        if trunk is None:
            return super().encode_dense(views)
        views = views.to(self.dtype)
        if getattr(trunk, "attn_pool", None) is not None:
            found = _attention_pool(trunk, views)
        elif getattr(getattr(trunk, "blocks", [None])[-1], "attn", None) is not None and hasattr(trunk, "num_prefix_tokens"):
            found = _last_block(trunk, views)
        else:
            found = _feature_map(self.model.visual, views)
        if found is None:
            return super().encode_dense(views)  # says why not
        features = self.model.visual.head(found.flatten(0, 1)).unflatten(0, found.shape[:2])  # (N, g*g, D)
        side = int(features.shape[1] ** 0.5)
        return features.transpose(1, 2).reshape(len(views), -1, side, side).float()


def _attention_pool(trunk: Any, views: Tensor) -> Any:
    """(N, g*g, D') value path of timm's attention pool; None if the pool is of another kind."""
    pool = trunk.attn_pool
    if not (hasattr(pool, "kv") and hasattr(pool, "proj")) or not hasattr(trunk, "fc_norm"):
        return None
    x = trunk.forward_features(views)  # (N, T, W)
    if not getattr(trunk, "pool_include_prefix", False):
        x = x[:, trunk.num_prefix_tokens :]
    if pool.pos_embed is not None:
        x = x + pool.pos_embed.to(x.dtype)
    width = pool.kv.out_features // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[width:]
    x = pool.proj(F.linear(x, pool.kv.weight[width:], bias))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    x = x[:, trunk.num_prefix_tokens :] if getattr(trunk, "pool_include_prefix", False) else x
    return trunk.head(trunk.fc_norm(x))


def _last_block(trunk: Any, views: Tensor) -> Any:
    """(N, g*g, D') value path of the last block of timm's vision transformer; None if its attention is of another kind."""
    block = trunk.blocks[-1]
    if not hasattr(block, "norm1") or not all(hasattr(trunk, part) for part in ("norm", "head")):
        return None
    recorder = Recorder()
    with_submodule(trunk, ["blocks", str(len(trunk.blocks) - 1)], recorder).forward_features(views)
    x = recorder.seen[:, trunk.num_prefix_tokens :]  # (N, g*g, W)
    norm_after = "Post" in type(block).__name__
    value = _value(block.attn, x if norm_after else block.norm1(x))
    if value is None:
        return None
    value = block.attn.proj(getattr(block.attn, "norm", nn.Identity())(value))
    value = getattr(block, "ls1", nn.Identity())(block.norm1(value) if norm_after else value)
    if getattr(block, "gamma_1", None) is not None:  # EVA's layer scale
        value = block.gamma_1 * value
    return trunk.head(getattr(trunk, "fc_norm", nn.Identity())(trunk.norm(value)))


def _value(attention: Any, x: Tensor) -> Any:
    """Value projection of timm's attention; None if it has another layout."""
    if getattr(attention, "v_proj", None) is not None:
        return attention.v_proj(x)
    if getattr(attention, "qkv", None) is None:
        return None
    width = attention.qkv.out_features // 3
    bias = getattr(attention, "v_bias", None)  # EVA keeps the biases apart
    if bias is None and attention.qkv.bias is not None:
        bias = attention.qkv.bias[-width:]
    return F.linear(x, attention.qkv.weight[-width:], bias)


def _feature_map(visual: Any, views: Tensor) -> Any:
    """(N, g*g, D') the trunk's head at every place of its feature map; None if it has no map or pools in another way."""
    trunk = visual.trunk
    if hasattr(visual.head, "pool"):  # attention over the map, in open_clip's part
        return None
    x = trunk.forward_features(views)  # (N, W, g, g)
    if x.ndim != 4 or x.shape[1] != trunk.num_features:
        return None
    n, width, side, _ = x.shape
    places = x.flatten(2).transpose(1, 2).reshape(-1, width, 1, 1)  # (N*g*g, W, 1, 1)
    return trunk.forward_head(places).reshape(n, side * side, -1)


class OpenClip(_OpenClipImages):
    """Encoder for models of open_clip with a causal text tower in OpenAI's layout."""

    def __init__(self, model: Any, name: str, tokenizer: Any):
        self._tokenizer = tokenizer
        super().__init__(model, name, *self._image(model))

    @property
    def _text(self) -> Any:
        return _text_of(self.model)

    def token_ids(self, text: str) -> List[int]:
        return list(self._tokenizer.encode(text))

    def _transform(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._text.transformer(x, attn_mask=mask)


class OpenClipTower(TowerClip, _OpenClipImages):
    """Encoder for models of open_clip with any other text tower, padded to its context and called whole."""

    def __init__(self, model: Any, name: str, tokens: Tokens):
        text = _text_of(model)
        embedding = _embedding_of(text)
        if embedding is None:
            raise ClipError(
                f"CLIP {name!r} has a text tower of type {type(text).__name__} without a token embedding; background prompts "
                "take the place of token embeddings. Use a CLIP that has one, such as 'ViT-B/32'."
            )
        pads = not hasattr(text, "config") or tokens.left  # towers of transformers mask their padding
        super().__init__(model, name, tokens, embedding, _context_length(text), self._image(model), pads)

    def _call_text(self, model: Any, ids: Tensor) -> Tensor:
        return model.encode_text(ids, normalize=False)


def _embedding_of(text: Any) -> Any:
    """The token embedding of open_clip's text tower, or of the one of transformers inside it; None without one."""
    tower: Any = getattr(text, "transformer", None)
    for owner, name in ((text, "token_embedding"), (tower, "embed_tokens")):
        if getattr(owner, name, None) is not None:
            return getattr(owner, name)
    try:
        return tower.get_input_embeddings() if hasattr(tower, "get_input_embeddings") else None
    except NotImplementedError:
        return None


def _context_length(text: Any) -> int:
    """Places for a text. A tower of transformers has more positions than open_clip's tokenizers fill, 77."""
    if hasattr(text, "config"):
        return min(77, int(text.context_length or 77))
    return int(text.context_length)
