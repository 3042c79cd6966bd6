from __future__ import annotations

import copy
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from semples_plugin import ClipError, PromptRefiner, losses
from semples_plugin._torch import missing_weights
from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD, load_clip
from semples_plugin.clip_huggingface import HuggingFaceClip
from tests import clip_contract as contract
from tests.clip_zoo import CONTEXT, case, clip_tokenizer, kinds, siglip2_tokenizer, word_tokenizer

transformers = pytest.importorskip("transformers")
KINDS = kinds("transformers")


@pytest.fixture(params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return case(request.param, tmp_path / "tokenizer")


def test_features_are_the_packages_own(made: Any) -> None:
    encoder = made.load()
    assert isinstance(encoder, HuggingFaceClip)
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
    dense = encoder.encode_dense(contract.random_views(encoder))
    assert dense.shape == (2, encoder.embed_dim, 4, 4) and dense.isfinite().all() and dense.dtype == torch.float32
    assert (dense[0, :, 0, 0] - dense[0, :, 3, 3]).abs().max() > 1e-3


def test_dense_features_of_an_even_attention_pool_have_the_pooled_feature_as_their_mean(tmp_path: Path) -> None:
    """SigLIP: with a probe that looks everywhere alike, and no MLP, pooling is the mean of the value path."""
    made = case("transformers SigLIP", tmp_path)
    head = made.model.vision_model.head
    with torch.no_grad():
        head.probe.zero_()
        head.attention.in_proj_bias.zero_()
        head.mlp.fc2.weight.zero_()
        head.mlp.fc2.bias.zero_()
    encoder = made.load()
    views = contract.random_views(encoder)
    with torch.no_grad():
        assert torch.allclose(encoder.encode_dense(views).mean((2, 3)), encoder.encode_image(views), atol=1e-5)


def test_sizes_and_statistics(tmp_path: Path) -> None:
    clip = case("transformers CLIP", tmp_path / "a").load()
    siglip = case("transformers SigLIP", tmp_path / "b").load()
    flexible = case("transformers SigLIP 2, NaFlex", tmp_path / "c").load()
    for encoder, expected in ((clip, (32, 32, 64, 77)), (siglip, (32, 64, 64, CONTEXT)), (flexible, (32, 64, 64, CONTEXT))):
        assert (encoder.image_size, encoder.embed_dim, encoder.context_dim, encoder.context_length) == expected
        assert encoder.dtype == torch.float32 and not any(p.requires_grad for p in encoder.model.parameters())
    assert (clip.mean, clip.std) == (CLIP_MEAN, CLIP_STD)
    assert siglip.mean == siglip.std == flexible.mean == (0.5, 0.5, 0.5)
    assert siglip.max_prompt_length("{}") == CONTEXT - 1 and clip.max_prompt_length("{}") == 75


@pytest.mark.parametrize("kind", ["transformers CLIP", "transformers SigLIP"])
def test_prompt_made_of_word_embeddings_is_the_text(kind: str, tmp_path: Path) -> None:
    encoder = case(kind, tmp_path).load()
    words = encoder.token_ids("red boat")
    context = encoder.model.text_model.embeddings.token_embedding(torch.tensor([words]))
    got = encoder.encode_prompt(context, "a photo of {} .")
    assert torch.allclose(got, encoder.encode_text(["a photo of red boat ."]), atol=1e-5)


def test_padding_in_front_follows_the_tokenizer(tmp_path: Path) -> None:
    """Siglip2Tokenizer's default; a SigLIP then reads a text at its end token."""
    made = case("transformers SigLIP 2", tmp_path)
    made = made._replace(tokenizer=siglip2_tokenizer(tmp_path / "left", "left"))
    encoder = made.load()
    tokens = made.tokenizer(contract.TEXTS, padding="max_length", max_length=CONTEXT, return_tensors="pt")["input_ids"]
    assert tokens[1, 0] == made.tokenizer.pad_token_id and tokens[1, -1] == made.tokenizer.eos_token_id
    output = made.model.get_text_features(input_ids=tokens)
    own = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert torch.allclose(encoder.encode_text(contract.TEXTS), own, atol=1e-5)
    context = encoder.model.text_model.embeddings.token_embedding(torch.tensor([encoder.token_ids(" the boat")]))
    got = encoder.encode_prompt(context, "a photo of {} .")
    assert torch.allclose(got, encoder.encode_text(["a photo of the boat ."]), atol=1e-5)


def test_siglip2_is_in_lower_case_with_the_tokenizer_that_its_folders_name(tmp_path: Path) -> None:
    """google/siglip2-base-patch16-224: a `siglip` whose tokenizer is Gemma's, which leaves capitals as they are."""
    made = case("transformers SigLIP 2", tmp_path)
    if type(made.tokenizer).__name__ != "GemmaTokenizer":
        pytest.skip("this transformers makes no GemmaTokenizer without a file")
    made.model.save_pretrained(str(tmp_path))
    made.tokenizer.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "GemmaTokenizer"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip"
    assert made.tokenizer("Boat")["input_ids"] != made.tokenizer("boat")["input_ids"]
    own = siglip2_tokenizer(tmp_path)("A Boat", add_special_tokens=False)["input_ids"]
    for encoder in (made.load(), load_clip(f"hf:{tmp_path}")):
        assert encoder.token_ids("A Boat") == encoder.token_ids("a boat") == own
        assert torch.equal(encoder.encode_text(["A red Boat ."]), encoder.encode_text(["a red boat ."]))
        context = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(encoder.encode_prompt(context, "A photo of {} ."), encoder.encode_prompt(context, "a photo of {} ."))


# ------------------------------------------------------------------------------------------------ loading


def test_weights_that_were_filled_at_random() -> None:
    facts = {"missing_keys": ["b", "vision_model.position_ids"], "mismatched_keys": [("a", (1,), (2,))]}
    assert missing_weights(facts) == ["a", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_folder_by_name(kind: str, tmp_path: Path, make_batch: Any) -> None:
    """The folder that save_pretrained writes, the tokenizer beside the weights."""
    made = case(kind, tmp_path / "tokenizer")
    folder = tmp_path / "model"
    made.model.save_pretrained(str(folder))
    made.tokenizer.save_pretrained(str(folder))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    named, given = load_clip(f"hf:{folder}"), made.load()
    assert named.name == f"hf:{folder}" and named.mean == (0.1, 0.2, 0.3) and named.std == (0.4, 0.5, 0.6)
    assert named.fingerprint == given.fingerprint
    assert torch.allclose(named.encode_text(contract.TEXTS), given.encode_text(contract.TEXTS), atol=1e-6)
    views = contract.random_views(given)
    assert torch.allclose(named.encode_image(views), given.encode_image(views), atol=1e-6)
    loaded = type(made.model).from_pretrained(str(folder))  # and the object finds the tokenizer of its folder
    refiner = PromptRefiner(["boat", "train", "bird"], clip=loaded, image_stats=None, prompt_length=4)
    assert torch.allclose(refiner.encoder.encode_text(contract.TEXTS), given.encode_text(contract.TEXTS), atol=1e-6)
    assert refiner.encoder.mean == (0.1, 0.2, 0.3)
    img, cam, labels = make_batch()
    refiner(img, cam, labels).backward()


def test_a_processor_gives_its_tokenizer_and_its_statistics(tmp_path: Path) -> None:
    made = case("transformers CLIP", tmp_path)
    module = pytest.importorskip("transformers.models.clip")
    images = getattr(module, "CLIPImageProcessorPil", None) or module.CLIPImageProcessor
    processor = transformers.CLIPProcessor(images(image_mean=[0.5] * 3, image_std=[0.25] * 3), made.tokenizer)
    encoder = load_clip(made.model, tokenizer=processor)
    assert encoder.mean == (0.5,) * 3 and encoder.std == (0.25,) * 3
    assert torch.equal(encoder.encode_text(contract.TEXTS), made.load().encode_text(contract.TEXTS))


def test_given_model_stays_as_it_is(tmp_path: Path) -> None:
    made = case("transformers SigLIP", tmp_path)
    made.model.train()
    embedding = made.model.text_model.embeddings.token_embedding
    encoder = made.load(dtype=torch.bfloat16)
    encoder.encode_prompt(torch.zeros(1, 2, 64), "{}")
    assert made.model.training and embedding.weight.dtype == torch.float32 and embedding.weight.requires_grad
    assert type(encoder.model.text_model.embeddings.token_embedding) is torch.nn.Embedding
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision(dtype: torch.dtype, made: Any) -> None:
    full, half = made.load(), made.load(dtype=dtype)
    assert half.dtype == dtype and half.fingerprint == full.fingerprint
    views, context = contract.random_views(full), torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for of in (
            lambda e: e.encode_image(views),
            lambda e: e.encode_text(contract.TEXTS),
            lambda e: e.encode_prompt(context, "a photo of {} ."),
            lambda e: e.encode_dense(views).flatten(2).transpose(1, 2),
        ):
            assert of(half).dtype == torch.float32
            assert F.cosine_similarity(of(half), of(full), dim=-1).min() > 0.98


@pytest.mark.parametrize("kind", ["transformers CLIP", "transformers SigLIP"])
def test_prompts_from_many_threads_are_those_of_one(kind: str, tmp_path: Path) -> None:
    encoder = case(kind, tmp_path).load()
    contexts = [torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(i)) for i in range(48)]
    with torch.no_grad():
        alone = [encoder.encode_prompt(context, "a photo of {} .") for context in contexts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda context: encoder.encode_prompt(context, "a photo of {} .").detach(), contexts))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def test_encoder_is_copied_with_the_refiner(tmp_path: Path) -> None:
    encoder = case("transformers SigLIP", tmp_path).load()
    twin = copy.deepcopy(encoder)
    assert twin.model is not encoder.model
    assert torch.equal(twin.encode_text(["boat"]), encoder.encode_text(["boat"]))


