"""Learnable cluster tokens in the token sequence of any vision transformer, by hooks, without editing the host (PCC).

A hook before every block appends the cluster tokens to the host's own. A hook after the block removes them again, and their
rows and columns from the attention that the block returns; the next block gets them back. So the host always sees its own
number of tokens, and its slices and reshapes stay valid. Only an `attention_bias` needs more: inside the `with`, every block's
`forward` then runs in a mode that adds the bias to the attention logits. Cluster-level image labels supervise the tokens after
the last block. No reference code of PCC (arXiv 2412.13823) exists: this is re-implemented from its description. Flow:
`categories` -> **tokens** -> `branch`.
"""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._checks import check_number
from .._hooks import Hook, follow, unwrap
from ..errors import HostError
from .categories import CategoryClusters

__all__ = ["ClusterTokens", "Insertion", "check_free", "find_blocks", "token_size"]

OWNER = "clusters"  # of the hooks
_SOFTMAX = (Tensor.softmax, torch.softmax, F.softmax)
_FUSED: Any = F.scaled_dot_product_attention


def find_blocks(model: nn.Module, path: str = "blocks") -> List[nn.Module]:
    """The transformer blocks of a host, first to last.

    Raises:
        HostError: if there is no such list of modules.
    """
    inner = unwrap(model)
    try:
        found: Any = inner.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, (nn.ModuleList, nn.Sequential)) or len(found) == 0:
        what = "there is none" if found is None else f"it is a {type(found).__name__}"
        names = ", ".join(repr(name) for name, _ in inner.named_children())
        raise HostError(
            f"Cluster tokens need a list of transformer blocks {path!r} in {type(inner).__name__}, but {what}. Its modules are "
            f"{names or 'none'}. If it is a plain vision transformer, name the list: blocks='encoder.layers'; other networks "
            "cannot take tokens."
        )
    return list(found)


def token_size(model: nn.Module, blocks: str = "blocks") -> int:
    """D, the size of a host's tokens: its `embed_dim`, or the last dimension of `cls_token` or `pos_embed`.

    Raises:
        HostError: if the host has no such blocks, or none of these attributes.
    """
    inner = unwrap(model)
    find_blocks(inner, blocks)
    size = getattr(inner, "embed_dim", None)
    for name in ("cls_token", "pos_embed"):
        value = getattr(inner, name, None)
        if size is None and isinstance(value, Tensor) and value.ndim == 3:
            size = value.shape[2]
    if not isinstance(size, int):
        raise HostError(
            f"The size of a token of {type(inner).__name__} could not be read from `embed_dim`, `cls_token` or `pos_embed`. "
            "Give it as a number."
        )
    return size


