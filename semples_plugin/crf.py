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
    "mean_field",
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
    check_crf()
    if not masks.numel():
        return masks.clone()
    values = masks.detach().float().clamp(0, 1).cpu()
    shares = torch.cat([1 - values.amax(0, keepdim=True), values]).clamp(min=LEAST)  # (1 + K, H, W)
    unary = -(shares / shares.sum(0)).log().flatten(1)  # (1 + K, H W)
    colors = (img.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu()  # (H, W, 3)
    return torch.from_numpy(mean_field(colors.numpy(), unary.numpy())[1:]).to(masks)


def mean_field(rgb: np.ndarray, unary: np.ndarray) -> np.ndarray:
    """Probabilities of the labels (L, H, W) by the CRF of `dense_crf`.

    Args:
        rgb: (H, W, 3) uint8.
        unary: (L, H W) float32, the negative logarithms of the labels' shares.
    """
    height, width = rgb.shape[:2]
    crf = check_crf().DenseCRF2D(width, height, len(unary))
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(sxy=GAUSSIAN_SXY, compat=GAUSSIAN_COMPAT)
    crf.addPairwiseBilateral(sxy=BILATERAL_SXY, srgb=BILATERAL_SRGB, rgbim=np.ascontiguousarray(rgb), compat=BILATERAL_COMPAT)
    return np.array(crf.inference(ITERATIONS), np.float32).reshape(len(unary), height, width)
