from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semples_plugin._checks import partition_faults
from semples_plugin.class_names import COCO_CLASSES, VOC_CLASSES
from semples_plugin.clusters.categories import CategoryClusters
from semples_plugin.clusters.text_features import clusters_from_text_features
from semples_plugin.errors import ClusterError

CLASSES = ["car", "cat", "dog", "person", "sofa"]
A = {"animals": ["dog", "cat"], "people": ["person"], "things": ["car", "sofa"]}


@pytest.fixture
def clusters() -> CategoryClusters:
    return CategoryClusters(A, CLASSES, {"source": "me", "list": [1, {"a": None}]})


def test_importing_the_package_imports_none_of_its_optional_dependencies() -> None:
    optional = "{'openai', 'sklearn', 'scipy', 'yaml'}"
    code = f"import sys, semples_plugin.clusters as package; print(*package.__all__, *{optional} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert found.stdout.split() == [
        "CategoryClusters", "ClusterBranch", "clusters_from_language_model", "clusters_from_text_features",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the mapping


def test_clusters_behave_as_a_mapping(clusters: CategoryClusters) -> None:
    assert dict(clusters) == {"animals": ("dog", "cat"), "people": ("person",), "things": ("car", "sofa")}
    assert clusters.names == tuple(clusters) == ("animals", "people", "things") and len(clusters) == 3
    assert clusters.classes == tuple(CLASSES) and clusters.index == (2, 0, 0, 1, 2)
    assert "animals" in clusters and "cat" not in clusters and clusters.get("none") is None
    assert str(clusters) == "animals  dog, cat\npeople   person\nthings   car, sofa"
    assert repr(clusters) == f"CategoryClusters({A})"
    with pytest.raises(KeyError):
        clusters["none"]


