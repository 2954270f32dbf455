"""Widths in ``block_configs`` of NVIDIA's models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.pruning.block_configs import widths_of_blocks


def read(*ffns, hidden_size=8192):
    blocks = [{"ffn": each} for each in ffns]
    return widths_of_blocks(blocks, hidden_size, 64, 8, "block_configs in the config")


def test_multiples_of_the_hidden_size_that_published_models_have():
    """Llama-3.1-Nemotron-51B has H = 8192; 5.25 is the unpruned Llama-70B with I = 28672."""
    found = read({"ffn_mult": 5.25}, {"ffn_mult": 1.3125}, {"ffn_mult": 0.5})
    assert found == {0: 28672, 1: 7168, 2: 2816}


@given(st.floats(0.01, 16), st.integers(1, 20000))
def test_a_multiple_is_rounded_up_to_256(share, hidden):
    width = read({"ffn_mult": share}, hidden_size=hidden).get(0)
    exact = int(2 * share * hidden / 3)
    assert width % 256 == 0
    assert 0 <= width - exact < 256


def test_the_width_comes_before_the_multiple():
    found = read({"ffn_mult": 5.25, "intermediate_size": 512}, {}, {"ffn_mult": None})
    assert found == {0: 512}


def test_blocks_may_be_objects():
    block = SimpleNamespace(ffn=SimpleNamespace(intermediate_size=12), attention=None)
    assert widths_of_blocks([block], None, None, None, "x") == {0: 12}
    assert widths_of_blocks(None, 8, 4, 2, "x") == {}


@pytest.mark.parametrize("name", ["no_op", "replace_with_linear"])
@pytest.mark.parametrize("part", ["ffn", "attention"])
def test_blocks_that_lack_a_part_are_refused(part, name):
    with pytest.raises(ValueError, match=f"^x gives layer 1 {part}.{name} of its own,"):
        widths_of_blocks([{}, {part: {name: True}}], 8, 4, 2, "x")


@pytest.mark.parametrize(
    "attention", [{"num_key_value_heads": 1}, {"n_heads_in_group": 4}]
)
def test_blocks_that_attend_otherwise_are_refused(attention):
    blocks = [{"attention": {"num_key_value_heads": 2, "n_heads_in_group": 2}}]
    assert widths_of_blocks(blocks, 8, 4, 2, "x") == {}
    (name,) = attention
    with pytest.raises(ValueError, match=f"layer 0 attention.{name} of its own"):
        widths_of_blocks([{"attention": attention}], 8, 4, 2, "x")


@pytest.mark.parametrize(
    "ffn",
    [
        {"intermediate_size": 0},
        {"intermediate_size": 2.5},
        {"intermediate_size": True},
        {"intermediate_size": "12"},
        {"ffn_mult": -1.0},
        {"ffn_mult": float("nan")},
        {"ffn_mult": [1]},
    ],
)
def test_what_is_no_width_is_named(ffn):
    with pytest.raises(
        ValueError, match=r"has ffn\.\w+=.* in layer 0, which is no width"
    ):
        read(ffn)
