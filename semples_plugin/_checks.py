"""Validation of what users hand in: every message says what was expected, what came, and what to do.

Two values are changed: a background channel that the caller announced is left out, and smoothed labels become 0 and 1. One
pass over the batch and one transfer from the device per step.
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
import warnings
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

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


def check_known(name: str, given: Iterable[str], classes: Sequence[str]) -> None:
    """All keys of the option `name` must be class names."""
    unknown = sorted({str(key) for key in given} - set(classes))
    if unknown:
        raise ValueError(f"`{name}` must name known classes; got {', '.join(map(repr, unknown))}.")


def check_number(name: str, value: Any, minimum: float, whole: bool = False, advice: str = "") -> None:
    """`value` must be a finite number of at least `minimum` (a whole number with `whole`)."""
    if not isinstance(value, numbers.Integral if whole else numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a {'whole ' if whole else ''}number; got {value!r} of type {type(value).__name__}.")
    if not minimum <= float(value) < float("inf"):
        raise ValueError(f"`{name}` must be at least {minimum:g}{advice or ('' if whole else ' and finite')}; got {value!r}.")


def check_share(name: str, value: Any) -> None:
    """`value` must be a number from 0 to 1."""
    if isinstance(value, numbers.Real) and not 0 <= float(value) <= 1:
        raise ValueError(f"`{name}` must be from 0 to 1; got {value!r}.")
    check_number(name, value, 0)


def hard_labels(labels: Tensor) -> Tensor:
    """Multi-hot `labels` as booleans; this is the one place that decides which values count as a label.

    Label smoothing is undone: values within 0.2 of 0 or 1 count as 0 or 1. Everything else (0.5 of a mixup, 255) is refused,
    since an image that shows half a class has no CAM to be trained.

    Raises:
        ValueError: if a value is neither.
    """
    if bool(_is_soft(labels).any()):
        raise ValueError(_soft_labels(labels))
    return labels > 0.5


def _is_soft(labels: Tensor) -> Tensor:
    if not labels.is_floating_point():
        return (labels != 0) & (labels != 1)
    return ~((labels - (labels > 0.5).to(labels)).abs() <= 0.2)  # also NaN


def _soft_labels(labels: Tensor) -> str:
    wrong = labels[_is_soft(labels)]
    return (
        f"`labels` must be 0 or 1; got values such as {wrong.flatten()[0].item():g}. Smoothed labels within 0.2 of 0 or 1 are "
        "taken; turn mixup and cutmix off, and turn ignore labels into 0 or 1 first."
    )


def warn(message: str) -> None:
    """A `UserWarning` that points to the caller's line: the nearest one outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("semples_plugin", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level + 1)


def img_and_labels(batch: Any, num_classes: int) -> Tuple[Any, Any]:
    """Images and labels of a loader's batch: its first float tensor (B, 3, H, W) and its first tensor (B, num_classes).

    Loaders of other projects put names, paths or further crops beside them; those are passed over.

    Args:
        batch: a tuple, list or mapping.
        num_classes: C.

    Raises:
        TypeError: if the batch is none of these, or holds no such tensors; the message says what it holds.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(values, (tuple, list)) or len(values) < 2:
        raise TypeError(
            f"`loader` must yield (img, labels), or longer tuples or mappings that hold both; got {type(batch).__name__}."
        )
    tensors = [value for value in values if isinstance(value, Tensor)]
    img = next((t for t in tensors if t.ndim == 4 and t.shape[1] == 3 and t.is_floating_point()), None)
    labels = next((t for t in tensors if img is not None and tuple(t.shape) == (len(img), num_classes)), None)
    if img is not None and labels is not None:
        return img, labels
    if isinstance(values[0], Tensor):
        return values[0], values[1]  # the checks of the batch say what is wrong with them
    found = ", ".join(f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in values)
    raise TypeError(
        f"`loader` must yield img (B, 3, H, W) and labels (B, {num_classes}), at any place of a batch; got {found}. Wrap it: "
        "yield (img, labels) from a loader of your own."
    )


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
        pass  # reported below
    raise ValueError(
        "`image_stats` must be 'imagenet', None (images in [0, 1]), or (mean, std) of three values each, std > 0; "
        f"got {image_stats!r}."
    )


def check_batch(
    img: Any, cam: Any, labels: Any, num_classes: int, background_channel: bool, stats: Stats, normalized: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """Check one batch; returns img, cam (B, C, h, w) without background channel, and boolean labels (B, C).

    Args:
        img: (B, 3, H, W) with the host's image statistics `stats`.
        cam: (B, C, h, w), or (B, C + 1, h, w) with `background_channel`.
        labels: (B, C), see `hard_labels`.
        num_classes: C.
        background_channel: whether channel 0 of a `cam` with C + 1 channels is background.
        stats: (mean, std), or None for images in [0, 1].
        normalized: whether `cam` claims to be in [0, 1] already.
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
    _check_values(img, cam, labels, stats, normalized)
    return img, cam, labels > 0.5


_LARGEST = 1e38  # of a CAM: the difference of two values still fits into float32

_NOT_FLOAT = {
    "img": "Convert with img.float() / 255 and normalize as your host does.",
    "cam": "A CAM of whole numbers carries no gradient; pass the activations, not a label map.",
}