FAULTS: Dict[str, Any] = {
    "unknown": ({**A, "things": ["car", "sofa", "boat"]}, ["'boat' in cluster 'things' is not one of the classes."]),
    "missing": ({**A, "things": ["car"]}, ["In no cluster: 'sofa'."]),
    "all missing": ({}, ["In no cluster: 'car', 'cat', 'dog', 'person', 'sofa'."]),
    "in two": ({**A, "more": ["cat"]}, ["'cat' is there 2 times, in 'animals', 'more'."]),
    "twice in one": ({**A, "people": ["person", "person"]}, ["'person' is there 2 times, in 'people'."]),
    "empty": ({**A, "none": []}, ["Cluster 'none' is empty."]),
    "a text": ({**A, "people": "person"}, ["Cluster 'people' must be a list of class names; got 'person'.", "In no"]),
    "a set": ({**A, "people": {"person"}}, ["Cluster 'people' must be a list", "In no cluster: 'person'."]),
    "a number": ({**A, "people": ["person", 3]}, ["Cluster 'people' must hold class names; got 3 of type int."]),
    "no name": ({**{k: v for k, v in A.items() if k != "people"}, " ": ["person"]}, ["Every cluster needs a name; got ' '."]),
    "name is none": ({**{k: v for k, v in A.items() if k != "people"}, None: ["person"]}, ["Every cluster needs a name; got"]),
    "a list": ([["car", "cat"]], ["Expected a mapping cluster name -> list of classes; got list."]),
    "nothing": (None, ["Expected a mapping cluster name -> list of classes; got NoneType."]),
    "several": (
        {"a": ["cat", "boat"], "b": ["cat"], "c": []},
        ["Cluster 'c' is empty.", "'cat' is there 2 times", "'boat' in cluster 'a'", "In no cluster: 'car', 'dog'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_every_fault_of_a_partition_is_named(fault: str) -> None:
    content, expected = FAULTS[fault]
    found = partition_faults(content, CLASSES)
    assert len(found) == len(expected) and all(any(e in f for f in found) for e in expected)
    with pytest.raises(ClusterError) as caught:
        CategoryClusters(content, CLASSES)
    assert str(caught.value) == "`clusters` must put each of the 5 classes into exactly one cluster; " + " ".join(found)


def test_too_many_clusters_are_a_fault() -> None:
    assert partition_faults(A, CLASSES, 3) == [] and partition_faults(A, CLASSES) == []
    assert partition_faults(A, CLASSES, 2) == ["3 clusters are too many; at most 2 are allowed."]


@pytest.mark.parametrize("classes", ["car", [], ["a", "a"], ["a", ""], ["a", 3], {"a", "b"}])
def test_wrong_classes_are_refused(classes: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="[Cc]lass"):
        CategoryClusters(A, classes)


def test_a_provenance_that_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="JSON"):
        CategoryClusters(A, CLASSES, {"a": object()})


def test_nothing_can_be_changed(clusters: CategoryClusters) -> None:
    for name in ("classes", "names", "index", "provenance", "_clusters", "new"):
        with pytest.raises(AttributeError, match=f"cannot assign to field '{name}'"):
            setattr(clusters, name, ())
    with pytest.raises(TypeError):
        clusters["animals"] = ("cat",)  # type: ignore[index]
    given = {name: list(members) for name, members in A.items()}
    record: Dict[str, Any] = {"list": [1]}
    made = CategoryClusters(given, CLASSES, record)
    given["animals"].clear()
    record["list"].append(2)
    made.provenance["list"].append(3)
    assert made["animals"] == ("dog", "cat") and made.provenance == {"list": [1]}


def test_copies_and_pickles_are_equal(clusters: CategoryClusters) -> None:
    for other in (pickle.loads(pickle.dumps(clusters)), copy.deepcopy(clusters), copy.copy(clusters)):
        assert other == clusters and other.provenance == clusters.provenance and other.index == clusters.index
        assert list(other.items()) == list(clusters.items()) and hash(other) == hash(clusters)


def test_equality_depends_on_names_and_order_but_not_on_provenance(clusters: CategoryClusters) -> None:
    turned = CategoryClusters({"things": ["sofa", "car"], "people": ["person"], "animals": ["cat", "dog"]}, CLASSES)
    renamed = CategoryClusters({"pets": ["cat", "dog"], "people": ["person"], "things": ["car", "sofa"]}, CLASSES)
    swapped = CategoryClusters({"people": ["cat", "dog"], "animals": ["person"], "things": ["car", "sofa"]}, CLASSES)
    again = CategoryClusters({**clusters}, CLASSES, {"source": "elsewhere"})
    assert again == clusters and hash(again) == hash(clusters)
    assert turned != clusters and swapped != clusters  # tokens of the one are not those of the other
    assert renamed != clusters and renamed.groups() == clusters.groups()
    assert CategoryClusters(A, CLASSES[::-1]) != clusters and clusters != A and clusters.groups() == turned.groups()


def test_ordered_changes_the_order_of_classes_only(clusters: CategoryClusters) -> None:
    other = clusters.ordered(["sofa", "dog", "car", "person", "cat"])
    assert other.classes == ("sofa", "dog", "car", "person", "cat") and other.index == (2, 0, 2, 1, 0)
    assert dict(other) == dict(clusters) and other.provenance == clusters.provenance and clusters.ordered(CLASSES) is clusters
    with pytest.raises(AttributeError, match="cannot delete field 'names'"):
        del clusters.names
    for wrong in (CLASSES[:4], [*CLASSES, "boat"], ["boat", *CLASSES[1:]]):
        with pytest.raises(ClusterError):
            clusters.ordered(wrong)


# ---------------------------------------------------------------------------------------------------- labels


def partitions(most: int = 7) -> st.SearchStrategy[List[int]]:
    """Cluster numbers of 1 to `most` classes."""
    return st.integers(1, most).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n))


def made(index: List[int]) -> Dict[str, List[str]]:
    found: Dict[str, List[str]] = {}
    for i, k in enumerate(index):
        found.setdefault(f"cluster {k}", []).append(f"class {i}")
    return found


@given(
    partitions(), st.integers(0, 2**32), st.sampled_from([torch.int64, torch.float32, torch.bool, torch.uint8, torch.float16])
)
def test_cluster_labels_and_relations_equal_a_literal_loop(index: List[int], seed: int, dtype: torch.dtype) -> None:
    names = [f"class {i}" for i in range(len(index))]
    clusters = CategoryClusters(made(index), names)
    labels = (torch.rand(4, len(names), generator=torch.Generator().manual_seed(seed)) < 0.4).to(dtype)
    found = clusters.labels(labels)
    assert found.dtype == dtype and found.shape == (4, len(clusters))
    for b in range(4):
        for k, members in enumerate(clusters.values()):
            assert bool(found[b, k]) == any(bool(labels[b, names.index(name)]) for name in members)
    related, belongs = clusters.related(), clusters.members()
    for i, one in enumerate(names):
        for j, other in enumerate(names):
            assert bool(related[i, j]) == any(one in members and other in members for members in clusters.values())
        assert [bool(b) for b in belongs[:, i]] == [one in members for members in clusters.values()]
    assert torch.equal(related, related.T) and bool(related.diagonal().all())


