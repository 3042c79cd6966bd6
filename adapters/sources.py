"""Where a host's differentiable CAM comes from: `CamSource`, one subclass per host."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Tuple, Type

from torch import Tensor, nn

from .._text import listing
from ..errors import HostError

__all__ = ["CamSource", "Records"]


class Records:
    """Outputs of the watched modules in one forward pass of the host; `records["head"]` is the first one of `head`.

    A module that ran more than once (local crops after the image, say) has them in order in `records.all("head")`.
    """

    def __init__(self, watched: Mapping[str, nn.Module]):
        self._outputs: Dict[str, List[Any]] = {name: [] for name in watched}

    def add(self, name: str, output: Any) -> None:
        self._outputs[name].append(output)

    def names(self) -> List[str]:
        """The watched modules, in the order of `CamSource.modules`."""
        return list(self._outputs)

    def all(self, name: str) -> List[Any]:
        if name not in self._outputs:
            raise HostError(f"Module {name!r} is not watched; watched are {listing(self._outputs)}.")
        return self._outputs[name]

    def __getitem__(self, name: str) -> Any:
        outputs = self.all(name)
        if not outputs:
            ran = [other for other, seen in self._outputs.items() if seen]
            raise HostError(
                f"The CAM needs the output of {name!r}, which did not run in this forward pass; of the watched modules "
                f"{listing(ran)} ran. Hooks see only calls of the module itself, not of its methods or its weight."
            )
        return outputs[0]


class CamSource:
    """Where a host's differentiable CAM comes from. One subclass per host; derive your own for a host of your own.

    Attributes:
        name: of the host, for messages.
        background_channel: whether channel 0 of `cam(...)` is background.
        image_stats: statistics of the host's images as `PromptRefiner` takes them, or None if they are not known.
    """

    name = "host"
    background_channel = False
    image_stats: Any = None

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        """Modules of the (unwrapped) model whose outputs `cam` needs.

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
        """One call of the host with nothing but images, for `probe` and `cam_of`."""
        return model(img)

    @staticmethod
    def find(model: nn.Module, names: Mapping[str, Type[nn.Module]], host: str) -> Dict[str, nn.Module]:
        """Sub-modules by name, of the given types, or an `HostError` that says what the model has instead."""
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
