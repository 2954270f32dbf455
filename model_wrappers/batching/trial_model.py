"""A tiny random model of a model's class, to see in float32 what its attention does.

Whether a class takes masks, positions and caches of our making is a property of its code
and config, not of its weights, width or dtype. In 16 bits rounding hides a wrong answer
and makes a right one look wrong; in float32 the two are a factor of a thousand apart.
"""

from __future__ import annotations

import copy
import json
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: What a model's code raises where config, masks or shapes do not suit it.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
# Parameters of the largest trial model, 400 MB.
_MOST_PARAMETERS = 10**8
_VOCABULARY = 1000
_WIDTH = 64
_MOST_HEADS = 4

_WIDTH_KEYS = (
    "d_ff",
    "decoder_ffn_dim",
    "encoder_ffn_dim",
    "ffn_dim",
    "ffn_hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "n_inner",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_HEADS_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_HIDDEN_KEYS = ("hidden_size", "n_embd", "d_model")
_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_made: dict[tuple[type, str], PreTrainedModel] = {}


class TrialImpossible(Exception):
    """No small model of a class can be made; the message is a clause that says why."""


def trial_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a tiny model of the class of `model`, random, in float32, on the CPU.

    Its config is that of `model` with fewer heads, layers and tokens and narrower MLPs;
    everything else that could decide what a token sees stays, and every kind of layer is
    in it. It is drawn from a seed of its own, and made once per class and config.

    Args:
        model: A transformers model, without the adapter around it.

    Raises:
        TrialImpossible: None of the small configs that were tried gives a model.
    """
    reasons = []
    for heads, tokens in ((True, True), (False, True), (True, False), (False, False)):
        try:
            config = _small_config(model.config, heads=heads, tokens=tokens)
            written = json.dumps(config.to_dict(), default=str, sort_keys=True)
            key = type(model), f"{written} {config._attn_implementation}"
            if key not in _made:
                _made[key] = _build(type(model), config)
            return _made[key]
        except REFUSALS as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise TrialImpossible(
        f"no small model of its class can be made to try it out ({reasons[0]:.200})"
    )


def _build(model_class: type, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"it would have {size:,} parameters")
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).to(torch.float32).eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                # Biases and norms too, so that a position that is forgotten shows.
                parameter.copy_(1.0 + 0.3 * values)
            else:
                parameter.copy_(values / min(parameter.shape[-2:]) ** 0.5)
        model(input_ids=torch.tensor([[1, 2, 3]]))
    return model


def _small_config(
    config: PretrainedConfig, *, heads: bool, tokens: bool
) -> PretrainedConfig:
    """Return a smaller config; not every class can do with fewer heads or tokens."""
    small = copy.deepcopy(config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(small, name):
            delattr(small, name)
    text = small.get_text_config()
    _alike(text)
    for name in small.sub_configs:
        if (other := getattr(small, name, None)) not in (None, text):
            _fewer_layers(other)
            _narrower(other)
    if getattr(text, "_experts_implementation", None) is not None:
        text._experts_implementation = "eager"
    _fewer_layers(text)
    _narrower(text)
    if heads:
        _fewer_heads(text)
    if tokens:
        _fewer_tokens(text)
    return small


def _alike(config: PretrainedConfig) -> None:
    """Take widths of single layers out of the config: narrow ones are all alike."""
    if not getattr(config, "is_heterogeneous", False):
        return
    layers = config.to_dict().get("per_layer_config") or {}
    rest = {
        layer: kept
        for layer, own in layers.items()
        if (kept := {k: v for k, v in own.items() if k not in _WIDTH_KEYS})
    }
    config.per_layer_config = None  # type: ignore[attr-defined]
    if rest:
        config.per_layer_config = rest  # type: ignore[attr-defined]


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except AttributeError:
        # A size that follows from others.
        pass


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> tuple[str, int] | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return name, value
    return None


def _fewer_layers(config: PretrainedConfig) -> None:
    """Keep the first layers, as many as it takes to have one of each kind, two at least."""
    found = _first(config, _LAYERS_KEYS)
    if found is None:
        return
    name, layers = found
    kinds = {
        key: [json.dumps(kind, default=str) for kind in value]
        for key, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == layers
    }
    kept = min(2, layers)
    for values in kinds.values():
        # All different: these are numbers of layers, not kinds.
        if len(set(values)) < layers:
            kept = max(kept, *(values.index(kind) + 1 for kind in set(values)))
    dense = getattr(config, "first_k_dense_replace", None)
    if isinstance(dense, int) and dense > 1:
        _set(config, "first_k_dense_replace", 1)
    _set(config, name, kept)
    for key in kinds:
        _set(config, key, list(getattr(config, key))[:kept])


def _narrower(config: PretrainedConfig) -> None:
    for name in _WIDTH_KEYS:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            _set(config, name, [_WIDTH] * len(value))
        elif isinstance(value, int) and not isinstance(value, bool) and value > _WIDTH:
            _set(config, name, _WIDTH)


def _fewer_heads(config: PretrainedConfig) -> None:
    hidden, heads = _first(config, _HIDDEN_KEYS), _first(config, _HEADS_KEYS)
    if hidden is None or heads is None or heads[1] <= _MOST_HEADS:
        return
    groups = getattr(config, "num_key_value_heads", None)
    fewer = _MOST_HEADS
    if isinstance(groups, int) and groups > 0:
        # As many queries share a key as before, or two.
        fewer_groups = _MOST_HEADS if groups == heads[1] else min(groups, 2)
        _set(config, "num_key_value_heads", fewer_groups)
    _set(config, heads[0], fewer)
    size = hidden[1] // gcd(hidden[1], heads[1]) * fewer
    if hidden[1] % heads[1] == 0:
        size = hidden[1] // heads[1] * fewer
    _set(config, hidden[0], size)


def _fewer_tokens(config: PretrainedConfig) -> None:
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or size <= _VOCABULARY:
        return
    _set(config, "vocab_size", _VOCABULARY)
    for name in list(vars(config)):
        value = getattr(config, name, None)
        if (
            name.endswith("_token_id")
            and isinstance(value, int)
            and value >= _VOCABULARY
        ):
            _set(config, name, _VOCABULARY - 1)