def test_labels_of_another_shape_are_refused_and_empty_ones_are_not(clusters: CategoryClusters) -> None:
    assert clusters.labels(torch.zeros(0, 5)).shape == (0, 3) and not clusters.labels(torch.zeros(2, 5)).any()
    for wrong in (torch.zeros(5), torch.zeros(2, 4), torch.zeros(2, 5, 1)):
        with pytest.raises(ValueError, match=r"`labels` must have shape \(B, 5\), one column per class; got"):
            clusters.labels(wrong)


@given(partitions(), st.data())
def test_any_partition_is_accepted_and_any_broken_one_refused(index: List[int], data: st.DataObject) -> None:
    names, content = [f"class {i}" for i in range(len(index))], made(index)
    clusters = CategoryClusters(content, names)
    assert partition_faults(content, names) == [] and {name for members in clusters.values() for name in members} == set(names)
    assert [clusters.names[k] for k in clusters.index] == [f"cluster {k}" for k in index]
    broken, how = {name: list(members) for name, members in content.items()}, data.draw(st.integers(0, 3))
    cluster, name = data.draw(st.sampled_from(list(broken))), data.draw(st.sampled_from(names))
    if how == 0:
        broken[cluster].append("stranger")
        expected = f"'stranger' in cluster {cluster!r} is not one of the classes."
    elif how == 1:
        broken = {k: [m for m in members if m != name] for k, members in broken.items()}
        expected = f"In no cluster: {name!r}."
    elif how == 2:
        broken[cluster].append(name)
        expected = f"{name!r} is there 2 times, in "
    else:
        broken["more"] = []
        expected = "Cluster 'more' is empty."
    with pytest.raises(ClusterError) as caught:
        CategoryClusters(broken, names)
    assert expected in str(caught.value)
    faults = partition_faults(broken, names)
    assert len(faults) == (2 if how == 1 and [] in broken.values() else 1)  # the only member of a cluster leaves it empty


# ---------------------------------------------------------------------------------------------------- files


