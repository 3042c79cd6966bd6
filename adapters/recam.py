"""ReCAM (CVPR 2022) and the baselines that build on IRN's classifier.

Facts of the host: a ResNet-50 in stages; `classifier` is a 1x1 convolution without bias over the mean of `stage4`. The script
trains two networks in turn, `Net` and then `Net_CAM_Feature`, which starts from the first one's weights; both have a label
loss. The second loss of the latter is that of a class predictor with its own labels per class.
"""

from __future__ import annotations

from .generic import Generic

__all__ = ["ReCAM"]


class ReCAM(Generic):
    """The CAM of ReCAM's networks; attach to each: `network="Net"` and `network="Net_CAM_Feature"`."""

    name = "ReCAM"
    phases = (
        "the script's second training is of Net_CAM_Feature: attach to it as well, --attach 'recam network=Net_CAM_Feature'",
    )

    def __init__(self) -> None:
        super().__init__(features="stage4", classifier="classifier", image_stats="imagenet")
