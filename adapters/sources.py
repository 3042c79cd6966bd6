"""Where a host's differentiable CAM comes from: `CamSource`, one subclass per host, and the `Records` that it reads.

Flow: a host's modules -> `recorder` -> **Records** -> **CamSource.cam** -> refiner.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Type, Union

from torch import Tensor, nn

from .._checks import check_stats, warn
from .._hooks import unwrap
from .._text import describe, listing
from ..errors import HostError
from ..refiner import PromptRefiner
from .graph import Nodes, nodes_of

__all__ = ["CamSource", "Records", "check_model", "check_source", "foreground_cams", "nearest"]


class Records:
    """Outputs of the watched modules in one forward pass of the host; `records["head"]` is the first output of `head`.

    A module that ran more than once (on local crops after the image, say) has its outputs in order in `records.all("head")`.

    Attributes:
        nodes: graph nodes of the outputs.
    """

    def __init__(self, watched: Mapping[str, nn.Module]):
        self._outputs: Dict[str, List[Any]] = {name: [] for name in watched}
        self._inputs: Dict[str, Any] = {}
        self.nodes: Nodes = frozenset()

    def add(self, name: str, output: Any, inputs: Any = ()) -> None:
        """Append an output of a watched module, and what the module got."""
        self._outputs[name].append(output)
        self._inputs.setdefault(name, inputs)
        self.nodes |= nodes_of(output)

    def at(self, run: int) -> "Records":
        """The outputs of the modules' n-th calls (from 0) alone, of those that ran as often."""
        part = Records(dict.fromkeys(self._outputs))  # type: ignore[arg-type]
        for name, outputs in self._outputs.items():
            part._outputs[name] = outputs[run : run + 1]
        return part

    def input(self, name: str) -> Any:
        """The first argument of a watched module in its first call, or None if it did not run."""
        inputs = self._inputs.get(name)
        return inputs[0] if isinstance(inputs, tuple) and inputs else None

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
                f"{listing(ran)} ran. Hooks see only calls of the module itself, not of `.forward(...)`, other methods or its "
                "weight."
            )
        return outputs[0]


class CamSource:
    """Where a host's differentiable CAM comes from. One subclass per host; derive your own for your network.

    Attributes:
        name: of the host, for messages.
        background_channel: whether channel 0 of `cam(...)` is background.
        image_stats: statistics of the host's images as `PromptRefiner` takes them, or None if they are not known.
        calls: names of further methods of the network that a loop calls in the place of `model(...)`.
        labels: where the host's labels are, as for `attach`; None for its label loss.
        phases: what the host does differently later in its training, and the option of its script that brings it forward.
    """

    name = "host"
    background_channel = False
    image_stats: Any = None
    calls: Sequence[str] = ()
    labels: Any = None
    phases: Sequence[str] = ()

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        """Modules of the (unwrapped) model whose outputs `cam` needs, by name.

        Raises:
            HostError: if `model` is not of the kind this source is for.
        """
        return {}

    def cam(self, img: Tensor, output: Any, records: Records) -> Union[Tensor, Sequence[Tensor]]:
        """Class activation maps (B, C, h, w) of one forward pass, attached to its graph.

        Args:
            img: (B, 3, H, W) the host's input.
            output: what the host's `forward` returned; None if the host computes its loss inside `forward`.
            records: what the modules of `modules` returned.

        Returns:
            One tensor, or several for a host with several CAMs (two branches, say): each gets a loss, and their sum is added
            once.
        """
        raise NotImplementedError

    def agreement(self, records: Records) -> str:
        """How the CAM relates to the class scores that the host itself computed in this pass, in words; "" if not known."""
        return ""

    def image(self, inputs: Tuple[Any, ...], keywords: Mapping[str, Any]) -> Optional[Tensor]:
        """The image batch among the arguments of the host's `forward`; by default the first one that looks like it."""
        for value in (*inputs, *keywords.values()):
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[1] == 3 and value.is_floating_point():
                return value
        return None

    def run(self, model: nn.Module, img: Tensor) -> Any:
        """Call the host with nothing but images, for `probe` and `cam_of`.

        Raises:
            HostError: if its `forward` needs more.
        """
        try:
            inspect.signature(unwrap(model).forward).bind(img)
        except TypeError as error:
            raise HostError(
                f"{type(unwrap(model)).__name__} cannot be called with an image batch alone: {error}. Say how: "
                "run=lambda model, img: model(img, ...) for a generic host, or `run` of your CamSource."
            ) from error
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
                    f"{type(model).__name__}. {nearest(name, (n for n, _ in model.named_modules() if n))}Its modules are "
                    f"{listing([n for n, _ in model.named_children()])}. "
                    'For another network use attach("generic", ...).'
                )
            found[name] = module
        return found


def foreground_cams(source: CamSource, img: Tensor, output: Any, records: Records) -> List[Tensor]:
    """The CAMs (B, C, h, w) of one forward pass, mostly one, without background channel: what all adapters hand to the refiner.

    Raises:
        HostError: if they are no maps.
    """
    made = source.cam(img, output, records)
    cams: List[Any] = list(made) if isinstance(made, (tuple, list)) else [made]
    for cam in cams:
        if not isinstance(cam, Tensor):
            raise HostError(f"The CAM of {source.name} must be a tensor (B, C, h, w); got {describe(cam)}.")
        if cam.ndim == 4 and cam.shape[2:] == (1, 1):
            raise HostError(
                f"The CAM of {source.name} is {tuple(cam.shape)}: a 1 x 1 map says which classes are there, not where. Name "
                "the module before pooling."
            )
    if not cams:
        raise HostError(f"The CAM of {source.name} must be a tensor (B, C, h, w) or a list of them; got an empty list.")
    return [cam[:, 1:] if source.background_channel else cam for cam in cams]


def nearest(name: str, names: Iterable[str]) -> str:
    """ "Did you mean ...? " with the names most like `name`; empty without any."""
    names = list(names)
    last = name.rpartition(".")[2]
    close = sorted((other for other in names if other.rpartition(".")[2] == last), key=lambda other: other.count("."))[:3]
    close += [other for other in difflib.get_close_matches(name, names, 3, 0.7) if other not in close]
    return f"Did you mean {' or '.join(map(repr, close[:3]))}? " if close else ""


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
