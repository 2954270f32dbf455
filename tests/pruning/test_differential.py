"""Against optipfair 0.4.2, the library that the study's checkpoints were made with."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.criteria import score_neurons
from tests.helpers import checkpoints
from tests.helpers.comparing import assert_same_model


#: Our names, and optipfair's for the same score.
METHODS = {"maw": "MAW", "vow": "VOW", "pon": "PON", "l2": "L2"}
PERCENTS = [10, 20, 30, 40, 50, 60]


def prune_with_optipfair(model, criterion: str, percent: int):
    """Prune a copy of `model` with optipfair."""
    optipfair = pytest.importorskip(
        "optipfair", reason="optipfair is in the extra test"
    )
    return optipfair.prune_model(
        model=copy.deepcopy(model),
        pruning_type="MLP_GLU",
        neuron_selection_method=METHODS[criterion],
        pruning_percentage=percent,
        show_progress=False,
        return_stats=False,
    )


@pytest.mark.parametrize("criterion", METHODS)
@pytest.mark.parametrize("percent", PERCENTS)
def test_tiny_models_come_out_bit_for_bit(criterion, percent):
    config = checkpoints.tiny_config(hidden_size=48, intermediate_size=500, head_dim=12)
    model = checkpoints.tiny_model(config, seed=percent)
    theirs = prune_with_optipfair(model, criterion, percent)
    ours = prune_model(model, prune_percent=percent, criterion=criterion)
    assert_same_model(ours, theirs)


@pytest.fixture(scope="module")
def loaded(real_model):
    return AutoModelForCausalLM.from_pretrained(real_model)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", METHODS)
@pytest.mark.parametrize("percent", PERCENTS)
def test_the_real_model_comes_out_bit_for_bit(loaded, real_model, criterion, percent):
    """Equal but for exact ties at the threshold, which ``torch.topk`` breaks arbitrarily.

    The weights come from four-bit blocks, so equal scores are common in them. Ours
    go to the lower index; optipfair documents no order.
    """
    theirs = prune_with_optipfair(loaded, criterion, percent)
    ours = load_pruned(real_model, prune_percent=percent, criterion=criterion)
    unequal = 0
    for layer, kept in enumerate(ours.prune_record.kept):
        source = loaded.model.layers[layer].mlp
        gate, up = (m.weight.detach() for m in (source.gate_proj, source.up_proj))
        narrowed = theirs.model.layers[layer].mlp.gate_proj.weight.detach()
        if torch.equal(gate[kept], narrowed):
            continue
        unequal += 1
        scores = score_neurons(gate, up, criterion)
        rows = {row.numpy().tobytes() for row in narrowed}
        in_theirs = torch.tensor([row.numpy().tobytes() in rows for row in gate])
        in_ours = torch.zeros_like(in_theirs).index_fill(0, kept, True)
        threshold = float(scores[kept].min())
        assert set(scores[in_ours ^ in_theirs].tolist()) == {threshold}
    assert unequal <= 2, "ties at the threshold are rare"
    if not unequal:
        assert_same_model(ours, theirs)
