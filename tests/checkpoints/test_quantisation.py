"""Quantising the pruned weights while they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from tests.helpers import checkpoints, evaluations
from tests.helpers.layouts import logits


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**arguments):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**arguments)


EIGHT = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
#: What makes the config, and how the harness's command line asks for it.
KINDS = {
    "torchao-int8": (torchao_int8, None),
    "bitsandbytes-8bit": (lambda: bitsandbytes(**EIGHT), EIGHT),
    "bitsandbytes-nf4": (lambda: bitsandbytes(**NF4), NF4),
}
each_kind = pytest.mark.parametrize(("config", "written"), KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a checkpoint whose rows are whole blocks of every kind."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    return checkpoints.save_tiny(
        tmp_path_factory.mktemp("source"),
        **sizes,
        num_hidden_layers=12,
        dtype=torch.bfloat16,
        max_shard_size="100KB",
    )


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export_pruned(str(source), folder, prune_arguments={"ratio": 2})


@pytest.mark.slow
@each_kind
def test_equals_quantising_the_exported_checkpoint(source, exported, config, written):
    quantised = load_pruned(str(source), ratio=2, quantization_config=config())
    stock = AutoModelForCausalLM.from_pretrained(
        exported.folder, quantization_config=config()
    )
    gate, expected = (m.model.layers[0].mlp.gate_proj for m in (quantised, stock))
    assert type(gate) is type(expected)
    assert type(gate.weight) is type(expected.weight)
    assert gate.out_features == 128
    assert torch.equal(logits(quantised), logits(stock))
    # Neurons are ranked by the weights before they are quantised.
    assert quantised.prune_record.digest == exported.record.digest
    plain = logits(load_pruned(str(source), ratio=2))
    assert not torch.equal(logits(quantised), plain)


@pytest.mark.slow
def test_an_export_is_quantised_saved_and_opened_again(exported, tmp_path):
    """As docs/models.md has it."""
    int8 = {"quantization_config": torchao_int8()}
    model = AutoModelForCausalLM.from_pretrained(exported.folder, **int8)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.gate_proj.weight) is not torch.nn.Parameter
    assert torch.equal(logits(again), logits(model))


def write_gguf(folder, file):
    """Write a Llama as llama.cpp's converter does: rows of q and k reordered, norms as they are."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra 'test')")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, kind = model.config, gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads}
        heads["k_proj"] = config.num_key_value_heads
        if (count := heads.get(name.split(".")[-2])) is not None:
            rows = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2)
            tensor = rows.reshape(tensor.shape)
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_an_export_goes_through_gguf_and_back(exported, tmp_path):
    write_gguf(exported.folder, tmp_path / "pruned.gguf")
    given = {"gguf_file": "pruned.gguf", "dtype": torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert again.config.intermediate_size == 128
    plain = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32)
    assert torch.equal(logits(again), logits(plain))


@pytest.mark.slow
@each_kind
def test_layers_of_different_width_are_quantised(source, config, written):
    some, every, none = (
        load_pruned(str(source), quantization_config=config(), **asked)
        for asked in ({"ratio": 2, "layers": 1}, {"ratio": 2}, {})
    )
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer, like in ((0, none), (1, every)):
            one, other = (m.model.layers[layer].mlp(hidden) for m in (some, like))
            assert torch.equal(one, other)


@pytest.mark.slow
@each_kind
def test_through_the_harness(source, exported, config, written):
    from lm_eval.models.huggingface import HFLM

    if written is None:
        as_json = json.loads(json.dumps(config().to_dict()))
        written = {"quantization_config": as_json}
    arguments = {"pretrained": str(source), "ratio": 2, **written}
    scores, found = evaluations.evaluate("pruned-hf", arguments, limit=2)
    stock = AutoModelForCausalLM.from_pretrained(
        exported.folder, quantization_config=config()
    )
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    lm = HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=4)
    assert scores == evaluations.evaluate(lm, {}, limit=2)[0]
    assert found["pruning"]["intermediate_size_after"] == 128


def test_a_quantised_checkpoint_is_refused(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=torchao_int8()
    )
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"quantised already .quant_method=torchao"):
        load_pruned(str(tmp_path), ratio=2)
