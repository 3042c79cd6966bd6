"""The reference step of SemPLeS (arXiv 2401.11791), written literally from the method's description, and inputs for it.

Every region is encoded where a term needs it (three image encodes per pair), texts and prompts are encoded at CLIP's full 77
tokens in every step and for every pair, and CLIP's parameters require gradients. The numbers are those of the recipe for VOC.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin.clip_backends import openai_clip_module

LAMBDA_B, LAMBDA_T, LAMBDA = 2.4, 0.02, 0.05
EPS, PROMPT_EPS, LENGTH = 0.1, 1e-4, 30
LR, WEIGHT_DECAY, BATCH = 2.5e-2, 0.03, 128


class Batch(NamedTuple):
    """`img` (B, 3, H, W) with ImageNet statistics, `labels` (B, C) multi-hot, and `host`, img -> CAM."""

    img: Tensor
    labels: Tensor
    host: nn.Module


def random_clip() -> Any:
    """OpenAI's CLIP class in the size of ViT-B/32 with random weights; all cosines are well inside (0, 1).

    Features of random towers are unrelated: their cosines would be near 0, where the clamp stops gradients. The biases of the
    last layer norms therefore add the same vector to the features of both towers.
    """
    torch.manual_seed(0)
    model = openai_clip_module("model").CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    with torch.no_grad():
        model.ln_final.bias.normal_(std=0.7)
        shift = model.ln_final.bias @ model.text_projection  # (512,)
        model.visual.ln_post.bias.copy_(shift @ torch.linalg.pinv(model.visual.proj))
    return model.eval()


def make_batch(images: int, pairs: int, classes: int, size: int, seed: int = 0) -> Batch:
    """Random images with `pairs` labels in total, spread evenly over images and classes, and a host of one convolution."""
    torch.manual_seed(seed)
    labels = torch.zeros(images, classes)
    for i in range(pairs):
        image, turn = i % images, i // images
        labels[image, (image + turn) % classes] = 1
    torch.manual_seed(1)
    host = nn.Conv2d(3, classes, 16, stride=16).requires_grad_(False).eval()
    torch.manual_seed(2 + seed)
    return Batch(torch.randn(images, 3, size, size).clamp(-2, 2), labels, host)


# ---------------------------------------------------------------------------------------------------- reference


class Reference:
    """The losses of a training step as described, with nothing cached or shared.

    Args:
        model: CLIP; its parameters will require gradients.
        names: C class names.
        context: (C, L, Dt) the learned prompts.
    """

    def __init__(self, model: Any, names: List[str], context: Tensor):
        self.model = model.requires_grad_(True)
        self.context = context
        self.cosines: List[Tensor] = []
        encode = openai_clip_module("simple_tokenizer").SimpleTokenizer().encode
        start, end = [49406], [49407]
        device = context.device
        self.tokens = torch.zeros(len(names), 77, dtype=torch.long, device=device)
        for k, name in enumerate(names):
            ids = [*start, *encode(f"a photo of a {name}."), *end]
            self.tokens[k, : len(ids)] = torch.tensor(ids)
        prefix, suffix = [*start, *encode("a photo of ")], [*encode(" ."), *end]
        self.first = len(prefix)
        self.layout = torch.zeros(77, dtype=torch.long, device=device)  # 0 in place of the context and after the end
        self.layout[: self.first] = torch.tensor(prefix)
        after = self.first + context.shape[1]
        self.layout[after : after + len(suffix)] = torch.tensor(suffix)

    def refine_loss(self, img: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """L_match + lambda L_refine of stage (c); the prompts are frozen."""
        foreground, background, classes = self.regions(img, cam, labels, EPS)
        match = self.match_loss(foreground, background, classes)
        v_f = self.model.encode_image(foreground)  # the third image encode; the foreground is encoded for each term
        u_b = self.encode_prompts(classes)
        return match + LAMBDA * -torch.log(1 - self.cosine(v_f, u_b)).mean()

    def match_loss(self, foreground: Tensor, background: Tensor, classes: Tensor) -> Tensor:
        v_f = self.model.encode_image(foreground)
        v_b = self.model.encode_image(background)
        u_f = self.model.encode_text(self.tokens[classes])
        return -torch.log(self.cosine(v_f, u_f)).mean() + LAMBDA_B * -torch.log(1 - self.cosine(v_b, u_f)).mean()

    def prompt_loss(self, img: Tensor, labels: Tensor, host: nn.Module) -> Tensor:
        """L_prompt of stage (b); the host is frozen."""
        with torch.no_grad():
            cam = host(img)
        _, background, classes = self.regions(img, cam, labels, PROMPT_EPS)
        v_b = self.model.encode_image(background)
        u_f = self.model.encode_text(self.tokens[classes])
        u_b = self.encode_prompts(classes)
        return -torch.log(self.cosine(v_b, u_b)).mean() + LAMBDA_T * torch.log(self.cosine(u_f, u_b)).mean()

    def regions(self, img: Tensor, cam: Tensor, labels: Tensor, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
        """Foreground and background images (P, 3, 224, 224) and class (P,) of every positive pair."""
        x = F.interpolate(img, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        foreground, background, classes = [], [], []
        for i in range(labels.shape[0]):
            for k in range(labels.shape[1]):
                if labels[i, k] == 1:
                    up = F.interpolate(cam[i : i + 1, k : k + 1], size=(224, 224), mode="bilinear", align_corners=True)[0, 0]
                    mask = (up - up.min()) / (up.max() - up.min() + eps)  # (224, 224)
                    foreground.append(mask * x[i])
                    background.append((1 - mask) * x[i])
                    classes.append(k)
        return torch.stack(foreground), torch.stack(background), torch.tensor(classes, device=img.device)

    def encode_prompts(self, classes: Tensor) -> Tensor:
        """u_b (P, D) of the pairs' classes: prompts in rows of 77 tokens, then the steps of CLIP's `encode_text`."""
        model, before, after = self.model, self.first, self.first + self.context.shape[1]
        x = model.token_embedding(self.layout.expand(len(classes), -1))  # (P, 77, Dt)
        x = torch.cat([x[:, :before], self.context[classes], x[:, after:]], dim=1)
        x = x + model.positional_embedding
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return model.ln_final(x)[:, int(self.layout.argmax())] @ model.text_projection

    def cosine(self, a: Tensor, b: Tensor) -> Tensor:
        cosine = F.cosine_similarity(a, b, dim=-1)
        self.cosines.append(cosine.detach())
        return cosine.clamp(1e-4, 0.9999)


class PromptOptimizer:
    """Steps of stage (b): AdamW on the reference's context, cosine schedule over `total` steps."""

    def __init__(self, reference: Reference, total: int):
        self.reference = reference
        reference.context.requires_grad_(True)
        self.optimizer = torch.optim.AdamW([reference.context], lr=LR, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=total)

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        self.reference.model.zero_grad(set_to_none=True)
        loss = self.reference.prompt_loss(*batch)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def reference_refine_step(reference: Reference, batch: Batch, cam: Tensor) -> float:
    reference.model.zero_grad(set_to_none=True)  # these gradients are not used; clearing them saves the reference memory
    cam.grad = None
    loss = reference.refine_loss(batch.img, cam, batch.labels)
    loss.backward()
    return loss.item()
