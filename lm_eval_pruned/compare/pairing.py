"""The documents that two runs were both scored on, their test, and when it ends once decided."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.statistics import PairedTest, paired_difference
from lm_eval_pruned.compare.verdicts import Claim, Margin
from lm_eval_pruned.results.documents import Documents, read_documents, read_task
from lm_eval_pruned.results.files import ResultsError, Run, Stopping
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Pair = tuple[Documents, Documents]
    Reader = Callable[[Run, str, str], Documents | None]

#: Chance, over the sizes of a sweep, that any comparison of a task is decided wrongly.
LEVEL = 0.05
#: Fewer documents show nothing where they are not right or wrong: the test of their mean was not
#: simulated at the small levels of early looks.
LEAST_OF_MEANS = 500


class DocumentReader:
    """Reads the samples of a (run, task) once: the base meets every run, with every metric."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, str], dict[str, Documents]] = {}

    def __call__(self, run: Run, task: str, metric: str) -> Documents | None:
        if (run.path, task) not in self._read:
            self._read[run.path, task] = read_task(run, task)
        return self._read[run.path, task].get(metric)


def paired_documents(
    base: Run, run: Run, task: str, metric: str, read: Reader = read_documents
) -> Pair | None:
    """Return the documents of two runs in the same order, or None without samples.

    Where one of the runs stopped early, these are the documents that it has.

    Raises:
        ResultsError: The runs saw different documents or task versions.
    """
    for name in base.leaves(task):
        versions = base.versions.get(name), run.versions.get(name)
        if None not in versions and versions[0] != versions[1]:
            raise ResultsError(
                f"{name} has version {versions[0]} in {base.name} and {versions[1]} in {run.name}: "
                "scores of different versions of a task cannot be compared."
            )
    one, other = read(base, task, metric), read(run, task, metric)
    if one is None or other is None:
        return None
    part = base.is_partial(task) or run.is_partial(task)
    swapped = part and len(other.keys) < len(one.keys)
    few, many = (other, one) if swapped else (one, other)
    same = many.in_the_order_of(few, part)
    if same is None:
        before, after = set(one.keys), set(other.keys)
        raise ResultsError(
            f"{task} was evaluated on different documents: {len(before - after)} of {len(before)} "
            f"only in {base.name}, {len(after - before)} of {len(after)} only in {run.name} "
            "(matched by doc_hash); evaluate both with the same --limit and data."
        )
    # Of a part, members of groups weigh by how many documents of them there are.
    same = replace(same, weights=few.weights) if part else same
    if few.transform != same.transform or not np.allclose(few.weights, same.weights):
        return None
    return (same, few) if swapped else (few, same)


def paired_test(pair: Pair, alpha: float = 0.05) -> PairedTest:
    """Test what the second of two runs differs by, on what `paired_documents` returned."""
    base, run = pair
    return paired_difference(base.values, run.values, **grouping(base), alpha=alpha)


def grouping(documents: Documents) -> dict[str, Any]:
    """Return how a score is made of its documents, as `paired_difference` takes it."""
    names = ("weights", "clusters", "strata", "transform")
    return {name: getattr(documents, name) for name in names}


def look(before: Stopping, documents: int, base: Run, run: Run) -> Stopping:
    """Add a look at `run`, a unit's results on so many `documents`; one with a reason is the last.

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
        stopped = [(each.stopping[t], t) for t in tasks if each.is_partial(t)]
        if of := [f"{task} ({how.text}, {how.reason})" for how, task in stopped]:
            notes.append(
                f"{each.name} stopped when decided: {', '.join(of)}. Scores and differences are of these "
                "documents; intervals and p account for stopping. q bounds the chance of any wrong "
                "decision over the sizes of one task, not over all tasks together."
            )
    return notes
