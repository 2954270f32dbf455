"""How a budget of neurons is shared among layers: exact, and the same everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.pruning.allocation import allocate, marginal_costs


def total(costs, widths) -> float:
    return sum(float(c[: len(c) - w].sum()) for c, w in zip(costs, widths, strict=True))


def allowed(costs, fewest, multiple_of) -> list[list[int]]:
    """Return the widths that the bounds allow each layer, by the rules as the docs state them."""
    multiples = (range(multiple_of, len(each) + 1, multiple_of) for each in costs)
    return [
        [n for n in some if n >= least] or [len(curve)]
        for curve, some, least in zip(costs, multiples, fewest, strict=True)
    ]


def closest(choices, neurons) -> list[tuple[int, ...]]:
    """Return every allocation that keeps `neurons` neurons, or the most below."""
    found = [each for each in itertools.product(*choices) if sum(each) <= neurons]
    most = max(map(sum, found), default=None)
    return [each for each in found if sum(each) == most]


any_costs = st.lists(st.integers(0, 6), min_size=1, max_size=7).map(
    lambda each: np.array(sorted(each), dtype=float)
)
several = st.lists(any_costs, min_size=1, max_size=4)


@given(several, st.data(), st.integers(1, 3))
def test_no_allocation_costs_less(costs, data, multiple_of):
    fewest = [data.draw(st.integers(1, 3)) for _ in costs]
    neurons = data.draw(st.integers(1, sum(map(len, costs))))
    choices = allowed(costs, fewest, multiple_of)
    every = closest(choices, neurons)
    widths = allocate(costs, neurons, fewest=fewest, multiple_of=multiple_of)
    if every:
        assert widths in every
        assert total(costs, widths) == min(total(costs, each) for each in every)
    else:
        # The bounds leave more than the size: each layer is as narrow as they allow.
        assert widths == tuple(min(each) for each in choices)


@st.composite
def curves(draw):
    width = draw(st.integers(20, 3000))
    kept = sorted(draw(st.sets(st.integers(1, width - 1), min_size=1, max_size=6)))
    sizes = {"min_size": len(kept), "max_size": len(kept)}
    return width, kept, draw(st.lists(st.floats(0, 20), **sizes))


@given(curves())
def test_a_hull_is_convex_and_the_greatest_below_the_curve(curve):
    width, kept, rises = curve
    costs = marginal_costs(*curve)
    assert len(costs) == width and np.all(np.diff(costs) >= 0) and costs[0] >= 0
    hull = np.concatenate([[0.0], np.cumsum(costs)])
    gaps = [rise - hull[width - n] for n, rise in zip(kept, rises, strict=True)]
    # Each of at most 3,000 terms of a sum is rounded.
    assert min(gaps) > -1e-9
    # It bends only where it touches, and reaches the narrowest point.
    assert gaps[0] == pytest.approx(0, abs=1e-9)
    bends = np.flatnonzero(np.diff(costs) > 1e-9) + 1
    touched = {width - n for n, gap in zip(kept, gaps, strict=True) if gap < 1e-9}
    assert {*bends.tolist()} <= touched


@given(st.lists(curves(), min_size=2, max_size=5), st.data(), st.sampled_from([1, 4]))
def test_another_unit_of_the_loss_changes_no_width_and_the_budget_is_exact(
    curves, data, multiple_of
):
    neurons = data.draw(st.integers(len(curves), sum(width for width, *_ in curves)))
    plain = [marginal_costs(*each) for each in curves]
    scaled = [marginal_costs(w, k, [8 * rise for rise in r]) for w, k, r in curves]
    least = {"fewest": [1] * len(curves), "multiple_of": multiple_of}
    widths = allocate(plain, neurons, **least)
    assert widths == allocate(scaled, neurons, **least)
    if multiple_of == 1:
        assert sum(widths) == neurons


def test_below_the_narrowest_known_width_a_curve_is_as_steep_as_before():
    costs = marginal_costs(100, kept=[50, 90], rises=[1.4, 0.2])
    assert costs[:10] == pytest.approx(0.02)
    assert costs[10:] == pytest.approx(0.03)
