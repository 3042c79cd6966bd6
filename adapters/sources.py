"""Where a host's differentiable CAM comes from: `CamSource`, one subclass per host, and the `Records` that it reads.

Flow: a host's modules -> `recorder` -> **Records** -> **CamSource.cam** -> refiner.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

from torch import Tensor, nn

from .._checks import check_stats, warn
from .._hooks import unwrap
from .._text import describe, listing
from ..errors import HostError
from ..refiner import PromptRefiner

__all__ = ["CamSource", "Records", "check_model", "check_source", "foreground_cam"]


class Records:
    """Outputs of the watched modules in one forward pass of the host; `records["head"]` is the first output of `head`.

    A module that ran more than once (on local crops after the image, say) has its outputs in order in `records.all("head")`.
    """

    def __init__(self, watched: Mapping[str, nn.Module]):
        self._outputs: Dict[str, List[Any]] = {name: [] for name in watched}

    def add(self, name: str, output: Any) -> None:
        """Append an output of a watched module."""
        self._outputs[name].append(output)

    def names(self) -> List[str]:
        """Names of the watched modules, in the order of `CamSource.modules`."""
        return list(self._outputs)

    def all(self, name: str) -> List[Any]:
        """All outputs of a watched module, in the order of its calls; empty if it did not run.

        Raises:
            HostError: if the module is not watched.
        """
        if name not in self._outputs:
            raise HostError(f"Module {name!r} is not watched; watched are {listing(self._outputs)}.")
        return self._outputs[name]

    def __getitem__(self, name: str) -> Any:
        outputs = self.all(name)
        if not outputs:
            ran = [other for other, found in self._outputs.items() if found]
            raise HostError(
                f"The CAM needs the output of {name!r}, which did not run in this forward pass; of the watched modules "
                f"{listing(ran)} ran. Hooks see only calls of the module itself, not of its methods or its weight."
            )
        return outputs[0]


class CamSource:
    """Where a host's differentiable CAM comes from. One subclass per host; derive your own for your network.

    Attributes:
        name: of the host, for messages.
        background_channel: whether channel 0 of `cam(...)` is background.
        image_stats: statistics of the host's images as `PromptRefiner` takes them, or None if they are not known.
    """

    name = "host"
    background_channel = False
    image_stats: Any = None

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        """Modules of the (unwrapped) model whose outputs `cam` needs, by name.

        Raises:
            HostError: if `model` is not of the kind this source is for.
        """
        return {}

    def cam(self, img: Tensor, output: Any, records: Records) -> Tensor:
        """Class activation maps (B, C, h, w) of one forward pass, attached to its graph.

        Args:
            img: (B, 3, H, W) the host's input.
            output: what the host's `forward` returned.
            records: what the modules of `modules` returned.
        """
        raise NotImplementedError

    def image(self, inputs: Tuple[Any, ...], keywords: Mapping[str, Any]) -> Optional[Tensor]:
        """The image batch among the arguments of the host's `forward`; by default the first one that looks like it."""
        for value in (*inputs, *keywords.values()):
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3 and value.is_floating_point():
                return value
        return None

    def run(self, model: nn.Module, img: Tensor) -> Any:
        """Call the host with nothing but images, for `probe` and `cam_of`."""
        return model(img)

    @staticmethod
    def find(model: nn.Module, names: Mapping[str, Type[nn.Module]], host: str) -> Dict[str, nn.Module]:
        """Sub-modules by name, of the given types.

        Raises:
            HostError: if one is missing or of another type; the message says what the model has instead.
        """
        found = {}
        for name, kind in names.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                module = None
            if not isinstance(module, kind):
                what = "is missing" if module is None else f"is a {type(module).__name__}"
                raise HostError(
                    f"This is no {host} model: expected the module {name!r} ({kind.__name__}), which {what} in "
                    f"{type(model).__name__}. Its modules are {listing([n for n, _ in model.named_children()])}. "
                    'For another network use attach("generic", ...).'
                )
            found[name] = module
        return found


def foreground_cam(source: CamSource, img: Tensor, output: Any, records: Records) -> Tensor:
    """The CAM (B, C, h, w) of one forward pass, without background channel: what all adapters hand to the refiner."""
    cam = source.cam(img, output, records)
    if not isinstance(cam, Tensor):
        raise HostError(f"The CAM of {source.name} must be a tensor (B, C, h, w); got {describe(cam)}.")
    return cam[:, 1:] if source.background_channel else cam


def check_model(source: CamSource, model: Any) -> None:
    """Raise if `model` is no network, or not of the kind that `source` is for."""
    if not isinstance(model, nn.Module):
        hint = " Some hosts' model.eval() and model.train() return None; call them before." if model is None else ""
        raise TypeError(f"`model` must be the host's torch.nn.Module; got {type(model).__name__}.{hint}")
    source.modules(unwrap(model))


def check_source(source: CamSource, refiner: PromptRefiner) -> None:
    """Raise if `source` is no CamSource; warn if the refiner expects images with other statistics than the host's."""
    if not isinstance(source, CamSource):
        raise TypeError(f"The host must be a name or a CamSource; got {type(source).__name__}.")
    if source.image_stats is not None and refiner.image_stats != check_stats(source.image_stats):
        warn(
            f"{source.name} normalizes its images with {source.image_stats!r}; the refiner was built for "
            f"image_stats={refiner.image_stats!r}."
        )
