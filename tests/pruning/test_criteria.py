"""Importance scores against their formulas, the kept set, and narrowing, over all bits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays

from lm_eval_pruned.pruning import slicing
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    CRITERIA,
    RANDOM,
    check_finite,
    kept_set,
    score_neurons,
)
from lm_eval_pruned.pruning.slicing import narrow, prune_model
from tests.helpers.by_hand import FORMULAS, FORMULAS_OF_ACTIVITY, random_scores
from tests.helpers.checkpoints import tiny_config, tiny_model


BY_WEIGHTS = sorted({*CRITERIA} - {*CALIBRATED})
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights(seed: int, neurons: int, hidden: int, dtype=torch.float32):
    """Return gate, up and down."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = torch.randn(3, neurons, hidden, generator=generator).to(dtype)
    return gate, up, down.T.contiguous()


@pytest.mark.parametrize("name", CRITERIA)
@given(
    seed=st.integers(0, 2**32),
    neurons=st.integers(1, 40),
    hidden=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1, 1, 2.0**-9, 0]),
)
def test_scores_follow_the_formula(name, seed, neurons, hidden, dtype, scale):
    gate, up, down = (w * scale for w in weights(seed, neurons, hidden, dtype))
    x = np.random.default_rng(seed).normal(size=(2, 3, neurons))
    norms = np.linalg.norm(x, axis=1)
    activity = torch.from_numpy(np.stack([np.linalg.norm(norms, axis=0), norms.sum(0)]))
    scores = score_neurons(gate, up, name, down=down, activity=activity)
    assert (scores.dtype, scores.shape) == (torch.float32, (neurons,))
    g, u, d = (w.double().numpy() for w in (gate, up, down.T))
    expected = (
        FORMULAS_OF_ACTIVITY[name](g, u, d, x)
        if name in CALIBRATED
        else FORMULAS[name](g, u)
    )
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5, atol=1e-6)


@given(arrays(np.float32, st.integers(1, 30), elements=st.integers(0, 4)))
def test_kept_sets_are_the_top_and_ties_go_to_the_lower_index(scores):
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    for width in range(1, len(scores) + 1):
        kept = kept_set(torch.from_numpy(scores), width)
        assert kept.tolist() == sorted(ranked[:width])


def test_random_scores_depend_on_seed_and_layer_alone():
    state = torch.random.get_rng_state()
    for seed, layer in ((0, 0), (7, 3), (7, 4), (2**43 - 1, 5)):
        # Read from a command line, the name is another object than the one in the code.
        name, given = "".join(list(RANDOM)), {"layer": layer, "seed": seed}
        scores = score_neurons(*weights(seed % 9, 9, 4)[:2], name, **given)
        assert torch.equal(scores, random_scores(9, layer, seed))
    assert torch.equal(torch.random.get_rng_state(), state)


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


def assert_exact(matrix, choose):
    high, low = matrix.amax(1).float(), matrix.amin(1).float()
    peaks, largest = high + low.abs(), matrix.abs().amax(1).float()
    assert torch.equal(score_neurons(matrix, matrix, "maw"), peaks + peaks)
    assert torch.equal(score_neurons(matrix, matrix, "max_abs"), 2 * largest)
    for axis in (0, 1):
        kept = torch.tensor(sorted(choose(matrix.shape[axis])))
        for weight in (matrix, matrix.T.contiguous().T):
            result = narrow(weight, kept, axis)
            assert result.is_contiguous()
            assert torch.equal(result, weight.index_select(axis, kept))
        bias = matrix.select(1 - axis, 0)
        assert torch.equal(narrow(bias, kept, 0), bias[kept])


@given(matrices(), st.data())
def test_extremes_and_narrowing_are_exact(matrix, data):
    def choose(n):
        return data.draw(st.sets(st.integers(0, n - 1), min_size=1))

    assert_exact(matrix, choose)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_and_narrowing_of_large_weights_are_exact(dtype):
    torch.manual_seed(0)
    assert_exact(torch.randn(301, 503).to(dtype), lambda n: range(0, n, 3))


