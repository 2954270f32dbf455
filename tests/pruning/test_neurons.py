"""Scores, checks and narrow weights of one GLU-MLP, on any numbers that a weight can hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.pruning.calibration import NeuronActivity
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    CRITERIA,
    check_finite,
    score_neurons,
)
from lm_eval_pruned.pruning.slicing import narrow


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 65504.0, -65504.0]
BROKEN = [float("inf"), float("-inf"), float("nan")]


@st.composite
def matrices(draw, special=()):
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    number = st.floats(-100, 100, width=16) | st.sampled_from([*NUMBERS, *special])
    numbers = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(numbers, dtype=torch.float64).view(rows, columns)
    # Rows of one sign are where bits and numbers order differently.
    for row in range(rows):
        if sign := draw(st.sampled_from([0, 1, -1])):
            matrix[row] = matrix[row].abs() * sign
    return matrix.to(dtype)


def peak_to_peak(matrix):
    return matrix.amax(1).float() + matrix.amin(1).float().abs()


@given(matrices())
def test_extremes_are_exact(matrix):
    peaks = peak_to_peak(matrix)
    assert torch.equal(score_neurons(matrix, matrix, "maw"), peaks + peaks)
    assert torch.equal(
        score_neurons(matrix, matrix, "max_abs"), 2 * matrix.abs().amax(1).float()
    )


@given(matrices(special=BROKEN))
def test_what_is_not_finite_shows(matrix):
    finite = matrix.isfinite().all(1)
    good = torch.zeros_like(matrix)
    for criterion in {*CRITERIA, "random"} - {*CALIBRATED}:
        if finite.all():
            score_neurons(matrix, matrix, criterion, down=matrix.T)
            continue
        for weights in (
            (matrix, good, None),
            (good, matrix, None),
            (good, good, matrix.T),
        ):
            with pytest.raises(ValueError, match=r"holds \d+ NaN or infinite"):
                score_neurons(*weights[:2], criterion, down=weights[2])
    for weight in (matrix, matrix.T):
        if finite.all():
            check_finite("w", weight)
            continue
        bad = int((~matrix.isfinite()).sum())
        with pytest.raises(ValueError, match=f"w holds {bad} NaN or infinite"):
            check_finite("w", weight)


@pytest.mark.parametrize("payload", [0x7F81, 0xFF81, 0x7FFF, 0xFFFF])
def test_every_nan_is_found(payload):
    bits = torch.tensor([[1, payload - (1 << 16) * (payload > 0x7FFF)]])
    matrix = bits.to(torch.int16).view(torch.bfloat16)
    assert matrix.isnan().any()
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight holds 1 NaN"):
        score_neurons(matrix, matrix, "maw")
    with pytest.raises(ValueError, match="w holds 1 NaN"):
        check_finite("w", matrix)


@given(matrices(), st.integers(0, 1), st.data())
def test_narrowing_is_exact(matrix, axis, data):
    width = matrix.shape[axis]
    kept = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1)))
    )
    for weight in (matrix, matrix.T.contiguous().T):
        result = narrow(weight, kept, axis)
        assert result.is_contiguous()
        assert torch.equal(result, weight.index_select(axis, kept))
    bias = matrix.select(1 - axis, 0)
    assert torch.equal(narrow(bias, kept, 0), bias[kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_weights(dtype):
    torch.manual_seed(0)
    weight = torch.randn(301, 503).to(dtype)
    for axis in (0, 1):
        kept = torch.randperm(weight.shape[axis])[:200].sort().values
        result = narrow(weight, kept, axis)
        assert torch.equal(result, weight.index_select(axis, kept))
    assert torch.equal(score_neurons(weight, weight, "maw"), 2 * peak_to_peak(weight))


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
    check_finite("w", weight)
    assert {"amax", "amin", "index_select", "sum"} <= set(called)
    assert "view" not in called


@pytest.mark.parametrize("criterion", [*CRITERIA, "random"])
def test_scores_hold_no_graph(criterion):
    gate = torch.randn(6, 4, requires_grad=True)
    activity = NeuronActivity(torch.ones(6), torch.ones(6))
    arguments = {"down": gate.T, "activity": activity}
    assert not score_neurons(gate, gate, criterion, **arguments).requires_grad


def test_narrow_weights_hold_no_graph():
    gate = torch.randn(6, 4, requires_grad=True)
    kept = torch.tensor([1, 3])
    for weight in (gate, gate.T, gate.bfloat16()):
        assert not narrow(weight, kept, 0).requires_grad
        assert not narrow(weight, kept, 1).requires_grad


def test_what_keeps_all_neurons_is_not_copied():
    weight = torch.randn(6, 4)
    assert narrow(weight, torch.arange(6), 0) is weight
    assert narrow(weight, torch.arange(4), 1) is weight
    assert narrow(weight.T, torch.arange(4), 0).is_contiguous()
