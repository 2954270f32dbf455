"""Weighted means of two runs over documents or clusters, and how surely they are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Moments:
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


def moments_of(
    sums: np.ndarray, clusters: Sequence[str] | None, strata: Sequence[str] | None
) -> Moments:
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
    return Moments(
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
