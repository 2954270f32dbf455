"""What one test of a difference says, and what all tests share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import optimize


if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike


Alternative = Literal["two-sided", "less", "greater"]
#: Chance of seeing a difference of the size of `PairedTest.smallest_detectable`.
POWER = 0.8
#: The mean of fewer documents or clusters than this is not taken for normal.
LEAST_UNITS = 10
ALTERNATIVES = ("two-sided", "less", "greater")


def nothing(number: float) -> None:
    """Say that a test can tell nothing, whatever is asked."""
    return


@dataclass(frozen=True)
class PairedTest:
    """A difference between two runs, and what can be said about it.

    Attributes:
        difference: Score of the run minus score of the base.
        low: Lower end of the two-sided interval, or None where none can be given.
        high: Upper end.
        p: p of "there is no difference" against the alternative that was asked for, or
            None where no test was made.
        method: What was done, in words.
        units: Independent units: documents, or clusters of them; 0 where not known.
        level: Level that the test was asked to be made at.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    units: int
    level: float = 0.05
    _detectable: Callable[[float], float | None] = field(
        default=nothing, compare=False, repr=False
    )
    #: p of "the true difference is x or less", and of "x or more".
    _tails: Callable[[float], tuple[float, float] | None] = field(
        default=nothing, compare=False, repr=False
    )

    def smallest_detectable(self, level: float | None = None) -> float | None:
        """Return the size of true difference that this test finds with chance `POWER`.

        Args:
            level: Level at which p counts as significant; default: the test's own. In a
                table it is what the correction leaves, see `false_discovery_levels`.

        Returns:
            A positive number, or None where this test can find no difference.
        """
        return self._detectable(self.level if level is None else level)

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
        ends = [(low, 0), (high, 1)]
        ps = [
            tails[side]
            for end, side in ends
            if math.isfinite(end) and (tails := self._tails(end)) is not None
        ]
        if not ps:
            return None
        # What was seen can never speak for less than it.
        return max(ps) if low < self.difference < high else max(0.5, *ps)

    def interval(self, alpha: float) -> tuple[float, float] | None:
        """Return the interval that `p_outside` goes by, or None.

        Args:
            alpha: 1 - confidence.
        """
        if self._tails(self.difference) is None:
            return None
        return self._end(alpha / 2, 0), self._end(alpha / 2, 1)

    def at_level(self, level: float) -> tuple[float | None, float | None]:
        """Return `low` and `high` at another level of a two-sided test.

        With the levels of `false_discovery_levels`, no more than alpha of the intervals of
        differences that are shown miss the true one, on average.

        Source: Benjamini and Yekutieli 2005, Journal of the American Statistical
        Association 100, 71-81.
        """
        ends = None if level == self.level else self.interval(level)
        if ends is None or self.low is None or self.p is None:
            return self.low, self.high
        return agreeing(ends, self.difference, self.p, level)

    def _end(self, p: float, side: int) -> float:
        def excess(x: float) -> float:
            tails = self._tails(x)
            assert tails is not None
            return tails[side] - p

        # From the estimate outwards, so that neither scale nor spread has to be known.
        sign = 1 if side else -1
        step = 1e-6 * max(1.0, abs(self.difference))
        while excess(self.difference + sign * step) > 0 and step < _FARTHEST:
            step *= 4
        if step >= _FARTHEST:
            return sign * math.inf
        if excess(self.difference) <= 0:
            return self.difference
        farther = self.difference + sign * step
        return float(optimize.brentq(excess, self.difference, farther, xtol=1e-12))


#: No score of a model lies beyond.
_FARTHEST = 1e12


def agreeing(
    ends: tuple[float, float], difference: float, p: float, level: float
) -> tuple[float, float]:
    """Return an interval that holds 0 exactly where a two-sided p is not below its level.

    The interval of right-or-wrong documents comes from another test than their p, which can
    differ about 0 and about nothing else.
    """
    low, high = ends
    if p >= level:
        return min(low, 0.0), max(high, 0.0)
    beyond = 1e-6 * difference
    return (max(low, beyond), high) if difference > 0 else (low, min(high, beyond))


def p_of_tails(lower: float, upper: float, alternative: str) -> float:
    """Return the p of an alternative from the chances of the two tails."""
    if alternative == "less":
        return lower
    if alternative == "greater":
        return upper
    return min(1.0, 2 * min(lower, upper))


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
