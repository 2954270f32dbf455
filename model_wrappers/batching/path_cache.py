"""Keys and values of one path of a prefix tree, which the rows of a pass share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache


if TYPE_CHECKING:
    import numpy as np

    #: Keys and values of a layer, each [1, heads, tokens, head size].
    Layer = tuple[torch.Tensor, ...]


class PathCache(DynamicCache):
    """Lends the keys and values of one path to every row of a batch.

    Unlike its parent it does not grow by what it is shown: of a pass it keeps the
    next path only.

    Attributes:
        length: Tokens of the path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self._path: dict[int, Layer] = {}
        self._kept: torch.Tensor | None = None
        self._next: dict[int, Layer] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of path and row, as a layer's attention sees them."""
        states: Layer = key_states, value_states
        if layer_idx in self._path:
            states = tuple(
                torch.cat([path.expand(len(row), -1, -1, -1), row], dim=-2)
                for path, row in zip(self._path[layer_idx], states, strict=True)
            )
        if self._kept is not None:
            kept = self._kept.to(key_states.device)
            self._next[layer_idx] = tuple(s.index_select(-2, kept) for s in states)
        keys, values = states
        return keys, values

    def begin_pass(self, kept: np.ndarray | None) -> None:
        """Say which tokens of [path, row] are the next path; None: a beginning of the path."""
        self.forget_pass()
        self._kept = None if kept is None else torch.from_numpy(kept)

    def end_pass(self, length: int) -> None:
        """Take over the next path, of `length` tokens."""
        if self._kept is not None:
            self._path = self._next
        elif length == 0:
            self._path = {}
        elif length < self.length:
            self._path = {
                layer: tuple(s[..., :length, :].clone() for s in states)
                for layer, states in self._path.items()
            }
        self.length = length
        self.forget_pass()

    def forget_pass(self) -> None:
        """Drop what a pass has left, the path excepted."""
        self._kept = None
        self._next = {}
