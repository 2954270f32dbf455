"""The arguments of ``hf``, checked before HFLM meets them.

HFLM asserts some of them without a message, hands others to code that fails far from
the cause, and takes any text for true: ``trust_remote_code=off`` would run that code.
"""

from __future__ import annotations

import inspect
import os
import re
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.damage import misspelt
from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_place(value: Any) -> bool:
    return value is None or isinstance(value, (str, os.PathLike))


def _is_object(value: Any) -> bool:
    return not isinstance(value, (bool, int, float))


def _is_flag(value: Any) -> bool:
    return value is None or value in (True, False)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 1)


def _is_batch_size(value: Any) -> bool:
    written = re.fullmatch(r"auto(:[0-9]+(\.[0-9]+)?)?|0*[1-9][0-9]*", str(value))
    return type(value) in (int, str) and written is not None


def _is_dtype(value: Any) -> bool:
    if isinstance(value, str):
        return value == "auto" or isinstance(getattr(torch, value, None), torch.dtype)
    return value is None or isinstance(value, torch.dtype)


def _is_backend(value: Any) -> bool:
    return value in ("default", "causal", "seq2seq")


def _is_quantisation(value: Any) -> bool:
    return value is None or isinstance(value, dict) or hasattr(value, "quant_method")


_FLAG = (_is_flag, "true or false")
_PLACE = (_is_place, "a name or path")
_OBJECT = (_is_object, "a name or path")
_COUNT = (_is_count, "a whole number of 1 or more")
_DTYPE = (_is_dtype, "a dtype such as bfloat16")

_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "add_bos_token": _FLAG,
    "attn_implementation": (_is_object, "one such as eager or sdpa"),
    "backend": (_is_backend, "default, causal or seq2seq"),
    "batch_size": (_is_batch_size, "a whole number of 1 or more, auto or auto:4"),
    "delta": _PLACE,
    "device": (_is_text, "one such as cpu, cuda or cuda:0"),
    "dtype": _DTYPE,
    "gguf_file": _PLACE,
    "load_in_4bit": _FLAG,
    "load_in_8bit": _FLAG,
    "logits_cache": _FLAG,
    "max_batch_size": _COUNT,
    "max_length": _COUNT,
    "mixed_precision_dtype": _DTYPE,
    "parallelize": _FLAG,
    "peft": _PLACE,
    "pretrained": _OBJECT,
    "quantization_config": (_is_quantisation, "a dict, or load_in_8bit=true instead"),
    "softmax_dtype": _DTYPE,
    "subfolder": (_is_text, "a path"),
    "tokenizer": _OBJECT,
    "truncation": _FLAG,
    "trust_remote_code": _FLAG,
    "use_fast_tokenizer": _FLAG,
}


def check_hf_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse values that HFLM would stumble over.

    Args:
        arguments: Keyword arguments of HFLM; those not known here are left alone.

    Raises:
        ValueError: One of them has no value that HFLM can use.
    """
    for name, value in arguments.items():
        accepts, expected = _EXPECTED.get(name, (None, ""))
        if accepts is not None and not accepts(value):
            raise ValueError(f"{name}={value} is not understood: pass {expected}.")


def argument_names(model_type: type) -> set[str]:
    """Return the names of the arguments of a model type, without those that it passes on."""
    return {
        name
        for each in model_type.__mro__
        if "__init__" in vars(each)
        for name in inspect.signature(vars(each)["__init__"]).parameters
    } - {"self", "args", "kwargs"}


def check_names(arguments: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse arguments of a model type whose names are misspelt.

    Args:
        arguments: Those that were given.
        known: Names that the model type knows.

    Raises:
        ValueError: A name is unknown and resembles a known one.
    """
    found = misspelt(arguments, known, lambda: _config(arguments))
    if found is not None:
        name, near = found
        raise ValueError(
            f"{name}={arguments[name]} is not understood: did you mean {near}?"
        )


def _config(arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    pretrained = arguments.get("pretrained")
    if not isinstance(pretrained, (str, os.PathLike)):
        return getattr(pretrained, "config", None)
    source = {n: arguments[n] for n in SOURCE_ARGUMENTS if arguments.get(n)}
    return AutoConfig.from_pretrained(pretrained, **source)