class ClusterTokens(nn.Module):
    """One learnable token per category cluster, concatenated to a vision transformer's tokens (PCC, arXiv 2412.13823).

    Related classes share information through the token of their cluster: the token attends to the patches, and the patches
    attend to the token. After the last block

        logit_k = w_k . LN(t_k) + b_k

    and the loss is the multi-label soft-margin loss on cluster-level labels (a cluster is present if one of its classes is).

    The host does not change: its parameters, `state_dict` and checkpoints stay its own, and nothing is left after the `with`.
    Save the tokens by their own `state_dict()`, and insert them for inference as well. The attention that a block returns loses
    the rows and columns of the tokens and is not normalized again.

    A block must return tokens (B, N, D), or a tuple that begins with them and may hold attention (B, heads, N, N) and features
    (B, N, D). What a host records inside a block, such as by a hook on its attention, still has the cluster tokens as its last
    rows and columns. Attention that depends on positions or windows (Swin, BEiT, rotary embeddings) cannot take such tokens.

    Args:
        clusters: K clusters.
        dim: D, size of a token; or the host, to read it from.
        attention_bias: added to the attention logits from the host's tokens to the cluster tokens; read on insertion. 0: the
            host's tokens attend to them as to all others, and its attention runs unchanged. -4: they begin with little weight
            in a trained host. -inf: they attend to the host's tokens, but not the other way round, so the host's outputs do not
            change.
        blocks: name of the host's list of blocks.
        seed: of the initial values (normal, 0.02).

    Attributes:
        output: (B, K, D) tokens after the last block of the last forward pass, or None.

    Example:
        >>> tokens = ClusterTokens(clusters, model)  # model: a ViT with `blocks`
        >>> with tokens.insert(model):
        ...     logits = model(img)
        ...     loss = host_loss(logits, labels) + tokens.loss(labels)
    """

    def __init__(
        self,
        clusters: CategoryClusters,
        dim: Union[int, nn.Module],
        *,
        attention_bias: float = 0.0,
        blocks: str = "blocks",
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(clusters, CategoryClusters):
            raise TypeError(f"`clusters` must be CategoryClusters; got {type(clusters).__name__}.")
        size = token_size(dim, blocks) if isinstance(dim, nn.Module) else dim
        check_number("dim", size, 1, whole=True, advice=", or the host itself")
        if not isinstance(attention_bias, (int, float)) or not attention_bias < float("inf"):
            raise ValueError(f"`attention_bias` must be a number or -inf; got {attention_bias!r}.")
        self.clusters, self.attention_bias, self.blocks = clusters, float(attention_bias), blocks
        generator = torch.Generator().manual_seed(seed)
        self.tokens = nn.Parameter(0.02 * torch.randn(1, len(clusters), size, generator=generator))  # (1, K, D)
        self.norm = nn.LayerNorm(size)
        self.weight = nn.Parameter(0.02 * torch.randn(len(clusters), size, generator=generator))  # (K, D)
        self.bias = nn.Parameter(torch.zeros(len(clusters)))
        self.output: Optional[Tensor] = None

    def insert(self, model: nn.Module) -> "Insertion":
        """Put the tokens into the forward passes of `model`, in training and in inference, for the time of a `with`.

        Raises:
            HostError: if the model has no list of blocks; inside the `with`, if a block does not take or return tokens.
        """
        follow(self, model)
        return Insertion(self, model)

    def pop_output(self) -> Tensor:
        """Return the tokens (B, K, D) of the last forward pass and forget them, so that only the caller holds their graph.

        Raises:
            HostError: if no forward pass ran in the `with` since the last call.
        """
        output, self.output = self.output, None
        if output is None:
            raise HostError(
                "There are no cluster tokens to read: no forward pass of the host ran to its last block inside "
                "`with tokens.insert(model):` since they were last read."
            )
        return output

    def logits(self, output: Tensor) -> Tensor:
        """Cluster logits (B, K) float32 of tokens (B, K, D)."""
        return (self.norm(output.float()) * self.weight).sum(-1) + self.bias

    def loss(self, labels: Tensor, output: Optional[Tensor] = None) -> Tensor:
        """Multi-label soft-margin loss of the cluster logits.

        Args:
            labels: (B, C) multi-hot class labels.
            output: (B, K, D) tokens; by default those of the last forward pass.

        Returns:
            Scalar, attached to the tokens and the host.
        """
        if output is None:
            output = self.pop_output()
            if torch.is_grad_enabled() and self.training and self.tokens.requires_grad and not output.requires_grad:
                raise HostError(
                    "The host's last forward pass ran without gradients, so this loss would train nothing. Compute the loss "
                    "right after the pass that it belongs to."
                )
        logits, wanted = self.logits(output), self.clusters.labels(labels).to(output.device).float()
        # Written out, since `adapters.attach` takes a call of torch's own function for the host's label loss.
        return -(wanted * F.logsigmoid(logits) + (1 - wanted) * F.logsigmoid(-logits)).mean()

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "output": None}  # a graph can neither be copied nor pickled

    def extra_repr(self) -> str:
        return f"{len(self.clusters)} clusters: {', '.join(self.clusters.names)}"


