"""Background prompts learned with clusters: against the formula, without a cluster, and as files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semples_plugin import PromptFileError, PromptRefiner, prompt_files, prompts
from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.errors import ClusterError
from tests.test_losses import clamped_cosine, log

GROUPS = {"animals": ["bird"], "vehicles": ["boat", "train"]}  # the refiner's order: boat, train, bird
ALONE = {name: [name] for name in ("train", "bird", "boat")}


def data(make_batch: Callable[..., Any], count: int = 2) -> Tuple[List[Any], Callable[[Tensor], Tensor]]:
    """Batches of images and labels, and the CAM of each."""
    batches, cams = [], {}
    for k in range(count):
        img, cam, labels = make_batch([[1, 0, 1], [0, 1, k % 2]], seed=k)
        batches.append((img, labels))
        cams[id(img)] = cam.detach()
    return batches, lambda img: cams[id(img)]


def fit(refiner: PromptRefiner, make_batch: Callable[..., Any], **options: Any) -> Any:
    loader, cam_of = data(make_batch)
    return refiner.fit_prompts(loader, cam_of, **{"epochs": 4, "lr": 0.05, "batch_size": 3, "progress": False, **options})


# ------------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.parametrize("form", ["mapping", "clusters", "other order"])
def test_clusters_are_taken_in_the_refiners_order(form: str, make_refiner: Any, classes: List[str]) -> None:
    given = {
        "mapping": GROUPS,
        "clusters": CategoryClusters(GROUPS, classes, {"source": "test"}),
        "other order": CategoryClusters(GROUPS, ["bird", "boat", "train"], {"source": "test"}),
    }[form]
    config = make_refiner(clusters=given).config
    assert config.as_dict()["clusters"] == GROUPS
    related = prompts.related_classes(config.clusters, classes)
    assert related.tolist() == [[True, True, False], [True, True, False], [False, False, True]]


def test_every_form_learns_the_same(make_refiner: Any, make_batch: Any, classes: List[str]) -> None:
    results = []
    for given in (GROUPS, CategoryClusters(GROUPS, classes), CategoryClusters(GROUPS, ["bird", "boat", "train"])):
        refiner = make_refiner(clusters=given)
        results.append((fit(refiner, make_batch), refiner.prompts.context))
    for result, context in results[1:]:
        assert result == results[0][0] and torch.equal(context, results[0][1])


def test_clusters_name_the_classes_not_their_prompt_names(make_refiner: Any) -> None:
    names = {"boat": "ship", "train": "train", "bird": "bird"}
    assert make_refiner(names, clusters=GROUPS).config.clusters == GROUPS
    with pytest.raises(ClusterError, match="'ship' in cluster 'vehicles' is not one of the classes. In no cluster: 'boat'"):
        make_refiner(names, clusters={"vehicles": ["ship", "train"], "animals": ["bird"]})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([["boat", "train"], ["bird"]], TypeError, "`clusters` must be CategoryClusters or a mapping .*; got list"),
        ("vehicles", TypeError, "`clusters` must be CategoryClusters or a mapping .*; got str"),
        ({"vehicles": ["boat", "train"]}, ClusterError, "In no cluster: 'bird'"),
        ({"a": ["boat", "train", "cat"], "b": ["bird"]}, ClusterError, "'cat' in cluster 'a' is not one of the classes"),
        ({"a": ["boat", "train"], "b": ["bird", "boat"]}, ClusterError, "'boat' is there 2 times, in 'a', 'b'"),
        ({"a": ["boat", "train", "bird"], "b": []}, ClusterError, "Cluster 'b' is empty"),
        ({"a": "boat"}, ClusterError, "Cluster 'a' must be a list of class names"),
        ({}, ClusterError, "In no cluster: 'boat', 'train', 'bird'"),
        (CategoryClusters({"a": ["boat"], "b": ["train"]}, ["boat", "train"]), ClusterError, "In no cluster: 'bird'"),
        (CategoryClusters({"a": ["boat", "train", "bird", "cat"]}, ["boat", "train", "bird", "cat"]), ClusterError, "'cat'"),
    ],
)
def test_other_clusters_are_refused(given: Any, error: Any, message: str, make_refiner: Any) -> None:
    with pytest.raises(error, match=message):
        make_refiner(clusters=given)


# ------------------------------------------------------------------------------------------------ stage (b)


@pytest.mark.parametrize("repel", ["log", "log1m"])
def test_clusters_of_one_class_learn_what_none_learn_bit_for_bit(repel: str, make_refiner: Any, make_batch: Any) -> None:
    plain, alone = (make_refiner(repel=repel, lambda_t=0.5, clusters=given) for given in (None, ALONE))
    assert fit(plain, make_batch) == fit(alone, make_batch)
    assert torch.equal(plain.prompts.context, alone.prompts.context)
    assert torch.equal(plain.prompt_features(), alone.prompt_features())


@pytest.mark.parametrize("repel", ["log", "log1m"])
@pytest.mark.parametrize("lambda_t", [0.02, 1.0])
def test_first_epoch_equals_the_formula(
    lambda_t: float,
    repel: str,
    make_refiner: Any,
    make_batch: Any,
    aligned_clip: nn.Module,
    padded_text: Callable,
    padded_prompt: Callable,
    classes: List[str],
) -> None:
    refiner = make_refiner(clusters=GROUPS, repel=repel, lambda_t=lambda_t)
    loader, cam_of = data(make_batch)
    contexts = refiner.prompts.context[:, 0].clone()
    with torch.no_grad():
        total, pairs = 0.0, 0
        texts = {name: padded_text(aligned_clip, f"a photo of a {name}.") for name in classes}
        for img, labels in loader:
            features, seen = refiner.encode_backgrounds(img, cam_of(img), labels)
            for v_b, (_, k) in zip(features, seen.tolist()):
                u_b = padded_prompt(aligned_clip, contexts[k])
                members = next(members for members in GROUPS.values() if classes[k] in members)
                repulsion = 0.0
                for name in members:
                    c = float(clamped_cosine(texts[name].double(), u_b.double()))
                    repulsion += (log(c) if repel == "log" else -log(1 - c)) / len(members)
                total += -log(float(clamped_cosine(v_b.double(), u_b.double()))) + lambda_t * repulsion
                pairs += 1
    got = fit(refiner, make_batch, epochs=1, batch_size=100)
    assert got.num_pairs == pairs == 7
    assert got.losses[0] == pytest.approx(total / pairs, rel=1e-4)
    without = fit(make_refiner(repel=repel, lambda_t=lambda_t), make_batch, epochs=1, batch_size=100)
    assert abs(without.losses[0] - got.losses[0]) > 5e-4 * lambda_t


def test_first_step_follows_the_gradient_of_the_formula(
    make_refiner: Any,
    make_batch: Any,
    aligned_clip: nn.Module,
    padded_text: Callable,
    padded_prompt: Callable,
    classes: List[str],
) -> None:
    """AdamW's first step is rate x sign(gradient), after its weight decay."""
    refiner = make_refiner(clusters=GROUPS, lambda_t=1.0)
    loader, cam_of = data(make_batch)
    context = refiner.prompts.context[:, 0].clone().requires_grad_(True)
    texts = [padded_text(aligned_clip, f"a photo of a {name}.").detach() for name in classes]
    total: Any = 0
    for img, labels in loader:
        features, seen = refiner.encode_backgrounds(img, cam_of(img), labels)
        for v_b, (_, k) in zip(features, seen.tolist()):
            u_b = padded_prompt(aligned_clip, context[k])
            members = [classes.index(name) for m in GROUPS.values() if classes[k] in m for name in m]
            repulsion = sum(log(clamped_cosine(texts[j], u_b)) for j in members) / len(members)
            total = total + (repulsion - log(clamped_cosine(v_b, u_b))) / 7
    gradient = torch.autograd.grad(total, context)[0]
    before = refiner.prompts.context[:, 0].clone()
    rate, decay = 0.01, refiner.config.weight_decay
    fit(refiner, make_batch, epochs=1, batch_size=100, lr=rate)
    step = (before * (1 - rate * decay) - refiner.prompts.context[:, 0]) / rate
    clear = gradient.abs() > 0.01 * gradient.abs().max()
    assert clear.float().mean() > 0.5
    assert torch.allclose(step[clear], gradient[clear].sign(), atol=1e-2)


