"""The CAM of any convolutional network or vision transformer, by module names or a function, for hosts without an adapter.

Three ways, from the least to write to the most:

- `cam="head"`: a module whose output is the class map, (B, C, h, w) or tokens (B, N, C);
- `features="layer4", classifier="fc"`: the classical CAM (CVPR 2016), the classifier's weight applied to every place of the
  feature map (B, D, h, w), (B, h, w, D) or tokens (B, N, D);
- `cam=function, modules=[...]`: anything, computed from the model's output and the outputs of these modules.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .._text import describe
from .._torch import full_precision
from ..errors import HostError
from .sources import CamSource, Records

__all__ = ["Generic", "tokens_to_map"]

CamFunction = Callable[[Any, Records], Any]
ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "softmax": lambda cam: cam.float().softmax(1),
    "sigmoid": lambda cam: cam.float().sigmoid(),
}


class Generic(CamSource):
    """The CAM of a network that has no adapter of its own.

    Args:
        cam: name of a module whose output is the class map, or a function (output of the model, `Records`) -> (B, C, h, w).
        features: name of a module whose output is the last feature map; needs `classifier`.
        classifier: name of the nn.Linear or 1x1 nn.Conv2d that classifies the pooled features.
        modules: names of modules whose outputs a `cam` function wants: `records["name"]`.
        patch_size: of a vision transformer; by default its `patch_embed.patch_size`. Only for outputs that are tokens.
        background_channel: whether channel 0 of the class map is background.
        activation: `"relu"`; `"softmax"` over the channels, for a decoder's logits with background; `"sigmoid"`; None for the
            class map as it is.
        image_stats: statistics of the host's images, to be compared with the refiner's.
        run: a function (model, img) that calls a model whose forward needs more than the images; for `probe` and `cam_of`.
        calls: names of methods that the loop calls in the place of `model(...)`, such as `["forward_features"]`.
    """

    name = "the host"

    def __init__(
        self,
        cam: Union[None, str, CamFunction] = None,
        *,
        features: Optional[str] = None,
        classifier: Optional[str] = None,
        modules: Sequence[str] = (),
        patch_size: Union[None, int, Tuple[int, int]] = None,
        background_channel: bool = False,
        activation: Optional[str] = None,
        image_stats: Any = None,
        run: Optional[Callable[[nn.Module, Tensor], Any]] = None,
        calls: Sequence[str] = (),
    ):
        for name, value in (("modules", modules), ("calls", calls)):
            if isinstance(value, str):
                raise TypeError(f"`{name}` must be a list of {name.rstrip('s')} names; got the string {value!r}.")
        if activation not in (None, *ACTIVATIONS):
            raise ValueError(f"`activation` must be one of {', '.join(map(repr, ACTIVATIONS))} or None; got {activation!r}.")
        if run is not None and not callable(run):
            raise TypeError(f"`run` must be a function (model, img); got {type(run).__name__}.")
        if (cam is None) == (features is None) or (features is None) != (classifier is None):
            raise ValueError(
                "Say where the CAM comes from: cam='module name' or cam=function, or features='module name' together with "
                f"classifier='module name'; got cam={cam!r}, features={features!r}, classifier={classifier!r}."
            )
        if modules and not callable(cam):
            raise ValueError("`modules` are for a `cam` function, which reads them; got no function.")
        if cam is not None and not isinstance(cam, str) and not callable(cam):
            raise TypeError(f"`cam` must be a module name or a function; got {type(cam).__name__}.")
        self.source, self.features, self.classifier = cam, features, classifier
        self.names, self.patch_size = list(modules), patch_size
        self.background_channel, self.activation, self.image_stats = background_channel, activation, image_stats
        self.function, self.calls = run, list(calls)
        self._classifier: Optional[nn.Module] = None
        self._patch: Optional[Tuple[int, int]] = None
        self._own_patch: Optional[Tuple[int, int]] = None  # that of the model's patch embedding
        self._prefix = 0  # tokens before those of the patches, in the last pass

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        if type(self) is Generic:
            self.name = type(model).__name__
        self._own_patch = _patch_size(model, self.features or (self.source if isinstance(self.source, str) else ""))
        self._patch = self._own_patch if self.patch_size is None else _pair(self.patch_size)
        if callable(self.source):
            wanted = self.names
        else:
            wanted = [self.source if self.source is not None else str(self.features)]
        kinds: Dict[str, Any] = {name: nn.Module for name in wanted}
        if self.classifier is not None:
            self._classifier = self.find(model, {self.classifier: nn.Module}, self.name)[self.classifier]
            weight = getattr(self._classifier, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim < 2 or weight[0, 0].numel() != 1:
                raise HostError(f"`classifier` must be an nn.Linear or a 1x1 nn.Conv2d; got {self._classifier}.")
        return {**self.find(model, kinds, self.name), **({} if self._classifier is None else {self._last: self._classifier})}

    @property
    def _last(self) -> str:
        return str(self.classifier)

    def run(self, model: nn.Module, img: Tensor) -> Any:
        return super().run(model, img) if self.function is None else self.function(model, img)

    def agreement(self, records: Records) -> str:
        """Whether the classifier got the pooled features: only then is the CAM the one of its scores."""
        given = None if self._classifier is None else records.input(self._last)
        features = None if self._classifier is None else records[str(self.features)]
        features = features[0] if isinstance(features, (tuple, list)) else features
        if not isinstance(given, Tensor) or not isinstance(features, Tensor):
            return ""
        return _pooling(features.detach().float(), given.detach().float(), str(self.features), self._last, self._prefix)

    def cam(self, img: Tensor, output: Any, records: Records) -> Tensor:
        if callable(self.source):
            cam = self.source(output, records)
        elif self.source is not None:
            cam = self._map(img, records[self.source], self.source, None)
        else:
            assert self._classifier is not None
            weight: Tensor = self._classifier.weight.flatten(1).float()  # type: ignore[operator, union-attr]  # (C, D)
            features = self._map(img, records[str(self.features)], str(self.features), weight.shape[1])
            with full_precision(weight.device):
                cam = torch.einsum("bdhw,cd->bchw", features.float(), weight)
        return cam if self.activation is None else ACTIVATIONS[self.activation](cam)

    def _map(self, img: Tensor, value: Any, name: str, channels: Optional[int]) -> Tensor:
        """A module's output as a map (B, channels, h, w)."""
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            value = value[0]
        if isinstance(value, Tensor) and value.ndim == 4:
            last = channels is not None and value.shape[1] != channels and value.shape[3] == channels
            value = value.permute(0, 3, 1, 2) if last else value
        elif isinstance(value, Tensor) and value.ndim == 3:
            count = value.shape[1]
            value = tokens_to_map(value, img, self._patch, name, self._own_patch)
            self._prefix = count - value.shape[2] * value.shape[3]
        else:
            raise HostError(f"Expected {name!r} to give a map (B, D, h, w) or tokens (B, N, D); got {describe(value)}.")
        if channels is not None and value.shape[1] != channels:
            raise HostError(
                f"The classifier {self.classifier!r} takes {channels} features, but {name!r} gives {value.shape[1]}. Name the "
                "last module before pooling."
            )
        return value


