"""Over the expansion ratios of a sweep: each task for a trend, and any two tasks together."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.comparison_rows import TaskCorrelation, TaskTrend
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    is_partial,
    paired_documents,
)
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.series import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.documents import Documents


def across_ratios(
    runs: Sequence[Run], *, alpha: float = 0.05, read: DocumentReader | None = None
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
    correlations: list[TaskCorrelation] = []
    trends: list[TaskTrend] = []
    read = read or DocumentReader()
    for name, members in series_of(runs).items():
        ratios = [run.expansion_ratio or 0.0 for run in members]
        if len(set(ratios)) < 3:
            continue
        scores = {
            key: [_linear(run, *key) for run in members]
            for key in primary_metrics(members)
            # How many documents there are depends on what they showed: see `stopping`.
            if not any(is_partial(run, key[0]) for run in members)
        }
        tested = {key: _trend(members, *key, alpha, read) for key in scores}
        pairs = [
            TaskCorrelation(
                name,
                (one, other),
                statistics.correlate(scores[one], scores[other], alpha=alpha),
                _larger(tested[one].p, tested[other].p),
                None,
            )
            for one, other in itertools.combinations(scores, 2)
        ]
        adjusted = statistics.false_discovery_rate([pair.p for pair in pairs])
        correlations += [
            replace(pair, q=q) for pair, q in zip(pairs, adjusted, strict=True)
        ]
        adjusted = statistics.false_discovery_rate([each.p for each in tested.values()])
        trends += [
            TaskTrend(name, *key, each, q)
            for (key, each), q in zip(tested.items(), adjusted, strict=True)
        ]
    return tuple(correlations), tuple(trends)


def _trend(
    members: Sequence[Run], task: str, metric: str, alpha: float, read: DocumentReader
) -> statistics.Trend:
    """Test a score for a trend over the documents that all members were scored on."""
    ratios = [run.expansion_ratio or 0.0 for run in members]
    pairs: list[tuple[Documents, Documents] | None]
    try:
        pairs = [
            paired_documents(members[0], run, task, metric, read) for run in members
        ]
    except ResultsError:
        pairs = [None]
    first = pairs[0]
    if first is None or None in pairs:
        scores = [_linear(run, task, metric) for run in members]
        slope = float(np.polyfit(ratios, scores, 1)[0])
        why = "none: needs logged samples of the same documents in all configurations"
        return statistics.Trend(len(members), slope, None, None, None, why, 0)
    return statistics.trend(
        ratios,
        [pair[1].values for pair in pairs if pair],
        weights=first[0].weights,
        clusters=first[0].clusters,
        strata=first[0].strata,
        transform=first[0].transform,
        alpha=alpha,
    )


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _linear(run: Run, task: str, metric: str) -> float:
    """Return a score on the scale that is a mean over documents: log perplexity."""
    value = run.scores[task, metric].value
    return math.log(value) if is_perplexity(metric) and value > 0 else value