@given(matrices(special=BROKEN))
def test_what_is_not_finite_is_counted(matrix):
    bad, good = int((~matrix.isfinite()).sum()), torch.zeros_like(matrix)
    for name, place in itertools.product((*BY_WEIGHTS, RANDOM), range(3)):
        gate, up, down = (matrix if n == place else good for n in range(3))
        if not bad:
            score_neurons(gate, up, name, down=down.T)
            continue
        with pytest.raises(ValueError, match=f"holds {bad} NaN or infinite"):
            score_neurons(gate, up, name, down=down.T)


@pytest.mark.parametrize("bits", [0x7F81, 0xFF81, 0x7FFF, 0xFFFF])
def test_every_nan_is_found(bits):
    signed = torch.tensor([[1, bits - (1 << 16) * (bits > 0x7FFF)]])
    matrix = signed.to(torch.int16).view(torch.bfloat16)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight holds 1 NaN"):
        score_neurons(matrix, matrix, "maw")
    with pytest.raises(ValueError, match="w holds 1 NaN"):
        check_finite("w", matrix)


def test_large_finite_weights_are_not_mistaken_for_infinite_ones():
    gate, up, down = weights(0, 9, 4)
    scores = score_neurons(gate.fill_(3e38), up, "maw", down=down)
    assert kept_set(scores, 4).tolist() == [0, 1, 2, 3]


class Packed(torch.Tensor):
    """A quantised tensor: its bits are not its numbers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function.__name__ != "view"
        return super().__torch_function__(function, types, args, kwargs)


def test_the_bits_of_subclasses_are_not_read():
    weight = torch.randn(4, 4, dtype=torch.bfloat16).as_subclass(Packed)
    score_neurons(weight, weight, "maw")
    narrow(weight, torch.arange(2), 1)


@pytest.mark.parametrize("name", [*CRITERIA, RANDOM])
def test_scores_and_narrow_weights_hold_no_graph(name):
    gate, kept = torch.randn(6, 4, requires_grad=True), torch.tensor([1, 3])
    given = {"down": gate.T, "activity": torch.ones(2, 6)}
    assert not score_neurons(gate, gate, name, **given).requires_grad
    for weight, axis in itertools.product((gate, gate.T, gate.bfloat16()), (0, 1)):
        assert not narrow(weight, kept, axis).requires_grad
    # What keeps all neurons is not copied.
    assert narrow(gate, torch.arange(6), 0) is narrow(gate, torch.arange(4), 1) is gate


@pytest.mark.parametrize(
    ("asked", "models"),
    [
        ({"prune_percent": 10}, ["SmolLM2-135M-Instruct", "Gemma-3-270M"]),
        ({"prune_percent": 40}, ["SmolLM2-135M-Instruct", "Gemma-3-270M"]),
        ({"prune_percent": 40, "criterion": "pon"}, ["40, 50 %", "Gemma-3-270M"]),
        ({"prune_percent": 30, "criterion": "l2"}, ["20, 30, 40 %", "Gemma-3-270M"]),
        ({"prune_percent": 60, "criterion": "l2"}, ["40, 50, 60 %"]),
        ({"prune_percent": 2, "criterion": "max_abs"}, ["SmolLM2", "Gemma-3-270M"]),
        ({"prune_percent": 20, "recipe": "fast"}, ["in Gemma-3-270M (10, 20, 30 %"]),
        ({"prune_percent": 40, "recipe": "fast"}, []),
        ({"prune_percent": 50}, []),
        ({"prune_percent": 60, "criterion": "pon"}, ["60 %"]),
        ({"prune_percent": 70, "criterion": "pon"}, []),
        ({"prune_percent": 10, "criterion": "random"}, []),
        ({"prune_percent": 10, "layers": "1"}, []),
    ],
)
def test_whoever_prunes_worse_than_chance_is_told_once_and_where(asked, models, caplog):
    slicing._tell_once.cache_clear()
    for _ in range(2):
        prune_model(tiny_model(tiny_config(intermediate_size=200)), **asked)
    found = [r.message for r in caplog.records if "than a random cut" in r.message]
    assert len(found) == bool(models)
    assert all(model in sentence for sentence in found for model in models)
