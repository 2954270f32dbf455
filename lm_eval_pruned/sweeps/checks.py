"""One model of a sweep, checked by its arguments and its config before any model is evaluated."""

from __future__ import annotations

import contextlib
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from lm_eval.api.registry import get_model
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.configs import (
    check_dtype,
    not_found,
    with_quantisation,
)
from lm_eval_pruned.pruning.arguments import (
    DECLARED,
    SIZES,
    PruneArguments,
    take_prune_arguments,
)
from lm_eval_pruned.sweeps.plan import MODELS, SOURCES, check_names, model_source


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def check_model(
    model: str, arguments: dict[str, Any], where: str, device: str | None = None
) -> None:
    """Refuse a model that cannot be loaded on a device, as far as its arguments and its config tell.

    Without `device`, it is meant for the one that the harness takes.

    Raises:
        ValueError: Files of the model cannot be found, an argument is unknown, it cannot be
            pruned as asked, or this machine cannot quantise it; the message begins with `where`.
    """
    source, prunes = model_source(arguments), model in MODELS
    pretrained = source.pop("pretrained")
    check_files(model, {**arguments, "pretrained": pretrained}, where)
    check_names(arguments, model, where, DECLARED if prunes else ())
    check_installed(model, where)
    # A model type of the harness checks nothing.
    of_dtype = lambda given: check_dtype("dtype", given.get("dtype"))
    try:
        getattr(get_model(model), "check_values", of_dtype)(arguments)
    except ValueError as error:
        raise ValueError(f"{where} cannot be used: {error}") from error
    if "vllm" not in model:
        check_quantiser(pretrained, {**source, **arguments}, where, device)
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


def check_quantiser(
    pretrained: str,
    arguments: Mapping[str, Any],
    where: str,
    device: str | None = None,
) -> None:
    """Refuse a quantised model whose package is not installed, or that cannot be quantised on a device.

    The first is as transformers says, the second is tried on a small model. The ValueError begins
    with `where`.
    """
    how = {n: arguments[n] for n in ("revision", "subfolder") if arguments.get(n)}
    stored, _ = PretrainedConfig.get_config_dict(pretrained, **how)
    try:
        requested = with_quantisation(arguments).get("quantization_config")
        if config := requested or stored.get("quantization_config"):
            quantiser = AutoHfQuantizer.from_config(config)
            quantiser.validate_environment(device_map=None, pre_quantized=not requested)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{where} cannot be loaded: {error}") from None
    # A method that reads text for it takes minutes.
    if requested and not getattr(requested, "dataset", None):
        dtype = arguments.get("dtype") or "auto"
        if dtype == "auto":
            dtype = stored.get("dtype") or stored.get("torch_dtype") or "float32"
        try_quantiser(requested, dtype, where, device)


def try_quantiser(
    config: Any, dtype: torch.dtype | str, where: str, device: str | None = None
) -> None:
    """Quantise a model of one small layer and run it, as one does only on a machine that has the kernels.

    ValueError with the reason, beginning with `where`, if that fails.
    """
    if device is None:
        # As the harness chooses.
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # Widths of which blocks of scales are a part.
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "vocab_size": 256,
    }
    small = LlamaConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)
    try:
        with _quiet() as report:
            model: Any = LlamaForCausalLM(small)
            model = model.to(dtype)
            placed = {"state_dict": model.state_dict(), "dtype": dtype}
            quantised = LlamaForCausalLM.from_pretrained(
                None,
                config=small,
                quantization_config=config,
                device_map=device,
                **placed,
            )
            with torch.no_grad():
                quantised(torch.zeros(1, 8, dtype=torch.long, device=device))
    except Exception as error:
        # transformers reports what the quantiser raised, and raises another error.
        told = re.search(r"^\w+Error: .+", "\n".join(report), re.MULTILINE)
        found = told[0] if told else f"{type(error).__name__}: {error}"
        why = " ".join(found.split()).rstrip(".: ")
        raise ValueError(
            f"{where} cannot be quantised on {device} ({why[:300]}): choose a quantisation that runs "
            "there, or another --device."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Have transformers show no progress and log nothing; yield what it would have logged."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    of_transformers, shows = (
        logging.getLogger("transformers"),
        is_progress_bar_enabled(),
    )
    disable_progress_bar()
    with (
        mock.patch.object(of_transformers, "handlers", [handler]),
        mock.patch.object(of_transformers, "propagate", False),
    ):
        try:
            yield logged
        finally:
            if shows:
                enable_progress_bar()


def check_files(model: str, arguments: dict[str, Any], where: str) -> None:
    """Refuse arguments of a model that name files which are neither here nor on the Hub.

    Raises:
        ValueError: One of `lm_eval_pruned.sweeps.plan.SOURCES` cannot be found; the message begins
            with `where`.
    """
    given = str(arguments["pretrained"])
    # vLLM takes the path of a file.
    if given.endswith(".gguf") and "vllm" not in model:
        folder, _, gguf = given.rpartition("/")
        raise ValueError(
            f"{where} has pretrained={given}, which is a GGUF file: pass "
            f"pretrained={folder or '.'},gguf_file={gguf} instead."
        )
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
