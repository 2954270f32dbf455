"""Comparisons with the unpruned model that end when they are decided: one look, and what it shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.pairing import is_partial, paired_documents, paired_test
from lm_eval_pruned.compare.verdicts import Claim, Margin
from lm_eval_pruned.results.documents import read_documents
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.stopping_record import Stopping

#: Chance, over the sizes of a sweep, that any comparison of a task is decided wrongly.
LEVEL = 0.05
#: Fewer documents show nothing where they are not right or wrong: Student's t is off at the
#: levels of early looks if documents are skewed.
LEAST_OF_MEANS = 500


def look(before: Stopping, documents: int, base: Run, run: Run) -> Stopping:
    """Add a look at `run`, a unit's results on so many `documents`, which is the last if it has a reason.

    ResultsError if base and run do not belong together.
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
    # Equivalence is claimed wrongly where the difference is as large as the margin, and a
    # difference where there is none: one size can err in one of both only.
    for reason, each in (("difference", p), ("equivalent", p_margin)):
        if each is not None and each < now.nominal_level:
            return replace(now, reason=reason)
    if now.is_partial:
        return now
    tested = any(each is not None for each in now.p)
    return replace(now, reason="all documents" if tested else "no test")


def with_scores(stopping: Stopping, run: Run) -> Stopping:
    """Return the record with the intervals of all scores of its task, at the level of its look."""
    found = {}
    for (task, metric), score in run.scores.items():
        if task != stopping.task:
            continue
        documents = read_documents(run, task, metric)
        ends: tuple[float | None, ...] = (None, None)
        if documents is not None and documents.transform == "mean":
            nothing = replace(documents, values=np.zeros(len(documents.values)))
            test = paired_test((nothing, documents), stopping.nominal_level)
            ends = test.low, test.high
        if None in ends and score.stderr is not None:
            half = float(stats.norm.isf(stopping.nominal_level / 2)) * score.stderr
            ends = score.value - half, score.value + half
        found[metric] = ends
    return replace(stopping, scores=found)


def stopping_of(base: Run, run: Run, task: str) -> Stopping | None:
    """Return how the comparison of a task was ended, if it was looked at before its end."""
    return run.stopping.get(task) or base.stopping.get(task)


def sequential(
    stopping: Stopping,
    metric: str,
    difference: float,
    margin: Margin | None,
    size: float | None,
) -> tuple[float | None, float | None, Claim | None]:
    """Return p, q and the claim of a margin of `size`, which hold at all looks.

    There is none for a difference or a margin that the unit could not stop by. q is corrected over
    the sizes of a sweep (Bonferroni).
    """
    decided = math.nan if stopping.difference is None else stopping.difference
    if metric != stopping.metric or not math.isclose(difference, decided, abs_tol=1e-9):
        return None, None, None
    (p, q), (p_margin, q_margin) = (
        (each, min(1.0, stopping.sizes * each))
        for each in map(stopping.repeated, (stopping.p, stopping.p_margin))
    )
    same = margin == Margin("equivalent", stopping.margin) if stopping.margin else False
    return p, q, Claim(size, p_margin, q_margin) if size and same else None


def partial_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return which tasks of a run, or of its base, are not of all documents."""
    parts = {
        each.name: [
            f"{task} ({each.stopping[task].text}, {each.stopping[task].reason})"
            for task in tasks
            if is_partial(each, task)
        ]
        for each in (base, run)
    }
    return [
        f"{name} stopped when decided: {', '.join(of)}. Scores and differences are of these documents; "
        "intervals and p hold for stopping. q bounds the chance of any wrong decision over the sizes of "
        "one task, not over all tasks together."
        for name, of in parts.items()
        if of
    ]
