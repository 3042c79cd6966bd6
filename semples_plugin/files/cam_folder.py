"""A folder of CAM files together with its images: found, grouped by size, and read. A bad file fails its own image only.

Flow: `cams`, `images`, `labels` -> **cam_folder** -> `refine_folder`, `check_folder`, `choose_folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CamFileError
from .cams import CamFile, cam_paths, read_cam_file
from .images import find_image, image_size, read_image

__all__ = ["CamItem", "CamLoader", "LoadedCam", "cam_tensor", "chunks", "evenly", "load", "plan"]

MAX_PIXELS = 1_000_000  # `CamLoader` makes larger images smaller; CLIP sees them smaller still


class CamItem(NamedTuple):
    """An image that has a CAM file: its id, both files, and the image's size."""

    name: str
    cam: Path
    image: Path
    size: Tuple[int, int]  # H, W


def plan(cams: Path, images: Path) -> Tuple[List[CamItem], Dict[str, str]]:
    """All images of a folder of CAM files, and id -> reason for those that cannot be read.

    Raises:
        CamFileError: if a folder is missing, or no CAM file has an image.
    """
    for folder, what in ((cams, "CAM files"), (images, "images")):
        if not folder.is_dir():
            raise CamFileError(f"Expected a folder of {what}; there is no folder {folder}.")
    paths = cam_paths(cams)
    if not paths:
        raise CamFileError(f"{cams} holds no .npy or .npz file.")
    items, failed = [], {}
    for name, cam in paths.items():
        try:
            image = find_image(images, name)
            items.append(CamItem(name, cam, image, image_size(image)))  # reads the header only
        except CamFileError as error:
            failed[name] = str(error)
        except Exception as error:
            failed[name] = f"{images / name}: not a readable image ({type(error).__name__})"
    if not items:
        raise CamFileError(f"None of the {len(paths)} CAM files has an image: {next(iter(failed.values()))}.")
    return items, failed


def chunks(items: Sequence[CamItem], batch_size: int, max_pixels: Optional[int] = None) -> List[List[CamItem]]:
    """The items in groups of one image size and at most `batch_size`; images of more than `max_pixels` are each by itself."""
    groups: Dict[Tuple[int, int], List[CamItem]] = {}
    for item in items:
        groups.setdefault(item.size, []).append(item)
    result = []
    for (height, width), group in sorted(groups.items()):
        step = 1 if max_pixels is not None and height * width > max_pixels else batch_size
        result += [group[i : i + step] for i in range(0, len(group), step)]
    return result


class LoadedCam(NamedTuple):
    """An image, its CAM file and its image-level labels."""

    item: CamItem
    img: Tensor  # (3, h, w) in [0, 1], at the size at which it is refined
    content: CamFile  # of the present classes
    labels: np.ndarray  # (C,)
    picture: Optional[np.ndarray] = None  # (H, W, 3) uint8, the image itself where it is larger than `img`