# ------------------------------------------------------------------------------------------------ what is refused


def test_model_without_a_tokenizer(tmp_path: Path) -> None:
    made = case("transformers CLIP", tmp_path)
    with pytest.raises(ClipError, match="needs its tokenizer, and the model does not say where it was loaded from. Pass it"):
        load_clip(made.model)
    made.model.save_pretrained(str(tmp_path / "model"))
    loaded = transformers.CLIPModel.from_pretrained(str(tmp_path / "model"))
    with pytest.raises(ClipError, match="needs its tokenizer, and (none could be read from|that beside the weights has only)"):
        load_clip(loaded)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    made = case("transformers CLIP", tmp_path / "a")
    with pytest.raises(ClipError, match="reads its texts at the token 519, and its tokenizer ends them with 2. Pass"):
        load_clip(made.model, tokenizer=word_tokenizer(tmp_path / "b", "<pad>", "<eos>"))
    siglip = case("transformers SigLIP", tmp_path / "c")
    with pytest.raises(ClipError, match=r"has 20 tokens; its tokenizer gave id \d+ for .*Pass the tokenizer that the model"):
        load_clip(siglip.model, tokenizer=clip_tokenizer(tmp_path / "d"))


def test_old_files_of_clip_say_2_for_the_end_token(tmp_path: Path) -> None:
    """The model then reads a text at its highest id."""
    made = case("transformers CLIP", tmp_path)
    new = made.load()
    made.model.config.text_config.eos_token_id = made.model.text_model.eos_token_id = 2
    old = made.load()
    context = torch.randn(1, 3, 64)
    assert torch.allclose(old.encode_text(contract.TEXTS), new.encode_text(contract.TEXTS), atol=1e-6)
    assert torch.allclose(old.encode_prompt(context, "{}"), new.encode_prompt(context, "{}"), atol=1e-6)
    assert torch.allclose(old.encode_text(contract.TEXTS), made.text(contract.TEXTS), atol=1e-5)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="`tokenizer` must be one of open_clip, or a tokenizer or processor of .*; got str"):
        load_clip(case("transformers CLIP", tmp_path).model, tokenizer="openai/clip")


