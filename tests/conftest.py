"""Shared parts: tiny random instances of OpenAI's own CLIP class, a batch factory, and literal text encoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from semples_plugin import PromptRefiner
from semples_plugin.clip_backends import openai_clip_module
from semples_plugin.clusters.categories import CategoryClusters
from tests.adapters.toy_hosts import CLASSES, ToyViT, make_loader

settings.register_profile("semples", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("semples")

START, END, CONTEXT = 49406, 49407, 77


def _clip(*args: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return openai_clip_module("model").CLIP(*args).eval()


def _align(model: nn.Module) -> nn.Module:
    """The same CLIP with a direction added to all its features, so that cosines are positive and the clamps let go."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(model.text_projection.shape[1], generator=generator)
    with torch.no_grad():
        model.ln_final.bias += torch.linalg.pinv(model.text_projection.T) @ direction  # bias @ projection = direction
        if hasattr(model.visual, "attnpool"):
            model.visual.attnpool.c_proj.bias += direction
        else:
            model.visual.ln_post.bias += torch.linalg.pinv(model.visual.proj.T) @ direction
    return model


@pytest.fixture(scope="session")
def tiny_clip() -> nn.Module:
    return _clip(32, 32, 2, 64, 8, 77, 49408, 64, 1, 2)


@pytest.fixture(scope="session")
def aligned_clip(tiny_clip: nn.Module) -> nn.Module:
    return _align(tiny_clip)


@pytest.fixture(scope="session")
def tiny_resnet_clip() -> nn.Module:
    return _align(_clip(32, 64, (1, 1, 1, 1), 64, None, 77, 49408, 64, 1, 2))


@pytest.fixture(scope="session")
def classes() -> List[str]:
    return ["boat", "train", "bird"]


Batch = Tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """img in [0, 1], cam that requires grad, labels; four positive pairs unless labels are given."""

    def make(
        labels: Optional[Sequence[Sequence[int]]] = None,
        num_classes: int = 3,
        size: int = 40,
        cam_size: int = 8,
        extra_channels: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        if labels is None:
            labels = [[int((b + k) % 3 != 1) for k in range(num_classes)] for b in range(2)]
        target = torch.tensor(labels).reshape(-1, num_classes)
        batch = len(target)
        img = torch.rand(batch, 3, size, size, generator=generator)
        cam = 3 * torch.randn(batch, num_classes + extra_channels, cam_size, cam_size, generator=generator)
        return img, cam.to(dtype).requires_grad_(True), target

    return make


@pytest.fixture
def make_refiner(aligned_clip: nn.Module, classes: List[str], make_batch: Callable[..., Batch]) -> Callable[..., Any]:
    """A `PromptRefiner` for images in [0, 1] on the tiny CLIP; `learned=True` runs a short stage (b) first."""

    def make(names: Any = None, learned: bool = False, **options: Any) -> PromptRefiner:
        names = classes if names is None else names
        refiner = PromptRefiner(names, **{"clip": aligned_clip, "image_stats": None, "prompt_length": 4, **options})
        if learned:
            extra = int(refiner.config.background_channel)
            img, cam, labels = make_batch([[1] * len(names)] * 2, len(names), extra_channels=extra, seed=9)
            if refiner.config.normalize is None:
                cam = cam.sigmoid()
            refiner.fit_prompts([(img, labels)], lambda _: cam.detach(), epochs=2, lr=0.1, progress=False)
        return refiner

    return make


# ------------------------------------------------------------------------ CLIP's own full-length text path, one text at a time


@pytest.fixture(scope="session")
def token_ids() -> Callable[[str], List[int]]:
    return openai_clip_module("simple_tokenizer").SimpleTokenizer().encode


@pytest.fixture(scope="session")
def padded_text(token_ids: Callable[[str], List[int]]) -> Callable[[nn.Module, str], Tensor]:
    """(D,) feature of a text by `model.encode_text` on 77 tokens."""

    def encode(model: nn.Module, text: str) -> Tensor:
        ids = [START, *token_ids(text), END]
        return model.encode_text(torch.tensor([ids + [0] * (CONTEXT - len(ids))]))[0]

    return encode


@pytest.fixture(scope="session")
def padded_prompt(token_ids: Callable[[str], List[int]]) -> Callable[[nn.Module, Tensor], Tensor]:
    """(D,) feature of "a photo of [p_1 .. p_L] ." by the model's own transformer and mask on all 77 positions."""

    def encode(model: nn.Module, context: Tensor) -> Tensor:
        before, after = [START, *token_ids("a photo of")], [*token_ids("."), END]
        embed = model.token_embedding
        rest = CONTEXT - len(before) - len(context) - len(after)
        x = torch.cat([embed(torch.tensor(before)), context, embed(torch.tensor(after + [0] * rest))])  # (77, Dt)
        x = (x + model.positional_embedding)[:, None]  # (77, 1, Dt)
        x = model.ln_final(model.transformer(x))[:, 0]
        return x[len(before) + len(context) + len(after) - 1] @ model.text_projection

    return encode


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict, tiny_clip: nn.Module) -> None:
    doctest_namespace.update(torch=torch, PromptRefiner=PromptRefiner, tiny_clip=tiny_clip)
    (img, labels) = make_loader()[0]
    clusters = CategoryClusters({"vehicles": CLASSES[:2], "animals": CLASSES[2:]}, CLASSES)
    doctest_namespace.update(clusters=clusters, model=ToyViT(), img=img, labels=labels)
    doctest_namespace.update(host_loss=nn.functional.multilabel_soft_margin_loss)


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Segment Anything model of transformers with random weights, as `save_pretrained` writes it.

    The heads are scaled, so that masks are neither empty nor full and the predicted IoU is about 0.9.
    """
    import transformers as t

    vision = t.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, output_channels=16,
        mlp_dim=32, window_size=2, global_attn_indexes=[1], num_pos_feats=8)  # fmt: skip
    prompts = t.SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    decoder = t.SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
        model = t.SamModel(t.SamConfig(**{name: part.to_dict() for name, part in parts.items()}))
        with torch.no_grad():
            model.mask_decoder.iou_prediction_head.proj_out.bias.fill_(0.9)
            for mlp in model.mask_decoder.output_hypernetworks_mlps:
                mlp.proj_out.weight.mul_(1e8)
    folder = tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    sides = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    masks = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    t.SamImageProcessor(**sides, **masks).save_pretrained(folder)
    return folder
