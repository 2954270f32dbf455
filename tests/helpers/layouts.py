"""Tiny models of every GLU layout, for the tests of layouts."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import by_hand
from tests.helpers.checkpoints import (
    auto_class,
    byte_tokenizer,
    tiny_config,
    tiny_model,
)


#: So that results can be compared bit for bit at any width; see
#: `lm_eval_pruned.pruning.slicing.finish`.
EAGER = {"experts_implementation": "eager"}

_T5 = {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 256}
_T5 |= {"num_hidden_layers": 2, "num_decoder_layers": 2}
_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
_DEEPSEEK = {"n_routed_experts": 3, "n_shared_experts": 2, "n_group": 1}
_DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
_DEEPSEEK |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
_DEEPSEEK |= {"qk_nope_head_dim": 8, "v_head_dim": 8}
_LLAMA4 = {"num_experts_per_tok": 1, "moe_layers": [1], "interleave_moe_layer_step": 2}
_LFM2 = {"block_ffn_dim_multiplier": 1.0, "block_multiple_of": 1}
_LFM2["layer_types"] = ["conv", "full_attention", "conv"]
_BOTH = {"layer_types": ["full_attention", "sliding_attention"]}


def _overrides(width: int) -> dict[str, dict]:
    one = {"intermediate_size": width}
    dense, local = (
        {"intermediate_size": 3 * width},
        {**_EXPERTS, "num_local_experts": 3},
    )
    moe = {**_EXPERTS, "moe_intermediate_size": width}
    shared = {"shared_expert_intermediate_size": 2 * width + 1}
    return {
        "llama": {**one, "mlp_bias": True},
        "phi3": one,
        "glm4": one,
        "granitemoeshared": {**local, **one, "shared_intermediate_size": 3 * width},
        "t5": {**_T5, "d_ff": width},
        "umt5": {**_T5, "d_ff": width},
        "mixtral": {**local, **one},
        "qwen2_moe": {**moe, **shared, "num_experts": 3},
        "qwen3_moe": {**moe, **dense, "mlp_only_layers": [0], "num_experts": 3},
        "olmoe": {**_EXPERTS, **one, "num_experts": 3},
        "deepseek_v3": {**moe, **dense, **_DEEPSEEK},
        "gpt_oss": {**local, **one, **_BOTH},
        "llama4_text": {**local, **one, "intermediate_size_mlp": 2 * width, **_LLAMA4},
        "lfm2": {"intermediate_size": (3 * width + 1) // 2, **_LFM2},
    }


FAMILIES = tuple(_overrides(1))


def overrides(family: str, width: int) -> dict:
    """Return config overrides of a model whose sizes refer to `width` neurons."""
    return _overrides(width)[family]


def save_family(folder, family: str, width: int):
    """Write a tiny checkpoint of a family with tokenizer and return the model."""
    config = tiny_config(family, **overrides(family, width))
    model = tiny_model(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return auto_class(config).from_pretrained(folder, **EAGER).eval()


def save_gemma3n(folder, widths, **more):
    """Write a checkpoint whose config has a list of widths, one per layer."""
    config = tiny_config(
        "gemma3n_text",
        **more,
        intermediate_size=widths,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * len(widths),
        activation_sparsity_pattern=[0.0] * len(widths),
    )
    tiny_model(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def layer_of(path: str) -> int:
    """Return the number of the layer that a module is in."""
    return int(re.search(r"\.(\d+)\.", path + ".")[1])


def ragged(folder, widths):
    """Write a checkpoint as other pruners do: one width in the config, many in fact."""
    model = save_family(folder, "llama", 16)
    kept_of = by_hand.best(lambda path, width: widths[layer_of(path)])
    state, _ = by_hand.sliced(model, kept_of)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model, state


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Return the logits of a fixed text, shape (2, tokens, vocabulary)."""
    # Matrix products round by the addresses of their operands, and weights may lie
    # anywhere in a mapped file.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    tokens = torch.arange(40, 62).view(2, 11)
    arguments = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens[:, :6]
    return model(**arguments, use_cache=False).logits


def breadth(families, *always: str) -> list[Any]:
    """Return families as parameters of a test; all but those that the fast tests have are slow."""
    slow = pytest.mark.slow
    return [f if f in always else pytest.param(f, marks=slow) for f in families]
