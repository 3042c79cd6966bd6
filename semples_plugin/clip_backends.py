"""Where a CLIP comes from: OpenAI's weights and code, a file, open_clip, transformers, or a loaded model.

`load_clip` returns a `ClipEncoder`; open_clip and transformers have files of their own. OpenAI's code is imported piece by
piece: `clip/model.py` and `clip/simple_tokenizer.py` need only torch, numpy, ftfy and regex. `import clip` also needs
`pkg_resources` (gone from setuptools 82) and torchvision (which fails beside a torch build that it was not compiled for).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ._checks import warn
from .archives import archive_tensors, is_torchscript
from .clip_encoder import CLIP_MEAN, CLIP_STD, ClipEncoder
from .clip_huggingface import is_hugging_face, load_hugging_face, wrap_hugging_face
from .clip_open_clip import is_open_clip, load_open_clip, wrap_open_clip
from .errors import ClipError

__all__ = ["CLIP_MEAN", "CLIP_STD", "OpenAIClip", "load_clip", "openai_clip_module", "published_clips"]

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


_PUBLISHED_WIDTH = 512  # of the text tower: the smallest of the published models


@lru_cache(maxsize=None)
def openai_clip_module(name: str) -> ModuleType:
    """OpenAI's `clip.model` or `clip.simple_tokenizer`, without running `clip/__init__.py`.

    Args:
        name: `"model"` or `"simple_tokenizer"`.

    Raises:
        ClipError: if no `clip` package is installed, or one that is not OpenAI's.
    """
    full_name = f"clip.{name}"
    folder = _openai_clip_folder()
    advice = "Install OpenAI's: `pip install openai-clip` (or `pip install git+https://github.com/openai/CLIP`)."
    if folder is None:
        raise ClipError(f"OpenAI's `clip` package was expected; none is installed. {advice}")
    path = folder / f"{name}.py"
    if not path.is_file():
        raise ClipError(
            f"OpenAI's `clip` package was expected; the `clip` in {folder} has no {path.name} (PyPI's `clip` is "
            f"another project). Uninstall it (`pip uninstall clip`). {advice}"
        )
    loaded = sys.modules.get(full_name)
    if loaded is not None and Path(str(loaded.__file__)).resolve() == path.resolve():
        return loaded
    module_spec = importlib.util.spec_from_file_location(full_name, path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _openai_clip_folder() -> Optional[Path]:
    """Where OpenAI's `clip` package is: as it was installed, since some hosts have a package of that name of their own."""
    for distribution in ("openai-clip", "clip"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            folder = Path(str(importlib.metadata.distribution(distribution).locate_file("clip")))
            if (folder / "model.py").is_file():
                return folder
    spec = importlib.util.find_spec("clip")
    if spec is None:
        return None
    return Path((list(spec.submodule_search_locations or []) or [spec.origin or "the environment"])[0])


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
    if is_torchscript(path):
        return archive_tensors(path)
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ClipError(f"{path} is no CLIP weights file: expected a TorchScript archive or a state dict ({error}).") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or "text_projection" not in state:
        raise ClipError(f"{path} is no CLIP state dict: expected an entry `text_projection` (OpenAI's layout).")
    return state


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


def published_clips() -> List[str]:
    """Names of OpenAI's published models."""
    return list(_WEIGHTS)


def load_clip(
    clip: Union[str, "os.PathLike[str]", nn.Module, ClipEncoder],
    device: Union[None, torch.device, str] = None,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
) -> ClipEncoder:
    """A frozen `ClipEncoder`.

    Args:
        clip: one of
            - an OpenAI name such as `"ViT-B/32"` or `"RN50"` (downloaded once to `~/.cache/clip`);
            - a path to a weights file (OpenAI's archive, or a state dict in its layout, which runs with OpenAI's QuickGELU);
            - a loaded model of OpenAI's `clip`, open_clip or transformers (copied; yours stays as it is);
            - `"open_clip:ViT-B-32/laion2b_s34b_b79k"` or `"open_clip:ViT-B-32/<file>"` (needs `pip install open_clip_torch`);
            - `"hf:openai/clip-vit-base-patch32"`, `"hf:google/siglip-base-patch16-224"` or `"hf:<folder>"` (needs
              `pip install transformers`);
            - a `ClipEncoder`, returned as it is (several refiners may share one).
        device: where it goes; by default a loaded model stays on its device, and files go to the CPU.
        dtype: of weights that are loaded or copied here; a `ClipEncoder` must have it already. In OpenAI's models the layer
            norms stay in float32; the others are converted whole, as open_clip's own `precision="pure_bf16"` does.
        tokenizer: of a loaded model of open_clip or transformers: what `open_clip.get_tokenizer(...)` returns, or a tokenizer
            or processor of transformers. By default open_clip's BPE, and the tokenizer beside the weights of a model that
            `from_pretrained` has read. The encoder then goes into the refiner: `PromptRefiner(classes, clip=load_clip(...))`.

    Raises:
        ClipError: if there is no such model, or it cannot be used; the message says what to do.
        TypeError: for anything else.
        ValueError: if a `ClipEncoder` has another dtype, or a tokenizer comes with something that has its own.
    """
    if tokenizer is not None and not (isinstance(clip, nn.Module) and (is_open_clip(clip) or is_hugging_face(clip))):
        raise ValueError(
            "`tokenizer` goes with a loaded model of open_clip or transformers; everything else has its own. Leave it out, or "
            "pass the model."
        )
    if isinstance(clip, ClipEncoder):
        encoder = clip
        if encoder.dtype != dtype:
            raise ValueError(
                f"`clip_dtype` must be that of the ClipEncoder, which is shared as it is: {encoder.dtype}; got {dtype}. Load "
                "the encoder with load_clip(..., dtype=...)."
            )
    elif isinstance(clip, nn.Module):
        encoder = _wrap(copy.deepcopy(clip), type(clip).__name__, dtype, tokenizer)
    elif isinstance(clip, (str, os.PathLike)):
        encoder = _load_by_name(os.fspath(clip), dtype)
    else:
        raise TypeError(f"`clip` must be a name, a path, or a loaded CLIP model; got {type(clip).__name__}.")
    encoder.freeze()
    return encoder if device is None else encoder.to(device)


def _load_by_name(name: str, dtype: torch.dtype) -> ClipEncoder:
    if name.startswith("open_clip:"):
        return load_open_clip(name, dtype)
    if name.startswith("hf:"):
        return load_hugging_face(name, dtype)
    if name in _WEIGHTS:
        path = _openai_weights(name)
    elif os.path.isfile(name):
        path, name = Path(name), Path(name).name
    else:
        raise ClipError(
            f"`clip` must be one of {', '.join(_WEIGHTS)}, a weights file, 'open_clip:<architecture>/<tag or file>' or "
            f"'hf:<name or folder>'; got {name!r}, which is neither a known name nor a file."
        )
    state = _read_state_dict(path)
    build_model = openai_clip_module("model").build_model
    try:
        _check_shapes(build_model, state)
        model = build_model(state).float()  # rounds to half precision on the way
        model.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError, ArithmeticError, AssertionError) as error:
        raise ClipError(f"{path} does not hold a CLIP model in OpenAI's layout ({error}).") from error
    if len(state["text_projection"]) >= _PUBLISHED_WIDTH and not is_torchscript(path):
        warn(
            f"{path} should be of a model with QuickGELU, as OpenAI's; it runs with that, and a state dict does not say. If it "
            f"comes from open_clip, as RemoteCLIP does, load it as 'open_clip:<architecture>/{path}'."
        )
    return _wrap(model, name, dtype, None)


def _check_shapes(build_model: Any, state: Dict[str, Tensor]) -> None:
    """Raise ValueError if the model that these weights imply has other shapes than they have, before it takes any memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is copied into a model without memory
        built = build_model(dict(state)).state_dict()
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than its storage")
        if name in built and built[name].shape != value.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, but the other weights say {tuple(built[name].shape)}")


def _wrap(model: Any, name: str, dtype: torch.dtype, tokenizer: Any) -> ClipEncoder:
    if is_open_clip(model):
        return wrap_open_clip(model, name, dtype, tokenizer)
    if is_hugging_face(model):
        return wrap_hugging_face(model, name, dtype, tokenizer)
    missing = [n for n in ("visual", "transformer", "token_embedding", "text_projection") if not hasattr(model, n)]
    if missing:
        raise TypeError(
            f"`clip` must be an OpenAI `clip`, `open_clip` or `transformers` model; got {type(model).__name__} without "
            f"{', '.join(missing)}."
        )
    encoder = OpenAIClip(model, name)
    model.to(dtype)
    if dtype != torch.float32:
        for module in model.modules():  # OpenAI's LayerNorm computes in float32 and wants float32 weights
            if isinstance(module, nn.LayerNorm):
                module.float()
    return encoder
