"""One claim on several tasks: the mean of their differences, and a guard for each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm_eval_pruned.compare.judge import guarded, mean_of, p_of_claim
from lm_eval_pruned.compare.statistics import paired_difference
from tests.helpers.cases import case_of, stderr_of


def soft(seed, n, lost=0.0, spread=0.05):
    """Return probabilities of two models on n documents."""
    rng = np.random.default_rng([seed, n])
    base = rng.uniform(0.3, 0.7, n)
    return base, base - lost + rng.uniform(-spread, spread, n)


def tasks(*losses, n=200, **about):
    return [
        case_of(*soft(seed, n, lost, **about), task=f"t{seed}")
        for seed, lost in enumerate(losses)
    ]


def test_every_task_weighs_the_same_however_many_documents_it_has():
    few, many = case_of(*soft(0, 40, 0.06), task="few"), case_of(*soft(1, 400))
    gains = [case.test.difference for case in (few, many)]
    test = mean_of([few, many]).test
    assert test.difference == pytest.approx(np.mean(gains))
    # Strata: their own means are no part of the spread.
    variances = [
        np.diff([d.values for d in case.pair], axis=0).var(ddof=1)
        / len(case.pair[0].values)
        for case in (few, many)
    ]
    stderr = math.sqrt(sum(variances)) / 2
    assert stderr_of(test) == pytest.approx(stderr)


def test_a_document_that_two_tasks_ask_about_counts_once():
    base, run = soft(0, 100)
    twice = mean_of([case_of(base, run), case_of(base, run)])
    assert twice.test.units == 100
    assert mean_of(tasks(0, 0, n=100)).test.units == 200


def test_clusters_stay_together():
    blocks = tuple(str(n // 4) for n in range(200))
    clustered = [
        case_of(
            *soft(seed, 200),
            task=f"t{seed}",
            clusters=tuple(f"{seed} {b}" for b in blocks),
        )
        for seed in range(2)
    ]
    assert mean_of(clustered).test.units == 100


def test_the_guard_is_two_and_a_half_times_the_margin():
    values = soft(0, 100)
    alone = p_of_claim([case_of(*values, margin="5pt")])
    assert p_of_claim([guarded(case_of(*values))]) == pytest.approx(alone)


def test_the_claim_is_shown_where_its_mean_and_each_guard_are():
    assert p_of_claim(tasks(0, 0, 0)) < 0.05
    # Of the mean, 1 point is lost; of one task, 6.
    carried = tasks(0.06, 0, 0, 0, 0, 0)
    mean = mean_of(carried)
    alone = paired_difference(*(d.values for d in carried[0].pair))
    assert mean.test.p_outside(-0.02, math.inf) < 0.05
    assert p_of_claim(carried) == pytest.approx(alone.p_outside(-0.05, math.inf))
    assert p_of_claim(carried) > 0.5
    # Of each task, 3 points are lost: the guards pass, and the mean does not.
    assert p_of_claim(tasks(0.03, 0.03, 0.03)) > 0.5


def test_one_case_is_its_own_claim():
    case = case_of(*soft(0, 200))
    assert p_of_claim([case]) == case.test.p_outside(-0.02, math.inf)


@pytest.mark.parametrize(
    ("losses", "most"), [((0.02,) * 3, 0.05), ((0.06, 0, 0), 0.05)]
)
def test_at_the_margin_and_with_one_task_that_carries_all_the_claim_is_rarely_made(
    losses, most
):
    """Losses of one document in ten, of which few are seen among 60."""
    wrong = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        cases = []
        for number, lost in enumerate(losses):
            base = rng.uniform(0.6, 1, 60)
            rare = np.where(rng.random(60) < 0.1, 10 * lost, 0)
            cases.append(case_of(base, base - rare, task=f"t{number}"))
        wrong += p_of_claim(cases) < 0.05
    # More than 11 of 100 would be seen in 0.4 % of cases at a true 5 %.
    assert wrong <= 11