def tokens_to_map(
    tokens: Tensor,
    img: Tensor,
    patch: Optional[Tuple[int, int]],
    name: str,
    own_patch: Optional[Tuple[int, int]] = None,
) -> Tensor:
    """Tokens (B, prefix + h w, D) of a vision transformer as a map (B, D, h, w); class and register tokens come first.

    Args:
        tokens: output of a module.
        img: (B, 3, H, W).
        patch: size of a patch in pixels.
        name: of the module, for messages.
        own_patch: size of the patches that the model makes, if known. Another `patch` is right only where the model has merged
            its patches; then there are no tokens besides those of the map.

    Raises:
        HostError: if the number of tokens does not fit.
    """
    if patch is None:
        raise HostError(f"{name!r} gives tokens {tuple(tokens.shape)}; say how large a patch is: patch_size=16.")
    height, width = img.shape[2] // patch[0], img.shape[3] // patch[1]
    prefix = tokens.shape[1] - height * width
    if prefix < 0:
        raise HostError(
            f"{name!r} gives {tokens.shape[1]} tokens, fewer than the {height} x {width} patches of size {patch} in an image "
            f"of {img.shape[2]} x {img.shape[3]}. Say patch_size=..."
        )
    if prefix > height * width or (prefix and own_patch not in (None, patch)):
        own = "" if own_patch is None else f" The model's own patches are {own_patch}."
        raise HostError(
            f"{name!r} gives {tokens.shape[1]} tokens, but an image of {img.shape[2]} x {img.shape[3]} has {height} x {width} "
            f"patches of size {patch}: {prefix} tokens are left over.{own} Say patch_size=..."
        )
    return tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, height, width)


