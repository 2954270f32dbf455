"""Layers of different width: made by ``layers=`` or ``skip_layers=``, or brought along."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning.argument_values import written_layers
from tests.helpers import by_hand
from tests.helpers.checkpoints import (
    auto_class,
    byte_tokenizer,
    tiny_config,
    tiny_model,
)
from tests.helpers.layouts import EAGER, logits, save_family


def plan(**arguments):
    return PrunePlan.from_arguments(
        32, 80, available_layers=range(16), prune_percent=50, **arguments
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("4-11", range(4, 12)),
        ("0,15", [0, 15]),
        ("0+15", [0, 15]),
        ("0;2-3", [0, 2, 3]),
        (" 0, 2-3 ", [0, 2, 3]),
        ("0,,1", [0, 1]),
        (7, [7]),
        ([0, "4-5"], [0, 4, 5]),
        ((3, 1, 1), [1, 3]),
        ("[0,15]", [0, 15]),
    ],
)
def test_spellings_of_layers(value, expected):
    assert plan(layers=value).layers == tuple(expected)
    assert plan(skip_layers=value).layers == tuple(
        layer for layer in range(16) if layer not in expected
    )


@pytest.mark.parametrize(
    "value",
    ["", "a", "1-", "-1", "3-1", "1.5", True, "0-99999999", "1--2", [], "\u0663"],
)
def test_no_list_of_layers(value):
    with pytest.raises(ValueError, match="layers="):
        plan(layers=value)


def test_layers_out_of_range_say_which_there_are():
    with pytest.raises(ValueError, match=r"layers=4-16 names layer 16, .* 0-15"):
        plan(layers="4-16")
    with pytest.raises(ValueError, match="leaves no layer"):
        plan(skip_layers="0-15")
    with pytest.raises(ValueError, match="layers=1 and skip_layers=2"):
        plan(layers=1, skip_layers=2)
    with pytest.raises(ValueError, match=r"skip_layers .* no size"):
        PrunePlan.from_arguments(32, 80, skip_layers=1, available_layers=[0, 1])


@given(st.sets(st.integers(0, 40), min_size=1))
def test_written_layers_read_back(layers):
    chosen = PrunePlan.from_arguments(
        32,
        80,
        prune_percent=50,
        layers=written_layers(layers),
        available_layers=range(41),
    ).layers
    assert set(chosen) == layers


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


def layer_of(path: str) -> int:
    return int(re.search(r"\.(\d+)\.", path + ".")[1])


@pytest.mark.parametrize("family", ["llama", "phi3", "t5", "mixtral"])
def test_only_the_chosen_layers_are_pruned(family, tmp_path, caplog):
    whole = save_family(tmp_path, family, 16)
    auto = auto_class(whole.config)
    expected, _ = by_hand.sliced(
        whole,
        by_hand.best(lambda path, width: 6 if layer_of(path) == 1 else width),
    )
    arguments = {"layers": "1", "intermediate_size": 6}
    loaded = load_pruned(tmp_path, auto_class=auto, **arguments, **EAGER)
    assert "stock transformers cannot open" in caplog.text
    in_memory = prune_model(auto.from_pretrained(tmp_path, **EAGER), **arguments)
    assert_same(loaded, expected)
    assert_same(in_memory, expected)
    assert torch.equal(logits(loaded), logits(in_memory))
    record = loaded.prune_record.as_dict()
    assert record == in_memory.prune_record.as_dict()
    assert record["layers_pruned"] == "1"
    assert record["config_expresses_widths"] is False

    saved = tmp_path / "saved"
    loaded.save_pretrained(saved)
    with pytest.raises(RuntimeError, match=r"mismatch|per-layer attribute"):
        auto.from_pretrained(saved)
    again = load_pruned(saved, auto_class=auto, **EAGER)
    assert_same(again, expected)
    assert torch.equal(logits(again), logits(loaded))
    assert again.prune_record.as_dict()["asked"] == {}
    assert again.prune_record.parameters_before == loaded.prune_record.parameters_after


def test_skipping_is_choosing_the_others(tmp_path):
    save_family(tmp_path, "llama", 16)
    skipped = load_pruned(tmp_path, skip_layers="0,2", prune_percent=50)
    chosen = load_pruned(tmp_path, layers=1, prune_percent=50)
    assert_same(skipped, chosen.state_dict())
    assert skipped.prune_record.as_dict() == chosen.prune_record.as_dict()


def test_choosing_all_layers_is_not_ragged(tmp_path, caplog):
    save_family(tmp_path, "llama", 16)
    chosen = load_pruned(tmp_path, layers="0-2", prune_percent=50)
    assert chosen.config.intermediate_size == 8
    assert "stock transformers cannot" not in caplog.text
    assert_same(chosen, load_pruned(tmp_path, prune_percent=50).state_dict())


def ragged(folder, widths, family="llama", config_width=16):
    """Write a checkpoint as other pruners do: one width in the config, many in fact."""
    model = save_family(folder, family, config_width)
    state, _ = by_hand.sliced(
        model, by_hand.best(lambda path, width: widths[layer_of(path)])
    )
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model, state


@settings(max_examples=5)
@given(
    widths=st.lists(st.integers(1, 16), min_size=3, max_size=3).filter(
        lambda widths: len(set(widths)) > 1
    ),
    size=st.one_of(
        st.integers(1, 16).map(lambda k: {"intermediate_size": k}),
        st.integers(0, 99).map(lambda p: {"prune_percent": p}),
    ),
)
def test_checkpoints_whose_layers_differ(widths, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ragged")
    model, state = ragged(folder, widths)
    loaded = load_pruned(folder)
    assert_same(loaded, state)
    model_by_hand = prune_by_hand(model, state)
    assert torch.equal(logits(loaded), logits(model_by_hand))
    assert [len(k) for k in loaded.prune_record.kept] == []

    if size.get("intermediate_size", 0) > max(widths):
        with pytest.raises(ValueError, match="intermediate_size"):
            load_pruned(folder, **size)
        return

    def target(path, width):
        if "prune_percent" in size:
            return width - size["prune_percent"] * width // 100
        return min(width, size["intermediate_size"])

    expected, _ = by_hand.sliced(loaded, by_hand.best(target))
    further = load_pruned(folder, **size)
    assert_same(further, expected)
    in_memory = prune_model(load_pruned(folder), **size)
    assert_same(in_memory, expected)
    before, after = (
        record.as_dict() for record in (further.prune_record, in_memory.prune_record)
    )
    assert before == after


@pytest.mark.parametrize("more", [{}, {"ignore_mismatched_sizes": True}])
def test_pruning_to_the_width_of_the_config_narrows_the_wider_layers(tmp_path, more):
    """The result is the model of the config, but not of the files."""
    model, state = ragged(tmp_path, [8, 16, 12])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "intermediate_size": 8})
    )
    loaded = load_pruned(tmp_path, intermediate_size=8, **more)
    in_memory = prune_model(load_pruned(tmp_path), intermediate_size=8)
    assert_same(loaded, in_memory.state_dict())
    assert loaded.prune_record.digest == in_memory.prune_record.digest
    assert_same(load_pruned(tmp_path, **more), state)
    export_pruned(
        str(tmp_path), tmp_path / "out", prune_arguments={"intermediate_size": 8}
    )
    opened = type(model).from_pretrained(tmp_path / "out")
    assert_same(opened, loaded.state_dict())


def prune_by_hand(model, state):
    for name, tensor in state.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(tensor))
    return model


def test_ragged_shards_dtypes_and_device_maps(tmp_path):
    _, state = ragged(tmp_path, [16, 5, 9])
    sharded = tmp_path / "sharded"
    load_pruned(tmp_path).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same(load_pruned(sharded), state)
    half = load_pruned(sharded, dtype=torch.bfloat16, device="cpu")
    assert_same(half, {n: t.to(torch.bfloat16) for n, t in state.items()})


def test_a_config_that_lies_about_one_width_is_an_error(tmp_path):
    save_family(tmp_path, "llama", 16)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "intermediate_size": 20}))
    for size in ({}, {"prune_percent": 50}):
        with pytest.raises(
            ValueError, match=r"16 neurons .* config.json says 20: correct intermediate"
        ):
            load_pruned(tmp_path, **size)


@pytest.mark.parametrize("part", ["up_proj.weight", "down_proj.weight", "up_proj.bias"])
def test_tensors_that_do_not_fit_together_are_named(tmp_path, part):
    save_family(tmp_path, "llama", 16)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    name = f"model.layers.1.mlp.{part}"
    axis = 1 if part.startswith("down") else 0
    state[name] = state[name].narrow(axis, 0, 9).contiguous()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_pruned(tmp_path, prune_percent=50)


def save_gemma3n(folder, widths, **more):
    """Write a checkpoint whose config has a list of widths, one per layer."""
    config = tiny_config(
        "gemma3n_text",
        **more,
        intermediate_size=widths,
        vocab_size_per_layer_input=260,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * len(widths),
        activation_sparsity_pattern=[0.0] * len(widths),
    )
    tiny_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def test_widths_per_layer_in_the_config(tmp_path):
    """Gemma 3n keeps a list, so choosing layers leaves an ordinary checkpoint."""
    save_gemma3n(tmp_path, [16, 24, 20])
    pruned = load_pruned(tmp_path, layers="1-2", intermediate_size=18)
    assert pruned.config.intermediate_size == [16, 18, 18]
    assert pruned.prune_record.config_expresses_widths
    saved = tmp_path / "saved"
    pruned.save_pretrained(saved)
    assert_same(AutoModelForCausalLM.from_pretrained(saved), pruned.state_dict())
    percent = load_pruned(tmp_path, prune_percent=50)
    assert percent.config.intermediate_size == [8, 12, 10]
