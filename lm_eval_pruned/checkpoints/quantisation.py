"""Quantising while loading: the arguments for it, in the form transformers 5 takes.

lm-evaluation-harness passes ``load_in_8bit`` and its kin on as they are, which
transformers 5 no longer accepts; there they belong into a `BitsAndBytesConfig`.
"""

from __future__ import annotations

import re
from typing import Any


#: Arguments of `transformers.BitsAndBytesConfig`, as they are given to ``hf``.
_BITSANDBYTES = re.compile(r"load_in_[48]bit|bnb_4bit_\w+|llm_int8_\w+")


def quantising_arguments(arguments: dict[str, Any]) -> list[str]:
    """Return the names of the arguments that quantise the model while it loads."""
    return [
        name
        for name, value in arguments.items()
        if value and name in ("quantization_config", "load_in_8bit", "load_in_4bit")
    ]


def with_quantisation(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` with one object that says how to quantise.

    Args:
        arguments: May hold ``quantization_config`` as an object or as the dict of
            one, or the arguments of `BitsAndBytesConfig`.

    Raises:
        ValueError: It holds both, or what it holds is no quantisation.
        ImportError: The package that quantises is missing; transformers names it.
    """
    given = {
        name: value
        for name, value in arguments.items()
        if _BITSANDBYTES.fullmatch(name)
    }
    others = {name: v for name, v in arguments.items() if name not in given}
    config = others.get("quantization_config")
    quantising = quantising_arguments(given)
    if quantising and config is not None:
        raise ValueError(
            f"{quantising[0]} and quantization_config both say how to quantise: pass one."
        )
    if quantising:
        from transformers import BitsAndBytesConfig

        others["quantization_config"] = BitsAndBytesConfig(**given)
    elif isinstance(config, dict):
        from transformers.quantizers import AutoQuantizationConfig

        try:
            others["quantization_config"] = AutoQuantizationConfig.from_dict(config)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"quantization_config={config} is no quantisation that transformers knows ({error})."
            ) from None
    return others
