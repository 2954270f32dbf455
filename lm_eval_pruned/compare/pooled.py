"""Several tasks and one claim: the mean over tasks of their differences, with a wider margin for each."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare.judge import Case, p_outside
from lm_eval_pruned.compare.margins import PROBABILITIES
from lm_eval_pruned.compare.pairing import paired_test
from lm_eval_pruned.results.documents import Documents, scored_on
from lm_eval_pruned.results.groups import is_bias, is_share


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: A single task may lose so many times the margin of their mean.
GUARD = 2.5


def pools_of(cases: Iterable[Case]) -> list[list[Case]]:
    """Return the cases that are claimed together: of one measure, with one margin in points."""
    pools: dict[object, list[Case]] = {}
    for case in cases:
        if pool := pool_of(case):
            pools.setdefault(pool, []).append(case)
    return [pool for pool in pools.values() if len(pool) > 1]


def pool_of(case: Case) -> tuple[str, float] | None:
    """Return the measure and the margin of a score, or None if it cannot be pooled with others.

    Only a mean between 0 and 1 can be, if more of it is better and its margin is in points.
    """
    before, after = case.scores
    size, metric = case.margin_size, case.key[1]
    if (
        not (size and case.pair and case.pair[0].transform == "mean")
        or (case.margin and case.margin.share)
        or not before.higher_is_better
        or is_bias(metric)
        or not is_share(metric, (before.value, after.value))
    ):
        return None
    name = metric.partition(",")[0]
    return PROBABILITIES[0] if name in PROBABILITIES else name, size


def claim_text(pool: Sequence[Case]) -> str:
    """Return what is claimed of several tasks together, in a sentence without its end."""
    size, name = 100 * (pool[0].margin_size or 0.0), pool[0].key[1].partition(",")[0]
    what = "The probability of the right answer" if name in PROBABILITIES else name
    return (
        f"{what} falls by less than {size:g} points on average over these {len(pool)} tasks, and by "
        f"less than {GUARD * size:g} in each"
    )


def mean_of(cases: Sequence[Case]) -> Case:
    """Return the mean over tasks as a case; every score is a mean between 0 and 1, and higher is better.

    Each task weighs the same, however many documents it has, and is a stratum: another draw would hold
    the same tasks. A document that several tasks ask about is one unit.

    Source: Miller 2024, arXiv 2411.00640 (differences by document, means over strata); LLM-Accuracy-Stats,
    arXiv 2602.10144 (one test over tasks).
    """
    key = f"mean of {len(cases)} tasks", cases[0].key[1]
    pairs = [case.pair for case in cases if case.pair]
    before, after = (_joined(documents) for documents in zip(*pairs, strict=True))
    return cases[0]._replace(
        base=scored_on(cases[0].base, key, before),
        run=scored_on(cases[0].run, key, after),
        key=key,
        pair=(before, after),
        family=key,
    )


def guarded(case: Case) -> Case:
    """Return a case of a pool with the wider margin that its task is held to by itself."""
    points = 100 * GUARD * (case.margin_size or 0.0)
    margin = case.margin and replace(case.margin, text=f"{points:.6g}pt")
    return case._replace(margin=margin)


def p_of_claim(cases: Sequence[Case]) -> float | None:
    """Return the p of "the claim is wrong": that of one task, or of a mean over several with its guards.

    The largest p counts: a claim that has several parts is shown where each of them is, at the same
    level. None where a part cannot be tested.

    Source: Berger and Hsu 1996, Statistical Science 11, 283-319.
    """
    parts = [mean_of(cases), *map(guarded, cases)] if cases[1:] else cases
    ps = [case.pair and p_outside(case, paired_test(case.pair)) for case in parts]
    known = [p for p in ps if p is not None]
    return max(known) if len(known) == len(parts) else None


def _joined(tasks: Sequence[Documents]) -> Documents:
    count, total = len(tasks), sum(len(task.values) for task in tasks)
    weights = [task.weights * total / count / task.weights.sum() for task in tasks]
    keys = (
        (f"{number}\0{name}", digest, repetition)
        for number, task in enumerate(tasks)
        for name, digest, repetition in task.keys
    )
    clusters = (
        task.clusters
        or [f"{digest} {repetition}" for _, digest, repetition in task.keys]
        for task in tasks
    )
    return Documents(
        tuple(keys),
        np.concatenate([task.values for task in tasks]),
        np.concatenate(weights),
        tuple(itertools.chain(*clusters)),
        "mean",
    )
