"""How far a score may be away from that of the base, as users write it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lm_eval_pruned.results.groups import is_share


#: What may be claimed with a margin, by the option that asks for it.
CLAIMS = ("equivalent", "not_worse")


@dataclass(frozen=True)
class Margin:
    """How far a score may be away from that of the base.

    `claim` is ``equivalent``, neither better nor worse by the margin, or ``not_worse``; `text` is as
    the user wrote it: ``1pt``, a percentage point of a score between 0 and 1; ``2%``, a share of the
    base's score; or ``0.5``, in the metric's own unit.

    Example:
        >>> Margin("equivalent", "1pt").size(0.4, 0.41)
        0.01
        >>> Margin("not_worse", "2%").size(20.0, 21.0)
        0.4
    """

    claim: str
    text: str

    def __post_init__(self) -> None:
        self.size(0, 0)

    def size(self, base: float, score: float) -> float | None:
        """Return the margin in the metric's own unit, for the scores of base and run.

        None for percentage points of scores that are not between -1 and 1, and for a share of 0.
        """
        number, unit = self._parts()
        if unit == "%":
            return number / 100 * abs(base) or None
        if not unit:
            return number
        return number / 100 if max(abs(base), abs(score)) <= 1 else None

    @property
    def share(self) -> float | None:
        """The share of the base's score that may be lost, or None where the margin is in another unit."""
        number, unit = self._parts()
        return number / 100 if unit == "%" else None

    def _parts(self) -> tuple[float, str]:
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(pts?|%|)", str(self.text).strip())
        if not found or not 0 < float(found[1]) < math.inf:
            raise ValueError(
                f"{self.claim}={self.text} is not a margin: pass percentage points such as 1pt, a "
                "share of the base's score such as 2%, or a positive number in the metric's own "
                "unit."
            )
        return float(found[1]), found[2]

    def check(self, task: str, metric: str, *scores: float) -> None:
        """Raise ValueError where two scores cannot differ by more: the unit was forgotten.

        `scores` are what is known of the metric; without any its name decides.
        """
        text = str(self.text).strip()
        plain = not text.endswith(("%", "pt", "pts"))
        if plain and float(text) >= 1 and is_share(metric, scores):
            raise ValueError(
                f"{self.claim}={text} allows any difference of {task} {metric.partition(',')[0]}, "
                f"whose scores lie between 0 and 1: did you mean {text}pt?"
            )

    @property
    def verdict(self) -> str:
        """What is claimed, in words."""
        return self.claim.replace("_", " ")

    def misfit(self, tasks: str) -> str:
        """Return what to say of tasks for which `size` is None."""
        return (
            f"{self.text} is not a margin for {tasks}, whose scores are not between 0 and 1: pass "
            "a share such as 2%, or a number in the metric's own unit."
        )
