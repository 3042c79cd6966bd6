"""The CAM of any convolutional network or vision transformer, by module names or a function, for hosts without an adapter.

Three ways, from the least to write to the most:

- `cam="head"`: a module whose output is the class map, (B, C, h, w) or tokens (B, N, C);
- `features="layer4", classifier="fc"`: the classical CAM (CVPR 2016), the classifier's weight applied to every place of the
  feature map (B, D, h, w), (B, h, w, D) or tokens (B, N, D);
- `cam=function, modules=[...]`: anything, computed from the model's output and the outputs of these modules.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .._text import describe
from .._torch import full_precision
from ..errors import HostError
from .sources import CamSource, Records

__all__ = ["Generic"]

CamFunction = Callable[[Any, Records], Tensor]


class Generic(CamSource):
    """The CAM of a network that has no adapter of its own.

    Args:
        cam: name of a module whose output is the class map, or a function (output of the model, `Records`) -> (B, C, h, w).
        features: name of a module whose output is the last feature map; needs `classifier`.
        classifier: name of the nn.Linear or 1x1 nn.Conv2d that classifies the pooled features.
        modules: names of modules whose outputs a `cam` function wants: `records["name"]`.
        patch_size: of a vision transformer; by default its `patch_embed.patch_size`. Only for outputs that are tokens.
        background_channel: whether channel 0 of the class map is background.
        relu: rectify the class map.
        image_stats: statistics of the host's images, to be compared with the refiner's.
    """

    def __init__(
        self,
        cam: Union[None, str, CamFunction] = None,
        *,
        features: Optional[str] = None,
        classifier: Optional[str] = None,
        modules: Sequence[str] = (),
        patch_size: Union[None, int, Tuple[int, int]] = None,
        background_channel: bool = False,
        relu: bool = False,
        image_stats: Any = None,
    ):
        if isinstance(modules, str):
            raise TypeError(f"`modules` must be a list of module names; got the string {modules!r}.")
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
        self.background_channel, self.relu, self.image_stats = background_channel, relu, image_stats
        self.name = "the host"
        self._classifier: Optional[nn.Module] = None
        self._patch: Optional[Tuple[int, int]] = None

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        self.name = type(model).__name__
        self._patch = _patch_size(model) if self.patch_size is None else _pair(self.patch_size)
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
        return self.find(model, kinds, self.name)

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
        return cam.relu() if self.relu else cam

    def _map(self, img: Tensor, value: Any, name: str, channels: Optional[int]) -> Tensor:
        """A module's output as a map (B, channels, h, w)."""
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            value = value[0]
        if isinstance(value, Tensor) and value.ndim == 4:
            last = channels is not None and value.shape[1] != channels and value.shape[3] == channels
            value = value.permute(0, 3, 1, 2) if last else value
        elif isinstance(value, Tensor) and value.ndim == 3:
            value = tokens_to_map(value, img, self._patch, name)
        else:
            raise HostError(f"Expected {name!r} to give a map (B, D, h, w) or tokens (B, N, D); got {describe(value)}.")
        if channels is not None and value.shape[1] != channels:
            raise HostError(
                f"The classifier {self.classifier!r} takes {channels} features, but {name!r} gives {value.shape[1]}. Name the "
                "last module before pooling."
            )
        return value


def tokens_to_map(tokens: Tensor, img: Tensor, patch: Optional[Tuple[int, int]], name: str) -> Tensor:
    """Tokens (B, prefix + h w, D) of a vision transformer as a map (B, D, h, w); class and register tokens come first."""
    if patch is None:
        raise HostError(f"{name!r} gives tokens {tuple(tokens.shape)}; say how large a patch is: patch_size=16.")
    height, width = img.shape[2] // patch[0], img.shape[3] // patch[1]
    prefix = tokens.shape[1] - height * width
    if prefix < 0:
        raise HostError(
            f"{name!r} gives {tokens.shape[1]} tokens, fewer than the {height} x {width} patches of size {patch} in an image "
            f"of {img.shape[2]} x {img.shape[3]}. Say patch_size=..."
        )
    return tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, height, width)


def _patch_size(model: nn.Module) -> Optional[Tuple[int, int]]:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return None if size is None else _pair(size)


def _pair(size: Any) -> Tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
