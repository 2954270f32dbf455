"""Claims on two models: each is reduced to gains, one function tests it, and one says the answer.

A claim is of the form "the mean gain is above 0". Each unit, a document or a cluster of documents, has a
gain, which lies between known limits or can be any number:

============================== ==============================================
claim                          gain of a document
============================== ==============================================
differs by more than x         ``run - base - x``
is above its floor             ``run - floor``
keeps more than a share s      ``(run - floor) - s * (base - floor)``
a loss rises by less than s    ``(1 + s) * base - run``; of a perplexity, ``log(1 + s) - (run - base)``
                               on its logarithm
============================== ==============================================

The opposite claims have the opposite gains. The interval of a difference, or of what is kept, holds each x or s
that the test rejects on neither side. Nothing else in this package computes a p or an interval of a pair.

Sources: Gaffke 2005, Mathematical Methods of Statistics 14, 451-467, and Learned-Miller and Thomas 2019, arXiv
1905.06208 (the test); Miller 2024, arXiv 2411.00640 (means of paired differences, clusters, strata); Cochran 1977,
Sampling Techniques, chapters 5 and 6 (strata, ratios); Fieller 1954, Journal of the Royal Statistical Society B 16,
175-185 (the interval of a share); Berger and Hsu 1996, Statistical Science 11, 283-319 (claims of several parts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from lm_eval_pruned.compare.gaffke import below_zero
from lm_eval_pruned.results.documents import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.results.metrics import Limits

#: The level of each claim of a verdict or a gate.
CLAIM_LEVEL = 0.05
#: A part of what is claimed, such as one task of several, may lose so many times the margin of the whole.
GUARD = 2.5
#: Fewer documents or clusters than this are not tested, unless they are right or wrong.
LEAST_UNITS = 10
#: Fewer say nothing about a margin of scores without limits: a loss that one unit in twenty carries
#: shows in none of them in more than 5 % of cases.
LEAST_UNITS_OF_MARGIN = 60
#: The ends of an interval are looked for no farther than this many of its first steps.
_FARTHEST = 1e4


class Gains(NamedTuple):
    """What a claim is reduced to: the gain of each unit, times its weight, shape (n,).

    `strata` numbers the part that a unit belongs to, and `counts` how many units are the same, shape (n,)
    both; `limits` are those of the gain of a document, or None.
    """

    gains: np.ndarray
    weights: np.ndarray
    strata: np.ndarray
    counts: np.ndarray
    limits: Limits | None


@dataclass(frozen=True)
class Kept:
    """What a candidate keeps: 1 is all that the base scores above the floor, 0 is the floor.

    From `low` to `high` is the interval; an end is None where the documents give none, because they
    are too few, or because the base could be at its floor.
    """

    share: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Percent with interval, such as ``61 % [52, 70]``."""
        ends = [
            "?" if end is None else f"{end:.0%}"[:-1] for end in (self.low, self.high)
        ]
        return f"{self.share:.0%} [{', '.join(ends)}]".replace("%", " %")


def p_of(claim: Gains) -> float:
    """Return the p of "the mean gain is 0 or less": Gaffke's test.

    The mean is drawn again with random (exponential) weights, among the units and one more that nobody
    has seen, which weighs as much as the heaviest. It has the smallest gain that there is; of gains
    without limits, it lies twice as far below the mean as the lowest that was seen. p is the share of
    draws that are not above 0. With limits, no distribution is known for which p is too small; of
    right-or-wrong documents it is McNemar's exact test where the margin is 0, and Clopper and Pearson's
    where all changes go one way.

    The spread is that within strata: each unit departs from the mean of its stratum.
    """
    gains, weights, strata, counts, limits = claim
    heaviest = weights.max()
    with np.errstate(over="ignore", invalid="ignore"):
        mean = (counts * gains).sum() / (counts * weights).sum()
        expected = mean * weights
        departures = gains - expected
        sizes = np.bincount(strata, counts)
        # A stratum of one unit has no spread.
        if len(sizes) > 1 and sizes.min() > 1:
            departures -= (np.bincount(strata, counts * departures) / sizes)[strata]
            departures *= np.sqrt(sizes / (sizes - 1))[strata]
            gains = expected + departures
    if limits is not None:
        unseen = limits[0] * heaviest
    else:
        unseen = mean * heaviest + 2 * departures.min()
    return below_zero(np.append(unseen, gains), np.append(1, counts))


