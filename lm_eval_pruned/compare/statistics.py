"""Paired tests of two runs: p, interval, smallest detectable difference, and their correction.

No random numbers are drawn, and the order of documents changes nothing but the rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, special, stats


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import ArrayLike

#: Chance of seeing a difference of the size of `PairedTest.smallest_detectable`.
POWER = 0.8
#: The mean of fewer documents or clusters than this is not taken for normal.
LEAST_UNITS = 10
#: From a mean, by its transform, to what is tested: the score, or the logarithm of a perplexity.
SCALES = {"mean": 1.0, "perplexity": -1.0, "bits_per_byte": -1 / math.log(2)}


@dataclass(frozen=True)
class Shares:
    """`up` documents became right and `down` wrong, of `n`: Tango's score test.

    The spread is the one that is most likely if a difference is the true one, so there is some
    even if no document changed.

    Source: Tango 1998, Statistics in Medicine 17, 891-908.
    """

    up: int
    down: int
    n: int

    @property
    def changing(self) -> float:
        """Share that changes: no answer changed of few says little."""
        return (self.up + self.down + 0.5) / (self.n + 1)

    def tails(self, x: float) -> tuple[float, float]:
        """Return the p of "the difference is `x` or less", and of "`x` or more"."""
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
        z = (up - down - n * x) / math.sqrt(2 * variance) if variance else 0.0
        return math.erfc(z) / 2, math.erfc(-z) / 2

    def ends(self, level: float) -> tuple[float, float]:
        """Return the two-sided interval: the differences that the score test does not reject."""
        seen = (self.up - self.down) / self.n

        def end(side: int) -> float:
            def excess(x: float) -> float:
                return self.tails(x)[side] - level / 2

            most = (-1.0, 1.0)[side]
            return (
                most
                if seen == most
                else optimize.brentq(excess, most, seen, xtol=1e-13)
            )

        return end(0), end(1)

    def detectable(self, level: float) -> float | None:
        """Return the smallest difference that McNemar's mid-p test finds with `POWER`, if any."""

        def excess(difference: float) -> float:
            return chance_seen(self.changing, self.n, difference, level) - POWER

        if excess(1.0) < 0:
            return None
        return float(optimize.brentq(excess, 0.0, 1.0, xtol=1e-6))


def chance_seen(changing: float, n: int, difference: float, level: float) -> float:
    """Return the chance that McNemar's mid-p test finds a true difference of `n` documents.

    `changing` is the share of them that changes; more changes where `difference` needs it.
    """
    changing = max(changing, difference)
    many = stats.binom(n, changing)
    counts = np.arange(many.ppf(1e-9), many.isf(1e-9) + 1)
    last = stats.binom.ppf(level / 2, counts, 0.5)
    mid_p = stats.binom.cdf(last, counts, 0.5) - stats.binom.pmf(last, counts, 0.5) / 2
    last -= mid_p >= level / 2
    becoming_wrong = (1 - difference / changing) / 2
    return float(many.pmf(counts) @ stats.binom.cdf(last, counts, becoming_wrong))


@dataclass(frozen=True)
class Means:
    """Student's t about a difference of two means.

    Attributes:
        gain: The difference; of the logarithms of two perplexities.
        stderr: Its standard error.
        degrees: Degrees of freedom; infinite for a normal distribution.
        perplexity: That of the base, where perplexities are compared.
    """

    gain: float
    stderr: float
    degrees: float
    perplexity: float | None = None

    def score(self, gain: float) -> float:
        """Return the difference of scores that a difference of means makes."""
        if self.perplexity is None:
            return gain
        with np.errstate(over="ignore"):
            return float(self.perplexity * np.expm1(gain))

    def tails(self, x: float) -> tuple[float, float]:
        """Return the p of "the difference is `x` or less", and of "`x` or more"."""
        if self.perplexity is not None:
            share = x / self.perplexity
            x = math.log1p(share) if share > -1 else -math.inf
        z = (x - self.gain) / self.stderr
        return float(stats.t.cdf(z, self.degrees)), float(stats.t.sf(z, self.degrees))

    def ends(self, level: float) -> tuple[float, float] | None:
        """Return the two-sided interval; None where an end of it is not finite."""
        half = float(stats.t.isf(level / 2, self.degrees)) * self.stderr
        low, high = self.score(self.gain - half), self.score(self.gain + half)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def detectable(self, level: float) -> float | None:
        """Return the difference that a two-sided test at `level` finds with `POWER`."""
        needed = stats.t.isf(level / 2, self.degrees)
        size = self.stderr * special.nctdtrinc(self.degrees, 1 - POWER, needed)
        change = max(abs(self.score(side * size)) for side in (-1, 1))
        return float(change) if math.isfinite(change) else None


