"""Every loss against a literal loop over images and classes, alone and through the whole `PromptRefiner.compute`."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from semples_plugin import COCO, VOC, RefinerConfig, losses

LOW, HIGH = 1e-4, 0.9999
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

TWO_FEATURES: Dict[str, Tuple[Callable[..., Tensor], Callable[[Any], Any]]] = {
    # name -> the function of the package, and its summand as a function of the cosine
    "match_foreground": (losses.match_foreground, lambda c: -log(clamped(c))),
    "match_background": (losses.match_background, lambda c: -log(1 - clamped(c))),
    "refine": (losses.refine, lambda c: -log(1 - clamped(c))),
    "match_foreground_linear": (lambda a, b: losses.match_foreground(a, b, form="linear"), lambda c: 1 - c),
    "match_background_linear": (lambda a, b: losses.match_background(a, b, form="linear"), lambda c: c if c > 0 else 0 * c),
    "refine_linear": (lambda a, b: losses.refine(a, b, form="linear"), lambda c: c if c > 0 else 0 * c),
    "prompt_background": (losses.prompt_background, lambda c: -log(clamped(c)) + (LOW - c if c < LOW else 0)),
    "prompt_repel_log": (losses.prompt_repel, lambda c: log(clamped(c)) + (c - HIGH if c > HIGH else 0)),
    "prompt_repel_log1m": (
        lambda a, b: losses.prompt_repel(a, b, "log1m"),
        lambda c: -log(1 - clamped(c)) + (c - HIGH if c > HIGH else 0),
    ),
}


def log(x: Any) -> Any:
    return x.log() if isinstance(x, Tensor) else math.log(x)


def plain_cosine(a: Tensor, b: Tensor) -> Any:
    return sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5)


def clamped(c: Any) -> Any:
    """A plain number without gradient where the clamp bites."""
    return min(max(c, LOW), HIGH)


def clamped_cosine(a: Tensor, b: Tensor) -> Any:
    """c(a, b) of two vectors."""
    return clamped(plain_cosine(a, b))


def assert_close(got: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, relative to the largest entry."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


def features(*shape: int, seed: int = 0, shift: float = 0.4, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    return values.to(dtype).requires_grad_(True)


# ------------------------------------------------------------------------------------------------ terms on features


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TWO_FEATURES)
def test_term_equals_double_loop(name: str, seed: int) -> None:
    function, summand = TWO_FEATURES[name]
    labels = [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]
    image, text = features(3, 4, 8, seed=seed), features(3, 4, 8, seed=seed + 10)  # one vector per image and class
    pairs = torch.tensor(labels).nonzero()
    got = function(image[pairs[:, 0], pairs[:, 1]], text[pairs[:, 0], pairs[:, 1]])
    total, count = 0 * image.sum() + 0 * text.sum(), 0
    for b in range(3):
        for k in range(4):
            if labels[b][k]:
                total = total + summand(plain_cosine(image[b, k].double(), text[b, k].double()))
                count += 1
    expected = total / count
    assert_close(got, expected)
    for mine, reference in zip(torch.autograd.grad(got, (image, text)), torch.autograd.grad(expected, (image, text))):
        assert reference.abs().max() > 0
        assert_close(mine, reference)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_background_texts_equal_double_loop(threshold: float) -> None:
    v_f, texts = features(5, 8), features(4, 8, seed=1)
    present = [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    got = losses.background_texts(v_f, texts, torch.tensor(present), threshold)
    total, left_out = 0 * v_f.sum() + 0 * texts.sum(), 0
    for p in range(5):
        own = 0 * v_f.sum()
        for k in range(4):
            c = clamped_cosine(v_f[p].double(), texts[k].double())
            if present[p][k] and c > threshold:
                own = own - log(1 - c)
            left_out += present[p][k] and c <= threshold
        if sum(present[p]):
            total = total + own / sum(present[p])
    assert left_out or not threshold
    assert_close(got, total / 5)
    for mine, reference in zip(torch.autograd.grad(got, (v_f, texts)), torch.autograd.grad(total / 5, (v_f, texts))):
        assert_close(mine, reference)


def test_area_equals_double_loop() -> None:
    masks = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    expected = sum(sum(masks[p, y, x].item() for y in range(4) for x in range(5)) / 20 for p in range(3)) / 3
    got = losses.area(masks)
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got, masks)[0], torch.full((3, 4, 5), 1 / 60))


@pytest.mark.parametrize("name", TWO_FEATURES)
def test_term_passes_gradcheck(name: str) -> None:
    a, b = features(4, 6, shift=1.5, dtype=torch.float64), features(4, 6, seed=1, shift=1.5, dtype=torch.float64)
    c = losses.cosine(a, b)
    assert ((c > 0.1) & (c < 0.99)).all()
    assert torch.autograd.gradcheck(TWO_FEATURES[name][0], (a, b))


@pytest.mark.parametrize("threshold", [0.0, 0.75])
def test_background_texts_pass_gradcheck(threshold: float) -> None:
    v_f, texts = features(3, 6, shift=1.5, dtype=torch.float64), features(2, 6, seed=1, shift=1.5, dtype=torch.float64)
    present = torch.tensor([[1, 1], [0, 1], [0, 0]])
    assert torch.autograd.gradcheck(lambda a, b: losses.background_texts(a, b, present, threshold), (v_f, texts))


def test_area_passes_gradcheck() -> None:
    masks = torch.rand(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.area, (masks,))


@pytest.mark.parametrize("name", TWO_FEATURES)
@pytest.mark.parametrize(
    ("relation", "cos"), [("identical", 1), ("scaled", 1), ("orthogonal", 0), ("opposite", -1), ("zero", 0)]
)
def test_closed_form(name: str, relation: str, cos: float) -> None:
    function, summand = TWO_FEATURES[name]
    a = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    b = {
        "identical": a.detach(),
        "scaled": 7 * a.detach(),
        "orthogonal": torch.tensor([[-4.0, 3.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64),
        "opposite": -a.detach(),
        "zero": torch.zeros(2, 3, dtype=torch.float64),
    }[relation]
    got = function(a, b)
    assert got.item() == pytest.approx(summand(cos), rel=1e-9)
    if not (relation == "orthogonal" and (name == "prompt_background" or name.endswith("_linear"))):  # no clamp there
        assert torch.autograd.grad(got, a)[0].abs().max() < 1e-12  # the clamp bites, or the cosine is at an end


@pytest.mark.parametrize("cos", [-1 + 1e-6, -0.55, -1e-3, 0.0, 9e-5])
def test_a_prompt_below_the_clamp_is_pulled_towards_its_background(cos: float) -> None:
    v_b = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    u_b = torch.tensor([[cos, math.sqrt(1 - cos**2)]], dtype=torch.float64, requires_grad=True)
    loss = losses.prompt_background(v_b, u_b)
    assert loss.item() == pytest.approx(-math.log(LOW) + LOW - cos, rel=1e-12)
    gradient = torch.autograd.grad(loss, u_b)[0]
    assert gradient.norm().item() == pytest.approx(math.sqrt(1 - cos**2), rel=1e-6)  # slope 1 in the cosine
    step = u_b - 0.01 * gradient
    assert torch.nn.functional.cosine_similarity(step, v_b) > cos


@pytest.mark.parametrize("cos", [1.0001e-4, 0.01, 0.5, 0.9998])
def test_the_terms_of_prompt_learning_are_the_papers_within_the_clamp(cos: float) -> None:
    v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    values, slopes = [], []
    for ours in (True, False):
        u = torch.tensor([[cos, math.sqrt(1 - cos**2)]], dtype=torch.float64, requires_grad=True)
        c = losses.cosine(v, u)
        paper = -torch.log(c) + torch.log(c) - torch.log(1 - c)
        terms = losses.prompt_background(v, u) + losses.prompt_repel(v, u) + losses.prompt_repel(v, u, "log1m")
        total = terms if ours else paper.sum()
        values.append(total.item())
        slopes.append(torch.autograd.grad(total, u)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-12)


def test_the_terms_of_prompt_learning_go_on_where_their_clamps_begin() -> None:
    v = torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    def value(term: Callable[..., Tensor], cos: float) -> float:
        return term(v, torch.tensor([[cos, math.sqrt(1 - cos**2)]], dtype=torch.float64)).item()

    for name, edge in (("prompt_background", LOW), ("prompt_repel_log", HIGH), ("prompt_repel_log1m", HIGH)):
        term = TWO_FEATURES[name][0]
        assert value(term, edge - 1e-9) == pytest.approx(value(term, edge + 1e-9), abs=3e-5), name


@pytest.mark.parametrize("form", ["log", "log1m"])
def test_a_prompt_that_says_its_class_is_pushed_away(form: str) -> None:
    cos = 0.99995
    u_f = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    u_b = torch.tensor([[cos, math.sqrt(1 - cos**2)]], dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(losses.prompt_repel(u_f, u_b, form), u_b)[0]
    assert gradient.norm().item() == pytest.approx(math.sqrt(1 - cos**2), rel=1e-6)
    gradient = torch.autograd.grad(losses.prompt_repel_cluster(u_f, u_b, torch.ones(1, 1), form), u_b)[0]
    assert gradient.norm().item() == pytest.approx(math.sqrt(1 - cos**2), rel=1e-6)


def test_refine_with_several_prompts_equals_a_loop() -> None:
    v_f, u_b = features(4, 8), features(4, 3, 8, seed=1)
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
    got = losses.refine(v_f, u_b, "none", present)
    expected = [0 * v_f.sum().double() for _ in range(4)]
    for p in range(4):
        for n in range(3):
            if present[p, n]:
                own = -log(1 - clamped_cosine(v_f[p].double(), u_b[p, n].double()))
                expected[p] = expected[p] + own / int(present[p].sum())
    assert_close(got, torch.stack(expected))
    assert got[2] == 0  # a pair without a prompt
    mean = losses.refine(v_f, u_b, present=present)
    assert mean.item() == pytest.approx(sum(float(value) for value in expected) / 4, rel=1e-5)
    for mine, reference in zip(torch.autograd.grad(mean, (v_f, u_b)), torch.autograd.grad(sum(expected) / 4, (v_f, u_b))):
        assert_close(mine, reference)
    one = losses.refine(v_f, u_b[:, 0], "none")
    assert torch.equal(one, losses.refine(v_f, u_b[:, :1], "none", torch.ones(4, 1)))


def test_closed_form_at_sixty_degrees() -> None:
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)
    for function, _ in (TWO_FEATURES[n] for n in ("match_foreground", "match_background", "refine", "prompt_background")):
        assert function(a, b).item() == pytest.approx(math.log(2), rel=1e-12)
    assert losses.prompt_repel(a, b).item() == pytest.approx(-math.log(2), rel=1e-12)
    assert losses.prompt_repel(a, b, "log1m").item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("form", ["log", "log1m"])
def test_both_forms_of_repel_push_the_cosine_down(form: str) -> None:
    u_f, u_b = features(3, 8, shift=1.0), features(3, 8, seed=1, shift=1.0)
    before = losses.cosine(u_f, u_b).mean()
    gradient = torch.autograd.grad(losses.prompt_repel(u_f, u_b, form), u_b)[0]
    assert losses.cosine(u_f, u_b - 0.1 * gradient).mean() < before - 1e-3


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_terms_do_not_depend_on_length(seed: int, scale_a: float, scale_b: float) -> None:
    a, b = features(3, 8, seed=seed).detach(), features(3, 8, seed=seed + 1).detach()
    for function, _ in TWO_FEATURES.values():
        assert function(scale_a * a, scale_b * b).item() == pytest.approx(function(a, b).item(), rel=1e-4, abs=1e-5)


@given(st.integers(0, 1000), st.sampled_from(sorted(TWO_FEATURES)))
def test_terms_are_means_over_pairs_and_bounded(seed: int, name: str) -> None:
    a, b = features(4, 5, seed=seed, shift=0.0).detach(), features(4, 5, seed=seed + 1, shift=0.0).detach()
    function = TWO_FEATURES[name][0]
    single = [function(a[i : i + 1], b[i : i + 1]).item() for i in range(4)]
    assert function(a, b).item() == pytest.approx(sum(single) / 4, rel=1e-5, abs=1e-6)
    beyond = (
        0 if name in ("match_foreground", "match_background", "refine") else 1 + LOW
    )  # the learning terms go on past the clamp
    assert all(0 <= abs(value) <= -math.log(LOW) * 1.0003 + beyond for value in single)


@pytest.mark.parametrize("name", [*TWO_FEATURES, "background_texts", "area"])
def test_no_pairs_give_an_attached_zero(name: str) -> None:
    v = torch.zeros(0, 8, requires_grad=True)
    if name == "background_texts":
        got = losses.background_texts(v, torch.rand(3, 8), torch.zeros(0, 3))
    elif name == "area":
        v = torch.zeros(0, 4, 4, requires_grad=True)
        got = losses.area(v)
    else:
        got = TWO_FEATURES[name][0](v, torch.zeros(0, 8))
    assert got.shape == () and got.item() == 0 and got.requires_grad
    assert torch.autograd.grad(got, v)[0].shape == v.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TWO_FEATURES)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    a, b = features(4, 8, dtype=dtype).detach(), features(4, 8, seed=1, dtype=dtype).detach()
    got = TWO_FEATURES[name][0](a, b)
    assert got.dtype == torch.float32
    assert got.item() == TWO_FEATURES[name][0](a.float(), b.float()).item()


@pytest.mark.parametrize("name", TWO_FEATURES)
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    a, b = features(4, 8).detach(), features(4, 8, seed=1).detach()
    expected = TWO_FEATURES[name][0](a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = TWO_FEATURES[name][0](a, b)
    assert got.dtype == torch.float32 and got.item() == expected.item()


def test_unknown_form_of_repel() -> None:
    with pytest.raises(ValueError, match="`repel` must be 'log' or 'log1m'; got 'exp'"):
        losses.prompt_repel(torch.rand(1, 4), torch.rand(1, 4), "exp")


# ------------------------------------------------------------------------------------------------ the whole step


def enlarge_matrix(old: int, new: int) -> Tensor:
    """Bilinear weights (new, old) with align_corners=True."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        position = i * (old - 1) / (new - 1)
        left = min(int(position), old - 2)
        weights[i, left], weights[i, left + 1] = 1 - (position - left), position - left
    return weights


