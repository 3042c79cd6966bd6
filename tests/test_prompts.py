from __future__ import annotations

import copy
import json
import re
from inspect import signature
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from semples_plugin import COCO, VOC, PromptFileError, PromptRefiner, SemplesError
from semples_plugin.prompts import BackgroundPrompts, default_vocabulary, read_vocabulary


@pytest.fixture
def saved(make_refiner: Any, tmp_path: Path) -> Path:
    path = tmp_path / "prompts.safetensors"
    make_refiner(learned=True).save(path)
    return path


def other_clip(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.text_projection += 0.1
    return model


def rewrite(path: Path, **changes: Any) -> None:
    """The same prompt file with other metadata, facts or context; None takes an entry out."""
    with safe_open(str(path), framework="pt") as file:
        metadata, context = dict(file.metadata()), file.get_tensor("context")
    facts = json.loads(metadata["facts"])
    for name, value in changes.items():
        target = metadata if name in metadata else facts
        if name == "context":
            context = value(context)
        elif value is None:
            del target[name]
        else:
            target[name] = value
    if "facts" not in changes:
        metadata["facts"] = json.dumps(facts)
    save_file({"context": context.contiguous()}, str(path), metadata=metadata)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("as_text", [False, True])
def test_round_trip(as_text: bool, make_refiner: Any, make_batch: Any, tmp_path: Path) -> None:
    learned, fresh = make_refiner(learned=True), make_refiner()
    path: Any = str(tmp_path / "p.safetensors") if as_text else tmp_path / "p.safetensors"
    learned.save(path)
    assert fresh.stage == "match"
    assert fresh.load_prompts(path) is fresh and fresh.stage == "refine"
    assert torch.equal(fresh.prompts.context, learned.prompts.context)
    assert torch.equal(fresh.prompt_features(), learned.prompt_features())
    batch = make_batch()
    assert fresh(*batch).item() == learned(*batch).item()
    assert not fresh.prompts.context.requires_grad


def test_load_builds_the_refiner(saved: Path, aligned_clip: nn.Module, make_refiner: Any, make_batch: Any) -> None:
    refiner = PromptRefiner.load(saved, clip=aligned_clip, image_stats=None)
    assert refiner.classes == ["boat", "train", "bird"] and refiner.stage == "refine"
    assert refiner.prompts.context.shape == (3, 1, 4, 64)
    batch = make_batch()
    assert refiner(*batch).item() == make_refiner().load_prompts(saved)(*batch).item()


def test_load_restores_prompt_names_and_templates(make_refiner: Any, aligned_clip: nn.Module, tmp_path: Path) -> None:
    names = {"boat": "boat", "person": "player", "naïve café": "coffee house"}
    options = {"text_template": "a picture of the {}", "prompt_template": "seen with {}"}
    first = make_refiner(names, learned=True, **options)
    first.save(tmp_path / "p.safetensors")
    second = PromptRefiner.load(tmp_path / "p.safetensors", clip=aligned_clip)
    assert (second.classes, second.prompt_names) == (list(names), list(names.values()))
    assert (second.config.text_template, second.config.prompt_template) == tuple(options.values())
    assert torch.equal(second.prompt_features(), first.prompt_features())


def test_a_file_of_another_length_counts(saved: Path, make_refiner: Any) -> None:
    refiner = make_refiner(prompt_length=7).load_prompts(saved)
    assert refiner.prompts.context.shape == (3, 1, 4, 64)
    assert torch.equal(refiner.prompt_features(), make_refiner().load_prompts(saved).prompt_features())
    assert not refiner.prompts.context.requires_grad


def test_file_holds_prompts_and_facts_but_no_clip_weight(saved: Path, make_refiner: Any) -> None:
    with safe_open(str(saved), framework="pt") as file:
        assert list(file.keys()) == ["context"]
        facts = json.loads(file.metadata()["facts"])
    assert facts == {
        "alive": [[True], [True], [True]],
        "classes": ["boat", "train", "bird"],
        "prompt_names": ["boat", "train", "bird"],
        "clip": "CLIP",
        "clip_fingerprint": make_refiner().encoder.fingerprint,
        "config": VOC.replace(prompt_length=4, image_stats=None).as_dict(),
    }
    assert saved.stat().st_size < 3 * 4 * 64 * 4 + 2500


def test_load_restores_the_configuration(make_refiner: Any, make_batch: Any, aligned_clip: nn.Module, tmp_path: Path) -> None:
    changed: Dict[str, Any] = {
        "image_stats": ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1)), "eps": 0.25, "lambda_area": 1.5, "lambda_b": 0.5,
        "lambda_refine": 2.0,
        "repel": "log1m", "background_channel": True, "max_views": 7, "background_texts": ("a photo of water.",),
        "lambda_background_texts": 0.5, "seed": 3, "clusters": {"vehicles": ["boat", "train"], "animals": ["bird"]},
    }  # fmt: skip
    first = make_refiner(learned=True, config=COCO, **changed)
    first.save(tmp_path / "p.safetensors")
    second = PromptRefiner.load(tmp_path / "p.safetensors", clip=aligned_clip)
    assert second.config.as_dict() == first.config.as_dict() == COCO.replace(prompt_length=4, **changed).as_dict()
    img, cam, labels = make_batch()
    img = (img - torch.tensor(changed["image_stats"][0]).view(3, 1, 1)) / torch.tensor(changed["image_stats"][1]).view(3, 1, 1)
    assert torch.equal(second(img, cam, labels), first(img, cam, labels))
    third = PromptRefiner.load(tmp_path / "p.safetensors", clip=aligned_clip, lambda_area=0.0)
    assert third.config.as_dict() == {**first.config.as_dict(), "lambda_area": 0.0}
    with pytest.raises(TypeError, match="no option 'lambda_aera'; did you mean 'lambda_area'"):
        PromptRefiner.load(tmp_path / "p.safetensors", clip=aligned_clip, lambda_aera=0.0)


