"""How a budget of neurons is shared among layers: exact, and the same everywhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from lm_eval_pruned.pruning.allocation import (
    RESOLUTION,
    allocate,
    costs_of_losses,
)


def full(curve) -> int:
    """Return the width of the layer before."""
    return len(curve) - 1


def at(curve, width) -> float:
    """Return the cost of leaving a width."""
    return float(curve[full(curve) - width]) * RESOLUTION


def total(curves, widths) -> int:
    return sum(int(c[full(c) - w]) for c, w in zip(curves, widths, strict=True))


def allowed(curves, neurons, fewest, multiple_of):
    """Return every allocation that the bounds allow, by the rules as the docs state them."""
    choices = []
    for curve in curves:
        multiples = range(multiple_of, full(curve) + 1, multiple_of)
        choices.append([n for n in multiples if n >= fewest] or [full(curve)])
    found = [each for each in itertools.product(*choices) if sum(each) <= neurons]
    most = max(map(sum, found), default=None)
    return [each for each in found if sum(each) == most]


any_steps = st.lists(st.integers(0, 6), min_size=1, max_size=7)
any_curve = any_steps.map(lambda each: np.cumsum([0, *each], dtype=np.int64))
any_curves = st.lists(any_curve, min_size=1, max_size=4)


@given(any_curves, st.data(), st.integers(1, 3), st.integers(1, 3))
def test_no_allocation_costs_less(curves, data, fewest, multiple_of):
    neurons = data.draw(st.integers(1, sum(map(full, curves))))
    every = allowed(curves, neurons, fewest, multiple_of)
    assume(every)
    widths = allocate(curves, neurons, fewest=fewest, multiple_of=multiple_of)
    assert widths in every
    least = min(total(curves, each) for each in every)
    assert total(curves, widths) == least
    # Of equally good ones, that in which the last layer gives the least.
    best = [each for each in every if total(curves, each) == least]
    assert widths == max(best, key=lambda each: each[::-1])


def test_a_layer_that_is_spoilt_by_the_first_cut_is_given_up_or_left_alone():
    """A concave curve is not the average of its ends: the dynamic program sees that."""
    spoilt = costs_of_losses(100, kept=[25, 75], rises=[2.1, 2.0])
    steady = costs_of_losses(100, kept=[25, 75], rises=[1.8, 0.5])
    assert allocate([spoilt, steady], 150) == (100, 50)
    assert allocate([spoilt, steady], 75, fewest=10) == (25, 50)


@given(
    st.lists(st.floats(-1, 20), min_size=1, max_size=6),
    st.integers(20, 3000),
    st.data(),
)
def test_a_measured_curve_starts_at_nothing_and_never_falls(rises, width, data):
    sizes = {"min_size": len(rises), "max_size": len(rises)}
    kept = sorted(data.draw(st.sets(st.integers(1, width - 1), **sizes)))
    curve = costs_of_losses(width, kept, rises)
    assert (len(curve), curve[0]) == (width + 1, 0)
    assert np.all(np.diff(curve) >= 0)
    descending = sorted((max(rise, 0) for rise in rises), reverse=True)
    if list(rises) == descending:
        # Slopes are rounded, by at most half a step for every neuron.
        for place, rise in zip(kept, rises, strict=True):
            assert at(curve, place) == pytest.approx(rise, abs=width * 1e-12)


def test_noise_is_averaged():
    curve = costs_of_losses(100, kept=[20, 40, 60, 80], rises=[1, 2, 0.2, -0.1])
    assert [at(curve, w) for w in (80, 60, 40, 20)] == pytest.approx([0, 0.2, 1.5, 1.5])


def test_below_the_smallest_measured_width_a_curve_is_as_steep_as_ever():
    curve = costs_of_losses(100, kept=[50, 90], rises=[1.4, 1.0])
    assert at(curve, 40) == pytest.approx(1.4 + 10 * 0.1)
