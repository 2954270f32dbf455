"""From the arguments of ``from_pretrained`` to a config, and what is wrong with either.

transformers reports many mistakes far from their cause. Here they are refused, with one sentence
that names the checkpoint.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.arguments import DECLARED
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.util.options import nearest


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from transformers import PretrainedConfig

#: Arguments of `from_pretrained` that say where to find the files of a model.
HUB = (
    *("cache_dir", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token"),
)
#: Those that say how to read a checkpoint.
READING = (*HUB, "gguf_file", "trust_remote_code", "use_safetensors", "variant")
#: Those that say where the finished model goes, and in what form.
PLACING = re.compile(
    r"device_map|max_memory|tp_(plan|size)|distributed_config|offload_\w+|quantization_config|dtype"
)
#: Arguments of `transformers.BitsAndBytesConfig`, which lm-evaluation-harness passes on as they are.
_BITSANDBYTES = re.compile(r"load_in_[48]bit|bnb_4bit_\w+|llm_int8_\w+")
#: Errors whose own message says what is wrong, and kinds of them that do not name the file.
_CLEAR = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
_UNCLEAR = (json.JSONDecodeError, UnicodeDecodeError)
#: What ``from_pretrained`` takes without naming it in its signature, and resembles arguments of ours.
_TAKEN_UNNAMED = ("code_revision", "device_map", "max_memory", "offload_buffers")


class NoModelError(FileNotFoundError):
    """No model was found under the given name."""


class ArgumentError(ValueError, SystemExit):
    """An argument of a model type cannot be used.

    If it is not caught, as in the ``lm_eval`` command, Python prints its sentence without a
    traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message


@contextlib.contextmanager
def argument_errors() -> Iterator[None]:
    """Turn the ValueErrors of checks of arguments, and NoModelErrors, into ArgumentErrors."""
    try:
        yield
    except (ValueError, NoModelError) as error:
        if type(error) not in (ValueError, NoModelError):
            raise
        raise ArgumentError(str(error)) from error


def misspelt(
    arguments: Mapping[str, Any], known: Collection[str]
) -> tuple[str, str] | None:
    """Return the first name that is unknown but resembles a known one, and that one.

    What transformers or the config of ``pretrained`` knows may be among `arguments` as well.
    """
    from transformers import AutoConfig, PreTrainedModel

    taken = inspect.signature(PreTrainedModel.from_pretrained).parameters
    pretrained = arguments.get("pretrained")
    for name in arguments:
        if name in known or name in taken or name in _TAKEN_UNNAMED:
            continue
        near = difflib.get_close_matches(str(name), known, 1, cutoff=0.8)
        if near:
            config = getattr(pretrained, "config", None)
            if isinstance(pretrained, (str, os.PathLike)):
                source = {n: arguments[n] for n in READING if arguments.get(n)}
                # Without a config, only the argument is known to be wrong.
                with contextlib.suppress(OSError, ValueError):
                    config = AutoConfig.from_pretrained(pretrained, **source)
            if not hasattr(config, str(name)):
                return name, near[0]
    return None


