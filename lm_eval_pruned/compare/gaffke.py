"""Gaffke's test of a mean, whose interval holds for a few documents that hardly differ, too."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, special


#: Terms that differ by this share of the largest are the same.
ROUNDING = 1e-12
#: Steps of the integral, in its spread, and where they begin to grow. Half the step squares the error.
STEP, BEND = 0.4, 3.0
#: So many different terms are not worth a sum in powers.
FEW = 100
#: Powers of what is below one half: the next one is 1e-9.
ORDERS = 26


def below_zero(terms: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Return the chance that a weighted sum of `terms` is 0 or less, the weights being exponential.

    `counts` says how often each term occurs, by default once.
    For right-or-wrong documents it is McNemar's exact test without a margin, and where no document
    gains, Clopper and Pearson's limit.

    Example:
        >>> round(below_zero(np.append(-0.98, np.full(149, 0.02))), 6)  # 0.98**149
        0.049282
    """
    terms = terms / (np.abs(terms).max() or 1.0)
    counts = np.ones_like(terms) if counts is None else counts
    gains, losses = terms > ROUNDING, terms < -ROUNDING
    above, below = terms[gains], -terms[losses]
    if not above.size or not below.size:
        return float(not above.size)
    if max(np.ptp(above), np.ptp(below)) <= ROUNDING:
        numbers = counts[gains].sum(), counts[losses].sum()
        gain, loss = above.mean(), below.mean()
        return float(special.betainc(*numbers, loss / (gain + loss)))
    terms, counts = terms[gains | losses], counts[gains | losses]
    if (counts * terms).sum() < 0:
        return 1 - _inverted(-terms, counts)
    return _inverted(terms, counts)


def _inverted(terms: np.ndarray, counts: np.ndarray) -> float:
    """Return the chance from the moment generating function of the sum, by its inversion.

    It is the integral of ``exp(s * sum) / -s`` over complex s with one negative real part, divided by
    2 pi i. Any such part gives the same; where the integrand is smallest on the real line, it turns
    least. The trapezoidal rule, in steps that grow from the real line on, has a relative error below 1e-5.

    Source: Rice 1980, SIAM Journal on Scientific and Statistical Computing 1, 438-448.
    """
    n, shares = counts.sum(), terms / terms.min()

    def slope(at: float) -> float:
        # Without its pole at 1.
        odds = at * shares / (1 - at * shares)
        return float((counts * odds).sum() - 1) * (1 - at)

    at = float(optimize.brentq(slope, 1 / (n + 2), 1 - 1 / (n + 3), xtol=1e-3 / n))
    real = at / float(terms.min())
    # The pole 1 / -s counts like one more term, which is infinite.
    scales = np.append(terms / (1 - real * terms), -1 / real)
    spread = math.sqrt((np.append(counts, 1) * scales**2).sum())
    heaviest = (np.abs(scales).max() / spread) ** 2
    # Beyond it, the integrand has at most exp(-20) of its height.
    far = math.sqrt(math.expm1(40 * heaviest) / heaviest)
    steps = np.arange(0, BEND * math.asinh(far / BEND), STEP) / BEND
    turns = BEND / spread * np.sinh(steps)
    heights = np.cosh(steps) * np.exp(
        _log_of_product(turns, scales, np.append(counts, 1))
    )
    real_parts = heights.real
    area = STEP * (real_parts.sum() - real_parts[0] / 2) / (math.pi * spread)
    return float(area * math.exp(-(counts * np.log1p(-real * terms)).sum()) / -real)


def _log_of_product(
    turns: np.ndarray, scales: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Return the logarithm of ``prod(1 / (1 - 1j * turn * scales) ** counts)`` for each turn, shape (turns,).

    Scales that are small at every turn, which are most of many, are summed in powers.
    """
    largest = turns[-1] or 1.0
    light = np.abs(scales) * largest < (0.5 if len(scales) > FEW else 0)
    few = np.multiply.outer(turns, scales[~light])
    logs = 1j * (counts[~light] * np.arctan(few)).sum(1)
    logs -= (counts[~light] * np.log1p(few**2)).sum(1) / 2
    if not light.any():
        return logs
    shares, powers = turns / largest, scales[light] * largest
    power = counts[light]
    for order in range(1, ORDERS + 1):
        power = power * powers
        logs += power.sum() * (1j * shares) ** order / order
    return logs
