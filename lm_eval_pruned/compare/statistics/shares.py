"""Documents that are right or wrong: McNemar's mid-p test, Tango's interval, and the power."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from lm_eval_pruned.compare.statistics.means import power_of_means
from lm_eval_pruned.compare.statistics.paired_test import POWER, PairedTest


#: Beyond so many documents that change, the counts are taken for normal.
_MOST_COUNTED = 200


def mcnemar(up: int, down: int, n: int, alpha: float) -> PairedTest:
    """Test `up` documents that became right and `down` that became wrong, of `n`."""
    sides = _mid_p(up, down), _mid_p(down, up)
    shares = Shares(up, down, n)
    return PairedTest.of((up - down) / n, sides, "McNemar mid-p", n, alpha, shares)


def _mid_p(few: int, many: int) -> float:
    """Return P(X < few) + P(X = few) / 2 of X ~ Binomial(few + many, 1/2)."""
    if few == many:
        return 0.5
    coin = stats.binom(few + many, 0.5)
    return float(coin.cdf(few) - coin.pmf(few) / 2)


@dataclass(frozen=True)
class Shares:
    """`up` documents that became right and `down` that became wrong, of `n`."""

    up: int
    down: int
    n: int

    @property
    def changing(self) -> float:
        """Share that changes: no answer changed of few says little."""
        return (self.up + self.down + 0.5) / (self.n + 1)

    def tails(self, x: float) -> tuple[float, float]:
        """Return the p of "the difference is `x` or less", and of "`x` or more", by a score test.

        The spread of the difference is the one that is most likely if it is `x`, and not the
        one that was seen. So documents of which none changed, or all in one direction, do not
        count as without spread.

        Source: Tango 1998, Statistics in Medicine 17, 891-908.

        Example:
            >>> [round(p, 3) for p in Shares(0, 0, 60).tails(0.06)]
            [0.975, 0.025]
        """
        if x < 0:
            less, more = Shares(self.down, self.up, self.n).tails(-x)
            return more, less
        if x >= 1:
            return 1.0, 0.0
        up, down, n = self.up, self.down, self.n
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

    def ends(self, level: float) -> tuple[float, float]:
        """Return the differences that the score test does not reject."""
        estimate = (self.up - self.down) / self.n

        def end(side: int) -> float:
            farthest = (-1.0, 1.0)[side]
            if estimate == farthest:
                return estimate
            return optimize.brentq(
                lambda x: self.tails(x)[side] - level / 2,
                farthest,
                estimate,
                xtol=1e-13,
            )

        return end(0), end(1)

    def detectable(self, level: float) -> float | None:
        """Return the smallest difference that McNemar's mid-p test finds with `POWER`.

        As many answers change as did here; more where a difference of that size needs it.
        """

        def excess(difference: float) -> float:
            return chance_seen(self.changing, self.n, difference, level) - POWER

        if excess(1.0) < 0:
            return None
        return float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-6))


def chance_seen(changing: float, n: int, difference: float, level: float) -> float:
    """Return the chance that the mid-p test finds a difference, on its own side.

    Args:
        changing: Share of documents that change; more where `difference` needs it.
        n: Documents.
        difference: True difference.
        level: Two-sided level.
    """
    changing = max(changing, difference)
    many = stats.binom(n, changing)
    counts = np.arange(many.ppf(1e-9), many.isf(1e-9) + 1)
    last = stats.binom.ppf(level / 2, counts, 0.5)
    mid_p = stats.binom.cdf(last, counts, 0.5) - stats.binom.pmf(last, counts, 0.5) / 2
    last -= mid_p >= level / 2
    becoming_wrong = (1 - difference / changing) / 2
    return float(many.pmf(counts) @ stats.binom.cdf(last, counts, becoming_wrong))


def power_of_shares(
    changing: float, n: int, size: float, alpha: float
) -> tuple[float, float, float]:
    """Return the chances to show that right-or-wrong documents are the same, or differ.

    Args:
        changing: Share of the documents whose answer changes.
        n: Documents.
        size: Of the margin, and of the difference that is to be seen, as a share of documents.
        alpha: Level: of each one-sided test of a margin, and of the two-sided test.

    Returns:
        Chance of equivalent and of not worse, if as many answers become right as wrong, and
        of better or worse, if there is a difference of `size`. Counted out over all outcomes
        of the tests that are made; with many changes, margins are from the normal distribution.
    """
    different = chance_seen(changing, n, size, alpha)
    if n * changing > _MOST_COUNTED:
        normal = power_of_means(math.sqrt(changing / n), n - 1, size, alpha)
        return *normal[:2], different
    many = stats.binom(n, changing)
    counts = np.arange(max(0, many.ppf(1e-7)), many.isf(1e-7) + 1).astype(int)
    fewest, ups = [], 0
    for count in counts.tolist():
        # One change more asks for one more that becomes right, or none.
        while ups <= count and not (
            (2 * ups - count) / n > -size
            and Shares(ups, count - ups, n).tails(-size)[0] < alpha
        ):
            ups += 1
        fewest.append(ups)
    too_few = stats.binom.cdf(np.array(fewest) - 1, counts, 0.5)
    both = np.maximum(0, stats.binom.cdf(counts - fewest, counts, 0.5) - too_few)
    chances = many.pmf(counts)
    return float(chances @ both), float(chances @ (1 - too_few)), different
