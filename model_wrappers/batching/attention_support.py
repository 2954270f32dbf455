"""Which models let a token see an arbitrary set of tokens before it.

`PrefixSharingMixin` and `SlotRefillingMixin` give a model masks, positions and a cache
of their own making. What is asked here can be read off a model without running it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from .trial_model import REFUSALS, TrialImpossible, trial_model


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

# The difference that rounding explains between float32 logits of random tokens, as root
# mean square, in units of their spread. What sees other tokens differs by its order.
_ROUNDING = 1e-4


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


def _forward_arguments(model: Any) -> set[str]:
    return set(inspect.signature(type(base_model(model)).forward).parameters)


def cache_argument(model: Any) -> str:
    """Return the name of the argument of ``forward`` that takes a cache."""
    # Renamed in transformers 5.24.
    return "cache" if "cache" in _forward_arguments(model) else "past_key_values"


def unsupported_reason(lm: Any) -> str | None:
    """Return why prefixes cannot be shared on an `HFLM`, or None if nothing speaks against it.

    What cannot be read off the model shows in `trial_disagrees`.
    """
    if is_encoder_decoder(lm):
        return "the model is an encoder-decoder"
    if reason := _adapter_reason(lm.model):
        return reason
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


def row_limit(config: PretrainedConfig) -> int | None:
    """Return the most tokens in a row of several requests, or None for any.

    Llama 4 scales attention by the place of a token in cache and row, not by its position,
    from ``floor_scale`` places on: path and row have half of them each.
    """
    config = config.get_text_config()
    if not getattr(config, "attn_temperature_tuning", False):
        return None
    return max(1, int(config.floor_scale) // 2)


#: Adapters of peft that change a module's output by what the token at hand gives it.
#: Left out are prompts, ADAPTION_PROMPT and SHADOW, which add tokens or states of their
#: own, and LILY, POLY and XLORA, which weigh their parts by all tokens of a pass.
_TOKEN_BY_TOKEN = frozenset(
    [
        "ADALORA",
        "ADAMSS",
        "BEFT",
        "BOFT",
        "C3A",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "LORA",
        "MISS",
        "OFT",
        "OSF",
        "PEANUT",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "TRAINABLE_TOKENS",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    ]
)


def _adapter_reason(model: Any) -> str | None:
    """Return what an adapter does that depends on more than the token at hand, or None."""
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if adapter.is_prompt_learning:
            return "its adapter puts virtual tokens in front of each request"
        if kind not in _TOKEN_BY_TOKEN:
            return f"its adapter ({kind}) is none of those that look at one token at a time"
        if getattr(adapter, "alora_invocation_tokens", None):
            return (
                "its adapter begins to work at a token that is searched for in the row"
            )
    return None


def sequence_limit(config: PretrainedConfig) -> int | None:
    """Return the longest sequence, in tokens, whose attention is plain, or None for any.

    Beyond it a window cuts off tokens, positions are scaled by the length of the batch, or
    attention is scaled by the place of a token in its row.
    """
    config = config.get_text_config()
    limits = []
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window > 0:
            limits.append(window)
    if (row := row_limit(config)) is not None:
        limits.append(row)
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


def trial_disagrees(
    model: Any, expected: Callable[[Any], Tensor], got: Callable[[Any], Tensor]
) -> str | None:
    """Compare two ways to compute logits on a trial model; return what differs, or None.

    Args:
        model: A model, perhaps with an adapter around it.
        expected: Computes logits of some tokens of the trial model, the plain way.
        got: Computes the same logits in the way that is in question, [..., vocabulary].

    Source: `.trial_model`.
    """
    try:
        trial = trial_model(base_model(model))
    except TrialImpossible as reason:
        return str(reason)
    right = expected(trial).double()
    try:
        answer = got(trial).double()
    except REFUSALS as error:
        return f"the model's code rejects them ({type(error).__name__}: {error})"
    difference = (answer - right).square().mean().sqrt().item()
    spread = right.std(-1).mean().item()
    if difference <= _ROUNDING * spread:
        return None
    return (
        f"the model's logits change with them (by {difference:.1e}, of a spread of "
        f"{spread:.1e}, on a small random model of its class in float32)"
    )