def _patch_size(model: nn.Module, near: str) -> Optional[Tuple[int, int]]:
    """Patch size of the model's `patch_embed`; of several that which shares most of its path with the module `near`."""
    found = {}
    for name, module in model.named_modules():
        size = getattr(module, "patch_size", None) if name.rpartition(".")[2] == "patch_embed" else None
        if isinstance(size, (int, tuple, list)):
            found[name] = _pair(size)
    if not found:
        return None
    return found[max(found, key=lambda name: (len(os.path.commonprefix([name.split("."), near.split(".")])), -name.count(".")))]


def _pair(size: Any) -> Tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _pooling(features: Tensor, given: Tensor, name: str, classifier: str, prefix: int) -> str:
    """How `given`, what the classifier got, came from the features; dropout between them is looked through.

    Args:
        features: (B, D, h, w), (B, h, w, D) or tokens (B, N, D), of which the first `prefix` are not of patches.
        given: (B, D) or (B, D, 1, 1).
        name: of the module that gave the features.
        classifier: name of the classifier.
        prefix: number of class and register tokens.
    """
    if given.shape == features.shape and torch.equal(given, features):
        return f"that of {classifier!r}, its output without the bias"
    vector = given.flatten(1)
    places = features.flatten(2) if features.ndim == 4 else features.transpose(1, 2)  # (B, D, places), or channels last
    if features.ndim == 4 and features.shape[1] != vector.shape[1] == features.shape[3]:
        places = features.flatten(1, 2).transpose(1, 2)
    if places.shape[:2] != vector.shape:
        return ""
    pools = {
        "the mean over places": places[:, :, prefix:].mean(2),
        "the maximum over places": places[:, :, prefix:].amax(2),
        "the first token": places[:, :, 0],
        "the mean over all tokens": places.mean(2),
    }
    for pool, expected in pools.items():
        if _same(vector, expected):
            return f"that of {classifier!r}, which classifies {pool} of {name!r}"
    return (
        f"not that of {classifier!r}, which gets something else than pooled outputs of {name!r} (a norm between them?). Name "
        "the last module before pooling; where a norm follows the pooling, the CAM leaves it out"
    )


def _same(given: Tensor, expected: Tensor) -> bool:
    """Whether the values are equal, up to what dropout does: some are 0, the others scaled by one factor."""
    kept = given != 0
    if not bool(kept.any()):
        return not bool(expected.any())
    factor = (given[kept] * expected[kept]).sum() / expected[kept].square().sum().clamp_min(1e-12)
    dropped = bool((~kept & (expected != 0)).any())
    if not bool(factor.isfinite()):
        return False
    close = torch.allclose(given[kept], factor * expected[kept], rtol=1e-3, atol=1e-4 * float(given.abs().max()))
    return close and (dropped or abs(float(factor) - 1) < 1e-3)
