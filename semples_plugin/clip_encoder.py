"""Frozen CLIP behind one small protocol: images, texts and prompts become features here and nowhere else.

`load_clip` accepts an OpenAI model name, a weights file, a loaded model object (OpenAI `clip` or `open_clip`) or
`"open_clip:<architecture>/<pretrained tag>"`, and returns a `ClipEncoder`. Flow: `regions` -> **clip_encoder** -> `losses`.

OpenAI's code is imported piece by piece: `clip/model.py` and `clip/simple_tokenizer.py` need only torch, numpy, ftfy and
regex, whereas `import clip` also runs `pkg_resources` (gone from setuptools 82) and torchvision (which fails beside a torch
build it was not compiled for). So whatever put `clip` into the environment, it works here.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import sys
import warnings
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import ClipError

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "ClipEncoder",
    "OpenAIClip",
    "OpenClip",
    "full_precision",
    "load_clip",
    "openai_clip_module",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# File name and SHA-256 of OpenAI's published weights; the address is .../clip/models/<sha256>/<file>.
_WEIGHTS_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
_WEIGHTS: Dict[str, Tuple[str, str]] = {
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}


# ------------------------------------------------------------------------------------------ OpenAI's code and weights


@lru_cache(maxsize=None)
def openai_clip_module(name: str) -> ModuleType:
    """OpenAI's `clip.model` or `clip.simple_tokenizer`, without running `clip/__init__.py`.

    Args:
        name: `"model"` or `"simple_tokenizer"`.

    Raises:
        ClipError: if no `clip` package is installed, or one that is not OpenAI's.
    """
    full_name = f"clip.{name}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    spec = importlib.util.find_spec("clip")
    folders = list(spec.submodule_search_locations or []) if spec else []
    advice = "Install OpenAI's: `pip install openai-clip` (or `pip install git+https://github.com/openai/CLIP`)."
    if spec is None:
        raise ClipError(f"OpenAI's `clip` package was expected; none is installed. {advice}")
    folders = folders or [spec.origin or "the environment"]
    path = Path(folders[0]) / f"{name}.py"
    if not path.is_file():
        raise ClipError(
            f"OpenAI's `clip` package was expected; the `clip` in {folders[0]} has no {path.name} (PyPI's `clip` is "
            f"another project). Uninstall it (`pip uninstall clip`). {advice}"
        )
    module_spec = importlib.util.spec_from_file_location(full_name, path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=None)
def _openai_tokenizer() -> Any:
    return openai_clip_module("simple_tokenizer").SimpleTokenizer()


def _openai_weights(name: str) -> Path:
    """Path of OpenAI's weights `name`, downloaded to the folder that `clip.load` uses, checked by SHA-256."""
    file_name, sha256 = _WEIGHTS[name]
    path = Path(os.path.expanduser("~/.cache/clip")) / file_name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    url = f"{_WEIGHTS_ADDRESS}/{sha256}/{file_name}"
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise ClipError(
            f"The weights of CLIP {name!r} could not be downloaded ({error}). Put {file_name} into {path.parent} by hand, "
            f"or pass `clip=` a path to a weights file."
        ) from error
    return path


