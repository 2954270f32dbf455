"""Which request is in which slot, and in which order requests run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from .slot_cache import SlotCache, groups_of


if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence

    from .greedy_settings import StopStrings


# A prompt waits for another that begins alike if that saves so many tokens.
_WORTH_WAITING = 32
# A prompt is worth continuing from another slot if this much of it is there. A pass that sees what
# slots hold takes a mask, with which attention on a CPU reads keys that are hidden, too: a few
# tokens less to compute made prompts of a thousand tokens take a quarter longer.
_LEAST_SHARED = 0.125
# The order of texts is worth leaving that of lengths if this much more of the prompts
# is shared with the prompt before.
_WORTH_SORTING = 0.2
# Prompts go through the model together if the shortest is this much of the longest.
_LEAST_FILLING = 0.75
# Bringing slots into order moves each token about as often as so many steps read it.
_COST_OF_ORDER = 4


@dataclass
class SlotJob:
    """A request and the answer so far.

    Attributes:
        index: Its place among the requests of the call.
        tokens: Its prompt, and what was generated.
        most: Most tokens to generate.
        until: Strings at which the answer is cut.
        stops: Finds these strings.
        prompt: Tokens of the prompt.
    """

    index: int
    tokens: list[int]
    most: int
    until: list[str]
    stops: StopStrings
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt :]

    def array(self, last: int = 0) -> np.ndarray:
        """Return all tokens, or the `last`."""
        return np.array(self.tokens[-last:])

    def add(self, token: int) -> None:
        self.tokens.append(token)

    def is_done(self) -> bool:
        return len(self.tokens) - self.prompt >= self.most or self.stops.found(
            self.tokens, self.prompt
        )


class SlotTable:
    """Which request is in which slot, and what the slots' keys and values stand for."""

    def __init__(self, slots: int, in_groups: bool = False) -> None:
        self.cache = SlotCache(slots, in_groups)
        self.jobs: list[SlotJob | None] = [None] * slots
        #: Tokens that a slot began with; a released slot keeps them for others to copy.
        self.begun: list[np.ndarray] = [np.zeros(0, np.int64)] * slots
        self._excess = 0

    @property
    def busy(self) -> bool:
        return any(job is not None for job in self.jobs)

    def all_jobs(self) -> list[SlotJob]:
        return [job for job in self.jobs if job is not None]

    def release(self, slot: int) -> None:
        self.jobs[slot] = None

    def admit(
        self, waiting: deque[SlotJob], budget: int
    ) -> list[tuple[int, SlotJob, int]]:
        """Move requests to free slots, as many as go through the model together.

        Returns:
            Slot, request and the number of its tokens that the slot holds already.
        """
        group: list[tuple[int, SlotJob, int]] = []
        free = [slot for slot, job in enumerate(self.jobs) if job is None]
        begun: list[np.ndarray] = []
        lengths: list[int] = []
        while waiting and free:
            tokens = waiting[0].array()
            common = [_common(tokens, other) for other in self.begun]
            source = max(range(len(common)), key=lambda s: (common[s], s in free))
            start = min(common[source], len(tokens) - 1)
            if start < _LEAST_SHARED * len(tokens):
                start = 0
            new = [*lengths, len(tokens) - start]
            if group and (
                max(_common(tokens, other) for other in begun) >= start + _WORTH_WAITING
                or max(new) * len(new) > budget
                or min(new) < _LEAST_FILLING * max(new)
            ):
                break
            slot = source if source in free else free[0]
            free.remove(slot)
            # In the table before the copy, which the memory may be too short for.
            job = self.jobs[slot] = waiting.popleft()
            if slot != source:
                self.cache.copy(source, slot, start)
            group.append((slot, job, start))
            # Nothing to copy from before the pass is through.
            self.begun[slot] = tokens[:start]
            begun.append(tokens)
            lengths = new
        for (slot, _, _), tokens in zip(group, begun, strict=True):
            self.begun[slot] = tokens
        return group

    def compact(self) -> None:
        """Move requests to the first slots; the batch becomes as small as what is left."""
        while self.jobs and self.jobs[-1] is None:
            self.jobs.pop()
        for slot in range(len(self.jobs)):
            if slot < len(self.jobs) and self.jobs[slot] is None:
                job = self.jobs[slot] = self.jobs.pop()
                assert job is not None
                self.cache.copy(len(self.jobs), slot, len(job.tokens) - 1)
                while self.jobs[-1] is None:
                    self.jobs.pop()
        del self.begun[len(self.jobs) :]

    def bring_into_order(self) -> None:
        """Put the longest first once disorder has cost as much as order does.

        Needs a request in each slot.
        """
        lengths = np.array([len(job.tokens) for job in self.all_jobs()])
        order = np.argsort(-lengths, kind="stable")
        self._excess += _tokens_read(lengths) - _tokens_read(lengths[order])
        if self._excess > _COST_OF_ORDER * lengths.sum():
            self._excess = 0
            self.cache.permute(order, int(lengths.max()))
            self.jobs = [self.jobs[slot] for slot in order]
            self.begun = [self.begun[slot] for slot in order]


def _tokens_read(lengths: Sequence[int] | np.ndarray) -> int:
    return sum((end - begin) * width for begin, end, width in groups_of(lengths))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens `a` and `b` begin with in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def ordered(jobs: list[SlotJob]) -> list[SlotJob]:
    """Return the requests in the order in which to run them.

    From the longest prompt to the shortest, so that those side by side are alike and
    a lack of memory shows early; by text where that puts more side by side that share.
    """
    by_length = sorted(jobs, key=lambda job: (-len(job.tokens), job.tokens))
    by_text = sorted(jobs, key=lambda job: job.tokens)
    gain = _shared(by_text) - _shared(by_length)
    worth_it = gain > _WORTH_SORTING * sum(len(job.tokens) for job in jobs)
    return by_text if worth_it else by_length


def _shared(jobs: list[SlotJob]) -> int:
    """Return how many tokens the requests have in common with the one before, in all."""
    return sum(_common(a, b) for a, b in pairwise([job.array() for job in jobs]))
