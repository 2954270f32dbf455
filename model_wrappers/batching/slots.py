"""Slots: which request is in which, its keys and values, and passes of a model that extend them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from .attention_in_parts import Part
from .attention_support import config_of
from .forward import additive_mask


if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

    from .forward import Forward

#: Slot, its new tokens, and the number of tokens that it holds already.
Row = tuple[int, "Sequence[int] | np.ndarray", int]

# Groups of slots whose attention on a CPU ends with the group's longest, not the batch's, and the
# share of tokens to leave out that is worth the calls: a step for prompts of GSM8K took 3 % less time.
_GROUPS = 4
_WORTH_GROUPS = 0.1
# A prompt waits for another that begins alike if that saves so many tokens.
_WORTH_WAITING = 32
# A prompt is worth continuing from another slot if this much of it is there. A pass that sees what
# slots hold takes a mask, with which attention on a CPU reads keys that are hidden, too: a few
# tokens less to compute made prompts of a thousand tokens take a quarter longer.
_LEAST_SHARED = 0.125
# Elements of that mask: 128 MiB in 16 bits. A prompt that needs more is computed whole, without.
_MOST_IN_MASK = 2**26
# Prompts go through the model together if the shortest is this much of the longest.
_LEAST_FILLING = 0.75
# To sort slots by length moves each token about as often as so many steps read it.
_COST_OF_ORDER = 4


def slot_bytes(lm: Any, length: int) -> int:
    """Return the bytes of the keys and values of `length` tokens in the model of an `HFLM`."""
    config = config_of(lm).get_text_config()
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    in_layer = 2 * heads * size * lm.model.dtype.itemsize
    return config.num_hidden_layers * in_layer * length


class SlotCache(DynamicCache):
    """Keys and values of a number of slots, written in place.

    Attributes:
        slots: How many.
        capacity: Tokens that a slot has room for, one more than are written to it.
        stored: Keys and values of each layer, [slots, heads, capacity, size], once a pass wrote some.
        row_slots: Slot of each row of a pass, [rows, 1].
        row_places: Places of its new tokens in the slot, padding included, [rows, new].
        width: Tokens of the longest slot of a pass, the new ones included.
        in_order: Whether its rows are the slots 0, 1, ...
        shows_slots: Whether the pass sees what slots hold; else only new tokens.
        on_cpu: Whether it runs on a CPU.
    """

    row_slots: torch.Tensor
    row_places: torch.Tensor

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__()
        self.slots = slots
        self.capacity = capacity
        self.stored: dict[int, list[torch.Tensor]] = {}
        self.width = 0
        self.in_order = False
        self.shows_slots = False
        self.on_cpu = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0, for the mask that a model makes itself in a pass without a past."""
        return 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what a pass computed; return what its rows see."""
        if layer_idx not in self.stored:
            self.stored[layer_idx] = [*map(self._empty, (key_states, value_states))]
        keys, values = self.stored[layer_idx]
        return self._write(keys, key_states), self._write(values, value_states)

    def _empty(self, states: torch.Tensor) -> torch.Tensor:
        """Return zeros: attention multiplies masked values by 0, and 0 times NaN or infinity is NaN."""
        _, heads, _, size = states.shape
        shape = (self.slots, heads, self.capacity, size)
        if states.device.type != "cpu":
            return states.new_zeros(shape)
        # torch writes its zeros, numpy has the system give empty memory as it is written to.
        memory = np.zeros(math.prod(shape) * states.itemsize, np.uint8)
        return torch.from_numpy(memory).view(states.dtype).view(shape)

    def _write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        slots = self.row_slots.to(states.device)
        places = self.row_places.to(states.device)
        stored[slots, :, places] = states.transpose(1, 2).to(stored.dtype)
        if not self.shows_slots:
            return states
        rows = slice(len(slots)) if self.in_order else slots[:, 0]
        return stored[rows, :, : self.width]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for stored in chain(*self.stored.values()):
            stored[target, :, :length] = stored[source, :, :length]

    def permute(self, order: np.ndarray, length: int) -> None:
        """Put the first `length` tokens of slot ``order[i]`` into slot i."""
        for stored in chain(*self.stored.values()):
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

    keep = last if longest > 1 else None
    return forward(sent[:, :longest], position, keep, mask, parts, cache)[:, -1]


@dataclass
class SlotJob:
    """A request and the answer so far.

    Attributes:
        index: Its place among the requests of the call.
        tokens: Its prompt, and what was generated.
        most: Most tokens to generate.
        until: Strings at which the answer is cut.
        window: How many of the last tokens to look for these strings in.
        prompt: Tokens of the prompt.
    """

    index: int
    tokens: list[int]
    most: int
    until: list[str]
    window: int
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt :]


class SlotTable:
    """Which request is in which slot, and what the slots' keys and values are of.

    Attributes:
        cache: Keys and values of the slots.
        jobs: The request in each slot that is taken.
        begun: Tokens that each slot began with. A slot that is free again keeps them for
            others to copy.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.cache = SlotCache(slots, capacity)
        self.jobs: dict[int, SlotJob] = {}
        self.begun = [np.zeros(0, np.int64)] * slots
        self._excess = 0

    def admit(
        self, waiting: deque[SlotJob], budget: int
    ) -> list[tuple[int, SlotJob, int]]:
        """Move requests to free slots, as many as go through the model together.

        Args:
            waiting: Requests in the order in which they run.
            budget: Most tokens of several prompts, padding included.

        Returns:
            Slot, request and the number of its tokens that the slot holds already.
        """
        group: list[tuple[int, SlotJob, int]] = []
        begun: dict[int, np.ndarray] = {}
        free = set(range(len(self.begun))) - self.jobs.keys()
        while waiting and free:
            tokens = np.array(waiting[0].tokens)
            common = [_common(tokens, other) for other in self.begun]
            source = max(range(len(common)), key=lambda s: (common[s], s in free))
            start = min(common[source], len(tokens) - 1)
            new = len(tokens) - start
            if start < _LEAST_SHARED * len(tokens) or new * len(tokens) > _MOST_IN_MASK:
                start, new = 0, len(tokens)
            lengths = [new, *(len(job.tokens) - begin for _, job, begin in group)]
            if group and (
                max(_common(tokens, t) for t in begun.values())
                >= start + _WORTH_WAITING
                or max(lengths) * len(lengths) > budget
                or min(lengths) < _LEAST_FILLING * max(lengths)
            ):
                break
            slot = source if source in free else min(free)
            free.remove(slot)
            # In the table before the copy, which the memory may be too short for.
            job = self.jobs[slot] = waiting.popleft()
            if start and slot != source:
                self.cache.copy(source, slot, start)
            group.append((slot, job, start))
            # Nothing to copy from before the pass is through.
            self.begun[slot] = tokens[:start]
            begun[slot] = tokens
        for slot, tokens in begun.items():
            self.begun[slot] = tokens
        return group

    def step(self) -> list[tuple[int, SlotJob, int]]:
        """Return slot, request and number of tokens held for a step of all requests.

        If slots are free, nobody waits: requests move to the first slots, and the batch
        becomes as small as what is left.
        """
        for slot in range(len(self.jobs)):
            if slot not in self.jobs:
                last = max(self.jobs)
                job = self.jobs[slot] = self.jobs.pop(last)
                self.cache.copy(last, slot, len(job.tokens) - 1)
        if self.cache.on_cpu:
            self._sort()
        return [
            (slot, job, len(job.tokens) - 1) for slot, job in sorted(self.jobs.items())
        ]

    def _sort(self) -> None:
        """Put the longest first once disorder has cost as much as order does."""
        count = len(self.jobs)
        lengths = np.array([len(self.jobs[slot].tokens) for slot in range(count)])
        order = np.argsort(-lengths, kind="stable")
        self._excess += tokens_read(lengths) - tokens_read(lengths[order])
        if self._excess > _COST_OF_ORDER * lengths.sum():
            self._excess = 0
            self.cache.permute(order, int(lengths.max()))
            self.jobs = {new: self.jobs[old] for new, old in enumerate(order.tolist())}
            self.begun[:count] = [self.begun[old] for old in order.tolist()]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens `a` and `b` begin with in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length