@contextlib.contextmanager
def clear_errors(
    pretrained: str, arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turn what transformers raises into a ValueError or NoModelError that names the cause.

    `arguments` are those of ``from_pretrained``, None while only the model's config is used.
    """
    try:
        yield
    except Exception as error:
        if Path(pretrained).is_dir():
            if lacks := _missing_file(Path(pretrained), error):
                raise NoModelError(
                    f"pretrained={pretrained} is a folder without {lacks}: pass the folder of a "
                    "complete checkpoint."
                ) from error
        elif sentence := not_found("pretrained", pretrained, error):
            raise NoModelError(sentence) from error
        if isinstance(error, _CLEAR) and not isinstance(error, _UNCLEAR):
            raise
        summary = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if arguments is None:
            raise ValueError(
                f"No model can be built from the config of {pretrained} ({summary}): correct its "
                "config.json, or copy it again."
            ) from error
        unknown = re.search(r"unexpected keyword argument '(.*)'", str(error))
        if unknown and unknown[1] in arguments:
            name = unknown[1]
            advice = nearest(name, DECLARED, "look for a slip in the name.")
            raise ArgumentError(
                f"{name}={arguments[name]} is not understood: neither this package nor the model "
                f"in {pretrained} has an argument of that name; {advice}"
            ) from error
        names = ", ".join(n for n, value in arguments.items() if value is not None)
        raise ValueError(
            f"{pretrained} cannot be loaded ({summary}): its files or the index of its shards are "
            f"damaged, or an argument is wrong ({names or 'none was given'})."
        ) from error


def _missing_file(folder: Path, error: Exception) -> str | None:
    """Return which file of a checkpoint a folder lacks; None for another error."""
    message = str(error)
    if message.startswith("Unrecognized model in"):
        return None if (folder / "config.json").exists() else "config.json"
    if message.startswith("Error no file named"):
        return "weights"
    shard = re.search(
        r"No such file or directory: .*?([^/]+\.(safetensors|bin))", message
    )
    return shard and shard[1]


def not_found(argument: str, name: str, error: Exception) -> str | None:
    """Return the sentence about a `name` for which the Hub has no files; None for another error."""
    from huggingface_hub import errors

    cause = error.__cause__ or error
    if isinstance(cause, errors.GatedRepoError):
        return None
    if isinstance(cause, errors.HFValidationError):
        why = "no model on the Hub can have that name"
    elif isinstance(cause, errors.RepositoryNotFoundError):
        why = "the Hub has no such model, or shows it only after `hf auth login`"
    elif isinstance(cause, errors.LocalEntryNotFoundError):
        why = "the Hub could not be asked for what the cache does not hold"
    else:
        return None
    return f"{argument}={name} was not found: no folder here has that name, and {why}."


def quantising_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that quantise the model while it loads."""
    names = ("quantization_config", "load_in_8bit", "load_in_4bit")
    return [name for name in arguments if name in names and arguments[name]]


def auto_class_for(config: PretrainedConfig) -> Any:
    """Choose the Auto class as `lm_eval.models.huggingface.HFLM` does by default."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ENCODER_DECODERS,
    )

    encodes = config.model_type in ENCODER_DECODERS
    return AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM


def config_and_rest(
    pretrained: str, from_pretrained: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Split arguments of ``from_pretrained`` into the config they describe and the rest.

    Mirrors `transformers.models.auto.auto_factory._BaseAutoModelClass.from_pretrained`.
    """
    from transformers import AutoConfig

    trusted = from_pretrained.get("trust_remote_code")
    if not any(trusted is known for known in (None, True, False)):
        # Any text counts as true to transformers, "off" included.
        raise ValueError(
            f"trust_remote_code={trusted!r} is not understood: pass true or false."
        )
    arguments = with_quantisation(from_pretrained)
    if (dtype := arguments.pop("torch_dtype", None)) is not None:
        arguments["dtype"] = arguments.get("dtype") or dtype
    check_dtype("dtype", arguments.get("dtype"))
    # AutoConfig would take the dtype for a setting.
    placing = {
        name: arguments.pop(name) for name in list(arguments) if PLACING.fullmatch(name)
    }
    kept = {name: arguments[name] for name in READING if name in arguments}
    config, unused = AutoConfig.from_pretrained(
        pretrained, return_unused_kwargs=True, **arguments
    )
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and arguments.get("gguf_file") is None:
        method = quantised.get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"The checkpoint is quantised already (quant_method={method}), and quantised neurons "
            "can be neither ranked nor sliced: pass the unquantised checkpoint it was made from."
        )
    return config, {**unused, **kept, **placing}


def check_dtype(name: str, value: Any) -> None:
    """Refuse what is neither a floating-point dtype that torch computes in, nor its name, ``auto`` or None.

    Raises:
        ValueError: It is something else.
    """
    dtype: Any = getattr(torch, value, value) if isinstance(value, str) else value
    is_floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    if not (is_floating or dtype in (None, "auto")):
        raise ValueError(
            f"{name}={value} is not understood: pass a dtype such as bfloat16."
        )
    # Of 8 bits and fewer.
    if is_floating and dtype.itemsize < 2:
        raise ValueError(
            f"{name}={value} only stores numbers, and torch runs no model in it: pass a dtype such as "
            "bfloat16, and say how to quantise with quantization_config."
        )


def with_quantisation(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` with one object that says how to quantise."""
    others = {k: v for k, v in arguments.items() if not _BITSANDBYTES.fullmatch(k)}
    of_bitsandbytes = {k: v for k, v in arguments.items() if k not in others}
    config = others.get("quantization_config")
    quantising = quantising_arguments(of_bitsandbytes)
    if quantising and config is not None:
        raise ValueError(
            f"{quantising[0]} and quantization_config both say how to quantise: pass one."
        )
    if quantising:
        from transformers import BitsAndBytesConfig

        others["quantization_config"] = BitsAndBytesConfig(**of_bitsandbytes)
    elif isinstance(config, dict):
        from transformers.quantizers import AutoQuantizationConfig

        others["quantization_config"] = AutoQuantizationConfig.from_dict(config)
    return others
