"""What one test of a difference says, whatever distribution it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import ArrayLike


#: Chance of seeing a difference of the size of `PairedTest.smallest_detectable`.
POWER = 0.8
#: The mean of fewer documents or clusters than this is not taken for normal.
LEAST_UNITS = 10


class Distribution(Protocol):
    """How surely a difference is known."""

    def tails(self, x: float) -> tuple[float, float]:
        """Return p of "the true difference is `x` or less", and of "`x` or more"."""

    def ends(self, level: float) -> tuple[float, float] | None:
        """Return the two-sided interval of confidence 1 - `level`, or None."""

    def detectable(self, level: float) -> float | None:
        """Return the difference that a two-sided test at `level` finds with `POWER`."""


@dataclass(frozen=True)
class PairedTest:
    """A difference between two runs, and what can be said about it.

    Attributes:
        difference: Score of the run minus score of the base.
        low: Lower end of the interval of confidence 1 - `level`; None where there is none.
        high: Upper end.
        p: Two-sided p of "there is no difference"; None where no test was made.
        method: What was done, in words.
        units: Independent units: documents, or clusters of them; 0 where not known.
        level: Level that the test was asked to be made at.
        sides: The one-sided p: of a run that scores less, and of one that scores more.
        distribution: Where interval and p come from; None where there is no interval.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    units: int
    level: float = 0.05
    sides: tuple[float, float] | None = None
    distribution: Distribution | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        difference: float,
        sides: tuple[float, float],
        method: str,
        units: int,
        level: float,
        distribution: Distribution | None = None,
    ) -> PairedTest:
        """Return a test with the two-sided p and the interval that follow."""
        p = min(1.0, 2 * min(sides))
        ends = _ends(difference, p, distribution, level)
        return cls(difference, *ends, p, method, units, level, sides, distribution)

    @classmethod
    def none(
        cls, difference: float, why: str, units: int = 0, level: float = 0.05
    ) -> PairedTest:
        """Return a difference that was not tested, and why."""
        return cls(difference, None, None, None, f"none: {why}", units, level)

    def smallest_detectable(self, level: float | None = None) -> float | None:
        """Return the size of true difference that this test finds with chance `POWER`.

        Args:
            level: Level at which p counts as significant; default: the test's own. In a
                table it is what the correction leaves, see `false_discovery`.

        Returns:
            A positive number, or None where this test can find no difference.
        """
        if self.distribution is None:
            return None
        return self.distribution.detectable(self.level if level is None else level)

    def p_outside(self, low: float, high: float) -> float | None:
        """Return the p of "the true difference lies outside of (`low`, `high`)".

        Two one-sided tests, of which the larger p counts: below alpha exactly where the
        interval with confidence 1 - 2 alpha lies within.

        Args:
            low: Lower end, or ``-math.inf`` for a test of the upper end alone.
            high: Upper end, or ``math.inf``.

        Returns:
            None where no interval can be given.

        Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15,
        657-680; Berger and Hsu 1996, Statistical Science 11, 283-319.

        Example:
            >>> from lm_eval_pruned.compare.statistics import paired_difference
            >>> same = paired_difference([1, 0] * 300, [1, 0] * 300)
            >>> same.p_outside(-0.01, 0.01) < 0.01
            True
        """
        if self.distribution is None:
            return None
        ps = [
            self.distribution.tails(end)[side]
            for side, end in enumerate((low, high))
            if math.isfinite(end)
        ]
        # What was seen can never speak for less than it.
        return max(ps) if low < self.difference < high else max(0.5, *ps)

    def interval(self, level: float) -> tuple[float | None, float | None]:
        """Return `low` and `high` at another level of a two-sided test.

        With the levels of `false_discovery`, no more than alpha of the intervals of
        differences that are shown miss the true one, on average.

        Source: Benjamini and Yekutieli 2005, Journal of the American Statistical
        Association 100, 71-81.
        """
        if level == self.level:
            return self.low, self.high
        return _ends(self.difference, self.p, self.distribution, level)


def _ends(
    difference: float, p: float | None, distribution: Distribution | None, level: float
) -> tuple[float | None, float | None]:
    """Return an interval that holds 0 exactly where a two-sided p is not below its level.

    The interval of right-or-wrong documents comes from another test than their p, which can
    differ about 0 and about nothing else.
    """
    ends = distribution.ends(level) if distribution else None
    if ends is None or p is None:
        return None, None
    low, high = ends
    if p >= level:
        return min(low, 0.0), max(high, 0.0)
    beyond = 1e-6 * difference
    return (max(low, beyond), high) if difference > 0 else (low, min(high, beyond))


def finite_row(name: str, values: ArrayLike) -> np.ndarray:
    """Return `values` as an array of floats, shape (n,).

    Raises:
        ValueError: They have another shape, or hold NaN or infinity; `name` says whose.
    """
    array = np.asarray(values, dtype=float)
    bad = int((~np.isfinite(array)).sum())
    if array.ndim != 1 or bad:
        raise ValueError(
            f"{name} has shape {array.shape} and {bad} values that are NaN or infinite: give one "
            "row of finite numbers."
        )
    return array
