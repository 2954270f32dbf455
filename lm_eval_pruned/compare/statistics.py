"""Paired tests of two runs: p, interval, and their correction.

Student's t is not among them: a candidate that is almost the base changes few documents, and a t test
of documents that hardly differ claims that none lost much. No random numbers are drawn, and the order
of documents changes nothing but the rounding.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from lm_eval_pruned.compare.gaffke import Gaffke
from lm_eval_pruned.results.documents import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import ArrayLike

#: Fewer documents or clusters than this are not tested, unless they are right or wrong.
LEAST_UNITS = 10
#: Fewer say nothing about a margin of scores without bounds: a loss that one unit in twenty carries
#: shows in none of them in more than 5 % of cases.
LEAST_UNITS_OF_MARGIN = 60


class Shares(NamedTuple):
    """`up` documents became right and `down` wrong, of `n`: Tango's score test.

    The spread is the likeliest one if a difference is the true one, so there is some even if no
    document changed.

    Source: Tango 1998, Statistics in Medicine 17, 891-908.
    """

    up: int
    down: int
    n: int

    def tail(self, x: float, side: int) -> float:
        """Return the p of "the difference is `x` or less" (side 0), or of "`x` or more" (1)."""
        up, down, n = self
        if x < 0:
            return Shares(down, up, n).tail(-x, 1 - side)
        if x >= 1:
            return (1.0, 0.0)[side]
        # The likeliest share of documents that become wrong solves a quadratic equation.
        linear = (2 * n - up + down) * x - up - down
        root = math.sqrt(linear**2 + 8 * n * down * x * (1 - x))
        variance = (root - linear) / 2 + n * x * (1 - x)
        z = (up - down - n * x) / math.sqrt(2 * variance) if variance > 0 else 0.0
        return special.erfc((z, -z)[side]) / 2

    def sides(self) -> tuple[float, float]:
        """Return McNemar's mid-p of a run that scores less, and of one that scores more."""
        if self.up == self.down:
            return 0.5, 0.5
        coins = stats.binom(self.up + self.down, 0.5)
        # Fewer heads than these, and half of as many.
        less, more = (float(coins.cdf(n) - coins.pmf(n) / 2) for n in self[:2])
        return less, more

    def ends(self, level: float) -> tuple[float, float]:
        """Return the two-sided interval: the differences that the score test does not reject."""
        seen = (self.up - self.down) / self.n
        excess = lambda x, side: self.tail(x, side) - level / 2
        low, high = (
            most
            if seen == most
            else optimize.brentq(excess, most, seen, (side,), xtol=1e-13)
            for side, most in enumerate((-1.0, 1.0))
        )
        return low, high


class Normal(NamedTuple):
    """A difference of two scores of which only the standard errors are known."""

    difference: float
    stderr: float

    def tail(self, x: float, side: int) -> float:
        """Return the p of "the difference is `x` or less" (side 0), or of "`x` or more" (1)."""
        z = (x - self.difference) / self.stderr
        return float(special.ndtr((z, -z)[side]))

    def sides(self) -> tuple[float, float]:
        """Return the p of a run that scores less, and of one that scores more."""
        return self.tail(0.0, 1), self.tail(0.0, 0)

    def ends(self, level: float) -> tuple[float, float]:
        """Return the two-sided interval."""
        half = float(stats.norm.isf(level / 2)) * self.stderr
        return self.difference - half, self.difference + half


