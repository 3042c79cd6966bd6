"""Every option of the method in one place: name, type, default, meaning and check. Flow: **config** -> `refiner`.

To add an option, add one field to `RefinerConfig`; `PromptRefiner(..., name=value)`, `--set name=value`, prompt files and the
API page follow from it.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import numbers
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Literal,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from ._checks import check_number, check_stats

__all__ = ["COCO", "VOC", "RefinerConfig", "config_for", "parse_assignments"]

Rule = Callable[[str, Any], None]  # raises TypeError or ValueError that names the option


def _at_least(minimum: float, whole: bool = False, advice: str = "") -> Rule:
    return lambda name, value: check_number(name, value, minimum, whole=whole, advice=advice)


def _one_slot(name: str, value: Any) -> None:
    if not isinstance(value, str) or value.count("{}") != 1:
        raise ValueError(f"`{name}` must be a text with `{{}}` in it once; got {value!r}.")


def _weight_per_class(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a mapping class name -> weight; got {value!r} of type {type(value).__name__}.")
    for key, weight in value.items():
        check_number(f"{name}[{key!r}]", weight, 0)


Weight = Annotated[float, _at_least(0)]
Count = Annotated[int, _at_least(1, whole=True)]
Epsilon = Annotated[float, _at_least(1e-12)]  # a flat map divides by it
Template = Annotated[str, _one_slot]


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """All options of `PromptRefiner`. The defaults are the recipe for PASCAL VOC (SemPLeS, reference recipe).

    Change some by name, `PromptRefiner(classes, lambda_area=1.0)`, or make a configuration of your own,
    `VOC.replace(lambda_area=1.0)`. Symbols are those of the paper: L_match, L_prompt, L_refine, T.

    Raises:
        TypeError, ValueError: if an option has the wrong type or value; the message names it and what is allowed.

    Example:
        >>> VOC.lambda_b, COCO.lambda_b
        (2.4, 0.75)
        >>> VOC.replace(lambda_aera=1.0)
        Traceback (most recent call last):
        ...
        TypeError: PromptRefiner has no option 'lambda_aera'; did you mean 'lambda_area'?
    """

    # -------------------------------------------------------------------------------------------- loss terms

    match_form: Literal["log", "linear"] = "log"
    """Form of L_match and L_refine: `"log"` as in SemPLeS, -log c and -log(1 - c); or `"linear"`, 1 - cos and max(cos, 0), in
    which no pair outweighs the others. The gradient of -log c is large exactly where CLIP does not recognize a region."""
    lambda_b: Weight = 2.4
    """Weight of the background half of L_match."""
    lambda_refine: Weight = 0.05
    """lambda, weight of L_refine."""
    lambda_area: Weight = 0.0
    """Weight of the area term (CLIMS, CVPR 2022), which keeps masks from growing over the whole image."""
    class_weights: Optional[Annotated[Mapping[str, float], _weight_per_class]] = None
    """Class name -> weight of its pairs in every term, the area term included; 1 for a class that is not named. Each term is
    the weighted mean over pairs. A class of weight 0 gets no loss. `PromptRefiner.check` finds classes to leave out."""
    background_texts: Union[None, Sequence[str], Mapping[str, Sequence[str]]] = None
    """Hand-written background prompts: a list for all classes, or a mapping class name -> list (CLIMS, CVPR 2022)."""
    lambda_background_texts: Weight = 0.0
    """Weight of the term of the hand-written background prompts."""
    background_threshold: Annotated[float, _at_least(-1)] = 0.0
    """Cosine above which a hand-written background prompt counts."""

    # -------------------------------------------------------------------------------------------- CAM and views

    background_channel: bool = False
    """Whether channel 0 of a CAM with C + 1 channels is background. It is left out; a CAM with C channels is taken as it is."""
    normalize: Optional[Literal["minmax"]] = "minmax"
    """Normalization of each map: `"minmax"`, or None for a CAM in [0, 1]."""
    eps: Epsilon = 0.1
    """Of the min-max normalization, (cam - min) / (max - min + eps), in stages (a) and (c)."""
    prompt_eps: Epsilon = 1e-4
    """Of the min-max normalization in stage (b)."""
    image_stats: Any = "imagenet"
    """How `img` is normalized: `"imagenet"`, `(mean, std)`, or None for images in [0, 1]."""
    clip_stats: bool = True
    """Convert images to CLIP's own mean and std. False feeds them as they are, as the reference does."""
    view_sharpness: Weight = 0.0
    """Slope of the cut that makes masks nearly binary before CLIP sees them, at a level drawn evenly from 0.2 to 0.8 for every
    pair and step; 0 multiplies the image by the soft mask (SemPLeS). 20 keeps a half mask from passing as both sides."""
    view_fill: Literal["mean", "blur"] = "mean"
    """What is put where the mask takes something away: `"mean"`, the mean color (SemPLeS), or `"blur"`, the blurred image."""
    view_crop: Optional[Weight] = None
    """Margin of views cropped around the CAM, as a share of the box on each side; None shows CLIP the whole image (SemPLeS).
    For small objects. The box is where the map reaches 0.3 of its largest value, and at least an eighth of each side."""
    max_views: Optional[Annotated[int, _at_least(1, whole=True, advice=", or None for no limit")]] = 256
    """Views that CLIP encodes at once (two per positive pair). More are encoded in checkpointed chunks, which bounds memory and
    costs a second forward pass through CLIP. ViT-B/32 in float32 takes about 40 MiB per view."""
    clip_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of CLIP's weights, as a name or a torch.dtype. Similarities are computed in float32 in any case."""

    # -------------------------------------------------------------------------------------------- prompts

    text_template: Template = "a photo of a {}."
    """Text of a class; `{}` is its name."""
    prompt_template: Template = "a photo of {} ."
    """Layout of a background prompt; `{}` stands for its context vectors."""
    prompt_length: Annotated[int, _at_least(float("-inf"), whole=True)] = 30
    """L, context vectors per prompt; at most 71 with the default layout."""
    prompts_per_class: Count = 1
    """N, background prompts per class. With more than one, each learns from its own group of the class's backgrounds, and
    L_refine is the mean over them (ours, not in the paper)."""
    lambda_t: Weight = 0.02
    """lambda_T, weight of T in L_prompt; tuned for `repel="log"`."""
    repel: Literal["log", "log1m"] = "log"
    """Form of T, which repels a background prompt from its class: log c, or -log(1 - c)."""
    clusters: Optional[Mapping[str, Sequence[str]]] = None
    """Category clusters (PCC), name -> classes: a background prompt is repelled from every class of its class's cluster."""
    epochs: Count = 60
    """Epochs of stage (b) over the cached features."""
    prompt_lr: Weight = 2.5e-2
    """Learning rate of stage (b), AdamW with a cosine schedule."""
    prompt_batch_size: Count = 128
    """Images per optimization step of stage (b)."""
    weight_decay: Weight = 0.03
    """Of AdamW in stage (b)."""
    prompt_restarts: Annotated[int, _at_least(0, whole=True)] = 2
    """How often a prompt that failed is learned again from other initial values; the best attempt is kept. A prompt has failed
    if it is no nearer to its backgrounds than a prompt without context vectors."""
    online_steps: Optional[Count] = None
    """Learn the prompts along the way, in one run instead of three (ours, not in the paper): each training step also takes a
    step on the prompts, with `prompt_lr` and `weight_decay`, and lambda rises from 0 to `lambda_refine` over this many steps.
    None learns them in a stage of their own."""
    seed: Annotated[int, _at_least(0, whole=True)] = 0
    """Of the prompts' initial values and of the order of images in `fit_prompts`."""

    def __post_init__(self) -> None:
        if isinstance(self.clip_dtype, torch.dtype):
            object.__setattr__(self, "clip_dtype", str(self.clip_dtype)[len("torch.") :])
        texts = self.background_texts
        if texts is not None and not isinstance(texts, (str, Mapping)):  # also an iterator, which could be read once only
            object.__setattr__(self, "background_texts", tuple(texts))
        for name, hint in _hints().items():
            _check_option(name, getattr(self, name), hint)
        check_stats(self.image_stats)
        if self.background_texts and not self.lambda_background_texts:
            raise ValueError("`background_texts` needs `lambda_background_texts` > 0, or they would do nothing; got 0.")
        if self.lambda_background_texts and not self.background_texts:
            raise ValueError("`lambda_background_texts` needs `background_texts`, such as ['a photo of railway.']; got none.")
        if self.online_steps and self.prompts_per_class > 1:
            raise ValueError(
                "`online_steps` learns one prompt per class, since groups of backgrounds are not known beforehand; got "
                f"prompts_per_class={self.prompts_per_class}. Use 1, or learn the prompts in a stage of their own: fit_prompts."
            )
        if self.clusters is not None and not isinstance(self.clusters, Mapping):
            raise TypeError(
                "`clusters` must be CategoryClusters or a mapping cluster name -> classes; got "
                f"{type(self.clusters).__name__}. From a file: CategoryClusters.load(path, classes)."
            )

    def replace(self, **overrides: Any) -> "RefinerConfig":
        """The same configuration with some options changed.

        Raises:
            TypeError: if there is no such option; the message names the nearest one.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(known)}."
                raise TypeError(f"PromptRefiner has no option {name!r}; {hint}")
        return dataclasses.replace(self, **overrides)

    def as_dict(self) -> Dict[str, Any]:
        """Name -> value of every option, as JSON can hold them; `VOC.replace(**values)` gives the configuration back."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def config_for(classes: str) -> RefinerConfig:
    """The configuration that goes with `--classes` of the command lines: `COCO` for "coco", else `VOC`."""
    return COCO if classes.lower() == "coco" else VOC


