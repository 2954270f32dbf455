"""Stopping when decided: the level of each look, p values, and the record."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.stopping import LEVEL, sequential
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.results.stopping_record import Stopping, spent


def record(*looks, of=800, sizes=1, rule="decided", **more):
    return Stopping(rule, "boolq", of, LEVEL, sizes, "acc,none", looks=looks, **more)


def test_the_looks_share_the_level_and_spend_all_of_it_with_the_last_document():
    looks = (100, 200, 400, 800)
    shares = [record(*looks[: n + 1]).share for n in range(4)]
    assert shares == [1 / 16, 1 / 16, 1 / 8, 3 / 4]
    assert record(800).share == 1
    assert record(100, sizes=5).nominal_level == pytest.approx(LEVEL / 16 / 5)


def test_four_looks_err_no_more_often_than_the_level():
    looks = np.array([409, 818, 1635, 3270])
    rng = np.random.default_rng(0)
    steps = np.sqrt(np.diff(looks, prepend=0))
    sums = (rng.normal(size=(40_000, 4)) * steps).cumsum(axis=1)
    p = 2 * stats.norm.sf(np.abs(sums) / np.sqrt(looks))
    shares = np.diff([spent(n, 3270) for n in looks.tolist()], prepend=0)
    crossed = (p < LEVEL * shares).any(axis=1).mean()
    # Bonferroni's inequality gives a little away, because looks share their documents.
    assert 0.04 < crossed < LEVEL + 3 * (0.05 * 0.95 / 40_000) ** 0.5


def test_differences_and_a_margin_share_one_level():
    """Of six sizes three have no difference, and three one as large as the margin."""
    margin, sizes = Margin("equivalent", "10pt"), 6

    def wrong(seed):
        ps = [*np.random.default_rng(seed).random(sizes)]
        pairs = [(p, 1e-9) for p in ps[:3]] + [(1e-9, p) for p in ps[3:]]
        found = [
            sequential(
                record(
                    *(400,), of=400, sizes=sizes, rule="decided:10pt",
                    p=p, p_margin=p_margin, difference=0.0,
                ),
                *("acc,none", 0.0, margin, 0.1),
            )
            for p, p_margin in pairs
        ]  # fmt: skip
        return any(q < LEVEL for _, q, _ in found[:3]) or any(
            claim.q < LEVEL for _, _, claim in found[3:]
        )

    # Holm for each of both questions would be wrong in 9.7 % of sweeps.
    assert np.mean([wrong(seed) for seed in range(4000)]) < 0.055


def test_another_metric_difference_or_margin_has_no_p():
    stopping = record(100, rule="decided:1pt", p=1e-6, difference=-0.4)
    nothing = (None, None, None)
    margin = Margin("equivalent", "1pt")
    assert sequential(stopping, "acc_norm,none", -0.4, margin, 0.01) == nothing
    assert sequential(stopping, "acc,none", -0.3, margin, 0.01) == nothing
    p, _, claim = sequential(
        stopping, "acc,none", -0.4, Margin("equivalent", "2pt"), 0.02
    )
    assert (p, claim) == (1e-6, None)
