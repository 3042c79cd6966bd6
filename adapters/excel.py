"""ExCEL (CVPR 2025): a frozen CLIP whose decoder is trained by cross-entropy on pseudo labels.

Facts of the host: as WeCLIP, with pseudo labels made outside of the network. The loader's batch is (names, images, labels,
boxes, masks).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .weclip import WeCLIP

__all__ = ["ExCEL"]


class ExCEL(WeCLIP):
    """The softmax of the decoder's logits; labels from the loader, the loss added at `backward()`."""

    name = "ExCEL"
    phases = (
        "from iteration 14000 on, the pseudo labels use the decoder's features; no option of the script brings it forward",
    )

    def run(self, model: nn.Module, img: Tensor) -> Any:
        return model(img)
