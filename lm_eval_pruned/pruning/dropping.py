"""Dropping whole layers: from a config, and from a model in memory.

A layer may be more than its weights: it may attend in a window, leave out positions or
hold experts because of its number. So a model of the smaller config is built without
weights and compared with the whole one. Where a layer that stays would become another
one, the model is refused.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.argument_values import written_layers
from lm_eval_pruned.pruning.layerwise import NotLayerByLayer, layer_list
from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    text_config,
)
from lm_eval_pruned.pruning.per_layer import renumber_layers


if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.depth import Depth

#: Lists of a config that are about something else than layers, however long they are.
_OTHER_LISTS = re.compile(r"token|architectures|label|bos|eos|multiplier")
#: Names of lists that hold the numbers of some layers.
_NUMBERS_OF_LAYERS = re.compile(r"layers|idx|indices|index")
#: The first so many layers are dense.
_FIRST_DENSE = "first_k_dense_replace"
#: Buffers that a layer computes from its config, and that are the same in all layers.
_ALIKE = {"inv_freq", "original_inv_freq", "mup_vector"}


def count_layers(model: PreTrainedModel) -> int:
    """Return the number of decoder layers of a model, possibly without weights.

    Raises:
        UnsupportedModelError: They do not lie in one list, as long as the config says.
    """
    return len(layers_of(model)[1])


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of decoder layers of a model, and the list.

    Raises:
        UnsupportedModelError: There is no such list, as long as the config says.
    """
    try:
        path, layers = layer_list(model)
    except NotLayerByLayer as reason:
        raise UnsupportedModelError(
            f"drop_layers cannot be used with {describe(model)}, because {reason}: leave it out."
        ) from None
    said = getattr(text_config(model.config), "num_hidden_layers", None)
    if said != len(layers):
        raise UnsupportedModelError(
            f"drop_layers cannot be used with {describe(model)}, because it has {len(layers)} "
            f"layers where num_hidden_layers in its config says {said}: leave it out."
        )
    return path, layers  # type: ignore[return-value]


def shallow_config(config: PretrainedConfig, depth: Depth) -> PretrainedConfig:
    """Return a copy of `config` for the layers that `depth` keeps.

    Their number, lists with an entry for each layer, and lists of numbers of layers
    change.

    Raises:
        UnsupportedModelError: None of several kinds of layers that attend would be left, and
            transformers generates with no such model.
    """
    kinds = list(getattr(text_config(config), "layer_types", None) or [])
    attending = [
        number
        for number, kind in enumerate(kinds)
        if "attention" in kind and "linear" not in kind
    ]
    if attending and not {*attending} & {*depth.kept}:
        raise UnsupportedModelError(
            f"drop_layers={written_layers(depth.dropped)} drops every layer with attention of a "
            f"{config.model_type} model, which cannot generate without: keep one of the layers "
            f"{written_layers(tuple(attending))}."
        )
    shallow = copy.deepcopy(config)
    _make_shallow(text_config(shallow), depth)
    return shallow


def _make_shallow(text: PretrainedConfig, depth: Depth) -> None:
    new = {old: number for number, old in enumerate(depth.kept)}
    for name, value in list(vars(text).items()):
        if not isinstance(value, (list, tuple)) or _OTHER_LISTS.search(name):
            continue
        if _numbers_layers(name, value, depth.before):
            entries = [new[old] for old in value if old in new]
        elif len(value) == depth.before:
            entries = [value[old] for old in depth.kept]
        else:
            continue
        vars(text)[name] = type(value)(entries)
    if isinstance(first := getattr(text, _FIRST_DENSE, None), int):
        setattr(text, _FIRST_DENSE, sum(old < first for old in depth.kept))
    renumber_layers(text, new)
    text.num_hidden_layers = len(depth.kept)


def _numbers_layers(name: str, value: Any, layers: int) -> bool:
    """Return whether a list of a config holds numbers of layers, not an entry for each."""
    if not _NUMBERS_OF_LAYERS.search(name) or not all(type(n) is int for n in value):
        return False
    every = len(value) == layers
    ascending = list(value) == sorted({*value})
    return ascending and (list(value) == list(range(layers)) if every else True)


