"""Which models let a token see an arbitrary set of tokens before it.

`PrefixSharingMixin` and `SlotRefillingMixin` give a model masks, positions and a cache
of their own making. What is asked here can be read off a model without running it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.01}


def rounding(dtype: torch.dtype) -> float:
    """Return the difference that rounding explains in the logits of random tokens.

    As root mean square, in units of the spread of what is compared.
    """
    return _ROUNDING.get(dtype, 0.05)


def base_model(model: Any) -> PreTrainedModel:
    """Return the model that an adapter may be wrapped around."""
    return model.getbase_model() if hasattr(model, "getbase_model") else model


def config_of(lm: Any) -> PretrainedConfig:
    """Return the config that an `HFLM` runs with."""
    # HFLM's own is what the checkpoint says, not what became of it on loading.
    return base_model(lm.model).config


def _forward_arguments(model: Any) -> set[str]:
    return set(inspect.signature(type(base_model(model)).forward).parameters)


def cache_argument(model: Any) -> str:
    """Return the name of the argument of ``forward`` that takes a cache."""
    # Renamed in transformers 5.24.
    return "cache" if "cache" in _forward_arguments(model) else "past_key_values"


def unsupported_reason(lm: Any) -> str | None:
    """Return why prefixes cannot be shared on an `HFLM`, or None if nothing speaks against it.

    What cannot be read off the model shows in the comparison at the first use.
    """
    if lm.backend != "causal":
        return "the model is an encoder-decoder"
    if getattr(lm.model, "active_peft_config", None) is not None and (
        lm.model.active_peft_config.is_prompt_learning
    ):
        return "its adapter puts virtual tokens in front of each request"
    model = base_model(lm.model)
    config = config_of(lm).get_text_config()
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} keeps a recurrent state, which cannot branch"
    odd = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    if odd:
        return f"{config.model_type} has layers of type {', '.join(sorted(odd))}"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return f"{config.model_type} has ALiBi, which counts tokens by their place in the row"
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        return f"{config.model_type} has positions of several dimensions"
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention} takes no mask of its own; sdpa and eager do"
    if model.get_output_embeddings() is None:
        return f"{config.model_type} has no output embedding to be found"
    missing = {"position_ids", "attention_mask", cache_argument(model)}
    missing -= _forward_arguments(model)
    if missing:
        return f"{config.model_type} takes no {', '.join(sorted(missing))}"
    try:
        sequence_limit(config)
    except RuntimeError:
        # transformers raises where one setting has a value per layer.
        return f"{config.model_type} has layers whose windows are set one by one"
    return None


def sequence_limit(config: PretrainedConfig) -> int | None:
    """Return the longest sequence, in tokens, whose attention is plain, or None for any.

    Beyond it a window cuts off tokens, or positions are scaled by the length of the batch.
    """
    config = config.get_text_config()
    limits = []
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window > 0:
            limits.append(window)
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = (
        rope.values()
        if rope and all(isinstance(r, dict) for r in rope.values())
        else [rope]
    )
    for scaling in scalings:
        if scaling.get("rope_type") in ("dynamic", "longrope"):
            limits.append(
                scaling.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return min(limits) if limits else None
