from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from semples_plugin import ClipError, PromptRefiner
from semples_plugin.clip_backends import CLIP_MEAN, load_clip
from semples_plugin.clip_open_clip import OpenClip, OpenClipTower
from tests import clip_contract as contract
from tests.clip_zoo import CONTEXT, VIT, bert_tokenizer, case, kinds

open_clip = pytest.importorskip("open_clip")
KINDS = kinds("open_clip")
BIDIRECTIONAL = ["open_clip CLIPA", "open_clip SigLIP", "open_clip with BERT (BiomedCLIP)"]


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return case(request.param, tmp_path / "tokenizer")


def test_features_are_the_packages_own(made: Any) -> None:
    encoder = made.load()
    assert type(encoder) is (OpenClip if made.kind == "open_clip, causal text" else OpenClipTower)
    assert contract.distance_of_images(made, encoder) < 1e-5
    assert contract.distance_of_texts(made, encoder) < 1e-5


def test_prompts_are_the_tower_fed_with_the_same_embeddings(made: Any) -> None:
    assert contract.distance_of_prompts(made, made.load()) < 1e-5


def test_gradient_reaches_every_context_vector(made: Any) -> None:
    assert (contract.gradient_of_context(made.load()).abs().amax(2) > 0).all()


def test_prompts_are_learned_and_a_host_is_trained(made: Any, make_batch: Any) -> None:
    prompt, host = contract.learn_and_train(made.load(), make_batch)
    assert prompt[-1] < prompt[0] and host[-1] < host[0]


