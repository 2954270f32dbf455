"""Which config key sets which width, and what is said where none does."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints
from tests.helpers.comparing import assert_same_model


RECURRENT = {"num_hidden_layers": 3, "lru_width": 32, "num_key_value_heads": 1}


@pytest.mark.parametrize("odd", [97, 3])
def test_a_key_that_leaves_a_remainder_is_named_with_one_that_does_not(tmp_path, odd):
    """RecurrentGemma halves its intermediate_size."""
    sizes = RECURRENT | {"intermediate_size": odd}
    folder = checkpoints.save_tiny(tmp_path, "recurrent_gemma", **sizes)
    with pytest.raises(
        UnsupportedModelError,
        match=rf"in model\.layers\.0\.mlp_block, because intermediate_size={odd} in its config "
        rf"does not divide into whole neurons: write {odd - 1} there, which builds the "
        r"same model\.$",
    ):
        load_pruned(str(folder), prune_percent=0 if odd == 3 else 40)
    before = AutoModelForCausalLM.from_pretrained(folder)
    checkpoints.edit_config(folder, intermediate_size=odd - 1)
    assert_same_model(load_pruned(str(folder)), before)


@pytest.mark.parametrize("width", [1, 7, 8, 47])
def test_a_halved_key_holds_any_width(tmp_path, width):
    sizes = RECURRENT | {"intermediate_size": 96}
    folder = checkpoints.save_tiny(tmp_path, "recurrent_gemma", **sizes)
    model = load_pruned(str(folder), intermediate_size=width)
    assert model.config.intermediate_size == 2 * width
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_model(model, prune_model(whole, intermediate_size=width))


def test_where_no_value_fits_the_key_is_named(tmp_path):
    sizes = RECURRENT | {"intermediate_size": 1}
    config = checkpoints.tiny_config("recurrent_gemma", **sizes)
    config.save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="do not grow in proportion to intermediate_size in"
    ):
        load_pruned(str(tmp_path))
