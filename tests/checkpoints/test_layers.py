"""Running a model layer by layer: the same numbers as in memory, one layer at a time."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.layers import open_layers
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.arguments import PruneArguments
from tests.helpers import checkpoints
from tests.helpers.layouts import save_family


TEXTS = ("The tide comes in twice a day.", "A loaf rises.", "Bridges expand in summer.")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    return str(file)


def request_of(folder, **arguments) -> LoadRequest:
    return LoadRequest.resolve(
        AutoModelForCausalLM, str(folder), PruneArguments(), arguments
    )


#: Kinds of models whose layers get different things.
PLAIN = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "glm4",
    "olmo2",
    "granite",
    "cohere",
    "smollm3",
    "stablelm",
    "lfm2",
)
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text")


def saved(folder, family):
    if family in ("llama", "phi3", "glm4", "lfm2", *EXPERTS):
        save_family(folder, family, 48)
        return folder
    return checkpoints.save_tiny(folder, family)


@pytest.mark.parametrize("family", [*PLAIN, *EXPERTS])
def test_the_model_runs_layer_by_layer_as_it_does_in_memory(family, tmp_path):
    folder = saved(tmp_path / "model", family)
    tokens = torch.arange(40, 62).view(2, 11)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    with open_layers(request_of(folder)) as layers:
        layers.check(tokens[:1])
        hidden, calls = layers.enter(tokens)
        for layer, call in enumerate(calls):
            names = dict(layers.model.named_parameters())
            assert all(
                names[name].is_meta
                for name in names
                if name.startswith(f"{layers.path}.")
            )
            with layers.resident(layer):
                hidden = layers.run(layer, hidden, call)
        logits = layers.logits(tokens, hidden, slice(0, 11))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        part = layers.logits(tokens, hidden, slice(3, 5))
        torch.testing.assert_close(part, expected[:, 3:5], rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(module) for module in layers.model.modules())


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("criterion", ["act", "maw_act"])
def test_neurons_observed_layer_by_layer_are_those_observed_in_memory(
    family, criterion, tmp_path, text, caplog
):
    folder = saved(tmp_path / "model", family)
    asked = {"prune_percent": 40, "criterion": criterion, "calibration": text}
    loaded = load_pruned(str(folder), **asked)
    assert "in full" not in caplog.text
    whole = prune_model(
        AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=checkpoints.byte_tokenizer(),
        **asked,
    )
    one, other = loaded.prune_record, whole.prune_record
    assert one.digest == other.digest
    assert one.calibration.as_dict() == other.calibration.as_dict()
    for name, activity in one.calibration.activity.items():
        assert torch.allclose(activity.norm, other.calibration.activity[name].norm)
    for (name, weight), expected in zip(
        loaded.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(weight, expected), name
