"""Category clusters: which classes share features (PCC, arXiv 2412.13823; CPC, arXiv 2508.17009).

`CategoryClusters` is a frozen mapping cluster name -> classes, every class in exactly one cluster, with a record of where it
came from: a language model (`cluster_llm`), a JSON or YAML file, CLIP's own text features, or a file of this package (VOC:
our own; COCO: its 12 super-categories). Flow: **clusters** -> `cluster_tokens` (tokens of a vision transformer, patch contrast)
and `refiner` (background prompts are repelled from a whole cluster). No reference code of the papers exists: this is
re-implemented from their description.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .._checks import check_classes, hard_labels, partition_faults
from .._files import PathLike, write_atomically
from ..errors import ClusterError

__all__ = ["CategoryClusters"]
FORMAT = "semples-plugin clusters"
FORMAT_VERSION = 1
RECORD_FORMAT = "semples-plugin cluster record"  # of `cluster_llm`, when it fails


class CategoryClusters(Mapping[str, Tuple[str, ...]]):
    """A frozen mapping cluster name -> classes; every class is in exactly one cluster.

    Args:
        clusters: cluster name -> its classes.
        classes: C class names in the order of the label columns.
        provenance: where the clusters came from; any JSON values.

    Attributes:
        classes: the C class names.
        names: the K cluster names, in the order given.
        index: (C,) cluster number of every class.
        provenance: a copy of what was given.

    Raises:
        ClusterError: if a class is unknown, missing or in two clusters, or a cluster is empty; all faults are listed.

    Example:
        >>> clusters = CategoryClusters({"animals": ["cat", "dog"], "vehicles": ["car"]}, classes=["car", "cat", "dog"])
        >>> clusters["animals"], clusters.index
        (('cat', 'dog'), (1, 0, 0))
        >>> clusters.labels(torch.tensor([[0, 1, 1], [1, 0, 0]]))
        tensor([[1, 0],
                [0, 1]])
    """

    classes: Tuple[str, ...]
    names: Tuple[str, ...]
    index: Tuple[int, ...]
    _clusters: Dict[str, Tuple[str, ...]]
    _record: str  # JSON

    def __init__(
        self,
        clusters: Mapping[str, Sequence[str]],
        classes: Sequence[str],
        provenance: Optional[Mapping[str, Any]] = None,
    ):
        order = tuple(check_classes(classes)[0])
        faults = partition_faults(clusters, order)
        if faults:
            raise ClusterError(
                f"`clusters` must put each of the {len(order)} classes into exactly one cluster; " + " ".join(faults)
            )
        found = {name: tuple(members) for name, members in clusters.items()}
        number = {member: k for k, members in enumerate(found.values()) for member in members}
        record = json.dumps(dict(provenance or {}), ensure_ascii=False)
        self.__dict__.update(
            _clusters=found, classes=order, names=tuple(found), index=tuple(number[name] for name in order), _record=record
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("CategoryClusters cannot be changed; make new ones.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("CategoryClusters cannot be changed; make new ones.")

    def __reduce__(self) -> Tuple[Any, ...]:
        return CategoryClusters, (dict(self), self.classes, self.provenance)

    # ------------------------------------------------------------------------------------------------ a mapping

    def __getitem__(self, name: str) -> Tuple[str, ...]:
        return self._clusters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clusters)

    def __len__(self) -> int:
        return len(self._clusters)

    def __eq__(self, other: object) -> bool:
        """Whether classes, cluster names and their orders are the same, so that tokens of one are tokens of the other."""
        if not isinstance(other, CategoryClusters):
            return NotImplemented
        return (self.classes, self.names, self.index) == (other.classes, other.names, other.index)

    def __hash__(self) -> int:
        return hash((self.classes, self.names, self.index))

    def __repr__(self) -> str:
        return f"CategoryClusters({self.as_dict()})"

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        return "\n".join(f"{name:<{width}}  {', '.join(members)}" for name, members in self.items())

    @property
    def provenance(self) -> Dict[str, Any]:
        return json.loads(self._record)

    # ------------------------------------------------------------------------------------------------ what they are for

    def as_dict(self) -> Dict[str, List[str]]:
        """Plain lists, as files hold them."""
        return {name: list(members) for name, members in self.items()}

    def groups(self) -> frozenset:
        """The partition alone, without names and order: a set of sets of classes."""
        return frozenset(frozenset(members) for members in self.values())

    def labels(self, labels: Tensor) -> Tensor:
        """Cluster-level image labels: a cluster is present if one of its classes is.

        Args:
            labels: (B, C) multi-hot, in the order of `classes`.

        Returns:
            (B, K) multi-hot, of the same dtype and device.

        Raises:
            ValueError: for another shape, or values other than 0 and 1.
        """
        if labels.ndim != 2 or labels.shape[1] != len(self.classes):
            raise ValueError(
                f"`labels` must have shape (B, {len(self.classes)}), one column per class; got {tuple(labels.shape)}."
            )
        member = self.members(labels.device)  # (K, C)
        return (hard_labels(labels)[:, None] & member).any(2).to(labels.dtype)

    def members(self, device: Union[None, str, torch.device] = None) -> Tensor:
        """(K, C) bool: whether class c is in cluster k."""
        index = torch.tensor(self.index, device=device)
        return index == torch.arange(len(self), device=device)[:, None]

    def related(self, device: Union[None, str, torch.device] = None) -> Tensor:
        """(C, C) bool: whether two classes are in one cluster; true on the diagonal."""
        index = torch.tensor(self.index, device=device)
        return index[:, None] == index

    def ordered(self, classes: Sequence[str]) -> "CategoryClusters":
        """The same clusters for these classes in this order.

        Raises:
            ClusterError: if `classes` are not exactly the clustered ones.
        """
        return self if tuple(classes) == self.classes else CategoryClusters(self, classes, self.provenance)

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: PathLike) -> None:
        """Write classes, clusters and provenance as JSON; the file appears complete or not at all."""
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "classes": list(self.classes),
            "clusters": self.as_dict(),
            "provenance": self.provenance,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(Path(path), lambda file: file.write(text.encode("utf-8")))

    @classmethod
    def load(cls, path: PathLike, classes: Optional[Sequence[str]] = None) -> "CategoryClusters":
        """Clusters from a file of `save`, or a JSON or YAML mapping cluster name -> list of classes written by hand.

        Args:
            path: `.json`, or `.yaml` / `.yml` (needs PyYAML).
            classes: the class names in the order of your label columns. A file of `save` holds them; with both they must be
                the same names, and this order counts.

        Raises:
            FileNotFoundError: if there is no such file.
            ClusterError: if the file cannot be read, a key is there twice, or the clusters do not fit the classes.
        """
        path = Path(path)
        content = _read(path)
        provenance: Dict[str, Any] = {"source": "file", "file": path.name}
        if isinstance(content, dict) and content.get("format") == FORMAT:
            if content.get("version") != FORMAT_VERSION:
                raise ClusterError(
                    f"{path} has cluster format {content.get('version')!r}; this version reads {FORMAT_VERSION}."
                )
            provenance = content.get("provenance") or provenance
            try:
                stored = check_classes(content.get("classes"))[0]  # type: ignore[arg-type]
                provenance = dict(provenance)
            except (TypeError, ValueError) as error:
                raise ClusterError(f"{path} is damaged: its classes or its provenance cannot be read ({error}).") from error
            classes, content = stored if classes is None else classes, content.get("clusters")
        elif isinstance(content, dict) and content.get("format") == RECORD_FORMAT:
            raise ClusterError(
                f"{path} is the record of a language model that came to no clusters. Run `semples clusters` again."
            )
        else:
            content = _plain(content)
        if classes is None:
            raise ClusterError(
                f"{path} holds clusters but not the order of the classes. Pass it: CategoryClusters.load(path, classes)."
            )
        try:
            return cls(content, classes, provenance)
        except ClusterError as error:
            raise ClusterError(f"{path}: {error}") from error

    @classmethod
    def bundled(cls, name: str) -> "CategoryClusters":
        """Clusters that come with the package: `"voc"` (five of our own) or `"coco"` (its 12 super-categories)."""
        from ..class_names import COCO_CLASSES, VOC_CLASSES

        if name.lower() not in ("voc", "coco"):
            raise ValueError(f"Clusters come with the package for 'voc' and 'coco'; got {name!r}. Use load(...).")
        clusters = _read(Path(__file__).with_name(f"{name.lower()}.json"))
        classes = list(VOC_CLASSES if name.lower() == "voc" else COCO_CLASSES)
        return cls(clusters, classes, {"source": f"bundled: {name.lower()}"})


def _read(path: Path) -> Any:
    """The content of a JSON or YAML file; a key that is there twice is an error, not a silent loss."""
    if not path.is_file():
        raise FileNotFoundError(f"No cluster file at {path}.")
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ClusterError(f"A cluster file must end in .json, .yaml or .yml; got {path.name!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=_unique) if path.suffix.lower() == ".json" else _yaml(text)
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ClusterError(f"{path} is not readable: {error}.") from error


def _plain(content: Any) -> Any:
    """Name -> classes, also from the form that language models are asked for: {"clusters": [{"name": ..., "classes": ...}]}."""
    if isinstance(content, dict) and list(content) == ["clusters"]:
        content = content["clusters"]
        if isinstance(content, list) and all(
            isinstance(c, dict) and set(c) == {"name", "classes"} and isinstance(c["name"], str) for c in content
        ):
            return _unique([(cluster["name"], cluster["classes"]) for cluster in content])
    return content


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({repr(key) for key in keys if keys.count(key) > 1})
        raise ClusterError(f"{', '.join(twice)} is there twice; one of them would be lost. Join them.")
    return found


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "YAML files need PyYAML: pip install 'semples-plugin[clusters]', or write JSON.", name="yaml"
        ) from error

    class Loader(yaml.SafeLoader):
        """Plain values only, and no key twice."""

    def mapping(loader: Any, node: Any) -> Dict[Any, Any]:
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ClusterError(f"every key must be the name of a cluster; line {key.start_mark.line + 1} has another.")
        return _unique([(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value])

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ClusterError(f"no readable YAML: {error}") from error