@dataclass(frozen=True, eq=False)
class Test:
    """What can be said about `difference`, the score of the run minus that of the base.

    `method` is ``none: ...`` where no test was made, or nothing changed; `units` are independent
    documents or clusters, 0 where not known. `units_missing` says how many more units a claim about a
    margin takes, of scores without limits that changed.
    """

    difference: float
    method: str
    units: int = 0
    units_missing: int = 0

    def p_beyond(self, x: float, side: int) -> float | None:
        """Return the p of "the true difference is not above `x`" (side 1), or "not below" (side -1).

        None where no test is made.
        """
        return None

    def interval(self, level: float = 0.05) -> tuple[float | None, float | None]:
        """Return the two-sided interval of confidence 1 - `level`; None and None where there is none.

        p < level exactly where 0 is outside of it.
        """
        return None, None

    @cached_property
    def p(self) -> float | None:
        """Two-sided p of "there is no difference"; None where no test was made."""
        less, more = self.p_beyond(0.0, -1), self.p_beyond(0.0, 1)
        return None if less is None or more is None else min(1.0, 2 * min(less, more))

    def p_margin(self, size: float, share: float | None, side: int) -> float | None:
        """Return the p of "the true difference lies beyond the margin" on one side of the base.

        The margin is a `size` in the unit of the score, or a `share` of what the base has above its floor.
        Side 1: lower than the base by the margin or more; -1: higher. None where nothing can be claimed.
        """
        return None if self.units_missing else self._p_at(size, share, side, side)

    def p_within(self, size: float, share: float | None, side: int) -> float | None:
        """Return the p of "the true difference lies within the margin" on one side, as for `p_margin`."""
        return self._p_at(size, share, side, -side)

    def _p_at(
        self, size: float, share: float | None, end: int, side: int
    ) -> float | None:
        return self.p_beyond(-end * size, side)


@dataclass(frozen=True, eq=False)
class Normal(Test):
    """A difference of which only the standard error is known, as if runs were independent."""

    stderr: float = math.nan

    def p_beyond(self, x: float, side: int) -> float | None:
        """Return the p of a normal distribution."""
        return float(special.ndtr(side * (x - self.difference) / self.stderr))

    def interval(self, level: float = 0.05) -> tuple[float | None, float | None]:
        """Return the interval of a normal distribution."""
        half = float(stats.norm.isf(level / 2)) * self.stderr
        return self.difference - half, self.difference + half


