"""What PCC puts on a transformer's patch tokens: HV-BiLSTM, the patch classifier, top-k pooling, confident patches.

Each can be used alone. Flow: patch tokens (B, N, D) -> `HVBiLSTM` -> `PatchClassifier` -> Z (B, N, C + 1) -> `top_k_pool` ->
`losses.multi_label_cross_entropy`; `confident_patches` picks the patches for `losses.patch_contrast`. No reference code of PCC
(arXiv 2412.13823) or CPC (arXiv 2508.17009) exists: this is re-implemented from their description and that of ViT-PCM (ECCV
2022).
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .._checks import check_number

__all__ = ["HVBiLSTM", "PatchClassifier", "confident_patches", "top_k_pool"]


class HVBiLSTM(nn.Module):
    """Refines a grid of tokens by a bidirectional LSTM along every row and one along every column (ViT-PCM, ECCV 2022).

        out[r, c] = [ row LSTM of row r, at c ; column LSTM of column c, at r ]

    It counters over-smoothing: the tokens of neighboring patches become similar in a deep transformer, while a recurrence over
    the grid depends on their order.

    Args:
        dim: D, size of a token.
        hidden: H, size of each direction's state; by default D / 4, so that the output has the size of the input (192 for 768).
        dropout: on the input, in training.

    Example:
        >>> HVBiLSTM(16)(torch.rand(2, 12, 16), (3, 4)).shape
        torch.Size([2, 12, 16])
    """

    def __init__(self, dim: int, hidden: Optional[int] = None, dropout: float = 0.2):
        super().__init__()
        check_number("dim", dim, 1, whole=True)
        hidden = max(1, dim // 4) if hidden is None else hidden
        check_number("hidden", hidden, 1, whole=True)
        self.out_dim = 4 * hidden
        self.dropout = nn.Dropout(dropout)
        self.rows = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.columns = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor, grid: Tuple[int, int]) -> Tensor:
        """
        Args:
            tokens: (B, h w, D), row by row.
            grid: (h, w).

        Returns:
            (B, h w, 4 H).
        """
        batch, count, dim = tokens.shape
        height, width = grid
        if height * width != count:
            raise ValueError(f"`tokens` must hold h x w = {height} x {width} patches; got {count}. Leave class tokens out.")
        x = self.dropout(tokens).reshape(batch, height, width, dim)
        half = self.out_dim // 2
        across = self.rows(x.reshape(batch * height, width, dim))[0].reshape(batch, height, width, half)
        x = x.transpose(1, 2)  # (B, w, h, D)
        down = self.columns(x.reshape(batch * width, height, dim))[0].reshape(batch, width, height, half).transpose(1, 2)
        return torch.cat([across, down], dim=-1).reshape(batch, count, self.out_dim)  # (B, h w, 4 H)


class PatchClassifier(nn.Module):
    """Class scores of every patch, background included: Z = softmax(F W) (PCC; ViT-PCM, ECCV 2022).

    Args:
        dim: D, size of a token.
        num_classes: C, without background.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.weight = nn.Linear(dim, num_classes + 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, D) -> Z (B, N, C + 1) float32, channel 0 background; every patch's scores sum to 1."""
        return self.weight(tokens).float().softmax(-1)


def top_k_pool(scores: Tensor, k: int) -> Tensor:
    """Image-level scores: y_c = mean of the k largest Z_nc over the patches n (PCC; ViT-PCM, ECCV 2022).

    Args:
        scores: (B, N, C).
        k: patches per class; all of them if there are fewer.

    Returns:
        (B, C).
    """
    check_number("k", k, 1, whole=True)
    if scores.ndim != 3 or scores.shape[1] == 0:
        raise ValueError(f"`scores` must have shape (B, N, C) with N >= 1; got {tuple(scores.shape)}.")
    return scores.topk(min(k, scores.shape[1]), dim=1).values.mean(1)


@torch.no_grad()
def confident_patches(
    scores: Tensor, labels: Tensor, threshold: float = 0.8, per_class: int = 8
) -> Tuple[Tensor, Tensor, Tensor]:
    """Patches whose class is clear; `losses.patch_contrast` compares them.

    Scores of classes that the image does not show are set to 0, and the others are scaled to sum to 1. A patch counts for its
    best class if the score of that class is at least `threshold`. Of every image and class the `per_class` best patches are
    taken.

    Args:
        scores: (B, N, C + 1), Z of `PatchClassifier`, background first.
        labels: (B, C) multi-hot.
        threshold: from 0 to 1.
        per_class: patches per image and class at most; the cost of the contrast grows with their square.

    Returns:
        Image (M,), patch (M,) and class (M,) of each; class 0 is background, class c + 1 is column c of `labels`. M may be 0.
    """
    if scores.ndim != 3 or labels.shape != (scores.shape[0], scores.shape[2] - 1):
        raise ValueError(
            f"`scores` must have shape (B, N, C + 1) and `labels` (B, C); got {tuple(scores.shape)} and {tuple(labels.shape)}."
        )
    present = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1) != 0  # (B, C + 1)
    allowed = scores * present[:, None]
    allowed = allowed / allowed.sum(-1, keepdim=True).clamp(min=1e-12)
    best, own = allowed.max(-1)  # (B, N)
    if not len(scores):
        return own.new_zeros(0), own.new_zeros(0), own.new_zeros(0)
    names = torch.arange(scores.shape[2], device=scores.device)[None, :, None]  # (1, C + 1, 1)
    counts = (own[:, None] == names) & (best >= threshold)[:, None] & present[:, :, None]  # (B, C + 1, N)
    found = (best[:, None] * counts).topk(min(per_class, scores.shape[1]), dim=2)
    image, name, rank = (found.values > 0).nonzero(as_tuple=True)
    return image, found.indices[image, name, rank], name
