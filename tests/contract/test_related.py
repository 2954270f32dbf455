"""docs/related.md: what this package removes, and what it leaves alone."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import prune_model
from tests.contract.commands import pruned
from tests.helpers.checkpoints import byte_tokenizer


def test_it_removes_neurons_of_glu_mlps_and_nothing_else(tiny_llama, tmp_path):
    """Repair changes columns of ``down_proj`` and adds no bias, so the stock class opens the model."""
    folders = {}
    for repair in ("none", "least_squares"):
        folders[repair] = tmp_path / repair
        given = ["--model_args", f"pretrained={tiny_llama}", "--prune_percent", 20]
        given += ["--criterion", "obs", "--repair", repair, "--calibration_samples", 12]
        done = pruned("prune", *given, "--output_path", folders[repair])
        assert done.code == 0, done.err
    before = load_file(tiny_llama / "model.safetensors")
    cut, repaired = (load_file(f / "model.safetensors") for f in folders.values())
    assert cut.keys() == repaired.keys() == before.keys()
    for name, weight in before.items():
        if ".mlp." not in name:
            assert cut[name].equal(weight)
        same = cut[name].equal(repaired[name])
        assert same != name.endswith("down_proj.weight"), name
    AutoModelForCausalLM.from_pretrained(folders["least_squares"])


@pytest.mark.parametrize(
    "asked",
    [
        {"criterion": "maw"},
        {"criterion": "vow"},
        {"criterion": "pon"},
        {"criterion": "maw_act", "calibration_samples": 12},
    ],
)
def test_it_has_the_scores_of_optipfair(asked, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    width = model.config.intermediate_size
    prune_model(model, tokenizer=byte_tokenizer(), prune_percent=50, **asked)
    assert model.config.intermediate_size == width // 2