class Insertion:
    """Hooks that put `ClusterTokens` into a host; `ClusterTokens.insert` returns it, for use in a `with`."""

    def __init__(self, tokens: ClusterTokens, model: nn.Module):
        self.tokens, self.name = tokens, type(unwrap(model)).__name__
        self.modules = find_blocks(model, tokens.blocks)
        self._carried: List[Optional[Tensor]] = [None] * len(self.modules)  # tokens after each block
        self._length = [0] * len(self.modules)  # the host's tokens in each block
        self._tracked = False  # whether the pass began with gradients
        self._handles: List[Any] = []
        self._forwards: List[Tuple[nn.Module, Any]] = []
        self._next = 0  # the block that runs next

    def __enter__(self) -> "Insertion":
        if self._handles:
            raise HostError("These cluster tokens are in the host already; use one `with` at a time.")
        check_free(self.modules, self.name)
        try:
            for i, module in enumerate(self.modules):
                self._handles.append(
                    module.register_forward_pre_hook(Hook(functools.partial(self._before, i), OWNER), with_kwargs=True)
                )
                handle = module.register_forward_hook(Hook(functools.partial(self._after, i), OWNER))
                # First in order, so that the host's own hooks see the host's own tokens.
                module._forward_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
                self._handles.append(handle)
                if self.tokens.attention_bias:
                    self._forwards.append((module, module.__dict__.get("forward")))
                    module.forward = _BiasedForward(self, i, module)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        for module, own in self._forwards:
            module.__dict__.pop("forward")
            if own is not None:
                module.forward = own
        self._forwards = []
        for handle in self._handles:
            handle.remove()
        self._handles, self.tokens.output = [], None
        self._carried = [None] * len(self.modules)

    def _before(self, i: int, module: nn.Module, inputs: Tuple[Any, ...], keywords: Optional[Dict[str, Any]] = None) -> Any:
        if getattr(module, "_is_replica", False):
            raise HostError(
                "Cluster tokens cannot be put into replicas of torch.nn.DataParallel. Use DistributedDataParallel (one process "
                "per GPU) or one GPU."
            )
        x = inputs[0] if inputs else None
        others = [*inputs[1:], *(keywords or {}).values()]
        size = self.tokens.tokens.shape[2]
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] != size:
            raise HostError(
                f"The tokens of {self.name} have size {x.shape[2]}, those of the cluster tokens {size}. Make them for it: "
                "ClusterBranch(clusters, model) or ClusterTokens(clusters, model)."
            )
        if not isinstance(x, Tensor) or x.ndim != 3 or any(isinstance(o, Tensor) for o in others):
            got = ", ".join(f"tensor {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in (x, *others))
            raise HostError(
                f"Expected block {i} of {self.name} to be called with tokens (B, N, {size}) and no other tensor; got {got}. "
                "Masks, rotary embeddings and the like do not cover additional tokens."
            )
        if i == 0:
            self._carried = [None] * len(self.modules)
            self._next = 0
            self._tracked = torch.is_grad_enabled() or x.requires_grad
            follow(self.tokens, x.device)
            before: Optional[Tensor] = self.tokens.tokens.to(x.dtype).expand(len(x), -1, -1)  # (B, K, D)
        else:
            # Attached to the host's tokens, if the host passes them on: checkpointing may run a block of an earlier pass again.
            owner, number, carried = getattr(x, "_cluster_tokens", (None, None, None))
            before = carried if owner is self and number == i - 1 else self._carried[i - 1]
        if before is None or len(before) != len(x):
            raise HostError(
                f"Block {i} of {self.name} ran on {len(x)} images, but block {i - 1} before it did not. Cluster tokens need "
                "blocks that run one after the other on the whole batch."
            )
        if self._tracked and not torch.is_grad_enabled():
            raise HostError(
                f"Block {i} of {self.name} runs without gradients inside a pass with gradients, as reentrant checkpointing "
                "does; the cluster tokens would be cut off. Use checkpoint(..., use_reentrant=False) or none."
            )
        self._length[i] = x.shape[1]
        changed = (torch.cat([x, before.to(x.dtype)], dim=1), *inputs[1:])  # (B, N + K, D)
        return changed, keywords

    def _after(self, i: int, module: nn.Module, inputs: Any, output: Any) -> Any:
        parts = output if isinstance(output, tuple) else (output,)
        length, total = self._length[i], self._length[i] + self.tokens.tokens.shape[1]
        x = parts[0]
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[1] != total:
            got = f"tensor {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise HostError(
                f"Expected block {i} of {self.name} to return its {total} tokens (B, N, D), alone or first in a tuple; got "
                f"{got}."
            )
        carried = x[:, length:].clone()  # a view would keep all of the block's output in memory
        if i == self._next:  # not a block that checkpointing runs again
            self._carried[i], self._next = carried, i + 1
            if self._next == len(self.modules):
                self.tokens.output = carried
        stripped = (x[:, :length], *(self._strip(value, length, total, x.shape[2]) for value in parts[1:]))
        stripped[0]._cluster_tokens = (self, i, carried)  # type: ignore[attr-defined]
        if not isinstance(output, tuple):
            return stripped[0]
        return type(output)(*stripped) if hasattr(output, "_fields") else stripped

    def _strip(self, value: Any, length: int, total: int, size: int) -> Any:
        """Attention (B, heads, N + K, N + K) or features (B, N + K, D) without what belongs to the cluster tokens."""
        if type(value) in (tuple, list):
            return type(value)(self._strip(part, length, total, size) for part in value)
        if isinstance(value, dict):
            return {key: self._strip(part, length, total, size) for key, part in value.items()}
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if total == size and value.ndim == 3:
            raise HostError(
                f"A block of {self.name} returns a tensor {tuple(value.shape)}, and {total} is both the number of tokens and "
                "their size, so the axis of the tokens is ambiguous. Use another number of clusters."
            )
        for axis in range(1, value.ndim):
            if value.shape[axis] == total:
                value = value.narrow(axis, 0, length)
        return value