def test_dense_features(made: Any) -> None:
    encoder = made.load()
    views = contract.random_views(encoder)
    if made.kind == "open_clip CoCa":
        with pytest.raises(ClipError, match="has an image tower of type VisionTransformer; dense features need OpenAI's"):
            encoder.encode_dense(views)
        return
    dense = encoder.encode_dense(views)
    assert dense.shape[:2] == (2, encoder.embed_dim) and dense.shape[2] == dense.shape[3] >= 2
    assert dense.isfinite().all() and (dense[0, :, 0, 0] - dense[0, :, -1, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "name, size, side", [("test_convnext", 160, 5), ("eva02_tiny_patch14_224", 224, 16), ("test_vit", 160, 10)]
)
def test_dense_features_of_towers_of_timm(name: str, size: int, side: int) -> None:
    encoder = load_clip(with_timm(name, size, pool="" if name == "test_vit" else "avg"))
    views = contract.random_views(encoder)
    assert encoder.encode_dense(views).shape == (2, 32, side, side)
    if name == "test_convnext":  # one norm behind the mean, so only a map that is the same everywhere says the same
        flat = torch.ones(1, 3, size, size)
        dense = encoder.encode_dense(flat)[0, :, side // 2, side // 2]
        assert F.cosine_similarity(dense, encoder.encode_image(flat)[0].detach(), dim=0) > 0.9


def test_image_tower_of_timm_without_a_layout_that_dense_features_know() -> None:
    encoder = load_clip(with_timm("test_convnext", 160, pool="abs_attn", proj=None))
    with pytest.raises(ClipError, match="has an image tower of type TimmModel; dense features need"):
        encoder.encode_dense(contract.random_views(encoder))


def with_timm(name: str, size: int, pool: str = "avg", proj: Any = "linear") -> Any:
    timm = pytest.importorskip("timm")
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}
    text = {"context_length": 16, "width": 64, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.model.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()


def test_dense_features_of_an_even_attention_pool_have_the_pooled_feature_as_their_mean(tmp_path: Path) -> None:
    """timm's SigLIP: with a query that looks everywhere alike, and no MLP, pooling is the mean of the value path."""
    made = case("open_clip SigLIP", tmp_path)
    pool = made.model.visual.trunk.attn_pool
    with torch.no_grad():
        pool.q.weight.zero_()
        pool.q.bias.zero_()
        pool.mlp.fc2.weight.zero_()
        pool.mlp.fc2.bias.zero_()
    encoder = made.load()
    views = contract.random_views(encoder)
    with torch.no_grad():
        assert torch.allclose(encoder.encode_dense(views).mean((2, 3)), encoder.encode_image(views), atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["open_clip CLIPA", "open_clip SigLIP", "open_clip MobileCLIP", "open_clip with BERT (BiomedCLIP)"]
)
def test_prompt_made_of_word_embeddings_is_the_text(kind: str, tmp_path: Path) -> None:
    made = case(kind, tmp_path)
    encoder = made.load()
    context = contract.token_embedding(encoder.model)(torch.tensor([encoder.token_ids("red boat")]))
    got = encoder.encode_prompt(context, "a photo of {} .")
    assert torch.allclose(got, encoder.encode_text(["a photo of red boat ."]), atol=1e-5)


def test_bidirectional_towers_see_the_padding(tmp_path: Path) -> None:
    """A cut at the end token, right for causal towers, would change their features."""
    made = case("open_clip MobileCLIP", tmp_path)
    encoder = made.load()
    ids = made.tokenizer(["water"], CONTEXT)
    whole = made.model.text(ids)
    cut = made.model.text(ids[:, :3])  # start, water, end
    assert torch.allclose(encoder.encode_text(["water"]), whole, atol=1e-5)
    assert (cut - whole).abs().max() > 1e-3


def test_coca_reads_its_class_token(tmp_path: Path) -> None:
    """CoCa's text feature is that of a class token behind the padding, not that of the end token."""
    made = case("open_clip CoCa", tmp_path)
    encoder = made.load()
    assert encoder.context_length == CONTEXT and encoder.max_prompt_length("{}") == CONTEXT - 2
    with torch.no_grad():
        before = encoder.encode_text(["water"])
        encoder.model.text.cls_emb.mul_(-1)
        assert (encoder.encode_text(["water"]) - before).abs().max() > 1e-2


def test_clips_keep_a_place_for_the_class_token(tmp_path: Path) -> None:
    encoder = case("open_clip CLIPS", tmp_path).load()
    assert encoder.max_prompt_length("{}") == CONTEXT - 3
    context = torch.randn(1, CONTEXT - 3, encoder.context_dim)
    assert encoder.encode_prompt(context, "{}").isfinite().all()
    with pytest.raises(ValueError, match=f"Every text must fit into CLIP's {CONTEXT - 1} tokens"):
        encoder.encode_text(["boat " * (CONTEXT - 2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BIDIRECTIONAL)
def test_precision(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = case(kind, tmp_path)
    full, half = made.load(), made.load(dtype=dtype)
    assert half.dtype == dtype and half.fingerprint == full.fingerprint
    context = torch.randn(2, 4, full.context_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for of in (
            lambda e: e.encode_image(contract.random_views(full)),
            lambda e: e.encode_text(contract.TEXTS),
            lambda e: e.encode_prompt(context, "a photo of {} ."),
        ):
            assert of(half).dtype == torch.float32
            assert F.cosine_similarity(of(half), of(full), dim=-1).min() > 0.98


def test_given_model_stays_as_it_is(tmp_path: Path) -> None:
    made = case("open_clip with BERT (BiomedCLIP)", tmp_path)
    before = copy.deepcopy(made.model.state_dict())
    made.model.train()
    refiner = PromptRefiner(["boat"], clip=made.load(), prompt_length=4)
    refiner.prompt_features()
    assert made.model.training and all(torch.equal(a, b) for a, b in zip(before.values(), made.model.state_dict().values()))
    assert all(p.requires_grad for p in made.model.parameters() if p.is_floating_point())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in refiner.encoder.model.modules())


# ------------------------------------------------------------------------------------------------ by name


def test_folder_of_a_biomedclip(tmp_path: Path) -> None:
    """What open_clip writes for the hub, BERT's tokenizer and configuration beside it; BiomedCLIP has this form."""
    made = case("open_clip with BERT (BiomedCLIP)", tmp_path / "tower")
    tower = {"hf_model_name": str(tmp_path / "tower"), "hf_model_pretrained": False, "hf_proj_type": "mlp"}
    tower.update(
        hf_pooler_type="cls_last_hidden_state_pooler", hf_tokenizer_name=str(tmp_path / "tower"), context_length=CONTEXT
    )
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    content = {
        "model_cfg": {"embed_dim": 32, "custom_text": True, "vision_cfg": vision, "text_cfg": tower},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    torch.save(made.model.state_dict(), folder / "open_clip_pytorch_model.bin")
    made.tokenizer.save_pretrained(str(folder))
    if not hasattr(open_clip.factory, "parse_model_name"):
        pytest.skip("this open_clip reads no folders")
    encoder = load_clip(f"open_clip:local-dir:{folder}")
    assert encoder.mean == (0.1, 0.2, 0.3) and encoder.std == (0.4, 0.5, 0.6)
    assert encoder.name == f"open_clip:local-dir:{folder}" and encoder.fingerprint == made.load().fingerprint
    assert contract.distance_of_texts(made, encoder) < 1e-5 and contract.distance_of_images(made, encoder) < 1e-5


@pytest.mark.parametrize("name, mean", [("ViT-S-32", CLIP_MEAN), ("MobileCLIP-S1", (0.0, 0.0, 0.0))])
def test_architecture_and_a_file(name: str, mean: Any, tmp_path: Path) -> None:
    """A state dict of open_clip, as RemoteCLIP and MobileCLIP2 publish theirs; the image statistics are those of the tags."""
    pytest.importorskip("timm")
    own = open_clip.create_model(name).eval()
    file = tmp_path / "weights.pt"
    torch.save(own.state_dict(), file)
    encoder = load_clip(f"open_clip:{name}/{file}")
    assert isinstance(encoder, OpenClip if name == "ViT-S-32" else OpenClipTower) and encoder.mean == mean
    views, tokenize = contract.random_views(encoder), open_clip.get_tokenizer(name)
    with torch.no_grad():
        assert contract.distance(encoder.encode_image(views), own.encode_image(views)) < 1e-5
        assert contract.distance(encoder.encode_text(contract.TEXTS), own.encode_text(tokenize(contract.TEXTS))) < 1e-5


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32/", "no_such_name"])
def test_architecture_without_weights(name: str) -> None:
    with pytest.raises(ClipError, match=f"'open_clip:{name}' must name its weights, .* Tags of it: ('openai', 'laion|none)"):
        load_clip(f"open_clip:{name}")


def test_folder_without_weights(tmp_path: Path) -> None:
    content = {"model_cfg": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": {"width": 64, "heads": 2, "layers": 1}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    if not hasattr(open_clip.factory, "parse_model_name"):
        pytest.skip("this open_clip reads no folders")
    with pytest.raises(ClipError, match="could not be loaded by open_clip .*pretrained weights"):
        load_clip(f"open_clip:local-dir:{tmp_path}")


@pytest.mark.parametrize(
    "name",
    [
        "open_clip:ViT-X-99/openai",
        "open_clip:ViT-B-32/no_such_tag",
        "open_clip:local-dir:/no/such/folder",
        "open_clip:ViT-B-32/no/such.pt",
    ],
)
def test_no_such_name(name: str) -> None:
    with pytest.raises(ClipError, match="could not be loaded by open_clip .*Names and tags are in open_clip.list_pretrained"):
        load_clip(name)


def test_vocabulary_of_another_kind_needs_a_tokenizer(tmp_path: Path) -> None:
    for kind in ("open_clip CLIPA", "open_clip with BERT (BiomedCLIP)"):
        made = case(kind, tmp_path / kind)
        with pytest.raises(ClipError, match=r"has a vocabulary of \d+ tokens and not that of OpenAI's CLIP, so it needs"):
            load_clip(made.model)


def test_tower_without_a_token_embedding(tmp_path: Path) -> None:
    made = case("open_clip with BERT (BiomedCLIP)", tmp_path)
    made.model.text.transformer = torch.nn.Identity()
    with pytest.raises(ClipError, match="has a text tower of type HFTextEncoder without a token embedding; background"):
        made.load()


class ByItself(torch.nn.Module):
    """A text tower that looks its tokens up without calling its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = torch.nn.Embedding(30, 16)
        self.context_length, self.vocab_size = CONTEXT, 30
        self.proj = torch.nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.proj(F.embedding(ids, self.token_embedding.weight).mean(1))


def test_tower_that_does_not_call_its_token_embedding(tmp_path: Path) -> None:
    model = open_clip.model.CustomTextCLIP(embed_dim=32, vision_cfg=VIT, text_cfg={"width": 64, "heads": 2, "layers": 1})
    model.text = ByItself()
    with pytest.raises(ClipError, match="does not read its tokens from text.token_embedding, so a prompt's vectors"):
        load_clip(model, tokenizer=bert_tokenizer(tmp_path))


class OnlyInside:
    """A tokenizer that gives a word other ids inside of its special tokens."""

    pad_token_id, all_special_ids = 0, [0, 1]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        raise NotImplementedError

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return {"input_ids": [5, 6, 1] if add_special_tokens else [4]}


def test_tokenizer_that_changes_a_text_by_what_is_around_it(tmp_path: Path) -> None:
    made = case("open_clip CLIPA", tmp_path)
    with pytest.raises(ClipError, match=r"must put its special tokens around a text; 'a' is \[4\] without and \[5, 6, 1\]"):
        load_clip(made.model, tokenizer=OnlyInside())
