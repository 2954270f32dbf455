"""Weighted means over documents or clusters: Student's t about their difference, and the power."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special, stats

from lm_eval_pruned.compare.statistics.paired_test import (
    LEAST_UNITS,
    POWER,
    PairedTest,
)


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Means:
    """Student's t about a difference of means, on the scale of the score.

    Attributes:
        gain: Difference of the means.
        stderr: Its standard error.
        degrees: Degrees of freedom; infinite for a normal distribution.
        transform: From a mean to the score, a name in `documents.TRANSFORMS`.
        base: Score of the base. A perplexity is tested as its logarithm, so its difference is
            `base` times the share by which it changes.
    """

    gain: float
    stderr: float
    degrees: float
    transform: str = "mean"
    base: float = 0.0

    def tails(self, x: float) -> tuple[float, float]:
        """Return p of "the true difference is `x` or less", and of "`x` or more"."""
        z = (self._gain_of(x) - self.gain) / self.stderr
        z = z if self.transform == "mean" else -z
        return float(stats.t.cdf(z, self.degrees)), float(stats.t.sf(z, self.degrees))

    def ends(self, level: float) -> tuple[float, float] | None:
        """Return the two-sided interval; None where it has no end that a number can hold."""
        half = float(stats.t.isf(level / 2, self.degrees)) * self.stderr
        ends = sorted(self._score_of(self.gain + side * half) for side in (-1, 1))
        return (ends[0], ends[1]) if np.isfinite(ends).all() else None

    def detectable(self, level: float) -> float | None:
        """Return the difference that a two-sided test at `level` finds with `POWER`."""
        needed = float(stats.t.isf(level / 2, self.degrees))
        size = self.stderr * (
            special.nctdtrinc(self.degrees, 1 - POWER, needed)
            if math.isfinite(self.degrees)
            else needed + stats.norm.ppf(POWER)
        )
        change = max(abs(self._score_of(side * size)) for side in (-1, 1))
        return float(change) if math.isfinite(change) else None

    def _score_of(self, gain: float) -> float:
        """Return the difference of scores that a difference of means makes."""
        if self.transform == "mean":
            return gain
        if self.transform == "bits_per_byte":
            return -gain / math.log(2)
        with np.errstate(over="ignore"):
            return float(self.base * np.expm1(-gain))

    def _gain_of(self, x: float) -> float:
        if self.transform == "mean":
            return x
        if self.transform == "bits_per_byte":
            return -x * math.log(2)
        return -math.log1p(x / self.base) if x > -self.base else math.inf


def paired_t(
    gains: np.ndarray,
    weights: np.ndarray,
    clusters: Sequence[str] | None,
    strata: Sequence[str] | None,
    transform: str,
    base: float,
    alpha: float,
) -> PairedTest:
    """Test a weighted mean of differences, by document or cluster, within strata.

    The mean is a ratio of sums; its variance is that of the linearised ratio. Where all units
    changed alike there is no spread to compare with, and the signs alone are counted.

    Args:
        gains: Weighted differences, shape (n,).
        weights: Shape (n,).
        clusters: See `paired_difference`.
        strata: See `paired_difference`.
        transform: See `Means`.
        base: Score of the base.
        alpha: Level.
    """
    part = np.zeros(len(gains), dtype=int) if strata is None else _numbers(strata)
    unit = "documents"
    if clusters is not None:
        of_cluster, unit = _numbers(clusters), "clusters"
        first = np.zeros(of_cluster.max() + 1, dtype=int)
        first[of_cluster] = part
        if (first[of_cluster] != part).any():
            raise ValueError("A cluster has documents in two strata: give it one.")
        part = first
        gains, weights = (np.bincount(of_cluster, row) for row in (gains, weights))
    units, gain = len(gains), gains.sum() / weights.sum()
    changes = gains / weights
    alike = bool(np.ptp(changes) <= 1e-9 * np.abs(changes).max())
    with np.errstate(over="ignore", invalid="ignore"):
        variance, degrees = _variance(gain, gains, weights, part, alike)
    means = Means(float(gain), math.sqrt(variance), degrees, transform, base)
    difference = means._score_of(means.gain)
    if gain == 0 and alike:
        return PairedTest.of(0.0, (0.5, 0.5), f"none: all {unit} equal", units, alpha)
    if units < LEAST_UNITS:
        why = f"{units} {unit} are too few for a test of their mean"
        return PairedTest.none(difference, why, units, alpha)
    if alike:
        unlikely = 0.5 ** (units + 1)
        sides = (1 - unlikely, unlikely) if difference > 0 else (unlikely, 1 - unlikely)
        why = f"sign test: all {unit} changed alike"
        return PairedTest.of(difference, sides, why, units, alpha)
    if not math.isfinite(variance):
        return PairedTest.none(
            difference, "values too large to be squared", units, alpha
        )
    less, greater = reversed(means.tails(0.0))
    method = f"paired t test over {unit}"
    return PairedTest.of(difference, (less, greater), method, units, alpha, means)


def _variance(
    gain: float, gains: np.ndarray, weights: np.ndarray, part: np.ndarray, alike: bool
) -> tuple[float, int]:
    """Return the variance of the mean, between units within strata, and its degrees of freedom."""
    residuals = (gains - gain * weights) / weights.sum()
    sizes = np.bincount(part)
    # Strata of one unit, which have no spread of their own, are put together.
    single = sizes == 1
    if single.sum() == 1 and len(sizes) > 1:
        single[np.argmax(sizes)] = True
    part = _numbers(np.where(single[part], -1, part))

    def within() -> np.ndarray:
        return residuals - (np.bincount(part, residuals) / np.bincount(part))[part]

    if not alike and np.ptp(within()) <= 1e-12 * np.ptp(residuals):
        # Strata that each move as one say nothing about another draw.
        part = np.zeros_like(part)
    sizes = np.bincount(part)
    factor = (sizes / np.maximum(sizes - 1, 1))[part]
    return float((factor * within() ** 2).sum()), len(gains) - len(sizes)


def _numbers(labels: Sequence[str] | np.ndarray) -> np.ndarray:
    return np.unique(np.asarray(labels), return_inverse=True)[1]


def power_of_means(
    stderr: float, degrees: int, size: float, alpha: float
) -> tuple[float, float, float]:
    """Return the chances that t tests show that two means are the same, or differ.

    Args:
        stderr: Standard error of the difference.
        degrees: Degrees of freedom.
        size: Of the margin, and of the difference that is to be seen, in the unit of `stderr`.
        alpha: Level: of each one-sided test of a margin, and of the two-sided test.

    Returns:
        Chance of equivalent and of not worse, if there is no difference, and of better or
        worse, if there is one of `size`.

    Source: the noncentral t distribution (Phillips 1990, Journal of Pharmacokinetics and
        Biopharmaceutics 18, 137-144), whose two tails are taken for exclusive.
    """
    if stderr == 0:
        return 1.0, 1.0, 1.0
    away = min(size / stderr, 37.0)
    missed = float(stats.nct.cdf(stats.t.isf(alpha, degrees), degrees, away))
    seen = float(stats.nct.sf(stats.t.isf(alpha / 2, degrees), degrees, away))
    return max(0.0, 1 - 2 * missed), 1 - missed, seen
