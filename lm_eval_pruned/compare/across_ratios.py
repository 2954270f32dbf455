"""Over the expansion ratios of a sweep: each task for a trend, and any two tasks together."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.comparison_rows import TaskCorrelation, TaskTrend
from lm_eval_pruned.compare.pairing import is_partial, paired_documents
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.groups import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.pairing import DocumentReader


def across_ratios(
    runs: Sequence[Run], alpha: float, read: DocumentReader
) -> tuple[tuple[TaskCorrelation, ...], tuple[TaskTrend, ...]]:
    """Correlate any two tasks, and test each for a trend, over expansion ratios.

    Args:
        runs: Runs of one or several series.
        alpha: 1 - confidence of the intervals, and level of the tests.
        read: Reader whose documents are used again.

    Returns:
        Correlations and trends; empty for series with fewer than 3 ratios, and without tasks
        of which a score is partial.
    """
    pairs: list[TaskCorrelation] = []
    trends: list[TaskTrend] = []
    for name, members in series_of(runs).items():
        if len({run.expansion_ratio for run in members}) < 3:
            continue
        scores, tested = {}, {}
        for key in primary_metrics(members):
            # How many documents there are depends on what they showed: see `stopping`.
            if not any(is_partial(run, key[0]) for run in members):
                scores[key] = [_linear(run, *key) for run in members]
                tested[key] = _trend(members, *key, scores[key], alpha, read)
        trends += [TaskTrend(name, *key, found, None) for key, found in tested.items()]
        for both in itertools.combinations(scores, 2):
            found = statistics.correlate(*(scores[key] for key in both), alpha=alpha)
            one, other = (tested[key].p for key in both)
            p = None if one is None or other is None else max(one, other)
            pairs.append(TaskCorrelation(name, both, found, p, None))
    ps = [pair.p for pair in pairs] + [each.trend.p for each in trends]
    families = [(pair.series, "pair") for pair in pairs]
    families += [(each.series, "trend") for each in trends]
    qs = [q for q, _ in statistics.false_discovery(ps, families)]
    return (
        tuple(replace(pair, q=q) for pair, q in zip(pairs, qs, strict=False)),
        tuple(replace(e, q=q) for e, q in zip(trends, qs[len(pairs) :], strict=True)),
    )


def _trend(
    members: Sequence[Run],
    task: str,
    metric: str,
    scores: Sequence[float],
    alpha: float,
    read: DocumentReader,
) -> statistics.Trend:
    """Test a score for a trend over the documents that all members were scored on."""
    ratios = [run.expansion_ratio or 0.0 for run in members]
    try:
        pairs = [paired_documents(members[0], r, task, metric, read) for r in members]
    except ResultsError:
        pairs = []
    documents = [pair[1] for pair in pairs if pair]
    if len(documents) < len(members):
        slope = float(np.polyfit(ratios, scores, 1)[0])
        why = "none: needs logged samples of the same documents in all configurations"
        return statistics.Trend(len(members), slope, None, None, None, why, 0)
    first = documents[0]
    return statistics.trend(
        ratios,
        [each.values for each in documents],
        weights=first.weights,
        clusters=first.clusters,
        strata=first.strata,
        transform=first.transform,
        alpha=alpha,
    )


def _linear(run: Run, task: str, metric: str) -> float:
    """Return a score on the scale that is a mean over documents: log perplexity."""
    value = run.scores[task, metric].value
    return math.log(value) if is_perplexity(metric) and value > 0 else value
