"""Depth: which decoder layers of a model stay, and dropping the others.

This is the control for narrowing: at equal parameters, which of the two costs less? A
count drops the layers before the last one, which a model bears best (Gromov et al. 2024,
arXiv 2403.17887), or those of least block influence (Men et al. 2024, arXiv 2403.03853).

A layer may attend in a window, leave out positions or hold experts because of its number. So a
model of the smaller config is built without weights and compared with the whole one, which is
refused where a layer that stays would become another one.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lm_eval_pruned.pruning.argument_values import written_layers
from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    text_config,
)


if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.arguments import PruneArguments

    #: Path of a module in the model with fewer layers, an attribute and its new value.
    Change = tuple[str, str, Any]

#: Lists of a config that are about something else than layers, however long they are.
_OTHER_LISTS = re.compile(r"token|architectures|label|bos|eos|multiplier")
#: Names of lists that hold the numbers of some layers.
_NUMBERS_OF_LAYERS = re.compile(r"layers|idx|indices|index")
#: The first so many layers are dense.
_FIRST_DENSE = "first_k_dense_replace"
#: Buffers that a layer computes from its config, and that are the same in all layers.
_ALIKE = {"inv_freq", "original_inv_freq", "mup_vector"}


@dataclass(frozen=True)
class Depth:
    """Which layers stay.

    Attributes:
        before: Number of layers of the unpruned model.
        kept: Its numbers of those that stay, ascending; the layer ``kept[i]`` becomes layer i.
        asked: What the user asked for, as ``{argument: value}``.
        influence: Block influence of each layer of the unpruned model, where it decided.
        measured_on: Name, SHA-256, texts and tokens of the text of `influence`.

    Example:
        >>> from lm_eval_pruned.pruning.arguments import PruneArguments
        >>> Depth.of(PruneArguments(drop_layers=2), 6).kept
        (0, 1, 2, 5)
    """

    before: int
    kept: tuple[int, ...]
    asked: dict[str, str]
    influence: tuple[float, ...] | None = None
    measured_on: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        arguments: PruneArguments,
        layers: int,
        influence: Sequence[float] | None = None,
        measured_on: Mapping[str, Any] | None = None,
    ) -> Depth:
        """Resolve arguments that drop layers against a model of so many.

        Without the block `influence` that `arguments` choose by, layers are chosen by their place,
        so that their number can be checked.

        Raises:
            ValueError: A layer does not exist, or none would stay.
        """
        chosen: Any = arguments.drop_layers
        if isinstance(chosen, int):
            written, count = str(chosen), chosen
            asked = {"drop_layers": written}
            if arguments.measures_depth:
                asked["drop_by"] = arguments.drop_by
            order = [*range(layers - 2, -1, -1)]
            if influence is not None:
                # Of layers alike, the later goes.
                order = sorted(range(layers), key=lambda n: (influence[n], -n))
            dropped, instead = order[:count], f"pass a number from 1 to {layers - 1}"
        else:
            written, count, dropped = written_layers(chosen), len(chosen), chosen
            asked = {"drop_layers": f"[{written}]"}
            instead = "leave out at least one of them"
            if chosen[-1] >= layers:
                raise ValueError(
                    f"drop_layers={written} names layer {chosen[-1]}, but the layers of this model "
                    f"are 0-{layers - 1}."
                )
        if count >= layers:
            raise ValueError(
                f"drop_layers={written} would drop all {layers} layers of this model: {instead}."
            )
        kept = tuple(n for n in range(layers) if n not in dropped)
        decided = None if influence is None else tuple(influence)
        return cls(layers, kept, asked, decided, measured_on)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Numbers of the layers that go, ascending."""
        return tuple(n for n in range(self.before) if n not in self.kept)

    def as_dict(self) -> dict[str, Any]:
        """Return what the results file holds (JSON types only)."""
        record: dict[str, Any] = {
            "layers_before": self.before,
            "layers_dropped": written_layers(self.dropped),
            "layers_kept": written_layers(self.kept),
        }
        if self.influence is not None and self.measured_on is not None:
            influence = enumerate(self.influence)
            record["block_influence"] = {
                str(n): round(value, 8) for n, value in influence
            }
            record["influence_measured_on"] = dict(self.measured_on)
        return record


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of decoder layers of a model, and the list.

    Raises:
        UnsupportedModelError: There is none, or the config says another number.
    """
    paths = {mlp.layer_path.rpartition(".")[0] for mlp in find_glu_mlps(model)}
    path = min(paths)
    layers = model.get_submodule(path)
    count = getattr(text_config(model.config), "num_hidden_layers", None)
    if model.config.is_encoder_decoder:
        raise _refused(model, "it has an encoder")
    if len(paths) > 1 or not isinstance(layers, nn.ModuleList) or count != len(layers):
        raise UnsupportedModelError(
            f"{describe(model)} does not hold its GLU-MLPs in one list of {count} layers, the number "
            "in its config, so drop_layers, repair and criterion=obs (recipe=best) cannot be used "
            "with it: leave them out, or pass recipe=fast."
        )
    return path, layers


def shallow_config(config: PretrainedConfig, depth: Depth) -> PretrainedConfig:
    """Return a copy of `config` for the layers that `depth` keeps.

    Raises:
        UnsupportedModelError: None of several kinds of layers that attend would be left, and
            transformers generates with no such model.
    """
    kinds = enumerate(getattr(text_config(config), "layer_types", None) or [])
    attending = {n for n, kind in kinds if "attention" in kind and "linear" not in kind}
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
    """Change the number of layers, lists of their numbers, and lists with an entry for each."""
    new = {old: number for number, old in enumerate(depth.kept)}
    for name, value in list(vars(text).items()):
        if not isinstance(value, (list, tuple)) or _OTHER_LISTS.search(name):
            continue
        for_each = len(value) == depth.before
        named = _NUMBERS_OF_LAYERS.search(name) and all(type(n) is int for n in value)
        every = [*range(depth.before)] if for_each else named and sorted({*value})
        if named and list(value) == every:
            vars(text)[name] = type(value)(new[old] for old in value if old in new)
        elif for_each:
            vars(text)[name] = type(value)(value[old] for old in depth.kept)
    if isinstance(first := getattr(text, _FIRST_DENSE, None), int):
        setattr(text, _FIRST_DENSE, sum(old < first for old in depth.kept))
    overrides = text.to_dict().get("per_layer_config") or {}
    # transformers checks the numbers of one when the other is set.
    vars(text).pop("per_layer_config", None)
    text.num_hidden_layers = len(depth.kept)
    if overrides:
        text.per_layer_config = {
            str(new[int(old)]): values
            for old, values in overrides.items()
            if int(old) in new
        }


def attributes_that_change(
    whole: PreTrainedModel, shallow: PreTrainedModel, depth: Depth
) -> list[Change]:
    """Drop layers of `whole`, and return the numbers of layers that its modules have to forget.

    `shallow` is the model of its `shallow_config`; both are without weights.

    Raises:
        UnsupportedModelError: Some module would be another one.
    """
    path, layers = layers_of(whole)
    whole.set_submodule(path, nn.ModuleList(layers[old] for old in depth.kept))
    others = dict(shallow.named_modules())
    changes: list[Change] = []
    for name, module in whole.named_modules():
        other, before = others.pop(name, None), name
        expected: tuple[int, ...] = (depth.before, len(depth.kept))
        inside = re.match(rf"{re.escape(path)}\.(\d+)", name)
        if inside:
            number = int(inside[1])
            expected = depth.kept[number], number
            before = f"{path}.{depth.kept[number]}{name[inside.end() :]}"
            computed = {*getattr(module, "_non_persistent_buffers_set", ())} - _ALIKE
            if computed:
                raise _depends(whole, f"{before}.{min(computed)}")
        if type(other) is not type(module):
            raise _depends(whole, before)
        old, new = _remembered(module), _remembered(other)
        for attribute in old.keys() | new.keys():
            values = old.get(attribute), new.get(attribute)
            if values[0] == values[1]:
                continue
            # A model may remember whether it has some kind of layer, or things for that kind.
            summary = type(values[1]) is bool or None in values
            if values != expected and (inside or not summary):
                raise _depends(whole, f"{before}.{attribute}")
            if values[1] is not None:
                changes.append((name, attribute, values[1]))
    if others:
        raise _depends(whole, path)
    return changes


def _remembered(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module that a config may decide, and its shapes."""
    kinds = (bool, int, float, str)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    return {n: v for n, v in vars(module).items() if isinstance(v, kinds)} | shapes


def _depends(model: PreTrainedModel, name: str) -> Exception:
    why = f"{name} depends on the number of its layer or on how many there are"
    return _refused(model, why)


def _refused(model: PreTrainedModel, reason: str) -> Exception:
    return UnsupportedModelError(
        f"drop_layers cannot be used with {describe(model)}, because {reason}: leave it out."
    )


def drop_layers(
    model: PreTrainedModel,
    depth: Depth,
    changes: list[Change],
    undo: contextlib.ExitStack,
) -> None:
    """Drop layers of a model in place; `undo` collects what restores it."""
    path, layers = layers_of(model)
    text = text_config(model.config)
    # The parts of a model may have copies of one config.
    configs = [text, *(getattr(module, "config", None) for module in model.modules())]
    for config in {id(config): config for config in configs}.values():
        if type(config) is type(text) and config.num_hidden_layers == depth.before:
            undo.callback(vars(config).update, copy.deepcopy(vars(config)))
            _make_shallow(config, depth)
    undo.callback(model.set_submodule, path, layers)
    model.set_submodule(path, nn.ModuleList(layers[old] for old in depth.kept))
    for where, name, value in changes:
        owner = model.get_submodule(where)
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
