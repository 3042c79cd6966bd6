"""CLIPs of Hugging Face `transformers`: CLIP, MetaCLIP 2, SigLIP and SigLIP 2, by name, from a folder, or loaded.

CLIP's text tower is causal, so a text ends with its end token. SigLIP's attends to all positions, padding included, and is
read at the last one, so every text is padded to its whole context (64).
Flow: `clip_encoder`, `clip_towers` -> **clip_huggingface** -> `clip_backends`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._torch import missing_weights
from .clip_encoder import CLIP_MEAN, CLIP_STD, ClipEncoder, Recorder, with_submodule
from .clip_tokens import Tokens, tokens_of
from .clip_towers import TowerClip
from .errors import ClipError

__all__ = ["HuggingFaceClip", "is_hugging_face", "load_hugging_face", "wrap_hugging_face"]

_CAUSAL = ("clip", "metaclip_2")
_KINDS = (*_CAUSAL, "siglip", "siglip2")


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model, or a class that it is derived from, is one of transformers'."""
    return any(base.__module__.split(".")[0] == "transformers" for base in type(model).__mro__)


def load_hugging_face(name: str, dtype: torch.dtype) -> ClipEncoder:
    """`"hf:<name or folder>"`: the model, its tokenizer and its image statistics, by transformers' own loaders.

    Code that lies beside weights is never run.

    Raises:
        ClipError: if transformers is missing, there is no such model, or its weights are not complete.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ClipError(f"{name!r} needs transformers: `pip install transformers` ({error}).") from error
    source = name[len("hf:") :]
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in _KINDS:
            raise ClipError(_refusal(name, kind))
        loaded: Any = AutoModel.from_pretrained(source, output_loading_info=True)
    except ClipError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        raise ClipError(
            f"{name!r} could not be loaded by transformers ({error}) It must be a name on the Hugging Face hub or a folder "
            "that save_pretrained wrote."
        ) from error
    model, facts = loaded
    missing = missing_weights(facts)
    if missing:
        raise ClipError(
            f"{name!r} must hold all weights of a {type(model).__name__}; {len(missing)} are missing or of another shape, such "
            f"as {missing[0]}. Get the files again, or save the whole model with save_pretrained."
        )
    return wrap_hugging_face(model, name, dtype)


def wrap_hugging_face(model: Any, name: str, dtype: torch.dtype, tokenizer: Any = None) -> ClipEncoder:
    """The encoder of a loaded model; the model is converted in place.

    Args:
        model: `CLIPModel`, `MetaClip2Model`, `SiglipModel` or `Siglip2Model`.
        name: for messages.
        dtype: of the weights.
        tokenizer: a tokenizer or processor; by default that beside the weights.

    Raises:
        ClipError: if the model is of another kind, or has no tokenizer.
    """
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in _KINDS or not hasattr(model, "get_text_features"):
        raise ClipError(_refusal(name, type(model).__name__))
    source = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None:
        tokenizer = _tokenizer_of(source, name, int(model.config.text_config.vocab_size))
    # SigLIP is trained on texts in lower case. Folders of SigLIP 2 name Gemma's tokenizer, which leaves capitals as they are.
    tokens = tokens_of(tokenizer, lower=kind not in _CAUSAL)
    encoder = HuggingFaceClip(model.float(), name, tokens, _statistics(kind, source, tokenizer))
    model.to(dtype)  # the fingerprint is that of the float32 weights
    return encoder


def _refusal(name: str, kind: str) -> str:
    return (
        f"CLIP {name!r} of transformers must be a CLIPModel, MetaClip2Model, SiglipModel or Siglip2Model; got "
        f"{kind}. Use one of these, text and image tower together."
    )


def _tokenizer_of(source: str, name: str, vocabulary: int) -> Any:
    """The tokenizer beside the weights. From a folder without one, transformers may return an empty one."""
    from transformers import AutoTokenizer

    reason = "the model does not say where it was loaded from"
    if source:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # what is missing differs with the kind of tokenizer, and so do the errors
            reason = f"none could be read from {source!r} ({error})"
        else:
            if 2 * len(tokenizer) > vocabulary:
                return tokenizer
            reason = f"that beside the weights has only {len(tokenizer)} tokens for the model's {vocabulary}"
    raise ClipError(
        f"CLIP {name!r} needs its tokenizer, and {reason}. Pass it: load_clip(model, "
        "tokenizer=AutoTokenizer.from_pretrained(...)); a processor serves as well."
    )


def _statistics(kind: str, source: str, tokenizer: Any) -> Tuple[Any, Any]:
    """Mean and standard deviation of images: the processor's, those beside the weights, or those of the kind."""
    processor = getattr(tokenizer, "image_processor", None)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if (mean is None or std is None) and source:
        for file in ("preprocessor_config.json", "processor_config.json"):
            content = _json_beside(source, file)
            content = content.get("image_processor", content)
            if content.get("image_mean") and content.get("image_std"):
                mean, std = content["image_mean"], content["image_std"]
                break
    if mean is not None and std is not None:
        return tuple(map(float, mean)), tuple(map(float, std))
    return (CLIP_MEAN, CLIP_STD) if kind in _CAUSAL else ((0.5,) * 3, (0.5,) * 3)