def test_prompts_are_pushed_from_the_whole_cluster(make_refiner: Any, make_batch: Any) -> None:
    cosines = {}
    for name, given in (("none", None), ("clusters", GROUPS)):
        refiner = make_refiner(clusters=given, lambda_t=2.0)
        fit(refiner, make_batch, epochs=15)
        cosines[name] = F.cosine_similarity(refiner.prompt_features(), refiner.text_features[None], dim=-1)
    for k, j in ((0, 1), (1, 0)):  # boat's prompt from train, train's from boat
        assert cosines["clusters"][k, j] < cosines["none"][k, j] - 1e-3
    assert torch.equal(cosines["clusters"][2], cosines["none"][2])  # bird is alone


def test_stages_a_and_c_do_not_know_the_clusters(make_refiner: Any, make_batch: Any) -> None:
    plain, grouped = make_refiner(), make_refiner(clusters=GROUPS)
    img, cam, labels = make_batch()
    assert plain(img, cam, labels).item() == grouped(img, cam, labels).item()
    fit(plain, make_batch)
    grouped.prompts.load_state_dict(plain.prompts.state_dict())
    assert grouped.stage == "refine" and plain(img, cam, labels).item() == grouped(img, cam, labels).item()


def test_a_failed_fit_with_clusters_leaves_the_prompts(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(clusters=GROUPS, learned=True)
    before = copy.deepcopy(refiner.prompts.state_dict())
    with pytest.raises(FloatingPointError, match="The prompts diverged"):
        fit(refiner, make_batch, lr=1e30)
    assert all(torch.equal(value, before[name]) for name, value in refiner.prompts.state_dict().items())


def test_copies_keep_the_clusters(make_refiner: Any, make_batch: Any) -> None:
    refiner = make_refiner(clusters=GROUPS)
    other = copy.deepcopy(refiner)
    assert other.config == refiner.config
    assert fit(other, make_batch) == fit(refiner, make_batch)


# ------------------------------------------------------------------------------------------------ files


def header(path: Path) -> Dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_a_file_says_which_clusters(make_refiner: Any, make_batch: Any, tmp_path: Path) -> None:
    refiner = make_refiner(clusters=CategoryClusters(GROUPS, ["bird", "boat", "train"], {"source": "test"}))
    fit(refiner, make_batch)
    refiner.save(tmp_path / "p.safetensors")
    found = prompt_files.read_file(tmp_path / "p.safetensors")
    assert found.config.clusters == GROUPS and list(found.config.clusters) == list(GROUPS)
    assert torch.equal(found.context, refiner.prompts.context)


def test_a_file_with_clusters_loads_with_and_without_them(
    make_refiner: Any, make_batch: Any, aligned_clip: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    refiner = make_refiner(clusters=GROUPS)
    fit(refiner, make_batch)
    refiner.save(path)
    batch = make_batch()
    expected = refiner(*batch).item()
    for given in (None, GROUPS, ALONE):
        for loaded in (
            PromptRefiner.load(path, clip=aligned_clip, image_stats=None, clusters=given),
            make_refiner(clusters=given).load_prompts(path),
        ):
            assert loaded.stage == "refine" and torch.equal(loaded.prompts.context, refiner.prompts.context)
            assert loaded(*batch).item() == expected
            assert (loaded.config.clusters is None) == (given is None)
    plain = PromptRefiner.load(path, clip=aligned_clip, image_stats=None)
    assert plain.config == refiner.config and plain(*batch).item() == expected  # the file's own
    assert "2 clusters" in repr(plain)
    with pytest.raises(ClusterError, match="In no cluster: 'bird'"):
        PromptRefiner.load(path, clip=aligned_clip, image_stats=None, clusters={"vehicles": ["boat", "train"]})
    with pytest.raises(PromptFileError, match="were learned with other classes"):
        make_refiner(["bird", "train", "boat"], clusters=GROUPS).load_prompts(path)


def test_a_prompt_file_has_exactly_these_bytes(make_refiner: Any, make_batch: Any, tmp_path: Path) -> None:
    refiner = make_refiner()
    fit(refiner, make_batch)
    refiner.save(tmp_path / "p.safetensors")
    facts = {
        "alive": refiner.prompts.alive.tolist(),
        "classes": ["boat", "train", "bird"],
        "prompt_names": ["boat", "train", "bird"],
        "clip": refiner.encoder.name,
        "clip_fingerprint": refiner.encoder.fingerprint,
        "config": refiner.config.as_dict(),
    }
    context = refiner.prompts.context
    metadata = {"facts": json.dumps(facts), "format": "semples-plugin prompts", "version": "3"}
    tensor = {"data_offsets": [0, 4 * context.numel()], "dtype": "F32", "shape": list(context.shape)}
    text = json.dumps({"__metadata__": metadata, "context": tensor}, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    expected = len(text).to_bytes(8, "little") + text.encode() + context.numpy().tobytes()
    assert (tmp_path / "p.safetensors").read_bytes() == expected


def test_clusters_of_one_class_change_the_facts_alone(make_refiner: Any, make_batch: Any, tmp_path: Path) -> None:
    for name, given in (("plain", None), ("alone", ALONE)):
        refiner = make_refiner(clusters=given)
        fit(refiner, make_batch)
        refiner.save(tmp_path / name)
    plain, alone = header(tmp_path / "plain"), header(tmp_path / "alone")
    facts, more = (json.loads(part["__metadata__"].pop("facts")) for part in (plain, alone))
    assert facts["config"]["clusters"] is None
    assert more == {**facts, "config": {**facts["config"], "clusters": ALONE}}
    assert plain == alone
    size = 4 * refiner.prompts.context.numel()
    assert (tmp_path / "plain").read_bytes()[-size:] == (tmp_path / "alone").read_bytes()[-size:]
