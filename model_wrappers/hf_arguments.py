"""What is wrong with the arguments of a model type, before the harness's model meets them.

HFLM asserts some of them without a message, hands others to code that fails far from
the cause, and takes any text for true: ``trust_remote_code=off`` would run that code.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.damage import argument_errors, misspelt
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS
from lm_eval_pruned.model_wrappers.batching.flags import check_count, check_flag


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

eval_logger = logging.getLogger("lm_eval.models.pruned")

_FLAGS = (
    *("add_bos_token", "load_in_4bit", "load_in_8bit", "logits_cache", "parallelize"),
    *("truncation", "trust_remote_code", "use_fast_tokenizer"),
)
_COUNTS = ("max_batch_size", "max_length")
_NAMES = ("delta", "gguf_file", "peft", "pretrained", "tokenizer")
_DTYPES = ("dtype", "mixed_precision_dtype", "softmax_dtype")
_BACKENDS = ("default", "causal", "seq2seq")
_BATCH_SIZE = re.compile(r"auto(:[0-9]+(\.[0-9]+)?)?|0*[1-9][0-9]*")


def _is_name(value: Any) -> bool:
    return not isinstance(value, (bool, int, float))


def _is_batch_size(value: Any) -> bool:
    return type(value) in (int, str) and _BATCH_SIZE.fullmatch(str(value)) is not None


def _is_dtype(value: Any) -> bool:
    found = getattr(torch, value, value) if isinstance(value, str) else value
    return found in (None, "auto") or isinstance(found, torch.dtype)


def _is_quantisation(value: Any) -> bool:
    return isinstance(value, (dict, type(None))) or hasattr(value, "quant_method")


#: By name: whether a value can be used, and what to pass instead.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_NAMES, (_is_name, "a name or path")),
    **dict.fromkeys(_DTYPES, (_is_dtype, "a dtype such as bfloat16")),
    "attn_implementation": (_is_name, "one such as eager or sdpa"),
    "backend": (_BACKENDS.__contains__, "default, causal or seq2seq"),
    "batch_size": (_is_batch_size, "a whole number of 1 or more, auto or auto:4"),
    "device": (lambda value: isinstance(value, str), "one such as cpu, cuda or cuda:0"),
    "quantization_config": (_is_quantisation, "a dict, or load_in_8bit=true instead"),
    "subfolder": (_is_name, "a path"),
}


def check_arguments(model_type: Any, given: Mapping[str, Any]) -> None:
    """Refuse misspelt names, and values that the harness's model would stumble over.

    Args:
        model_type: A class whose ``argument_names()`` are known.
        given: Its keyword arguments; what transformers or the config knows is left alone.

    Raises:
        ArgumentError: A name is unknown and resembles a known one, or a value cannot be used.
    """
    with argument_errors():
        found = misspelt(given, model_type.argument_names(), lambda: _config(given))
        if found is not None:
            raise ValueError(
                f"{found[0]}={given[found[0]]} is not understood: did you mean {found[1]}?"
            )
        for name, value in given.items():
            accepts, expected = _EXPECTED.get(name, (None, ""))
            if name in _FLAGS and value is not None:
                check_flag(name, value)
            elif name in _COUNTS:
                check_count(name, value)
            elif accepts is not None and not accepts(value):
                raise ValueError(f"{name}={value} is not understood: pass {expected}.")


def argument_names(model_type: type) -> set[str]:
    """Return the names of the arguments of a model type, without those that it passes on."""
    return {
        name
        for each in model_type.__mro__
        if "__init__" in vars(each)
        for name in inspect.signature(vars(each)["__init__"]).parameters
    } - {"self", "args", "kwargs"}


def given_or_default(pretrained: Any, arguments: dict[str, Any]) -> Any:
    """Return `pretrained`; if it is None the default model, whose arguments are added."""
    if pretrained is not None:
        return pretrained
    default = find_default_model()
    eval_logger.warning(
        "pretrained was not given: evaluating SmolLM2-135M-Instruct, from %s.",
        default.source,
    )
    arguments |= default.model_args()
    return arguments.pop("pretrained")


def _config(given: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    pretrained = given.get("pretrained")
    if not isinstance(pretrained, (str, os.PathLike)):
        return getattr(pretrained, "config", None)
    source = {n: given[n] for n in SOURCE_ARGUMENTS if given.get(n)}
    return AutoConfig.from_pretrained(pretrained, **source)
