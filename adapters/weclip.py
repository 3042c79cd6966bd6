"""WeCLIP (CVPR 2024): a frozen CLIP whose decoder is trained by cross-entropy on pseudo labels.

Facts of the host: `decoder` gives (logits (B, C + 1, h, w) with background first, attention); there is no loss over classes,
and the second of its two cross-entropies has a target of background alone, so that labels cannot be read off a target. The
loader's batch is (names, images, labels, boxes).
"""

from __future__ import annotations

from typing import Any, Dict

from torch import Tensor, nn

from .generic import Generic

__all__ = ["WeCLIP"]


class WeCLIP(Generic):
    """The softmax of the decoder's logits; labels from the loader, the loss added at `backward()`."""

    name = "WeCLIP"
    labels = "loader"
    phases = (
        "from iteration 15000 on, the pseudo labels use the decoder's affinity; no option of the script brings it forward",
    )

    def __init__(self) -> None:
        super().__init__(cam="decoder", background_channel=True, activation="softmax", image_stats="imagenet")

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        self.find(model, {"encoder": nn.Module, "decoder_fts_fuse": nn.Module}, self.name)
        return super().modules(model)

    def run(self, model: nn.Module, img: Tensor) -> Any:
        return model(img, [])  # image names are for pseudo labels alone
