"""Layers of different width: what the config says of them, and what it gets wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning.config_widths import WidthKey, copy_layers, taken_apart
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.slicing import widths_in_memory
from tests.helpers.checkpoints import (
    TINY,
    edit_config,
    edit_weights,
    save_tiny,
    tiny_config,
)
from tests.helpers.comparing import assert_same_model
from tests.helpers.layouts import overrides, ragged, save_family, save_gemma3n
from tests.helpers.ways_to_load import assert_state


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"widths": {0: 11}}, "model.layers.0.mlp keeps"),
        ({"ratio": "0.25", "layers": "0,2"}, "Each of 2 GLU-MLPs keeps"),
    ],
)
def test_what_stock_transformers_cannot_open_is_told(tmp_path, caplog, asked, named):
    save_family(tmp_path / "source", "llama", 16)
    export = export_pruned(
        str(tmp_path / "source"), tmp_path / "out", prune_arguments=asked
    )
    assert not export.record.config_expresses_widths
    (message,) = caplog.messages
    assert message.startswith(named) and "stock transformers cannot open" in message
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`per_layer_config`" in card and "lm_eval --model pruned-hf" in card
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_pruned_to_one_width_it_is_an_ordinary_model_again(tmp_path, caplog):
    save_family(tmp_path / "source", "llama", 40)
    first = load_pruned(str(tmp_path / "source"), widths=[30, 20])
    first.save_pretrained(tmp_path / "saved")
    tokens = first.generate(torch.arange(40, 44)[None], max_new_tokens=3)
    assert tokens.shape == (1, 7)
    caplog.clear()
    asked = {"intermediate_size": 12, "layers": "0-2"}
    export = export_pruned(
        str(tmp_path / "saved"), tmp_path / "out", prune_arguments=asked
    )
    assert export.record.config_expresses_widths and not caplog.messages
    assert "per_layer_config" not in config_of(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(stock, load_pruned(str(tmp_path / "saved"), intermediate_size=12))


@pytest.mark.parametrize("more", [{}, {"ignore_mismatched_sizes": True}])
def test_pruning_to_the_width_of_the_config_narrows_the_wider_layers(tmp_path, more):
    """The result is the model of the config, but not of the files."""
    model, state = ragged(tmp_path, [8, 16, 12])
    edit_config(tmp_path, intermediate_size=8)
    loaded = load_pruned(tmp_path, intermediate_size=8, **more)
    in_memory = prune_model(load_pruned(tmp_path), intermediate_size=8)
    assert_state(loaded, in_memory.state_dict())
    assert loaded.prune_record.digest == in_memory.prune_record.digest
    assert_state(load_pruned(tmp_path, **more), state)
    asked = {"intermediate_size": 8}
    export_pruned(str(tmp_path), tmp_path / "out", prune_arguments=asked)
    assert_state(type(model).from_pretrained(tmp_path / "out"), loaded.state_dict())


def test_shards_and_dtypes(tmp_path):
    _, state = ragged(tmp_path, [16, 5, 9])
    load_pruned(tmp_path).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    half = load_pruned(tmp_path / "sharded", dtype=torch.bfloat16, device="cpu")
    assert_state(half, {n: t.to(torch.bfloat16) for n, t in state.items()})


def test_a_list_in_the_config_holds_any_widths(tmp_path):
    save_gemma3n(tmp_path, [16, 24, 20])
    pruned = load_pruned(tmp_path, layers="1-2", intermediate_size=18)
    assert pruned.config.intermediate_size == [16, 18, 18]
    assert pruned.prune_record.config_expresses_widths
    pruned.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_model(stock, pruned)
    percent = load_pruned(tmp_path, prune_percent=50)
    assert percent.config.intermediate_size == [8, 12, 10]


RECURRENT = {"lru_width": 32, "num_key_value_heads": 1}


@pytest.mark.parametrize("width", [1, 7, 47])
def test_a_halved_key_holds_any_width(tmp_path, width):
    save_tiny(tmp_path, "recurrent_gemma", intermediate_size=96, **RECURRENT)
    model = load_pruned(str(tmp_path), intermediate_size=width)
    assert model.config.intermediate_size == 2 * width
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(model, prune_model(whole, intermediate_size=width))


def test_what_else_a_layer_has_of_its_own_stays():
    """In Gemma 4, layers differ in their heads."""
    config, again = tiny_config(), tiny_config()
    config.per_layer_config = {"1": {"rms_norm_eps": 0.5, "intermediate_size": 30}}
    plain, widths = taken_apart(config)
    assert widths == {WidthKey((), "intermediate_size", 1): 30}
    assert plain.intermediate_size == TINY["intermediate_size"]
    assert plain.to_dict()["per_layer_config"] == {"1": {"rms_norm_eps": 0.5}}
    copy_layers(plain, again, widths)
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "llama4_text", "granitemoeshared", "qwen2_moe"]
)
@pytest.mark.parametrize("size", [{"intermediate_size": 21}, {"ratio": 0.5}])
def test_a_size_narrows_each_mlp_that_is_wider_than_in_a_model_of_that_size(
    tmp_path, family, size
):
    """A target is one of the experts; that of a shared or dense MLP is in proportion."""
    more = {"num_hidden_layers": 4}
    if family == "deepseek_v3":
        more |= {"first_k_dense_replace": 2, "intermediate_size": 75}
    if family == "llama4_text":
        more |= {"moe_layers": [2, 3], "interleave_moe_layer_step": 1}
    folder = tmp_path / "model"
    save_family(folder, family, 35, **more)
    uniform = widths_in_memory(load_pruned(str(folder), **size)).actual
    asked = {1: 60 if family in ("deepseek_v3", "llama4_text") else 30, 3: 30}
    first = load_pruned(str(folder), widths=asked)
    own = widths_in_memory(first).actual
    first.save_pretrained(tmp_path / "saved")
    again = load_pruned(str(tmp_path / "saved"), **size)
    expected = {name: min(own[name], uniform[name]) for name in own}
    assert widths_in_memory(again).actual == expected
    assert_same_model(again, prune_model(first, **size))


# Configs that are wrong about their tensors.


def as_torch_file(folder):
    edit_config(folder, intermediate_size=20)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def per_layer(**written):
    return lambda folder: edit_config(
        folder, per_layer_config={n[1:]: w for n, w in written.items()}
    )


LIES = {
    "width": (
        lambda folder: edit_config(folder, intermediate_size=20),
        r"0\.mlp has 16 neurons .* 20: correct intermediate_size",
    ),
    "width of the only layer": (
        lambda folder: (
            save_family(folder, "llama", 16, num_hidden_layers=1),
            edit_config(folder, intermediate_size=20),
        ),
        "16 neurons .* says 20",
    ),
    "torch file": (as_torch_file, "16 neurons .* says 20"),
    "width of a layer": (per_layer(_0={"intermediate_size": 15}), "has 16 neurons in"),
    "too wide": (per_layer(_0={"intermediate_size": 17}), "has 16 neurons in"),
    "no neuron": (per_layer(_0={"intermediate_size": 0}), "in the checkpoint, but its"),
    "another key": (per_layer(_0={"moe_intermediate_size": 9}), "moe_intermediate"),
    "no such layer": (per_layer(_7={"intermediate_size": 9}), "layer 7|layer indices"),
    "blocks": (
        lambda folder: edit_config(folder, block_configs=[{}]),
        "^block_configs .* as per_layer_config",
    ),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
@pytest.mark.parametrize(
    "size", [{}, {"prune_percent": 50}, {"ignore_mismatched_sizes": True}]
)
def test_a_config_that_lies_about_widths_is_named(tmp_path, lie, message, size):
    save_family(tmp_path, "llama", 16)
    lie(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pruned(tmp_path, **size)


def test_the_key_of_the_first_lie_is_named(tmp_path):
    sizes = {**overrides("qwen3_moe", 16), "intermediate_size": 16}
    save_tiny(tmp_path, "qwen3_moe", **sizes)
    edit_config(tmp_path, intermediate_size=20, moe_intermediate_size=24)
    message = r"0\.mlp has 16 .* 20: correct intermediate_size"
    with pytest.raises(ValueError, match=message):
        load_pruned(str(tmp_path))


@pytest.mark.parametrize("part", ["up_proj.weight", "down_proj.weight", "up_proj.bias"])
@pytest.mark.parametrize("size", [{}, {"prune_percent": 50}])
def test_tensors_that_do_not_fit_together_are_named(tmp_path, part, size):
    save_family(tmp_path, "llama", 16)
    name, axis = f"model.layers.1.mlp.{part}", int(part.startswith("down"))

    def cut(tensors):
        tensors[name] = tensors[name].narrow(axis, 0, 9).contiguous()

    edit_weights(tmp_path, cut)
    with pytest.raises(ValueError, match=name):
        load_pruned(tmp_path, **size)


def test_a_key_that_builds_no_neuron_is_refused(tmp_path):
    config = tiny_config("recurrent_gemma", intermediate_size=1, **RECURRENT)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no key of its config sets"):
        load_pruned(str(tmp_path))
