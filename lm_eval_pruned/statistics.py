"""Paired tests, intervals, correlations and trends, from scipy and statsmodels.

Everything works on arrays and is deterministic: the resampling is seeded, and the
documents are brought into an order that depends on their scores alone, so that a
permutation of the documents changes nothing and swapping the two runs flips the
sign of every number exactly.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.results import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike

#: Resamples of every bootstrap and permutation test.
RESAMPLES = 9999
#: Chance of seeing a difference of the size of `PairedTest.smallest_detectable`.
POWER = 0.8
#: Fewer documents or clusters than this are not bootstrapped: 5 differences of one sign
#: would have p = 0.03, where a sign test gives 0.06.
LEAST_UNITS = 10
_SEED = 0
#: Numbers in one batch of resamples: 32 MiB of float64.
_BATCH = 4 * 2**20


@dataclass(frozen=True)
class PairedTest:
    """A difference between two runs, and what can be said about it.

    Attributes:
        difference: Score of the run minus score of the base.
        low: Lower end of the interval, or None where none can be given.
        high: Upper end.
        p: Two-sided p of "there is no difference", or None.
        method: What was done, in words.
        smallest_detectable: Smallest true difference that this test would have found
            significant with probability `POWER`, or None where no difference could be.
        units: Independent units: documents, or clusters of them.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    smallest_detectable: float | None
    units: int


def paired_difference(
    base: ArrayLike,
    run: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    transform: str = "mean",
    alpha: float = 0.05,
    resamples: int = RESAMPLES,
) -> PairedTest:
    """Compare two runs on the same documents.

    Independent documents that are right or wrong get the exact McNemar test and the
    interval of Bonett and Price; all else a paired percentile bootstrap over
    documents or, where they are given, clusters, expanded for small numbers. Interval and p of the bootstrap
    come from the same resamples: p < alpha exactly where 0 is outside the interval.

    Args:
        base: Values of the base, shape (n,), n >= 1; row i of `base` and `run` belong
            to the same document.
        run: Values of the run, shape (n,).
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document, length n; default: each its own.
        transform: From the weighted mean to the score, a name in `results.TRANSFORMS`.
        alpha: 1 - confidence of the interval.
        resamples: Bootstrap resamples.

    Raises:
        ValueError: The arrays are empty, of different lengths, or hold NaN or infinity.

    Returns:
        Interval and p are None for a bootstrap over fewer than `LEAST_UNITS` units.

    Source:
        McNemar 1947; Bonett and Price 2012, Statistics in Medicine 31; Efron and
        Tibshirani 1993, chapter 13; Hesterberg 2015; for clusters, Field and Welsh 2007.

    Example:
        >>> test = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
        >>> test.difference, test.p
        (0.0, 1.0)
    """
    base, run = _finite("base", base), _finite("run", run)
    weights = np.ones(len(base)) if weights is None else _finite("weights", weights)
    if not len(base) == len(run) == len(weights) > 0:
        raise ValueError(
            f"base, run and weights hold {len(base)}, {len(run)} and {len(weights)} documents: "
            "they must be as many, and at least one."
        )
    if clusters is not None and len(clusters) != len(base):
        raise ValueError(
            f"clusters names {len(clusters)} documents of {len(base)}: give one for each."
        )
    if clusters is not None and len(set(clusters)) == len(base):
        clusters = None
    right_or_wrong = np.isin(base, (0, 1)).all() and np.isin(run, (0, 1)).all()
    if (
        right_or_wrong
        and clusters is None
        and transform == "mean"
        and (weights == 1).all()
    ):
        return _mcnemar(
            int((run > base).sum()), int((base > run).sum()), len(base), alpha
        )
    sums = np.stack([weights * base, weights * run, weights])
    if clusters is not None:
        _, index = np.unique(np.asarray(clusters), return_inverse=True)
        # Sorted first: adding up in another order gives other last digits.
        order = np.lexsort((*sums, index))
        sums = np.stack([np.bincount(index[order], row[order]) for row in sums])
    return _bootstrap(
        sums,
        TRANSFORMS[transform],
        alpha,
        resamples,
        "documents" if clusters is None else "clusters",
    )


def unpaired_difference(
    base: float,
    base_stderr: float,
    run: float,
    run_stderr: float,
    *,
    alpha: float = 0.05,
) -> PairedTest:
    """Compare two scores from their standard errors alone.

    Weaker than `paired_difference`: it takes the two runs for independent, as if
    they had seen different documents, and misses differences a paired test shows.

    Args:
        base: Score of the base.
        base_stderr: Its standard error.
        run: Score of the run.
        run_stderr: Its standard error.
        alpha: 1 - confidence of the interval.
    """
    difference = run - base
    stderr = math.hypot(base_stderr, run_stderr)
    critical = float(stats.norm.isf(alpha / 2))
    if stderr == 0:
        return PairedTest(difference, None, None, None, "none: stderr is 0", None, 0)
    return PairedTest(
        difference,
        difference - critical * stderr,
        difference + critical * stderr,
        float(2 * stats.norm.sf(abs(difference) / stderr)),
        "unpaired z test on stderrs (weaker)",
        (critical + float(stats.norm.ppf(POWER))) * stderr,
        0,
    )


