"""Which forward pass a loss was computed from, read off the autograd graph. Flow: `recorder` -> **graph** -> `loop`."""

from __future__ import annotations

from typing import Any, FrozenSet, Iterable, List, Sequence, Set

from torch import Tensor

__all__ = ["Nodes", "found_in", "nodes_of", "tensors_in"]

Nodes = FrozenSet[Any]  # grad_fn objects


def tensors_in(value: Any) -> List[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):  # also the outputs of Hugging Face models
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def nodes_of(value: Any) -> Nodes:
    """The graph nodes that made the tensors in `value`; leaves and detached tensors have none."""
    return frozenset(tensor.grad_fn for tensor in tensors_in(value) if tensor.grad_fn is not None)


def found_in(loss: Tensor, wanted: Sequence[Nodes]) -> List[int]:
    """Which of these sets of nodes the graph of `loss` reaches, as their indices in order.

    A node's inputs are always older than the node, so nothing older than the oldest wanted node is visited: for a loss on the
    outputs of a network that is a handful of nodes.

    Args:
        loss: any tensor with a graph.
        wanted: one set of nodes per forward pass.
    """
    open_sets = {index for index, nodes in enumerate(wanted) if nodes}
    oldest = min((_age(node) for nodes in wanted for node in nodes), default=0)
    found: Set[int] = set()
    seen: Set[Any] = set()
    stack: List[Any] = [loss.grad_fn]
    while stack and open_sets:
        node = stack.pop()
        if node is None or node in seen or _age(node) < oldest:
            continue
        seen.add(node)
        hits = {index for index in open_sets if node in wanted[index]}
        found |= hits
        open_sets -= hits
        stack.extend(_inputs(node))
    return sorted(found)


def _inputs(node: Any) -> Iterable[Any]:
    return (parent for parent, _ in node.next_functions)


def _age(node: Any) -> int:
    """The number of the node in the order of creation; unknown in old versions of torch: then every node is visited."""
    number = getattr(node, "_sequence_nr", None)
    return 0 if number is None else int(number())