def parse_assignments(flag: str, items: Iterable[str]) -> Dict[str, Any]:
    """Options of a command line such as `lambda_area=1` as a dict; values are Python literals where they can be read as such.

    Args:
        flag: name of the command-line option, for the message.
        items: texts of the form NAME=VALUE.

    Example:
        >>> parse_assignments("--set", ["lambda_area=1", "repel=log1m"])
        {'lambda_area': 1, 'repel': 'log1m'}
    """
    values: Dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"{flag} takes NAME=VALUE; got {item!r}.")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


@lru_cache(maxsize=None)
def _hints() -> Dict[str, Any]:
    return get_type_hints(RefinerConfig, include_extras=True)


def _check_option(name: str, value: Any, hint: Any) -> None:
    """Check a value against the type of its field: the kinds that options have."""
    choices: Tuple[Any, ...] = (hint,)
    if get_origin(hint) is Union:
        choices = get_args(hint)
        if value is None and type(None) in choices:
            return
    for kind in choices:
        if get_origin(kind) is Annotated:
            for rule in get_args(kind)[1:]:
                rule(name, value)
        elif get_origin(kind) is Literal and (not isinstance(value, str) or value not in get_args(kind)):
            allowed = [repr(choice) for choice in get_args(kind)] + (["None"] if len(choices) > 1 else [])
            raise ValueError(f"`{name}` must be {' or '.join(allowed)}; got {value!r}.")
        elif kind is bool and not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False; got {value!r}.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items: List[Any] = [_plain(item) for item in value]
        return items
    if isinstance(value, numbers.Real) and not isinstance(value, bool):  # also NumPy's
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


VOC = RefinerConfig()
COCO = RefinerConfig(lambda_b=0.75, lambda_t=0.01, lambda_refine=0.2, prompt_lr=2.5e-3)
