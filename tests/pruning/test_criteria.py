"""Importance scores against their formulas, and the choice of the kept set."""

from __future__ import annotations

import importlib
import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from lm_eval_pruned.pruning import criteria
from lm_eval_pruned.pruning.calibration import NeuronActivity
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    CRITERIA,
    RANDOM,
    check_finite,
    kept_set,
    score_neurons,
)
from lm_eval_pruned.pruning.slicing import narrow
from tests.helpers.by_hand import FORMULAS, FORMULAS_OF_ACTIVITY, random_scores


BY_WEIGHTS = sorted({*CRITERIA} - {*CALIBRATED})
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
seeds = st.integers(0, 2**32)


def weights(seed: int, neurons: int, hidden: int, dtype=torch.float32):
    """Return gate, up and down."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = torch.randn(3, neurons, hidden, generator=generator).to(dtype)
    return gate, up, down.T.contiguous()


@pytest.mark.parametrize("name", CRITERIA)
@given(
    seed=seeds,
    neurons=st.integers(1, 40),
    hidden=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_scores_follow_the_formula(name, seed, neurons, hidden, dtype):
    gate, up, down = weights(seed, neurons, hidden, dtype)
    x = np.random.default_rng(seed).normal(size=(2, 3, neurons))
    norms = np.linalg.norm(x, axis=1)
    activity = NeuronActivity(
        torch.from_numpy(np.linalg.norm(norms, axis=0)), torch.from_numpy(norms.sum(0))
    )
    scores = score_neurons(gate, up, name, down=down, activity=activity)
    assert scores.dtype == torch.float32
    assert scores.shape == (neurons,)
    g, u, d = (w.double().numpy() for w in (gate, up, down.T))
    expected = (
        FORMULAS_OF_ACTIVITY[name](g, u, d, x)
        if name in CALIBRATED
        else FORMULAS[name](g, u)
    )
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*BY_WEIGHTS, RANDOM])
def test_scoring_in_blocks_changes_nothing(name, monkeypatch):
    gate, up, _ = weights(0, 37, 8)
    whole = score_neurons(gate, up, name)
    monkeypatch.setattr(criteria, "_BLOCK_ELEMENTS", 8 * 5)
    assert torch.equal(score_neurons(gate, up, name), whole)


@pytest.mark.parametrize("name", BY_WEIGHTS)
@given(seed=seeds, data=st.data(), exponent=st.integers(-20, 20))
def test_order_and_scale_of_the_neurons_do_not_matter(name, seed, data, exponent):
    gate, up, _ = weights(seed, 20, 8)
    width = data.draw(st.integers(1, 20))
    order = torch.tensor(data.draw(st.permutations(range(20))))
    kept = kept_set(score_neurons(gate, up, name), width)
    permuted = kept_set(score_neurons(gate[order], up[order], name), width)
    assert set(order[permuted].tolist()) == set(kept.tolist())
    # A power of two scales every float without rounding, so no near-tie can flip.
    c = 2.0**exponent
    assert torch.equal(kept, kept_set(score_neurons(gate * c, up * c, name), width))


def test_the_scale_of_a_matrix_does_not_matter_to_maw_act():
    gate, up, down = weights(1, 10, 6)
    given = {"activity": NeuronActivity(*torch.rand(2, 10, dtype=torch.float64))}
    scores, scaled = (
        score_neurons(gate * c, up, "maw_act", down=down * c * c, **given)
        for c in (1, 2.0**-20)
    )
    assert torch.equal(scores, scaled)
    none = score_neurons(gate * 0, up * 0, "maw_act", down=down * 0, **given)
    assert none.tolist() == [0] * 10


@given(arrays(np.float32, st.integers(1, 30), elements=st.integers(0, 4)))
def test_kept_sets_are_the_top_and_nest_and_ties_go_to_the_lower_index(scores):
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    widths = range(1, len(scores) + 1)
    kept = [kept_set(torch.from_numpy(scores), width).tolist() for width in widths]
    assert kept == [sorted(ranked[:width]) for width in widths]
    assert all({*a} < {*b} for a, b in itertools.pairwise(kept))


def test_random_scores_can_be_drawn_again_anywhere():
    """They depend on seed and layer alone, and leave the global generator as it is."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    for seed, layer in ((0, 0), (7, 3), (7, 4), (2**43 - 1, 5)):
        # Read from a command line, the name is another object than the one in the code.
        name, given = "".join(list(RANDOM)), {"layer": layer, "seed": seed}
        scores = score_neurons(*weights(seed % 9, 9, 4)[:2], name, **given)
        assert torch.equal(scores, random_scores(9, layer, seed))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", ["", "a", "Maw", "randon", "best", "~"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"criterion={name} is unknown"):
        criteria.canonical_name(name)