def _json_beside(source: str, file: str) -> Any:
    """A JSON file beside the weights, in a folder or in the hub's cache; an empty dict if there is none."""
    path: Optional[str] = os.path.join(source, file)
    if not os.path.isdir(source):
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(source, file)
        except ValueError:  # no name of the hub
            cached = None
        path = cached if isinstance(cached, str) else None
    if path is None or not os.path.isfile(path):
        return {}
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


class HuggingFaceClip(TowerClip):
    """Encoder for `CLIPModel`, `MetaClip2Model`, `SiglipModel` and `Siglip2Model` of transformers."""

    def __init__(self, model: Any, name: str, tokens: Tokens, statistics: Tuple[Any, Any]):
        config = model.config
        self._kind = str(config.model_type)
        vision = config.vision_config
        if self._kind == "siglip2":  # takes patches of images of any shape; here always a square of as many as it has positions
            self._patch = int(vision.patch_size)
            size = int(vision.num_patches**0.5) * self._patch
        else:
            size = int(vision.image_size)
        if self._kind in _CAUSAL:
            _check_end(config.text_config, tokens, name, highest=self._kind == "clip")
            tokens = tokens._replace(left=False)  # what follows the end token cannot matter, what is in front would
        super().__init__(
            model,
            name,
            tokens,
            model.text_model.embeddings.token_embedding,
            config.text_config.max_position_embeddings,
            (size, *statistics),
            pads=self._kind not in _CAUSAL,
        )

    def _call_text(self, model: Any, ids: Tensor) -> Tensor:
        return _pooled(model.get_text_features(input_ids=ids))

    # ------------------------------------------------------------------------------------------------ images

    @property
    def _image_tower(self) -> nn.Module:
        return self.model.vision_model

    @property
    def dtype(self) -> torch.dtype:
        return self.model.vision_model.embeddings.patch_embedding.weight.dtype

    def _image_features(self, views: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(**self._inputs(views))).float()

    def _inputs(self, views: Tensor) -> Any:
        views = views.to(self.dtype)
        if self._kind != "siglip2":
            return {"pixel_values": views}
        n, channels, size, _ = views.shape
        side = size // self._patch
        cells = views.reshape(n, channels, side, self._patch, side, self._patch)
        cells = cells.permute(0, 2, 4, 3, 5, 1).reshape(n, side * side, -1)  # (N, g*g, patch * patch * 3)
        mask = torch.ones(n, side * side, dtype=torch.long, device=views.device)
        shapes = torch.full((n, 2), side, dtype=torch.long, device=views.device)
        return {"pixel_values": cells, "pixel_attention_mask": mask, "spatial_shapes": shapes}

    @torch.no_grad()
    def encode_dense(self, views: Tensor) -> Tensor:
        """Features of every position, as in `ClipEncoder.encode_dense`.

        CLIP: the value path of the last block, then layer norm and projection. SigLIP: the value path of its attention pool.

        Raises:
            ClipError: if a SigLIP has no attention pool.
        """
        tower: Any = self.model.vision_model
        if self._kind in _CAUSAL:
            last: Any = tower.encoder.layers[-1]
            path = ["vision_model", "encoder", "layers", str(len(tower.encoder.layers) - 1), "layer_norm1"]
            recorder = Recorder()
            with_submodule(self.model, path, recorder).get_image_features(**self._inputs(views))
            x = last.layer_norm1(recorder.seen[:, 1:])  # (N, g*g, W), without the class token
            x = last.self_attn.out_proj(last.self_attn.v_proj(x))
            x = self.model.visual_projection(tower.post_layernorm(x))
        else:
            recorder = Recorder()
            head = getattr(tower, "head", None)
            if head is None:
                raise ClipError(
                    f"CLIP {self.name!r} has an image tower of type {type(tower).__name__} without an attention pool; dense "
                    "features need one. Call refine_masks(..., suppress=False)."
                )
            with_submodule(self.model, ["vision_model", "post_layernorm"], recorder).get_image_features(**self._inputs(views))
            x = tower.post_layernorm(recorder.seen)  # (N, g*g, W)
            attention = head.attention
            width = attention.embed_dim
            x = attention.out_proj(F.linear(x, attention.in_proj_weight[-width:], attention.in_proj_bias[-width:]))
            x = x + head.mlp(head.layernorm(x))
        side = int(x.shape[1] ** 0.5)
        return x.transpose(1, 2).reshape(len(views), -1, side, side).float()


def _check_end(config: Any, tokens: Tokens, name: str, highest: bool) -> None:
    """CLIPModel reads a text at its end token; with another tokenizer's it would silently read the first position."""
    end = tokens.end[-1] if tokens.end else None
    wanted = getattr(config, "eos_token_id", None)
    if highest and wanted == 2:  # what old files of CLIPModel say: it then takes the highest id
        wanted = end
    if end is None or end != wanted:
        raise ClipError(
            f"CLIP {name!r} reads its texts at the token {wanted}, and its tokenizer ends them with {end}. Pass the tokenizer "
            "that the model was trained with: load_clip(model, tokenizer=...)."
        )


def _pooled(output: Any) -> Tensor:
    """Features (N, D): a tensor in transformers 4, a field of the output since 5."""
    return output if isinstance(output, Tensor) else output.pooler_output
