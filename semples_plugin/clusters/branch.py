"""PCC and CPC on a vision transformer: cluster tokens, HV-BiLSTM, patch classifier and patch contrast in one module.

`ClusterBranch` is what people build for this part, as they build `PromptRefiner` for the prompts. It reads and extends a host
by hooks and gives one loss with named terms. Flow: host's patch tokens -> (`HVBiLSTM`) -> `PatchClassifier` -> top-k pooling ->
L_MCE and patch contrast; `ClusterTokens` -> loss on cluster labels. No reference code of PCC (arXiv 2412.13823) or CPC (arXiv
2508.17009) exists: this is re-implemented from their description, and no published figure is claimed.
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from .._checks import check_number, hard_labels
from .._files import PathLike, read_tensors, write_tensors
from .._hooks import Hook, follow, unwrap
from .._torch import full_precision
from ..errors import ClusterError, HostError
from .categories import CategoryClusters
from .heads import HVBiLSTM, PatchClassifier, confident_patches, top_k_pool
from .losses import multi_label_cross_entropy, patch_contrast
from .tokens import OWNER, ClusterTokens, check_free, find_blocks, token_size

__all__ = ["BranchInsertion", "BranchOutput", "ClusterBranch", "HostTokens"]

FORMAT = "semples-plugin cluster branch"
FORMAT_VERSION = 1
_PLAIN_OPTIONS = (  # those that are attributes of a branch under their own names
    *("lambda_tokens", "lambda_mce", "lambda_contrast", "attention_bias", "top_k", "dropout", "temperature"),
    *("related_weight", "threshold", "per_class", "blocks", "patch_embed", "seed"),
)


class HostTokens(NamedTuple):
    """The tokens of one forward pass of the host; what `ClusterBranch.pop_tokens` returns.

    Attributes:
        tokens: (B, K, D) cluster tokens after the last block, or None if the branch has none.
        patches: (B, h w, D) patch tokens after the last block.
        grid: (h, w).
        tracked: whether the pass ran with gradients.
    """

    tokens: Optional[Tensor]
    patches: Tensor
    grid: Tuple[int, int]
    tracked: bool = True


class BranchOutput(NamedTuple):
    """What `ClusterBranch.compute` returns.

    Attributes:
        loss: scalar, float32, attached to the branch and the host.
        terms: the unweighted terms by name: cluster_tokens, mce, patch_contrast, where they apply.
    """

    loss: Tensor
    terms: Dict[str, Tensor]


class ClusterBranch(nn.Module):
    """Losses of PCC and CPC on a vision transformer, for its own training loop.

        L = lambda_tokens L_tokens + lambda_mce L_MCE + lambda_contrast L_contrast

    L_tokens: the loss of `ClusterTokens`; L_MCE: multi-label cross-entropy of the top-k pooled patch scores (PCC); L_contrast:
    the patch contrast of CPC. A weight of 0 leaves a term out, and the modules that only this term needs are not built. The
    branch has parameters of its own: add them to your optimizer (with several processes, average their gradients), or let
    `adapters.attach(..., branch=branch, branch_optimizer=...)` do both. The defaults of the weights, of `top_k` and of
    `threshold` are what did best on one seed of `examples/clusters`.

    Args:
        clusters: K category clusters of C classes, in the order of the label columns.
        dim: D, size of a token; or the host, to read it from.
        lambda_tokens: weight of L_tokens; with 0 there are no cluster tokens.
        lambda_mce: weight of L_MCE; with 0 there is no patch classifier, and `lambda_contrast` must be 0 as well.
        lambda_contrast: weight of L_contrast.
        bilstm: whether HV-BiLSTM refines the patch tokens before they are classified.
        attention_bias: see `ClusterTokens`.
        top_k: patches per class in the pooling: a whole number, or a share of all patches between 0 and 1.
        dropout: of HV-BiLSTM, from 0 to 1.
        temperature: of the contrast, > 0.
        related_weight: of the contrast, from 0 to 1: weight of a negative of the same cluster, see `losses.patch_contrast`.
        threshold: from 0 to 1: score from which a patch counts for its class, see `heads.confident_patches`.
        per_class: patches per image and class in the contrast at most.
        blocks: name of the host's list of transformer blocks.
        patch_embed: name of the host's module that makes the patch tokens; its output gives the size of the patch grid.
        seed: of the initial values.

    Example:
        >>> branch = ClusterBranch(clusters, model)  # model: a ViT with `blocks` and `patch_embed`
        >>> with branch.insert(model):
        ...     logits = model(img)
        ...     loss = host_loss(logits, labels) + branch(labels)
    """

    def __init__(
        self,
        clusters: CategoryClusters,
        dim: Union[int, nn.Module],
        *,
        lambda_tokens: float = 1.0,
        lambda_mce: float = 0.2,
        lambda_contrast: float = 0.1,
        bilstm: bool = True,
        attention_bias: float = 0.0,
        top_k: Union[int, float] = 0.15,
        dropout: float = 0.2,
        temperature: float = 0.1,
        related_weight: float = 0.5,
        threshold: float = 0.8,
        per_class: int = 8,
        blocks: str = "blocks",
        patch_embed: str = "patch_embed",
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(clusters, CategoryClusters):
            raise TypeError(f"`clusters` must be CategoryClusters; got {type(clusters).__name__}.")
        weights = {"lambda_tokens": lambda_tokens, "lambda_mce": lambda_mce, "lambda_contrast": lambda_contrast}
        shares = {"dropout": dropout, "related_weight": related_weight, "threshold": threshold}
        for name, value in {**weights, **shares, "temperature": temperature}.items():
            check_number(name, value, 0)
            if name in shares and value > 1:
                raise ValueError(f"`{name}` must be from 0 to 1; got {value!r}.")
        if temperature == 0:
            raise ValueError("`temperature` must be > 0, since cosines are divided by it; got 0.")
        check_number("per_class", per_class, 1, whole=True)
        if not isinstance(bilstm, bool):
            raise TypeError(f"`bilstm` must be True or False; got {bilstm!r}.")
        if not isinstance(top_k, float) or not 0 < top_k < 1:
            check_number("top_k", top_k, 1, whole=True, advice=", or a share between 0 and 1")
        if lambda_contrast and not lambda_mce:
            raise ValueError(
                "`lambda_contrast` needs `lambda_mce` > 0: the contrast picks its patches by the patch classifier."
            )
        if not (lambda_tokens or lambda_mce):
            raise ValueError("A branch needs `lambda_tokens` or `lambda_mce`; both are 0, so it would do nothing.")
        size = token_size(dim, blocks) if isinstance(dim, nn.Module) else dim
        check_number("dim", size, 1, whole=True)
        self.clusters, self.size, self.blocks, self.patch_embed = clusters, int(size), blocks, patch_embed
        self.lambda_tokens, self.lambda_mce, self.lambda_contrast = lambda_tokens, lambda_mce, lambda_contrast
        self.attention_bias, self.top_k, self.dropout, self.temperature = attention_bias, top_k, dropout, temperature
        self.related_weight, self.threshold, self.per_class, self.seed = related_weight, threshold, per_class, seed
        self.tokens: Optional[ClusterTokens] = None
        self.norm: Optional[nn.LayerNorm] = None
        self.bilstm: Optional[HVBiLSTM] = None
        self.classifier: Optional[PatchClassifier] = None
        with torch.random.fork_rng(devices=[]):  # the host's random numbers stay what they are without the branch
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
            if lambda_tokens:
                self.tokens = ClusterTokens(clusters, size, attention_bias=attention_bias, blocks=blocks, seed=seed)
            if lambda_mce:
                self.norm = nn.LayerNorm(size)
                self.bilstm = HVBiLSTM(size, dropout=dropout) if bilstm else None
                self.classifier = PatchClassifier(size if self.bilstm is None else self.bilstm.out_dim, len(clusters.classes))
        self._last: Optional[HostTokens] = None

    @property
    def options(self) -> Dict[str, Any]:
        """The keyword arguments that build this branch as it is now."""
        return {"bilstm": self.bilstm is not None, **{name: getattr(self, name) for name in _PLAIN_OPTIONS}}

    @property
    def term_weights(self) -> Dict[str, float]:
        """The weight of every term."""
        return {
            "cluster_tokens": self.lambda_tokens,
            "mce": self.lambda_mce,
            "patch_contrast": self.lambda_contrast,
        }

    # ------------------------------------------------------------------------------------------------ in the host

    def insert(self, model: nn.Module) -> "BranchInsertion":
        """Put the branch into the forward passes of `model` for the time of a `with`.

        The host's code and weights stay as they are. The branch moves to the host's device. Its training mode is its own: call
        `branch.eval()` for inference.

        Raises:
            HostError: if the model is not a vision transformer of the expected kind.
        """
        follow(self, model)
        return BranchInsertion(self, model)

    def pop_tokens(self) -> HostTokens:
        """Return the tokens of the last forward pass and forget them, so that only the caller holds their graph.

        Raises:
            HostError: if no forward pass ran inside the `with` since the last call.
        """
        tokens, self._last = self._last, None
        if tokens is None:
            raise HostError(
                "There is no forward pass of the host to read: expected one inside `with branch.insert(model):`, and then the "
                "branch, once per pass and still inside. adapters.attach(..., branch=branch) adds the loss by itself."
            )
        return tokens

    def store(self, patches: Tensor, grid: Tuple[int, int]) -> None:
        """Keep the tokens of a forward pass for `pop_tokens`; called by `BranchInsertion`."""
        tokens = None if self.tokens is None else self.tokens.pop_output()
        self._last = HostTokens(tokens, patches, grid, torch.is_grad_enabled())

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._last = None

    # ------------------------------------------------------------------------------------------------ losses

    def forward(self, labels: Tensor) -> Tensor:
        """The loss of the host's last forward pass; add it to the host's own.

        Args:
            labels: (B, C) image-level labels, multi-hot.

        Returns:
            Scalar, float32.
        """
        return self.compute(labels).loss

    def compute(self, labels: Tensor, tokens: Optional[HostTokens] = None) -> BranchOutput:
        """Loss and named terms.

        Args:
            labels: (B, C) image-level labels, multi-hot.
            tokens: of an earlier `pop_tokens()`; by default those of the last forward pass.

        Raises:
            HostError: if there was no forward pass, or it ran without gradients while the branch is in training.
        """
        tokens = self.pop_tokens() if tokens is None else tokens
        expected = (len(tokens.patches), len(self.clusters.classes))
        if tuple(labels.shape) != expected:
            raise ValueError(f"`labels` must have shape (B, C) = {expected}; got {tuple(labels.shape)}.")
        if torch.is_grad_enabled() and self.training and not tokens.tracked:
            raise HostError(
                "The host's last forward pass ran without gradients, so this loss would train nothing of it. Compute the loss "
                "right after the pass that it belongs to; for the terms alone use branch.eval() or torch.no_grad()."
            )
        device = tokens.patches.device
        with full_precision(device):
            return self._terms(tokens, hard_labels(labels).to(device), device)

    def _terms(self, tokens: HostTokens, labels: Tensor, device: torch.device) -> BranchOutput:
        terms: Dict[str, Tensor] = {}
        if self.tokens is not None:
            terms["cluster_tokens"] = self.tokens.loss(labels, tokens.tokens)
        if self.classifier is not None:
            features = self.features(tokens)
            scores = self.classifier(features)  # (B, N, C + 1)
            terms["mce"] = multi_label_cross_entropy(top_k_pool(scores, self._top_k(scores.shape[1])), labels)
            if self.lambda_contrast:
                image, patch, name = confident_patches(scores.detach(), labels, self.threshold, self.per_class)
                terms["patch_contrast"] = patch_contrast(
                    features[image, patch], name, self._related(device), self.temperature, self.related_weight, background=0
                )
        loss = torch.stack([self.term_weights[name] * term.float() for name, term in terms.items()]).sum()
        return BranchOutput(loss, terms)

    def features(self, tokens: HostTokens) -> Tensor:
        """Patch features (B, N, D') that are classified: LayerNorm, then HV-BiLSTM if there is one."""
        if not isinstance(tokens, HostTokens):
            raise TypeError(
                f"`tokens` must be what branch.pop_tokens() returns after a forward pass; got {type(tokens).__name__}."
            )
        if self.norm is None:
            raise HostError("This branch has no patch classifier; build it with lambda_mce > 0.")
        follow(self, tokens.patches.device)
        with full_precision(tokens.patches.device):  # the host may run under autocast
            x = self.norm(tokens.patches.float())
            return x if self.bilstm is None else self.bilstm(x, tokens.grid)

    def cam(self, tokens: HostTokens) -> Tensor:
        """The patch classifier's class map (PCC): the scores Z on the patch grid, without the background channel.

        PCC makes its pseudo masks from this map.

        Args:
            tokens: of `pop_tokens()`.

        Returns:
            (B, C, h, w) in [0, 1].

        Raises:
            HostError: if the branch has no patch classifier.
        """
        features = self.features(tokens)
        assert self.classifier is not None  # else `features` raises
        with full_precision(features.device):
            scores = self.classifier(features)[:, :, 1:]  # (B, N, C)
        return scores.transpose(1, 2).reshape(len(scores), -1, *tokens.grid)  # (B, C, h, w)

    # ------------------------------------------------------------------------------------------------ files

    def save(self, path: PathLike) -> None:
        """Write the branch's weights, clusters and options as safetensors; nothing of the host is in the file."""
        facts = {
            "classes": list(self.clusters.classes),
            "clusters": self.clusters.as_dict(),
            "provenance": self.clusters.provenance,
            "dim": self.size,
            "options": {**self.options, "attention_bias": str(self.attention_bias)},  # JSON has no infinity
        }
        write_tensors(path, self.state_dict(), FORMAT, FORMAT_VERSION, facts)

    @classmethod
    def load(cls, path: PathLike) -> "ClusterBranch":
        """The branch that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ClusterError: if the file is damaged or is not a cluster branch.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"No cluster branch at {os.fspath(path)}. Write one with branch.save(path).")
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
                raise ValueError(f"format {metadata.get('format')!r}, version {metadata.get('version')!r}")
            facts = json.loads(metadata["facts"])
            options = {**facts["options"], "attention_bias": float(facts["options"]["attention_bias"])}
            branch = cls(CategoryClusters(facts["clusters"], facts["classes"], facts["provenance"]), facts["dim"], **options)
            branch.load_state_dict(tensors)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ClusterError(
                f"{os.fspath(path)} is damaged or is not a cluster branch ({error}). Expected a file of branch.save(path), "
                f"format {FORMAT!r}, version {FORMAT_VERSION}."
            ) from error
        return branch

    # ------------------------------------------------------------------------------------------------ inside

    def _top_k(self, count: int) -> int:
        return max(1, round(self.top_k * count)) if isinstance(self.top_k, float) else self.top_k

    def _related(self, device: torch.device) -> Tensor:
        """(C + 1, C + 1) bool: background is related to itself alone."""
        count = len(self.clusters.classes) + 1
        related = torch.zeros(count, count, dtype=torch.bool, device=device)
        related[0, 0] = True
        related[1:, 1:] = self.clusters.related(device)
        return related

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a graph can neither be copied nor pickled

    def extra_repr(self) -> str:
        used = ", ".join(f"{name} {value:g}" for name, value in self.term_weights.items() if value)
        return f"{len(self.clusters)} clusters of {len(self.clusters.classes)} classes; {used}"


class BranchInsertion:
    """Hooks that hand a host's patch tokens to a `ClusterBranch`; `ClusterBranch.insert` returns it, for use in a `with`."""

    def __init__(self, branch: ClusterBranch, model: nn.Module):
        self.branch, self.name = branch, type(unwrap(model)).__name__
        self.blocks = find_blocks(model, branch.blocks)
        inner = unwrap(model)
        try:
            self.embed = inner.get_submodule(branch.patch_embed)
        except AttributeError as error:
            names = ", ".join(repr(name) for name, _ in inner.named_children())
            raise HostError(
                f"{self.name} has no module {branch.patch_embed!r}, which the size of the patch grid is read from. "
                f"Its modules are {names}. Name it: patch_embed='...'."
            ) from error
        self.tokens = None if branch.tokens is None else branch.tokens.insert(model)
        self._grid: Optional[Tuple[int, int]] = None
        self._done = False  # whether a pass has reached the last block
        self._handles: List[Any] = []

    def __enter__(self) -> ClusterBranch:
        if self._handles:
            raise HostError("This cluster branch is in the host already; use one `with` at a time.")
        check_free([*self.blocks, self.embed], self.name)
        if self.tokens is not None:
            self.tokens.__enter__()
        # These hooks run after those of the cluster tokens, so they get the host's own tokens.
        self._handles.append(self.embed.register_forward_hook(Hook(self._embedded, OWNER)))
        self._handles.append(self.blocks[-1].register_forward_hook(Hook(self._finished, OWNER)))
        return self.branch

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._grid, self._done = [], None, False
        self.branch.clear()
        if self.tokens is not None:
            self.tokens.__exit__(*error)

    def _embedded(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._grid = _grid(inputs[0], output, module, self.branch.size)

    def _finished(self, module: nn.Module, inputs: Any, output: Any) -> None:
        grid, self._grid = self._grid, None
        if grid is None and self._done:
            return  # checkpointing runs this block again in the backward pass
        if grid is None:
            raise HostError(f"The blocks ran, but {self.branch.patch_embed!r} did not run before them in this forward pass.")
        self._done = True
        x = output[0] if isinstance(output, tuple) else output
        count = grid[0] * grid[1]
        if x.shape[1] < count:
            raise HostError(f"The last block gives {x.shape[1]} tokens, fewer than the {grid[0]} x {grid[1]} patches.")
        self.branch.store(x[:, x.shape[1] - count :], grid)  # class and register tokens come first


def _grid(img: Any, output: Any, embed: nn.Module, size: int) -> Tuple[int, int]:
    """(h, w) of the patches of an image (B, 3, H, W), from what the patch embedding returned for it."""
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or not isinstance(img, Tensor) or img.ndim != 4:
        got = f"tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise HostError(f"Expected {type(embed).__name__} to turn an image batch into tokens (B, N, D) or a map; got {got}.")
    if output.ndim == 4:  # (B, D, h, w), or timm's (B, h, w, D)
        return (output.shape[2], output.shape[3]) if output.shape[1] == size else (output.shape[1], output.shape[2])
    count, height, width = output.shape[1], img.shape[2], img.shape[3]
    patch = getattr(embed, "patch_size", None)
    if patch is not None:
        tall, wide = (patch, patch) if isinstance(patch, int) else patch
        rows, columns = height // int(tall), width // int(wide)
    else:
        rows = max(1, round((count * height / width) ** 0.5))
        columns = count // rows
    if rows * columns != count:
        raise HostError(
            f"{type(embed).__name__} gives {count} patches for an image of {height} x {width}, which is no grid of {rows} "
            "rows. A cluster branch needs the patch tokens alone, row by row."
        )
    return rows, columns
