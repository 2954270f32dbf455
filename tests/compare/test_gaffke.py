"""The chance that a sum of randomly weighted terms is 0 or less, against other ways to compute it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from lm_eval_pruned.compare import gaffke
from lm_eval_pruned.compare.gaffke import below_zero


counts = st.integers(0, 60)
seeds = st.integers(0, 2**32 - 1)


def right_or_wrong(up: int, down: int, same: int, margin: float) -> np.ndarray:
    """Return the terms of documents that became right or wrong, and of an unseen one that loses."""
    changes = np.repeat([1.0, -1.0, 0.0], [up, down + 1, same])
    return changes + margin


def skewed(seed: int, most: int = 5_000) -> np.ndarray:
    """Return 10 to `most` skewed terms, some of them with one that is very large."""
    rng = np.random.default_rng(seed)
    n = int(10 ** rng.uniform(1, math.log10(most)))
    terms = rng.choice([-1, 1]) * (rng.lognormal(0, rng.uniform(0.2, 2), n))
    terms += rng.normal(0, 1, n) - terms.mean()
    large = rng.choice([0, 1, -1]) * np.abs(terms).sum() * rng.uniform(0.01, 0.5)
    return np.append(terms, large) + rng.normal(0, 1) * terms.std() / math.sqrt(n)


@given(up=counts, down=counts, same=counts)
def test_without_a_margin_it_is_the_binomial_tail_over_those_that_changed(
    up, down, same
):
    expected = stats.binom.sf(up - 1, up + down, 0.5)
    p = below_zero(right_or_wrong(up, down, same, 0))
    assert p == pytest.approx(expected, rel=1e-12)


@given(down=counts, same=counts, margin=st.floats(1e-4, 0.999))
def test_for_losses_alone_it_is_clopper_and_pearsons_at_any_margin(down, same, margin):
    expected = stats.binom.cdf(down, down + same, margin)
    p = below_zero(right_or_wrong(0, down, same, margin))
    assert p == pytest.approx(expected, rel=1e-9, abs=1e-300)


@given(
    down=counts.filter(bool),
    same=counts.filter(bool),
    margin=st.floats(1e-3, 0.9),
    scale=st.floats(1e-3, 1e3),
)
def test_terms_that_differ_by_rounding_are_the_same(down, same, margin, scale):
    terms = right_or_wrong(0, down, same, margin)
    rounded = (terms - 0.1) * scale + 0.1 * scale
    assert below_zero(rounded) == pytest.approx(below_zero(terms), rel=1e-6)


@pytest.mark.parametrize(
    ("terms", "chance"),
    [
        ([0.0, 0.0], 1),
        ([0.0], 1),
        ([-1.0, 0.0], 1),
        ([-2.0, -1e-9], 1),
        ([0.0, 1.0], 0),
        ([1e-9, 2.0], 0),
        ([-1.0, 1.0], 0.5),
        ([-1.0, 3.0, 0.0], 0.25),
    ],
)
def test_terms_without_two_signs_leave_nothing_to_chance(terms, chance):
    assert below_zero(np.array(terms)) == pytest.approx(chance, rel=1e-12)


@given(seed=seeds, shift=st.floats(0, 1))
def test_larger_terms_are_never_likelier_to_be_below_zero(seed, shift):
    terms = skewed(seed)
    higher = below_zero(terms + shift * terms.std())
    assert higher <= below_zero(terms) * (1 + 1e-6) + 1e-12


@settings(max_examples=15)
@given(seed=seeds)
def test_it_agrees_with_drawn_weights(seed):
    terms, rng, draws = skewed(seed, most=500), np.random.default_rng(seed), 200_000
    sums = [rng.standard_exponential((1_000, len(terms))) @ terms for _ in range(200)]
    p = below_zero(terms)
    error = 3 * math.sqrt(p * (1 - p) / draws) + 1e-5
    assert np.mean(np.concatenate(sums) <= 0) == pytest.approx(p, abs=error + 0.01 * p)


@given(seed=seeds)
def test_half_the_step_changes_nothing(seed):
    terms = skewed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaffke, "STEP", gaffke.STEP / 2)
        expected = below_zero(terms)
    assert below_zero(terms) == pytest.approx(expected, rel=1e-4, abs=1e-12)


@given(up=counts.filter(bool), down=counts, shift=st.floats(1e-9, 1e-6))
def test_terms_that_hardly_differ_have_hardly_another_chance(up, down, shift):
    terms = right_or_wrong(up, down, 0, 0)
    nearly = terms + shift * np.arange(len(terms))
    assert below_zero(nearly) == pytest.approx(below_zero(terms), rel=1e-2)


@given(losses=counts, gain=st.floats(1e-3, 1e3), other=st.floats(1e-3, 1e3))
def test_one_loss_has_the_chance_that_its_weight_exceeds_all_others(
    losses, gain, other
):
    terms = np.append(-1.0, np.repeat([gain, other], [losses + 1, 3]))
    expected = np.prod(1 / (1 + terms[1:]))
    assert below_zero(terms) == pytest.approx(expected, rel=1e-6)
