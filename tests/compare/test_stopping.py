"""Stopping when decided: the design, its error, its p values, and what compare makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.comparison_rows import Difference
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.compare.statistics import (
    PairedTest,
    family_wise,
    looks,
    nominal_levels,
    repeated_p,
)
from lm_eval_pruned.compare.stopped_rows import sequential_claims, sequential_q
from lm_eval_pruned.compare.stopping import StopRule
from lm_eval_pruned.results.stopping_record import Stopping


def test_looks_rise_to_all_documents():
    for documents in (1, 25, 26, 31, 100, 14042):
        found = looks(documents)
        assert found[-1] == documents
        assert list(found) == sorted(set(found))
    assert looks(10) == (10,)


def test_levels_of_two_looks_are_those_of_the_bivariate_normal_distribution():
    ends = [stats.norm.isf(level / 2) for level in nominal_levels((0.3, 1.0), 0.05)]
    together = stats.multivariate_normal([0, 0], [[1, 0.3**0.5], [0.3**0.5, 1]])
    inside = together.cdf(ends, lower_limit=[-end for end in ends])
    assert 1 - inside == pytest.approx(0.05, abs=2e-5)
    assert 2 * stats.norm.sf(ends[0]) == pytest.approx(0.015)


def test_many_looks_spend_the_level_and_no_more():
    fractions = tuple(n / 3270 for n in looks(3270))
    levels = np.array(nominal_levels(fractions, 0.05))
    rng = np.random.default_rng(0)
    steps = np.sqrt(np.diff((0.0, *fractions)))
    sums = (rng.normal(size=(40_000, len(steps))) * steps).cumsum(axis=1)
    p = 2 * stats.norm.sf(np.abs(sums) / np.sqrt(fractions))
    crossed = (p < levels).any(axis=1).mean()
    assert crossed == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 40_000) ** 0.5)


def test_repeated_p_is_the_level_at_which_the_design_just_stops():
    fractions = (0.1, 0.4, 1.0)
    for look in range(3):
        for alpha in (0.5, 0.05, 0.001, 1e-6):
            p = [1.0] * (look + 1)
            p[look] = nominal_levels(fractions, alpha)[look]
            found = repeated_p(tuple(p), fractions[: look + 1])
            assert found == pytest.approx(alpha, rel=5e-3)
    assert repeated_p((None, 1.0), (0.5, 1.0)) == 1.0
    assert repeated_p((0.0,), (0.5,)) <= 1e-11


def test_later_looks_only_add_evidence():
    fractions = tuple(n / 500 for n in looks(500))
    before = repeated_p((0.001,), fractions[:1])
    assert repeated_p((0.001, 0.9, 0.9), fractions[:3]) == pytest.approx(
        before, rel=2e-3
    )


def test_differences_and_a_margin_share_one_level(monkeypatch):
    """Of six sizes three have no difference, and three one as large as the margin."""
    # There is one look, whose repeated p is p; searching for that takes long.
    monkeypatch.setattr(statistics, "repeated_p", lambda p, fractions: p[0])
    margin, n, sizes = Margin("equivalent", "10pt"), 400, 6

    def wrong(seed: int, rule: str) -> bool:
        rng = np.random.default_rng(seed)
        p = np.where(np.arange(sizes) < 3, rng.random(sizes), 1e-9)
        p_margin = np.where(np.arange(sizes) < 3, 1e-9, rng.random(sizes))
        stoppings = [
            Stopping(
                rule, "boolq", "acc,none", n, n, "all documents", 0.05, sizes, (n,),
                (p[k],), (p_margin[k],), 0.05 / sizes, 0.0, 0.0, 0.0, {},
            )
            for k in range(sizes)
        ]  # fmt: skip
        rows = [
            Difference(
                str(k), "boolq", "acc,none", 0.5, 0.5, 0.0, 0.0, None, None, p[k],
                None, None, n, "", primary=True, verdict="",
            )
            for k in range(sizes)
        ]  # fmt: skip
        tests = [PairedTest(0.0, None, None, each, "", n) for each in p]
        different = [q < 0.05 for q in sequential_q(rows, stoppings)[:3]]
        claims = sequential_claims(margin, rows, tests, stoppings)[3:]
        return any(different) or any(claim.q < 0.05 for claim in claims)

    # Holm for each of both questions would be wrong in 9.7 % of sweeps.
    assert np.mean([wrong(seed, "decided:10pt") for seed in range(4000)]) < 0.055


def test_family_wise_is_holm_over_all_tests():
    assert family_wise([0.04, 0.01, 0.03], 3) == pytest.approx([0.06, 0.03, 0.06])
    # Two sizes that are not evaluated yet count, too.
    assert family_wise([0.01], 3) == pytest.approx([0.03])
    assert family_wise([None, 0.5], 2) == [None, 1.0]


@pytest.mark.parametrize(
    "text", ["", "decide", "decided:", "decided:one", "decided:0pt"]
)
def test_other_rules_are_refused(text):
    with pytest.raises(ValueError, match=r"pass decided|give percentage points"):
        StopRule(text)
