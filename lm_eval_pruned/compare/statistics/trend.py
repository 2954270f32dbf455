"""Over the sizes of a sweep: two tasks together, and one score against the expansion ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.statistics.means import paired_t
from lm_eval_pruned.compare.statistics.paired_test import finite_row


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Correlation:
    """How two tasks move together over configurations.

    Attributes:
        n: Configurations.
        pearson: Pearson's r, or None where one of the two never changes.
        pearson_low: Lower end of its interval.
        pearson_high: Upper end.
    """

    n: int
    pearson: float | None = None
    pearson_low: float | None = None
    pearson_high: float | None = None


def correlate(x: ArrayLike, y: ArrayLike, *, alpha: float = 0.05) -> Correlation:
    """Correlate two tasks over the configurations of a sweep.

    The interval takes the configurations for independent draws, which the sizes of a sweep
    are not: see `trend`.

    Args:
        x: Scores of one task, shape (n,), n >= 3, one per configuration.
        y: Scores of the other, shape (n,).
        alpha: 1 - confidence of the interval.

    Raises:
        ValueError: Different lengths, or NaN.

    Returns:
        The interval is Fisher's, ``tanh(atanh(r) +- width)``; the width is such that 0
        is outside exactly where Student's p of r is below alpha. Fisher's own,
        ``1.96 / sqrt(n - 3)``, is within 8 % of it from n = 4 on.
    """
    x, y = finite_row("x", x), finite_row("y", y)
    n = len(x)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(n)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    width = math.asinh(float(stats.t.isf(alpha / 2, n - 2)) / math.sqrt(n - 2))
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    return Correlation(n, r, math.tanh(z - width), math.tanh(z + width))


@dataclass(frozen=True)
class Trend:
    """Whether a score rises or falls with the expansion ratio.

    Attributes:
        n: Configurations.
        slope: Change of the score per 1 of expansion ratio: positive where the score
            falls as neurons are removed. For perplexities, of their logarithm.
        low: Lower end of its interval, or None.
        high: Upper end.
        p: Two-sided p of "there is no slope", or None where no test was made.
        method: What was done, in words.
        units: Documents, or clusters of them.
    """

    n: int
    slope: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    units: int


#: From the slope of a mean over documents to that of the score, or of its logarithm.
_SCALES = {"mean": 1.0, "perplexity": -1.0, "bits_per_byte": -1 / math.log(2)}


def trend(
    ratios: ArrayLike,
    values: Sequence[ArrayLike],
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    alpha: float = 0.05,
) -> Trend:
    """Test whether a score has a trend over the expansion ratios of one model.

    The sizes of a sweep are cut from each other, so that a document which one of them
    gets wrong by chance is likely wrong in the next: a test over sizes takes such a
    walk for a trend. Documents are independent: each has a slope over the ratios (least
    squares), and these slopes are tested like differences.

    Args:
        ratios: Expansion ratios, shape (k,), k >= 2 of them different.
        values: Values of the documents, shape (k, n): row j belongs to ``ratios[j]``.
        weights: See `paired_difference`, shape (n,).
        clusters: See `paired_difference`.
        strata: See `paired_difference`.
        transform: See `paired_difference`; a perplexity is taken as its logarithm.
        alpha: Level of the test.

    Raises:
        ValueError: Shapes that do not fit, or NaN.
    """
    ratios = finite_row("ratios", ratios)
    rows = np.stack([finite_row("values", row) for row in values])
    centred = ratios - ratios.mean()
    # Less the first row, documents that never change have a slope of exactly 0.
    slopes = (centred / (centred @ centred)) @ (rows - rows[0])
    slopes *= _SCALES[transform]
    weights = (
        np.ones(len(slopes)) if weights is None else finite_row("weights", weights)
    )
    test = paired_t(slopes * weights, weights, clusters, strata, "mean", 0.0, alpha)
    method = test.method.replace("paired t test", "t test of slopes")
    found = test.difference, test.low, test.high, test.p, method, test.units
    return Trend(len(ratios), *found)
