"""Exports in other tools, as docs/models.md describes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from lm_eval_pruned.checkpoints.export import export_pruned
from tests.helpers.checkpoints import save_tiny
from tests.helpers.layouts import logits


pytestmark = pytest.mark.slow


@pytest.fixture
def exported(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    source = str(save_tiny(tmp_path / "whole", **sizes))
    export_pruned(source, tmp_path / "pruned", prune_arguments={"ratio": 2})
    return tmp_path / "pruned"


def test_an_export_is_quantised_saved_and_opened_again(exported, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    from torchao.quantization import Int8WeightOnlyConfig

    int8 = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(exported, quantization_config=int8)
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    gate = again.model.layers[0].mlp.gate_proj
    assert gate.out_features == 128
    assert type(gate.weight) is not torch.nn.Parameter
    assert torch.equal(logits(again), logits(model))


def write_gguf(model, file):
    """Write a Llama as llama.cpp's converter does, which reorders the rows of q and k."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra 'test')")
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
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
    arch = gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if count := heads.get(name.split(".")[-2]):
            rows = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2)
            tensor = rows.reshape(tensor.shape)
        new = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(new, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_export_goes_through_gguf_and_back(exported, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(exported)
    write_gguf(plain, tmp_path / "pruned.gguf")
    given = {"gguf_file": "pruned.gguf", "dtype": torch.float32}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert again.config.intermediate_size == 128
    assert torch.equal(logits(again), logits(plain))