def test_names_are_checked_without_torch(monkeypatch):
    name = criteria.__name__
    monkeypatch.setattr(sys.modules["lm_eval_pruned.pruning"], "criteria", criteria)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    anew = importlib.import_module(name)
    assert anew is not criteria
    assert anew.canonical_name("ppm") == "maw"


# Any numbers that a weight can hold.

NUMBERS = [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 65504.0, -65504.0]
BROKEN = [float("inf"), float("-inf"), float("nan")]


@st.composite
def matrices(draw, special=()):
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(2, 9))
    number = st.floats(-100, 100, width=16) | st.sampled_from([*NUMBERS, *special])
    numbers = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(numbers, dtype=torch.float64).view(rows, columns)
    # Rows of one sign are where bits and numbers order differently.
    for row in range(rows):
        if sign := draw(st.sampled_from([0, 1, -1])):
            matrix[row] = matrix[row].abs() * sign
    return matrix.to(draw(st.sampled_from(DTYPES)))


def assert_extremes(matrix):
    high, low = matrix.amax(1).float(), matrix.amin(1).float()
    peaks = high + low.abs()
    assert torch.equal(score_neurons(matrix, matrix, "maw"), peaks + peaks)
    largest = matrix.abs().amax(1).float()
    assert torch.equal(score_neurons(matrix, matrix, "max_abs"), 2 * largest)


def assert_narrow(weight, kept, axis):
    result = narrow(weight, kept, axis)
    assert result.is_contiguous()
    assert torch.equal(result, weight.index_select(axis, kept))


@given(matrices(), st.integers(0, 1), st.data())
def test_extremes_and_narrowing_are_exact(matrix, axis, data):
    assert_extremes(matrix)
    numbers = st.integers(0, matrix.shape[axis] - 1)
    kept = torch.tensor(sorted(data.draw(st.sets(numbers, min_size=1))))
    for weight in (matrix, matrix.T.contiguous().T):
        assert_narrow(weight, kept, axis)
    bias = matrix.select(1 - axis, 0)
    assert torch.equal(narrow(bias, kept, 0), bias[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights(dtype):
    torch.manual_seed(0)
    weight = torch.randn(301, 503).to(dtype)
    assert_extremes(weight)
    for axis in (0, 1):
        kept = torch.randperm(weight.shape[axis])[:200].sort().values
        assert_narrow(weight, kept, axis)


@given(matrices(special=BROKEN))
def test_what_is_not_finite_shows(matrix):
    bad, good = int((~matrix.isfinite()).sum()), torch.zeros_like(matrix)
    for name in (*BY_WEIGHTS, RANDOM):
        for gate, up, down in (
            (matrix, good, good.T),
            (good, matrix, good.T),
            (good, good, matrix.T),
        ):
            if not bad:
                score_neurons(gate, up, name, down=down)
                continue
            with pytest.raises(ValueError, match=f"holds {bad} NaN or infinite"):
                score_neurons(gate, up, name, down=down)


@pytest.mark.parametrize("payload", [0x7F81, 0xFF81, 0x7FFF, 0xFFFF])
def test_every_nan_is_found(payload):
    bits = torch.tensor([[1, payload - (1 << 16) * (payload > 0x7FFF)]])
    matrix = bits.to(torch.int16).view(torch.bfloat16)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight holds 1 NaN"):
        score_neurons(matrix, matrix, "maw")
    with pytest.raises(ValueError, match="w holds 1 NaN"):
        check_finite("w", matrix)


def test_large_finite_weights_are_not_mistaken_for_infinite_ones():
    gate, up, down = weights(0, 9, 4)
    scores = score_neurons(gate.fill_(3e38), up, "maw", down=down)
    assert kept_set(scores, 4).tolist() == [0, 1, 2, 3]


def test_subclasses_go_through_torch():
    class Shifted(torch.Tensor):
        """Stands for a quantised tensor, whose bits are not its numbers."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs)

    called: list[str] = []
    weight = torch.randn(4, 4, dtype=torch.bfloat16).as_subclass(Shifted)
    score_neurons(weight, weight, "maw")
    narrow(weight, torch.arange(2), 1)
    assert {"amax", "amin", "index_select"} <= set(called)
    assert "view" not in called


@pytest.mark.parametrize("name", [*CRITERIA, RANDOM])
def test_scores_and_narrow_weights_hold_no_graph(name):
    gate, kept = torch.randn(6, 4, requires_grad=True), torch.tensor([1, 3])
    given = {"down": gate.T, "activity": NeuronActivity(*torch.ones(2, 6))}
    assert not score_neurons(gate, gate, name, **given).requires_grad
    for weight, axis in itertools.product((gate, gate.T, gate.bfloat16()), (0, 1)):
        assert not narrow(weight, kept, axis).requires_grad
    # What keeps all neurons is not copied.
    assert narrow(gate, torch.arange(6), 0) is narrow(gate, torch.arange(4), 1) is gate