def _read_state_dict(path: Path) -> Dict[str, Tensor]:
    """State dict of a CLIP weights file: OpenAI's TorchScript archives, or a plain state dict (tensors only)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # OpenAI ships TorchScript, whatever torch thinks of it today
            return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    except RuntimeError:
        pass  # not a TorchScript archive
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ClipError(f"{path} is no CLIP weights file: expected a TorchScript archive or a state dict ({error}).") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or "text_projection" not in state:
        raise ClipError(f"{path} is no CLIP state dict: expected an entry `text_projection` (OpenAI's layout).")
    return state


# --------------------------------------------------------------------------------------------------------- encoders


class ClipEncoder:
    """What the rest of the package needs of a CLIP model. Not an `nn.Module`: nothing of it is registered or saved.

    Attributes:
        model: the CLIP module.
        name: how the model was asked for, for messages and prompt files.
        image_size: input height and width in pixels.
        mean, std: image statistics of its input, three values each, for images in [0, 1].
        context_length: number of text positions (77).
        embed_dim: D, size of image and text features.
        context_dim: Dt, size of a token embedding (and so of a prompt's context vectors).
        logit_scale: factor that CLIP was trained to multiply cosines with (about 100 for OpenAI's models).
    """

    def __init__(self, model: Any, name: str, image_size: int, mean: Sequence[float], std: Sequence[float]):
        self.model, self.name, self.image_size = model, name, image_size
        self.mean, self.std = tuple(mean), tuple(std)
        text = self._text
        self.context_length = int(text.positional_embedding.shape[0])
        self.context_dim = int(text.token_embedding.weight.shape[1])
        projection = text.text_projection
        self.embed_dim = int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])
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
            "refiner.save_prompts(path), and build the PromptRefiner anew in the other process."
        )

    # What a backend provides: the module that holds the text tower, its transformer, tokens, dense features' layout.

    @property
    def _text(self) -> Any:
        return self.model

    def _transform(self, x: Tensor, mask: Tensor) -> Tensor:
        """Text transformer on (N, T, Dt) with an additive attention mask (T, T)."""
        raise NotImplementedError

    def token_ids(self, text: str) -> List[int]:
        """Token ids of a text, without start and end tokens."""
        raise NotImplementedError

    start_token, end_token = 49406, 49407

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
        return next(p for p in self.model.visual.parameters() if p.ndim == 4).dtype

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
            (N, D) float32, not normalised. (0, D) for no views.
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
            (N, D, g, g) float32, not normalised, g = number of patches per side.
        """
        visual = self.model.visual
        seen: List[Tensor] = []
        pooled = getattr(visual, "attnpool", None) is not None
        target: Any
        if pooled:
            target = visual.attnpool
        elif hasattr(visual, "transformer") and hasattr(visual, "ln_post"):
            target = visual.transformer.resblocks[-1]
        else:
            raise ClipError(
                f"CLIP {self.name!r} has an image tower of type {type(visual).__name__}; dense features need OpenAI's ViT or "
                "ResNet layout. Call refine(..., suppress=False)."
            )
        handle = target.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            visual(views.to(self.dtype))
        finally:
            handle.remove()
        x = seen[0]
        if pooled:  # x: (N, C, g, g)
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
        rows = [[self.start_token, *self.token_ids(text), self.end_token] for text in texts]
        for text, row in zip(texts, rows):
            if len(row) > self.context_length:
                raise ValueError(
                    f"Every text must fit into CLIP's {self.context_length} tokens; {text[:60]!r}... needs {len(row)}, so the "
                    "tokenizer would cut it. Use a shorter name."
                )
        return rows

    def encode_text(self, texts: Sequence[str], chunk: int = 256) -> Tensor:
        """Features of texts: (N, D) float32, not normalised. Padded to the longest of the texts, not to 77."""
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
        return self.context_length - len(prefix) - len(suffix)

    def encode_prompt(self, context: Tensor, template: str) -> Tensor:
        """Features of learnable prompts: start token, template with the context in place of `{}`, end token.

        Attention is causal, so tokens behind the end token cannot matter: the sequence ends with it.

        Args:
            context: (N, L, Dt).
            template: a text with one `{}`.

        Returns:
            (N, D) float32, attached to `context`, not normalised.
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
        return [self.start_token, *self.token_ids(before)], [*self.token_ids(after), self.end_token]

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


class OpenAIClip(ClipEncoder):
    """Encoder for objects of OpenAI's `clip.model.CLIP` class (ViT and ResNet)."""

    def __init__(self, model: Any, name: str):
        super().__init__(model, name, int(model.visual.input_resolution), CLIP_MEAN, CLIP_STD)

    def token_ids(self, text: str) -> List[int]:
        return list(_openai_tokenizer().encode(text))

    def _transform(self, x: Tensor, mask: Tensor) -> Tensor:
        # The blocks hold a 77 x 77 mask; run their parts with one of the text's own length.
        x = x.transpose(0, 1)  # (T, N, Dt)
        for block in self._text.transformer.resblocks:
            h = block.ln_1(x)
            x = x + block.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
            x = x + block.mlp(block.ln_2(x))
        return x.transpose(0, 1)


class OpenClip(ClipEncoder):
    """Encoder for `open_clip` models with a causal text tower (`CLIP` and `CustomTextCLIP`)."""

    def __init__(self, model: Any, name: str, tokenizer: Any):
        size = model.visual.image_size
        mean = getattr(model.visual, "image_mean", None) or CLIP_MEAN
        std = getattr(model.visual, "image_std", None) or CLIP_STD
        self._tokenizer = tokenizer
        super().__init__(model, name, int(size[0] if isinstance(size, (tuple, list)) else size), mean, std)
        pool = getattr(self._text, "text_pool_type", getattr(self._text, "pool_type", "argmax"))
        if pool != "argmax" or getattr(self._text, "attn_mask", None) is None:
            raise ClipError(
                f"CLIP {name!r} reads its text at {pool!r}; prompts need a causal text tower read at the end token."
            )

    @property
    def _text(self) -> Any:
        return self.model if hasattr(self.model, "token_embedding") else self.model.text

    def token_ids(self, text: str) -> List[int]:
        return list(self._tokenizer.encode(text))

    def _transform(self, x: Tensor, mask: Tensor) -> Tensor:
        return self._text.transformer(x, attn_mask=mask)


def load_clip(
    clip: Union[str, "os.PathLike[str]", nn.Module, ClipEncoder],
    device: Union[None, torch.device, str] = None,
    dtype: torch.dtype = torch.float32,
) -> ClipEncoder:
    """A frozen `ClipEncoder`.

    Args:
        clip: one of
            - an OpenAI name such as `"ViT-B/32"` or `"RN50"` (downloaded once to `~/.cache/clip`);
            - a path to a weights file (OpenAI's archive, or a state dict in its layout);
            - a loaded OpenAI or open_clip model (copied; yours stays as it is);
            - `"open_clip:ViT-B-32/laion2b_s34b_b79k"` (needs `pip install open_clip_torch`);
            - a `ClipEncoder`, returned as it is (several refiners may share one).
        device: where it goes; by default a loaded model stays on its device, and files go to the CPU.
        dtype: of the weights; layer norms stay in float32. OpenAI models only.

    Raises:
        ClipError: if there is no such model, or it cannot be used; the message says what to do.
        TypeError: for anything else.
    """
    if isinstance(clip, ClipEncoder):
        encoder = clip
    elif isinstance(clip, nn.Module):
        encoder = _wrap(copy.deepcopy(clip), type(clip).__name__, dtype)
    elif isinstance(clip, (str, os.PathLike)):
        encoder = _load_by_name(os.fspath(clip), dtype)
    else:
        raise TypeError(f"`clip` must be a name, a path, or a loaded CLIP model; got {type(clip).__name__}.")
    encoder.freeze()
    return encoder if device is None else encoder.to(device)


def _load_by_name(name: str, dtype: torch.dtype) -> ClipEncoder:
    if name.startswith("open_clip:"):
        return _load_open_clip(name)
    if name in _WEIGHTS:
        path = _openai_weights(name)
    elif os.path.isfile(name):
        path, name = Path(name), Path(name).name
    else:
        raise ClipError(
            f"`clip` must be one of {', '.join(_WEIGHTS)}, a weights file, or 'open_clip:<architecture>/<tag>'; got {name!r}, "
            "which is neither a known name nor a file."
        )
    state = _read_state_dict(path)
    build_model = openai_clip_module("model").build_model
    try:
        model = build_model(state).float()  # rounds to half precision on the way
        model.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, ArithmeticError, AssertionError) as error:
        raise ClipError(f"{path} does not hold a CLIP model in OpenAI's layout ({error}).") from error
    return _wrap(model, name, dtype)


def _wrap(model: Any, name: str, dtype: torch.dtype) -> ClipEncoder:
    if type(model).__module__.split(".")[0] == "open_clip":
        from open_clip.tokenizer import SimpleTokenizer

        return OpenClip(model.float(), name, SimpleTokenizer())
    missing = [n for n in ("visual", "transformer", "token_embedding", "text_projection") if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"`clip` must be an OpenAI `clip` or `open_clip` model; got {type(model).__name__} without {', '.join(missing)}."
        )
    encoder = OpenAIClip(model, name)
    model.to(dtype)
    if dtype != torch.float32:
        for module in model.modules():  # OpenAI's LayerNorm computes in float32 and wants float32 weights
            if isinstance(module, nn.LayerNorm):
                module.float()
    return encoder


def _load_open_clip(name: str) -> ClipEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise ClipError(f"{name!r} needs open_clip: `pip install open_clip_torch` ({error}).") from error
    architecture, _, tag = name[len("open_clip:") :].partition("/")
    model = open_clip.create_model(architecture, pretrained=tag or None)
    return OpenClip(model.float(), name, open_clip.get_tokenizer(architecture))


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        digest.update(name.encode())
        digest.update(values[:: max(1, values.numel() // 1024)].cpu().half().numpy().tobytes())
    return digest.hexdigest()[:16]


def full_precision(device: torch.device) -> ContextManager[Any]:
    """No autocast on `device`: text features and similarities stay in float32."""
    if device.type in ("cuda", "cpu", "xpu"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
