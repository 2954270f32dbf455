"""Over the expansion ratios of a sweep: the trend of each task, and any two tasks together."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.pairing import grouping, is_partial, paired_documents
from lm_eval_pruned.compare.statistics import SCALES, false_discovery, paired_t
from lm_eval_pruned.results.groups import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.compare.pairing import DocumentReader
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
    low: float | None
    high: float | None
    p: float | None
    method: str
    units: int


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
    q: float | None


def correlate(x: ArrayLike, y: ArrayLike, *, alpha: float = 0.05) -> Correlation:
    """Correlate the scores of two tasks, shape (n,) each, over n >= 3 configurations of a sweep.

    The interval of confidence 1 - `alpha` takes the configurations for independent draws. It is
    Fisher's, ``tanh(atanh(r) +- width)``; the width is such that 0 is outside exactly where
    Student's p of r is below `alpha`.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(n)
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    width = math.asinh(float(stats.t.isf(alpha / 2, n - 2)) / math.sqrt(n - 2))
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    return Correlation(n, r, math.tanh(z - width), math.tanh(z + width))


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

    Sizes are cut from each other, so that what one gets wrong by chance is likely wrong in the
    next. Documents are independent: each has a slope over the ratios (least squares), and these
    slopes are tested like differences.

    Args:
        ratios: Expansion ratios, shape (k,), k >= 2 of them different.
        values: Values of the documents, shape (k, n): row j belongs to ``ratios[j]``.
        weights: As all below in `statistics.paired_difference`.
        clusters: Length n.
        strata: Length n.
        transform: A perplexity is taken as its logarithm.
        alpha: Level of the test.
    """
    rows = np.array(values, dtype=float)
    centred = np.asarray(ratios, dtype=float)
    centred = centred - centred.mean()
    # Less the first row, documents that never change have a slope of exactly 0.
    slopes = SCALES[transform] * (centred / (centred @ centred)) @ (rows - rows[0])
    weights = np.ones(len(slopes)) if weights is None else np.asarray(weights, float)
    test = paired_t(slopes * weights, weights, clusters, strata, alpha)
    method = test.method.replace("paired t test", "t test of slopes")
    slope = test.difference
    return Trend(len(rows), slope, test.low, test.high, test.p, method, test.units)


def over_ratios(
    runs: Sequence[Run], alpha: float, read: DocumentReader
) -> tuple[tuple[TaskCorrelation, ...], tuple[TaskTrend, ...]]:
    """Correlate any two tasks of each series, and test each for a trend, over expansion ratios.

    Series with fewer than 3 ratios are left out, and so are tasks of which a score is partial: how
    many documents there are depends on what they showed.
    """
    pairs: list[TaskCorrelation] = []
    trends: list[TaskTrend] = []
    for name, members in series_of(runs).items():
        if len({run.expansion_ratio for run in members}) < 3:
            continue
        scores = {}
        for key in primary_metrics(members):
            if not any(is_partial(run, key[0]) for run in members):
                values = [run.scores[key].value for run in members]
                logs = is_perplexity(key[1]) and min(values) > 0
                scores[key] = np.log(values).tolist() if logs else values
                found = _trend(members, key, scores[key], alpha, read)
                trends.append(TaskTrend(name, *key, found, None))
        for both in itertools.combinations(scores, 2):
            correlation = correlate(*(scores[key] for key in both), alpha=alpha)
            pairs.append(TaskCorrelation(name, both, correlation))
    ps, series = [each.trend.p for each in trends], [each.series for each in trends]
    adjusted = zip(trends, false_discovery(ps, series), strict=True)
    return tuple(pairs), tuple(replace(each, q=q) for each, (q, _) in adjusted)


def _trend(
    members: Sequence[Run],
    key: tuple[str, str],
    scores: Sequence[float],
    alpha: float,
    read: DocumentReader,
) -> Trend:
    ratios = [run.expansion_ratio or 0.0 for run in members]
    pairs = [paired_documents(members[0], run, *key, read) for run in members]
    documents = [pair[1] for pair in pairs if pair is not None]
    if len(documents) == len(members):
        values = [each.values for each in documents]
        return trend(ratios, values, **grouping(documents[0]), alpha=alpha)
    slope = float(np.polyfit(ratios, scores, 1)[0])
    why = "none: needs logged samples of the same documents in all configurations"
    return Trend(len(members), slope, None, None, None, why, 0)