@dataclass(frozen=True, eq=False)
class Paired(Test):
    """Two runs on the same documents, summed over units; `paired` makes it.

    `base`, `run` and `floor` are sums of weighted scores, shape (n,), of which each stands for so many units as
    `counts` says; `perplexity` is that of the base, or another score that is the exponential of a mean: then
    these are of logarithms. `floors` are the lowest and the highest floor of a document, `limits` those of its
    score.
    """

    base: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    run: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    floor: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    weights: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    strata: np.ndarray = field(default_factory=lambda: np.zeros(0, int), repr=False)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    floors: Limits = (0.0, 0.0)
    limits: Limits | None = None
    perplexity: float | None = None

    def _gains(self, gains: np.ndarray, limits: Limits | None, side: int) -> Gains:
        if side < 0:
            gains, limits = -gains, limits and (-limits[1], -limits[0])
        return Gains(gains, self.weights, self.strata, self.counts, limits)

    def differs(self, x: float, side: int) -> Gains:
        """Reduce "the mean differs by more than `x`" (side 1), or "by less" (side -1)."""
        gains, limits = self.run - self.base - x * self.weights, None
        if self.limits:
            low, high = self.limits
            limits = low - high - x, high - low - x
        return self._gains(gains, limits, side)

    def keeps(self, share: float, side: int) -> Gains:
        """Reduce "keeps more than a share of what the base has above the floor", or "less" (side -1).

        Where the base is below its floor, "more" is farther below.
        """
        rest = 1 - share
        gains = self.run - share * self.base - rest * self.floor
        # Rounding must not make equal values differ.
        scale = np.abs(self.base).max() + np.abs(self.floor).max()
        gains[np.abs(gains) <= 1e-13 * scale] = 0.0
        limits = None
        if self.limits:
            low, high = self.limits
            bases, floors = (
                [share * x for x in self.limits],
                [rest * x for x in self.floors],
            )
            limits = low - max(bases) - max(floors), high - min(bases) - min(floors)
        return self._gains(gains, limits, side * self.above)

    def clears(self, side: int) -> Gains:
        """Reduce "the run is above the floor" (side 1), or "below" (side -1)."""
        limits = None
        if self.limits:
            limits = self.limits[0] - self.floors[1], self.limits[1] - self.floors[0]
        return self._gains(self.run - self.floor, limits, side)

    @cached_property
    def above(self) -> int:
        """The sign of what the base has above the floor; 0 where it lies exactly on it."""
        sums = ((self.counts * each).sum() for each in (self.base, self.floor))
        return int(np.sign(np.subtract(*sums)))

    @property
    def tested(self) -> bool:
        """Whether tests are made: not of too few units, or without a spread."""
        return self.method[:6] != "none: " or not (self.run - self.base).any()

    @property
    def shares_tested(self) -> bool:
        """Whether shares are tested: documents that change alike may differ in what they had."""
        varied = np.ptp(self.base / self.weights) > 0
        return self.tested or (self.units >= LEAST_UNITS and bool(varied))

    def p_beyond(self, x: float, side: int) -> float | None:
        """Return the p by `p_of`."""
        if not self.tested:
            return None
        if self.perplexity is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                x = float(np.log1p(max(x / self.perplexity, -1.0)))
        if not math.isfinite(x):
            return float((x > 0) == (side > 0))
        return p_of(self.differs(x, side))

    def _p_at(
        self, size: float, share: float | None, end: int, side: int
    ) -> float | None:
        """Test a share as what is kept, so that the base's own spread counts."""
        if not share or self.perplexity is not None:
            return super()._p_at(size, share, end, side)
        if not self.shares_tested or not self.above:
            return None
        return p_of(self.keeps(1 - end * self.above * share, side * self.above))

    def interval(self, level: float = 0.05) -> tuple[float | None, float | None]:
        """Return each difference that `p_of` does not reject on either side."""
        if not self.tested:
            return None, None
        total = (self.counts * self.weights).sum()
        changes = self.run - self.base
        mean = float((self.counts * changes).sum() / total)
        spread = float(np.abs(changes - mean * self.weights).max() / total)
        if self.limits:
            spread = max(spread, (self.limits[1] - self.limits[0]) / self.units)
        low, high = _ends(self.differs, mean, spread, level)
        ends = tuple(self._score(end) for end in (low, high))
        if None in (low, high) or not all(map(math.isfinite, ends)):
            return None, None
        return ends  # type: ignore[return-value]

    def _score(self, mean: float | None) -> float:
        """Return the difference of scores that a difference of means makes."""
        if mean is None or self.perplexity is None:
            return math.nan if mean is None else mean
        with np.errstate(over="ignore"):
            return float(self.perplexity * np.expm1(mean))

    def kept(self, level: float = 0.05) -> Kept | None:
        """Return the share of what the base has above the floor that the run keeps.

        None where the base is exactly at the floor, or the score is an exponential.
        """
        if not self.above or self.perplexity is not None:
            return None
        base, run, floor = (
            (self.counts * sums).sum() for sums in (self.base, self.run, self.floor)
        )
        share = float((run - floor) / (base - floor))
        ends: tuple[float | None, float | None] = (None, None)
        if self.shares_tested:
            ends = _ends(self.keeps, share, 1e-3, level)
        return Kept(share, *ends)


def _ends(
    claim: Callable[[float, int], Gains], seen: float, step: float, level: float
) -> tuple[float | None, float | None]:
    """Return the ends of an interval around what was seen, which a claim is tested against; None without one."""
    if not 0 < step < math.inf:
        return (seen, seen) if step == 0 else (None, None)

    def end(side: int) -> float | None:
        excess = lambda x: p_of(claim(x, side)) - level / 2
        near, far = seen, seen - side * step
        while excess(far) > 0:
            if abs(far - seen) > _FARTHEST * step:
                return None
            near, far = far, seen + 2 * (far - seen)
        if near == far or excess(near) <= 0:
            return near
        return float(optimize.brentq(excess, near, far, xtol=1e-12 * step + 1e-300))

    return end(1), end(-1)


