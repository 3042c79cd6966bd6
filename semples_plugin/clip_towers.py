"""CLIPs whose text tower runs as its own package wrote it: any attention, any pooling, any projection.

`ClipEncoder` runs the parts of a causal text tower in OpenAI's layout. The towers here are called whole, on token ids. For a
prompt, the token embedding is replaced, in a copy of the model that shares all weights, by a module that returns the prompt's
vectors; the ids beside them say where padding and the end are.
Flow: `clip_encoder` -> **clip_towers** -> `clip_huggingface`, `clip_open_clip`.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ._torch import full_precision
from .clip_encoder import ClipEncoder, with_submodule
from .clip_tokens import Tokens
from .errors import ClipError

__all__ = ["TowerClip"]


class TowerClip(ClipEncoder):
    """A CLIP with a text tower of any layout; a subclass says how the package is called.

    Attributes:
        tokens: its tokenizer.
        pads: whether texts are padded to the whole context, as a tower must have it that attends to what follows or has a fixed
            length; a causal tower may stop at the longest text.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        tokens: Tokens,
        embedding: Any,
        context_length: int,
        image: Tuple[int, Any, Any],
        pads: bool,
    ):
        self.tokens, self.pads = tokens, pads
        self._embedding_path = _path_of(model, embedding, name)
        self._sizes_given = (int(context_length), int(embedding.weight.shape[1]))
        self._vocabulary = int(embedding.weight.shape[0])
        super().__init__(model, name, *image)

    def _sizes(self) -> Tuple[int, int, int]:
        """The size of a text's feature is read from one: towers name their projections in many ways."""
        self.context_length, context_dim = self._sizes_given
        empty = torch.zeros(1, 0, context_dim, device=self.device)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            embed_dim = int(self.encode_prompt(empty, "a {}").shape[1])
        self.model.train(was_training)
        return self.context_length, context_dim, embed_dim

    # What a subclass provides.

    def _call_text(self, model: Any, ids: Tensor) -> Tensor:
        """Features (N, D) of token ids (N, T) by the package's own code."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------ state

    @property
    def _embedding(self) -> nn.Module:
        return self.model.get_submodule(".".join(self._embedding_path))

    @property
    def device(self) -> torch.device:
        return next(self._embedding.parameters()).device

    # ------------------------------------------------------------------------------------------------ texts

    def token_ids(self, text: str) -> List[int]:
        ids = list(self.tokens.encode(text))
        if ids and max(ids) >= self._vocabulary:
            raise ClipError(
                f"CLIP {self.name!r} has {self._vocabulary} tokens; its tokenizer gave id {max(ids)} for {text[:60]!r}. Pass "
                "the tokenizer that the model was trained with: load_clip(model, tokenizer=...)."
            )
        return ids

    def _around(self) -> Tuple[List[int], List[int]]:
        return list(self.tokens.start), list(self.tokens.end)

    @property
    def _places(self) -> int:
        return self.context_length - (self.tokens.last is not None)

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return self._features(rows, None)

    def encode_prompt(self, context: Tensor, template: str) -> Tensor:
        """Features of learnable prompts: start tokens, template with the context in place of `{}`, end tokens, padding.

        Args:
            context: (N, L, Dt).
            template: a text with one `{}`.

        Returns:
            (N, D) float32, attached to `context`, not normalized.
        """
        prefix, suffix = self._split(template)
        n, length = context.shape[:2]
        row = [*prefix, *[self.tokens.plain] * length, *suffix]
        if self.tokens.left and self.pads:
            before = self.context_length - len(row)
        else:
            before = 0
        start = before + len(prefix)
        ids = self._ids([row])
        fixed = self._embedding(ids)  # (1, T, Dt)
        parts = [fixed[:, :start].expand(n, -1, -1), context.to(fixed), fixed[:, start + length :].expand(n, -1, -1)]
        return self._features([row] * n, torch.cat(parts, dim=1))

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        tail = self.tokens.last is not None
        length = self.context_length if self.pads else max(len(row) for row in rows) + tail
        return torch.tensor([self.tokens.pad_row(row, length) for row in rows], device=self.device)  # (N, T)

    def _features(self, rows: Sequence[Sequence[int]], embeddings: Optional[Tensor]) -> Tensor:
        ids, model = self._ids(rows), self.model
        with full_precision(ids.device):
            if embeddings is None:
                return self._call_text(model, ids).float()
            given = _Given(embeddings, self._embedding)
            features = self._call_text(with_submodule(model, self._embedding_path, given), ids).float()  # (N, D)
        if not given.asked:
            raise ClipError(
                f"CLIP {self.name!r} does not read its tokens from {'.'.join(self._embedding_path)}, so a prompt's vectors "
                "cannot take their place. Use a CLIP whose text tower has a token embedding, such as 'ViT-B/32'."
            )
        return features


class _Given(nn.Module):
    """Stands in for a token embedding: returns what it was made with. Some towers ask its weight for its precision."""

    def __init__(self, embeddings: Tensor, embedding: Any):
        super().__init__()
        self.embeddings, self.asked, self.weight = embeddings, False, embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        self.asked = True
        return self.embeddings


def _path_of(model: nn.Module, module: Any, name: str) -> List[str]:
    for path, found in model.named_modules(remove_duplicate=False):
        if found is module and path:
            return path.split(".")
    raise ClipError(
        f"CLIP {name!r} has a text tower of type {type(model).__name__} without a token embedding; background prompts take the "
        "place of token embeddings. Use a CLIP that has one, such as 'ViT-B/32'."
    )
