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
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.groups import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.compare.pairing import DocumentReader


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of two tasks with its interval; None where one of them never changes.

    `n` counts the configurations.
    """

    n: int
    pearson: float | None = None
    pearson_low: float | None = None
    pearson_high: float | None = None


@dataclass(frozen=True)
class Trend:
    """Whether a score, or the logarithm of a perplexity, changes with the expansion ratio.

    `slope` is the change per 1 of ratio: positive where the score falls as neurons are removed.
    `n` counts the configurations; the other attributes are those of `PairedTest`.
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
    """Correlate two tasks over the configurations of a sweep.

    The interval takes the configurations for independent draws, which the sizes of a sweep
    are not: see `trend`. It is Fisher's, ``tanh(atanh(r) +- width)``; the width is such that 0 is
    outside exactly where Student's p of r is below alpha.

    Args:
        x: Scores of one task, shape (n,), n >= 3, one per configuration.
        y: Scores of the other, shape (n,).
        alpha: 1 - confidence of the interval.
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

    The sizes of a sweep are cut from each other, so that a document which one of them
    gets wrong by chance is likely wrong in the next: a test over sizes takes such a
    walk for a trend. Documents are independent: each has a slope over the ratios (least
    squares), and these slopes are tested like differences.

    Args:
        ratios: Expansion ratios, shape (k,), k >= 2 of them different.
        values: Values of the documents, shape (k, n): row j belongs to ``ratios[j]``.
        weights: See `statistics.paired_difference`, as for all below.
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
    qs = false_discovery(
        [each.trend.p for each in trends], [each.series for each in trends]
    )
    return tuple(pairs), tuple(
        replace(each, q=q) for each, (q, _) in zip(trends, qs, strict=True)
    )


def _trend(
    members: Sequence[Run],
    key: tuple[str, str],
    scores: Sequence[float],
    alpha: float,
    read: DocumentReader,
) -> Trend:
    """Test a score for a trend over the documents that all members were scored on."""
    ratios = [run.expansion_ratio or 0.0 for run in members]
    try:
        pairs = [paired_documents(members[0], run, *key, read) for run in members]
    except ResultsError:
        pairs = [None]
    documents = [pair[1] for pair in pairs if pair is not None]
    if len(documents) == len(members):
        values = [each.values for each in documents]
        return trend(ratios, values, **grouping(documents[0]), alpha=alpha)
    slope = float(np.polyfit(ratios, scores, 1)[0])
    why = "none: needs logged samples of the same documents in all configurations"
    return Trend(len(members), slope, None, None, None, why, 0)
