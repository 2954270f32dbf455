"""How likely a comparison reaches a verdict, against the tests themselves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.gaffke import POWER
from lm_eval_pruned.compare.power import (
    chances,
    documents_for,
    power_of_means,
    power_of_shares,
)
from lm_eval_pruned.compare.statistics import paired_difference


@pytest.mark.parametrize(("changed", "margin"), [(0.1, 0.2), (0.3, 0.25)])
def test_power_of_shares_is_that_of_the_test_counted_out(changed, margin):
    n, shown = 24, np.zeros(3)
    for count in range(n + 1):
        for ups in range(count + 1):
            chance = stats.binom.pmf(count, n, changed)
            chance *= stats.binom.pmf(ups, count, 0.5)
            run = [1] * ups + [0] * (count - ups) + [0] * (n - count)
            base = [0] * ups + [1] * (count - ups) + [0] * (n - count)
            test = paired_difference(base, run)
            ps = test.p_outside(-margin, margin), test.p_outside(-margin, np.inf), 1
            shown += chance * (np.array(ps) < 0.05)
    found = power_of_shares(changed, n, margin, 0.05)
    assert found[:2] == pytest.approx(shown[:2], abs=1e-5)


def test_power_of_means_is_that_of_the_test_simulated():
    n, margin, times, rng = 120, 0.06, 600, np.random.default_rng(0)
    base, shown = np.full(n, 0.5), np.zeros(3)
    for _ in range(times):
        run = base + rng.uniform(-0.3, 0.3, size=n)
        test = paired_difference(base, run)
        shown[0] += test.p_outside(-margin, margin) < 0.05
        shown[1] += test.p_outside(-margin, np.inf) < 0.05
        shown[2] += paired_difference(base, run + margin).p < 0.05
    noise = np.linspace(-0.3, 0.3, 1200)
    pilot = paired_difference(np.full(1200, 0.5), 0.5 + noise).distribution
    found = power_of_means(pilot._replace(times=n / 1200), margin, 0.05)
    assert found == pytest.approx(shown / times, abs=4 * (0.25 / times) ** 0.5)


@pytest.mark.parametrize("transform", ["mean", "perplexity"])
def test_chances_on_other_numbers_of_documents_are_those_of_the_same_gains(transform):
    """Four times the documents have the chances of documents that are there four times."""
    base, gains = np.random.default_rng(0).normal([[-2], [0]], [[0.2], [1]], (2, 80))
    few, many = (
        paired_difference(
            np.tile(base, n), np.tile(base + gains, n), transform=transform
        )
        for n in (1, 4)
    )
    unit = 1.0 if transform == "mean" else np.exp(-base.mean())
    for share in (0.1, 0.2, 0.4):
        found = chances(few, 80, share * unit, 0.05, 320)
        # The spread of 80 documents is estimated with one degree of freedom less.
        expected = chances(many, 320, share * unit, 0.05, 320)
        assert found == pytest.approx(expected, abs=0.01)
    assert chances(few, 80, 0.2 * unit, 0.05, 40) < chances(
        few, 80, 0.2 * unit, 0.05, 80
    )


def test_documents_for_is_where_the_chance_reaches_80_percent():
    # Many changes are as good as normal.
    counted, normal = (power_of_shares(0.1, n, 0.02, 0.05) for n in (1999, 2001))
    assert counted == pytest.approx(normal, abs=0.01)

    def power(n):
        return power_of_shares(0.1, n, 0.05, 0.05)

    needed = documents_for(power, 0, 10)
    assert power(needed)[0] >= POWER > power(int(needed * 0.85))[0]
    assert documents_for(lambda n: [0.5], 0, 10) is None