def load(
    chunk: Sequence[CamItem],
    labels: Optional[Dict[str, np.ndarray]],
    num_classes: int,
    max_pixels: int,
    keep_large: bool = False,
) -> Tuple[List[LoadedCam], Dict[str, str]]:
    """Read the images, CAM files and labels of a chunk.

    Args:
        chunk: images of one size.
        labels: image id -> (C,) multi-hot; by default the classes that each CAM file holds.
        num_classes: C.
        max_pixels: images with more pixels are made smaller.
        keep_large: whether `picture` keeps such an image as it was.

    Returns:
        What could be read, and id -> reason for the others.
    """
    loaded, failed = [], {}
    for item in chunk:
        try:
            content = read_cam_file(item.cam, num_classes)
            row = _row(item.name, content, labels, num_classes)
            content = content._replace(cams={k: content.cams[k] for k in row.nonzero()[0].tolist()})
            picture = read_image(item.image)
            if picture.shape[:2] != item.size:
                raise CamFileError(f"{item.image} changed while it was read")
            kept = picture if keep_large and item.size[0] * item.size[1] > max_pixels else None
            loaded.append(LoadedCam(item, _shrink(picture, max_pixels), content, row, kept))
        except CamFileError as error:
            failed[item.name] = str(error)
        except Exception as error:  # such as OpenCV's own errors; one image must not end the run
            failed[item.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return loaded, failed


def _row(name: str, content: CamFile, labels: Optional[Dict[str, np.ndarray]], num_classes: int) -> np.ndarray:
    if labels is None:
        if content.layout == "array":
            raise CamFileError("its CAM file holds all classes; give labels that say which are present")
        row = np.zeros(num_classes, np.uint8)
        row[list(content.cams)] = 1
        return row
    if name not in labels:
        raise CamFileError("the labels do not name this image")
    missing = [k for k in labels[name].nonzero()[0].tolist() if k not in content.cams]
    if missing:
        raise CamFileError(f"its CAM file lacks class {', '.join(map(str, missing))}, which the labels name")
    return labels[name]


def _shrink(picture: np.ndarray, max_pixels: int) -> Tensor:
    import cv2

    height, width = picture.shape[:2]
    if height * width > max_pixels:
        scale = (max_pixels / (height * width)) ** 0.5
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def cam_tensor(content: CamFile, size: Sequence[int], classes: Sequence[int]) -> Tensor:
    """The CAMs of K classes as (K, h, w), at the size at which the image is refined; 0 for classes that `content` lacks."""
    result = torch.zeros(len(classes), *size)
    for i, k in enumerate(classes):
        if k not in content.cams:
            continue
        one = torch.from_numpy(content.cams[k])[None, None]  # (1, 1, H, W)
        result[i] = F.interpolate(one, size=tuple(size), mode="bilinear", align_corners=False)[0, 0]
    return result


def evenly(items: Sequence[CamItem], limit: Optional[int]) -> List[CamItem]:
    """At most `limit` of the items, spread evenly over them; all without a limit."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


class CamLoader:
    """Batches (img, labels) of images of one size, and `cam_of`, the CAM of the batch that was yielded last.

    For functions that take a loader and a function img -> cam, on a folder of CAM files.

    Args:
        items: what to read.
        labels: image id -> (C,) multi-hot; by default the classes that each CAM file holds.
        num_classes: C.
        batch_size: images at once.
        device: of the CAMs.

    Attributes:
        items: the images that were read so far.
        failed: id -> reason, for images that could not be read.
    """

    def __init__(
        self,
        items: Sequence[CamItem],
        labels: Optional[Dict[str, np.ndarray]],
        num_classes: int,
        batch_size: int,
        device: torch.device,
    ):
        self.chunks = chunks(items, batch_size)
        self.labels, self.num_classes, self.device = labels, num_classes, device
        self.items: List[CamItem] = []
        self.failed: Dict[str, str] = {}
        self._cam: Optional[Tensor] = None

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Tuple[Tensor, Tensor]]:
        for chunk in self.chunks:
            loaded, broken = load(chunk, self.labels, self.num_classes, MAX_PIXELS)
            self.failed.update(broken)
            if not loaded:
                continue
            self.items += [one.item for one in loaded]
            img = torch.stack([one.img for one in loaded])  # (B, 3, h, w)
            classes = range(self.num_classes)
            cam = torch.stack([cam_tensor(one.content, img.shape[2:], classes) for one in loaded])  # (B, C, h, w)
            self._cam = cam.to(self.device)
            yield img, torch.from_numpy(np.stack([one.labels for one in loaded]))
        if not self.items:
            reason = next(iter(self.failed.values()))
            raise CamFileError(f"None of the {len(self.failed)} images can be read: {reason}.")

    def cam_of(self, img: Tensor) -> Tensor:
        assert self._cam is not None and len(self._cam) == len(img)
        return self._cam
