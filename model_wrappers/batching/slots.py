"""Slots: keys and values of a number of requests, and passes of a model that extend them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from .attention_in_parts import Part
from .attention_support import cache_argument, config_of
from .forward import additive_mask


if TYPE_CHECKING:
    from collections.abc import Sequence

    from .forward import Forward

#: Slot, its new tokens, and the number of tokens that it holds already.
Row = tuple[int, "Sequence[int] | np.ndarray", int]

# Groups of slots whose attention on a CPU ends with the group's longest, not the batch's, and the
# share of tokens to leave out that is worth the calls: a step for prompts of GSM8K took 3 % less time.
_GROUPS = 4
_WORTH_GROUPS = 0.1


def slot_bytes(lm: Any, length: int) -> int:
    """Return the bytes of the keys and values of `length` tokens in the model of an `HFLM`."""
    config = config_of(lm).get_text_config()
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    in_layer = 2 * heads * size * lm.model.dtype.itemsize
    return config.num_hidden_layers * in_layer * length


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
        if not self.is_initialized:
            self.keys = self._empty(key_states)
            self.values = self._empty(value_states)
            self.is_initialized = True
        return (
            self._write(self.keys, key_states),
            self._write(self.values, value_states),
        )

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        """Return zeros: what is masked is multiplied by 0, which not every number survives."""
        _, heads, _, size = states.shape
        shape = (self.cache.slots, heads, self.cache.capacity, size)
        if states.device.type != "cpu":
            return states.new_zeros(shape)
        # torch writes its zeros, numpy has the system give empty memory as it is written to.
        memory = np.zeros(math.prod(shape) * states.itemsize, np.uint8)
        return torch.from_numpy(memory).view(states.dtype).view(shape)

    def _write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Write what a pass computed; return what its rows see."""
        cache = self.cache
        slots = cache.row_slots.to(states.device)
        places = cache.row_places.to(states.device)
        stored[slots, :, places] = states.transpose(1, 2).to(stored.dtype)
        if not cache.shows_slots:
            return states
        rows = slice(len(slots)) if cache.in_order else slots[:, 0]
        return stored[rows, :, : cache.width]

    def get_seq_length(self) -> int:
        """Return 0, for the mask that a model makes itself in a pass without a past."""
        return 0


class SlotCache(Cache):
    """Keys and values of a number of slots, written in place; see `_SlotLayer`.

    Attributes:
        slots: How many.
        capacity: Tokens that a slot has room for, one more than are written to it.
        row_slots: Slot of each row of a pass, [rows, 1].
        row_places: Places of its new tokens in the slot, padding included, [rows, new].
        width: Tokens of the longest slot of a pass, the new ones included.
        in_order: Whether its rows are the slots 0, 1, ...
        shows_slots: Whether the pass sees what slots hold; else only new tokens.
        on_cpu: Whether it runs on a CPU.
    """

    layers: list[_SlotLayer]  # type: ignore[assignment]
    row_slots: torch.Tensor
    row_places: torch.Tensor

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(
            layer_class_to_replicate=lambda: _SlotLayer(self)  # type: ignore[arg-type]
        )
        self.slots = slots
        self.capacity = capacity
        self.width = 0
        self.in_order = False
        self.shows_slots = False
        self.on_cpu = False

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def permute(self, order: np.ndarray, length: int) -> None:
        """Put the first `length` tokens of slot ``order[i]`` into slot i."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[: len(order), :, :length] = stored[order, :, :length]


def groups_of(lengths: np.ndarray) -> list[tuple[slice, int]]:
    """Return the slots of each group and the length of its longest."""
    bounds = np.linspace(0, len(lengths), min(_GROUPS, len(lengths)) + 1).astype(int)
    groups = [slice(begin, end) for begin, end in pairwise(bounds.tolist())]
    return [(rows, int(lengths[rows].max())) for rows in groups]


def tokens_read(lengths: np.ndarray) -> int:
    """Return how many tokens attention reads in a step of slots of these lengths."""
    return sum((rows.stop - rows.start) * width for rows, width in groups_of(lengths))


def run_rows(forward: Forward, cache: SlotCache, work: list[Row]) -> torch.Tensor:
    """Run tokens through a model; return the logits after each row's last, [n, vocabulary].

    Args:
        forward: The model.
        cache: Keys and values of the slots.
        work: The rows; those of one token each are fastest in the slots 0, 1, ...
    """
    slots = [slot for slot, _, _ in work]
    start = np.array([start for _, _, start in work])
    counts = np.array([len(new) for _, new, _ in work])
    longest = int(counts.max())
    tokens = np.zeros((len(work), longest), dtype=np.int64)
    for row, (_, new, _) in zip(tokens, work, strict=True):
        row[: len(new)] = new
    # Padding behind the room of a slot goes to its last place, which nothing else takes.
    places = np.minimum(start[:, None] + np.arange(longest), cache.capacity - 1)
    # One copy to the device for all that a pass needs there.
    host = np.column_stack([tokens, places, slots, counts - 1])
    sent = torch.from_numpy(host).to(forward.device)
    position = sent[:, longest : 2 * longest]
    cache.row_slots, cache.row_places = sent[:, -2:-1], position
    cache.width = int((start + counts).max())
    cache.in_order = slots == list(range(len(work)))
    cache.shows_slots = bool(start.any())
    cache.on_cpu = forward.device.type == "cpu"
    mask: torch.Tensor | None = None
    parts: list[Part] = []
    if cache.shows_slots:
        keys = torch.arange(cache.width, device=forward.device)
        mask = additive_mask(keys > position[:, :, None], forward.dtype)
        is_step = longest == 1 and cache.in_order and cache.on_cpu
        whole = len(work) * cache.width
        if is_step and tokens_read(start + 1) < (1 - _WORTH_GROUPS) * whole:
            parts = [
                Part(rows, slice(None), slice(0, width))
                for rows, width in groups_of(start + 1)
            ]

    def last(states: torch.Tensor) -> torch.Tensor:
        index = sent[:, -1].to(states.device)
        return states[torch.arange(len(index), device=index.device), index][:, None]

    cached: dict[str, Any] = {cache_argument(forward.model): cache}
    logits = forward(
        sent[:, :longest],
        position,
        last if longest > 1 else None,
        parts,
        attention_mask=mask,
        use_cache=True,
        **cached,
    )
    return logits[:, -1]
