"""What the judge says of cases whose answer can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.floors import kept_sides
from lm_eval_pruned.compare.judge import CLAIM_LEVEL, decisions, judged
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.compare.statistics import paired_difference
from tests.helpers.cases import case_of


def changes(right, wrong, n=400, **about):
    """Return a case of which some answers became right and some wrong."""
    base = [0] * right + [1] * (n - right)
    run = [1] * right + [0] * wrong + [1] * (n - right - wrong)
    return case_of(base, run, **about)


def decided(*cases, levels=None):
    """Return status and sentence of each case."""
    levels = levels or [CLAIM_LEVEL] * len(cases)
    return [*decisions(judged(cases), levels, [case.family for case in cases])]


def tango(down, n, margin):
    """Return the p of a loss of `margin` or more, where nothing became right: Wilson's."""
    z = (margin - down / n) / math.sqrt(margin * (1 - margin) / n)
    return stats.norm.sf(z)


@pytest.mark.parametrize(
    ("down", "p", "status"), [(10, 0.0414, "pass"), (11, 0.0686, "fail")]
)
def test_a_claim_is_shown_at_a_level_of_5_percent(down, p, status):
    case = changes(0, down, margin="4.25pt")
    assert tango(down, 400, 0.0425) == pytest.approx(p, abs=1e-3)
    (row,) = judged([case])
    assert row.claim.p == pytest.approx(p, abs=1e-3)
    assert decided(case)[0][0] == status


@pytest.mark.parametrize("side", ["right", "wrong"])
def test_of_two_ends_the_larger_p_counts(side):
    """What is close to one end of the margin is far from the other."""
    case = changes(
        **{"right": 0, "wrong": 0, side: 12}, margin="4pt", claim="equivalent"
    )
    test = paired_difference(*(d.values for d in case.pair))
    ends = test.distribution.tail(-0.04, 0), test.distribution.tail(0.04, 1)
    (row,) = judged([case])
    assert row.claim.p == pytest.approx(max(ends)) and max(ends) > 0.1 > min(ends)


@pytest.mark.parametrize(("up", "alone"), [(True, 0), (False, 1)])
def test_not_worse_asks_about_the_side_that_is_worse(up, alone):
    case = changes(0, 12, margin="4pt", up=up)
    test = paired_difference(*(d.values for d in case.pair))
    expected = test.distribution.tail((-0.04, 0.04)[alone], alone)
    assert judged([case])[0].claim.p == pytest.approx(expected)
    assert judged([case])[0].verdict == ("worse" if up else "better")


def test_a_share_is_one_of_the_base_s_score():
    case = changes(0, 200, margin="10%")
    assert [score.value for score in case.scores] == [1.0, 0.5]
    assert case.margin_size == pytest.approx(0.1)
    assert Margin("not_worse", "2%").size(50.0, 40.0) == pytest.approx(1.0)


def test_a_share_above_a_floor_is_tested_as_what_is_kept_of_it():
    rng = np.random.default_rng(0)
    base = rng.normal(5, 4, 100)
    run = 0.97 * base + rng.normal(0, 0.5, 100)
    about = {"metric": "lift,none", "margin": "5%", "floor": 1.0}
    (row,) = judged([case_of(base, run, **about)])
    assert row.claim.p == pytest.approx(kept_sides(base, run, 1.0, 0.95)[1])
    (both,) = judged([case_of(base, run, **about, claim="equivalent")])
    ends = kept_sides(base, run, 1.0, 0.95)[1], kept_sides(base, run, 1.0, 1.05)[0]
    assert both.claim.p == pytest.approx(max(ends))


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_alpha_is_the_level_of_verdicts_and_intervals(alpha):
    case = replace(changes(3, 10), margin=None)
    (row,) = judged([case], alpha)
    p = 2 * stats.binom.cdf(3, 13, 0.5) - stats.binom.pmf(3, 13, 0.5)
    assert row.p == pytest.approx(p) and 0.01 < p < 0.3
    assert row.verdict == ("worse" if alpha == 0.3 else "not shown")
    ends = paired_difference(*(d.values for d in case.pair)).interval(alpha)
    assert (row.low, row.high) == pytest.approx(ends)


def test_tests_of_a_family_are_corrected_together_and_of_several_apart():
    one, other = changes(3, 10), changes(5, 5, task="u")
    together = judged([replace(case, family="all") for case in (one, other)])
    apart = judged([one, other])
    assert together[0].q == pytest.approx(2 * together[0].p)
    assert apart[0].q == pytest.approx(apart[0].p)


@pytest.mark.parametrize("up", [True, False])
def test_what_rises_is_improved_where_more_is_better_and_fails_elsewhere(up):
    case = replace(changes(30, 2, up=up), margin=None)
    (decision,) = decided(case, levels=[0.05])
    assert decision[0] == ("improved" if up else "fail")
    (decision,) = decided(replace(changes(2, 30, up=up), margin=None), levels=[0.05])
    assert decision[0] == ("fail" if up else "improved")


@pytest.mark.parametrize("run", ["rises", "falls"])
def test_the_first_side_is_that_of_a_run_that_scores_less(run):
    """One-sided p by hand, of right-or-wrong documents and of means."""
    up, down = (12, 2) if run == "rises" else (2, 12)
    test = paired_difference(*(d.values for d in changes(up, down).pair))
    less = stats.binom.cdf(up, 14, 0.5) - stats.binom.pmf(up, 14, 0.5) / 2
    assert test.sides[0] == pytest.approx(less)
    base = np.full(40, 0.5)
    soft = base + (0.1 if run == "rises" else -0.1) + np.tile([-0.05, 0.05], 20)
    test = paired_difference(base, soft)
    assert (test.sides[0] < 0.05) == (run == "falls")
    assert (test.sides[1] < 0.05) == (run == "rises")
