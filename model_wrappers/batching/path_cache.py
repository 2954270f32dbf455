"""Keys and values of one path of a prefix tree, which the rows of a pass share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


if TYPE_CHECKING:
    import numpy as np


class _PathLayer(DynamicLayer):
    """Keys and values of one path, lent to every row of a batch.

    Unlike its parent it does not grow by what it is shown: of a pass it keeps the
    next path only.
    """

    values: Any  # None where keys are.

    def __init__(self, kept: torch.Tensor | None = None) -> None:
        super().__init__()
        self.kept = kept
        self.next: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(key_states)
        if self.keys is not None:
            key_states = torch.cat(
                [self.keys.expand(rows, -1, -1, -1), key_states], dim=-2
            )
            value_states = torch.cat(
                [self.values.expand(rows, -1, -1, -1), value_states], dim=-2
            )
        if self.kept is not None:
            kept = self.kept.to(key_states.device)
            self.next = (
                key_states.index_select(-2, kept),
                value_states.index_select(-2, kept),
            )
        return key_states, value_states

    def set(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None


class PathCache(DynamicCache):
    """The cached path that a run of passes shares; see `_PathLayer`."""

    layers: list[_PathLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self._kept: torch.Tensor | None = None
        # transformers asks the first layer for lengths before anything is cached.
        self.layers = [_PathLayer()]
        #: Tokens of the path.
        self.length = 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of path and row, as a layer's attention sees them."""
        # How `Cache` makes layers of its own has changed with its releases.
        while len(self.layers) <= layer_idx:
            self.layers.append(_PathLayer(self._kept))
        return self.layers[layer_idx].update(key_states, value_states)

    def begin_pass(self, kept: np.ndarray | None) -> None:
        """Say which tokens of [path, row] are the next path; None: a beginning of the path."""
        self._kept = None if kept is None else torch.from_numpy(kept)
        for layer in self.layers:
            layer.kept, layer.next = self._kept, None

    def end_pass(self, length: int) -> None:
        """Take over the next path, of `length` tokens."""
        for layer in self.layers:
            if length == 0:
                layer.set(None, None)
            elif layer.next is not None:
                layer.set(*layer.next)
            elif length < self.length and layer.keys is not None:
                layer.set(
                    layer.keys[..., :length, :].clone(),
                    layer.values[..., :length, :].clone(),
                )
        self.length = length
        self.forget_pass()

    def forget_pass(self) -> None:
        """Drop what a pass has left, the path excepted."""
        self._kept = None
        for layer in self.layers:
            layer.kept = layer.next = None
