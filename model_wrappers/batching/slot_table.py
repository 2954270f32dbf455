"""Which request is in which slot, and which run next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .slots import SlotCache, tokens_read


if TYPE_CHECKING:
    from collections import deque


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