def _check_cam_shape(cam: Tensor, batch: int, num_classes: int, background_channel: bool) -> Tensor:
    allowed = (num_classes, num_classes + 1) if background_channel else (num_classes,)
    if cam.ndim == 4 and len(cam) == batch and cam.shape[1] in allowed and min(cam.shape[2:]) > 0:
        return cam[:, cam.shape[1] - num_classes :]
    advice = ""
    if cam.ndim == 4 and cam.shape[1] == num_classes + 1:
        advice = " If channel 0 is background, pass cam[:, 1:] or build PromptRefiner(..., background_channel=True)."
    elif cam.ndim == 3:
        advice = " Token or patch CAMs (B, N, C) become maps with cam.transpose(1, 2).reshape(B, C, h, w)."
    channels = "C or C + 1" if background_channel else "C"
    raise ValueError(
        f"`cam` must have shape (B, {channels}, h, w) with B = {batch} and C = {num_classes} classes; "
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
def _check_values(img: Tensor, cam: Tensor, labels: Tensor, stats: Stats, normalized: bool) -> None:
    plain = img.detach().float()
    if stats is not None:
        mean, std = (torch.tensor(s, device=img.device).view(3, 1, 1) for s in stats)
        plain = plain * std + mean  # back to [0, 1]
    low, high = plain.amin(), plain.amax()  # NaN and inf come through
    outside = ((plain - 0.5).abs() > 0.75).float().mean()  # a few pixels may be: random erasing, color jitter
    cam_low, cam_high = cam.detach().amin().float(), cam.detach().amax().float()
    soft = _is_soft(labels).any().float()
    inside = ((img >= 0) & (img <= 1)).all().float()  # as only images that were never normalized are
    finite = cam.detach().isfinite().all().float()  # in its own dtype
    facts = torch.stack([low, high, outside, inside, cam_low, cam_high, finite, soft]).tolist()  # one transfer
    img_low, img_high, img_outside, img_inside, cam_min, cam_max, cam_finite, any_soft = facts
    if cam_finite and max(-cam_min, cam_max) > _LARGEST:
        raise ValueError(
            f"`cam` must be at most {_LARGEST:g} in size, or float32 overflows; got values from {float(cam.amin()):.3g} to "
            f"{float(cam.amax()):.3g}. Divide it by its largest absolute value."
        )
    for name, lowest, highest in (("cam", cam_min, cam_max), ("img", img_low, img_high)):
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise ValueError(
                f"`{name}` must be finite; got NaN or inf. "
                + ("Look for sqrt at 0 or a division in your CAM." if name == "cam" else "Look at your data pipeline.")
            )
    if any_soft:
        raise ValueError(_soft_labels(labels))
    if img_outside > 0.1:
        expected = "in [0, 1]" if stats is None else f"normalized with mean {stats[0]} and std {stats[1]}"
        raise ValueError(
            f"`img` must be {expected}; {'its values' if stats is None else 'with that undone, its values'} run from "
            f"{img_low:.2f} to {img_high:.2f} instead of 0 to 1. "
            "Divide 0..255 images by 255, and say how your host normalizes: PromptRefiner(..., image_stats=(mean, std)), "
            "'imagenet', or None for none."
        )
    if stats is not None and img_inside:
        warn(
            f"`img` should be normalized with mean {stats[0]} and std {stats[1]}, but all its values are in [0, 1]. If your "
            "images are not normalized, build PromptRefiner(..., image_stats=None)."
        )
    if normalized and (cam_min < -1e-3 or cam_max > 1 + 1e-3):
        raise ValueError(
            f"`cam` must be in [0, 1] with normalize=None; got values from {cam_min:.3g} to {cam_max:.3g}. "
            "Use normalize='minmax'."
        )


def partition_faults(clusters: Any, classes: Sequence[str], max_clusters: Optional[int] = None) -> List[str]:
    """What keeps `clusters` from being a partition of `classes`, one sentence each; none if all is well.

    Args:
        clusters: anything; expected is a mapping cluster name -> list of class names.
        classes: the class names.
        max_clusters: the most clusters allowed.
    """
    if not isinstance(clusters, Mapping):
        return [f"Expected a mapping cluster name -> list of classes; got {type(clusters).__name__}."]
    faults: List[str] = []
    where: Dict[str, List[str]] = {}
    for name, members in clusters.items():
        if not isinstance(name, str) or not name.strip():
            faults.append(f"Every cluster needs a name; got {name!r}.")
        if isinstance(members, str) or not isinstance(members, Sequence):
            faults.append(f"Cluster {name!r} must be a list of class names; got {members!r:.80}.")
            continue
        if not members:
            faults.append(f"Cluster {name!r} is empty.")
        for member in members:
            if not isinstance(member, str):
                kind = type(member).__name__
                faults.append(f"Cluster {name!r} must hold class names; got {member!r:.80} of type {kind}.")
            else:
                where.setdefault(member, []).append(str(name))
    known = set(classes)
    for member, owners in where.items():
        if member not in known:
            near = difflib.get_close_matches(member[:80], list(known), 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            faults.append(f"{member!r:.80} in cluster {owners[0]!r} is not one of the classes{hint}.")
        elif len(owners) > 1:
            faults.append(f"{member!r} is there {len(owners)} times, in {', '.join(map(repr, dict.fromkeys(owners)))}.")
    missing = [name for name in classes if name not in where]
    if missing:
        faults.append(f"In no cluster: {', '.join(map(repr, missing))}.")
    if max_clusters is not None and len(clusters) > max_clusters:
        faults.append(f"{len(clusters)} clusters are too many; at most {max_clusters} are allowed.")
    return faults