def test_load_restores_what_save_wrote(clusters: CategoryClusters, tmp_path: Path) -> None:
    clusters.save(tmp_path / "a.json")
    read = CategoryClusters.load(tmp_path / "a.json")
    read.save(tmp_path / "b.json")
    assert read == clusters and read.provenance == clusters.provenance and list(read.items()) == list(clusters.items())
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    turned = CategoryClusters.load(tmp_path / "a.json", CLASSES[::-1])
    assert turned.classes == tuple(CLASSES[::-1]) and turned.groups() == clusters.groups()
    with pytest.raises(ClusterError, match="In no cluster: 'boat'"):
        CategoryClusters.load(tmp_path / "a.json", [*CLASSES, "boat"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_names_of_any_language_are_saved(tmp_path: Path) -> None:
    clusters = CategoryClusters({"Tiere 🐈": ["Kätzchen", "犬"], "\u202e": ["a\nb"]}, ["犬", "Kätzchen", "a\nb"])
    clusters.save(tmp_path / "a.json")
    assert CategoryClusters.load(tmp_path / "a.json") == clusters and "犬" in (tmp_path / "a.json").read_text("utf-8")


@pytest.mark.parametrize("ending", ["json", "JSON"])
def test_a_mapping_written_by_hand_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{ending}"
    path.write_text(json.dumps(A))
    clusters = CategoryClusters.load(path, CLASSES)
    assert clusters == CategoryClusters(A, CLASSES) and clusters.provenance == {"source": "file", "file": f"mine.{ending}"}
    with pytest.raises(
        ClusterError, match=r"holds clusters but not the order of the classes. Pass it: CategoryClusters.load\("
    ):
        CategoryClusters.load(path)


FILES = {
    "key twice.json": ('{"a": ["cat"], "a": ["dog"]}', "'a' is there twice; one of them would be lost. Join them."),
    "cut.json": ('{"a": ["cat"', "is not readable"),
    "empty.json": ("", "is not readable"),
    "list.json": ("[1]", "Expected a mapping cluster name -> list of classes; got list"),
    "deep.json": ("[" * 100_000, "is not readable"),
    "no as a class.json": ('{"a": ["car", "cat", "dog", "person", false]}', "must hold class names; got False of type bool"),
    "empty name.json": ('{"": ["car", "cat", "dog", "person", "sofa"]}', "Every cluster needs a name; got ''."),
    "null.json": ("null", "Expected a mapping cluster name -> list of classes; got NoneType"),
    "ending.txt": ("{}", "must end in .json; got 'ending.txt'"),
    "ending.yaml": ("a: [cat]", "must end in .json; got 'ending.yaml'"),
    "version.json": ('{"format": "semples-plugin clusters", "version": 9}', "has cluster format 9; this version reads 1"),
    "no clusters.json": ('{"format": "semples-plugin clusters", "version": 1, "classes": ["a"]}', "Expected a mapping"),
    "no classes.json": ('{"format": "semples-plugin clusters", "version": 1, "clusters": {"a": ["a"]}}', "is damaged: "),
    "odd classes.json": ('{"format": "semples-plugin clusters", "version": 1, "classes": [7], "clusters": {}}', "is damaged: "),
    "odd provenance.json": (
        '{"format": "semples-plugin clusters", "version": 1, "classes": ["a"], "clusters": {"a": ["a"]}, "provenance": [7]}',
        "is damaged: its classes or its provenance cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FILES))
def test_damaged_files_are_refused_by_name_and_reason(name: str, tmp_path: Path) -> None:
    content, reason = FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ClusterError) as caught:
        CategoryClusters.load(tmp_path / name, None if name == "no classes.json" else CLASSES)
    assert reason in str(caught.value) and name in str(caught.value)


def test_missing_and_undecodable_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match="No cluster file at"):
            CategoryClusters.load(path, CLASSES)
    (tmp_path / "latin1.json").write_bytes('{"Möwe": []}'.encode("latin1"))
    with pytest.raises(ClusterError, match="is not readable"):
        CategoryClusters.load(tmp_path / "latin1.json", CLASSES)


@pytest.mark.parametrize("name, classes, count", [("voc", VOC_CLASSES, 5), ("COCO", COCO_CLASSES, 12)])
def test_bundled_clusters_cover_the_classes(name: str, classes: Dict[str, str], count: int) -> None:
    clusters = CategoryClusters.bundled(name)
    assert clusters.classes == tuple(classes) and len(clusters) == count
    assert sorted(member for members in clusters.values() for member in members) == sorted(classes)
    assert clusters.provenance == {"source": f"bundled: {name.lower()}"}


def test_bundled_clusters_of_another_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match="Clusters come with the package for 'voc' and 'coco'; got 'ade'"):
        CategoryClusters.bundled("ade")


# ---------------------------------------------------------------------------------------------------- text features


def blobs(sizes: List[int], noise: float = 0.05, seed: int = 0, shuffle: bool = True) -> Any:
    """Names such as `2-0` (blob 2, member 0), and their features around orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"{k}-{i}" for k, size in enumerate(sizes) for i in range(size)]
    centres = torch.eye(16)[[k for k, size in enumerate(sizes) for _ in range(size)]]
    features = centres + noise * torch.randn(len(names), 16, generator=generator)
    order = torch.randperm(len(names), generator=generator).tolist() if shuffle else list(range(len(names)))
    return [names[i] for i in order], features[order] * (1 + torch.rand(len(names), 1, generator=generator))


@pytest.mark.parametrize("sizes", [[2, 2], [5, 3, 4], [1, 6, 2, 3], [4, 4, 4, 4, 4]])
def test_text_features_in_blobs_give_the_blobs(sizes: List[int]) -> None:
    pytest.importorskip("sklearn")
    names, features = blobs(sizes)
    before = features.clone()
    clusters = clusters_from_text_features(names, features, clip="toy")
    assert {frozenset(name[0] for name in members) for members in clusters.values()} == {
        frozenset(str(k)) for k in range(len(sizes))
    }
    assert sorted(map(len, clusters.values())) == sorted(sizes) and torch.equal(features, before)
    found = clusters.provenance
    scores = {int(k): score for k, score in found["silhouettes"].items()}
    assert list(scores) == list(range(2, len(names))) and max(scores, key=lambda k: (scores[k], -k)) == len(sizes)
    assert (found["source"], found["clip"], found["num_clusters"]) == ("text features", "toy", "best silhouette")
    for title, members in clusters.items():
        centre = title[: -len(" group")] if len(members) > 1 else title
        assert centre in members and (len(members) > 1) == title.endswith(" group")
    assert clusters_from_text_features(names, features.half().requires_grad_(), clip="toy").groups() == clusters.groups()


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_a_given_number_of_clusters_is_kept(count: int) -> None:
    pytest.importorskip("sklearn")
    names, features = blobs([3, 2, 2])
    clusters = clusters_from_text_features(names, features, count)
    assert len(clusters) == count and clusters.provenance["num_clusters"] == "given"
    if count == 1:
        assert len(next(iter(clusters.values()))) == 7


@pytest.mark.parametrize("classes, count, expected", [
    (["a"], None, 1), (["a", "b"], None, 1), (["a"], 1, 1), (["a", "b"], 2, 2), (["a", "b"], 1, 1),
])  # fmt: skip
def test_one_and_two_classes_are_clustered(classes: List[str], count: Optional[int], expected: int) -> None:
    pytest.importorskip("sklearn")
    clusters = clusters_from_text_features(classes, torch.eye(3)[: len(classes)], count)
    assert len(clusters) == expected
    assert clusters.provenance["num_clusters"] == ("given" if count else "one: fewer than three classes")


def test_equal_features_are_clustered() -> None:
    pytest.importorskip("sklearn")
    assert len(clusters_from_text_features(["a", "b", "c", "d"], torch.ones(4, 8))) >= 1


@pytest.mark.parametrize("features, reason", [
    (torch.tensor([[1.0, 0], [float("nan"), 1], [0, 1]]), "`features` must be finite and not zero"),
    (torch.tensor([[1.0, 0], [float("inf"), 1], [0, 1]]), "`features` must be finite and not zero"),
    (torch.tensor([[1.0, 0], [0, 0], [0, 1]]), "`features` must be finite and not zero"),
    (torch.ones(2, 4), r"`features` must have shape \(C, D\) with C = 3 classes; got \(2, 4\)"),
    (torch.ones(3), r"must have shape .* got \(3,\)"),
    ([[1.0], [1.0], [1.0]], "must have shape .* got list"),
])  # fmt: skip
def test_wrong_features_are_refused(features: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        clusters_from_text_features(["a", "b", "c"], features)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_a_number_of_clusters_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"`num_clusters` must be from 1 to the number of classes, 3; got {count}"):
        clusters_from_text_features(["a", "b", "c"], torch.eye(3), count)


@pytest.mark.parametrize("count", [True, 2.0, "2"])
def test_a_number_of_clusters_of_another_type_is_refused(count: Any) -> None:
    with pytest.raises(TypeError, match="`num_clusters` must be a whole number"):
        clusters_from_text_features(["a", "b", "c"], torch.eye(3), count)


@pytest.mark.parametrize("value", [255.0, 0.5, -1.0])
def test_labels_other_than_0_and_1_are_refused(clusters: CategoryClusters, value: float) -> None:
    with pytest.raises(ValueError, match="`labels` must be 0 or 1; got values such as"):
        clusters.labels(torch.tensor([[0, 1, value, 0, 0]]))


def test_a_class_with_the_name_of_a_cluster_keeps_its_name() -> None:
    pytest.importorskip("sklearn")
    names = ["cat", "cat group", "dog", "car"]  # the cluster of cat and dog is named after its centre, too
    features = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0.99, 0, 0.1, 0], [0, 0, 0, 1]])
    clusters = clusters_from_text_features(names, features, 3)
    assert dict(clusters) == {"cat group group": ("cat", "dog"), "cat group": ("cat group",), "car": ("car",)}
    assert sorted(member for members in clusters.values() for member in members) == sorted(names)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ModuleNotFoundError, match="Clusters of text features need scikit-learn: pip install 'semples-plugin"):
        clusters_from_text_features(["a", "b", "c"], torch.eye(3))


@pytest.mark.parametrize(
    "content",
    [
        {"clusters": [{"name": "pets", "classes": ["cat", "dog"]}, {"name": "rest", "classes": ["car"]}]},
        {"clusters": {"pets": ["cat", "dog"], "rest": ["car"]}},
    ],
)
def test_the_answer_of_a_language_model_is_read_from_a_file(content: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")  # as some editors write it
    found = CategoryClusters.load(tmp_path / "a.json", ["car", "cat", "dog"])
    assert dict(found) == {"pets": ("cat", "dog"), "rest": ("car",)}


@pytest.mark.parametrize(
    "content, reason",
    [
        ({"clusters": [{"name": "a", "classes": ["cat"]}, {"name": "a", "classes": ["dog"]}]}, "'a' is there twice"),
        ({"clusters": [{"name": ["a"], "classes": ["cat"]}]}, "Expected a mapping"),
        ({"format": "semples-plugin cluster record", "error": "x"}, "gave no final clusters"),
        ({"pets": ["cat", "dgo"], "rest": ["car", False]}, r"\(did you mean 'dog'\?\)"),
        ({"pets": ["cat", "dog"], "rest": ["car", False]}, "must hold class names; got False of type bool"),
    ],
)
def test_files_that_are_nearly_right_are_refused_with_a_hint(content: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ClusterError, match=reason):
        CategoryClusters.load(tmp_path / "a.json", ["car", "cat", "dog"])
