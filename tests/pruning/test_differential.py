"""Against optipfair 0.4.2, the library that the study's checkpoints were made with."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.criteria import score_neurons
from tests.helpers import checkpoints
from tests.helpers.ways_to_load import TEXTS, assert_same_model, write_texts


#: Our names, and optipfair's for the same score.
METHODS = {"maw": "MAW", "vow": "VOW", "pon": "PON", "l2": "L2"}


@pytest.fixture(
    scope="module", params=["tiny", pytest.param("real", marks=pytest.mark.slow)]
)
def model(request):
    if request.param == "real":
        folder = request.getfixturevalue("real_model")
        return AutoModelForCausalLM.from_pretrained(folder)
    sizes = {"hidden_size": 48, "intermediate_size": 500, "head_dim": 12}
    return checkpoints.tiny_model(checkpoints.tiny_config(**sizes))


@pytest.mark.parametrize("criterion", METHODS)
@pytest.mark.parametrize("percent", [10, 20, 30, 40, 50, 60])
def test_models_come_out_bit_for_bit(model, criterion, percent):
    """But for exact ties at the threshold, which are common in the real model's 4-bit blocks."""
    reason = "optipfair is in the extra test"
    theirs = pytest.importorskip("optipfair", reason=reason).prune_model(
        model=copy.deepcopy(model),
        pruning_type="MLP_GLU",
        neuron_selection_method=METHODS[criterion],
        pruning_percentage=percent,
        show_progress=False,
        return_stats=False,
    )
    asked = {"prune_percent": percent, "criterion": criterion}
    ours = prune_model(copy.deepcopy(model), **asked)
    unequal = 0
    for one, other in zip(ours.model.layers, theirs.model.layers, strict=True):
        rows = [(m.mlp.gate_proj.weight, m.mlp.up_proj.weight) for m in (one, other)]
        scores = [score_neurons(*each, criterion).sort().values for each in rows]
        assert torch.equal(*scores)
        unequal += not torch.equal(rows[0][0], rows[1][0])
    assert unequal <= 2, "ties at the threshold are rare"
    if not unequal:
        assert_same_model(ours, theirs)


@pytest.mark.parametrize("percent", [10, 40, 75])
def test_activity_on_text_comes_out_bit_for_bit(percent, tiny_llama, tmp_path):
    theirs = load_pruned(str(tiny_llama))
    texts = [checkpoints.byte_tokenizer()(t, return_tensors="pt") for t in TEXTS]
    keys = ("input_ids", "attention_mask")
    pytest.importorskip("optipfair.pruning.mlp_glu").prune_model_mlp_glu(
        theirs,
        neuron_selection_method="MAW",
        pruning_percentage=percent,
        dataloader=[{key: text[key] for key in keys} for text in texts],
        show_progress=False,
    )
    asked = {"criterion": "maw_act", "calibration": write_texts(tmp_path / "t.jsonl")}
    ours = load_pruned(str(tiny_llama), prune_percent=percent, **asked)
    assert_same_model(theirs, ours)
