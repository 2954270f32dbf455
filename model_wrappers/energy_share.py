"""What processes did in windows of a run: requests, tokens, energy; and adding it up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lm_eval_pruned.energy.readings import (
    EnergyReading,
    Joules,
    add_joules,
    add_up,
    ratio,
    subtract,
)
from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts


@dataclass
class Share:
    """What one process did in one window, or in several added up.

    Attributes:
        request_type: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``;
            None if the process had nothing to do.
        requests: Requests that reached the model, with the repeats of the harness.
        tokens: Tokens of these requests.
        reading: Energy of the machine; None in a process that is not the one to meter it.
        cached: Answers from the harness's cache since the last share.
        set_up: What was measured apart, by purpose: ``warm_up``, ``batch_size_search``.
        idle: The idle reading of the machine; None without one.
        idle_joules: What the machine would have used in the time of `reading` if idle;
            None without an idle reading.
    """

    request_type: str | None = None
    requests: int = 0
    tokens: TokenCounts = field(default_factory=TokenCounts)
    reading: EnergyReading | None = None
    cached: int = 0
    set_up: dict[str, EnergyReading] = field(default_factory=dict)
    idle: EnergyReading | None = None
    idle_joules: Joules | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record for the results file. None is *not measured*."""
        reading = self.reading or EnergyReading(None)
        tokens = self.tokens
        total = reading.joules.total
        record = {
            "requests": self.requests,
            "prompt_tokens": tokens.prompt,
            "generated_tokens": tokens.generated,
            "processed_tokens": tokens.processed,
            **reading.as_dict(),
            "joules_per_processed_token": ratio(total, tokens.processed),
            "joules_per_generated_token": ratio(total, tokens.generated)
            if self.request_type == "generate_until"
            else None,
        }
        if self.idle_joules is not None:
            record["idle_joules"] = self.idle_joules.as_dict()
            record["net_joules"] = subtract(reading.joules, self.idle_joules).as_dict()
        return record


def added(share: Share | None, more: Share) -> Share:
    """Return two shares of one request type, one after the other, as one."""
    if share is None:
        return more
    known = share.reading is not None and more.reading is not None
    return Share(
        more.request_type,
        share.requests + more.requests,
        share.tokens + more.tokens,
        add_up([share.reading, more.reading]) if known else None,  # type: ignore[list-item]
        set_up=added_set_up([share, more]),
        idle_joules=added_idle([share, more]),
    )


def added_set_up(
    shares: list[Share], *, at_once: bool = False
) -> dict[str, EnergyReading]:
    """Return what was measured apart in all of `shares`, by purpose."""
    purposes = dict.fromkeys(name for share in shares for name in share.set_up)
    return {
        name: add_up(
            [share.set_up[name] for share in shares if name in share.set_up],
            at_once=at_once,
        )
        for name in purposes
    }


def added_idle(shares: list[Share]) -> Joules | None:
    """Return what idle machines would have used in all of `shares`; None if no share knows."""
    known = [share.idle_joules for share in shares]
    if all(joules is None for joules in known):
        return None
    return add_joules(joules or Joules() for joules in known)
