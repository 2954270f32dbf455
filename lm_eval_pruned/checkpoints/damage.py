"""Damage: what is wrong with a checkpoint or its config, in one sentence.

transformers trusts what it loads. A config of absurd numbers makes it build for ever,
a missing tensor is drawn at random, integers become weights, and many a mistake ends
in an error of the line that stumbled over it. Here such a checkpoint is refused, and
what transformers raises is turned into a sentence that names the file.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import re
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.transformers_api import (
    may_be_missing,
    may_be_superfluous,
)


if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from transformers import PreTrainedModel

#: Numbers in a config that say how many modules or MLPs to build.
_COUNT_NAME = re.compile(
    r"(?:^|_)(?:n_)?(?P<short>layer|expert)s?$|^num_.*(?P<long>layer|expert)s$"
)
#: More layers, or experts in a layer, than any model has. Doge routes among 16,384
#: experts of one neuron each, and its dense models carry that number too.
_MOST = {"layer": 4096, "expert": 16384}

#: Dtypes that weights are stored in as numbers rather than as codes to be decoded.
_NUMBERS = ("F64", "F32", "F16", "BF16")

#: Errors that say themselves what is wrong.
_CLEAR = (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)
#: Kinds of them that do not name the file.
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


def check_counts(config: Mapping[str, Any], pretrained: str) -> None:
    """Refuse a config that asks for more modules than can be built.

    Args:
        config: What config.json holds, or arguments that override it.
        pretrained: Folder or Hub name of the model, for the message.

    Raises:
        ValueError: A number of layers or experts is absurd.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_counts(value, pretrained)
            continue
        counted = _COUNT_NAME.search(str(name))
        if counted is None or not isinstance(value, (int, float)):
            continue
        most = _MOST[counted["short"] or counted["long"]]
        if value > most:
            raise ValueError(
                f"The config of {pretrained} says {name}={value}, which no model has: correct it "
                f"to at most {most}."
            )


def check_config(pretrained: str, arguments: dict[str, Any]) -> None:
    """Refuse a config.json that transformers would not survive reading.

    Args:
        pretrained: Folder or Hub name of the model.
        arguments: Keyword arguments of ``AutoConfig.from_pretrained``.

    Raises:
        ValueError: It holds no settings, or absurd ones.
        OSError: It is missing or is no JSON.
    """
    from transformers import PretrainedConfig

    with clear_config_errors(pretrained):
        config, _ = PretrainedConfig.get_config_dict(pretrained, **arguments)
        check_counts(config, pretrained)
    check_counts(arguments, pretrained)


@contextlib.contextmanager
def clear_config_errors(pretrained: str) -> Iterator[None]:
    """Turn what a config makes transformers raise into a ValueError that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, _CLEAR) and not isinstance(error, _UNCLEAR):
            raise
        raise ValueError(
            f"The config of {pretrained} describes no model that can be built "
            f"({_summary(error)}): correct its config.json, or copy it again."
        ) from error


@contextlib.contextmanager
def clear_load_errors(pretrained: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn what loading makes transformers raise into a ValueError that names the cause.

    Args:
        pretrained: Folder or Hub name of the model.
        arguments: Keyword arguments of ``from_pretrained``.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _CLEAR) and not isinstance(error, _UNCLEAR):
            raise
        unknown = re.search(r"unexpected keyword argument '(.*)'", str(error))
        if unknown and unknown[1] in arguments:
            name = unknown[1]
            raise ArgumentError(
                f"{name}={arguments[name]} is not understood: neither this package nor the model "
                f"in {pretrained} has an argument of that name."
            ) from error
        names = ", ".join(
            name for name, value in arguments.items() if value is not None
        )
        raise ValueError(
            f"{pretrained} cannot be loaded ({_summary(error)}): its files or the index of its "
            f"shards are damaged, or an argument is wrong ({names or 'none was given'})."
        ) from error


def _summary(error: Exception) -> str:
    """Return kind and text of an error on one line."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:200]}" if text else kind


