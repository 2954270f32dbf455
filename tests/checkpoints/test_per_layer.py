"""A model whose layers differ in width survives being saved, opened and pruned again."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import transformers

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning.config_widths import WidthKey, copy_layers, taken_apart
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.slicing import widths_in_memory
from tests.helpers import checkpoints, layouts
from tests.helpers.comparing import assert_same_model


FAMILIES = (
    "llama",
    "phi3",
    "glm4",
    "t5",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "granitemoeshared",
    "deepseek_v3",
    "gpt_oss",
    "lfm2",
)


def auto_class(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return checkpoints.auto_class(config)


def saved_widths(folder) -> dict[str, dict]:
    return json.loads((folder / "config.json").read_text()).get("per_layer_config")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family):
    source = tmp_path / "source"
    full = layouts.save_family(source, family, 40)
    own = widths_in_memory(full).layers
    asked = {layer: width - 5 * (layer + 1) for layer, width in own.items()}
    kind = {"auto_class": auto_class(source)}
    eager = {**layouts.EAGER, **kind}

    model = load_pruned(str(source), widths=asked, **eager)
    assert widths_in_memory(model).layers == asked
    assert_same_model(model, prune_model(full, widths=asked))
    record = model.prune_record

    saved, exported = tmp_path / "saved", tmp_path / "exported"
    model.save_pretrained(saved)
    export = export_pruned(str(source), exported, prune_arguments={"widths": asked})
    assert export.record.digest == record.digest
    for folder in (saved, exported):
        if record.config_expresses_widths:
            # Two layers of two kinds, each with a key of its own.
            assert saved_widths(folder) is None
            stock = auto_class(folder).from_pretrained(folder, **layouts.EAGER)
            assert_same_model(stock, model)
        else:
            assert {int(layer) for layer in saved_widths(folder)} <= asked.keys()
        again = load_pruned(str(folder), **eager)
        assert widths_in_memory(again).layers == asked
        assert torch.equal(layouts.logits(again), layouts.logits(model))
        assert saved_widths(saved) == saved_widths(exported)

    for more in (
        {"prune_percent": 30},
        {"intermediate_size": min(asked.values()) - 3},
        {"widths": {layer: width - 2 for layer, width in asked.items()}},
    ):
        twice = load_pruned(str(saved), **more, **eager)
        assert_same_model(twice, prune_model(load_pruned(str(saved), **eager), **more))
        third = tmp_path / "-".join(more)
        twice.save_pretrained(third)
        assert_same_model(load_pruned(str(third), **eager), twice)


def test_pruned_to_one_width_it_is_an_ordinary_model_again(tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    layouts.save_family(source, "llama", 40)
    load_pruned(str(source), widths=[30, 20]).save_pretrained(saved)
    export = export_pruned(
        str(saved), tmp_path / "out", prune_arguments={"intermediate_size": 12}
    )
    assert export.record.config_expresses_widths
    assert saved_widths(tmp_path / "out") is None
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(stock, load_pruned(str(saved), intermediate_size=12))


def test_what_is_said_where_stock_transformers_cannot_open_it(tmp_path, caplog):
    layouts.save_family(tmp_path / "source", "llama", 40)
    with caplog.at_level(logging.WARNING):
        export = export_pruned(
            str(tmp_path / "source"),
            tmp_path / "out",
            prune_arguments={"widths": {0: 11}},
        )
    assert not export.record.config_expresses_widths
    assert "per_layer_config, from which transformers up to 5.24 builds" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`per_layer_config`" in card
    assert "widths by layer 0:11" in card
    with pytest.raises((RuntimeError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_block_configs_are_refused_with_what_works(tmp_path):
    layouts.save_family(tmp_path, "llama", 40)
    blocks = [{"ffn": {"intermediate_size": 30}}]
    checkpoints.edit_config(tmp_path, block_configs=blocks)
    message = r"^block_configs in the config is not read: .* as per_layer_config, .*\.$"
    with pytest.raises(UnsupportedModelError, match=message):
        load_pruned(str(tmp_path))


def test_a_config_that_is_wrong_about_its_tensors(tmp_path):
    layouts.save_family(tmp_path / "source", "llama", 40)
    saved = tmp_path / "saved"
    load_pruned(str(tmp_path / "source"), widths=[30, 20]).save_pretrained(saved)
    checkpoints.edit_config(saved, per_layer_config={"0": {"intermediate_size": 29}})
    with pytest.raises(ValueError, match="has 30 neurons in the checkpoint, but its"):
        load_pruned(str(saved))


def test_without_a_word_in_the_config_the_tensors_tell(tmp_path):
    layouts.save_family(tmp_path / "source", "llama", 40)
    saved = tmp_path / "saved"
    model = load_pruned(str(tmp_path / "source"), widths=[30, 20])
    model.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    del config["per_layer_config"]
    (saved / "config.json").write_text(json.dumps(config))
    assert_same_model(load_pruned(str(saved)), model)


def test_a_model_with_widths_in_its_config_generates(tmp_path):
    layouts.save_family(tmp_path, "llama", 40)
    model = load_pruned(str(tmp_path), widths=[30, 20])
    tokens = model.generate(
        torch.arange(40, 44)[None], max_new_tokens=3, do_sample=False
    )
    assert tokens.shape == (1, 7)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"0": {"moe_intermediate_size": 9}},
            "moe_intermediate_size",
        ),
        ({"7": {"intermediate_size": 9}}, "layer 7|layer indices"),
        ({"0": {"intermediate_size": 41}}, "has 40 neurons in the checkpoint"),
        ({"0": {"intermediate_size": 0}}, "in the checkpoint, but its config"),
    ],
)
def test_nonsense_in_per_layer_config(tmp_path, written, message):
    layouts.save_family(tmp_path, "llama", 40)
    checkpoints.edit_config(tmp_path, per_layer_config=written)
    with pytest.raises(ValueError, match=message):
        load_pruned(str(tmp_path), prune_percent=10)


def test_what_else_a_layer_has_of_its_own_stays(tmp_path):
    """In Gemma 4, layers differ in their heads."""
    config = checkpoints.tiny_config("llama")
    config.per_layer_config = {"1": {"rms_norm_eps": 0.5, "intermediate_size": 30}}
    plain, widths = taken_apart(config)
    assert widths == {WidthKey((), "intermediate_size", 1): 30}
    assert plain.intermediate_size == checkpoints.TINY["intermediate_size"]
    assert plain.to_dict()["per_layer_config"] == {"1": {"rms_norm_eps": 0.5}}
    again = checkpoints.tiny_config("llama")
    copy_layers(plain, again, widths)
    assert again.to_dict() == config.to_dict()
