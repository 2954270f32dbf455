"""What a comparison says: differences, trends and correlations, and the words for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lm_eval_pruned.compare import statistics
    from lm_eval_pruned.compare.margins import Claim, Margin


@dataclass(frozen=True)
class Difference:
    """One row of the table: one run against the base, on one task and metric.

    Attributes:
        run: Name of the run.
        task: Task or group.
        metric: Metric with filter, such as ``acc,none``.
        base_score: Score of the base.
        score: Score of the run.
        difference: `score` - `base_score`, in the metric's own unit.
        relative: The same as a share of `base_score`, or None.
        low: Lower end of the interval of the difference, or None. At the level that the
            adjustment leaves where there is a q: 0 is outside exactly where q < alpha.
        high: Upper end.
        p: p of the single test, or None where none was possible.
        q: p adjusted over the runs that are compared on the task (Benjamini-Hochberg), those
            that were pruned at random apart; or None.
        smallest_detectable: See `statistics.PairedTest`, at the level that the
            adjustment leaves; None where there is no q.
        documents: Documents both runs were scored on, or None.
        method: Test that was made, or why none was.
        primary: Whether this is the one metric that stands for its task; the others
            restate the same answers, and stay outside of the adjustment.
        verdict: ``better`` or ``worse``, where q < alpha; ``different``, where the task does
            not say which way is up; ``not shown``, which is not the same as no
            difference; ``not tested``, see `method`; ``not comparable``, where a score is
            no finite number; ``restated``, where the metric is not primary. With a margin
            one of ``equivalent`` (or ``not worse``), ``better``, ``worse``, ``different``,
            ``undecided``, ``not comparable`` and ``restated``.
        claim: What is shown of the margin that was asked for; None without one.
        of: Documents that there are, where the run stopped after fewer: scores, difference,
            interval, p and q are then of `documents` and hold for stopping. None else.
    """

    run: str
    task: str
    metric: str
    base_score: float
    score: float
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    smallest_detectable: float | None
    documents: int | None
    method: str
    primary: bool
    verdict: str
    claim: Claim | None = None
    of: int | None = None


@dataclass(frozen=True)
class TaskCorrelation:
    """Two tasks over the configurations of one series.

    Attributes:
        series: Model, criterion and seed that the configurations share.
        tasks: The two tasks, each as (task, metric).
        correlation: See `statistics.Correlation`; perplexities as logarithms.
        p: p of "at most one of the two has a trend": the larger p of their trends.
        q: `p`, adjusted over all pairs of the series.
    """

    series: str
    tasks: tuple[tuple[str, str], tuple[str, str]]
    correlation: statistics.Correlation
    p: float | None
    q: float | None


@dataclass(frozen=True)
class TaskTrend:
    """One task over the expansion ratios of one series.

    Attributes:
        series: Model, criterion and seed that the configurations share.
        task: The task.
        metric: The metric.
        trend: See `statistics.Trend`.
        q: Its p, adjusted over all tasks of the series.
    """

    series: str
    task: str
    metric: str
    trend: statistics.Trend
    q: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` says.

    Attributes:
        base: Name of the base.
        alpha: Level of the tests; intervals have confidence 1 - alpha.
        rows: The table.
        correlations: Pairs of tasks, where there are at least 3 expansion ratios.
        trends: Tasks, where there are at least 3 expansion ratios.
        notes: What the reader has to know, such as tasks that only one run has.
        margin: Within which differences were asked to lie, if they were.
    """

    base: str
    alpha: float
    rows: tuple[Difference, ...]
    correlations: tuple[TaskCorrelation, ...]
    trends: tuple[TaskTrend, ...]
    notes: tuple[str, ...]
    margin: Margin | None = None
