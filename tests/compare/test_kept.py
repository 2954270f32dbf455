"""The share of what a model scores above its floor that another keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lm_eval_pruned.compare.floors import share_kept


def lifts(seed, *, kept=0.8, mean=5.0, blocks=40, noise=2.0):
    """Return made lifts of a base and a candidate, and their blocks of four."""
    rng = np.random.default_rng(seed)
    base = rng.normal(mean, 4, (blocks, 4)) + rng.normal(0, 2, (blocks, 1))
    candidate = kept * base + rng.normal(0, noise, base.shape)
    return base.ravel(), candidate.ravel(), np.repeat(np.arange(blocks), 4).astype(str)


def fieller(base, candidate, level=0.05):
    """Return the interval by the closed form of the quadratic equation."""
    n, t = len(base), stats.t.isf(level / 2, len(base) - 1)
    (bb, bc), (_, cc) = np.cov(base, candidate) * t**2 / n
    a, b, c = (
        base.mean() ** 2 - bb,
        base.mean() * candidate.mean() - bc,
        candidate.mean() ** 2 - cc,
    )
    root = np.sqrt(b**2 - a * c)
    return (b - root) / a, (b + root) / a


@pytest.mark.parametrize("sign", [1, -1])
def test_the_interval_is_fiellers_but_for_a_document_that_nobody_has_seen(sign):
    base, candidate, _ = lifts(1, blocks=200)
    kept = share_kept(sign * base, sign * candidate, 0)
    low, high = fieller(base, candidate)
    assert kept.low < low < high < kept.high
    # One more document, among 800, that departs twice as far as the farthest.
    assert kept.high - kept.low < 1.15 * (high - low)
    assert kept.share == pytest.approx(candidate.sum() / base.sum())


def test_documents_of_a_block_count_as_one():
    """Four equal documents in each block have the interval of one."""
    base, candidate, _ = lifts(2)
    blocks = np.repeat(np.arange(len(base)), 4).astype(str)
    fourfold = share_kept(base.repeat(4), candidate.repeat(4), 0, clusters=blocks)
    alone = share_kept(base, candidate, 0)
    assert (fourfold.low, fourfold.high) == pytest.approx((alone.low, alone.high))


@given(st.integers(0, 99), st.floats(0.1, 10), st.floats(-5, 5))
def test_neither_unit_nor_origin_changes_what_is_kept(seed, unit, origin):
    base, candidate, blocks = lifts(seed)
    expected = share_kept(base, candidate, 0, clusters=blocks)
    moved = [unit * scores + origin for scores in (base, candidate)]
    kept = share_kept(*moved, origin, clusters=blocks)
    assert [kept.share, kept.low, kept.high] == pytest.approx(
        [expected.share, expected.low, expected.high], abs=1e-6
    )


def test_the_base_keeps_all_and_the_floor_nothing():
    base, _, blocks = lifts(3)
    floor = np.linspace(-1, 1, len(base))
    itself = share_kept(base, base, floor, clusters=blocks)
    assert [itself.share, itself.low, itself.high] == pytest.approx([1, 1, 1])
    nothing = share_kept(base, floor, floor, clusters=blocks)
    assert [nothing.share, nothing.low, nothing.high] == pytest.approx(
        [0, 0, 0], abs=1e-9
    )


def test_a_base_that_may_be_at_its_floor_bounds_nothing():
    base, candidate, blocks = lifts(4, mean=0.1)
    assert {share_kept(base, candidate, 0, clusters=blocks).high, None} == {None}
    assert share_kept([1.0, -1.0], [1.0, 0.0], 0) is None


def test_few_documents_have_a_share_and_no_interval():
    kept = share_kept([4.0, 6.0], [2.0, 3.0], 0)
    assert (kept.share, kept.low, kept.high) == (0.5, None, None)
    assert kept.text == "50 % [?, ?]"
