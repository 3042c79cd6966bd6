"""DuPL (CVPR 2024): two students of one kind, `branch1` and `branch2`, that teach each other.

Facts of the host: each branch is a network as ToCo's. From iteration `--gmm_iters` (8000) on, forward runs on the images and
their augmented copies, `cat[img, aug]`, while the labels stay those of the images; inside, each branch then runs on the whole
batch, on the images, and on the copies in turn. The label losses are those of the second run.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional

from torch import Tensor, nn

from .generic import Generic
from .sources import CamSource, Records

__all__ = ["DuPL"]

BRANCHES = ("branch1", "branch2")


class DuPL(CamSource):
    """The CAMs of both branches of DuPL.

    Args:
        patch_size: of the encoders; by default that of their `patch_embed`.
    """

    name = "DuPL"
    image_stats = "imagenet"
    phases = ("from --gmm_iters (8000) on, forward runs on the images and their augmented copies: try --gmm_iters 2",)

    def __init__(self, patch_size: Optional[int] = None):
        self._branches = {
            name: Generic(features=f"{name}.encoder.norm", classifier=f"{name}.classifier", patch_size=patch_size)
            for name in BRANCHES
        }

    def modules(self, model: nn.Module) -> Dict[str, nn.Module]:
        return {key: module for branch in self._branches.values() for key, module in branch.modules(model).items()}

    def cam(self, img: Tensor, output: Any, records: Records) -> List[Tensor]:
        runs = len(records.all(f"{BRANCHES[0]}.encoder.norm"))
        half = img.chunk(2)[0] if runs > 1 else img  # the second run is on the images alone
        return [branch.cam(half, output, records.at(1 if runs > 1 else 0)) for branch in self._branches.values()]

    def agreement(self, records: Records) -> str:
        return self._branches[BRANCHES[0]].agreement(records)