def paired(
    base: ArrayLike,
    run: ArrayLike,
    floor: ArrayLike = 0.0,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    limits: Limits | None = None,
) -> Paired:
    """Reduce two runs on the same documents, whose finite values are of shape (n,), n >= 1, to units.

    Args:
        base: Values of the base.
        run: Values of the run.
        floor: Score without knowledge, of all documents or of each, shape (n,).
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document; default: each its own.
        strata: Stratum of each document or cluster: parts that another draw would hold too, such as
            the subjects of MMLU; default: one.
        transform: From the weighted mean to the score, a name in `documents.TRANSFORMS`.
        limits: The smallest and the largest score of a document; None if it can be any number.

    Example:
        >>> test = paired([0.9, 0.7] * 10, [0.7, 0.5] * 10, 0.2)
        >>> test.kept().text
        '67 % [63, 69]'
    """
    n, form = len(np.asarray(base)), TRANSFORMS[transform]
    weights = np.ones(n) if weights is None else np.asarray(weights, float)
    rows = np.array([base, run, np.broadcast_to(np.asarray(floor, float), n)], float)
    right_or_wrong = bool(np.isin(rows[:2], (0, 1)).all()) and limits is not None
    rows[: 3 if np.ndim(floor) else 2] *= form.factor
    floors = float(rows[2].min()), float(rows[2].max())
    part = np.zeros(n, int) if strata is None else _numbers(strata)
    rows, unit = rows * weights, "documents"
    if clusters is not None and len({*clusters}) < n:
        unit, cluster = "clusters", _numbers(clusters)
        part = part[np.unique(cluster, return_index=True)[1]]
        summed = [np.bincount(cluster, row) for row in (*rows, weights)]
        rows, weights = np.array(summed[:3]), summed[3]
    before, after, _ = rows
    units, mean = len(weights), float((after - before).sum() / weights.sum())
    right_or_wrong &= unit == "documents" and bool((weights == weights[0]).all())
    with np.errstate(over="ignore", invalid="ignore"):
        gains = (after - before) / weights
        alike = limits is None and not (
            1e-9 * np.abs(gains).max() < np.abs(gains - mean).max() < 1e150
        )
    bounded, missing = limits if transform == "mean" else None, 0
    if not bounded and (after - before).any():
        missing = max(0, LEAST_UNITS_OF_MARGIN - units)
    if not (after - before).any():
        method = f"none: all {unit} equal"
    elif units < LEAST_UNITS and not right_or_wrong:
        method = f"none: {units} {unit} are too few for a test of their mean"
    elif alike:
        method = f"none: all {unit} changed alike, or by values too large to be squared"
    else:
        exact = right_or_wrong and len({*part}) == 1
        method = "McNemar's exact test" if exact else f"Gaffke's test over {unit}"
    perplexity = None
    if form.exponential:
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(before.sum() / weights.sum()))
            mean = float(perplexity * np.expm1(mean))
    (part, weights, *sums), counts = _counted(np.array([part, weights, *rows]))
    about = *sums, weights, part.astype(int), counts, floors, bounded, perplexity
    return Paired(mean, method, units, missing, *about)


def _counted(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different columns of a matrix, and how often each is there, shape (columns,).

    Right-or-wrong documents have four, however many they are.
    """
    columns = columns[:, np.lexsort(columns)]
    starts = np.flatnonzero((np.diff(columns, prepend=np.nan) != 0).any(0))
    counts = np.diff(starts, append=columns.shape[1]).astype(float)
    return columns[:, starts], counts


def _numbers(labels: Sequence[str]) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1]


def unpaired(difference: float, *stderrs: float) -> Test:
    """Test a difference of two scores from their standard errors, as if runs were independent."""
    stderr = math.hypot(*stderrs)
    if stderr == 0:
        return Test(difference, "none: stderr is 0")
    return Normal(difference, "unpaired z test on stderrs (weaker)", stderr=stderr)
