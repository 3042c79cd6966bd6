"""Background prompts that are learned along the way, in the host's own run (ours, not in the paper).

In every training step of the host the prompts take a step of their own on the background features of the batch, and the weight
of L_refine rises from 0 to lambda. Flow: `views` -> `clip_encoder` -> **online_prompts** -> `terms`.
"""

from __future__ import annotations

import math
from typing import Any, Dict, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .clip_encoder import ClipEncoder
from .config import RefinerConfig
from .prompt_learning import in_several_processes, says_something
from .prompts import BackgroundPrompts

__all__ = ["OnlinePrompts", "OnlineStep", "ramp"]

MEMORY = 0.9  # share of the old value in the running means


def ramp(step: int, steps: int) -> float:
    """Factor on lambda in a step, from 0: exp(-5 (1 - min(step / steps, 1))^2) (Laine and Aila, ICLR 2017).

    It is 0.007 in step 0 and 1 from step `steps` on: what the prompts say in the first steps hardly counts.
    """
    return math.exp(-5.0 * (1.0 - min(step / steps, 1.0)) ** 2)


class OnlineStep(NamedTuple):
    """What a step of the prompts gives the host's step.

    Attributes:
        u_b: (P, 1, D) features of the prompts of the pairs' classes, before the step; a constant.
        factor: on lambda, see `ramp`.
        loss: L_prompt of the batch, of all processes together; a scalar without graph.
    """

    u_b: Tensor
    factor: float
    loss: Tensor


class OnlinePrompts(nn.Module):
    """The prompts' optimizer (AdamW), the number of their steps, and how near each comes to its backgrounds.

    All of it is in `state_dict()`, so that a run which is taken up again goes on exactly.

    Args:
        num_classes: C.

    Attributes:
        steps: so far.
        similarity: (C,) running mean of cos(v_b, u_b) over the steps that held the class.
        empty_similarity: (C,) the same for a prompt without context vectors.
        num_pairs: (C,) pairs so far.
    """

    similarity: Tensor
    empty_similarity: Tensor
    num_pairs: Tensor

    def __init__(self, num_classes: int):
        super().__init__()
        self.steps = 0
        for name in ("similarity", "empty_similarity", "num_pairs"):
            self.register_buffer(name, torch.zeros(num_classes))
        self._optimizer: Optional[torch.optim.AdamW] = None
        self._saved: Optional[Dict[str, Any]] = None  # state of an optimizer that is yet to be made
        self._empty: Optional[Tensor] = None

    def step(
        self,
        prompts: BackgroundPrompts,
        encoder: ClipEncoder,
        config: RefinerConfig,
        text_features: Tensor,
        v_b: Tensor,
        classes: Tensor,
        related: Optional[Tensor] = None,
    ) -> OnlineStep:
        """One step on L_prompt = < -log c(v_b, u_b) > + lambda_T T(u_f, u_b) (SemPLeS, L_prompt) of the batch.

        The text encoder runs once, forward and backward, on the prompts of the classes in the batch. Under `torch.distributed`
        < > is the mean over the pairs of all processes, so that all take the same step, the one that a single process with the
        whole batch would take; every process must call this in every step, also with P = 0.

        Args:
            prompts: one per class; changed in place.
            encoder: the frozen CLIP.
            config: `online_steps`, `prompt_lr`, `weight_decay`, `prompt_template`, `lambda_t` and `repel` are used.
            text_features: (C, D), u_f.
            v_b: (P, D) features of the background views; detached here.
            classes: (P,) class index of each pair.
            related: (C, C) bool, see `prompts.related_classes`, or None.
        """
        context, v_b = prompts.context, v_b.detach()
        present, index = torch.unique(classes, return_inverse=True)
        gradient = torch.zeros_like(context)  # (C, 1, L, Dt)
        figures = torch.zeros(len(self.num_pairs), 3, device=context.device)  # of every class: two sums of cosines, pairs
        value = torch.zeros((), device=context.device)
        u_b = v_b.new_zeros(len(v_b), text_features.shape[1])
        if len(present):
            with torch.enable_grad():
                learned = context.detach()[present, 0].requires_grad_()  # (K, L, Dt)
                u_b = encoder.encode_prompt(learned, config.prompt_template)[index]  # (P, D)
                if related is None:
                    repel = losses.prompt_repel(text_features[classes], u_b, config.repel, "none")
                else:
                    repel = losses.prompt_repel_cluster(text_features, u_b, related[classes], config.repel, "none")
                total = (losses.prompt_background(v_b, u_b, "none") + config.lambda_t * repel).sum()
                (found,) = torch.autograd.grad(total, learned)
            u_b, value = u_b.detach(), total.detach()
            gradient[present, 0] = found
            near = F.cosine_similarity(v_b, u_b)
            nothing = F.cosine_similarity(v_b, self._empty_feature(encoder, context, config.prompt_template).expand_as(v_b))
            figures.index_add_(0, classes, torch.stack([near, nothing, torch.ones_like(near)], dim=1).float())
        packed = torch.cat([gradient.flatten(), figures.flatten(), value[None]])
        if in_several_processes():
            torch.distributed.all_reduce(packed)
        gradient = packed[: context.numel()].view_as(context)
        figures, value = packed[context.numel() : -1].view_as(figures), packed[-1]
        number = float(figures[:, 2].sum())
        factor = ramp(self.steps, int(config.online_steps or 1))
        self.steps += 1
        if number:
            self._descend(prompts, gradient / number, config)
            self._follow(prompts, figures)
        return OnlineStep(u_b[:, None], factor, value / max(number, 1.0))

    def _descend(self, prompts: BackgroundPrompts, gradient: Tensor, config: RefinerConfig) -> None:
        context = prompts.context
        if self._optimizer is None or self._optimizer.param_groups[0]["params"][0] is not context:
            self._optimizer = torch.optim.AdamW([context], lr=config.prompt_lr, weight_decay=config.weight_decay)
            if self._saved is not None:
                self._optimizer.load_state_dict(self._saved)
                self._saved = None
        if any(value.device != context.device for value in self._optimizer.state[context].values() if value.ndim):
            self._optimizer.load_state_dict(self._optimizer.state_dict())  # the prompts were moved
        context.grad = gradient
        self._optimizer.step()
        context.grad = None

    def _follow(self, prompts: BackgroundPrompts, figures: Tensor) -> None:
        """Running means of the classes that the batch held, and which prompts are of use."""
        pairs = figures[:, 2]
        for mean, total in ((self.similarity, figures[:, 0]), (self.empty_similarity, figures[:, 1])):
            new = total / pairs.clamp(min=1)
            old = torch.where(self.num_pairs > 0, mean, new)
            mean.copy_(torch.where(pairs > 0, MEMORY * old + (1 - MEMORY) * new, mean))
        self.num_pairs += pairs
        alive = (self.num_pairs > 0) & says_something(self.similarity, self.empty_similarity)
        prompts.alive.copy_(alive[:, None])
        prompts.learned.fill_(True)

    def _empty_feature(self, encoder: ClipEncoder, context: Tensor, template: str) -> Tensor:
        """(1, D) the feature of a prompt without context vectors."""
        if self._empty is None or self._empty.device != context.device:
            with torch.no_grad():
                self._empty = encoder.encode_prompt(context[:1, 0, :0], template)
        return self._empty

    def get_extra_state(self) -> Dict[str, Any]:
        return {"steps": self.steps, "optimizer": self._saved if self._optimizer is None else self._optimizer.state_dict()}

    def set_extra_state(self, state: Dict[str, Any]) -> None:
        self.steps, self._saved, self._optimizer = state["steps"], state["optimizer"], None