def false_discovery_rate(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust a family of p values after Benjamini and Hochberg.

    Args:
        p_values: One per test; None for a test that was not made, which does not count.

    Returns:
        Adjusted p values, None where there was none.
    """
    made = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(made)) if made else iter(())
    return [None if p is None else float(next(adjusted)) for p in p_values]


def relative_change(base: float, run: float) -> float | None:
    """Return (run - base) / base, or None where the base is 0 or either is no number.

    Example:
        >>> round(relative_change(0.1035, 0.1811), 3)
        0.75
    """
    if base == 0 or not (math.isfinite(base) and math.isfinite(run)):
        return None
    return (run - base) / abs(base)


@dataclass(frozen=True)
class Correlation:
    """How two tasks move together over configurations.

    Attributes:
        n: Configurations.
        pearson: Pearson's r, or None where one of the two never changes.
        pearson_p: Its two-sided p.
        pearson_low: Lower end of its percentile-bootstrap interval.
        pearson_high: Upper end.
        spearman: Spearman's rho.
        spearman_p: Its two-sided permutation p, exact up to 7 configurations.
        spearman_low: Lower end of its interval.
        spearman_high: Upper end.
    """

    n: int
    pearson: float | None = None
    pearson_p: float | None = None
    pearson_low: float | None = None
    pearson_high: float | None = None
    spearman: float | None = None
    spearman_p: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None


def correlate(
    x: ArrayLike,
    y: ArrayLike,
    *,
    alpha: float = 0.05,
    resamples: int = RESAMPLES,
) -> Correlation:
    """Correlate two tasks over the configurations of a sweep.

    Args:
        x: Scores of one task, shape (n,), n >= 3, one per configuration.
        y: Scores of the other, shape (n,).
        alpha: 1 - confidence of the intervals.
        resamples: Bootstrap and permutation resamples.

    Raises:
        ValueError: Fewer than three configurations, different lengths, or NaN.
    """
    x, y = _finite("x", x), _finite("y", y)
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
    ranks = stats.rankdata(x), stats.rankdata(y)
    spearman_p = stats.permutation_test(
        (ranks[0],),
        lambda ranked, axis: _pearson(ranked, ranks[1], axis),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(_SEED),
    ).pvalue
    return Correlation(
        len(x),
        float(pearson.statistic),
        float(pearson.pvalue),
        *_correlation_interval(x, y, _pearson, alpha, resamples),
        float(stats.spearmanr(x, y).statistic),
        float(spearman_p),
        *_correlation_interval(x, y, _spearman, alpha, resamples),
    )


@dataclass(frozen=True)
class Trend:
    """Whether a score rises or falls with the expansion ratio.

    Attributes:
        n: Configurations.
        tau: Kendall's tau-b between ratio and score: 1 where the score falls with
            every neuron removed, -1 where it rises. None where nothing changes.
        p: Two-sided p, exact where no scores tie.
    """

    n: int
    tau: float | None
    p: float | None


def trend(ratios: ArrayLike, scores: ArrayLike) -> Trend:
    """Test whether a score has a monotonic trend over expansion ratios.

    Mann and Kendall's test: it asks nothing of the shape of the curve but that it
    goes one way.

    Args:
        ratios: Expansion ratios, shape (n,), n >= 3.
        scores: Scores, shape (n,).

    Raises:
        ValueError: Fewer than three configurations, different lengths, or NaN.
    """
    ratios, scores = _finite("ratios", ratios), _finite("scores", scores)
    if len(ratios) != len(scores) or len(ratios) < 3:
        raise ValueError(
            f"ratios and scores hold {len(ratios)} and {len(scores)} configurations: a trend "
            "needs as many in both, and at least 3."
        )
    if np.ptp(ratios) == 0 or np.ptp(scores) == 0:
        return Trend(len(ratios), None, None)
    result = stats.kendalltau(ratios, scores)
    return Trend(len(ratios), float(result.statistic), float(result.pvalue))


def _mcnemar(better: int, worse: int, n: int, alpha: float) -> PairedTest:
    # Imported here: it brings pandas along, and a results file without samples needs neither.
    from statsmodels.stats.contingency_tables import mcnemar

    same = n - better - worse
    p = float(mcnemar([[same, worse], [better, 0]], exact=True).pvalue)
    up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    variance = (up + down - (up - down) ** 2) / (n + 2)
    half = float(stats.norm.isf(alpha / 2)) * math.sqrt(variance)
    # With fewer documents changed, all in one direction, the exact p stays above alpha.
    least = math.ceil(1 - math.log2(alpha)) / n
    detectable = _detectable(math.sqrt(variance * (n + 2)), n, alpha)
    smallest = None if detectable is None else max(detectable, least)
    return PairedTest(
        (better - worse) / n,
        max(-1.0, up - down - half),
        min(1.0, up - down + half),
        p,
        "exact McNemar",
        smallest if smallest is not None and smallest <= 1 else None,
        n,
    )


def _bootstrap(
    sums: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    alpha: float,
    resamples: int,
    unit: str,
) -> PairedTest:
    """Bootstrap over the columns of `sums`, shape (3, units): base, run, weight."""
    sums, flipped = _canonical(sums)

    def statistic(base, run, weight, axis=-1):
        total = weight.sum(axis)
        return function(run.sum(axis) / total) - function(base.sum(axis) / total)

    units = sums.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        difference = float(statistic(*sums))
    sign = -1.0 if flipped else 1.0
    method = f"paired bootstrap over {unit}"
    if np.array_equal(sums[0], sums[1]):
        return PairedTest(0.0, None, None, 1.0, f"none: all {unit} equal", None, units)
    if units < LEAST_UNITS:
        why = f"none: {units} {unit} are too few for a bootstrap"
        return PairedTest(sign * difference, None, None, None, why, None, units)
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            tuple(sums),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BATCH // units),
            confidence_level=1 - _expanded(alpha, units),
            method="percentile",
            rng=np.random.default_rng(_SEED),
        )
    drawn = result.bootstrap_distribution
    if not np.isfinite(drawn).all():
        return PairedTest(
            sign * difference, None, None, None, "none: overflow", None, units
        )
    low, high = (float(end) for end in result.confidence_interval)
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = _contracted(min(1.0, 2 * (int(tail) + 1) / (resamples + 1)), units)
    ends = sorted((sign * low, sign * high))
    return PairedTest(
        sign * difference,
        ends[0],
        ends[1],
        p,
        method,
        _detectable(float(drawn.std(ddof=1)) * math.sqrt(units), units, alpha),
        units,
    )


def _expanded(alpha: float, units: int) -> float:
    """Return the level at which a percentile interval of few units covers 1 - alpha.

    Percentiles take the resampled spread for the true one and the normal for Student's
    distribution; both are put right in the level (Hesterberg 2015, The American
    Statistician 69, section 4.1).
    """
    critical = stats.t.isf(alpha / 2, units - 1) * math.sqrt(units / (units - 1))
    return float(2 * stats.norm.sf(critical))


def _contracted(p: float, units: int) -> float:
    """Return the p that belongs to `_expanded`: its inverse."""
    critical = stats.norm.isf(p / 2) * math.sqrt((units - 1) / units)
    return float(2 * stats.t.sf(critical, units - 1))


def _canonical(sums: np.ndarray) -> tuple[np.ndarray, bool]:
    """Sort columns and choose which run comes first, both from the values alone."""
    one, other = (rows[:, np.lexsort(rows[::-1])] for rows in (sums, sums[[1, 0, 2]]))
    first = np.flatnonzero(one.T.ravel() != other.T.ravel())
    if not len(first):
        return one, False
    flipped = bool(other.T.ravel()[first[0]] < one.T.ravel()[first[0]])
    return (other, True) if flipped else (one, False)


@functools.lru_cache(maxsize=4096)
def _effect(units: int, alpha: float) -> float | None:
    from statsmodels.stats.power import TTestPower

    if units < LEAST_UNITS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        effect = TTestPower().solve_power(
            nobs=units, alpha=alpha, power=POWER, alternative="two-sided"
        )
    return float(np.squeeze(effect))


def _detectable(deviation: float, units: int, alpha: float) -> float | None:
    """Return the smallest detectable mean of `units` differences with this deviation."""
    effect = _effect(units, alpha)
    return None if effect is None else effect * deviation


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    bad = int((~np.isfinite(array)).sum())
    if array.ndim != 1 or bad:
        raise ValueError(
            f"{name} has shape {array.shape} and {bad} values that are NaN or infinite: give one "
            "row of finite numbers."
        )
    return array


def _pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    x = x - x.mean(axis, keepdims=True)
    y = y - y.mean(axis, keepdims=True)
    scale = np.sqrt((x * x).sum(axis) * (y * y).sum(axis))
    # A resample that draws one configuration only has no correlation: NaN.
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 1e-300, (x * y).sum(axis) / scale, np.nan)


def _spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    return _pearson(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis)


def _correlation_interval(
    x: np.ndarray,
    y: np.ndarray,
    statistic: Callable[..., np.ndarray],
    alpha: float,
    resamples: int,
) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = stats.bootstrap(
            (x, y),
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BATCH // len(x)),
            method="percentile",
            rng=np.random.default_rng(_SEED),
        )
    low, high = np.nanquantile(
        result.bootstrap_distribution, [alpha / 2, 1 - alpha / 2]
    )
    return float(low), float(high)
