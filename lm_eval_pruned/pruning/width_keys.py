"""Which config key sets which GLU-MLP's width.

The keys are not listed anywhere: a key belongs to the MLPs whose width doubles
when it doubles, in a skeleton of the model. A key that also sets the shape of
something else, such as a state-space layer, is found out the same way.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.layouts import (
    GluMlp,
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.per_layer import WIDTH_NAME


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    Build = Callable[[PretrainedConfig], PreTrainedModel]


@dataclass(frozen=True)
class WidthKey:
    """A number in a config that sets widths.

    Attributes:
        path: Names of the sub-configs that lead to it, such as ``("text_config",)``.
        name: Its own name, such as ``intermediate_size``.
        index: Its position, where the config has a list with one number per layer.
    """

    path: tuple[str, ...]
    name: str
    index: int | None = None

    def __str__(self) -> str:
        where = ".".join((*self.path, self.name))
        return where if self.index is None else f"{where}[{self.index}]"

    def get(self, config: PretrainedConfig) -> int:
        """Return its value in `config`."""
        value = getattr(self._owner(config), self.name)
        return value if self.index is None else value[self.index]

    def set(self, config: PretrainedConfig, value: int) -> None:
        """Set its value in `config`."""
        owner = self._owner(config)
        if self.index is None:
            setattr(owner, self.name, value)
            return
        values = list(getattr(owner, self.name))
        values[self.index] = value
        setattr(owner, self.name, values)

    def double(self, config: PretrainedConfig) -> None:
        """Double the number in `config`, or every number of its list."""
        value = getattr(self._owner(config), self.name)
        doubled = 2 * value if isinstance(value, int) else [2 * v for v in value]
        setattr(self._owner(config), self.name, doubled)

    def of_layer(self, config: PretrainedConfig, layer: int) -> WidthKey | None:
        """Return the key of one layer: an entry, where the config has a list."""
        value = getattr(self._owner(config), self.name)
        if isinstance(value, int):
            return self
        return WidthKey(self.path, self.name, layer) if layer < len(value) else None

    def _owner(self, config: PretrainedConfig) -> Any:
        owner = config
        for name in self.path:
            owner = getattr(owner, name)
        return owner


def find_keys(
    config: PretrainedConfig,
    model: PreTrainedModel,
    mlps: list[GluMlp],
    build: Build,
) -> dict[str, WidthKey]:
    """Find the key of each GLU-MLP's width, by the MLP's name.

    Args:
        config: Config of the model.
        model: The model, on the meta device.
        mlps: Its GLU-MLPs.
        build: Returns a model of a config on the meta device.

    Raises:
        UnsupportedModelError: The width of one has no key, or none of its own.
    """
    neurons = regions_by_parameter(mlps)
    widths = {mlp.name: mlp.width for mlp in mlps}
    shapes = _shapes(model)
    keys: dict[str, WidthKey] = {}
    refusals: dict[str, str] = {}
    for key in _candidates(config):
        probe = copy.deepcopy(config)
        try:
            key.double(probe)
            probed_model = build(probe)
            probed = {mlp.name: mlp.width for mlp in find_glu_mlps(probed_model)}
        except Exception:  # noqa: BLE001, S112 - configs refuse values in any way
            continue
        changed = [n for n in widths if probed.get(n) != widths[n]]
        if not changed:
            continue
        probed_shapes = _shapes(probed_model)
        others = [
            name
            for name in shapes.keys() | probed_shapes.keys()
            if name not in neurons and shapes.get(name) != probed_shapes.get(name)
        ]
        own_keys = {
            mlp.name: own
            for mlp in mlps
            if (own := key.of_layer(config, mlp.block)) is not None
        }
        if others:
            reason = f"{key} in its config also sets the shape of {min(others)}"
        elif any(
            probed.get(name) != 2 * widths[name] or name not in own_keys
            for name in changed
        ):
            reason = f"the widths do not grow in proportion to {key} in its config"
            better = _better_value(key, config, changed[0], widths, probed, build)
            if better is not None:
                reason = (
                    f"{key}={key.get(config)} in its config does not divide into whole neurons: "
                    f"write {better} there, which builds the same model"
                )
        else:
            keys |= {name: own_keys[name] for name in changed if name not in keys}
            continue
        refusals |= dict.fromkeys(changed, reason)
    for name in widths:
        if name not in keys:
            reason = refusals.get(name, "no key of its config sets that width")
            raise UnsupportedModelError(
                f"{describe(model)} cannot be pruned in {name}, because {reason}."
            )
    return keys


def _better_value(
    key: WidthKey,
    config: PretrainedConfig,
    name: str,
    widths: Mapping[str, int],
    probed: Mapping[str, int],
    build: Build,
) -> int | None:
    """Return the value of `key` that builds the same model without a remainder, if any.

    RecurrentGemma halves its key, so that 97 and 96 both build 48 neurons.

    Args:
        key: A key to which the widths are not proportional.
        config: The config.
        name: An MLP whose width it sets.
        widths: The widths of the MLPs as they are.
        probed: The widths with the value of `key` doubled.
        build: Returns a model of a config on the meta device.
    """
    value = key.get(config)
    if not isinstance(value, int) or not probed.get(name):
        return None
    better = Fraction(widths[name] * 2 * value, probed[name])
    if better.denominator > 1 or not 0 < better < value:
        return None
    other = copy.deepcopy(config)
    key.set(other, int(better))
    same = {mlp.name: mlp.width for mlp in find_glu_mlps(build(other))} == widths
    return int(better) if same else None


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _candidates(
    config: PretrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[WidthKey]:
    from transformers import PretrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _candidates(value, (*path, name))
            continue
        if not WIDTH_NAME.search(name):
            continue
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        if numbers and all(type(n) is int and n > 0 for n in numbers):
            yield WidthKey(path, name)
