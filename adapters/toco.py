"""Single-stage vision transformers: ToCo (CVPR 2023), SeCo (CVPR 2024), MoRe (AAAI 2025).

Facts of the hosts: `encoder` is a ViT whose `norm` gives class tokens, then patch tokens; `classifier` is a 1x1 convolution
without bias over the maximum of the patches, so that its class map is their CAM (`cam_only=True` returns the same, detached).
An auxiliary classifier looks at an earlier block. Global and local crops run through the same modules after the image.
"""

from __future__ import annotations

from typing import Optional

from .generic import Generic

__all__ = ["ToCo"]


class ToCo(Generic):
    """The CAM of ToCo, SeCo and MoRe.

    Args:
        patch_size: of the encoder; by default that of its `patch_embed`.
    """

    name = "ToCo, SeCo or MoRe"
    phases = ("the terms of contrast and segmentation join later in the schedule; the label loss and the CAM stay as they are",)

    def __init__(self, patch_size: Optional[int] = None):
        super().__init__(features="encoder.norm", classifier="classifier", patch_size=patch_size, image_stats="imagenet")
