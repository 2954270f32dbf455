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
from lm_eval_pruned.pruning.criteria import kept_set, score_neurons


def _var(rows):
    return rows.var(axis=1, ddof=1)


def _norm(rows, order):
    return np.linalg.norm(rows, ord=order, axis=1)


#: The formulas, written down once more in float64.
FORMULAS = {
    "maw": lambda g, u: g.max(1) + abs(g.min(1)) + u.max(1) + abs(u.min(1)),
    "max_abs": lambda g, u: abs(g).max(1) + abs(u).max(1),
    "l1": lambda g, u: _norm(g, 1) + _norm(u, 1),
    "l2": lambda g, u: _norm(g, 2) + _norm(u, 2),
    "vow": lambda g, u: _var(g) + _var(u),
    "pon": lambda g, u: _norm(g, 1) * _norm(u, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(seed: int, neurons: int, hidden: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(neurons, hidden, generator=generator).to(dtype) for _ in range(2)
    ]


@pytest.mark.parametrize("name", sorted({*criteria.CRITERIA} - {*criteria.CALIBRATED}))
@given(
    seed=st.integers(0, 2**32),
    neurons=st.integers(1, 40),
    hidden=st.integers(2, 40),
    dtype=st.sampled_from(DTYPES),
)
def test_scores_follow_the_formula(name, seed, neurons, hidden, dtype):
    gate, up = weights(seed, neurons, hidden, dtype)
    scores = score_neurons(gate, up, name)
    assert scores.dtype == torch.float32
    assert scores.shape == (neurons,)
    expected = FORMULAS[name](*(w.double().numpy() for w in (gate, up)))
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-5, atol=1e-6)
    if dtype == torch.float32:
        assert torch.equal(criteria.CRITERIA[name].score(gate, up), scores)


@pytest.mark.parametrize("name", [*FORMULAS, "random"])
def test_scoring_in_blocks_changes_nothing(name, monkeypatch):
    gate, up = weights(0, 37, 8)
    whole = score_neurons(gate, up, name)
    monkeypatch.setattr(criteria, "_BLOCK_ELEMENTS", 8 * 5)
    assert torch.equal(score_neurons(gate, up, name), whole)


@pytest.mark.parametrize("name", FORMULAS)
@given(seed=st.integers(0, 2**32), data=st.data())
def test_permuting_neurons_permutes_the_kept_set(name, seed, data):
    gate, up = weights(seed, 20, 8)
    width = data.draw(st.integers(1, 20))
    permutation = torch.tensor(data.draw(st.permutations(range(20))))
    kept = kept_set(score_neurons(gate, up, name), width)
    permuted = kept_set(score_neurons(gate[permutation], up[permutation], name), width)
    assert set(permutation[permuted].tolist()) == set(kept.tolist())


@pytest.mark.parametrize("name", FORMULAS)
@given(
    seed=st.integers(0, 2**32), width=st.integers(1, 20), exponent=st.integers(-20, 20)
)
def test_scaling_all_weights_leaves_the_kept_set(name, seed, width, exponent):
    # A power of two scales every float without rounding, so no near-tie can flip.
    gate, up = weights(seed, 20, 8)
    c = 2.0**exponent
    kept = kept_set(score_neurons(gate, up, name), width)
    scaled = kept_set(score_neurons(gate * c, up * c, name), width)
    assert torch.equal(kept, scaled)


@given(arrays(np.float32, st.integers(1, 30), elements=st.integers(0, 4)), st.data())
def test_the_kept_set_is_the_top_with_ties_to_the_lower_index(scores, data):
    width = data.draw(st.integers(1, len(scores)))
    kept = kept_set(torch.from_numpy(scores), width).tolist()
    by_rank = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert kept == sorted(by_rank[:width])


@given(arrays(np.float32, st.integers(2, 30), elements=st.integers(0, 9)))
def test_kept_sets_nest(scores):
    kept = [
        set(kept_set(torch.from_numpy(scores), k).tolist())
        for k in range(1, len(scores) + 1)
    ]
    for smaller, larger in itertools.pairwise(kept):
        assert smaller < larger


def test_random_depends_on_seed_and_layer_only():
    gate, up = weights(0, 50, 8)
    other = weights(1, 50, 8)
    scores = score_neurons(gate, up, "random", layer=3, seed=7)
    assert torch.equal(scores, score_neurons(*other, "random", layer=3, seed=7))
    assert not torch.equal(scores, score_neurons(gate, up, "random", layer=4, seed=7))
    assert not torch.equal(scores, score_neurons(gate, up, "random", layer=3, seed=8))
    assert len(scores.unique()) == 50


def test_random_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    score_neurons(*weights(0, 10, 4), "random", layer=1)
    assert torch.equal(torch.rand(1), expected)


def test_random_scores_are_the_same_everywhere():
    # Anybody can draw them again: the generator is torch's, seeded by both numbers.
    for seed, layer in ((0, 0), (7, 3), (2**43 - 1, 5)):
        generator = torch.Generator().manual_seed(seed * 2**20 + layer)
        expected = torch.randperm(9, generator=generator).float()
        scores = score_neurons(*weights(0, 9, 4), "random", layer=layer, seed=seed)
        assert torch.equal(scores, expected)
    default = score_neurons(*weights(0, 9, 4), "random")
    assert torch.equal(
        default, score_neurons(*weights(0, 9, 4), "random", layer=0, seed=0)
    )


def activity(neurons, seed=0):
    generator = torch.Generator().manual_seed(seed)
    norm, summed = torch.rand(2, neurons, generator=generator, dtype=torch.float64)
    return NeuronActivity(norm, summed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calibrated_scores_follow_their_formulas(dtype):
    gate, up = weights(1, 10, 6, dtype)
    down = weights(2, 6, 10, dtype)[0]
    fired = activity(10)
    g, u, d = (w.double().numpy() for w in (gate, up, down.T))
    peaks = [rows.max(1) + abs(rows.min(1)) for rows in (g, u, d)]
    structure = sum(p / p.max() for p in peaks)
    scores = {
        name: score_neurons(gate, up, name, down=down, activity=fired)
        for name in criteria.CALIBRATED
    }
    assert all(s.dtype == torch.float32 and s.shape == (10,) for s in scores.values())
    np.testing.assert_allclose(
        scores["maw_act"], structure * fired.summed_norms.numpy(), rtol=2e-5
    )
    np.testing.assert_allclose(
        scores["act"], _norm(d, 2) * fired.norm.numpy(), rtol=2e-5
    )


def test_weights_of_nought_have_a_score_of_nought():
    zero = torch.zeros(5, 4)
    scores = score_neurons(zero, zero, "maw_act", down=zero.T, activity=activity(5))
    assert scores.tolist() == [0] * 5


def test_the_scale_of_a_matrix_does_not_matter_to_maw_act():
    gate, up = weights(1, 10, 6)
    down = weights(2, 6, 10)[0]
    scores, scaled = (
        score_neurons(gate * c, up, "maw_act", down=down * c * c, activity=activity(10))
        for c in (1, 2.0**-20)
    )
    assert torch.equal(scores, scaled)


@pytest.mark.parametrize("name", [*criteria.CRITERIA, "random"])
def test_names_are_their_own_canonical_form(name):
    # Read from a command line, the name is another object than the one in the code.
    read = "".join(list(name))
    assert criteria.canonical_name(read) == name
    if name == "random":
        gate, up = weights(0, 9, 4)
        scores = score_neurons(gate, up, read)
        assert torch.equal(scores, score_neurons(gate, up, name))


@pytest.mark.parametrize("name", ["", "a", "Maw", "randon", "zebra", "~"])
def test_any_other_name_is_refused(name):
    with pytest.raises(ValueError, match=f"criterion={name} is unknown: pass one of"):
        criteria.canonical_name(name)


def test_names_are_checked_without_torch(monkeypatch):
    name = criteria.__name__
    monkeypatch.setattr(sys.modules["lm_eval_pruned.pruning"], "criteria", criteria)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    anew = importlib.import_module(name)
    assert anew is not criteria
    assert anew.canonical_name("ppm") == "maw"
