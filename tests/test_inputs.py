"""Hostile input: what is refused, and that the message says what was expected, what came, and what to do."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from semples_plugin import COCO, VOC, ClipError, DetachedCamError, PromptRefiner, SemplesError
from semples_plugin.clip_backends import load_clip
from semples_plugin.config import config_for

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def spoiled(value: Tensor, number: float) -> Tensor:
    value = value.detach().clone()
    value.view(-1)[5] = number
    return value.requires_grad_(True)


BATCHES: Dict[str, Tuple[Callable[..., Any], type, str]] = {
    # name -> what happens to the batch, the error, its text
    "NaN in cam": (lambda i, c, y: (i, spoiled(c, float("nan")), y), ValueError, "`cam` must be finite; got NaN or inf"),
    "inf in cam": (lambda i, c, y: (i, spoiled(c, float("inf")), y), ValueError, "`cam` must be finite; .* sqrt at 0"),
    "-inf in cam": (lambda i, c, y: (i, spoiled(c, -float("inf")), y), ValueError, "`cam` must be finite"),
    "NaN in img": (lambda i, c, y: (spoiled(i, float("nan")), c, y), ValueError, "`img` must be finite; .* data pipeline"),
    "inf in img": (lambda i, c, y: (spoiled(i, float("inf")), c, y), ValueError, "`img` must be finite"),
    "-inf in img": (lambda i, c, y: (spoiled(i, -float("inf")), c, y), ValueError, "`img` must be finite"),
    "label 2": (lambda i, c, y: (i, c, 2 * y), ValueError, "`labels` must be 0 or 1; got values such as 2"),
    "label -1": (lambda i, c, y: (i, c, -y), ValueError, "`labels` must be 0 or 1; got values such as -1"),
    "label 255": (lambda i, c, y: (i, c, 255 * y), ValueError, "such as 255. .* turn ignore labels into 0 or 1 first"),
    "labels of a mixup": (
        lambda i, c, y: (i, c, 0.5 * y),
        ValueError,
        "`labels` must be 0 or 1; got values such as 0.5. .* mixup",
    ),
    "nearly smoothed labels": (
        lambda i, c, y: (i, c, 0.75 * y),
        ValueError,
        "`labels` must be 0 or 1; got values such as 0.75",
    ),
    "NaN label": (lambda i, c, y: (i, c, y / y), ValueError, "`labels` must be 0 or 1; got values such as nan"),
    "class indices": (
        lambda i, c, y: (i, c, torch.tensor([0, 2])),
        ValueError,
        r"`labels` must be multi-hot of shape \(B, C\) = \(2, 3\); got \(2,\). These look like class indices; "
        r"use torch.nn.functional.one_hot\(labels, 3\)",
    ),
    "labels with background": (
        lambda i, c, y: (i, c, torch.cat([torch.ones(2, 1, dtype=y.dtype), y], 1)),
        ValueError,
        r"got \(2, 4\). If column 0 is background, pass labels.reshape\(len\(labels\), -1\)\[:, 1:\]",
    ),
    "labels of higher rank": (lambda i, c, y: (i, c, y[:, :, None, None]), ValueError, r"Pass labels.reshape\(2, 3\)"),
    "labels transposed": (lambda i, c, y: (i, c, y.T), ValueError, r"must be multi-hot of shape .* got \(3, 2\)"),
    "too few labels": (lambda i, c, y: (i, c, y[:1]), ValueError, r"must be multi-hot of shape .* got \(1, 3\)"),
    "cam with background": (
        lambda i, c, y: (i, torch.cat([c[:, :1], c], 1), y),
        ValueError,
        r"`cam` must have shape \(B, C, h, w\) with B = 2 and C = 3 classes; got \(2, 4, 8, 8\). "
        r"If channel 0 is background, pass cam\[:, 1:\] or build PromptRefiner\(..., background_channel=True\)",
    ),
    "cam of other classes": (lambda i, c, y: (i, c[:, :2], y), ValueError, r"and C = 3 classes; got \(2, 2, 8, 8\)\.$"),
    "cam of other batch": (lambda i, c, y: (i, c[:1], y), ValueError, r"with B = 2 and C = 3 classes; got \(1, 3, 8, 8\)"),
    "token cam": (
        lambda i, c, y: (i, c.flatten(2).transpose(1, 2), y),
        ValueError,
        r"got \(2, 64, 3\). Token or patch CAMs \(B, N, C\) become maps with cam.transpose\(1, 2\).reshape\(B, C, h, w\)",
    ),
    "cam without pixels": (lambda i, c, y: (i, c[..., :0], y), ValueError, r"`cam` must have shape .* got \(2, 3, 8, 0\)"),
    "grey img": (lambda i, c, y: (i[:, :1], c, y), ValueError, r"`img` must have shape \(B, 3, H, W\); got \(2, 1, 40, 40\)"),
    "single img": (lambda i, c, y: (i[0], c, y), ValueError, r"`img` must have shape \(B, 3, H, W\); got \(3, 40, 40\)"),
    "channels last": (lambda i, c, y: (i.permute(0, 2, 3, 1), c, y), ValueError, r"`img` must have shape .* \(2, 40, 40, 3\)"),
    "empty batch": (
        lambda i, c, y: (i[:0], c[:0], y[:0]),
        ValueError,
        "`img` must hold at least one image; got an empty batch. Skip empty batches in your loader",
    ),
    "integer cam": (
        lambda i, c, y: (i, c.detach().round().long(), y),
        TypeError,
        "`cam` must be of a float dtype; got torch.int64. A CAM of whole numbers carries no gradient",
    ),
    "integer img": (
        lambda i, c, y: ((255 * i).byte(), c, y),
        TypeError,
        r"`img` must be of a float dtype; got torch.uint8. Convert with img.float\(\) / 255",
    ),
    "img in 0..255": (
        lambda i, c, y: (255 * i, c, y),
        ValueError,
        r"`img` must be in \[0, 1\]; its values run from 0.\d\d to 25\d.\d\d instead of 0 to 1. "
        r"Divide 0..255 images by 255, .*image_stats=\(mean, std\)",
    ),
    "img normalized after all": (
        lambda i, c, y: ((i - 0.5) / 0.25, c, y),
        ValueError,
        r"`img` must be in \[0, 1\]; its values run from -2.00 to [12].\d\d instead of 0 to 1",
    ),
    "detached cam": (lambda i, c, y: (i, c.detach(), y), DetachedCamError, r"`cam` must require grad; .* detach\(\)"),
    "numpy img": (
        lambda i, c, y: (i.numpy(), c, y),
        TypeError,
        r"`img` must be a torch.Tensor; got ndarray. Use torch\.",
    ),
    "numpy cam": (lambda i, c, y: (i, c.detach().numpy(), y), TypeError, "`cam` must be a torch.Tensor; got ndarray"),
    "numpy labels": (lambda i, c, y: (i, c, y.numpy()), TypeError, "`labels` must be a torch.Tensor; got ndarray"),
    "list of labels": (lambda i, c, y: (i, c, y.tolist()), TypeError, "`labels` must be a torch.Tensor; got list"),
    "dictionary of cams": (lambda i, c, y: (i, {0: c}, y), TypeError, "`cam` must be a torch.Tensor; got dict"),
    "cam on another device": (
        lambda i, c, y: (i, torch.rand(2, 3, 8, 8, device="meta", requires_grad=True), y),
        ValueError,
        r"must be on one device; got `img` on cpu, `cam` on meta, `labels` on cpu. Move them with .to\(cam.device\)",
    ),
    "img on another device": (
        lambda i, c, y: (i.to("meta"), c, y),
        ValueError,
        "got `img` on meta, `cam` on cpu, `labels`",
    ),
    "labels on another device": (lambda i, c, y: (i, c, y.to("meta")), ValueError, "`cam` on cpu, `labels` on meta"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_bad_batch(name: str, make_refiner: Any, make_batch: Any) -> None:
    spoil, kind, message = BATCHES[name]
    refiner, batch = make_refiner(), spoil(*make_batch([[1, 1, 1], [1, 0, 1]] if "label" not in name else None))
    with pytest.raises(kind, match=message):
        refiner(*batch)
    if kind is not DetachedCamError:  # a cam that is only looked at need not be attached
        with pytest.raises(kind, match=message):
            refiner.compute(*batch)
        with pytest.raises(kind, match=message):
            refiner.refine_masks(*batch)


@pytest.mark.parametrize("name", [n for n in BATCHES if not ("img" in n or "device" in n or n == "detached cam")])
def test_bad_batch_while_learning_prompts(name: str, make_refiner: Any, make_batch: Any) -> None:
    spoil, kind, message = BATCHES[name]
    img, cam, labels = spoil(*make_batch())
    refiner = make_refiner(learned=True)
    before = refiner.prompts.context.clone()
    with pytest.raises(kind, match=message):
        refiner.fit_prompts([(img, labels)], lambda _: cam, progress=False)
    assert refiner.stage == "refine" and torch.equal(refiner.prompts.context, before)


def test_missing_background_channel(make_refiner: Any, make_batch: Any) -> None:
    """A CAM with C channels has none to leave out, whatever `background_channel` says."""
    img, cam, labels = make_batch()
    expected = make_refiner()(img, cam, labels)
    refiner = make_refiner(background_channel=True)
    assert torch.equal(refiner(img, cam, labels), expected)
    assert torch.equal(refiner(img, torch.cat([cam[:, :1], cam], dim=1), labels), expected)
    with pytest.raises(ValueError, match=r"`cam` must have shape \(B, C or C \+ 1, h, w\) .* got \(2, 5, 8, 8\)"):
        refiner(img, torch.cat([cam[:, :2], cam], dim=1), labels)


def test_smoothed_labels_count_as_hard_ones(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    smoothed = labels * 0.85 + 0.1  # 0.1 and 0.95
    assert torch.equal(make_refiner()(img, cam, smoothed), make_refiner()(img, cam, labels))


def test_warnings_point_to_the_callers_line(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    refiner = make_refiner(image_stats="imagenet")
    with pytest.warns(UserWarning, match="all its values are in") as caught:
        first = sys._getframe().f_lineno
        refiner(img, cam, labels)
        refiner.compute(img, cam, labels)
        refiner.refine_masks(img, cam, labels)
        refiner.fit_prompts([(img, labels)], lambda _: cam, epochs=20, progress=False)
    assert [(w.filename, w.lineno - first) for w in caught] == [(__file__, i) for i in (1, 2, 3, 4)]


def test_images_that_are_not_normalized_as_announced(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    refiner = make_refiner(image_stats="imagenet")
    with pytest.raises(ValueError, match=r"`img` must be normalized with mean \(0.485, 0.456, 0.406\) and std \(0.229"):
        refiner(255 * img, cam, labels)
    assert refiner((img - 0.45) / 0.225, cam, labels) > 0


@pytest.mark.parametrize(
    ("shift", "scale", "found"), [(0.0, 3.0, "0.0.* to 3"), (-0.5, 1.0, "-0.5 to 0.5"), (0.1, 1.0, "0.1 to 1.1")]
)
def test_cam_that_is_not_normalized_as_announced(
    shift: float, scale: float, found: str, make_refiner: Any, make_batch: Any
) -> None:
    img, cam, labels = make_batch()
    refiner = make_refiner(normalize=None)
    cam = cam.detach().sigmoid().requires_grad_(True)
    assert refiner(img, cam, labels) > 0
    with pytest.raises(ValueError, match=rf"`cam` must be in \[0, 1\] with normalize=None; got values from {found}.*'minmax'"):
        refiner(img, shift + scale * cam, labels)


def test_batches_at_the_edge_of_what_is_allowed(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner()
    for labels in ([[0, 0, 0]], [[0, 1, 0]], [[1, 1, 1]]):
        img, cam, target = make_batch(labels)
        loss = refiner(img, cam, target)
        loss.backward()
        assert loss.isfinite() and cam.grad.isfinite().all()
    img, cam, target = make_batch(size=7, cam_size=1)
    assert refiner(img, cam, target).isfinite()
    flat = torch.zeros_like(cam).requires_grad_(True)
    loss = refiner(torch.zeros_like(img), flat, target)
    loss.backward()
    assert loss.isfinite() and flat.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------ building a refiner


ARGUMENTS: Dict[str, Tuple[Dict[str, Any], type, str]] = {
    "a string as classes": ({"names": "boat"}, TypeError, "`classes` must be a list of names or a mapping .* string 'boat'"),
    "no classes": ({"names": []}, ValueError, "`classes` must hold at least one name; got none"),
    "numbers as classes": ({"names": [0, 1]}, TypeError, "Every class name must be a string; got 0 of type int"),
    "number as prompt name": ({"names": {"boat": 3}}, TypeError, "Every class name must be a string; got 3 of type int"),
    "blank class name": ({"names": ["boat", "  "]}, ValueError, "Every class name must have letters CLIP can read; got '  '"),
    "duplicate class names": (
        {"names": ["boat", "bird", "boat", "bird", "car"]},
        ValueError,
        "Class names must differ; got 'bird', 'boat' more than once",
    ),
    "a name that the tokenizer cuts": (
        {"names": ["boat", "very " * 80 + "long"]},
        ValueError,
        r"Every text must fit into CLIP's 77 tokens; 'a photo of a very very .*'... needs 8\d, .* cut it. Use a shorter name",
    ),
    "a background text that the tokenizer cuts": (
        {"background_texts": ["water " * 80], "lambda_background_texts": 1.0},
        ValueError,
        r"Every text must fit into CLIP's 77 tokens; 'water water .*'... needs 82",
    ),
    "prompt length 72": (
        {"prompt_length": 72},
        ValueError,
        r"`prompt_length` must be from 1 to 71, what CLIP's 77 tokens leave in the layout 'a photo of \{\} .'; got 72",
    ),
    "prompt length 0": ({"prompt_length": 0}, ValueError, "`prompt_length` must be from 1 to 71, .* got 0"),
    "prompt length with a longer layout": (
        {"prompt_length": 71, "prompt_template": "a nice photo of {} ."},
        ValueError,
        "`prompt_length` must be from 1 to 70, .* got 71",
    ),
    "prompt layout without a gap": (
        {"prompt_template": "a photo"},
        ValueError,
        r"`prompt_template` must be a text with `\{\}` in it once; got 'a photo'",
    ),
    "text without a gap": (
        {"text_template": "a photo"},
        ValueError,
        r"`text_template` must be a text with `\{\}` in it once; got 'a photo'",
    ),
    "text with two gaps": (
        {"text_template": "{} {}"},
        ValueError,
        r"`text_template` must be a text with `\{\}` in it once; got '\{\} \{\}'",
    ),
    "misspelled option": (
        {"lambda_aera": 1.0},
        TypeError,
        "PromptRefiner has no option 'lambda_aera'; did you mean 'lambda_area'?",
    ),
    "unlike any option": ({"zzz": 1.0}, TypeError, "PromptRefiner has no option 'zzz'; its options are match_form, .*, seed"),
    "a name as configuration": (
        {"config": "voc"},
        TypeError,
        "`config` must be a RefinerConfig such as VOC or COCO; got 'voc'",
    ),
    "a number as a switch": ({"clip_stats": 1}, TypeError, "`clip_stats` must be True or False; got 1"),
    "unknown precision": (
        {"clip_dtype": "int8"},
        ValueError,
        "`clip_dtype` must be 'float32' or 'float16' or 'bfloat16'; got 'int8'",
    ),
    "unknown form of T": ({"repel": "exp"}, ValueError, "`repel` must be 'log' or 'log1m'; got 'exp'"),
    "unknown normalization": ({"normalize": "softmax"}, ValueError, "`normalize` must be 'minmax' or None; got 'softmax'"),
    "no views at all": ({"max_views": 0}, ValueError, "`max_views` must be at least 1, or None for no limit; got 0"),
    "weight without texts": (
        {"lambda_background_texts": 1.0},
        ValueError,
        r"`lambda_background_texts` needs `background_texts`, such as \['a photo of railway.'\]; got none",
    ),
    "a string as background texts": (
        {"background_texts": "water", "lambda_background_texts": 1.0},
        TypeError,
        "`background_texts` must be a list or a mapping class name -> list; got the string 'water'",
    ),
    "texts of unknown classes": (
        {"background_texts": {"ship": ["water"], "boat": ["water"]}, "lambda_background_texts": 1.0},
        ValueError,
        "`background_texts` must name known classes; got 'ship'",
    ),
    "unknown statistics": ({"image_stats": "clip"}, ValueError, r"`image_stats` must be 'imagenet', None .* got 'clip'"),
    "statistics of one channel": ({"image_stats": ((0.5,), (0.5,))}, ValueError, r"`image_stats` must be .* three values each"),
    "no spread": ({"image_stats": ((0.5,) * 3, (0.5, 0.5, 0.0))}, ValueError, r"`image_stats` must be .* std > 0; got"),
    "statistics as two numbers": (
        {"image_stats": (0.5, 0.5)},
        ValueError,
        r"`image_stats` must be 'imagenet', .* got \(0.5, 0.5\)",
    ),
    "eps 0": ({"eps": 0.0}, ValueError, "`eps` must be at least 1e-12 and finite; got 0.0"),
    "negative eps": ({"eps": -0.1}, ValueError, "`eps` must be at least 1e-12 and finite; got -0.1"),
    "weight that is no number": ({"lambda_b": float("nan")}, ValueError, "`lambda_b` must be at least 0 and finite; got nan"),
    "prompt length 2.5": ({"prompt_length": 2.5}, TypeError, "`prompt_length` must be a whole number; got 2.5 of type float"),
    "one string for a class": (
        {"background_texts": {"boat": "a photo of water."}, "lambda_background_texts": 1.0},
        TypeError,
        "`background_texts` must hold a list of texts for every class; got the string 'a photo of water.' for 'boat'",
    ),
    "unknown CLIP": (
        {"clip": "ViT-B-32"},
        ClipError,
        "`clip` must be one of RN50, .*ViT-B/32, .*a weights file, .* got 'ViT-B-32', which is neither a known name nor a file",
    ),
    "number as CLIP": ({"clip": 32}, TypeError, "`clip` must be a name, a path, or a loaded CLIP model; got int"),
    "another network as CLIP": (
        {"clip": nn.Linear(2, 2)},
        TypeError,
        "`clip` must be an OpenAI `clip`, `open_clip` or `transformers` model; got Linear without visual, transformer",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_argument(name: str, make_refiner: Any) -> None:
    options, kind, message = ARGUMENTS[name]
    with pytest.raises(kind, match=message):
        make_refiner(**options)


def test_background_texts_from_an_iterator(make_refiner: Any, make_batch: Any) -> None:
    texts: List[str] = ["a photo of water.", "a photo of railway."]
    expected = make_refiner(background_texts=texts, lambda_background_texts=1.0)(*make_batch())
    assert make_refiner(background_texts=iter(texts), lambda_background_texts=1.0)(*make_batch()) == expected


def test_clip_error_is_a_runtime_error() -> None:
    assert issubclass(ClipError, RuntimeError) and issubclass(ClipError, SemplesError)


# ------------------------------------------------------------------------------------------------ CLIP's weights


def test_text_file_as_clip(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    path.write_text("these are no weights\n" * 20)
    with pytest.raises(ClipError, match="ViT-B-32.pt is no CLIP weights file: expected a TorchScript archive or a state dict"):
        PromptRefiner(["boat"], clip=path)


def test_other_weights_as_clip(tmp_path: Path, tiny_clip: nn.Module) -> None:
    path = str(tmp_path / "weights.pt")
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ClipError, match=r"weights.pt is no CLIP state dict: expected an entry `text_projection`"):
        load_clip(path)
    torch.save([1, 2], path)
    with pytest.raises(ClipError, match="is no CLIP state dict"):
        load_clip(path)
    state = {name: value for name, value in tiny_clip.state_dict().items() if not name.startswith("visual.")}
    torch.save(state, path)
    with pytest.raises(ClipError, match="weights.pt does not hold a CLIP model in OpenAI's layout"):
        load_clip(path)
    torch.save({**tiny_clip.state_dict(), "ln_final.bias": torch.ones(3)}, path)
    with pytest.raises(ClipError, match="(?s)weights.pt does not hold a CLIP model in OpenAI's layout .*ln_final.bias"):
        load_clip(path)


def test_weights_of_an_impossible_width_as_clip(tmp_path: Path, tiny_clip: nn.Module) -> None:
    torch.save({**tiny_clip.state_dict(), "ln_final.weight": torch.ones(3)}, tmp_path / "weights.pt")  # no head is that narrow
    with pytest.raises(ClipError, match="weights.pt does not hold a CLIP model in OpenAI's layout"):
        load_clip(tmp_path / "weights.pt")


def test_pickled_objects_are_not_executed(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"text_projection": Harm()}, tmp_path / "weights.pt")
    with pytest.raises(ClipError, match="is no CLIP weights file"):
        load_clip(tmp_path / "weights.pt")
    assert not (tmp_path / "harm").exists()


def test_huge_float64_cam(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch(dtype=torch.float64)
    refiner = make_refiner()
    large = (cam.detach() * 1e30).requires_grad_(True)
    out = refiner.compute(img, large, labels)
    assert out.loss.item() == pytest.approx(refiner(img, cam, labels).item(), rel=0.2)
    assert out.masks.isfinite().all() and out.masks.max() <= 1


def test_randomly_erased_pixels_are_no_foreign_statistics(make_refiner: Any, make_batch: Any) -> None:
    _, cam, labels = make_batch()
    refiner = make_refiner(image_stats="imagenet")
    generator = torch.Generator().manual_seed(0)
    img = (torch.rand(2, 3, 40, 40, generator=generator) - 0.45) / 0.225
    img[:, :, 5:15, 5:15] = 1.2 * torch.randn(2, 3, 10, 10, generator=generator)  # noise of random erasing
    assert torch.isfinite(refiner(img, cam, labels))
    with pytest.raises(ValueError, match="`img` must be normalized with mean"):
        refiner(255 * torch.rand(2, 3, 40, 40, generator=generator), cam, labels)


def test_images_that_were_never_normalized_are_told(make_refiner: Any, make_batch: Any) -> None:
    batch = make_batch()  # images in [0, 1]
    with pytest.warns(UserWarning, match=r"all its values are in \[0, 1\]. .* image_stats=None"):
        make_refiner(image_stats="imagenet")(*batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_refiner()(*batch)


def test_unordered_classes(make_refiner: Any) -> None:
    with pytest.raises(TypeError, match="`classes` must have an order, that of the CAM's channels; got a set"):
        make_refiner({"boat", "train"})


def test_background_texts_without_their_weight(make_refiner: Any) -> None:
    with pytest.raises(ValueError, match="`background_texts` needs `lambda_background_texts` > 0"):
        make_refiner(background_texts=["a photo of water."])


def test_numbers_of_numpy_are_numbers(make_refiner: Any) -> None:
    refiner = make_refiner(prompt_length=np.int64(4), lambda_b=np.float32(0.5))
    assert refiner.prompts.context.shape[2] == 4 and refiner.config.as_dict()["lambda_b"] == 0.5
    assert [type(refiner.config.as_dict()[name]) for name in ("prompt_length", "lambda_b")] == [int, float]


def test_a_generator_as_loader_of_several_passes(make_refiner: Any, make_batch: Any) -> None:
    img, cam, labels = make_batch()
    with pytest.raises(ValueError, match="With passes > 1 `loader` must start again each time"):
        make_refiner().fit_prompts(((img, labels) for _ in range(2)), lambda _: cam.detach(), passes=2, progress=False)


def test_the_configuration_of_the_command_lines_follows_the_classes() -> None:
    assert config_for("coco") is config_for("COCO") is COCO
    assert config_for("voc") is config_for("classes.txt") is VOC
