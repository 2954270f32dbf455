"""Greedy generation: which settings ask for more, what ends a text, how many tokens it has."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig

# What of a generation config plays no part in greedy decoding, or is set by HFLM.
_WITHOUT_EFFECT = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_length",
    "min_p",
    "pad_token_id",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
}
# Values besides None and False that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_implementation": ("dynamic", "hybrid", "static"),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
}


def unsupported_setting(
    generation_config: GenerationConfig, kwargs: dict[str, Any]
) -> str | None:
    """Return what would make generation more than greedy, or None.

    Args:
        generation_config: The model's own.
        kwargs: What a task asks for on top of it, as `normalize_gen_kwargs` returns it.
    """
    if kwargs.get("do_sample") is not False:
        return "do_sample"
    if "max_length" in kwargs:
        return "max_length"
    config = copy.deepcopy(generation_config)
    relevant = {k: v for k, v in kwargs.items() if k not in _WITHOUT_EFFECT}
    for name in config.update(**relevant):
        return name
    for name, value in config.to_diff_dict().items():
        if (
            name not in _WITHOUT_EFFECT
            and not name.startswith("_")
            and value is not None
            and value is not False
            and value not in _NEUTRAL.get(name, ())
        ):
            return f"{name}={value}"
    return None


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end a text, from the generation config of `model`."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def count_generated(tokens: Tensor, ends: list[int]) -> int:
    """Count generated tokens, up to and with the first end-of-text token of each row.

    Args:
        tokens: Shape (rows, steps): what ``generate`` returned, without the prompts.
        ends: Ids that end a row; what follows is padding.
    """
    if not ends:
        return tokens.numel()
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).int()
    ended_before = is_end.cumsum(1) - is_end
    return int((ended_before == 0).sum())
