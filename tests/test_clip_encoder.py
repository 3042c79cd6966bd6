from __future__ import annotations

import copy
import importlib.util
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import ClipError, PromptRefiner
from semples_plugin.clip_backends import CLIP_MEAN, CLIP_STD, OpenAIClip, load_clip, openai_clip_module
from semples_plugin.clip_encoder import ClipEncoder

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
TEXTS = ["a photo of a boat.", "water"]


@pytest.fixture
def views() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def in_half(model: nn.Module) -> nn.Module:
    """The weights rounded as OpenAI publishes them."""
    return copy.deepcopy(model).half().float()


def similar(a: ClipEncoder, b: ClipEncoder, views: Tensor, tolerance: float = 1e-5) -> bool:
    return all(
        torch.allclose(x, y, rtol=tolerance, atol=tolerance)
        for x, y in (
            (a.encode_image(views), b.encode_image(views)),
            (a.encode_text(TEXTS), b.encode_text(TEXTS)),
            (a.encode_dense(views), b.encode_dense(views)),
        )
    )


# ------------------------------------------------------------------------------------------------ loading


def test_facts_of_an_object(tiny_clip: nn.Module) -> None:
    encoder = load_clip(tiny_clip)
    assert isinstance(encoder, OpenAIClip) and encoder.name == "CLIP"
    assert (encoder.image_size, encoder.embed_dim, encoder.context_dim, encoder.context_length) == (32, 32, 64, 77)
    assert (encoder.mean, encoder.std) == (CLIP_MEAN, CLIP_STD)
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert encoder.max_prompt_length("a photo of {} .") == 71 and encoder.max_prompt_length("{}") == 75
    assert encoder.id == f"CLIP [{encoder.fingerprint}]" and len(encoder.fingerprint) == 16
    assert not any(p.requires_grad for p in encoder.model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_state_dict_file(as_text: bool, wrapped: bool, tiny_clip: nn.Module, tmp_path: Path, views: Tensor) -> None:
    path = tmp_path / "tiny.pt"
    state = copy.deepcopy(tiny_clip).half().state_dict()
    torch.save({"state_dict": state} if wrapped else state, path)
    encoder = load_clip(str(path) if as_text else path)
    assert encoder.name == "tiny.pt" and encoder.dtype == torch.float32
    assert similar(encoder, load_clip(in_half(tiny_clip)), views)
    assert encoder.fingerprint == load_clip(tiny_clip).fingerprint


@pytest.mark.parametrize("width, warns", [(512, True), (64, False)])
def test_state_dict_of_a_published_size_may_be_of_open_clip(width: int, warns: bool, tmp_path: Path) -> None:
    """QuickGELU or GELU: a state dict does not say which."""
    model = openai_clip_module("model").CLIP(32, 32, 1, 64, 8, 77, 49408, width, width // 64, 1)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_clip(tmp_path / "clip.pt")
    found = [str(one.message) for one in seen if "QuickGELU" in str(one.message)]
    assert len(found) == warns and all("load it as 'open_clip:<architecture>/" in one for one in found)


def test_resnet_state_dict_file(tiny_resnet_clip: nn.Module, tmp_path: Path) -> None:
    torch.save(copy.deepcopy(tiny_resnet_clip).half().state_dict(), tmp_path / "rn.pt")
    encoder = load_clip(tmp_path / "rn.pt")
    assert encoder.image_size == 64
    assert similar(encoder, load_clip(in_half(tiny_resnet_clip)), torch.randn(2, 3, 64, 64), 1e-4)


def test_float32_state_dict_file_keeps_its_precision(tiny_clip: nn.Module, tmp_path: Path, views: Tensor) -> None:
    torch.save(tiny_clip.state_dict(), tmp_path / "tiny.pt")
    assert similar(load_clip(tmp_path / "tiny.pt"), load_clip(tiny_clip), views)


def test_torchscript_archive(tiny_clip: nn.Module, tmp_path: Path, views: Tensor) -> None:
    model = in_half(tiny_clip)
    tokens = torch.tensor([[49406, 320, 49407] + [0] * 74])
    torch.jit.trace(model, (views[:1], tokens), check_trace=False).save(str(tmp_path / "archive.pt"))
    encoder = load_clip(tmp_path / "archive.pt")
    assert encoder.name == "archive.pt"
    assert similar(encoder, load_clip(model), views)


def test_refiner_from_a_file_learns_and_reloads(tiny_clip: nn.Module, tmp_path: Path, make_batch: Any) -> None:
    torch.save(copy.deepcopy(tiny_clip).half().state_dict(), tmp_path / "tiny.pt")
    img, cam, labels = make_batch()
    refiner = PromptRefiner(["boat", "train", "bird"], clip=tmp_path / "tiny.pt", image_stats=None, prompt_length=4)
    refiner.fit_prompts([(img, labels)], lambda _: cam, epochs=1, progress=False)
    refiner.save(tmp_path / "p.safetensors")
    other = PromptRefiner(["boat", "train", "bird"], clip=in_half(tiny_clip), image_stats=None)
    assert other.load_prompts(tmp_path / "p.safetensors")(img, cam, labels).item() == pytest.approx(
        refiner(img, cam, labels).item(), rel=1e-5
    )


def test_encoder_is_returned_as_it_is(tiny_clip: nn.Module) -> None:
    encoder = load_clip(tiny_clip)
    assert load_clip(encoder) is encoder


def test_fingerprint_tells_models_apart(tiny_clip: nn.Module) -> None:
    other = copy.deepcopy(tiny_clip)
    with torch.no_grad():
        other.text_projection[0, 0] += 0.5
    assert load_clip(other).fingerprint != load_clip(tiny_clip).fingerprint
    assert load_clip(copy.deepcopy(tiny_clip).half()).fingerprint == load_clip(tiny_clip).fingerprint


# ------------------------------------------------------------------------------------------------ the installed `clip`


def forget_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "clip" or n.startswith("clip.")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()


def without_openai_clip(monkeypatch: pytest.MonkeyPatch, *before: Path) -> None:
    others = [p for p in sys.path if not (Path(p) / "clip").exists()]
    monkeypatch.setattr(sys, "path", [*map(str, before), *others])


@pytest.mark.parametrize("kind", ["package", "module"])
def test_a_clip_of_a_host_before_openais(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hosts bring a package `clip` of their own; theirs stays theirs, and ours is OpenAI's."""
    file = tmp_path / "clip.py" if kind == "module" else tmp_path / "clip" / "model.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("raise RuntimeError('must not be run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_clip(monkeypatch)
    module = openai_clip_module.__wrapped__("model")
    assert hasattr(module, "CLIP") and not str(module.__file__).startswith(str(tmp_path)) and "clip" not in sys.modules


def test_foreign_clip_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_openai_clip(monkeypatch, tmp_path)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("raise RuntimeError('must not be run')\n")
    forget_clip(monkeypatch)
    with pytest.raises(ClipError, match=r"the `clip` in .* has no model.py \(PyPI's `clip` is another project\).*openai-clip"):
        openai_clip_module.__wrapped__("model")  # past the cache


def test_foreign_clip_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_openai_clip(monkeypatch, tmp_path)
    (tmp_path / "clip.py").write_text("raise RuntimeError('must not be run')\n")
    forget_clip(monkeypatch)
    with pytest.raises(ClipError, match="OpenAI's `clip` package was expected; .* Install OpenAI's: `pip install openai-clip`"):
        openai_clip_module.__wrapped__("model")


def test_no_clip_package(monkeypatch: pytest.MonkeyPatch) -> None:
    without_openai_clip(monkeypatch)
    forget_clip(monkeypatch)
    with pytest.raises(ClipError, match="OpenAI's `clip` package was expected; none is installed. Install OpenAI's: `pip"):
        openai_clip_module.__wrapped__("model")


def test_parts_of_clip_are_loaded_once() -> None:
    assert openai_clip_module("model").__name__ == "clip.model"
    assert openai_clip_module("model") is openai_clip_module("model")
    assert hasattr(openai_clip_module("simple_tokenizer"), "SimpleTokenizer")


# ------------------------------------------------------------------------------------------------ texts


def test_tokens(tiny_clip: nn.Module) -> None:
    encoder = load_clip(tiny_clip)
    assert encoder.tokenize(["a photo of a cat"]) == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    assert encoder.tokenize(["", "CAT "]) == [[49406, 49407], [49406, 2368, 49407]]
    assert encoder.encode_text([]).shape == (0, 32)


def test_text_that_just_fits_and_one_that_does_not(tiny_clip: nn.Module, padded_text: Callable) -> None:
    encoder = load_clip(tiny_clip)
    longest = "cat " * 75
    assert len(encoder.tokenize([longest])[0]) == 77
    assert torch.allclose(encoder.encode_text([longest])[0], padded_text(tiny_clip, longest), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Every text must fit into CLIP's 77 tokens; 'cat cat .*'... needs 78, so"):
        encoder.encode_text(["dog", "cat " * 76])


def test_chunks_of_texts(tiny_clip: nn.Module) -> None:
    encoder = load_clip(tiny_clip)
    texts = ["boat", "a small train on a bridge", "bird", "sky", "a"]
    assert torch.allclose(encoder.encode_text(texts, chunk=2), encoder.encode_text(texts), atol=1e-6)


@pytest.mark.parametrize("template", ["{}", "{} on a photo", "a photo of {} ."])
def test_prompt_made_of_word_embeddings_is_the_text(template: str, tiny_clip: nn.Module) -> None:
    encoder = load_clip(tiny_clip)
    words = ["red boat", "old train"]
    context = torch.stack([tiny_clip.token_embedding(torch.tensor(encoder.token_ids(word))) for word in words])
    got = encoder.encode_prompt(context.detach(), template)
    assert torch.allclose(got, encoder.encode_text([template.replace("{}", word) for word in words]), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("kind", ["tiny_clip", "tiny_resnet_clip"])
def test_bfloat16_weights_stay_close(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    full, half = load_clip(model), load_clip(model, dtype=torch.bfloat16)
    views = torch.randn(3, 3, full.image_size, full.image_size, generator=torch.Generator().manual_seed(0))
    assert half.dtype == torch.bfloat16
    context = torch.rand(2, 4, 64, generator=torch.Generator().manual_seed(0))
    for got, expected in (
        (half.encode_image(views), full.encode_image(views)),
        (half.encode_text(TEXTS), full.encode_text(TEXTS)),
        (half.encode_prompt(context, "a photo of {} ."), full.encode_prompt(context, "a photo of {} .")),
        (half.encode_dense(views).flatten(1), full.encode_dense(views).flatten(1)),
    ):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got, expected).min() > 0.998


def test_refiner_with_bfloat16_clip(make_refiner: Any, make_batch: Any) -> None:
    full, half = make_refiner(learned=True), make_refiner(clip_dtype=torch.bfloat16)
    half.load_state_dict(full.state_dict())
    img, cam, labels = make_batch()
    losses: Dict[str, Tensor] = {"full": full(img, cam, labels), "half": half(img, cam, labels)}
    assert losses["half"].dtype == half.text_features.dtype == torch.float32
    assert losses["half"].item() == pytest.approx(losses["full"].item(), rel=0.02)
    grads = [torch.autograd.grad(loss, cam)[0].flatten() for loss in losses.values()]
    assert F.cosine_similarity(grads[0], grads[1], dim=0) > 0.9


# ------------------------------------------------------------------------------------------------ open_clip


def tiny_open_clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.model.CLIP(
            embed_dim=32,
            vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
            text_cfg={"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
        ).eval()


def test_open_clip_object(views: Tensor) -> None:
    model = tiny_open_clip()
    encoder = load_clip(model)
    assert (encoder.image_size, encoder.embed_dim, encoder.context_dim, encoder.context_length) == (32, 32, 64, 77)
    with torch.no_grad():
        assert torch.allclose(encoder.encode_image(views), model.encode_image(views), atol=1e-5)
        ids = torch.tensor([row + [0] * (77 - len(row)) for row in encoder.tokenize(TEXTS)])
        assert torch.allclose(encoder.encode_text(TEXTS), model.encode_text(ids), atol=1e-5)
    assert encoder.encode_dense(views).shape == (3, 32, 4, 4)


def test_open_clip_trains_a_host(make_batch: Any) -> None:
    refiner = PromptRefiner(["boat", "train", "bird"], clip=tiny_open_clip(), image_stats=None, prompt_length=4)
    img, cam, labels = make_batch()
    fit = refiner.fit_prompts([(img, labels)], lambda _: cam, epochs=3, lr=0.1, progress=False)
    assert fit.losses[-1] < fit.losses[0]
    refiner(img, cam, labels).backward()
    assert cam.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_open_clip_takes_the_asked_precision(dtype: torch.dtype, views: Tensor, make_batch: Any) -> None:
    full, half = load_clip(tiny_open_clip()), load_clip(tiny_open_clip(), dtype=dtype)
    assert half.dtype == dtype and half.fingerprint == full.fingerprint
    with torch.no_grad():
        for a, b in zip(_features(full, views), _features(half, views)):
            assert b.dtype == torch.float32 and not torch.equal(a, b)
            assert F.cosine_similarity(a, b, dim=-1).min() > 0.99
    refiner = PromptRefiner(["boat", "train", "bird"], tiny_open_clip(), image_stats=None, prompt_length=4, clip_dtype=dtype)
    img, cam, labels = make_batch()
    refiner(img, cam, labels).backward()
    assert refiner.encoder.dtype == dtype and cam.grad.isfinite().all()


def _features(encoder: Any, views: Tensor) -> List[Tensor]:
    return [encoder.encode_image(views), encoder.encode_text(TEXTS), encoder.encode_dense(views).flatten(2).transpose(1, 2)]


def test_text_tower_without_positions_is_refused(tiny_clip: nn.Module) -> None:
    model = copy.deepcopy(tiny_clip)
    del model.positional_embedding
    with pytest.raises(ClipError, match="text tower of type CLIP without positional_embedding; .* Use a CLIP that has one"):
        load_clip(model)


def test_open_clip_is_asked_for_but_missing() -> None:
    if importlib.util.find_spec("open_clip") is not None:
        pytest.skip("open_clip is installed")
    with pytest.raises(ClipError, match="'open_clip:ViT-B-32/laion2b' needs open_clip: `pip install open_clip_torch`"):
        load_clip("open_clip:ViT-B-32/laion2b")


def test_a_shared_encoder_of_another_precision_is_refused(tiny_clip: nn.Module) -> None:
    shared = load_clip(tiny_clip)
    assert PromptRefiner(["boat"], shared).encoder is shared
    with pytest.raises(ValueError, match="`clip_dtype` must be that of the ClipEncoder, .* torch.float32; got torch.bfloat16"):
        PromptRefiner(["boat"], shared, clip_dtype=torch.bfloat16)


def test_dense_features_from_many_threads_are_those_of_one(aligned_clip: nn.Module, tiny_resnet_clip: nn.Module) -> None:
    for model, size in ((aligned_clip, 32), (tiny_resnet_clip, 64)):
        encoder = load_clip(model)
        views = [torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(48)]
        alone = [encoder.encode_dense(v) for v in views]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(encoder.encode_dense, views))
        assert all(torch.equal(a, b) for a, b in zip(alone, together))
