"""TransCAM (2022): a Conformer whose convolutional class map is spread by the transformer's patch attention.

Facts of the host: it is called as `model("transcam", img)` and returns (conv logits, transformer logits, cams) with cams
(B, C + 1, h, w): channel 0 is background, attached, not rectified. Its inference rectifies after summing over scales.
"""

from __future__ import annotations

from typing import Any, Dict

from torch import Tensor, nn

from ..errors import HostError
from .sources import CamSource, Records

__all__ = ["TransCAM"]


class TransCAM(CamSource):
    """The CAM of TransCAM.

    Args:
        cam: `"fused"`: the class map after attention, rectified; `"raw"`: the same as the host returns it; `"patch"`: the
            class map before attention, rectified.
    """

    name = "TransCAM"
    background_channel = True
    image_stats = "imagenet"

    def __init__(self, cam: str = "fused"):
        if cam not in ("fused", "raw", "patch"):
            raise ValueError(f"`cam` must be 'fused', 'raw' or 'patch'; got {cam!r}.")
        self.kind = cam

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        found = self.find(model, {"conv_cls_head": nn.Module, "trans_cls_head": nn.Module}, self.name)
        return {"conv_cls_head": found["conv_cls_head"]} if self.kind == "patch" else {}

    def cam(self, img: Tensor, output: Any, records: Records) -> Tensor:
        if self.kind == "patch":
            return records["conv_cls_head"].float().relu()
        if not (isinstance(output, tuple) and len(output) == 3 and isinstance(output[2], Tensor) and output[2].ndim == 4):
            raise HostError(
                f"Expected TransCAM to return (logits, logits, cams (B, C + 1, h, w)); got {type(output).__name__}."
            )
        return output[2].float() if self.kind == "raw" else output[2].float().relu()

    def run(self, model: nn.Module, img: Tensor) -> Any:
        return model("transcam", img)