@dataclass(frozen=True)
class PairedTest:
    """A difference between two runs, and what can be said about it.

    Attributes:
        difference: Score of the run minus score of the base.
        method: What was done, in words; ``none: ...`` where no test was made, or nothing changed.
        units: Independent units: documents, or clusters of them; 0 where not known.
        level: Level that the test was asked to be made at.
        sides: The one-sided p: of a run that scores less, and of one that scores more.
        distribution: Where the interval comes from; None where there is none.
    """

    difference: float
    method: str
    units: int = 0
    level: float = 0.05
    sides: tuple[float, float] | None = None
    distribution: Shares | Means | None = field(default=None, compare=False, repr=False)

    @property
    def p(self) -> float | None:
        """Two-sided p of "there is no difference"; None where no test was made."""
        return None if self.sides is None else min(1.0, 2 * min(self.sides))

    @property
    def low(self) -> float | None:
        """Lower end of the interval of confidence 1 - `level`; None where there is none."""
        return self.interval(self.level)[0]

    @property
    def high(self) -> float | None:
        """Upper end."""
        return self.interval(self.level)[1]

    def interval(self, level: float) -> tuple[float | None, float | None]:
        """Return the interval at another level, such as what `false_discovery` leaves.

        Source: Benjamini and Yekutieli 2005, Journal of the American Statistical
        Association 100, 71-81 (the level that the correction leaves).
        """
        ends = self.distribution.ends(level) if self.distribution else None
        if ends is None or self.p is None:
            return None, None
        low, high = ends
        # The p of right-or-wrong documents is of another test, which may decide otherwise about 0.
        if self.p >= level:
            return min(low, 0.0), max(high, 0.0)
        beyond = 1e-6 * self.difference
        return (max(low, beyond), high) if beyond > 0 else (low, min(high, beyond))

    def smallest_detectable(self, level: float | None = None) -> float | None:
        """Return the true difference that this test finds with chance `POWER`, or None.

        `level` may be what `false_discovery` leaves; default: the test's own.
        """
        if self.distribution is None or self.method.startswith("none"):
            return None
        return self.distribution.detectable(self.level if level is None else level)

    def p_outside(self, low: float, high: float) -> float | None:
        """Return the p of "the true difference lies outside of (`low`, `high`)".

        The larger p of two one-sided tests. Either end may be infinite. None where no interval
        can be given.

        Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15,
        657-680; Berger and Hsu 1996, Statistical Science 11, 283-319.
        """
        if self.distribution is None:
            return None
        ps = [
            self.distribution.tails(end)[side]
            for side, end in enumerate((low, high))
            if math.isfinite(end)
        ]
        return max(ps) if low < self.difference < high else max(0.5, *ps)


def paired_difference(
    base: ArrayLike,
    run: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    alpha: float = 0.05,
) -> PairedTest:
    """Compare two runs on the same documents.

    Independent documents that are right or wrong get McNemar's mid-p test; all else a paired t
    test on the means of documents or clusters, with interval and p None for fewer than
    `LEAST_UNITS` of them. p < alpha exactly where 0 is outside the interval.

    Args:
        base: Finite values of the base, shape (n,), n >= 1.
        run: Values of the run on the same documents, shape (n,).
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document, length n; default: each its own.
        strata: Stratum of each document, length n, for parts that another draw would hold
            too, such as the subjects of MMLU; default: one. Clusters lie within strata.
        transform: From the weighted mean to the score, a name in `documents.TRANSFORMS`.
        alpha: 1 - confidence of the interval, and the level of the test.

    Source:
        Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91 (mid-p);
        Miller 2024, arXiv 2411.00640 (means of paired differences, clusters); Cochran
        1977, Sampling Techniques, chapters 5 and 6 (strata, ratios).

    Example:
        >>> test = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
        >>> test.difference, test.p
        (0.0, 1.0)
    """
    both = np.array([base, run], dtype=float)
    gains, n = both[1] - both[0], both.shape[1]
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if clusters is not None and len(set(clusters)) == n:
        clusters = None
    plain = transform == "mean" and clusters is None and (weights == 1).all()
    if plain and np.isin(both, (0, 1)).all():
        up, down = int((gains > 0).sum()), int((gains < 0).sum())
        sides, shares = (_mid_p(up, down), _mid_p(down, up)), Shares(up, down, n)
        return PairedTest((up - down) / n, "McNemar mid-p", n, alpha, sides, shares)
    perplexity = None
    if transform == "perplexity":
        perplexity = float(np.exp(-np.average(both[0], weights=weights)))
    gains = SCALES[transform] * weights * gains
    test = paired_t(gains, weights, clusters, strata, alpha, perplexity)
    between = transform == "mean" and both.min() >= 0 and both.max() <= 1
    if test.p == 1 and test.distribution is None and between:
        # Scores between 0 and 1 change by 1 at most: so many documents without any change
        # bound the share of those that do.
        return replace(test, distribution=Shares(0, 0, test.units))
    return test


