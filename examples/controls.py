"""Controls of the experiments: what a row gains without CLIP, and with a CLIP that knows nothing."""

from __future__ import annotations

import copy
from typing import Callable, Dict, Tuple, TypeVar

import torch
from torch import Tensor, nn

from semples_plugin import PromptRefiner, losses, regions, terms
from semples_plugin.config import RefinerConfig
from semples_plugin.refiner import RefinerOutput

Clip = TypeVar("Clip", bound=nn.Module)


@torch.no_grad()
def random_clip(model: Clip, seed: int) -> Clip:
    """A copy of a CLIP that knows nothing: the values of every weight tensor are shuffled within the tensor.

    Architecture and spread of the weights stay as they are. Zeros stay in their places, because the embeddings of tokens that
    no caption held are zero in the CLIPs of the examples: mixed with them, the embeddings of class names would nearly vanish.
    Buffers (the statistics of batch normalization) and `logit_scale` stay, too.

    Args:
        model: OpenAI's `clip.model.CLIP`, or one with a `FeatureTower` of `train_clip`; left as it is.
        seed: of the permutations, drawn on the CPU.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        values = weight[weight != 0].cpu()
        weight[weight != 0] = values[torch.randperm(len(values), generator=generator)].to(weight.device)
    return model


def area_loss(cam: Tensor, labels: Tensor, config: RefinerConfig, size: int) -> Tensor:
    """The area term of a refiner's loss with its weight, and nothing of CLIP.

    Args:
        cam: (B, C, h, w), attached to the host's graph.
        labels: (B, C) multi-hot.
        config: of the refiner; `lambda_area`, `normalize` and `eps` count.
        size: CLIP's input size in pixels, at which the masks are normalized.

    Returns:
        Scalar.
    """
    masks = regions.pair_masks(cam, regions.positive_pairs(labels), (size, size), config.normalize, config.eps)
    return config.lambda_area * losses.area(masks)


class AreaOnly(PromptRefiner):
    """A refiner whose loss is its area term alone, for loops that a refiner is attached to. CLIP is never called."""

    def compute(self, img: Tensor, cam: Tensor, labels: Tensor) -> RefinerOutput:
        img, cam, labels = self._check(img, cam, labels)
        pairs, size = regions.positive_pairs(labels), (self.encoder.image_size,) * 2
        masks = regions.pair_masks(cam, pairs, size, self.config.normalize, self.config.eps)
        values, weights = {"area": losses.area(masks, "none")}, {"area": self.config.lambda_area}
        loss, by_name = terms.weighted_sum(values, weights, terms.class_weights(pairs, self.classes, self.config))
        return RefinerOutput(loss, by_name, masks, pairs)


def area_only(config: RefinerConfig, size: int) -> Callable[[Tensor, Tensor, Tensor], Tuple[Tensor, Dict[str, Tensor]]]:
    """`area_loss` in the form in which the examples' hosts take another loss: (img, cam, labels) -> the loss, terms by name.

    Args:
        config, size: as for `area_loss`.
    """

    def extra(img: Tensor, cam: Tensor, labels: Tensor) -> Tuple[Tensor, Dict[str, Tensor]]:
        loss = area_loss(cam, labels, config, size)
        return loss, {"weighted_area": loss.detach()}

    return extra
