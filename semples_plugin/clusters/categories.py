"""Category clusters: which classes share features (PCC, arXiv 2412.13823; CPC, arXiv 2508.17009).

`CategoryClusters` is a frozen mapping cluster name -> classes, every class in exactly one cluster, with a record of where it
came from: a language model (`language_model`), CLIP's text features (`text_features`), a JSON file, or a file of this package
(VOC: our own; COCO: its 12 super-categories). Flow: **categories** -> `tokens` and `branch` (tokens of a vision transformer,
patch contrast), and `PromptRefiner` (background prompts are repelled from a whole cluster). No reference code of the papers
exists: this is re-implemented from their description.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .._checks import check_classes, hard_labels, partition_faults
from .._files import PathLike, write_atomically
from ..class_names import COCO_CLASSES, VOC_CLASSES
from ..errors import ClusterError

__all__ = ["RECORD_FORMAT", "CategoryClusters", "refuse_double_keys"]

FORMAT = "semples-plugin clusters"
FORMAT_VERSION = 1
RECORD_FORMAT = "semples-plugin cluster record"  # what `language_model` writes when it fails


@dataclass(frozen=True, init=False, repr=False)
class CategoryClusters(Mapping[str, Tuple[str, ...]]):
    """A frozen mapping cluster name -> classes; every class is in exactly one cluster.

    Two are equal if classes, cluster names and the order of both are equal: then tokens of the one fit the other.

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
    _clusters: Dict[str, Tuple[str, ...]] = field(compare=False)
    _provenance: str = field(compare=False)  # JSON text, which nobody can change

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
        number = {member: k for k, members in enumerate(clusters.values()) for member in members}
        values = {
            "classes": order,
            "names": tuple(clusters),
            "index": tuple(number[name] for name in order),
            "_clusters": {name: tuple(members) for name, members in clusters.items()},
            "_provenance": json.dumps(dict(provenance or {}), ensure_ascii=False),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    # ------------------------------------------------------------------------------------------------ a mapping

    def __getitem__(self, name: str) -> Tuple[str, ...]:
        return self._clusters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._clusters)

    def __len__(self) -> int:
        return len(self._clusters)

    def __repr__(self) -> str:
        return f"CategoryClusters({self.as_dict()})"

    def __str__(self) -> str:
        width = max(len(name) for name in self.names)
        return "\n".join(f"{name:<{width}}  {', '.join(members)}" for name, members in self.items())

    @property
    def provenance(self) -> Dict[str, Any]:
        return json.loads(self._provenance)

    # ------------------------------------------------------------------------------------------------ labels and relations

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

    def changes_since(self, old: "CategoryClusters") -> List[str]:
        """What moved since `old`, one sentence each; empty if the partition is the same, whatever the clusters are called.

        Args:
            old: clusters of the same classes in the same order.
        """
        overlaps = [(-len(set(a) & set(b)), i, j) for i, a in enumerate(old.values()) for j, b in enumerate(self.values())]
        successor: Dict[int, int] = {}  # old cluster -> the new one that continues it, largest overlap first
        for size, i, j in sorted(overlaps):
            if size < 0 and i not in successor and j not in successor.values():
                successor[i] = j
        changes = [f"{old.names[i]!r} is gone" for i in range(len(old)) if i not in successor]
        changes += [f"{self.names[j]!r} is new" for j in range(len(self)) if j not in successor.values()]
        moves: Dict[Tuple[int, int], List[str]] = {}
        for name, i, j in zip(old.classes, old.index, self.index):
            if successor.get(i) != j:
                moves.setdefault((i, j), []).append(name)
        for (i, j), names in moves.items():
            changes.append(f"{', '.join(map(repr, names))} moved from {old.names[i]!r} to {self.names[j]!r}")
        return changes

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
        """Clusters from a file of `save`, or from a JSON mapping cluster name -> list of classes that was written by hand.

        Args:
            path: a `.json` file.
            classes: the class names in the order of your label columns. A file of `save` holds them; if both are there, they
                must be the same names, and the order of `classes` counts.

        Raises:
            FileNotFoundError: if there is no such file.
            ClusterError: if the file cannot be read, a key is in it twice, or the clusters do not fit the classes.
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
                f"{path} is the record of a language model that gave no final clusters. Run `semples clusters` again."
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
        if name.lower() not in ("voc", "coco"):
            raise ValueError(f"Clusters come with the package for 'voc' and 'coco'; got {name!r}. Use load(...).")
        clusters = _read(Path(__file__).with_name(f"{name.lower()}.json"))
        classes = list(VOC_CLASSES if name.lower() == "voc" else COCO_CLASSES)
        return cls(clusters, classes, {"source": f"bundled: {name.lower()}"})


def refuse_double_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    """The mapping of these pairs, for `json`'s `object_pairs_hook`.

    Raises:
        ClusterError: if a key is there twice; `json` by itself would drop all but the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({repr(key) for key in keys if keys.count(key) > 1})
        raise ClusterError(f"{', '.join(twice)} is there twice; one of them would be lost. Join them.")
    return found


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"No cluster file at {path}.")
    if path.suffix.lower() != ".json":
        raise ClusterError(f"A cluster file must end in .json; got {path.name!r}.")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=refuse_double_keys)
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ClusterError(f"{path} is not readable: {error}.") from error


def _plain(content: Any) -> Any:
    """Name -> classes, also from the form that language models answer in: {"clusters": [{"name": ..., "classes": ...}]}."""
    if isinstance(content, dict) and list(content) == ["clusters"]:
        content = content["clusters"]
        if isinstance(content, list) and all(
            isinstance(c, dict) and set(c) == {"name", "classes"} and isinstance(c["name"], str) for c in content
        ):
            return refuse_double_keys([(cluster["name"], cluster["classes"]) for cluster in content])
    return content
