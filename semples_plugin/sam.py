"""Masks without a class from Segment Anything, through `transformers`: a grid of points asks for the masks of an image.

Kirillov et al., "Segment Anything" (ICCV 2023): three masks per point, of which those with a high predicted IoU and a high
stability stay, without duplicates. Flow: image -> **sam** -> `mask_proposals`.
"""

from __future__ import annotations

from typing import Any, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_number, check_share
from ._torch import missing_weights
from .errors import MissingLibraryError, SamError

__all__ = ["BOX_IOU", "MIN_IOU", "MIN_STABILITY", "POINTS_AT_ONCE", "POINTS_PER_SIDE", "SamProposals"]

POINTS_PER_SIDE = 32  # of the grid
POINTS_AT_ONCE = 64
MIN_IOU, MIN_STABILITY = 0.88, 0.95  # the published values; so is the next
BOX_IOU = 0.7  # of two masks whose boxes overlap more than this, the one with the lower predicted IoU is left out
_OFFSET = 1.0  # of the logits, for the stability
_MASKS_AT_ONCE = 16  # that are enlarged to the size of the image


class SamProposals:
    """Masks of everything in an image, by a Segment Anything model of `transformers`."""

    def __init__(
        self,
        model: str,
        device: Any = "cpu",
        *,
        points_per_side: int = POINTS_PER_SIDE,
        min_iou: float = MIN_IOU,
        min_stability: float = MIN_STABILITY,
    ):
        """Load the model.

        Args:
            model: a name on the Hugging Face hub, such as `"facebook/sam-vit-base"`, or a folder that `save_pretrained` wrote.
            device: where it runs.
            points_per_side: side of the grid of points.
            min_iou: masks need a predicted IoU of more than this.
            min_stability: and a stability of more than this: IoU of the masks cut at logits of 1 and of -1.

        Raises:
            MissingLibraryError: if `transformers` is not installed.
            SamError: if there is no such model, it is of another kind, or its weights are not complete.
        """
        check_number("points_per_side", points_per_side, 1, whole=True)
        check_share("min_iou", min_iou)
        check_share("min_stability", min_stability)
        self.points_per_side, self.min_iou, self.min_stability = points_per_side, min_iou, min_stability
        self.name = str(model)
        self.model, self.processor = _load(self.name)
        self.model = self.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, img: Tensor) -> Tensor:
        """Masks (M, H, W) bool on the CPU, the ones with the highest predicted IoU first.

        Args:
            img: (3, H, W) in [0, 1].
        """
        from PIL import Image

        height, width = img.shape[1:]
        picture = Image.fromarray((img.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
        inputs = self.processor(picture, return_tensors="pt")
        seen = inputs["reshaped_input_sizes"][0].tolist()  # height and width of the image inside the model's square
        embedding = self.model.get_image_embeddings(inputs["pixel_values"].to(self.model.device))
        found, scores = [torch.zeros(0, height, width, dtype=torch.bool)], [torch.zeros(0)]
        for points in self._grid(seen).split(POINTS_AT_ONCE):
            result = self.model(
                image_embeddings=embedding, input_points=points[None, :, None].to(embedding), multimask_output=True
            )
            iou = result.iou_scores.flatten().float().cpu()  # (3 n,)
            logits = result.pred_masks.flatten(0, 2)[(iou > self.min_iou).to(embedding.device)]  # (m, h, w)
            for part, score in zip(logits.split(_MASKS_AT_ONCE), iou[iou > self.min_iou].split(_MASKS_AT_ONCE)):
                masks, stable = self._cut(part.float(), seen, (height, width))
                found.append(masks[stable].cpu())
                scores.append(score[stable.cpu()])
        masks, iou = torch.cat(found), torch.cat(scores)
        return masks[_without_duplicates(_boxes(masks), iou)]

    def _grid(self, seen: List[int]) -> Tensor:
        """Points (n, 2), x and y in pixels of the model's input."""
        steps = (torch.arange(self.points_per_side) + 0.5) / self.points_per_side
        y, x = torch.meshgrid(steps * seen[0], steps * seen[1], indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=1)

    def _cut(self, logits: Tensor, seen: List[int], size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
        """Masks (m, H, W) of low logits (m, h, w), and which of them are stable and not empty."""
        full = int(self.model.config.vision_config.image_size)
        if not len(logits):
            return torch.zeros(0, *size, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)
        large = F.interpolate(logits[:, None], size=(full, full), mode="bilinear", align_corners=False)
        large = large[:, :, : seen[0], : seen[1]]  # without the padding
        large = F.interpolate(large, size=size, mode="bilinear", align_corners=False)[:, 0]
        inner, outer = (large > _OFFSET).flatten(1).sum(1), (large > -_OFFSET).flatten(1).sum(1)
        masks = large > 0
        return masks, (inner / outer.clamp(min=1) > self.min_stability) & masks.flatten(1).any(1)


def _load(name: str) -> Tuple[Any, Any]:
    try:
        from transformers import AutoConfig, SamModel, SamProcessor
    except ImportError as error:
        raise MissingLibraryError(
            f"Segment Anything needs transformers: pip install 'semples-plugin[sam]' ({error}).", name="transformers"
        ) from error
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "sam":
            raise SamError(f"{name!r} must be a Segment Anything model (type 'sam'); it is of type {kind!r}.")
        loaded: Any = SamModel.from_pretrained(name, output_loading_info=True)
        model, facts = loaded
        missing = missing_weights(facts)
        if missing:
            raise SamError(f"{name!r} lacks {len(missing)} weights of a Segment Anything model, such as {missing[0]}.")
        return model, SamProcessor.from_pretrained(name)
    except SamError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        why = " ".join(str(error).split())[:300]
        raise SamError(
            f"{name!r} cannot be loaded as a Segment Anything model: {why} Give a name on the hub such as "
            "facebook/sam-vit-base, or a folder that save_pretrained wrote."
        ) from error


def _boxes(masks: Tensor) -> Tensor:
    """Boxes (M, 4) of masks (M, H, W) that are not empty: left, top, right, bottom; the last two are outside."""
    rows, columns = masks.any(2).to(torch.uint8), masks.any(1).to(torch.uint8)
    if not len(masks):
        return torch.zeros(0, 4)
    left, top = columns.argmax(1), rows.argmax(1)  # argmax of 0 and 1 is the first 1
    right, bottom = masks.shape[2] - columns.flip(1).argmax(1), masks.shape[1] - rows.flip(1).argmax(1)
    return torch.stack([left, top, right, bottom], dim=1).float()


def _without_duplicates(boxes: Tensor, scores: Tensor) -> Tensor:
    """Indices of boxes in the order of their scores, without those that overlap a better one by more than `BOX_IOU`."""
    order = scores.argsort(descending=True, stable=True)
    boxes, kept = boxes[order], []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    alive = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        kept.append(i)
        low, high = torch.maximum(boxes[i, :2], boxes[:, :2]), torch.minimum(boxes[i, 2:], boxes[:, 2:])
        common = (high - low).clamp(min=0).prod(1)
        alive &= common / (area[i] + area - common) <= BOX_IOU
    return order[torch.tensor(kept, dtype=torch.long)]
