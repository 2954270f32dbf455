"""Over the expansion ratios of a sweep: the trend of each task, and any two tasks together."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.pairing import grouping, paired_documents
from lm_eval_pruned.compare.statistics import false_discovery, paired_mean
from lm_eval_pruned.results.documents import TRANSFORMS
from lm_eval_pruned.results.groups import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.results.files import Run


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of two tasks over `n` configurations; None where one of them never changes."""

    n: int
    pearson: float | None = None
    pearson_low: float | None = None
    pearson_high: float | None = None


@dataclass(frozen=True)
class Trend:
    """Whether a score, or the logarithm of a perplexity, changes with the expansion ratio.

    `slope` is the change per 1 of ratio over `n` configurations; for the others see `PairedTest`.
    """

    n: int
    slope: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    method: str = (
        "none: needs logged samples of the same documents in all configurations"
    )
    units: int = 0


@dataclass(frozen=True)
class TaskCorrelation:
    """Two tasks, each as (task, metric), over the configurations of one series."""

    series: str
    tasks: tuple[tuple[str, str], tuple[str, str]]
    correlation: Correlation


@dataclass(frozen=True)
class TaskTrend:
    """One task over the expansion ratios of one series; q is adjusted over all of its tasks."""

    series: str
    task: str
    metric: str
    trend: Trend
    q: float | None = None


def correlate(x: ArrayLike, y: ArrayLike, *, alpha: float = 0.05) -> Correlation:
    """Correlate the scores of two tasks, shape (n,) each, over n >= 3 configurations of a sweep.

    Fisher's interval, ``tanh(atanh(r) +- width)``, takes the configurations for independent draws; its
    width is such that 0 is outside exactly where Student's p of r is below `alpha`.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(n)
    r = float(np.corrcoef(x, y)[0, 1])
    width = np.arcsinh(stats.t.isf(alpha / 2, n - 2) / math.sqrt(n - 2))
    with np.errstate(divide="ignore"):
        ends = np.tanh(np.arctanh(r) + np.array([-width, width]))
    return Correlation(n, r, *ends.tolist())


def trend(
    ratios: ArrayLike,
    values: Sequence[ArrayLike],
    *,
    transform: str = "mean",
    alpha: float = 0.05,
    weights: ArrayLike = 1.0,
    **groups: Any,
) -> Trend:
    """Test whether a score has a trend over the expansion ratios of one model.

    What one size gets wrong by chance is likely wrong in the next, but documents are independent:
    each has a slope over the ratios (least squares), and these are tested like differences.

    `ratios` are of shape (k,), two of them different, the `values` of the documents of shape (k, n);
    for the others see `statistics.paired_difference`.
    """
    rows, centred = np.array(values, dtype=float), np.array(ratios, dtype=float)
    centred -= centred.mean()
    # Less the first row, documents that never change have a slope of exactly 0.
    factor = TRANSFORMS[transform].factor
    slopes = factor * (centred / (centred @ centred)) @ (rows - rows[0])
    weights = np.broadcast_to(np.asarray(weights, dtype=float), slopes.shape)
    test = paired_mean(slopes * weights, weights, alpha=alpha, **groups)
    method = test.method.replace("test over", "test of slopes over")
    return Trend(
        len(rows), test.difference, test.low, test.high, test.p, method, test.units
    )


def over_ratios(
    runs: Sequence[Run], alpha: float
) -> tuple[tuple[TaskCorrelation, ...], tuple[TaskTrend, ...]]:
    """Correlate any two tasks of each series, and test each for a trend, over 3 or more ratios."""
    pairs: list[TaskCorrelation] = []
    trends: list[TaskTrend] = []
    for name, members in series_of(runs).items():
        ratios, scores = [run.expansion_ratio or 0.0 for run in members], {}
        for key in primary_metrics(members) if len({*ratios}) > 2 else ():
            values = np.array([run.scores[key].value for run in members])
            logs = is_perplexity(key[1]) and values.min() > 0
            scores[key] = np.log(values) if logs else values
            same = [paired_documents(members[0], run, *key) for run in members]
            rows = [pair[1].values for pair in same if pair]
            slope = Trend(len(same), float(np.polyfit(ratios, scores[key], 1)[0]))
            if same[0] and len(rows) == len(same):
                slope = trend(ratios, rows, **grouping(same[0][1]), alpha=alpha)
            trends.append(TaskTrend(name, *key, slope))
        for one, other in itertools.combinations(scores, 2):
            r = correlate(scores[one], scores[other], alpha=alpha)
            pairs.append(TaskCorrelation(name, (one, other), r))
    qs = false_discovery([t.trend.p for t in trends], [t.series for t in trends])
    corrected = [replace(t, q=q) for t, (q, _) in zip(trends, qs, strict=True)]
    return tuple(pairs), tuple(corrected)
