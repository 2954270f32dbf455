"""Gaffke's test of a mean, whose interval holds for a few documents that hardly differ, too."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, special


#: Terms that differ by this share of the largest are the same.
ROUNDING = 1e-12
#: Steps of the integral, in its spread, and where they begin to grow. Half the step squares the error.
STEP, BEND = 0.4, 3.0


class Gaffke(NamedTuple):
    """Gaffke's test of `mean`, a mean of differences or the logarithm of a ratio of perplexities.

    Unit i, a document or a cluster, departs from the mean by ``deviations[i] / weights[i]``; both are of
    shape (n,), and the deviations add up to 0. The mean is drawn again with random (exponential)
    weights, among the units and one more that nobody has seen: for the lower end of the interval it
    departs by `unseen[0]`, for the upper one by `unseen[1]`, and it weighs as much as the heaviest. p is
    the share of draws beyond a value. Where no document can differ by more than the unseen unit, no
    distribution is known for which p is too small; for right-or-wrong scores it is Clopper and Pearson's.

    `perplexity` is that of the base, or another score that is the exponential of a mean.

    Source: Gaffke 2005, Mathematical Methods of Statistics 14, 451-467; Learned-Miller and Thomas 2019,
    arXiv 1905.06208.
    """

    mean: float
    deviations: np.ndarray
    weights: np.ndarray
    unseen: tuple[float, float]
    perplexity: float | None = None

    def score(self, mean: float) -> float:
        """Return the difference of scores that a difference of means makes."""
        if self.perplexity is None:
            return mean
        with np.errstate(over="ignore"):
            return float(self.perplexity * np.expm1(mean))

    def _departures(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Return deviations and weights with those of the unseen unit, which is first."""
        weights = np.append(self.weights.max(), self.weights)
        first = self.unseen[side] * weights[0]
        return (1, -1)[side] * np.append(first, self.deviations), weights

    def _beyond(self, side: int, distance: float) -> float:
        """Return the p of a true mean that is lower (side 0) or higher (1) by `distance` or more."""
        deviations, weights = self._departures(side)
        return below_zero(deviations + distance * weights)

    def tail(self, x: float, side: int) -> float:
        """Return the p of "the difference is `x` or less" (side 0), or of "`x` or more" (1)."""
        if self.perplexity is not None:
            share = x / self.perplexity
            x = math.log1p(share) if share > -1 else -math.inf
        if not math.isfinite(x):
            return float((x > 0, x < 0)[side])
        return self._beyond(side, (x - self.mean, self.mean - x)[side == 0])

    def sides(self) -> tuple[float, float]:
        """Return the p of a run that scores less, and of one that scores more."""
        if self.mean == 0 and not self.deviations.any():
            return 0.5, 0.5
        return self.tail(0.0, 1), self.tail(0.0, 0)

    def reach(self, side: int, level: float) -> float:
        """Return how far the end of the two-sided interval at `level` is from the mean."""
        deviations, weights = self._departures(side)
        most = float((-deviations / weights).max())
        excess = lambda distance: self._beyond(side, distance) - level / 2
        if most <= 0 or excess(0.0) <= 0:
            return 0.0
        return float(optimize.brentq(excess, 0.0, most, xtol=1e-12 * most))

    def ends(self, level: float) -> tuple[float, float] | None:
        """Return the two-sided interval; None where an end of it is not finite."""
        low, high = (self.reach(side, level) for side in (0, 1))
        ends = self.score(self.mean - low), self.score(self.mean + high)
        return ends if all(map(math.isfinite, ends)) else None


def below_zero(terms: np.ndarray) -> float:
    """Return the chance that a weighted sum of `terms` is 0 or less, the weights being exponential.

    For right-or-wrong documents it is McNemar's exact test without a margin, and where no document
    gains, Clopper and Pearson's limit.

    Example:
        >>> round(below_zero(np.append(-0.98, np.full(149, 0.02))), 6)  # 0.98**149
        0.049282
    """
    terms = terms / (np.abs(terms).max() or 1.0)
    above, below = terms[terms > ROUNDING], -terms[terms < -ROUNDING]
    if not above.size or not below.size:
        return float(not above.size)
    if max(np.ptp(above), np.ptp(below)) <= ROUNDING:
        gain, loss = above.mean(), below.mean()
        return float(special.betainc(above.size, below.size, loss / (gain + loss)))
    if terms.sum() < 0:
        return 1 - _inverted(np.append(below, -above))
    return _inverted(np.append(above, -below))


def _inverted(terms: np.ndarray) -> float:
    """Return the chance from the moment generating function of the sum, by its inversion.

    It is the integral of ``exp(s * sum) / -s`` over complex s with one negative real part, divided by
    2 pi i. Any such part gives the same; where the integrand is smallest on the real line, it turns
    least. The trapezoidal rule, in steps that grow from the real line on, has a relative error below 1e-5.

    Source: Rice 1980, SIAM Journal on Scientific and Statistical Computing 1, 438-448.
    """
    n, shares = len(terms), terms / terms.min()

    def slope(at: float) -> float:
        # Without its pole at 1.
        return float((at * shares / (1 - at * shares)).sum() - 1) * (1 - at)

    at = float(optimize.brentq(slope, 1 / (n + 2), 1 - 1 / (n + 3), xtol=1e-3 / n))
    real = at / float(terms.min())
    # The pole 1 / -s counts like one more term, which is infinite.
    scales = np.append(terms / (1 - real * terms), -1 / real)
    spread = math.sqrt((scales**2).sum())
    heaviest = (np.abs(scales).max() / spread) ** 2
    # Beyond it, the integrand has at most exp(-20) of its height.
    far = math.sqrt(math.expm1(40 * heaviest) / heaviest)
    steps = np.arange(0, BEND * math.asinh(far / BEND), STEP) / BEND
    turns = np.multiply.outer(BEND / spread * np.sinh(steps), scales)
    angles, squares = np.arctan(turns).sum(1), np.square(turns, out=turns)
    heights = np.cosh(steps) * np.cos(angles)
    heights *= np.exp(-np.log1p(squares, out=squares).sum(1) / 2)
    area = STEP * (heights.sum() - heights[0] / 2) / (math.pi * spread)
    return float(area * math.exp(-np.log1p(-real * terms).sum()) / -real)
