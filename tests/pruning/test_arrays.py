"""Extremes, finiteness and gathers on bits, against torch's own kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.pruning.arrays import all_finite, gather, row_extremes


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 65504.0, -65504.0]


@st.composite
def matrices(draw, special=()):
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    number = st.floats(-100, 100, width=16) | st.sampled_from([*SPECIAL, *special])
    numbers = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(numbers, dtype=torch.float64).view(rows, columns)
    # Rows of one sign are where bits and numbers order differently.
    for row in range(rows):
        sign = draw(st.sampled_from([0, 1, -1]))
        if sign:
            matrix[row] = matrix[row].abs() * sign
    return matrix.to(dtype)


@given(matrices())
def test_extremes_are_exact(matrix):
    highest, lowest = row_extremes(matrix)
    assert highest.dtype == lowest.dtype == matrix.dtype
    assert torch.equal(highest, matrix.amax(1))
    assert torch.equal(lowest, matrix.amin(1))


@given(matrices(special=[float("inf"), float("-inf"), float("nan")]))
def test_what_is_not_finite_shows_in_the_extremes(matrix):
    highest, lowest = row_extremes(matrix)
    broken = ~(highest.isfinite() & lowest.isfinite())
    assert torch.equal(broken, ~matrix.isfinite().all(1))


@given(matrices(special=[float("inf"), float("-inf"), float("nan")]))
def test_finiteness_is_exact(matrix):
    assert all_finite(matrix) == bool(matrix.isfinite().all())


@pytest.mark.parametrize("payload", [0x7F81, 0xFF81, 0x7FFF, 0xFFFF])
def test_every_nan_is_found(payload):
    bits = torch.tensor([[1, payload - (1 << 16) * (payload > 0x7FFF)]])
    matrix = bits.to(torch.int16).view(torch.bfloat16)
    assert matrix.isnan().any()
    assert not all_finite(matrix)
    assert any(extreme.isnan().any() for extreme in row_extremes(matrix))


@given(matrices(), st.integers(0, 1), st.data())
def test_gathers_are_exact(matrix, axis, data):
    width = matrix.shape[axis]
    kept = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1)))
    )
    for weight in (matrix, matrix.T.contiguous().T, matrix[:, :1].flatten()):
        along = axis if weight.dim() > 1 else 0
        if along >= weight.dim() or kept[-1] >= weight.shape[along]:
            continue
        result = gather(weight, kept, along)
        assert result.is_contiguous()
        assert torch.equal(result, weight.index_select(along, kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gathers_cross_their_blocks(dtype):
    torch.manual_seed(0)
    weight = torch.randn(301, 503).to(dtype)
    for axis in (0, 1):
        kept = torch.randperm(weight.shape[axis])[:200].sort().values
        result = gather(weight, kept, axis)
        assert torch.equal(result, weight.index_select(axis, kept))
        assert result.data_ptr() % 64 == 0
    highest, lowest = row_extremes(weight)
    assert torch.equal(highest, weight.amax(1))
    assert torch.equal(lowest, weight.amin(1))


def test_gathered_weights_are_ordinary_tensors():
    weight = torch.randn(64, 32, dtype=torch.bfloat16)
    result = gather(weight, torch.arange(8), 0)
    parameter = torch.nn.Parameter(result)
    parameter.data.mul_(2)
    assert torch.equal(parameter, weight[:8] * 2)


def test_subclasses_go_through_torch():
    class Shifted(torch.Tensor):
        """Stands for a quantised tensor, whose bits are not its numbers."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            called.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs)

    called: list[str] = []
    weight = torch.randn(4, 4).as_subclass(Shifted)
    row_extremes(weight)
    gather(weight, torch.arange(2), 1)
    all_finite(weight)
    assert {"amax", "amin", "index_select", "sum"} <= set(called)
    assert "view" not in called
