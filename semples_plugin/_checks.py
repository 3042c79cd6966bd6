"""Validation of what users hand in: every message says what was expected, what came, and what to do.

Nothing here changes a value, apart from dropping a background channel that the caller announced. One pass over the batch
and one transfer from the device per step.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

Stats = Optional[Tuple[Tuple[float, ...], Tuple[float, ...]]]
IMAGENET: Tuple[Tuple[float, ...], Tuple[float, ...]] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def check_classes(classes: Union[Sequence[str], Mapping[str, str]]) -> Tuple[List[str], List[str]]:
    """Class names and the names to prompt CLIP with."""
    if isinstance(classes, str):
        raise TypeError(f"`classes` must be a list of names or a mapping name -> prompt name; got the string {classes!r}.")
    if isinstance(classes, (set, frozenset)):
        raise TypeError("`classes` must have an order, that of the CAM's channels; got a set. Use a list.")
    names = list(classes)
    prompt_names = list(classes.values()) if isinstance(classes, Mapping) else names
    if not names:
        raise ValueError("`classes` must hold at least one name; got none.")
    for name in (*names, *prompt_names):
        if not isinstance(name, str):
            raise TypeError(f"Every class name must be a string; got {name!r} of type {type(name).__name__}.")
        if not name.strip():
            raise ValueError(f"Every class name must have letters CLIP can read; got {name!r}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Class names must differ; got {', '.join(map(repr, twice))} more than once.")
    return names, prompt_names


def check_number(name: str, value: Any, minimum: float, whole: bool = False, advice: str = "") -> None:
    """`value` must be a finite number of at least `minimum` (a whole number with `whole`)."""
    if not isinstance(value, numbers.Integral if whole else numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a {'whole ' if whole else ''}number; got {value!r} of type {type(value).__name__}.")
    if not minimum <= float(value) < float("inf"):
        raise ValueError(f"`{name}` must be at least {minimum:g}{advice or ('' if whole else ' and finite')}; got {value!r}.")


def check_multi_hot(labels: Tensor) -> None:
    """`labels` must hold 0 and 1 alone."""
    if bool(((labels != 0) & (labels != 1)).any()):
        raise ValueError(f"`labels` must hold only 0 and 1; got values such as {_example(labels)}. {_NOT_BINARY}")


def check_stats(image_stats: Any) -> Stats:
    """`(mean, std)` of three values each, or None for images in [0, 1]."""
    if image_stats is None:
        return None
    if image_stats == "imagenet":
        return IMAGENET
    try:
        mean, std = (tuple(float(x) for x in part) for part in image_stats)
        if len(mean) == len(std) == 3 and min(std) > 0:
            return mean, std
    except (TypeError, ValueError):
        pass  # told below
    raise ValueError(
        "`image_stats` must be 'imagenet', None (images in [0, 1]), or (mean, std) of three values each, std > 0; "
        f"got {image_stats!r}."
    )


def check_batch(
    img: Any, cam: Any, labels: Any, num_classes: int, background_channel: bool, stats: Stats, normalised: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """Check one batch; returns img, cam (B, C, h, w) without background channel, and boolean labels (B, C).

    Args:
        img: (B, 3, H, W) with the host's image statistics `stats`.
        cam: (B, C, h, w), or (B, C + 1, h, w) with `background_channel`.
        labels: (B, C) of 0 and 1.
        num_classes: C.
        background_channel: whether channel 0 of `cam` is background.
        stats: (mean, std), or None for images in [0, 1].
        normalised: whether `cam` claims to be in [0, 1] already.
    """
    for name, value in (("img", img), ("cam", cam), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor; got {type(value).__name__}. Use torch.as_tensor(...).")
    for name, value in (("img", img), ("cam", cam)):
        if not value.is_floating_point():
            raise TypeError(f"`{name}` must be of a float dtype; got {value.dtype}. {_NOT_FLOAT[name]}")
    if img.ndim != 4 or img.shape[1] != 3:
        raise ValueError(f"`img` must have shape (B, 3, H, W); got {tuple(img.shape)}.")
    if img.shape[0] == 0:
        raise ValueError("`img` must hold at least one image; got an empty batch. Skip empty batches in your loader.")
    batch = img.shape[0]
    cam = _check_cam_shape(cam, batch, num_classes, background_channel)
    _check_label_shape(labels, batch, num_classes)
    devices = {"img": img.device, "cam": cam.device, "labels": labels.device}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"`{name}` on {device}" for name, device in devices.items())
        raise ValueError(f"`img`, `cam` and `labels` must be on one device; got {found}. Move them with .to(cam.device).")
    _check_values(img, cam, labels, stats, normalised)
    return img, cam, labels.bool()


_NOT_BINARY = "Ignore labels and soft labels have to be turned into 0 or 1 first."
_NOT_FLOAT = {
    "img": "Convert with img.float() / 255 and normalise as your host does.",
    "cam": "A CAM of whole numbers carries no gradient; pass the activations, not a label map.",
}


def _check_cam_shape(cam: Tensor, batch: int, num_classes: int, background_channel: bool) -> Tensor:
    channels = num_classes + int(background_channel)
    if cam.ndim == 4 and tuple(cam.shape[:2]) == (batch, channels) and min(cam.shape[2:]) > 0:
        return cam[:, 1:] if background_channel else cam
    advice = ""
    if cam.ndim == 4 and cam.shape[1] == channels + 1 and not background_channel:
        advice = " If channel 0 is background, pass cam[:, 1:] or build PromptRefiner(..., background_channel=True)."
    elif cam.ndim == 4 and cam.shape[1] == num_classes and background_channel:
        advice = " If it has no background channel, build PromptRefiner(..., background_channel=False)."
    elif cam.ndim == 3:
        advice = " Token or patch CAMs (B, N, C) become maps with cam.transpose(1, 2).reshape(B, C, h, w)."
    label = "C + 1" if background_channel else "C"
    raise ValueError(
        f"`cam` must have shape (B, {label}, h, w) with B = {batch} and C = {num_classes} classes; "
        f"got {tuple(cam.shape)}.{advice}"
    )


def _check_label_shape(labels: Tensor, batch: int, num_classes: int) -> None:
    if tuple(labels.shape) == (batch, num_classes):
        return
    advice = ""
    if labels.ndim == 1 and not labels.is_floating_point():
        advice = f" These look like class indices; use torch.nn.functional.one_hot(labels, {num_classes})."
    elif labels.numel() == batch * (num_classes + 1):
        advice = " If column 0 is background, pass labels.reshape(len(labels), -1)[:, 1:]."
    elif labels.numel() == batch * num_classes:
        advice = f" Pass labels.reshape({batch}, {num_classes})."
    raise ValueError(
        f"`labels` must be multi-hot of shape (B, C) = ({batch}, {num_classes}); got {tuple(labels.shape)}.{advice}"
    )


@torch.no_grad()
def _check_values(img: Tensor, cam: Tensor, labels: Tensor, stats: Stats, normalised: bool) -> None:
    plain = img.detach().float()
    if stats is not None:
        mean, std = (torch.tensor(s, device=img.device).view(3, 1, 1) for s in stats)
        plain = plain * std + mean  # back to [0, 1]
    low, high = plain.amin(), plain.amax()  # NaN and inf come through
    outside = ((plain - 0.5).abs() > 0.75).float().mean()  # a few pixels may be: random erasing, colour jitter
    cam_low, cam_high = cam.detach().amin().float(), cam.detach().amax().float()
    foreign = ((labels != 0) & (labels != 1)).any().float()
    inside = ((img >= 0) & (img <= 1)).all().float()  # as only images that were never normalised are
    facts = torch.stack([low, high, outside, inside, cam_low, cam_high, foreign]).tolist()  # one transfer
    img_low, img_high, img_outside, img_inside, cam_min, cam_max, not_binary = facts
    for name, lowest, highest in (("cam", cam_min, cam_max), ("img", img_low, img_high)):
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(
                f"`{name}` must be finite; got NaN or inf. "
                + ("Look for sqrt at 0 or a division in your CAM." if name == "cam" else "Look at your data pipeline.")
            )
    if not_binary:
        raise ValueError(f"`labels` must hold only 0 and 1; got values such as {_example(labels)}. {_NOT_BINARY}")
    if img_outside > 0.1:
        expected = "in [0, 1]" if stats is None else f"normalised with mean {stats[0]} and std {stats[1]}"
        raise ValueError(
            f"`img` must be {expected}; {'its values' if stats is None else 'with that undone, its values'} run from "
            f"{img_low:.2f} to {img_high:.2f} instead of 0 to 1. "
            "Divide 0..255 images by 255, and say how your host normalises: PromptRefiner(..., image_stats=(mean, std)), "
            "'imagenet', or None for none."
        )
    if stats is not None and img_inside:
        warnings.warn(
            f"`img` should be normalised with mean {stats[0]} and std {stats[1]}, but all its values are in [0, 1]. If your "
            "images are not normalised, build PromptRefiner(..., image_stats=None).",
            stacklevel=9,
        )
    if normalised and (cam_min < -1e-3 or cam_max > 1 + 1e-3):
        raise ValueError(
            f"`cam` must be in [0, 1] with normalise=None; got values from {cam_min:.3g} to {cam_max:.3g}. "
            "Use normalise='minmax'."
        )


def _example(labels: Tensor) -> str:
    wrong = labels[(labels != 0) & (labels != 1)]
    return f"{wrong.flatten()[0].item():g}"
