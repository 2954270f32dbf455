"""Over the sizes of a sweep: two tasks together, and one score against the expansion ratio."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.statistics.moments import moments_of
from lm_eval_pruned.compare.statistics.paired_test import finite_row
from lm_eval_pruned.compare.statistics.student import paired_t


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Correlation:
    """How two tasks move together over configurations.

    Attributes:
        n: Configurations.
        pearson: Pearson's r, or None where one of the two never changes.
        pearson_p: Its two-sided p.
        pearson_low: Lower end of its interval.
        pearson_high: Upper end.
        spearman: Spearman's rho.
        spearman_p: Its two-sided permutation p; of Student's distribution for more than
            `MOST_PERMUTED` configurations.
    """

    n: int
    pearson: float | None = None
    pearson_p: float | None = None
    pearson_low: float | None = None
    pearson_high: float | None = None
    spearman: float | None = None
    spearman_p: float | None = None


#: All orders of so many configurations are gone through: 40,320.
MOST_PERMUTED = 8


def correlate(x: ArrayLike, y: ArrayLike, *, alpha: float = 0.05) -> Correlation:
    """Correlate two tasks over the configurations of a sweep.

    p values and interval take the configurations for independent draws, which the
    sizes of a sweep are not: see `trend`.

    Args:
        x: Scores of one task, shape (n,), n >= 3, one per configuration.
        y: Scores of the other, shape (n,).
        alpha: 1 - confidence of the interval.

    Raises:
        ValueError: Fewer than three configurations, different lengths, or NaN.

    Returns:
        The interval is Fisher's, ``tanh(atanh(r) +- width)``; the width is such that 0
        is outside exactly where Student's p of r is below alpha. Fisher's own,
        ``1.96 / sqrt(n - 3)``, is within 8 % of it from n = 4 on.
    """
    x, y = finite_row("x", x), finite_row("y", y)
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(
            f"x and y hold {len(x)} and {len(y)} configurations: a correlation needs as many in "
            "both, and at least 3."
        )
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(len(x))
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    pearson = stats.pearsonr(x, y)
    r = float(np.clip(pearson.statistic, -1, 1))
    critical = float(stats.t.isf(alpha / 2, len(x) - 2))
    width = math.asinh(critical / math.sqrt(len(x) - 2))
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    spearman = stats.spearmanr(x, y)
    return Correlation(
        len(x),
        r,
        float(pearson.pvalue),
        math.tanh(z - width),
        math.tanh(z + width),
        float(spearman.statistic),
        _permutation_p(x, y) if len(x) <= MOST_PERMUTED else float(spearman.pvalue),
    )


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


def trend(
    ratios: ArrayLike,
    values: ArrayLike,
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
        ValueError: Shapes that do not fit, NaN, or all ratios equal.
    """
    ratios = finite_row("ratios", ratios)
    rows = [finite_row("values", row) for row in values]  # type: ignore[union-attr]
    if len(ratios) != len(rows) or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"ratios holds {len(ratios)} configurations and values {len(rows)} rows: give one row "
            "of values for each, all of one length."
        )
    if np.ptp(ratios) == 0:
        raise ValueError(
            "All ratios are equal: a trend needs at least two different ones."
        )
    centred = ratios - ratios.mean()
    # Less the first row, documents that never change have a slope of exactly 0.
    documents = (centred / (centred @ centred)) @ (np.stack(rows) - rows[0])
    scale = {"mean": 1.0, "perplexity": -1.0, "bits_per_byte": -1 / math.log(2)}
    documents = documents * scale[transform]
    weights = (
        np.ones(len(documents)) if weights is None else finite_row("weights", weights)
    )
    sums = np.stack([np.zeros_like(documents), weights * documents, weights])
    moments = moments_of(sums, clusters, strata)
    test = paired_t(moments, "mean", alpha, "two-sided")
    return Trend(
        len(ratios),
        test.difference,
        test.low,
        test.high,
        test.p,
        test.method.replace("paired t test", "t test of slopes"),
        test.units,
    )


@functools.lru_cache(maxsize=8)
def _orders(n: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(n))))


def _permutation_p(x: np.ndarray, y: np.ndarray) -> float:
    """Return the exact two-sided p of Spearman's rho, from all orders."""
    one, other = (ranks - ranks.mean() for ranks in map(stats.rankdata, (x, y)))
    products = np.abs(one[_orders(len(x))] @ other)
    # Ranks are halves of integers: what is not equal differs by more.
    return float((products >= abs(one @ other) - 1e-6).mean())
