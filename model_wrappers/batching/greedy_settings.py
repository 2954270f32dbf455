"""What of a generation's settings greedy decoding can do without, and where it stops."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import GenerationConfig

# What of a generation config has no part in greedy decoding, or is set by HFLM.
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
# Values that change nothing.
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
        kwargs: What a task asks for on top of it.
    """
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


class StopStrings:
    """Finds stop strings where `lm_eval.models.utils_hf.MultiTokenEOSCriteria` does."""

    def __init__(self, tokenizer: Any, until: list[str]) -> None:
        self.tokenizer = tokenizer
        #: Stop strings by the number of last tokens to look for them in.
        self.windows: dict[int, list[str]] = {}
        for string in until:
            length = len(tokenizer.encode(string, add_special_tokens=False)) + 2
            self.windows.setdefault(length, []).append(string)

    def found(self, tokens: list[int], prompt: int) -> bool:
        """Say whether one is in `tokens`, of which the first `prompt` are not looked at."""
        for length, strings in self.windows.items():
            begin = max(prompt, len(tokens) - length)
            text = self.tokenizer.decode(tokens[begin:])
            if any(string in text for string in strings):
                return True
        return False
