"""Tests that may be looked at while documents come in: group sequential designs.

A comparison is looked at after some documents, and again after more. At each look its
usual p value meets a level of its own, so small that the chance to be below any of them by
chance alone, over all looks, is the level of the whole. How much of it each look may
spend, a spending function says (Lan and DeMets 1983). Here it is the share of the documents
that have been used: with a tenth of the documents, a tenth of the level is spent (the power
family of Kim and DeMets 1987 with exponent 1). That stops early where differences are large,
and leaves the last look nearly the level of a test that is made once.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats


if TYPE_CHECKING:
    from collections.abc import Sequence

#: Documents of the first look, and by which factor each look has more than the one before.
FIRST_LOOK = 25
GROWTH = 1.5
#: Fewer documents show nothing where they are not right or wrong: at the levels of early looks
#: no test of their mean can be trusted.
LEAST_OF_MEANS = 100
#: Points at which the density of a sum that goes on is known.
_POINTS = 301
#: Beyond so many standard errors nothing is told apart.
_FARTHEST = 9.0
#: No repeated p value is given as smaller.
_SMALLEST = 1e-12


def looks(
    documents: int, first: int = FIRST_LOOK, growth: float = GROWTH
) -> tuple[int, ...]:
    """Return after how many documents a comparison is looked at, the last time after all.

    Args:
        documents: How many there are, 1 or more.
        first: Documents of the first look.
        growth: Ratio of successive looks, above 1. A last step of less than its root is left out.

    Example:
        >>> looks(100)
        (25, 38, 56, 100)
        >>> looks(20)
        (20,)
    """
    found, count = [], float(first)
    while count * math.sqrt(growth) < documents:
        found.append(round(count))
        count *= growth
    return (*found, documents)


@functools.lru_cache(maxsize=4096)
def nominal_levels(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """Return the two-sided level at which p is held at each look.

    Args:
        fractions: Share of the documents used at each look, rising, at most 1.
        alpha: Two-sided level of all looks together, of which each look may have spent its
            fraction.

    Returns:
        The chance that p of a difference of 0 is below its level at any look is
        ``alpha * fractions[-1]``.

    Source:
        Lan and DeMets 1983, Biometrika 70, 659-663 (spending); Kim and DeMets 1987,
        Biometrika 74, 149-154 (this function); Armitage, McPherson and Rowe 1969, Journal
        of the Royal Statistical Society A 132, 235-244 (the integration); Jennison and
        Turnbull 2000, Group Sequential Methods, chapters 7 and 19.

    Example:
        >>> [round(level, 4) for level in nominal_levels((0.5, 1.0), 0.05)]
        [0.025, 0.0336]
    """
    found = []
    grid, mass = np.zeros(1), np.ones(1)
    before = 0.0
    for fraction in fractions:
        # The sum of what was seen, on the scale where it has the variance `fraction`.
        step = math.sqrt(fraction - before)
        spends = alpha * (fraction - before)

        def excess(end: float, step=step, spends=spends, grid=grid, mass=mass) -> float:
            beyond = stats.norm.sf((end - grid) / step) + stats.norm.cdf(
                (-end - grid) / step
            )
            return float(mass @ beyond) - spends

        end = farthest = _FARTHEST * math.sqrt(fraction)
        if excess(farthest) < 0 < excess(0.0):
            end = float(optimize.brentq(excess, 0.0, farthest, xtol=1e-10))
        elif excess(0.0) <= 0:
            end = 0.0
        found.append(float(2 * stats.norm.sf(end / math.sqrt(fraction))))
        points = np.linspace(-end, end, _POINTS)
        density = stats.norm.pdf(points[:, None], grid, step) @ mass
        weights = np.full(_POINTS, points[1] - points[0])
        weights[[0, -1]] /= 2
        grid, mass, before = points, density * weights, fraction
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def repeated_p(
    p_values: tuple[float | None, ...], fractions: tuple[float, ...]
) -> float:
    """Return the smallest level at which a design would have stopped by now.

    It is a p value whenever one stops looking, and for whatever reason: the chance that
    it is ever below x without a difference is x at most.

    Args:
        p_values: Two-sided p at each look so far; None where no test could be made.
        fractions: Share of the documents used at these looks.

    Source: Jennison and Turnbull 2000, Group Sequential Methods, section 9.2.

    Example:
        >>> repeated_p((0.2, 0.0335), (0.5, 1.0)) < 0.0501
        True
    """

    def stops(exponent: float) -> bool:
        levels = nominal_levels(fractions, math.exp(exponent))
        return any(
            p is not None and p < level
            for p, level in zip(p_values, levels, strict=True)
        )

    low, high = math.log(_SMALLEST), 0.0
    if stops(low):
        return _SMALLEST
    if not stops(high):
        return 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if stops(middle) else (middle, high)
    return math.exp(high)


def family_wise(p_values: Sequence[float | None], tests: int) -> list[float | None]:
    """Adjust p values so that the chance of any wrong discovery is bounded, after Holm.

    Args:
        p_values: One per test that was made; None where none was, which counts as 1.
        tests: How many tests there are in all; those that are not in `p_values` count as 1.

    Returns:
        Adjusted p values, None where there was none. With repeated p values they hold however
        each test came to stop.

    Source:
        Holm 1979, Scandinavian Journal of Statistics 6, 65-70; Ye, Li, Liu and Yao 2013,
        Statistics in Medicine 32, 1112-1124 (with group sequential tests).

    Example:
        >>> family_wise([0.01, None, 0.02], 3)
        [0.03, None, 0.04]
    """
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, (p, place) in enumerate(made):
        worst = max(worst, min(1.0, (max(tests, len(p_values)) - rank) * p))
        adjusted[place] = worst
    return adjusted
