"""Which config key sets which width, and what is said where none does."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints
from tests.helpers.comparing import assert_same_model


RECURRENT = {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1}


@pytest.mark.parametrize("width", [1, 7, 8, 47])
def test_a_halved_key_holds_any_width(tmp_path, width):
    sizes = RECURRENT | {"intermediate_size": 96}
    folder = checkpoints.save_tiny(tmp_path, "recurrent_gemma", **sizes)
    model = load_pruned(str(folder), intermediate_size=width)
    assert model.config.intermediate_size == 2 * width
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(model, prune_model(whole, intermediate_size=width))


def test_a_key_that_builds_no_neuron_is_refused(tmp_path):
    sizes = RECURRENT | {"intermediate_size": 1}
    config = checkpoints.tiny_config("recurrent_gemma", **sizes)
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="no key of its config sets that width"
    ):
        load_pruned(str(tmp_path))