def test_tokenizer_for_a_clip_that_has_its_own(tiny_clip: Any) -> None:
    with pytest.raises(ValueError, match="`tokenizer` goes with a loaded model of open_clip or transformers"):
        load_clip(tiny_clip, tokenizer=object())


def test_other_models_of_transformers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    with pytest.raises(ClipError, match="must be a CLIPModel, MetaClip2Model, SiglipModel or Siglip2Model; got BertModel"):
        load_clip(model)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ClipError, match="must be a CLIPModel, MetaClip2Model, SiglipModel or Siglip2Model; got bert"):
        load_clip(f"hf:{tmp_path}")
    text = case("transformers CLIP", tmp_path / "clip").model.text_model
    with pytest.raises(ClipError, match="must be a CLIPModel, MetaClip2Model, SiglipModel or Siglip2Model; got CLIPText"):
        load_clip(text)


@pytest.mark.parametrize("kind, tower", [("transformers CLIP", "vision_model"), ("transformers SigLIP", "text_model")])
def test_folder_without_all_weights(kind: str, tower: str, tmp_path: Path) -> None:
    """transformers would fill them at random."""
    made = case(kind, tmp_path / "tokenizer")
    state = {name: value for name, value in made.model.state_dict().items() if not name.startswith(tower)}
    made.model.save_pretrained(str(tmp_path), state_dict=state)
    made.tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ClipError, match=rf"must hold all weights of a .*Model; \d+ are missing .*, such as {tower}\."):
        load_clip(f"hf:{tmp_path}")


