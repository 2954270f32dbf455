"""What is wrong with a checkpoint, its config or an argument, in one sentence.

transformers draws a missing tensor at random, and many a mistake ends in an error of the line
that stumbled over it. Here such a checkpoint is refused, and what transformers raises is turned
into a sentence that names the file.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from lm_eval_pruned.pruning.layouts import regions_by_parameter


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.widths import Widths

#: Errors that say themselves what is wrong, but for those kinds that do not name the file.
_CLEAR = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
_UNCLEAR = (json.JSONDecodeError, UnicodeDecodeError)
#: What ``from_pretrained`` takes without naming it in its signature, and resembles arguments of ours.
_TAKEN_UNNAMED = ("code_revision", "device_map", "max_memory", "offload_buffers")


class ArgumentError(ValueError, SystemExit):
    """An argument of a model type cannot be used.

    It is caught like any ValueError. Where nobody catches it, as in the ``lm_eval`` command, Python
    ends with this one sentence instead of a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message


@contextlib.contextmanager
def argument_errors() -> Iterator[None]:
    """Turn the ValueErrors of checks of arguments into ArgumentErrors."""
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ArgumentError(str(error)) from error


def misspelt(
    given: Iterable[str], known: Collection[str], config: Callable[[], Any]
) -> tuple[str, str] | None:
    """Return the first name that is unknown but resembles a known one, and that one.

    Args:
        given: Names of arguments of a model type, which hands unknown ones to transformers.
        known: Names that the model type knows.
        config: Returns the model's config, whose settings may be given as well.
    """
    from transformers import PreTrainedModel

    taken = inspect.signature(PreTrainedModel.from_pretrained).parameters
    for name in given:
        if name in known or name in taken or name in _TAKEN_UNNAMED:
            continue
        near = difflib.get_close_matches(str(name), known, 1, cutoff=0.8)
        if near and not hasattr(config(), str(name)):
            return name, near[0]
    return None


@contextlib.contextmanager
def clear_errors(
    pretrained: str, arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turn what transformers raises into a ValueError that names the cause.

    `arguments` are those of ``from_pretrained``, None while the model's config alone is used.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _CLEAR) and not isinstance(error, _UNCLEAR):
            raise
        summary = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if arguments is None:
            raise ValueError(
                f"The config of {pretrained} describes no model that can be built ({summary}): "
                "correct its config.json, or copy it again."
            ) from error
        for file in sorted(Path(pretrained).rglob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    continue
            except SafetensorError as broken:
                raise OSError(
                    f"{file} is not an intact safetensors file ({broken}): download or copy it again."
                ) from error
        unknown = re.search(r"unexpected keyword argument '(.*)'", str(error))
        if unknown and unknown[1] in arguments:
            name = unknown[1]
            raise ArgumentError(
                f"{name}={arguments[name]} is not understood: neither this package nor the model "
                f"in {pretrained} has an argument of that name."
            ) from error
        names = ", ".join(n for n, value in arguments.items() if value is not None)
        raise ValueError(
            f"{pretrained} cannot be loaded ({summary}): its files or the index of its shards are "
            f"damaged, or an argument is wrong ({names or 'none was given'})."
        ) from error


def check_filled(
    model: PreTrainedModel,
    found: Mapping[str, Any],
    widths: Widths,
    ignore_sizes: Any,
) -> None:
    """Refuse a model that its checkpoint filled in part, or that leaves part of it out.

    `found` is transformers' loading info. With `ignore_sizes`, tensors outside of the MLPs may
    have other shapes than the config says.
    """
    if missing := found["missing_keys"]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"The checkpoint holds no tensor for {min(missing)}{others}: it is incomplete, or its "
            "config.json describes another model."
        )
    mismatched = sorted(found["mismatched_keys"])
    if mismatched and not ignore_sizes:
        name, stored, own = mismatched[0]
        raise ValueError(
            f"{name} has shape {list(stored)} in the checkpoint, but its config.json says "
            f"{list(own)}."
        )
    state = model.state_dict().keys()
    layers = {re.sub(r"\.\d+\.", ".*.", p) for p in regions_by_parameter(widths.mlps)}
    # Stock classes leave out the layers that predict more tokens at once.
    if getattr(model.config, "num_nextn_predict_layers", None):
        layers.clear()
    for key in sorted(found["unexpected_keys"]):
        is_bias = key.endswith(".bias") and f"{key[:-5]}.weight" in state
        if is_bias or re.sub(r"\.\d+\.", ".*.", key) in layers:
            raise ValueError(
                f"The checkpoint holds {key}, of which its config.json knows nothing: correct "
                "the number of layers or the key of that bias there, or copy it again."
            )
