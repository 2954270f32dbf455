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

from torch import nn

from lm_eval_pruned.pruning.argument_values import written_layers
from lm_eval_pruned.pruning.config_widths import renumber_layers
from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    text_config,
)


if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping

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
    """Return the number of decoder layers of a model; see `layers_of`."""
    return len(layers_of(model)[1])


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of decoder layers of a model, and the list.

    Args:
        model: A model, possibly without weights.

    Raises:
        UnsupportedModelError: There is no such list, as long as the config says.
    """
    paths = {mlp.stack.rpartition(".")[0] for mlp in find_glu_mlps(model)}
    path = min(paths)
    layers = model.get_submodule(path)
    said = getattr(text_config(model.config), "num_hidden_layers", None)
    if model.config.is_encoder_decoder:
        raise _refused(model, "it has an encoder")
    if len(paths) > 1 or not isinstance(layers, nn.ModuleList):
        what = f"the GLU-MLPs of {describe(model)} lie in no list of layers"
        raise _refused(model, what)
    if said != len(layers):
        what = f"it has {len(layers)} layers where num_hidden_layers in its config says {said}"
        raise _refused(model, what)
    return path, layers


def shallow_config(config: PretrainedConfig, depth: Depth) -> PretrainedConfig:
    """Return a copy of `config` for the layers that `depth` keeps.

    Their number, lists with an entry for each layer, and lists of numbers of layers
    change.

    Raises:
        UnsupportedModelError: None of several kinds of layers that attend would be left, and
            transformers generates with no such model.
    """
    kinds = getattr(text_config(config), "layer_types", None) or []
    attending = {
        number
        for number, kind in enumerate(kinds)
        if "attention" in kind and "linear" not in kind
    }
    if attending and attending.isdisjoint(depth.kept):
        raise UnsupportedModelError(
            f"drop_layers={written_layers(depth.dropped)} drops every layer with attention of a "
            f"{config.model_type} model, which cannot generate without: keep one of the layers "
            f"{written_layers(attending)}."
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
            vars(text)[name] = type(value)(new[old] for old in value if old in new)
        elif len(value) == depth.before:
            vars(text)[name] = type(value)(value[old] for old in depth.kept)
    if isinstance(first := getattr(text, _FIRST_DENSE, None), int):
        setattr(text, _FIRST_DENSE, sum(old < first for old in depth.kept))
    renumber_layers(text, new)
    text.num_hidden_layers = len(depth.kept)


def _numbers_layers(name: str, value: Any, layers: int) -> bool:
    """Return whether a list of a config holds numbers of layers, not an entry for each."""
    if not _NUMBERS_OF_LAYERS.search(name) or not all(type(n) is int for n in value):
        return False
    if len(value) == layers:
        return list(value) == list(range(layers))
    return list(value) == sorted({*value})


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
    number, *rest = name[len(path) + 1 :].split(".")
    if int(number) not in new:
        return None
    return ".".join([path, str(new[int(number)]), *rest])


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
    others = dict(shallow.named_modules())
    found: list[tuple[str, str, Any]] = []
    for name, module in whole.named_modules():
        moved = moved_name(name, path, new)
        if moved is None:
            continue
        other = others.pop(moved, None)
        if other is None or type(other) is not type(module):
            raise _depends(whole, name)
        expected: tuple[int, ...] = (depth.before, len(depth.kept))
        inside = moved.startswith(f"{path}.")
        if inside:
            number = int(moved[len(path) + 1 :].partition(".")[0])
            expected = depth.kept[number], number
            computed = {*getattr(module, "_non_persistent_buffers_set", ())} - _ALIKE
            if computed:
                raise _depends(whole, f"{name}.{min(computed)}")
        before, after = _remembered(module), _remembered(other)
        for attribute in before.keys() | after.keys():
            values = before.get(attribute), after.get(attribute)
            if values[0] == values[1]:
                continue
            # A model may remember whether it has some kind of layer, or things for that kind.
            summary = type(values[1]) is bool or None in values
            if values != expected and (inside or not summary):
                raise _depends(whole, f"{name}.{attribute}")
            if values[1] is not None:
                found.append((moved, attribute, values[1]))
    if others:
        raise _depends(whole, path)
    return found


def _remembered(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that a config may decide, and its shapes."""
    kinds = (bool, int, float, str)
    said: dict[str, Any]
    said = {name: v for name, v in vars(module).items() if isinstance(v, kinds)}
    for name, tensor in module.named_parameters(recurse=False):
        said[name] = tuple(tensor.shape)
    return said


def _depends(model: PreTrainedModel, name: str) -> Exception:
    return _refused(
        model, f"{name} depends on the number of its layer or on how many there are"
    )


def _refused(model: PreTrainedModel, reason: str) -> Exception:
    return UnsupportedModelError(
        f"drop_layers cannot be used with {describe(model)}, because {reason}: leave it out."
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

    def put(owner: nn.Module, name: str, value: Any) -> None:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    path, layers = layers_of(model)
    text = text_config(model.config)
    # The parts of a model may have copies of one config.
    configs = [text, *(getattr(module, "config", None) for module in model.modules())]
    for config in {id(each): each for each in configs}.values():
        if type(config) is type(text) and config.num_hidden_layers == depth.before:
            undo.callback(vars(config).update, copy.deepcopy(vars(config)))
            _make_shallow(config, depth)
    owner, _, name = path.rpartition(".")
    kept = nn.ModuleList(layers[old] for old in depth.kept)
    put(model.get_submodule(owner), name, kept)
    for where, attribute, value in changes:
        put(model.get_submodule(where), attribute, value)