def test_folder_with_a_weight_of_another_shape(tmp_path: Path) -> None:
    made = case("transformers CLIP", tmp_path / "tokenizer")
    state = {**made.model.state_dict(), "text_projection.weight": torch.ones(2, 2)}
    made.model.save_pretrained(str(tmp_path), state_dict=state)
    made.tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(ClipError, match="could not be loaded by transformers|must hold all weights of a CLIPModel"):
        load_clip(f"hf:{tmp_path}")


def test_damaged_weights_in_a_folder(tmp_path: Path) -> None:
    made = case("transformers CLIP", tmp_path / "tokenizer")
    made.model.save_pretrained(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ClipError, match="could not be loaded by transformers"):
        load_clip(f"hf:{tmp_path}")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="could not be loaded by transformers .*It must be a name on the Hugging Face hub or"):
        load_clip(f"hf:{tmp_path / 'nowhere'}")


def test_transformers_is_asked_for_but_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ClipError, match="'hf:openai/clip-vit-base-patch32' needs transformers: `pip install transformers`"):
        load_clip("hf:openai/clip-vit-base-patch32")
    assert importlib.util.find_spec("semples_plugin.clip_huggingface") is not None


def test_text_that_is_too_long(tmp_path: Path) -> None:
    encoder = case("transformers SigLIP", tmp_path).load()
    assert encoder.encode_text(["boat " * (CONTEXT - 1)]).shape == (1, 64)
    with pytest.raises(ValueError, match=f"Every text must fit into CLIP's {CONTEXT} tokens"):
        encoder.encode_text(["boat " * CONTEXT])


def test_siglip_without_an_attention_pool_has_no_dense_features(tmp_path: Path) -> None:
    encoder = case("transformers SigLIP", tmp_path).load()
    del encoder.model.vision_model.head
    with pytest.raises(ClipError, match="image tower of type .* without an attention pool; dense features need one"):
        encoder.encode_dense(contract.random_views(encoder))


# ------------------------------------------------------------------------------------------------ cosines below the clamp


def test_log_form_has_no_gradient_below_the_clamp_and_the_linear_form_has(tmp_path: Path) -> None:
    """Cosines of models trained with a sigmoid may be negative: -log c stops at c = 1e-4, and 1 - cos does not."""
    encoder = case("transformers SigLIP", tmp_path).load()
    views = contract.random_views(encoder, 8)
    with torch.no_grad():
        context = torch.randn(64, 2, encoder.context_dim, generator=torch.Generator().manual_seed(0))
        texts = encoder.encode_prompt(context, "a photo of {}")
        cosines = F.cosine_similarity(encoder.encode_image(views)[:, None], texts[None], dim=2)  # (8, 64)
    below = (cosines < losses.COSINE_MIN).nonzero()
    assert 0 < len(below) < cosines.numel()  # a random SigLIP has such pairs, and others
    view, text = below[0].tolist()
    for form, moves in (("log", False), ("linear", True)):
        x = views[view : view + 1].clone().requires_grad_(True)
        losses.match_foreground(encoder.encode_image(x), texts[text : text + 1], form=form).backward()
        assert x.grad is not None and bool(x.grad.abs().max() > 1e-6) is moves
