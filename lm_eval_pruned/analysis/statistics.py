"""Paired tests, intervals, correlations and trends, from scipy.

Everything works on arrays, draws no random numbers, and adds up exactly: a permutation
of the documents changes nothing, and swapping the two runs flips the sign of every
number.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import optimize, special, stats

from lm_eval_pruned.analysis.samples import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike

    Alternative = Literal["two-sided", "less", "greater"]

#: Chance of seeing a difference of the size of `PairedTest.smallest_detectable`.
POWER = 0.8
#: The mean of fewer documents or clusters than this is not taken for normal.
LEAST_UNITS = 10
ALTERNATIVES = ("two-sided", "less", "greater")
#: Where a distribution is integrated over, and where an ellipse is walked along.
_NODES = 512
_ANGLES = 4096
#: Squares of larger numbers, added up, are no longer finite.
_LARGEST = 1e140


def _nothing(level: float) -> None:
    return None


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
        default=_nothing, compare=False, repr=False
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


def paired_difference(
    base: ArrayLike,
    run: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    alpha: float = 0.05,
    alternative: Alternative = "two-sided",
) -> PairedTest:
    """Compare two runs on the same documents.

    Independent documents that are right or wrong get McNemar's mid-p test; all else a
    paired t test on the means of the documents or, where they are given, of the
    clusters. p < alpha exactly where 0 is outside the interval.

    Args:
        base: Values of the base, shape (n,), n >= 1; row i of `base` and `run` belong
            to the same document.
        run: Values of the run, shape (n,).
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document, length n; default: each its own.
        strata: Stratum of each document, length n, for parts that another draw of
            documents would hold too, such as the subjects of MMLU; default: one.
            Clusters lie within strata.
        transform: From the weighted mean to the score, a name in `samples.TRANSFORMS`.
        alpha: 1 - confidence of the interval, and the level of the test.
        alternative: What p is a test against: ``less``, the run scores less than the
            base; ``greater``; or either. The interval is two-sided in any case: a
            one-sided p below alpha / 2 is where it leaves out 0.

    Raises:
        ValueError: The arrays are empty, of different lengths, or hold NaN or infinity;
            `alternative` is none of `ALTERNATIVES`; a cluster lies in two strata.

    Returns:
        Interval and p are None for fewer than `LEAST_UNITS` units, unless documents are
        independent and right or wrong.

    Source:
        Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91 (mid-p);
        Miller 2024, arXiv 2411.00640 (means of paired differences, clusters); Cochran
        1977, Sampling Techniques, chapters 5 and 6 (strata, ratios).

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
    for name, labels in (("clusters", clusters), ("strata", strata)):
        if labels is not None and len(labels) != len(base):
            raise ValueError(
                f"{name} names {len(labels)} documents of {len(base)}: give one for each."
            )
    if alternative not in ALTERNATIVES:
        raise ValueError(
            f"alternative is {alternative!r}: give one of {', '.join(ALTERNATIVES)}."
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
        up, down = int((run > base).sum()), int((base > run).sum())
        return _mcnemar(up, down, len(base), alpha, alternative)
    sums = np.stack([weights * base, weights * run, weights])
    if np.abs(sums).max() > _LARGEST:
        with np.errstate(over="ignore"):
            scores = [np.average(each, weights=weights) for each in (base, run)]
        difference = float(scores[1] - scores[0])
        why = "none: values too large to be squared"
        return PairedTest(difference, None, None, None, why, len(base), alpha)
    moments = _moments(sums, clusters, strata)
    return _paired_t(moments, transform, alpha, alternative)


def unpaired_difference(
    base: float,
    base_stderr: float,
    run: float,
    run_stderr: float,
    *,
    alpha: float = 0.05,
    alternative: Alternative = "two-sided",
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
        alternative: See `paired_difference`.
    """
    difference = run - base
    stderr = math.hypot(base_stderr, run_stderr)
    if stderr == 0:
        return PairedTest(difference, None, None, None, "none: stderr is 0", 0, alpha)
    half = float(stats.norm.isf(alpha / 2)) * stderr
    lower = float(stats.norm.cdf(difference / stderr))
    upper = float(stats.norm.sf(difference / stderr))
    sides = 2 if alternative == "two-sided" else 1

    def detectable(level: float) -> float:
        return float(stats.norm.isf(level / sides) + stats.norm.ppf(POWER)) * stderr

    return PairedTest(
        difference,
        difference - half,
        difference + half,
        _p(lower, upper, alternative),
        "unpaired z test on stderrs (weaker)",
        0,
        alpha,
        detectable,
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


def false_discovery_levels(
    p_values: Sequence[float | None], alpha: float
) -> list[float | None]:
    """Return the level that Benjamini and Hochberg's correction leaves for each test.

    A test is significant after correction exactly where its p is below its level, if
    all other p values stay as they are.

    Args:
        p_values: One per test; None for a test that was not made.
        alpha: Rate of false discoveries.

    Returns:
        ``alpha * k / n`` with n tests that were made, and k the discoveries that there
        were if this p was 0; None where there was no test.
    """
    made = np.array([p for p in p_values if p is not None], dtype=float)
    n = len(made)
    levels: list[float | None] = []
    for p in p_values:
        if p is None:
            levels.append(None)
            continue
        others = np.sort(made)
        others = np.delete(others, np.searchsorted(others, p))
        ranks = np.arange(2, n + 1)
        found = np.flatnonzero(others < alpha * ranks / n)
        discoveries = int(ranks[found[-1]]) if len(found) else 1
        levels.append(alpha * discoveries / n)
    return levels


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
    ratios = _finite("ratios", ratios)
    rows = [_finite("values", row) for row in values]  # type: ignore[union-attr]
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
        np.ones(len(documents)) if weights is None else _finite("weights", weights)
    )
    sums = np.stack([np.zeros_like(documents), weights * documents, weights])
    moments = _moments(sums, clusters, strata)
    test = _paired_t(moments, "mean", alpha, "two-sided")
    return Trend(
        len(ratios),
        test.difference,
        test.low,
        test.high,
        test.p,
        test.method.replace("paired t test", "t test of slopes"),
        test.units,
    )


def _p(lower: float, upper: float, alternative: str) -> float:
    """Return the p of an alternative from the chances of the two tails."""
    if alternative == "less":
        return lower
    if alternative == "greater":
        return upper
    return min(1.0, 2 * min(lower, upper))


def _mcnemar(
    up: int, down: int, n: int, alpha: float, alternative: Alternative
) -> PairedTest:
    """Test `up` documents that became right and `down` that became wrong, of `n`."""
    low, high = _changed_interval(up, down, n, alpha)
    return PairedTest(
        (up - down) / n,
        low,
        high,
        _p(_mid_p(up, down), _mid_p(down, up), alternative),
        "McNemar mid-p",
        n,
        alpha,
        lambda level: _mcnemar_detectable(
            up + down, n, level / (2 if alternative == "two-sided" else 1)
        ),
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
    changed = up + down
    quantiles = (np.arange(_NODES) + 0.5) / _NODES
    share = special.betaincinv(changed + 0.5, n - changed + 0.5, quantiles)

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
        changing = max(share, difference)
        many = stats.binom(n, changing)
        counts = np.arange(many.ppf(1e-9), many.isf(1e-9) + 1)
        last = stats.binom.ppf(tail, counts, 0.5)
        mid_p = (
            stats.binom.cdf(last, counts, 0.5) - stats.binom.pmf(last, counts, 0.5) / 2
        )
        last -= mid_p >= tail
        becoming_wrong = (1 - difference / changing) / 2
        return float(many.pmf(counts) @ stats.binom.cdf(last, counts, becoming_wrong))

    if power(1.0) < POWER:
        return None
    return float(optimize.brentq(lambda x: power(x) - POWER, 0.0, 1.0, xtol=1e-6))


@dataclass(frozen=True)
class _Moments:
    """Two weighted means over units, and how surely they are known.

    Attributes:
        base: Mean of the base.
        run: Mean of the run.
        difference: `run` - `base`.
        variance: Of `difference`.
        level_variance: Of the mean of `base` and `run`.
        covariance: Of `difference` and that mean.
        unit: What was counted, in words.
        units: How many.
        degrees: Degrees of freedom of the variances.
        alike: Whether all units differ by the same amount.
    """

    base: float
    run: float
    difference: float
    variance: float
    level_variance: float
    covariance: float
    unit: str
    units: int
    degrees: int
    alike: bool


def _moments(
    sums: np.ndarray, clusters: Sequence[str] | None, strata: Sequence[str] | None
) -> _Moments:
    """Return the moments of `sums`, shape (3, n): weighted base, weighted run, weight.

    The means are ratios of sums; their variances are those of the linearised ratio,
    between units within strata.
    """
    part = _index(strata) if strata is not None else np.zeros(sums.shape[1], dtype=int)
    if clusters is not None:
        of_cluster = _index(clusters)
        count = of_cluster.max() + 1
        first = np.full(count, -1)
        first[of_cluster] = part
        if (first[of_cluster] != part).any():
            raise ValueError("A cluster has documents in two strata: give it one.")
        sums = np.stack([_sum_by(of_cluster, row) for row in sums])
        part = first
    part = _joined(part)
    base, run, weight = sums
    total = math.fsum(weight)
    means = math.fsum(base) / total, math.fsum(run) / total
    gains = run - base
    gain = math.fsum(gains) / total
    one, other, residual = (
        (row - mean * weight) / total
        for row, mean in ((base, means[0]), (run, means[1]), (gains, gain))
    )
    level = (one + other) / 2
    same = np.ptp(gains / weight) <= 1e-9 * np.abs(gains / weight).max()
    spread = 1e-12 * np.ptp(residual)
    if not same and np.ptp(_within(part, residual)) <= spread:
        # Strata without any spread of their own say nothing about another draw.
        part = np.zeros_like(part)
    sizes = np.bincount(part)
    residual, level = _within(part, residual), _within(part, level)
    # One unit alone has no spread; `LEAST_UNITS` are asked for later.
    factor = (sizes / np.maximum(sizes - 1, 1))[part]
    return _Moments(
        *means,
        gain,
        math.fsum(factor * residual**2),
        math.fsum(factor * level**2),
        math.fsum(factor * residual * level),
        "documents" if clusters is None else "clusters",
        len(weight),
        len(weight) - len(sizes),
        bool(same),
    )


def _index(labels: Sequence[str]) -> np.ndarray:
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def _sum_by(index: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the sums of `row` by `index`, rounded once, whatever the order."""
    parts = np.split(
        row[np.argsort(index, kind="stable")], np.cumsum(np.bincount(index))[:-1]
    )
    return np.array([math.fsum(part) for part in parts])


def _within(index: np.ndarray, row: np.ndarray) -> np.ndarray:
    return row - (_sum_by(index, row) / np.bincount(index))[index]


def _joined(part: np.ndarray) -> np.ndarray:
    """Put strata of one unit, which have no spread of their own, together."""
    sizes = np.bincount(part)
    single = sizes == 1
    if single.sum() == 1 and len(sizes) > 1:
        single[np.argmax(sizes)] = True
    return _index(np.where(single[part], -1, part))  # type: ignore[arg-type]


def _paired_t(
    moments: _Moments, transform: str, alpha: float, alternative: Alternative
) -> PairedTest:
    function = TRANSFORMS[transform]
    with np.errstate(over="ignore", invalid="ignore"):
        difference = (
            moments.difference
            if transform == "mean"
            else float(function(moments.run) - function(moments.base))
        )
    unit, units = moments.unit, moments.units
    rising = function(1.0) > function(0.0)
    if moments.difference == 0 and moments.alike:
        p = _p(0.5, 0.5, alternative)
        return PairedTest(0.0, None, None, p, f"none: all {unit} equal", units, alpha)
    if units < LEAST_UNITS:
        why = f"none: {units} {unit} are too few for a test of their mean"
        return PairedTest(difference, None, None, None, why, units, alpha)
    gained = (moments.difference > 0) == rising
    if moments.alike:
        # No spread to compare with: the signs alone, as McNemar's mid-p counts them.
        unlikely = 0.5 ** (units + 1)
        tails = (1 - unlikely, unlikely) if gained else (unlikely, 1 - unlikely)
        return PairedTest(
            difference,
            None,
            None,
            _p(*tails, alternative),
            f"sign test: all {unit} changed alike",
            units,
            alpha,
        )
    stderr = math.sqrt(moments.variance)
    t = moments.difference / stderr * (1 if rising else -1)
    student = stats.t(moments.degrees)
    critical = float(student.isf(alpha / 2))
    low, high = _transformed_interval(moments, function, critical, transform)
    base = moments.base

    def detectable(level: float) -> float | None:
        needed = float(student.isf(level / (2 if alternative == "two-sided" else 1)))
        size = stderr * special.nctdtrinc(moments.degrees, 1 - POWER, needed)
        if transform == "mean":
            return size
        with np.errstate(over="ignore"):
            change = max(
                abs(float(function(base + sign * size) - function(base)))
                for sign in (-1, 1)
            )
        return change if math.isfinite(change) else None

    return PairedTest(
        difference,
        low,
        high,
        _p(float(student.cdf(t)), float(student.sf(t)), alternative),
        f"paired t test over {unit}",
        units,
        alpha,
        detectable,
    )


def _transformed_interval(
    moments: _Moments, function: Callable, critical: float, transform: str
) -> tuple[float | None, float | None]:
    """Return the interval of the difference of two transformed means.

    All pairs of means within `critical` standard errors lie in an ellipse; the interval
    holds the differences of its points. They are all of one sign exactly where the
    ellipse does not meet the line of equal means, which is what the t test asks.
    """
    stderr = math.sqrt(moments.variance)
    if transform == "mean":
        half = critical * stderr
        return moments.difference - half, moments.difference + half
    along = moments.covariance / stderr
    across = math.sqrt(max(0.0, moments.level_variance - along**2))
    angle = np.linspace(0, 2 * math.pi, _ANGLES, endpoint=False)
    difference = moments.difference + critical * stderr * np.cos(angle)
    middle = (moments.base + moments.run) / 2 + critical * (
        along * np.cos(angle) + across * np.sin(angle)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        ends = function(middle + difference / 2) - function(middle - difference / 2)
    if not np.isfinite(ends).all():
        return None, None
    return float(ends.min()), float(ends.max())


@functools.lru_cache(maxsize=8)
def _orders(n: int) -> np.ndarray:
    return np.array(list(itertools.permutations(range(n))))


def _permutation_p(x: np.ndarray, y: np.ndarray) -> float:
    """Return the exact two-sided p of Spearman's rho, from all orders."""
    one, other = (ranks - ranks.mean() for ranks in map(stats.rankdata, (x, y)))
    products = np.abs(one[_orders(len(x))] @ other)
    # Ranks are halves of integers: what is not equal differs by more.
    return float((products >= abs(one @ other) - 1e-6).mean())


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    bad = int((~np.isfinite(array)).sum())
    if array.ndim != 1 or bad:
        raise ValueError(
            f"{name} has shape {array.shape} and {bad} values that are NaN or infinite: give one "
            "row of finite numbers."
        )
    return array
