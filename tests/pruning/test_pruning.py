"""Pruning in memory: what it leaves alone, what it records and what it says."""

from __future__ import annotations

import copy
import hashlib
import itertools
import re
import struct

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning import slicing
from tests.helpers import checkpoints
from tests.helpers.layouts import logits, save_family


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_the_digest_is_what_its_docstring_says(model):
    record = prune_model(model, ratio=1).prune_record
    packed = b"".join(struct.pack("<q", i) for kept in record.kept for i in kept)
    assert record.digest == hashlib.sha256(packed).hexdigest()
    assert record.as_dict()["kept_digest"] == record.digest


def test_a_warning_says_how_to_open_what_no_key_expresses(tmp_path, caplog):
    """Encoder and decoder share a key."""
    model = save_family(tmp_path, "t5", 16)
    for block in model.decoder.block:
        mlp = block.layer[-1].DenseReluDense
        for linear, cut in ((mlp.wi_0, 0), (mlp.wi_1, 0), (mlp.wo, 1)):
            linear.weight = torch.nn.Parameter(linear.weight.narrow(cut, 0, 12).clone())
    record = prune_model(model, prune_percent=50).prune_record
    assert {group["width_after"] for group in record.groups} == {8, 6}
    assert record.inexpressible
    assert "open the saved model with --model pruned-hf" in caplog.text


def test_the_record_tells_kinds_apart(tmp_path):
    save_family(tmp_path, "deepseek_v3", 16)
    record = load_pruned(tmp_path, prune_percent=50).prune_record
    assert record.layers == 2
    assert [[*group.values()] for group in record.as_dict()["groups"]] == [
        ["dense", "intermediate_size", 48, 24, 1],
        ["expert", "moe_intermediate_size", 16, 8, 3],
        ["shared", "moe_intermediate_size", 32, 16, 1],
    ]


@pytest.mark.parametrize(
    ("asked", "after", "words"),
    [
        ({"ratio": 1, "layers": "0,2"}, (1.0, 32), ["criterion=maw", "(0,2 pruned)"]),
        ({"widths": {0: 20}}, (2.0417, 65.3333), ["widths by layer 0:20"]),
        ({}, (2.75, 88), ["baseline", "digest none"]),
    ],
)
def test_the_table_of_a_record_says_what_was_done(model, asked, after, words):
    record = prune_model(model, **asked).prune_record
    rows = [line.strip("|").split("|") for line in record.as_table().splitlines()]
    ratio, width, parameters = (
        [float(cell.replace(",", "")) for cell in row[1:]] for row in rows[2:5]
    )
    assert (ratio, width) == ([2.75, after[0]], [88, after[1]])
    assert parameters == [record.parameters_before, record.parameters_after]
    words = [*words, (record.digest or "none")[:12]]
    assert all(word in record.as_table() for word in words)


def test_what_is_not_pruned_keeps_its_very_parameters(model, caplog):
    before = dict(model.named_parameters())
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    prune_model(model, ratio=1, layers=1)
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) is ("layers.1.mlp" not in name), name
        assert parameter.requires_grad is ("layers.1.mlp.up_proj" not in name)
        assert parameter.is_leaf
    caplog.clear()
    prune_model(model, ratio=1)
    assert not caplog.messages
    model(torch.arange(12)[None]).logits.sum().backward()
    down = model.model.layers[1].mlp.down_proj.weight
    assert down.grad.shape == down.shape == (32, 32)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_cut_that_fails_half_way_leaves_the_model_as_it_was(
    family, tmp_path, monkeypatch
):
    model = save_family(tmp_path, family, 16)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    config, attributes = model.config.to_dict(), vars(model.model.layers[1].mlp).copy()
    calls, narrow = itertools.count(), slicing.narrow

    def fails_in_the_second_layer(*given):
        if next(calls) == 9:
            raise MemoryError
        return narrow(*given)

    with monkeypatch.context() as patch:
        patch.setattr(slicing, "narrow", fails_in_the_second_layer)
        with pytest.raises(MemoryError):
            prune_model(model, prune_percent=50)
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert vars(model.model.layers[1].mlp) == attributes
    assert model.config.to_dict() == config
    pruned = prune_model(model, prune_percent=50)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert hook.id in pruned.model.layers[0]._forward_hooks


@pytest.mark.parametrize(
    ("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)]
)
def test_experts_run_one_by_one_just_where_rows_are_unaligned(dtype, multiple, caplog):
    sizes = {"num_hidden_layers": 1, "intermediate_size": 24, "num_local_experts": 2}
    config = checkpoints.tiny_config("mixtral", **sizes)
    full = checkpoints.tiny_model(config).to(dtype)
    assert full.config._experts_implementation == "grouped_mm"
    for width in (1, 4, 7, 8, 12, 16, 23, 24):
        caplog.clear()
        pruned = prune_model(copy.deepcopy(full), intermediate_size=width)
        aligned = width % multiple == 0
        chosen = pruned.config._experts_implementation
        assert chosen == ("grouped_mm" if aligned else "eager"), width
        # That a cut did worse than chance is said once in a process, by whichever test comes first.
        told = [m for m in caplog.messages if "multiple_of=" in m]
        assert [f"multiple_of={multiple}" in m for m in told] == [True] * (not aligned)
        assert logits(pruned).isfinite().all()
    for implementation in ("batched_mm", "eager", "sonicmoe"):
        full.set_experts_implementation(implementation)
        pruned = prune_model(copy.deepcopy(full), intermediate_size=7)
        assert pruned.config._experts_implementation == implementation


@pytest.mark.parametrize(
    ("options", "width", "multiple"),
    [
        # Of 88 neurons.
        ({"prune_percent": 40}, 53, 8),
        ({"prune_percent": 40, "multiple_of": 3}, 51, 24),
        ({"prune_percent": 40, "multiple_of": 8}, None, None),
        ({"prune_percent": 40, "dtype": "float32"}, None, None),
        # A layer that keeps its width is not spoken of.
        ({"intermediate_size": 80, "layers": "0"}, None, None),
        ({}, None, None),
    ],
)
def test_a_notice_on_cuda_with_16_bit_weights_names_the_argument_to_add(
    options, width, multiple, tiny_llama, monkeypatch, caplog
):
    """The models of transformers say that they are on CUDA."""
    on_cuda = property(lambda model: torch.device("cuda"))
    monkeypatch.setattr(PreTrainedModel, "device", on_cuda)
    load_pruned(str(tiny_llama), **{"dtype": "bfloat16", **options})
    page = (checkpoints.ROOT / "docs" / "models.md").read_text("utf-8")
    (shown,) = re.findall(r"(?m)^> (8602 neurons .*)$", page)
    notice = shown.replace("8602", str(width)).replace("of=8", f"of={multiple}")
    notices = [message for message in caplog.messages if "CUDA" in message]
    assert notices == [notice] * (width is not None)