@dataclass(frozen=True)
class PairedTest:
    """What can be said about `difference`, the score of the run minus that of the base.

    `method` is ``none: ...`` where no test was made, or nothing changed; `units` are independent
    documents or clusters, 0 where not known; `distribution` is where p and interval come from.
    `units_missing` says how many more units a claim about a margin takes, of scores without bounds
    that changed.
    """

    difference: float
    method: str
    units: int = 0
    distribution: Shares | Gaffke | Normal | None = field(
        default=None, compare=False, repr=False
    )
    units_missing: int = 0

    @functools.cached_property
    def sides(self) -> tuple[float, float] | None:
        """The one-sided p of a run that scores less, and of one that scores more; None without a test."""
        return self.distribution.sides() if self.distribution else None

    @property
    def p(self) -> float | None:
        """Two-sided p of "there is no difference"; None where no test was made."""
        return None if self.sides is None else min(1.0, 2 * min(self.sides))

    def interval(self, level: float = 0.05) -> tuple[float | None, float | None]:
        """Return the interval of confidence 1 - `level`; None and None where there is none.

        p < level exactly where 0 is outside of it.
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

    def p_outside(self, low: float, high: float) -> float | None:
        """Return the p of "the true difference lies outside of (`low`, `high`)", or None.

        It is the larger p of two one-sided tests. Either end may be infinite. None, too, where
        too few documents changed whose scores have no bounds.

        Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15,
        657-680; Berger and Hsu 1996, Statistical Science 11, 283-319.
        """
        if self.distribution is None or self.units_missing:
            return None
        p = max(
            float(self.distribution.tail(end, side))
            for side, end in enumerate((low, high))
            if math.isfinite(end)
        )
        return p if low < self.difference < high else max(0.5, p)


def paired_difference(
    base: ArrayLike,
    run: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    limits: tuple[float, float] = (-1.0, 1.0),
) -> PairedTest:
    """Compare two runs on the same documents, whose finite values are of shape (n,), n >= 1.

    Independent documents that are right or wrong get McNemar's mid-p test; all else `Gaffke`'s test
    of the mean over documents or clusters, with interval and p None for fewer than `LEAST_UNITS` of
    them.

    Args:
        base: Values of the base.
        run: Values of the run.
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document; default: each its own.
        strata: Stratum of each document or cluster: parts that another draw would hold too, such as
            the subjects of MMLU; default: one.
        transform: From the weighted mean to the score, a name in `documents.TRANSFORMS`.
        limits: The smallest and the largest difference of a document, where scores lie between 0 and 1.

    Source: Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91 (mid-p); Miller
    2024, arXiv 2411.00640 (means of paired differences, clusters); Cochran 1977, Sampling Techniques,
    chapters 5 and 6 (strata, ratios).
    """
    both = np.array([base, run], dtype=float)
    gains, n = both[1] - both[0], both.shape[1]
    weights = np.ones(n) if weights is None else np.asarray(weights, dtype=float)
    if clusters is not None and len(set(clusters)) == n:
        clusters = None
    plain = transform == "mean" and clusters is None and (weights == 1).all()
    if plain and np.isin(both, (0, 1)).all():
        up, down = int((gains > 0).sum()), int((gains < 0).sum())
        shares = Shares(up, down, n)
        return PairedTest((up - down) / n, "McNemar mid-p", n, shares)
    form, perplexity = TRANSFORMS[transform], None
    if form.exponential:
        perplexity = float(form.score(np.average(both[0], weights=weights)))
    bounded = transform == "mean" and both.min() >= 0 and both.max() <= 1
    return paired_mean(
        form.factor * weights * gains,
        weights,
        clusters,
        strata,
        perplexity,
        limits if bounded else None,
    )


def paired_mean(
    gains: np.ndarray,
    weights: np.ndarray,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    perplexity: float | None = None,
    limits: tuple[float, float] | None = None,
) -> PairedTest:
    """Test a weighted mean of differences, whose spread is that within strata.

    `gains` are weighted already, shape (n,); `limits` are None where documents can differ by any
    amount: then the unseen unit of `Gaffke` departs twice as far as the farthest unit that was seen.
    For the others see `paired_difference` and `Gaffke`.
    """
    part = np.zeros(len(gains), dtype=int) if strata is None else _numbers(strata)
    unit = "documents"
    if clusters is not None:
        unit, cluster = "clusters", _numbers(clusters)
        part = part[np.unique(cluster, return_index=True)[1]]
        gains, weights = (np.bincount(cluster, row) for row in (gains, weights))
    sizes = np.bincount(part)
    if sizes.min() < 2:
        # A stratum of one unit has no spread.
        part, sizes = np.zeros_like(part), np.array([len(part)])
    units, mean = len(gains), float(gains.sum() / weights.sum())
    factor = (sizes / np.maximum(sizes - 1, 1))[part]
    with np.errstate(over="ignore", invalid="ignore"):
        deviations = gains - mean * weights
        if len(sizes) > 1:
            deviations -= (np.bincount(part, deviations) / sizes)[part]
        stderr = math.sqrt((factor * deviations**2).sum()) / weights.sum()
        if len(sizes) > 1:
            # The spread within a stratum is about its own mean.
            deviations *= np.sqrt(factor)
    rounding = 1e-9 * float(np.abs(gains / weights).max())
    if limits is None:
        low, high = deviations.min(), deviations.max()
        unseen = 2 * low / weights.max(), 2 * high / weights.max()
    else:
        unseen = limits[0] - mean, limits[1] - mean
    gaffke = Gaffke(mean, deviations, weights, unseen, perplexity)
    distribution, missing = None, 0
    if not gains.any():
        method, distribution = f"none: all {unit} equal", gaffke
    elif units < LEAST_UNITS:
        method = f"none: {units} {unit} are too few for a test of their mean"
    elif not stderr < math.inf or (limits is None and stderr <= rounding):
        method = f"none: all {unit} changed alike, or by values too large to be squared"
    else:
        method, distribution = f"Gaffke's test over {unit}", gaffke
        missing = max(0, LEAST_UNITS_OF_MARGIN - units) if limits is None else 0
    score = gaffke.score(mean)
    return PairedTest(score, method, units, distribution, missing)


def _numbers(labels: Sequence[str]) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1]


def unpaired_difference(difference: float, *stderrs: float) -> PairedTest:
    """Test a difference of two scores from their standard errors, as if runs were independent."""
    normal = Normal(difference, math.hypot(*stderrs))
    if normal.stderr == 0:
        return PairedTest(difference, "none: stderr is 0")
    method = "unpaired z test on stderrs (weaker)"
    return PairedTest(difference, method, 0, normal)


def false_discovery(
    p_values: Sequence[float | None],
    families: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> list[tuple[float | None, float | None]]:
    """Correct p values after Benjamini and Hochberg, each family by itself.

    Returns the adjusted p of each test, and the level that the correction leaves for it: with all
    other p as they are, it is significant exactly where its p is below ``alpha * k / n``, of n
    tests and k discoveries if this p was 0. None and None where there is no p.

    Source: Benjamini and Yekutieli 2005, Journal of the American Statistical Association 100, 71-81.

    Example:
        >>> false_discovery([0.01, 0.04, 0.04], ["boolq", "boolq", "arc_easy"])
        [(0.02, 0.05), (0.04, 0.05), (0.04, 0.05)]
    """
    tests = list(zip(p_values, families or [None] * len(p_values), strict=True))
    corrected: list[tuple[float | None, float | None]] = []
    for p, family in tests:
        if p is None:
            corrected.append((None, None))
            continue
        others = [q for q, label in tests if q is not None and label == family]
        others.remove(p)
        q = stats.false_discovery_control([p, *others])[0]
        discoveries = (stats.false_discovery_control([0.0, *others]) < alpha).sum()
        corrected.append((float(q), float(alpha * discoveries / (len(others) + 1))))
    return corrected
