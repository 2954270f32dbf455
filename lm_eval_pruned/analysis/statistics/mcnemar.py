"""McNemar's mid-p test of documents that are right or wrong, its interval and its power."""

from __future__ import annotations

import functools

import numpy as np
from scipy import optimize, special, stats

from lm_eval_pruned.analysis.statistics.paired_test import (
    POWER,
    Alternative,
    PairedTest,
    p_of_tails,
)


#: Where a distribution is integrated over.
_NODES = 512


def mcnemar(
    up: int, down: int, n: int, alpha: float, alternative: Alternative
) -> PairedTest:
    """Test `up` documents that became right and `down` that became wrong, of `n`."""
    low, high = _changed_interval(up, down, n, alpha)
    return PairedTest(
        (up - down) / n,
        low,
        high,
        p_of_tails(_mid_p(up, down), _mid_p(down, up), alternative),
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


def _changed_interval(up: int, down: int, n: int, alpha: float) -> tuple[float, float]:
    """Return the interval of a difference of paired shares that agrees with mid-p.

    The difference is the share of documents that changed times (2 r - 1), with r the
    share of these that became right. The two shares are independent binomial ones; their
    confidence distributions are multiplied: of r the one whose tails are the mid-p
    values, of the share that changed Jeffreys'. The product is on one side of 0 where r
    is on one side of 1/2, so that its tails at 0 are the mid-p of McNemar's test.
    """
    share = _share_changed(up + down, n)

    def tail(difference: float) -> float:
        right = (1 + difference / share) / 2
        below = _beta_cdf(up + 1, down, right) + _beta_cdf(up, down + 1, right)
        return float(below.mean() / 2)

    ends = []
    for level in (alpha / 2, 1 - alpha / 2):
        bracket = (-1.0, 0.0) if tail(0.0) >= level else (0.0, 1.0)
        ends.append(optimize.brentq(lambda x, level=level: tail(x) - level, *bracket))
    estimate = (up - down) / n
    return min(ends[0], estimate), max(ends[1], estimate)


@functools.lru_cache(maxsize=1024)
def _share_changed(changed: int, n: int) -> np.ndarray:
    """Return quantiles of Jeffreys' distribution of the share of documents that change."""
    quantiles = (np.arange(_NODES) + 0.5) / _NODES
    return special.betaincinv(changed + 0.5, n - changed + 0.5, quantiles)


def tails(up: int, down: int, n: int, x: float) -> tuple[float, float]:
    """Return the p of "the difference is `x` or less", and of "`x` or more".

    As `_changed_interval`, with the whole chance of what was seen on either side. Half of it, as
    mid-p counts, is right where nothing differs, and too little at a margin: of 120
    documents of which 10 % become wrong and none right, 7.8 % of outcomes would show at
    level 0.05 that less than 10 % do, while these show it in 3.8 %.

    Args:
        up: Documents that became right.
        down: Documents that became wrong.
        n: Documents.
        x: Difference of the shares that are right.
    """
    right = (1 + x / _share_changed(up + down, n)) / 2
    less, more = _beta_cdf(up, down + 1, right), _beta_cdf(up + 1, down, right)
    return float(less.mean()), float(1 - more.mean())


def _beta_cdf(a: int, b: int, x: np.ndarray) -> np.ndarray:
    # Without one of the counts all mass lies at 0 or at 1.
    if a == 0:
        return (x >= 0).astype(float)
    if b == 0:
        return (x >= 1).astype(float)
    return special.betainc(a, b, np.clip(x, 0, 1))


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
