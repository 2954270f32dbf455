"""Damaged checkpoints: a clear error, or exactly what the files say."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from tests.helpers import by_hand
from tests.helpers.checkpoints import edit_config, edit_weights
from tests.helpers.comparing import assert_same_model


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


# Files that end early, or hold other bytes.


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


@given(
    key=st.sampled_from([GATE, QUERY]),
    field=st.sampled_from(["data_offsets", "shape", "dtype"]),
    value=st.one_of(
        st.none(),
        st.text(max_size=4),
        st.sampled_from(["F32", "I32", "U32", "F64", "BF16", "F8_E4M3", "F4"]),
        st.lists(st.integers(-2, 2**64), max_size=3),
        st.lists(st.sampled_from([0, 1, 32, 88, 2816, 2**40, 2**62]), max_size=3),
    ),
)
@example(QUERY, "dtype", "I32")
@example(QUERY, "shape", [1024])
@example(GATE, "shape", [32, 88])
@example(GATE, "data_offsets", [0, 2**62])
def test_a_header_that_lies_is_refused_or_consistent(tiny_llama, key, field, value):
    with copy_of(tiny_llama) as folder:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        header[key][field] = value
        encoded = json.dumps(header).encode()
        size_and_header = struct.pack("<Q", len(encoded)) + encoded
        path.write_bytes(size_and_header + content[8 + size :])
        refusal(folder, names=["q_proj.weight", "gate_proj.weight", "layers.1.mlp"])


# Tensors that are missing, renamed, swapped, or of another kind.


@st.composite
def surgery(draw, keys):
    """Draw a change to some of the tensors, as ``(names, function)``."""
    kind = draw(st.sampled_from(["drop", "rename", "swap", "reshape", "cast", "add"]))
    key, other = draw(st.sampled_from(keys)), draw(st.sampled_from(keys))
    shape = draw(st.lists(st.integers(0, 100), max_size=3))
    integers = [torch.int8, torch.int64, torch.bool, torch.uint16, torch.complex64]
    floats = [torch.float8_e4m3fn, torch.float64, torch.float16, torch.bfloat16]
    dtype = draw(st.sampled_from(integers + floats))
    name = draw(st.sampled_from([f"{key}x", key.replace("model.", ""), "junk"]))

    def change(tensors):
        if kind == "drop":
            del tensors[key]
        elif kind == "rename":
            tensors[name] = tensors.pop(key)
        elif kind == "swap":
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif kind == "reshape":
            tensors[key] = torch.ones(shape)
        elif kind == "cast":
            tensors[key] = tensors[key].to(dtype)
        else:
            tensors[name] = torch.ones(shape)

    return (key, other, name), change


@given(st.data(), st.sampled_from([{"ratio": 1}, {"ratio": 2.75}]))
def test_tensors_that_do_not_belong_are_refused(tiny_llama, data, arguments):
    keys = sorted(load_file(tiny_llama / "model.safetensors"))
    names, change = data.draw(surgery(keys))
    with copy_of(tiny_llama) as folder:
        edit_weights(folder, change)
        # Messages name a tensor, or the MLP that it belongs to.
        mlps = [name.rpartition(".mlp.")[0] for name in names]
        refusal(folder, [n for n in (*names, *mlps) if n], **arguments)


REFUSED = {
    "a norm is missing": lambda t: t.pop("model.norm.weight"),
    "the head is missing": lambda t: t.pop("lm_head.weight"),
    "attention is renamed": lambda t: t.update({f"{QUERY}x": t.pop(QUERY)}),
    "attention has other heads": lambda t: t.update({QUERY: torch.ones(16, 32)}),
    "gate is empty": lambda t: t.update({GATE: torch.ones(0, 32)}),
    "gate is a number": lambda t: t.update({GATE: torch.tensor(1.0)}),
    "gate is flat": lambda t: t.update({GATE: t[GATE].reshape(-1)}),
    "gate is transposed": lambda t: t.update({GATE: t[GATE].T.contiguous()}),
    "there is a bias too many": lambda t: t.update(
        {GATE.replace("weight", "bias"): torch.ones(88)}
    ),
    "there is a layer too many": lambda t: t.update(
        {GATE.replace("layers.1", "layers.3"): torch.ones(88, 32)}
    ),
    "a gate of another shape is there too": lambda t: t.update(
        {GATE.removeprefix("model."): torch.ones(7, 32)}
    ),
    "there is nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("arguments", [{"ratio": 1}, {"criterion": "maw"}])
def test_these_are_never_evaluated(tiny_llama, change, arguments):
    with copy_of(tiny_llama) as folder:
        edit_weights(folder, change)
        with pytest.raises(ValueError, match=r"checkpoint|no weight|config\.json"):
            load_pruned(str(folder), **arguments)


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


# A config that lies.

NUMBERS = (
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    + ["num_key_value_heads", "head_dim", "vocab_size", "pad_token_id"]
    + ["max_position_embeddings", "rms_norm_eps"]
)
OTHERS = ["hidden_act", "dtype", "model_type", "layer_types", "quantization_config"]
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
LIES = {
    "hidden_size": [0, 64, 10**30],
    "intermediate_size": [-1],
    "num_hidden_layers": [2],
    "num_attention_heads": [0, 2],
    "num_key_value_heads": [0],
    "head_dim": [0, 10**30],
    "vocab_size": [0, 300],
    "pad_token_id": [10**12],
    "hidden_act": ["abc"],
    "dtype": [0, "abc", []],
    "model_type": [[]],
    "layer_types": [1],
    "quantization_config": ["abc"],
}


def is_small(changes):
    """Whether a config asks for no more layers than can be built."""
    layers = changes.get("num_hidden_layers")
    return not isinstance(layers, (int, float)) or layers <= 300


def check_lies(folder, changes):
    with copy_of(folder) as copy:
        edit_config(copy, **changes)
        named = ["config", "model type", "model_type", "quant_method", "ratio=1"]
        refusal(copy, names=[*named, *changes])


@given(
    st.dictionaries(
        st.sampled_from(NUMBERS + OTHERS), garbage, min_size=1, max_size=3
    ).filter(is_small)
)
def test_a_config_that_lies_is_refused_or_obeyed(tiny_llama, changes):
    check_lies(tiny_llama, changes)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in LIES for value in LIES[key]]
)
def test_lies_that_once_got_through(tiny_llama, key, value):
    check_lies(tiny_llama, {key: value})


@pytest.mark.parametrize(
    "text", ["", "null", "1", "[]", "{", '{"model_type": {}}', "{}"]
)
def test_a_config_that_is_no_config_is_named(tiny_llama, text):
    with copy_of(tiny_llama) as folder:
        (folder / "config.json").write_text(text)
        assert refusal(folder) is not None


# An index that lies.


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[]", "null", '{"weight_map": {}}', '{"weight_map": null}']
    + ['{"metadata": {}, "weight_map": {"a": 1}}', '{"weight_map": {"a": "b"}}']
    + ['{"metadata": {}, "weight_map": {"a": "missing.safetensors"}}']
    + ['{"metadata": {}, "weight_map": {"a": "../../../etc/hostname"}}']
    + ['{"metadata": {}, "weight_map": {"a": "config.json"}}'],
)
def test_an_index_that_lies_is_refused(tiny_llama_sharded, text):
    with copy_of(tiny_llama_sharded) as folder:
        (folder / INDEX).write_text(text)
        assert refusal(folder) is not None


@given(st.data())
def test_an_index_without_some_shards_is_refused(tiny_llama_sharded, data):
    names = sorted(path.name for path in tiny_llama_sharded.glob("*.safetensors"))
    some = data.draw(st.sets(st.sampled_from(names), min_size=1))
    with copy_of(tiny_llama_sharded) as folder:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {f"t{i}": name for i, name in enumerate(sorted(some))}
        (folder / INDEX).write_text(json.dumps(index))
        error = refusal(folder, names=["no tensor for", "index"])
        assert (error is None) == (some == set(names))


@pytest.mark.slow
@given(st.data())
def test_shards_may_be_swapped_but_not_lost(tiny_llama_sharded, data):
    names = sorted(path.name for path in tiny_llama_sharded.glob("*.safetensors"))
    one, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    with copy_of(tiny_llama_sharded) as folder:
        content = (folder / other).read_bytes()
        (folder / other).write_bytes((folder / one).read_bytes())
        assert (refusal(folder, names=["no tensor for"]) is None) == (one == other)
        (folder / one).write_bytes(content)
        assert refusal(folder) is None
