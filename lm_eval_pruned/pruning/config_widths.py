"""The key of a config that sets the width of each GLU-MLP.

Keys are found, not listed: a key belongs to the MLPs whose width doubles when it doubles, in a model
without weights. LFM2 computes its width from several keys; here it is taken from one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    text_config,
    without_weights,
)


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp

#: Names of keys that may set a width.
_WIDTH_NAME = re.compile(r"intermediate|ffn|ff_dim|d_ff|mlp_(dim|size|hidden)|ff_size")
#: Whether LFM2 computes its width, rather than take it as it is.
COMPUTES_WIDTH = "block_auto_adjust_ff_dim"


@dataclass(frozen=True)
class WidthKey:
    """A number in a config that sets widths.

    Attributes:
        path: Names of the sub-configs that lead to it, such as ``("text_config",)``.
        name: Its own name, such as ``intermediate_size``.
        layer: The layer that it is about; None where all share one number.
        factor: Neurons of an MLP for each unit of it.
    """

    path: tuple[str, ...]
    name: str
    layer: int | None = None
    factor: Fraction = dataclasses.field(default=Fraction(1), compare=False)

    def __str__(self) -> str:
        where = ".".join((*self.path, self.name))
        return where if self.layer is None else f"{where}[{self.layer}]"

    def get(self, config: PretrainedConfig) -> Any:
        """Return its value in `config`: that of its layer, else what all layers share."""
        value = getattr(functools.reduce(getattr, self.path, config), self.name)
        return value if self.layer is None else value[self.layer]

    def set(self, config: PretrainedConfig, value: Any) -> None:
        """Set its value in `config`."""
        part = functools.reduce(getattr, self.path, config)
        if self.layer is not None:
            entries = list(getattr(part, self.name))
            entries[self.layer] = value
            value = entries
        setattr(part, self.name, value)


def find_keys(
    config: PretrainedConfig, model: PreTrainedModel, mlps: Sequence[GluMlp]
) -> dict[str, WidthKey]:
    """Find the key of the width of each of the GLU-MLPs of `model`, by the MLP's name.

    `config` is as `plain_config` returns it, and `model` is of it, without weights.

    Raises:
        UnsupportedModelError: The width of one has no key, or shares its key.
    """
    shapes = _shapes(model)
    neurons = {region.parameter for mlp in mlps for region in mlp.regions.values()}
    keys: dict[str, WidthKey] = {}
    refusals = {mlp.name: "no key of its config sets that width" for mlp in mlps}
    for key in _candidates(config):
        value, probe = key.get(config), copy.deepcopy(config)
        try:
            key.set(probe, 2 * value if type(value) is int else [2 * n for n in value])
            other = without_weights(type(model), probe)
            doubled = {mlp.name: mlp.width for mlp in find_glu_mlps(other)}
        except Exception:  # noqa: BLE001, S112 - configs refuse values in any way
            continue
        reshaped = {name for name, _ in shapes ^ _shapes(other)} - neurons
        for mlp in mlps:
            if doubled.get(mlp.name) == mlp.width or mlp.name in keys:
                continue
            if reshaped:
                why = f"{key} in its config also sets the shape of {min(reshaped)}"
                refusals[mlp.name] = why
            elif doubled.get(mlp.name) == 2 * mlp.width:
                layer = None if type(value) is int else mlp.layer
                single = dataclasses.replace(key, layer=layer)
                factor = Fraction(mlp.width, single.get(config))
                keys[mlp.name] = dataclasses.replace(single, factor=factor)
    for name, reason in refusals.items():
        if name not in keys:
            raise UnsupportedModelError(
                f"{describe(model)} cannot be pruned in {name}, because {reason}."
            )
    return keys


def _shapes(model: PreTrainedModel) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(t.shape)) for name, t in model.state_dict().items()}


def _candidates(
    config: PretrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[WidthKey]:
    """Yield the numbers of a config, and of those inside it, that may be widths by their names."""
    for name, value in vars(config).items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        whole = numbers and all(type(n) is int and n > 0 for n in numbers)
        if whole and _WIDTH_NAME.search(name):
            yield WidthKey(path, name)
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            yield from _candidates(value, (*path, name))


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config whose keys are the widths, where the model computes them from the keys."""
    plain = copy.deepcopy(config)
    text: Any = text_config(plain)
    if getattr(text, COMPUTES_WIDTH, False):
        width = int(2 * text.intermediate_size / 3)
        if text.block_ffn_dim_multiplier is not None:
            width = int(text.block_ffn_dim_multiplier * width)
            width = -(-width // text.block_multiple_of) * text.block_multiple_of
        text.intermediate_size = width
        setattr(text, COMPUTES_WIDTH, False)
    if plain.model_type == "recurrent_gemma":
        # It builds half as many neurons, rounded down.
        text.intermediate_size -= text.intermediate_size % 2
    return plain
