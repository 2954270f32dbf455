"""Damaged checkpoints: a clear error, or exactly what the files say."""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from tests.helpers import by_hand
from tests.helpers.checkpoints import edit_config, edit_weights, save_tiny
from tests.helpers.layouts import overrides
from tests.helpers.ways_to_load import assert_same_model


INDEX = "model.safetensors.index.json"
GATE = "model.layers.1.mlp.gate_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@contextlib.contextmanager
def copy_of(folder):
    """Yield a copy of a checkpoint that may be damaged."""
    with tempfile.TemporaryDirectory() as parent:
        yield Path(shutil.copytree(folder, Path(parent) / "model"))


def refusal(folder, names=(), **arguments) -> Exception | None:
    """Load what may be damaged; return the error, or None if the model is right.

    Args:
        folder: The checkpoint.
        names: Words of which the message must hold one, besides the folder's path.
        **arguments: Passed to `load_pruned`.
    """
    try:
        model = load_pruned(str(folder), **(arguments or {"ratio": 1}))
    except (ValueError, OSError) as error:
        message = str(error)
        assert any(word in message for word in (str(folder), *names)), message
        return error
    full, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"], "drawn at random"
    width = model.config.intermediate_size
    assert_same_model(model, by_hand.narrow(full, by_hand.best(width)))
    return None


@given(st.floats(0, 1), st.binary(max_size=20))
@example(0.0, b"")
@example(0.0, struct.pack("<Q", 2**63) + b"{}")
@example(0.0, struct.pack("<Q", 99_999_999) + b"{}")
@example(0.0, struct.pack("<Q", 2) + b"[]")
def test_a_file_that_ends_early_is_a_damaged_checkpoint(tiny_llama, share, tail):
    with copy_of(tiny_llama) as folder:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))] + tail)
        if path.stat().st_size != len(content):
            assert f"{folder} cannot be loaded" in str(refusal(folder))


@pytest.mark.parametrize("content", [b"", bytes(100), b"\x80\x04.", b"PK\x03\x04"])
def test_a_damaged_bin_file_is_a_damaged_checkpoint(tiny_llama, content):
    with copy_of(tiny_llama) as folder:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
        assert "cannot be loaded" in str(refusal(folder))


# Tensors that are missing, renamed, swapped, or of another kind.


INTEGERS = (torch.int8, torch.int64, torch.bool, torch.uint16, torch.complex64)
FLOATS = (torch.float8_e4m3fn, torch.float64, torch.float16, torch.bfloat16)


@st.composite
def surgery(draw, keys):
    """Draw a change to some of the tensors, as ``(names, function)``."""
    key, other = draw(st.sampled_from(keys)), draw(st.sampled_from(keys))
    name = draw(st.sampled_from([f"{key}x", key.replace("model.", ""), "junk"]))
    made = torch.ones(draw(st.lists(st.integers(0, 100), max_size=3)))
    dtype = draw(st.sampled_from(INTEGERS + FLOATS))
    changes = [
        lambda t: t.pop(key),
        lambda t: t.update({name: t.pop(key)}),
        lambda t: t.update({key: t[other], other: t[key]}),
        lambda t: t.update({key: made}),
        lambda t: t.update({key: t[key].to(dtype)}),
        lambda t: t.update({name: made}),
    ]
    return (key, other, name), draw(st.sampled_from(changes))


@given(st.data(), st.sampled_from([{"ratio": 1}, {"ratio": 2.75}]))
def test_tensors_that_do_not_belong_are_refused(tiny_llama, data, arguments):
    keys = sorted(load_file(tiny_llama / "model.safetensors"))
    names, change = data.draw(surgery(keys))
    with copy_of(tiny_llama) as folder:
        edit_weights(folder, change)
        # Messages name a tensor, or the MLP that it belongs to.
        mlps = [name.rpartition(".mlp.")[0] for name in names]
        refusal(folder, [n for n in (*names, *mlps) if n], **arguments)


# What is named: what was done to a checkpoint of 88 neurons, arguments, and a telling word.


def tensors(change):
    return lambda folder: edit_weights(folder, change)


def with_tensor(name, tensor):
    return tensors(lambda t: t.update({name: tensor}))


def without(name):
    return tensors(lambda t: t.pop(name))


def nan_in(name):
    return tensors(lambda t: t[name][0].fill_(float("nan")))


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def overflowing(folder):
    edit_weights(folder, lambda t: t[GATE].fill_(1e6))
    load_pruned(str(folder), ratio=2, dtype="bfloat16")


def missing_shard(folder):
    load_pruned(str(folder)).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("*.safetensors"))[3].unlink()


def torch_file(folder):
    edit_config(folder, intermediate_size=20)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def one_layer(folder):
    save_tiny(folder, num_hidden_layers=1)
    edit_config(folder, intermediate_size=20)


def of_experts(folder):
    sizes = {**overrides("qwen3_moe", 16), "intermediate_size": 16}
    save_tiny(folder, "qwen3_moe", **sizes)
    edit_config(folder, intermediate_size=20, moe_intermediate_size=24)


