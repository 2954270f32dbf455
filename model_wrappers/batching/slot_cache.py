"""Keys and values of a number of slots, and attention that reads them in groups of slots."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer


if TYPE_CHECKING:
    from collections.abc import Sequence


# Bytes at whose multiples torch lets memory begin.
_ALIGNMENT = 64
# Groups of slots whose attention ends with the group's longest, not the batch's.
_GROUPS = 4


def groups_of(lengths: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
    """Return first slot, last + 1 and the longest's length of each group of slots."""
    count = min(_GROUPS, len(lengths))
    bounds = [len(lengths) * i // count for i in range(count + 1)]
    return [
        (begin, end, int(max(lengths[begin:end]))) for begin, end in pairwise(bounds)
    ]


class _GroupedKeys(torch.Tensor):
    """Keys of which sdpa attention reads each group of slots as far as its longest reaches.

    It is the layer's keys that carry this, so that nothing outside of a pass knows of it.
    """

    groups: list[tuple[int, int, int]]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return _grouped_attention(*args, **kwargs)
            result = func(*args, **kwargs)
            if func not in _KEEPING_GROUPS:
                return result
            keys = args[0]
            whole = (len(keys), keys.shape[-2]) == (len(result), result.shape[-2])
            return _in_groups(result, keys.groups) if whole else result


# Queries that share keys: what transformers does to these first.
_KEEPING_GROUPS = {torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.reshape}


def _in_groups(keys: torch.Tensor, groups: list[tuple[int, int, int]]) -> _GroupedKeys:
    grouped = keys.as_subclass(_GroupedKeys)
    grouped.groups = groups
    return grouped


def _grouped_attention(
    query: torch.Tensor,
    key: _GroupedKeys,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    rows, width = len(key), key.shape[-2]
    if (
        attn_mask is None
        or (attn_mask.shape[0], attn_mask.shape[-1]) != (rows, width)
        or not len(query) == len(value) == rows
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, *args, **kwargs
        )
    parts = [
        F.scaled_dot_product_attention(
            query[begin:end],
            key[begin:end, :, :longest],
            value[begin:end, :, :longest],
            attn_mask[begin:end, ..., :longest],
            *args,
            **kwargs,
        )
        for begin, end, longest in key.groups
    ]
    return torch.cat(parts)


def _zeros_like(states: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return zeros of a shape; on a CPU their memory is taken when it is written to.

    Zeros, because what is masked is multiplied by 0, which not every number survives.
    """
    if states.device.type != "cpu":
        return states.new_zeros(shape)
    # torch writes its zeros one by one, numpy asks the system for memory that is empty.
    size = math.prod(shape) * states.itemsize
    empty = np.zeros(size + _ALIGNMENT, np.uint8)
    begin = -empty.ctypes.data % _ALIGNMENT
    whole = torch.from_numpy(empty[begin : begin + size])
    return whole.view(states.dtype).view(shape)


class _SlotLayer(DynamicLayer):
    """Keys and values of the slots in one layer, [slots, heads, capacity, size]."""

    # Tensors once something was written.
    keys: Any
    values: Any

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = self._fitting(self.keys, key_states)
        self.values = self._fitting(self.values, value_states)
        self.is_initialized = True
        keys = self._write(self.keys, key_states)
        if self.cache.in_groups and self.cache.groups:
            keys = _in_groups(keys, self.cache.groups)
        return keys, self._write(self.values, value_states)

    def _fitting(
        self, stored: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        cache = self.cache
        if stored is not None and stored.shape[-2] >= cache.capacity:
            return stored
        _, heads, _, size = states.shape
        larger = _zeros_like(states, (cache.slots, heads, cache.capacity, size))
        if stored is not None:
            larger[:, :, : stored.shape[-2]] = stored
        return larger

    def _write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        if cache.groups:
            rows, place = cache.on(states.device)
            stored[rows, :, place] = states[:, :, 0].to(stored.dtype)
            return stored[: len(rows), :, : cache.width]
        for row, (slot, start, count) in enumerate(cache.places):
            stored[slot, :, start : start + count] = states[row, :, :count]
        if not cache.shows_slots:
            return states
        if len(cache.places) == 1:
            slot = cache.places[0][0]
            return stored[slot : slot + 1, :, : cache.width]
        slots, _ = cache.on(stored.device)
        return stored[slots, :, : cache.width]

    # What a model asks for that makes a mask of its own, in a pass without a past.

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Older versions pass the positions themselves.
        return query_length if isinstance(query_length, int) else len(query_length), 0


class SlotCache(Cache):
    """Keys and values of a number of slots, written in place; see `_SlotLayer`.

    Attributes:
        slots: How many.
        in_groups: Whether attention reads groups of slots by themselves in a step.
        capacity: Tokens that a slot has room for.
        width: Tokens of the longest slot of a pass, the new ones included.
        places: Slot, first new token and number of new tokens, of each row of a pass.
        groups: First slot, last + 1 and tokens of the longest, in a step: a pass of one
            token for each of the slots 0, 1, ...; else empty.
        shows_slots: Whether the pass sees what slots hold; else new tokens alone.
    """

    layers: list[_SlotLayer]  # type: ignore[assignment]

    def __init__(self, slots: int, in_groups: bool = False) -> None:
        super().__init__(
            layer_class_to_replicate=lambda: _SlotLayer(self)  # type: ignore[arg-type]
        )
        self.slots = slots
        self.in_groups = in_groups
        self.capacity = 0
        self.width = 0
        self.places: list[tuple[int, int, int]] = []
        self.groups: list[tuple[int, int, int]] = []
        self.shows_slots = False
        self._index: dict[torch.device, torch.Tensor] = {}

    def begin_pass(
        self, slots: list[int], start: list[int], count: list[int], index: torch.Tensor
    ) -> None:
        """Say where the new tokens of each row belong.

        Args:
            slots: Slot of each row.
            start: First new token of each row.
            count: New tokens of each row.
            index: `slots` and `start`, [2, rows], on the device of the model.
        """
        self.places = list(zip(slots, start, count, strict=True))
        self._index = {index.device: index}
        ends = [first + new for _, first, new in self.places]
        self.width = max(ends)
        if self.width > self.capacity:
            # With room for answers: to make more later is to copy everything.
            self.capacity = -(-max(self.width, self.capacity) * 5 // 256) * 64
        self.shows_slots = any(start)
        is_step = max(count) == 1 and slots == list(range(len(slots)))
        self.groups = groups_of(ends) if self.shows_slots and is_step else []

    def on(self, device: torch.device) -> torch.Tensor:
        """Return slot and first new token of each row, [2, rows]; sent once in a pass."""
        if device not in self._index:
            self._index[device] = next(iter(self._index.values())).to(device)
        return self._index[device]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for layer in self.layers:
            if length and layer.keys is not None:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]

    def permute(self, order: np.ndarray, length: int) -> None:
        """Put the first `length` tokens of slot ``order[i]`` into slot i."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                new = stored[torch.from_numpy(order).to(stored.device), :, :length]
                stored[: len(order), :, :length] = new