def check_entries(
    entries: Mapping[str, Any],
    names: Mapping[str, tuple[str, Any, str | None]],
    model: PreTrainedModel,
    neurons: Collection[str],
    *,
    any_shape: bool,
) -> None:
    """Refuse checkpoint entries that do not belong to the model.

    Args:
        entries: Lazy tensors of the checkpoint, by key.
        names: The parameter of each key, and the converter that leads there or None.
        model: The model, narrowed.
        neurons: Parameters with a neuron axis; their shapes are checked elsewhere.
        any_shape: Whether the entries may have other dtypes and shapes, because they
            will be quantised or the user said so.

    Raises:
        ValueError: A weight is stored as integers, has another shape than the config
            says, or belongs to a layer or is a bias of which the config knows nothing.
    """
    state = model.state_dict()
    layers = {_LAYER_NUMBER.sub(".*.", name) for name in neurons}
    extra_layers = getattr(model.config, "num_nextn_predict_layers", None)
    ignored = may_be_superfluous(model)
    for key, (name, converter, _) in names.items():
        parameter = state.get(name)
        if parameter is None:
            if converter or any(re.search(pattern, name) for pattern in ignored):
                continue
            other_layer = _LAYER_NUMBER.sub(".*.", name) in layers and not extra_layers
            stem = name.removesuffix(".bias")
            if other_layer or (stem != name and f"{stem}.weight" in state):
                raise ValueError(
                    f"The checkpoint holds {key}, of which its config.json knows nothing: correct "
                    f"the number of layers or the key of that bias there, or copy it again."
                )
            continue
        if any_shape or not parameter.is_floating_point():
            continue
        if entries[key].get_dtype() not in _NUMBERS:
            raise ValueError(
                f"{key} is stored as {entries[key].get_dtype()}, which is no weight: use a "
                "checkpoint in float32, float16 or bfloat16."
            )
        shape = list(entries[key].get_shape())
        if converter is None and name not in neurons and shape != list(parameter.shape):
            raise ValueError(
                f"{key} has shape {shape} in the checkpoint, but its config.json says "
                f"{list(parameter.shape)}."
            )


_LAYER_NUMBER = re.compile(r"\.\d+\.")


def missing_tensors(
    names: Mapping[str, tuple[str, Any, str | None]], model: PreTrainedModel
) -> list[str]:
    """Return the parameters that no checkpoint entry leads to, as transformers finds them.

    For what reads a checkpoint without loading a model. Parameters that are tied to
    one that is there are not missing.

    Args:
        names: The parameter of each key, and the converter that leads there or None.
        model: The model, on any device.

    Source: `transformers.PreTrainedModel._finalize_model_loading`.
    """
    there = set()
    for name, converter, _ in names.values():
        there.add(name)
        if converter is not None:
            first, *others = converter.target_patterns
            there |= {name.replace(first, other) for other in others}
    tied: dict[str, str] = model.all_tied_weights_keys
    there |= {tied[name] for name in there & tied.keys()}
    ignored = may_be_missing(model)
    return [
        name
        for name in model.state_dict()
        if name not in there
        and tied.get(name) not in there
        and not any(re.search(pattern, name) for pattern in ignored)
    ]


def check_complete(missing: Collection[str]) -> None:
    """Refuse a checkpoint whose missing tensors were drawn at random.

    Args:
        missing: ``missing_keys`` of transformers' loading info.

    Raises:
        ValueError: Some are missing.
    """
    if not missing:
        return
    others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise ValueError(
        f"The checkpoint holds no tensor for {min(missing)}{others}: it is incomplete, or its "
        "config.json describes another model."
    )


def check_widths_fit(
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]],
    neurons: Collection[str],
) -> None:
    """Refuse a checkpoint whose MLPs were drawn at random because they do not fit.

    Args:
        mismatched: ``mismatched_keys`` of transformers' loading info.
        neurons: Parameters with a neuron axis.

    Raises:
        ValueError: One of them has another shape than the config says.
    """
    for name, stored, own in sorted(mismatched):
        if name in neurons:
            raise ValueError(
                f"{name} has shape {list(stored)} in the checkpoint, but its config.json says "
                f"{list(own)}: correct the width there, or copy the checkpoint again."
            )
