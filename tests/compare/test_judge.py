"""What the judge says of cases whose answer can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.claims import p_of, paired
from lm_eval_pruned.compare.judge import claims_on, judged
from tests.helpers.cases import case_of


def changes(right, wrong, n=400, **about):
    """Return a case of which some answers became right and some wrong."""
    base = [0] * right + [1] * (n - right)
    run = [1] * right + [0] * wrong + [1] * (n - right - wrong)
    return case_of(base, run, **about)


@pytest.mark.parametrize(
    ("metric", "lost", "word"),
    [
        ("word_perplexity,none", 0.01, "equivalent"),
        ("word_perplexity,none", 0.03, "worse"),
        ("lift,none", 0.03, "equivalent"),
        ("lift,none", 0.07, "worse"),
    ],
)
def test_losses_on_both_sides_of_a_margin_are_decided(metric, lost, word):
    """Of the same share of every document, which have hardly any spread."""
    rng, noise = np.random.default_rng(0), np.random.default_rng(1).normal(0, 1e-4, 80)
    if metric == "lift,none":
        base, about = rng.normal(5, 4, 80), {"margin": "5%", "floor": 0.0}
        run = base * (1 - lost) + noise
    else:
        base, about = rng.normal(-3, 0.2, 80), {"margin": "2%", "up": False}
        run, about["transform"] = base - np.log(1 + lost) + noise, "perplexity"
    assert claims_on([case_of(base, run, metric=metric, **about)])[0].word == word


@pytest.mark.parametrize("side", ["right", "wrong"])
def test_of_two_ends_the_larger_p_counts(side):
    """What is close to one end of the margin is far from the other."""
    case = changes(
        **{"right": 0, "wrong": 0, side: 12}, margin="4pt", claim="equivalent"
    )
    ends = [case.test.p_margin(0.04, None, end) for end in (1, -1)]
    (row,) = judged([case])
    assert row.claim.p == max(ends) > 0.1 > min(ends)


@pytest.mark.parametrize("up", [True, False])
def test_not_worse_asks_about_the_side_that_is_worse(up):
    case = changes(0, 12, margin="4pt", up=up)
    (row,) = judged([case])
    assert row.claim.p == case.test.p_margin(0.04, None, 1 if up else -1)
    assert row.verdict == ("worse" if up else "better")


def test_a_share_is_one_of_the_base_s_score_and_above_a_floor_of_what_is_kept():
    case = changes(0, 200, margin="10%")
    assert [score.value for score in case.scores] == [1.0, 0.5]
    assert case.margin_size == pytest.approx(0.1)
    rng = np.random.default_rng(0)
    base = rng.normal(5, 4, 100)
    run = 0.97 * base + rng.normal(0, 0.5, 100)
    about, test = {"metric": "lift,none", "margin": "5%"}, paired(base, run, 1.0)
    ends = p_of(test.keeps(0.95, 1)), p_of(test.keeps(1.05, -1))
    for claim, p in (("not_worse", ends[0]), ("equivalent", max(ends))):
        (row,) = judged([case_of(base, run, floor=1.0, claim=claim, **about)])
        assert row.claim.p == pytest.approx(p)


@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_alpha_is_the_level_of_verdicts_and_intervals(alpha):
    case = replace(changes(3, 10), margin=None)
    (row,) = judged([case], alpha)
    assert row.p == pytest.approx(stats.binomtest(3, 13).pvalue)
    assert row.verdict == ("worse" if alpha == 0.3 else "not shown")
    assert (row.low, row.high) == case.test.interval(alpha)
