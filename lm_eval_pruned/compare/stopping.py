"""Comparisons with the unpruned model that end when they are decided: one look, and what it shows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

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

    By Bonferroni's inequality, the chance that any size is decided wrongly at any look is `LEVEL`
    at most, however looks and sizes depend on each other. One size can err in one way only:
    equivalence where the difference is as large as the margin, a difference where there is none.

    Source: Jennison and Turnbull 2000, Group Sequential Methods, chapter 9.
    """
    task = before.task
    metric = dict(primary_metrics([base, run])).get(task, "")
    now = replace(before, metric=metric, looks=(*before.looks, documents))
    # That a run is partial is known here before its results file says so.
    marked = replace(run, stopping={task: now})
    pair = paired_documents(base, marked, task, metric) if metric else None
    if pair is not None:
        test = paired_test(pair)
        now = replace(now, difference=test.difference)
        if test.method.startswith("McNemar") or documents >= LEAST_OF_MEANS:
            scores = (each.scores[task, metric].value for each in (base, run))
            margin = now.margin and Margin("equivalent", now.margin).size(*scores)
            ps = test.p, test.p_outside(-margin, margin) if margin else None
            p, p_margin = (1.0 if each is None else each / now.share for each in ps)
            now = replace(now, p=min(now.p, p), p_margin=min(now.p_margin, p_margin))
    reason = "" if now.is_partial else "all documents"
    for shown, p in (("equivalent", now.p_margin), ("difference", now.p)):
        reason = shown if p < now.level / now.sizes else reason
    return replace(now, reason=reason)


def with_scores(stopping: Stopping, run: Run) -> Stopping:
    """Return the record with the intervals of scores that are means, at the level of its look."""
    found = {}
    for task, metric in run.scores:
        known = task == stopping.task and read_documents(run, task, metric)
        if known and known.transform == "mean":
            nothing = replace(known, values=np.zeros(len(known.values)))
            test = paired_test((nothing, known), stopping.nominal_level)
            found[metric] = test.low, test.high
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
    p, p_margin = stopping.p, stopping.p_margin
    q, q_margin = (min(1.0, stopping.sizes * each) for each in (p, p_margin))
    looked_at = stopping.margin and margin == Margin("equivalent", stopping.margin)
    return p, q, Claim(size, p_margin, q_margin) if size and looked_at else None


def partial_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return which tasks of a run, or of its base, are not of all documents."""
    notes = []
    for each in (base, run):
        stopped = {
            task: each.stopping[task] for task in tasks if is_partial(each, task)
        }
        if stopped:
            of = [f"{task} ({v.text}, {v.reason})" for task, v in stopped.items()]
            notes.append(
                f"{each.name} stopped when decided: {', '.join(of)}. Scores and differences are of these "
                "documents; intervals and p hold for stopping. q bounds the chance of any wrong decision "
                "over the sizes of one task, not over all tasks together."
            )
    return notes