def test_nothing_to_save_yet(make_refiner: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no prompts to save yet. Call fit_prompts\(...\) first"):
        make_refiner().save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_failed_save_leaves_no_partial_file(make_refiner: Any, tmp_path: Path) -> None:
    refiner = make_refiner(learned=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # a folder cannot be replaced by a file
        refiner.save(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_save_replaces_an_older_file(saved: Path, make_refiner: Any) -> None:
    second = make_refiner(learned=True, seed=5)
    second.save(saved)
    assert torch.equal(make_refiner().load_prompts(saved).prompts.context, second.prompts.context)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


MISFITS = {
    "other classes": ({"names": ["boat", "train", "sheep"]}, "other classes: number 2 is 'bird' in the file and 'sheep' here"),
    "other order": ({"names": ["train", "boat", "bird"]}, "other classes: number 0 is 'boat' in the file and 'train' here"),
    "fewer classes": ({"names": ["boat", "train"]}, "other classes: the file has 3, this refiner 2"),
    "other prompt names": (
        {"names": {"boat": "ship", "train": "train", "bird": "bird"}},
        "other prompt names: number 0 is 'boat' in the file and 'ship' here",
    ),
    "other text template": ({"text_template": "a {}"}, r"other templates: number 0 is 'a photo of a \{\}.' in the file"),
    "other prompt template": ({"prompt_template": "{}"}, r"other templates: number 1 is 'a photo of \{\} .' in the file"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_prompts_of_another_set_up(name: str, saved: Path, make_refiner: Any) -> None:
    options, message = MISFITS[name]
    refiner = make_refiner(**options)
    with pytest.raises(PromptFileError, match=message):
        refiner.load_prompts(saved)
    assert refiner.stage == "match"


def test_prompts_of_another_clip(saved: Path, aligned_clip: nn.Module, make_refiner: Any) -> None:
    refiner = make_refiner(clip=other_clip(aligned_clip))
    message = rf"other CLIP weights: number 0 is 'CLIP \[{make_refiner().encoder.fingerprint}\]' in the file and 'CLIP \["
    with pytest.raises(PromptFileError, match=message):
        refiner.load_prompts(saved)
    with pytest.raises(PromptFileError, match="other CLIP weights"):
        PromptRefiner.load(saved, clip=refiner.encoder)


def keep(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)]) and None


DAMAGE = {
    "cut in the middle": (keep(0.5), "is damaged or no safetensors file"),
    "cut at the end": (keep(0.99), "is damaged or no safetensors file"),
    "cut in the header": (keep(0.01), "is damaged or no safetensors file"),
    "empty": (keep(0), "is damaged or no safetensors file"),
    "a text file": (lambda path: path.write_text("boat, train, bird\n") and None, "is damaged or no safetensors file"),
    "foreign safetensors": (
        lambda path: save_file({"weight": torch.rand(3, 4)}, str(path)),
        "is a safetensors file, but not one of prompts: expected format 'semples-plugin prompts' and a tensor `context`; "
        "got format None",
    ),
    "foreign safetensors with a context": (
        lambda path: save_file({"context": torch.rand(3, 4, 64)}, str(path), metadata={"format": "pt"}),
        "not one of prompts: .* got format 'pt'",
    ),
    "an earlier format": (lambda path: rewrite(path, version="1"), "has prompt format '1'; this version reads 3"),
    "facts missing": (lambda path: rewrite(path, facts=None), "lacks its class names or settings"),
    "facts unreadable": (lambda path: rewrite(path, facts="{"), "lacks its class names or settings"),
    "classes missing": (lambda path: rewrite(path, classes=None), "lacks its class names or settings"),
    "configuration missing": (lambda path: rewrite(path, config=None), "lacks its class names or settings"),
    "unknown option": (lambda path: rewrite(path, config={"zzz": 1}), "lacks its class names or settings .*no option 'zzz'"),
    "wrong option": (
        lambda path: rewrite(path, config={"eps": -1}),
        "lacks its class names or settings .*`eps` must be at least",
    ),
    "a class too few": (lambda path: rewrite(path, context=lambda c: c[:2]), r"context \(2, 1, 4, 64\) for 3 classes"),
    "wrong rank": (lambda path: rewrite(path, context=lambda c: c[:, 0]), r"context \(3, 4, 64\) for 3 classes"),
    "NaN": (lambda path: rewrite(path, context=lambda c: c.index_fill(2, torch.tensor(1), float("nan"))), "not finite"),
    "inf": (lambda path: rewrite(path, context=lambda c: c / 0), "not finite"),
    "prompt flags missing": (lambda path: rewrite(path, alive=None), "lacks its class names or settings"),
    "prompt flags of another number": (
        lambda path: rewrite(path, alive=[[True, True]] * 3),
        r"damaged: `alive` must hold 1 values of true or false for each of 3 classes; got \[\[True, True\]",
    ),
    "prompt flags of another kind": (lambda path: rewrite(path, alive=[[1], [1], [0]]), r"`alive` must hold 1 values"),
    "prompt flags no table": (lambda path: rewrite(path, alive=True), r"`alive` must hold 1 values .* got True"),
    "other token size": (lambda path: rewrite(path, context=lambda c: c[..., :32]), "other CLIP token size: .*'32'.*'64'"),
}


@pytest.mark.parametrize("start", ["match", "refine"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_or_foreign_file_changes_nothing(name: str, start: str, saved: Path, make_refiner: Any) -> None:
    damage, message = DAMAGE[name]
    refiner = make_refiner(learned=start == "refine", seed=3)
    before = {key: value.clone() for key, value in refiner.state_dict().items()}
    features = refiner.prompt_features().clone()
    damage(saved)
    with pytest.raises(PromptFileError, match=message) as error:
        refiner.load_prompts(saved)
    assert saved.name in str(error.value)
    assert refiner.stage == start
    assert all(torch.equal(value, before[key]) for key, value in refiner.state_dict().items())
    assert torch.equal(refiner.prompt_features(), features)


def test_missing_file(make_refiner: Any, tmp_path: Path) -> None:
    for call in (make_refiner().load_prompts, PromptRefiner.load):
        with pytest.raises(FileNotFoundError, match=r"No prompt file at .*none.safetensors. Write one with refiner.save"):
            call(tmp_path / "none.safetensors")


def test_prompt_file_error_is_a_value_error() -> None:
    assert issubclass(PromptFileError, ValueError) and issubclass(PromptFileError, SemplesError)


# ------------------------------------------------------------------------------------------------ cached features


def test_features_follow_every_change_of_the_prompts(saved: Path, make_refiner: Any, padded_prompt: Callable) -> None:
    refiner = make_refiner()

    def check() -> None:
        context = refiner.prompts.context
        expected = torch.stack([padded_prompt(refiner.encoder.model, c) for c in context[:, 0]])[:, None]
        assert torch.allclose(refiner.prompt_features(), expected, rtol=1e-5, atol=1e-5)

    check()
    refiner.load_prompts(saved)
    check()
    refiner.load_state_dict(make_refiner(learned=True, seed=8).state_dict())
    check()
    with torch.no_grad():
        refiner.prompts.context.mul_(0.5)
    check()
    refiner.prompts.reset()
    check()


def test_features_of_a_copy_follow_its_own_prompts(make_refiner: Any) -> None:
    first, other = make_refiner(), make_refiner(learned=True, seed=8)
    first.prompt_features()
    second = copy.deepcopy(first)
    second.load_state_dict(other.state_dict())
    assert torch.equal(second.prompt_features(), other.prompt_features())


@pytest.mark.skipif("assign" not in signature(nn.Module.load_state_dict).parameters, reason="this torch cannot assign")
def test_features_follow_assigned_state_dicts(make_refiner: Any) -> None:
    refiner = make_refiner()
    for seed in (8, 9):
        other = make_refiner(learned=True, seed=seed)
        refiner.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
        assert torch.equal(refiner.prompt_features(), other.prompt_features())


# ------------------------------------------------------------------------------------------------ initial values


def test_initial_values() -> None:
    uniform = BackgroundPrompts(40, 30, 64)
    assert uniform.context.min() >= 0 and uniform.context.max() < 1
    assert uniform.context.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.context.std().item() == pytest.approx(12**-0.5, rel=0.02)


def test_initial_values_follow_the_seed() -> None:
    a, b, c = BackgroundPrompts(2, 3, 4, seed=1), BackgroundPrompts(2, 3, 4, seed=1), BackgroundPrompts(2, 3, 4, seed=2)
    assert torch.equal(a.context, b.context) and not torch.equal(a.context, c.context)
    with torch.no_grad():
        a.context.zero_()
        a.learned.fill_(True)
    a.reset()
    assert torch.equal(a.context, b.context) and not a.learned


# ------------------------------------------------------------------------------------------------ reading


def test_reading_equals_direct_computation(make_refiner: Any, padded_text: Callable, padded_prompt: Callable) -> None:
    refiner = make_refiner(learned=True)
    model, words = refiner.encoder.model, ["water", "railway", "sky", "snow", "a small pier", "sand"]
    readings = refiner.nearest_words(words, top=4)
    assert [r.name for r in readings] == ["boat", "train", "bird"]
    for k, reading in enumerate(readings):
        u_b = padded_prompt(model, refiner.prompts.context[k, 0]).detach()
        direct = {w: F.cosine_similarity(padded_text(model, f"a photo of {w}."), u_b, dim=0).item() for w in words}
        nearest = sorted(words, key=lambda w: -direct[w])[:4]
        assert [word for word, _ in reading.words] == nearest
        assert [s for _, s in reading.words] == pytest.approx([direct[w] for w in nearest], abs=1e-5)
        own = F.cosine_similarity(padded_text(model, f"a photo of a {reading.name}."), u_b, dim=0).item()
        assert reading.class_similarity == pytest.approx(own, abs=1e-5)


def test_reading_prints_as_a_line(make_refiner: Any) -> None:
    reading = make_refiner(learned=True).nearest_words(["water"], top=3)[0]
    ((word, similarity),) = reading.words
    assert str(reading) == f"boat (cos to class {reading.class_similarity:.2f}): water {similarity:.2f}"


def test_reading_with_the_default_vocabulary(make_refiner: Any) -> None:
    for reading in make_refiner(learned=True).nearest_words():
        similarities = [s for _, s in reading.words]
        assert len(reading.words) == 5 and {w for w, _ in reading.words} <= set(default_vocabulary())
        assert similarities == sorted(similarities, reverse=True)


def test_nothing_to_read(make_refiner: Any) -> None:
    with pytest.raises(ValueError, match=r"no prompts to read yet. Call fit_prompts\(...\) or load_prompts\(path\) first"):
        make_refiner().nearest_words()
    with pytest.raises(ValueError, match="`vocabulary` must hold at least one word; got none"):
        make_refiner(learned=True).nearest_words([])


def test_default_vocabulary() -> None:
    words = default_vocabulary()
    assert len(words) > 100 and len(set(words)) == len(words)
    assert all(re.fullmatch(r"[a-z]+( [a-z]+){0,2}", word) for word in words)
    assert {"water", "sky", "grass", "snow"} <= set(words)


def test_vocabulary_file_holds_no_word_twice() -> None:
    path = Path(__import__("semples_plugin").__file__).with_name("vocabulary.txt")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines == default_vocabulary()


def test_vocabulary_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# places\nwater\n\n  sky \nwater\n", encoding="utf-8")
    assert read_vocabulary(path) == ["water", "sky"]


def test_prompts_learned_on_other_views_are_refused(make_refiner: Any, tmp_path: Path) -> None:
    make_refiner(learned=True, clip_stats=False).save(tmp_path / "p.safetensors")
    with pytest.raises(PromptFileError, match="image statistics for CLIP: number 0 is 'clip_stats=False' in the file"):
        make_refiner().load_prompts(tmp_path / "p.safetensors")