def moved_name(name: str, path: str, new: Mapping[int, int]) -> str | None:
    """Return what a parameter or module is called once layers are numbered anew.

    Args:
        name: Its name in the whole model.
        path: Path of the list of layers.
        new: The new number of each layer that stays.

    Returns:
        The name; None where its layer goes.
    """
    if not name.startswith(f"{path}."):
        return name
    number, _, rest = name[len(path) + 1 :].partition(".")
    if int(number) not in new:
        return None
    return f"{path}.{new[int(number)]}" + (f".{rest}" if rest else "")


def attributes_that_change(
    whole: PreTrainedModel, shallow: PreTrainedModel, depth: Depth
) -> list[tuple[str, str, Any]]:
    """Compare a model with the one of `shallow_config`, both without weights.

    Args:
        whole: The model.
        shallow: That of the config without the layers.
        depth: Which layers stay.

    Returns:
        The numbers of layers and of their count that modules remember: the path of a
        module in `shallow`, the attribute and its new value.

    Raises:
        UnsupportedModelError: Some module would be another one.
    """
    path, _ = layers_of(whole)
    layers_of(shallow)
    new = {old: number for number, old in enumerate(depth.kept)}
    olds = {number: old for old, number in new.items()}
    found: list[tuple[str, str, Any]] = []
    modules = dict(shallow.named_modules())
    paired = 0
    for name, module in whole.named_modules():
        moved = moved_name(name, path, new)
        if moved is None:
            continue
        paired += 1
        other = modules.get(moved)
        if other is None or type(other) is not type(module):
            raise _another(whole, name, "")
        inside = moved.startswith(f"{path}.")
        buffers: set[str] = getattr(module, "_non_persistent_buffers_set", set())
        computed = buffers - _ALIKE
        if inside and computed:
            raise _another(whole, name, f".{min(computed)}")
        number = int(moved[len(path) + 1 :].partition(".")[0]) if inside else None
        counts = (
            (depth.before, len(depth.kept))
            if number is None
            else (olds[number], number)
        )
        own, others = dict(_remembered(module)), dict(_remembered(other))
        for attribute in own.keys() | others.keys():
            values = own.get(attribute), others.get(attribute)
            if values[0] == values[1]:
                continue
            # A model may remember whether it has some kind of layer, or things for that kind.
            summary = type(values[1]) is bool or None in values
            if values != counts and not (number is None and summary):
                raise _another(whole, name, f".{attribute}")
            if values[1] is not None:
                found.append((moved, attribute, values[1]))
    if paired != len(modules):
        raise _another(whole, path, "")
    return found


def _remembered(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that a config may decide, and its shapes."""
    for name, value in vars(module).items():
        if isinstance(value, (bool, int, float, str)):
            yield name, value
    for name, tensor in module.named_parameters(recurse=False):
        yield name, tuple(tensor.shape)


def _another(model: PreTrainedModel, name: str, attribute: str) -> Exception:
    return UnsupportedModelError(
        f"drop_layers cannot be used with {describe(model)}, because {name}{attribute} depends on "
        "the number of its layer or on how many there are: leave it out."
    )


def drop_layers(
    model: PreTrainedModel,
    depth: Depth,
    changes: list[tuple[str, str, Any]],
    undo: contextlib.ExitStack,
) -> None:
    """Drop layers of a model in place.

    Args:
        model: The model.
        depth: Which layers stay.
        changes: What `attributes_that_change` returned.
        undo: Takes what makes the model whole again.
    """
    path, layers = layers_of(model)
    text = text_config(model.config)
    # The parts of a model may have copies of one config.
    configs = {
        id(config): config
        for module in model.modules()
        if type(config := getattr(module, "config", None)) is type(text)
        and config.num_hidden_layers == depth.before
    }
    configs[id(text)] = text
    for config in configs.values():
        undo.callback(vars(config).update, copy.deepcopy(vars(config)))
        _make_shallow(config, depth)
    owner_path, _, name = path.rpartition(".")
    owner = model.get_submodule(owner_path)
    undo.callback(setattr, owner, name, layers)
    setattr(owner, name, torch.nn.ModuleList(layers[old] for old in depth.kept))
    for where, attribute, value in changes:
        module = model.get_submodule(where)
        undo.callback(setattr, module, attribute, getattr(module, attribute))
        setattr(module, attribute, value)