def _mid_p(few: int, many: int) -> float:
    """Return P(X < few) + P(X = few) / 2 of X ~ Binomial(few + many, 1/2)."""
    coin = stats.binom(few + many, 0.5)
    return 0.5 if few == many else float(coin.cdf(few) - coin.pmf(few) / 2)


def paired_t(
    gains: np.ndarray,
    weights: np.ndarray,
    clusters: Sequence[str] | None,
    strata: Sequence[str] | None,
    alpha: float,
    perplexity: float | None = None,
) -> PairedTest:
    """Test a weighted mean of differences, by document or cluster, within strata.

    The variance is that of a linearised ratio. Where all units changed alike, signs are counted.
    `gains` are weighted, shape (n,); for the others see `paired_difference` and `Means`.
    """
    part = np.zeros(len(gains), dtype=int) if strata is None else _numbers(strata)
    unit = "documents"
    if clusters is not None:
        unit, cluster = "clusters", _numbers(clusters)
        part = part[np.unique(cluster, return_index=True)[1]]
        gains, weights = (np.bincount(cluster, row) for row in (gains, weights))
    units, gain = len(gains), float(gains.sum() / weights.sum())
    with np.errstate(over="ignore", invalid="ignore"):
        stderr, degrees = _stderr((gains - gain * weights) / weights.sum(), part)
    means = Means(gain, stderr, degrees, perplexity)
    sides = of = None
    changes = gains / weights
    alike = np.ptp(changes) <= 1e-9 * np.abs(changes).max()
    if alike and gain == 0:
        method, sides = f"none: all {unit} equal", (0.5, 0.5)
    elif units < LEAST_UNITS:
        method = f"none: {units} {unit} are too few for a test of their mean"
    elif alike:
        unlikely = 0.5 ** (units + 1)
        sides = (1 - unlikely, unlikely) if gain > 0 else (unlikely, 1 - unlikely)
        method = f"sign test: all {unit} changed alike"
    elif not math.isfinite(stderr):
        method = "none: values too large to be squared"
    else:
        method, of = f"paired t test over {unit}", means
        sides = means.tails(0.0)[::-1]
    return PairedTest(means.score(gain), method, units, alpha, sides, of)


def _stderr(residuals: np.ndarray, part: np.ndarray) -> tuple[float, int]:
    """Return the standard error from the spread within strata, and its degrees of freedom."""
    sizes = np.bincount(part)
    # Strata of one unit, which have no spread of their own, are put together.
    single = sizes == 1
    if single.sum() == 1 and len(sizes) > 1:
        single[np.argmax(sizes)] = True
    part = _numbers(np.where(single[part], -1, part))
    within = residuals - (np.bincount(part, residuals) / np.bincount(part))[part]
    if np.ptp(within) <= 1e-12 * np.ptp(residuals):
        # Strata that each move as one say nothing about another draw.
        part, within = np.zeros_like(part), residuals
    sizes = np.bincount(part)
    factor = (sizes / np.maximum(sizes - 1, 1))[part]
    return math.sqrt((factor * within**2).sum()), len(part) - len(sizes)


def _numbers(labels: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def unpaired_difference(
    difference: float, *stderrs: float, alpha: float = 0.05
) -> PairedTest:
    """Test a difference of two scores from their standard errors, as if runs were independent."""
    normal = Means(difference, math.hypot(*stderrs), math.inf)
    if normal.stderr == 0:
        return PairedTest(difference, "none: stderr is 0", level=alpha)
    method, sides = "unpaired z test on stderrs (weaker)", normal.tails(0.0)[::-1]
    return PairedTest(difference, method, 0, alpha, sides, normal)


def false_discovery(
    p_values: Sequence[float | None],
    families: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> list[tuple[float | None, float | None]]:
    """Correct p values after Benjamini and Hochberg, each family by itself.

    Args:
        p_values: One per test; None for a test that was not made, which does not count.
        families: The family of each test; default: all are one.
        alpha: Rate of false discoveries.

    Returns:
        The adjusted p of each test, and the level that the correction leaves for it: with all
        other p as they are, it is significant exactly where its p is below ``alpha * k / n``, of n
        tests and k discoveries if this p was 0. None and None without a test.

    Example:
        >>> false_discovery([0.01, 0.04, 0.04], ["boolq", "boolq", "arc_easy"])
        [(0.02, 0.05), (0.04, 0.05), (0.04, 0.05)]
    """
    members: dict[Hashable, list[int]] = {}
    for place, p in enumerate(p_values):
        if p is not None:
            members.setdefault(families[place] if families else None, []).append(place)
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(p_values)
    for places in members.values():
        made = np.array([p_values[place] for place in places], dtype=float)
        adjusted = stats.false_discovery_control(made).tolist()
        for number, place in enumerate(places):
            others = np.where(np.arange(len(made)) == number, 0.0, made)
            discoveries = (stats.false_discovery_control(others) < alpha).sum()
            found[place] = adjusted[number], float(alpha * discoveries / len(made))
    return found
