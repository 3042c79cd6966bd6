"""A dense CRF for masks: they follow the colors of the image, also over a distance.

The CRF itself is `pydensecrf`, whichever build of it is installed; nothing here depends on it until it is asked for. Flow:
**crf** -> `masks`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import MissingLibraryError

__all__ = [
    "BILATERAL_COMPAT",
    "BILATERAL_SRGB",
    "BILATERAL_SXY",
    "GAUSSIAN_COMPAT",
    "GAUSSIAN_SXY",
    "ITERATIONS",
    "LEAST",
    "check_crf",
    "dense_crf",
]

# As CAM pipelines use Kraehenbuehl and Koltun's CRF: standard deviations in pixels (sxy) and in colors of 0 to 255 (srgb).
GAUSSIAN_SXY, GAUSSIAN_COMPAT = 3, 3
BILATERAL_SXY, BILATERAL_SRGB, BILATERAL_COMPAT = 80, 13, 10
ITERATIONS = 10
LEAST = 1e-5  # probabilities are clamped to it before their logarithm


def check_crf() -> Any:
    """The module `pydensecrf.densecrf`.

    Raises:
        MissingLibraryError: if it cannot be imported; the message says what to install.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise MissingLibraryError(
            "align='crf' needs pydensecrf. The package of this name fails to build on new Pythons; a fork has the same module: "
            f"`pip install pydensecrf2`, which needs a C++ compiler ({error}).",
            name="pydensecrf",
        ) from error
    return densecrf


def dense_crf(img: Tensor, masks: Tensor) -> Tensor:
    """Masks of one image after mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun, NeurIPS 2011).

    Labels are the background, 1 - max_k m_k, and the K classes, m_k. Unary terms are the negative logarithms of their shares, a
    softmax of the logarithms: log p_l - log sum_l' p_l'. Pairwise terms: a Gaussian over the places (`GAUSSIAN_SXY`, weight
    `GAUSSIAN_COMPAT`) and one over places and colors (`BILATERAL_SXY`, `BILATERAL_SRGB`, weight `BILATERAL_COMPAT`), with Potts
    compatibility; `ITERATIONS` updates. Computed on the CPU; the same input gives the same masks.

    Args:
        img: (3, H, W) in [0, 1].
        masks: (K, H, W) in [0, 1].

    Returns:
        (K, H, W), the probabilities of the classes, on the device of `masks`; empty for K = 0.

    Raises:
        MissingLibraryError: if `pydensecrf` cannot be imported.
    """
    densecrf = check_crf()
    if not masks.numel():
        return masks.clone()
    height, width = masks.shape[1:]
    values = masks.detach().float().clamp(0, 1).cpu()
    shares = torch.cat([1 - values.amax(0, keepdim=True), values]).clamp(min=LEAST)  # (1 + K, H, W)
    unary = -(shares / shares.sum(0)).log().flatten(1)  # (1 + K, H W)
    colors = (img.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()  # (H, W, 3)
    crf = densecrf.DenseCRF2D(width, height, len(shares))
    crf.setUnaryEnergy(np.ascontiguousarray(unary.numpy()))
    crf.addPairwiseGaussian(sxy=GAUSSIAN_SXY, compat=GAUSSIAN_COMPAT)
    rgb = np.ascontiguousarray(colors.numpy())
    crf.addPairwiseBilateral(sxy=BILATERAL_SXY, srgb=BILATERAL_SRGB, rgbim=rgb, compat=BILATERAL_COMPAT)
    found = np.array(crf.inference(ITERATIONS), np.float32).reshape(len(shares), height, width)
    return torch.from_numpy(found[1:]).to(masks)