def check_free(modules: Sequence[nn.Module], name: str) -> None:
    """Check that no cluster tokens and no cluster branch are in the host.

    Raises:
        HostError: if one of the modules has their hooks.
    """
    for module in modules:
        if any(isinstance(hook, Hook) and hook.owner == OWNER for hook in module._forward_hooks.values()):
            raise HostError(f"{name} holds cluster tokens or a cluster branch already; leave that `with` first.")


class _BiasedForward:
    """A block's own forward pass with the attention bias, which checkpointing may run again in the backward pass."""

    def __init__(self, insertion: Insertion, i: int, module: nn.Module):
        self.insertion, self.i, self.module, self.forward = insertion, i, module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tokens = self.insertion.tokens
        with _AttentionBias(tokens, self.insertion._length[self.i]) as bias:
            output = self.forward(*args, **kwargs)
        if not bias.applied:
            raise HostError(
                f"attention_bias={tokens.attention_bias} was asked for, but no softmax or scaled_dot_product_attention "
                f"over all tokens was seen in block {self.i} of {self.insertion.name}, so it had no effect. Use "
                "attention_bias=0."
            )
        return output

    def __reduce__(self) -> Tuple[Any, ...]:  # a copy of the host has its own forward pass
        return _own_forward, (self.module,)


def _own_forward(module: nn.Module) -> Any:
    return type(module).forward.__get__(module)


class _AttentionBias(TorchFunctionMode):
    """Adds `attention_bias` to the attention logits from the host's tokens to the cluster tokens, inside one block."""

    def __init__(self, tokens: ClusterTokens, length: int):
        super().__init__()
        self.tokens, self.length, self.applied = tokens, length, 0

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        total = self.length + self.tokens.tokens.shape[1]
        if not args:
            return func(*args, **kwargs)
        if func in _SOFTMAX and args[0].ndim >= 2 and args[0].shape[-2:] == (total, total):
            self.applied += 1
            return func(args[0] + self._matrix(total, args[0]), *args[1:], **kwargs)
        if func is _FUSED and args[0].shape[-2] == total:
            given = kwargs.pop("attn_mask", None) if len(args) < 4 else args[3]
            if given is not None or kwargs.get("is_causal") or any(args[5:6]):
                raise HostError("The host masks its attention; attention_bias cannot be added. Use attention_bias=0.")
            self.applied += 1
            return func(*args[:3], self._matrix(total, args[0]), *args[4:], **kwargs)
        return func(*args, **kwargs)

    def _matrix(self, total: int, like: Tensor) -> Tensor:
        matrix = torch.zeros(total, total, dtype=like.dtype, device=like.device)
        matrix[: self.length, self.length :] = self.tokens.attention_bias
        return matrix
