"""McNemar's mid-p test of documents that are right or wrong, Tango's interval, and the power."""

from __future__ import annotations

import functools
import math

import numpy as np
from scipy import optimize, stats

from lm_eval_pruned.compare.statistics.paired_test import (
    POWER,
    Alternative,
    PairedTest,
    agreeing,
    p_of_tails,
)


def mcnemar(
    up: int, down: int, n: int, alpha: float, alternative: Alternative
) -> PairedTest:
    """Test `up` documents that became right and `down` that became wrong, of `n`."""
    both = _mid_p(up, down), _mid_p(down, up)
    low, high = agreeing(
        _score_interval(up, down, n, alpha),
        (up - down) / n,
        p_of_tails(*both, "two-sided"),
        alpha,
    )
    return PairedTest(
        (up - down) / n,
        low,
        high,
        p_of_tails(*both, alternative),
        "McNemar mid-p",
        n,
        alpha,
        lambda level: _mcnemar_detectable(
            up + down, n, level / (2 if alternative == "two-sided" else 1)
        ),
        lambda x: tails(up, down, n, x),
    )


def _mid_p(few: int, many: int) -> float:
    """Return P(X < few) + P(X = few) / 2 of X ~ Binomial(few + many, 1/2)."""
    if few == many:
        return 0.5
    coin = stats.binom(few + many, 0.5)
    return float(coin.cdf(few) - coin.pmf(few) / 2)


def _score_interval(up: int, down: int, n: int, alpha: float) -> tuple[float, float]:
    """Return the differences that Tango's score test does not reject."""
    estimate = (up - down) / n

    def end(side: int) -> float:
        farthest = (-1.0, 1.0)[side]
        if estimate == farthest:
            return estimate
        return optimize.brentq(
            lambda x: tails(up, down, n, x)[side] - alpha / 2,
            farthest,
            estimate,
            xtol=1e-13,
        )

    return end(0), end(1)


def tails(up: int, down: int, n: int, x: float) -> tuple[float, float]:
    """Return the p of "the difference is `x` or less", and of "`x` or more", by a score test.

    The spread of the difference is the one that is most likely if it is `x`, and not the one
    that was seen. So documents of which none changed, or all in one direction, do not count
    as without spread.

    Args:
        up: Documents that became right.
        down: Documents that became wrong.
        n: Documents.
        x: Difference of the shares that are right.

    Source: Tango 1998, Statistics in Medicine 17, 891-908.

    Example:
        >>> [round(p, 3) for p in tails(0, 0, 60, 0.06)]
        [0.975, 0.025]
    """
    if x < 0:
        less, more = tails(down, up, n, -x)
        return more, less
    if x >= 1:
        return 1.0, 0.0
    # The likeliest share of documents that become wrong solves a quadratic equation.
    linear = (2 * n - up + down) * x - up - down
    root = math.sqrt(linear**2 + 8 * n * down * x * (1 - x))
    wrong = (
        2 * down * x * (1 - x) / (linear + root)
        if linear > 0
        else (root - linear) / (4 * n)
    )
    variance = n * (2 * wrong + x * (1 - x))
    if variance == 0:
        return 0.5, 0.5
    z = (up - down - n * x) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2)) / 2, math.erfc(-z / math.sqrt(2)) / 2


@functools.lru_cache(maxsize=4096)
def _mcnemar_detectable(changed: int, n: int, tail: float) -> float | None:
    """Return the smallest difference that McNemar's mid-p test finds with `POWER`.

    As many answers change as did here; more where a difference of that size needs it.
    """
    share = (changed + 0.5) / (n + 1)

    def power(difference: float) -> float:
        return rejects(max(share, difference), n, difference, tail)

    if power(1.0) < POWER:
        return None
    return float(optimize.brentq(lambda x: power(x) - POWER, 0.0, 1.0, xtol=1e-6))


def rejects(changing: float, n: int, difference: float, tail: float) -> float:
    """Return the chance that the mid-p test finds a difference, on its own side.

    Args:
        changing: Share of documents that change.
        n: Documents.
        difference: True difference, at most `changing`.
        tail: Level of the side.
    """
    many = stats.binom(n, changing)
    counts = np.arange(many.ppf(1e-9), many.isf(1e-9) + 1)
    last = stats.binom.ppf(tail, counts, 0.5)
    mid_p = stats.binom.cdf(last, counts, 0.5) - stats.binom.pmf(last, counts, 0.5) / 2
    last -= mid_p >= tail
    becoming_wrong = (1 - difference / changing) / 2
    return float(many.pmf(counts) @ stats.binom.cdf(last, counts, becoming_wrong))
