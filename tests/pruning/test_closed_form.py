"""Parameter counts in closed form against the model that transformers builds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st
from transformers import AutoModelForCausalLM

from lm_eval_pruned.checkpoints.configs import skeleton
from lm_eval_pruned.pruning import sizes as closed_form
from lm_eval_pruned.pruning.layouts import count_parameters
from lm_eval_pruned.pruning.sizes import dense_shape
from tests.helpers import checkpoints


@pytest.mark.parametrize("family", closed_form._FAMILIES)
@given(data=st.data())
def test_counts_equal_the_built_model(family, data):
    heads, groups = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 3)]))
    config = checkpoints.tiny_config(
        family,
        hidden_size=data.draw(st.sampled_from([12, 24])),
        intermediate_size=data.draw(st.integers(1, 50)),
        num_hidden_layers=data.draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=data.draw(st.sampled_from([4, 8])),
        tie_word_embeddings=data.draw(st.booleans()),
        attention_bias=data.draw(st.booleans()),
        mlp_bias=data.draw(st.booleans()),
    )
    written = json.loads(config.to_json_string(use_diff=False))
    shape = dense_shape(written)
    assert shape is not None
    assert shape.parameters == count_parameters(skeleton(AutoModelForCausalLM, config))
    config.intermediate_size += 7
    wider = count_parameters(skeleton(AutoModelForCausalLM, config))
    assert wider - shape.parameters == 7 * shape.parameters_per_neuron


@pytest.mark.parametrize("family", closed_form._FAMILIES)
def test_what_the_file_does_not_say_is_not_guessed(family):
    """A config as saved: defaults left out are either known here or not answered."""
    config = checkpoints.tiny_config(family)
    saved = json.loads(config.to_json_string())
    shape = dense_shape(saved)
    if shape is not None:
        built = count_parameters(skeleton(AutoModelForCausalLM, config))
        assert shape.parameters == built


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"hidden_size": None},
        {"intermediate_size": [4, 8]},
        {"num_key_value_heads": None},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}},
        {"dtype": "float8"},
        {"vocab_size": "many"},
    ],
)
def test_what_is_not_certain_is_left_to_the_model(change):
    config = checkpoints.tiny_config().to_dict()
    assert dense_shape(config) is not None
    assert dense_shape({**config, **change}) is None
