"""What tests show: the verdict in words, and claims within a margin."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.statistics import PairedTest, false_discovery
from lm_eval_pruned.results.groups import is_share


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from lm_eval_pruned.results.files import Score

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

        None for percentage points of scores that are not between 0 and 1, and for a share of 0.
        """
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(pts?|%|)", str(self.text).strip())
        if not found or not 0 < float(found[1]) < math.inf:
            raise ValueError(
                f"{self.claim}={self.text} is not a margin: pass percentage points such as 1pt, a "
                "share of the base's score such as 2%, or a positive number in the metric's own "
                "unit."
            )
        number, unit = float(found[1]), found[2]
        if unit == "%":
            return number / 100 * abs(base) or None
        if not unit:
            return number
        return number / 100 if 0 <= base <= 1 and 0 <= score <= 1 else None

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


@dataclass(frozen=True)
class Claim:
    """Whether a difference is shown to lie within `margin`, in the metric's own unit.

    `p` is that of "the true difference lies outside", `q` the same, adjusted as for differences.
    """

    margin: float
    p: float
    q: float


def claims(
    tests: Sequence[PairedTest | None],
    asked: Sequence[tuple[Margin | None, Score, Score]],
    families: Sequence[Hashable],
) -> list[Claim | None]:
    """Test one claim for each row of a table; None where there is no test, margin or interval.

    `asked` are the margin of each row, the score of its base and that of its run; tests of one of
    `families` are adjusted together.
    """
    sizes: list[float] = []
    ps: list[float | None] = []
    for test, (margin, base, run) in zip(tests, asked, strict=True):
        size = margin.size(base.value, run.value) if margin else None
        low, high = -(size or 0.0), size or 0.0
        if margin and margin.claim == "not_worse" and base.higher_is_better is not None:
            # The other side is not asked about.
            low, high = (low, math.inf) if base.higher_is_better else (-math.inf, high)
        sizes.append(size or 0.0)
        ps.append(test.p_outside(low, high) if test and size else None)
    found = zip(sizes, ps, false_discovery(ps, families), strict=True)
    return [
        None if p is None else Claim(size, p, q or 0.0) for size, p, (q, _) in found
    ]


def verdict_of(
    difference: float,
    q: float | None,
    alpha: float,
    higher_is_better: bool | None,
    margin: Margin | None = None,
    claim: Claim | None = None,
) -> str:
    """Return what a test says of a difference, in the words of `Difference.verdict`."""
    if q is None:
        verdict = "not tested"
    elif q >= alpha:
        verdict = "not shown"
    elif higher_is_better is None:
        verdict = "different"
    else:
        verdict = "better" if (difference > 0) == higher_is_better else "worse"
    if margin is None:
        return verdict
    # What is better is not worse, and says more; what is equivalent may differ for certain.
    says_more = margin.claim == "not_worse" and verdict == "better"
    if claim is not None and claim.q < alpha and not says_more:
        return margin.verdict
    return "undecided" if verdict.startswith("not ") else verdict
