"""One model of a sweep, checked by its arguments and its config before any model is evaluated."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.configs import not_found, with_quantisation
from lm_eval_pruned.pruning.arguments import (
    DECLARED,
    SIZES,
    PruneArguments,
    take_prune_arguments,
)
from lm_eval_pruned.sweeps.plan import MODELS, SOURCES, check_names, model_source


if TYPE_CHECKING:
    from collections.abc import Mapping


def check_model(model: str, arguments: dict[str, Any], where: str) -> None:
    """Refuse a model that cannot be loaded, as far as its arguments and its config tell.

    Raises:
        ValueError: Files of the model cannot be found, an argument is unknown, or it cannot be
            pruned as asked; the message begins with `where`.
    """
    source, prunes = model_source(arguments), model in MODELS
    pretrained = source.pop("pretrained")
    check_files(model, {**arguments, "pretrained": pretrained}, where)
    check_names(arguments, model, where, DECLARED if prunes else ())
    check_installed(model, where)
    if "vllm" not in model:
        check_quantiser(pretrained, {**source, **arguments}, where)
    if prunes:
        pruning = PruneArguments(**take_prune_arguments(dict(arguments)))
        try:
            Checkpoint.of(pretrained, pruning, source)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where} cannot be used: {error}") from error
    elif size := next((name for name in SIZES if name in arguments), None):
        raise ValueError(
            f"{where} has {size}={arguments[size]}, but only {' and '.join(MODELS)} prune."
        )


def check_installed(model: str, where: str) -> None:
    """Refuse a model type whose engine is not installed; the ValueError begins with `where`."""
    if "vllm" in model and find_spec("vllm") is None:
        raise ValueError(
            f"{where} needs the package vllm, which is not installed: run `pip install "
            "'lm-eval-pruned[vllm]'`."
        )


def check_quantiser(pretrained: str, arguments: Mapping[str, Any], where: str) -> None:
    """Refuse a quantised model whose package is not installed, as transformers says which it is.

    The ValueError begins with `where`.
    """
    how = {n: arguments[n] for n in ("revision", "subfolder") if arguments.get(n)}
    stored, _ = PretrainedConfig.get_config_dict(pretrained, **how)
    try:
        requested = with_quantisation(arguments).get("quantization_config")
        if config := requested or stored.get("quantization_config"):
            quantiser = AutoHfQuantizer.from_config(config)
            quantiser.validate_environment(device_map=None, pre_quantized=not requested)
    except ImportError as error:
        raise ValueError(f"{where} cannot be loaded: {error}") from None


def check_files(model: str, arguments: dict[str, Any], where: str) -> None:
    """Refuse arguments of a model that name files which are neither here nor on the Hub.

    Raises:
        ValueError: One of `lm_eval_pruned.sweeps.plan.SOURCES` cannot be found; the message begins
            with `where`.
    """
    for argument, file in SOURCES.items():
        name, of_model = arguments.get(argument), argument == "pretrained"
        # Tokenizers have files of several names, and so has what only vLLM reads.
        optional = argument == "tokenizer" or (
            model == "vllm" and Path(str(name)).exists()
        )
        if not name or optional:
            continue
        how = {n: arguments[n] for n in ("revision", "subfolder") if arguments.get(n)}
        how["cache_dir"] = arguments.get("download_dir")
        file = of_model and arguments.get("gguf_file") or file
        try:
            cached_file(str(name), file, **how if of_model else {})
        except (OSError, ValueError) as error:
            if sentence := not_found(argument, str(name), error):
                raise ValueError(f"{where} cannot be used: {sentence}") from None
            why = str(error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(
                f"{where} has {argument}={name}, where {file} cannot be found ({why}): pass a folder "
                "that holds it, or a name on the Hub."
            ) from None