def shrink_matrix(old: int, new: int) -> Tensor:
    """Bilinear weights (new, old) with antialiasing: a triangle as wide as two output pixels."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    scale = old / new
    for i in range(new):
        for j in range(old):
            weights[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * scale) / scale)
    return weights / weights.sum(1, keepdim=True)


def stats_tensors(stats: Any) -> Tuple[Tensor, Tensor]:
    mean, std = torch.tensor(stats, dtype=torch.float64)[:, :, None, None]
    return mean, std


class Literal:
    """One training step, one image and one class at a time, everything encoded by CLIP's own methods."""

    def __init__(self, model: nn.Module, padded_text: Callable, padded_prompt: Callable, names: List[str]):
        self.model, self.padded_text, self.padded_prompt, self.names = model, padded_text, padded_prompt, names

    def encode(self, view: Tensor) -> Tensor:
        return self.model.encode_image(view[None].float())[0]

    def views(
        self, img: Tensor, cam: Tensor, host_stats: Any, clip_stats: bool, eps: float, normalize: bool
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Mask, foreground view and background view of one image (3, H, W) and one map (h, w)."""
        size = self.model.visual.input_resolution
        rows, columns = enlarge_matrix(cam.shape[0], size), enlarge_matrix(cam.shape[1], size)
        mask = rows @ cam.double() @ columns.T
        if normalize:
            mask = (mask - mask.min()) / (mask.max() - mask.min() + eps)
        x = shrink_matrix(img.shape[1], size) @ img.double() @ shrink_matrix(img.shape[2], size).T
        if clip_stats:
            if host_stats is not None:
                mean, std = stats_tensors(host_stats)
                x = x * std + mean
            mean, std = stats_tensors(CLIP_STATS)
            x = (x - mean) / std
        return mask, mask * x, (1 - mask) * x

    def step(
        self,
        img: Tensor,
        cam: Tensor,
        labels: Tensor,
        *,
        lambda_b: float,
        lambda_refine: float = 0.0,
        contexts: Optional[Tensor] = None,
        host_stats: Any = None,
        clip_stats: bool = True,
        eps: float = 0.1,
        normalize: bool = True,
        background_channel: bool = False,
        texts: Optional[Dict[str, List[str]]] = None,
        lambda_texts: float = 0.0,
        threshold: float = 0.0,
        lambda_area: float = 0.0,
    ) -> Tuple[Tensor, Dict[str, float]]:
        sums: Dict[str, Any] = dict.fromkeys(("match_foreground", "match_background", "refine", "texts", "area"), 0 * cam.sum())
        pairs = 0
        for b in range(len(img)):
            for k, name in enumerate(self.names):
                if not labels[b, k]:
                    continue
                pairs += 1
                own = cam[b, k + 1] if background_channel else cam[b, k]
                mask, foreground, background = self.views(img[b], own, host_stats, clip_stats, eps, normalize)
                v_f, v_b = self.encode(foreground), self.encode(background)
                u_f = self.padded_text(self.model, f"a photo of a {name}.").detach()
                sums["match_foreground"] = sums["match_foreground"] - log(clamped_cosine(v_f, u_f))
                sums["match_background"] = sums["match_background"] - log(1 - clamped_cosine(v_b, u_f))
                if contexts is not None:
                    u_b = self.padded_prompt(self.model, contexts[k]).detach()
                    sums["refine"] = sums["refine"] - log(1 - clamped_cosine(v_f, u_b))
                if texts and texts.get(name):
                    for text in texts[name]:
                        c = clamped_cosine(v_f, self.padded_text(self.model, text).detach())
                        if c > threshold:
                            sums["texts"] = sums["texts"] - log(1 - c) / len(texts[name])
                sums["area"] = sums["area"] + mask.mean()
        means = {name: value / pairs for name, value in sums.items()}
        total = means["match_foreground"] + lambda_b * means["match_background"] + lambda_refine * means["refine"]
        total = total + lambda_texts * means["texts"] + lambda_area * means["area"]
        return total, {name: value.item() for name, value in means.items()}


@pytest.fixture
def literal(aligned_clip: nn.Module, padded_text: Callable, padded_prompt: Callable, classes: List[str]) -> Literal:
    return Literal(aligned_clip, padded_text, padded_prompt, classes)


WATER = ["a photo of water.", "a photo of railway."]
STEPS: Dict[str, Tuple[bool, Dict[str, Any], Dict[str, Any]]] = {
    # name -> prompts learned?, arguments of PromptRefiner, arguments of the literal step
    "match, VOC": (False, {}, {"lambda_b": 2.4}),
    "match, COCO": (False, {"config": COCO}, {"lambda_b": 0.75}),
    "match, no background half": (False, {"lambda_b": 0.0}, {"lambda_b": 0.0}),
    "refine, VOC": (True, {}, {"lambda_b": 2.4, "lambda_refine": 0.05}),
    "refine, COCO": (True, {"config": COCO}, {"lambda_b": 0.75, "lambda_refine": 0.2}),
    "refine, own weights": (True, {"lambda_b": 0.3, "lambda_refine": 7.0}, {"lambda_b": 0.3, "lambda_refine": 7.0}),
    "refine, long prompts": (True, {"prompt_length": 71}, {"lambda_b": 2.4, "lambda_refine": 0.05}),
    "area": (False, {"lambda_area": 1.5}, {"lambda_b": 2.4, "lambda_area": 1.5}),
    "texts for all": (
        False,
        {"background_texts": WATER, "lambda_background_texts": 0.7},
        {"lambda_b": 2.4, "texts": {"boat": WATER, "train": WATER, "bird": WATER}, "lambda_texts": 0.7},
    ),
    "texts per class": (
        False,
        {"background_texts": {"boat": WATER, "bird": WATER[1:]}, "lambda_background_texts": 0.7},
        {"lambda_b": 2.4, "texts": {"boat": WATER, "bird": WATER[1:]}, "lambda_texts": 0.7},
    ),
    "everything": (
        True,
        {
            "background_texts": WATER,
            "lambda_background_texts": 0.7,
            "background_threshold": 0.5065,  # some of the texts count, some do not
            "lambda_area": 0.2,
            "background_channel": True,
            "image_stats": "imagenet",
        },
        {
            "lambda_b": 2.4,
            "lambda_refine": 0.05,
            "texts": {"boat": WATER, "train": WATER, "bird": WATER},
            "lambda_texts": 0.7,
            "threshold": 0.5065,
            "lambda_area": 0.2,
            "background_channel": True,
            "host_stats": IMAGENET,
        },
    ),
    "background channel": (False, {"background_channel": True}, {"lambda_b": 2.4, "background_channel": True}),
    "ImageNet images": (True, {"image_stats": "imagenet"}, {"lambda_b": 2.4, "lambda_refine": 0.05, "host_stats": IMAGENET}),
    "own statistics": (
        False,
        {"image_stats": ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))},
        {"lambda_b": 2.4, "host_stats": ((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))},
    ),
    "images as they are": (
        True,
        {"image_stats": "imagenet", "clip_stats": False},
        {"lambda_b": 2.4, "lambda_refine": 0.05, "host_stats": IMAGENET, "clip_stats": False},
    ),
    "small eps": (False, {"eps": 1e-4}, {"lambda_b": 2.4, "eps": 1e-4}),
    "large eps": (False, {"eps": 2.0}, {"lambda_b": 2.4, "eps": 2.0}),
    "normalized CAM": (False, {"normalize": None}, {"lambda_b": 2.4, "normalize": False}),
}


@pytest.mark.parametrize("name", STEPS)
def test_step_equals_literal_step(name: str, make_refiner: Any, make_batch: Any, literal: Literal) -> None:
    learned, options, arguments = STEPS[name]
    refiner = make_refiner(learned=learned, **options)
    img, cam, labels = make_batch(extra_channels=int(refiner.config.background_channel))
    if refiner.config.normalize is None:
        cam = cam.detach().sigmoid().requires_grad_(True)
    if arguments.get("host_stats"):
        mean, std = (s.float() for s in stats_tensors(arguments["host_stats"]))
        img = (img - mean) / std
    if learned:
        arguments = {**arguments, "contexts": refiner.prompts.context[:, 0].detach()}
    expected, means = literal.step(img, cam, labels, **arguments)
    out = refiner.compute(img, cam, labels)
    assert_close(out.loss, expected)
    reference = torch.autograd.grad(expected, cam)[0]
    assert reference.abs().max() > 1e-4  # no clamp, no flat map: there is something to compare
    assert_close(torch.autograd.grad(out.loss, cam)[0], reference)
    assert_close(torch.autograd.grad(refiner(img, cam, labels), cam)[0], reference)
    for term, value in out.terms.items():
        assert value.item() == pytest.approx(means["texts" if term == "background_texts" else term], rel=1e-5)


def test_clamped_cosines_equal_literal_step(tiny_clip: nn.Module, make_refiner: Any, make_batch: Any, literal: Literal) -> None:
    literal.model = tiny_clip  # random, not aligned: some cosines are negative and their gradients are cut
    refiner = make_refiner(clip=tiny_clip)
    img, cam, labels = make_batch([[1, 1, 1], [1, 1, 1]])
    expected, means = literal.step(img, cam, labels, lambda_b=2.4)
    out = refiner.compute(img, cam, labels)
    assert_close(out.loss, expected)
    assert 0.5 < means["match_foreground"] < -math.log(LOW)
    assert_close(torch.autograd.grad(out.loss, cam)[0], torch.autograd.grad(expected, cam)[0])


def test_resnet_step_equals_literal_step(
    tiny_resnet_clip: nn.Module, make_refiner: Any, make_batch: Any, literal: Literal
) -> None:
    literal.model = tiny_resnet_clip
    refiner = make_refiner(clip=tiny_resnet_clip)
    img, cam, labels = make_batch(size=80)
    expected, _ = literal.step(img, cam, labels, lambda_b=2.4)
    out = refiner.compute(img, cam, labels)
    assert_close(out.loss, expected)
    reference = torch.autograd.grad(expected, cam)[0]
    assert reference.abs().max() > 1e-6
    assert_close(torch.autograd.grad(out.loss, cam)[0], reference)


def test_compute_returns_the_literal_masks(make_refiner: Any, make_batch: Any, literal: Literal) -> None:
    img, cam, labels = make_batch()
    out = make_refiner().compute(img, cam, labels)
    assert out.pairs.tolist() == labels.nonzero().tolist()
    for mask, (b, k) in zip(out.masks, out.pairs.tolist()):
        expected, _, _ = literal.views(img[b], cam[b, k], None, True, 0.1, True)
        assert_close(mask, expected.detach())


@pytest.mark.parametrize("recipe", [VOC, COCO], ids=["voc", "coco"])
@pytest.mark.parametrize("form", ["log", "log1m"])
def test_prompt_learning_equals_literal_loop(
    form: str, recipe: RefinerConfig, make_refiner: Any, make_batch: Any, literal: Literal
) -> None:
    refiner = make_refiner(repel=form, config=recipe, **({} if form == "log" else {"lambda_t": 0.5}))
    img, cam, labels = make_batch()
    lambda_t = {"log": 0.02 if recipe is VOC else 0.01, "log1m": 0.5}[form]
    rate, epochs = 2.5e-2 if recipe is VOC else 2.5e-3, 4
    context = refiner.prompts.context[:, 0].detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([context], lr=rate, weight_decay=0.03)
    expected = []
    with torch.no_grad():
        table = []  # (class, v_b) of every pair, with the eps of stage (b)
        for b, k in labels.nonzero().tolist():
            table.append((k, literal.encode(literal.views(img[b], cam[b, k], None, True, 1e-4, True)[2])))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        loss = torch.zeros(())
        for k, v_b in table:
            u_b = literal.padded_prompt(literal.model, context[k])
            u_f = literal.padded_text(literal.model, f"a photo of a {literal.names[k]}.").detach()
            c = clamped_cosine(u_f, u_b)
            repel = log(c) if form == "log" else -log(1 - c)
            loss = loss + (-log(clamped_cosine(v_b, u_b)) + lambda_t * repel) / len(table)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit = refiner.fit_prompts([(img, labels)], lambda _: cam, epochs=epochs, progress=False)
    assert fit.losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert fit.losses == pytest.approx(expected, rel=1e-4)  # AdamW amplifies rounding where a gradient is near zero
    assert fit.losses[-1] != pytest.approx(fit.losses[0], rel=1e-3)
    assert fit.num_pairs == len(table)
