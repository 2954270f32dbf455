"""Rows of a comparison whose units ended when they were decided: tests that hold for that."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.margins import Claim, Margin
from lm_eval_pruned.compare.pairing import is_partial


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison_rows import Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.stopping_record import Stopping


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
    p = statistics.repeated_p(stopping.p, stopping.fractions) if looked_at else None
    method = f"{test.method}, group sequential, {stopping.text} documents"
    return replace(test, p=p, method=method)


def sequential_q(
    rows: Sequence[Difference], stoppings: Sequence[Stopping | None]
) -> list[float | None]:
    """Return p after a correction over the sizes of a sweep, for each task, or None for other rows."""
    ps = [
        row.p if stopping is not None and row.primary else None
        for row, stopping in zip(rows, stoppings, strict=True)
    ]
    return _by_task(rows, stoppings, ps)


def sequential_claims(
    margin: Margin,
    rows: Sequence[Difference],
    tests: Sequence[statistics.PairedTest],
    stoppings: Sequence[Stopping | None],
) -> list[Claim | None]:
    """Return what is shown of a margin, where it is the one that units could stop by."""
    ps: list[float | None] = []
    for row, stopping in zip(rows, stoppings, strict=True):
        asked = (
            stopping is not None
            and row.primary
            and margin.claim == "equivalent"
            and stopping.margin == margin.text
            and row.p is not None
        )
        ps.append(_margin_p(stopping) if asked and stopping else None)
    found: list[Claim | None] = []
    for row, test, stopping, p, q in zip(
        rows, tests, stoppings, ps, _by_task(rows, stoppings, ps), strict=True
    ):
        size = margin.size(row.base_score, row.score)
        if stopping is None or p is None or q is None or size is None:
            found.append(None)
            continue
        share = min(1.0, 2 * stopping.level / stopping.sizes)
        level = statistics.nominal_levels(stopping.fractions, share)[-1]
        low, high = test.interval(level) or (None, None)
        found.append(Claim(size, low, high, p, q))
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


def _margin_p(stopping: Stopping) -> float | None:
    """Return the repeated p of the two one-sided tests, each of which may spend the level."""
    if not stopping.p_margin:
        return None
    doubled = tuple(None if p is None else min(1.0, 2 * p) for p in stopping.p_margin)
    return min(1.0, statistics.repeated_p(doubled, stopping.fractions) / 2)


def _by_task(
    rows: Sequence[Difference],
    stoppings: Sequence[Stopping | None],
    ps: Sequence[float | None],
) -> list[float | None]:
    """Adjust p over the sizes of each task: after Holm, or Bonferroni where there is a margin.

    A size can be wrongly called different or wrongly equivalent, but not both, because the true
    difference is not 0 and the margin at once. So each size may spend its share of the level on
    both questions, if no size hands its share on as Holm's method does.
    """
    adjusted: list[float | None] = [None] * len(rows)
    for task in dict.fromkeys(row.task for row in rows):
        places = [
            place
            for place, row in enumerate(rows)
            if row.task == task and ps[place] is not None
        ]
        sizes = [each.sizes for place in places if (each := stoppings[place])]
        if sizes:
            family = [ps[place] for place in places]
            tests = max(sizes)
            if any(each.margin for place in places if (each := stoppings[place])):
                qs = [None if p is None else min(1.0, tests * p) for p in family]
            else:
                qs = statistics.family_wise(family, tests)
            for place, q in zip(places, qs, strict=True):
                adjusted[place] = q
    return adjusted