UP, DOWN = (GATE.replace("gate", name) for name in ("up", "down"))
HALF, ANY_SHAPE = {"prune_percent": 50}, {"ignore_mismatched_sizes": True}
FLAT, WIDER = torch.ones(2816), torch.randn(5, 32, 1)
#: Whatever is asked.
DAMAGED = [
    (without("model.norm.weight"), "norm"),
    (without("lm_head.weight"), "lm_head"),
    (without(GATE), f"no tensor for {re.escape(GATE)}"),
    (tensors(lambda t: t.update({"x": t.pop(QUERY)})), "q_proj"),
    (tensors(lambda t: t.clear()), "no tensor|no weight"),
    *((with_tensor(GATE, each), GATE) for each in (FLAT[:0], FLAT[0], FLAT)),
    (with_tensor(GATE, FLAT.view(32, 88)), GATE),
    (with_tensor(GATE, WIDER), rf"^{re.escape(GATE)} has shape \[5, 32, 1\]"),
    (with_tensor(GATE.replace("weight", "bias"), FLAT[:88]), "bias"),
    (with_tensor(GATE.replace(".1.", ".3."), FLAT.view(88, 32)), "layers.3"),
    (with_tensor(UP, FLAT[:288].view(9, 32)), UP),
    (with_tensor(DOWN, FLAT[:288].view(32, 9)), DOWN),
    (missing_shard, "model-00004-of"),
    (config(intermediate_size=20), "0.mlp has 88 .* 20: correct intermediate_size"),
    (one_layer, "88 neurons .* says 20"),
    (torch_file, "88 neurons .* says 20"),
    (of_experts, "0.mlp has 16 .* 20: correct intermediate_size"),
]
HEAD, WORDS = "lm_head.weight", torch.ones(200, 32)
CASES = [
    *((*row, asked) for row in DAMAGED for asked in ({}, HALF)),
    (with_tensor(GATE, WIDER), "5, 32, 1", {"ratio": 1, **ANY_SHAPE}),
    (config(intermediate_size=20), "20: correct", ANY_SHAPE),
    *(
        (nan_in(name), f"{name} holds .* NaN", {"ratio": 1})
        for name in (GATE, UP, DOWN)
    ),
    (overflowing, rf"{GATE} holds \d+ NaN or inf", {"ratio": 1, "dtype": "float16"}),
    (with_tensor(QUERY, FLAT[:512].view(16, 32)), "q_proj.weight has shape", {}),
    (with_tensor(GATE[6:], FLAT[:288].view(9, 32)), "gate_proj", {}),
    (with_tensor(HEAD, WORDS), r"lm_head.* \[200, 32\]", {"ratio": 1}),
    *(
        (config(quantization_config={"quant_method": each, "bits": 4}), each, {})
        for each in ("gptq", "awq", "bitsandbytes", "torchao")
    ),
]


@pytest.mark.parametrize(("change", "word", "asked"), CASES)
def test_what_is_wrong_is_named(tiny_llama, tmp_path, change, word, asked):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    change(folder)
    with pytest.raises((ValueError, OSError), match=word):
        load_pruned(str(folder), **asked)


def test_tensors_that_nothing_asks_for_do_no_harm(tiny_llama):
    with copy_of(tiny_llama) as folder:
        edit_weights(folder, lambda t: t.update({"junk": torch.ones(3)}))
        assert refusal(folder) is None
        # Of two names for one weight, the one counts that stock transformers takes.
        stray = {GATE.removeprefix("model."): torch.ones(88, 32)}
        edit_weights(folder, lambda t: t.update(stray))
        stock = AutoModelForCausalLM.from_pretrained(folder)
        assert_same_model(load_pruned(str(folder)), stock)
        pruned = load_pruned(str(folder), ratio=1)
        assert_same_model(pruned, prune_model(stock, ratio=1))


# A config that lies, and files of nonsense.

KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "num_key_value_heads",
    "vocab_size",
    "pad_token_id",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "dtype",
    "model_type",
    "layer_types",
    "quantization_config",
]
garbage = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([10**12, 10**30, -(10**12)]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2),
)
ONCE_GOT_THROUGH = {
    "hidden_size": (0, 64, 10**30),
    "num_attention_heads": (0, 2),
    "head_dim": (0, 10**30),
    "vocab_size": (0, 300),
    "dtype": (0, "abc", []),
    "hidden_act": ("abc",),
    "quantization_config": ("abc",),
    "layer_types": (1,),
    "intermediate_size": (-1,),
    "num_hidden_layers": (2,),
    "pad_token_id": (10**12,),
    "num_key_value_heads": (0,),
    "model_type": ([],),
}


def examples(test):
    for key, values in ONCE_GOT_THROUGH.items():
        for value in values:
            test = example({key: value})(test)
    return test


@examples
@given(st.dictionaries(st.sampled_from(KEYS), garbage, min_size=1, max_size=3))
def test_a_config_that_lies_is_refused_or_obeyed(tiny_llama, changes):
    layers = changes.get("num_hidden_layers")
    # No more layers than can be built.
    assume(not isinstance(layers, (int, float)) or layers <= 300)
    with copy_of(tiny_llama) as copy:
        edit_config(copy, **changes)
        named = ["config", "model type", "model_type", "quant_method", "ratio=1"]
        refusal(copy, names=[*named, *changes])


#: A file, and what it says.
NONSENSE = [
    *(("config.json", each) for each in ("", "null", "1", "[]", "{", "{}")),
    ("config.json", '{"model_type": {}}'),
    *((INDEX, each) for each in ("", "{", "{}", "[]", "null")),
    *((INDEX, f'{{"weight_map": {each}}}') for each in ("{}", "null")),
    *(
        (INDEX, f'{{"metadata": {{}}, "weight_map": {{"a": {each}}}}}')
        for each in ("1", '"b"', '"missing.safetensors"', '"config.json"')
        + ('"../../../etc/hostname"',)
    ),
]


@pytest.mark.parametrize(("file", "text"), NONSENSE)
def test_a_file_of_nonsense_is_refused(tiny_llama_sharded, file, text):
    with copy_of(tiny_llama_sharded) as folder:
        (folder / file).write_text(text)
        assert refusal(folder) is not None
