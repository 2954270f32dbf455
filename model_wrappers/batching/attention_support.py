"""Which models let a token see a chosen set of the tokens before it.

`PrefixSharingMixin` and `SlotRefillingMixin` give a model masks, positions and a cache
that it does not get elsewhere. A model whose attention looks both ways, or counts tokens
by their place in the row, would answer wrongly and raise nothing. Therefore only model
types that were tried take a fast path; everything else can be read off config and class.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Model types of transformers whose answers with shared prefixes and in slots are `HFLM`'s.
#: To add one, write it here and run `test_every_known_architecture`, a slow test.
PLAIN_ATTENTION = frozenset({
    "afmoe", "apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere", "cohere2", "cwm",
    "deepseek_v2", "deepseek_v3", "diffllama", "ernie4_5", "ernie4_5_moe", "exaone", "exaone4",
    "falcon", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4",
    "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "jetmoe", "llama", "llama4",
    "llama4_text", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma", "xglm",
})  # fmt: skip


def base_model(model: Any) -> PreTrainedModel:
    """Return the model that an adapter may be wrapped around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def config_of(lm: Any) -> PretrainedConfig:
    """Return the config that an `HFLM` runs with."""
    # HFLM's own is what the checkpoint says, not what became of it on loading.
    return base_model(lm.model).config


def is_encoder_decoder(lm: Any) -> bool:
    """Return whether an `HFLM` runs its model as an encoder and a decoder.

    Its `backend` decides, which its caller may have chosen, not the model's config.
    """
    return lm.backend == "seq2seq"


def cache_argument(model: Any) -> str:
    """Return the name of the argument of ``forward`` that takes a cache."""
    # Renamed in transformers 5.24.
    arguments = inspect.signature(type(base_model(model)).forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def unsupported_reason(lm: Any) -> str | None:
    """Return why an `HFLM` cannot take a fast path, or None if nothing speaks against it."""
    if is_encoder_decoder(lm):
        return "the model is an encoder-decoder"
    accelerator = getattr(lm, "accelerator", None)
    if accelerator and accelerator.distributed_type == "FSDP":
        return "its weights are spread over processes that have to keep step"
    for adapter in (getattr(lm.model, "peft_config", None) or {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind not in ("LORA", "IA3"):
            return (
                f"its adapter ({kind}) may look at the whole row; LoRA and IA3 do not"
            )
        if getattr(adapter, "alora_invocation_tokens", None):
            return (
                "its adapter begins to work at a token that it searches for in the row"
            )
    model, config = base_model(lm.model), config_of(lm)
    kind = config.model_type
    if kind not in PLAIN_ATTENTION:
        return f"{kind} is not among the model types that were tried"
    if not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not a class of transformers"
    config = config.get_text_config()
    if getattr(config, "alibi", False):
        return f"{kind} has ALiBi, which counts tokens by their place in the row"
    both_ways = getattr(config, "use_bidirectional_attention", False)
    if both_ways or getattr(config, "is_causal", True) is False:
        return "its config makes attention look both ways"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention} takes no explicit mask: pass attn_implementation=sdpa"
    try:
        sequence_limit(config)
    except RuntimeError:
        # transformers raises where one setting has a value per layer.
        return f"{kind} has layers whose windows are set one by one"
    return None


def row_limit(config: PretrainedConfig) -> int | None:
    """Return the most tokens in a row of several requests, or None for any.

    Llama 4 scales attention by the place of a token in cache and row, not by its position,
    from ``floor_scale`` places on: path and row have half of them each.
    """
    config = config.get_text_config()
    if not getattr(config, "attn_temperature_tuning", False):
        return None
    return max(1, int(config.floor_scale) // 2)


def sequence_limit(config: PretrainedConfig) -> int | None:
    """Return the longest sequence, in tokens, whose attention is plain, or None for any.

    Beyond it a window cuts off tokens, positions are scaled by the length of the batch, or
    attention is scaled by the place of a token in its row.
    """
    config = config.get_text_config()
    windows = ("sliding_window", "attention_chunk_size", "window_size")
    limits = [getattr(config, name, None) for name in windows]
    limits.append(row_limit(config))
    rope = getattr(config, "rope_parameters", None) or {}
    # One setting, or one for each type of layer.
    by_layer = rope and all(isinstance(scaling, dict) for scaling in rope.values())
    for scaling in rope.values() if by_layer else [rope]:
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            limits.append(
                scaling.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return min((n for n in limits if isinstance(n, int) and n > 0), default=None)
