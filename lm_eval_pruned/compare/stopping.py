"""Comparisons with the unpruned model that end when they are decided, and their rows in tables."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.margins import Claim, Margin
from lm_eval_pruned.compare.pairing import is_partial, paired_documents, paired_test
from lm_eval_pruned.results.documents import read_documents
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare import statistics
    from lm_eval_pruned.compare.comparison_rows import Difference
    from lm_eval_pruned.results.documents import Documents
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.stopping_record import Stopping

#: Chance, over the sizes of a sweep, that any comparison of a task is decided wrongly.
LEVEL = 0.05
#: Fewer documents show nothing where they are not right or wrong: Student's t is off at the
#: levels of early looks if documents are skewed.
LEAST_OF_MEANS = 500


def look(before: Stopping, documents: int, base: Run, run: Run) -> Stopping:
    """Look at a unit once more.

    Args:
        before: The looks so far.
        documents: How many the unit has now.
        base: The unpruned model's results on all documents.
        run: The unit's results on these.

    Returns:
        The looks with this one; a reason says that it was the last.

    Raises:
        ResultsError: Base and run do not belong together.
    """
    task = before.task
    metric = next((m for t, m in primary_metrics([base, run]) if t == task), "")
    now = replace(before, metric=metric, looks=(*before.looks, documents))
    # That a run is partial is known here before its results file says so.
    marked = replace(run, stopping={task: now})
    pair = paired_documents(base, marked, task, metric) if metric else None
    test = paired_test(pair, now.nominal_level) if pair else None
    p = p_margin = None
    if test and (test.method.startswith("McNemar") or documents >= LEAST_OF_MEANS):
        p = test.p
        if now.margin:
            scores = (each.scores[task, metric].value for each in (base, run))
            size = Margin("equivalent", now.margin).size(*scores)
            p_margin = None if size is None else test.p_outside(-size, size)
    now = replace(now, p=(*now.p, p), p_margin=(*now.p_margin, p_margin))
    if test:
        now = replace(now, difference=test.difference, low=test.low, high=test.high)
    if p is not None and p < now.nominal_level:
        return replace(now, reason="difference")
    # Equivalence is claimed wrongly where the difference is as large as the margin, and a
    # difference where there is none: one size can err in one of both only.
    if p_margin is not None and p_margin < now.nominal_level:
        return replace(now, reason="equivalent")
    if not now.is_partial:
        tested = any(each is not None for each in now.p)
        return replace(now, reason="all documents" if tested else "no test")
    return now


def with_scores(stopping: Stopping, run: Run) -> Stopping:
    """Return the record with the intervals of all scores of its task, at the level of its look."""
    found = {
        metric: _score_interval(run, task, metric, stopping.nominal_level)
        for task, metric in run.scores
        if task == stopping.task
    }
    return replace(stopping, scores=found)


def _score_interval(
    run: Run, task: str, metric: str, alpha: float
) -> tuple[float | None, float | None]:
    documents: Documents | None = read_documents(run, task, metric)
    if documents is not None and documents.transform == "mean":
        nothing = replace(documents, values=np.zeros(len(documents.values)))
        test = paired_test((nothing, documents), alpha)
        if test.low is not None:
            return test.low, test.high
    score = run.scores[task, metric]
    if score.stderr is None:
        return None, None
    half = float(stats.norm.isf(alpha / 2)) * score.stderr
    return score.value - half, score.value + half


def stopping_of(base: Run, run: Run, task: str) -> Stopping | None:
    """Return how the comparison of a task was ended, if it was looked at before its end."""
    return run.stopping.get(task) or base.stopping.get(task)


def sequential_test(
    test: statistics.PairedTest, stopping: Stopping, metric: str
) -> statistics.PairedTest:
    """Return a test on the documents that were used, with a p that holds for the looks at them.

    Args:
        test: Made at `Stopping.nominal_level`, so that its interval holds at all looks.
        stopping: The looks.
        metric: Whose test it is. Only of the metric that decided, and against the run that it was
            compared with, is there a p.
    """
    looked_at = metric == stopping.metric and (
        stopping.difference is not None
        and math.isclose(test.difference, stopping.difference, abs_tol=1e-9)
    )
    p = stopping.repeated(stopping.p) if looked_at else None
    method = f"{test.method}, group sequential, {stopping.text} documents"
    return replace(test, p=p, method=method)


def sequential_q(
    rows: Sequence[Difference], stoppings: Sequence[Stopping | None]
) -> list[float | None]:
    """Return p after a correction over the sizes of a sweep (Bonferroni); None for other rows."""
    return [
        min(1.0, stopping.sizes * row.p)
        if stopping is not None and row.primary and row.p is not None
        else None
        for row, stopping in zip(rows, stoppings, strict=True)
    ]


def sequential_claims(
    margin: Margin,
    rows: Sequence[Difference],
    tests: Sequence[statistics.PairedTest],
    stoppings: Sequence[Stopping | None],
) -> list[Claim | None]:
    """Return what is shown of a margin, where it is the one that units could stop by."""
    found: list[Claim | None] = []
    for row, test, stopping in zip(rows, tests, stoppings, strict=True):
        size = margin.size(row.base_score, row.score)
        if (
            stopping is None
            or size is None
            or not row.primary
            or row.p is None
            or margin.claim != "equivalent"
            or stopping.margin != margin.text
        ):
            found.append(None)
            continue
        p = stopping.repeated(stopping.p_margin)
        low, high = test.interval(2 * stopping.nominal_level) or (None, None)
        found.append(Claim(size, low, high, p, min(1.0, stopping.sizes * p)))
    return found


def partial_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return which tasks of a run, or of its base, are not of all documents."""
    notes = []
    for each in (base, run):
        parts = [
            f"{task} ({each.stopping[task].text}, {each.stopping[task].reason})"
            for task in tasks
            if is_partial(each, task)
        ]
        if parts:
            notes.append(
                f"{each.name} stopped when decided: {', '.join(parts)}. Scores and differences are "
                "of these documents; intervals and p hold for stopping. q bounds the chance of any "
                "wrong decision over the sizes of one task, not over all tasks together."
            )
    return notes
