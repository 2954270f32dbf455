"""Widths: which config key sets which GLU-MLP's width, and what each becomes.

The keys are not listed anywhere: a key belongs to the MLPs whose width doubles
when it doubles, in a skeleton of the model. A key that also sets the shape of
something else, such as a state-space layer, is found out the same way.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.layouts import (
    GluMlp,
    UnsupportedModelError,
    count_parameters,
    describe,
    find_glu_mlps,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.plan import PrunePlan


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.arguments import PruneArguments

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


_DERIVES_WIDTH = "block_auto_adjust_ff_dim"
_WIDTH_NAME = re.compile(r"intermediate|ffn|ff_dim|d_ff|mlp_(dim|size|hidden)|ff_size")


class Widths:
    """The GLU-MLPs of one model, the widths they have, and the keys that set them.

    Attributes:
        original: The config.
        config: The same with plain width keys; see `plain_config`.
        model_class: Class of the model.
        mlps: The GLU-MLPs, in order, without weights.
        keys: The key of each MLP, by the MLP's name.
        actual: The width of each MLP, by name. Differs from what the config says
            where layers were pruned one by one.
        configured: The width of each MLP as the config has it, by name.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        build: Build,
        actual: Mapping[str, int] | None = None,
    ):
        """Find the GLU-MLPs that `config` describes and the keys of their widths.

        Args:
            config: Config of the model.
            build: Returns a model of a config on the meta device.
            actual: Width of each MLP by name; default: as `config` says.

        Raises:
            UnsupportedModelError: The model cannot be pruned.
        """
        self.original = config
        self.config = plain_config(config)
        self._build = build
        model = build(self.config)
        self.model_class = type(model)
        self._parameters = count_parameters(model)
        self.mlps = find_glu_mlps(model)
        self.keys = _find_keys(self.config, model, self.mlps, build)
        self.configured = {mlp.name: mlp.width for mlp in self.mlps}
        self.actual = dict(actual or self.configured)
        self._factors = {
            mlp.name: Fraction(mlp.width, self.keys[mlp.name].get(self.config))
            for mlp in self.mlps
        }
        self._values: dict[WidthKey, int] = {}
        for name, key in self.keys.items():
            value = math.ceil(self.actual[name] / self._factors[name])
            self._values[key] = max(value, self._values.get(key, 0))

    def skeleton(self, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, of `config` or else of its own."""
        return self._build(self.config if config is None else config)

    def of(self, actual: Mapping[str, int]) -> Widths:
        """Return those of the same model with the width `actual` of each MLP, by name."""
        return Widths(self.original, self._build, actual)

    @property
    def primary(self) -> GluMlp:
        """The MLP to which sizes refer: the first expert, else the first of all."""
        experts = [mlp for mlp in self.mlps if mlp.kind == "expert"]
        return (experts or self.mlps)[0]

    def plan(self, arguments: PruneArguments) -> PrunePlan:
        """Resolve the user's arguments; see `PrunePlan.from_arguments`."""
        primary = self.primary
        key = self.keys[primary.name]
        widest = max(
            value
            for other, value in self._values.items()
            if (other.path, other.name) == (key.path, key.name)
        )
        return PrunePlan.of(
            arguments,
            primary.hidden_size,
            int(widest * self._factors[primary.name]),
            self.layers,
        )

    @property
    def layers(self) -> dict[int, int]:
        """The width of each layer that has a GLU-MLP, in neurons, by number, ascending.

        It is that of the layer's experts, else of its MLP.
        """
        found: dict[int, GluMlp] = {}
        for mlp in self.mlps:
            first = found.setdefault(mlp.block, mlp)
            if mlp.kind == "expert" != first.kind:
                found[mlp.block] = mlp
        return {block: self.actual[found[block].name] for block in sorted(found)}

    def targets(self, plan: PrunePlan) -> dict[str, int]:
        """Return the kept width of each MLP, by name."""
        if plan.layer_widths is not None:
            return self._targets_by_layer(plan, dict(plan.layer_widths))
        targets = {}
        for mlp in self.mlps:
            own, key = self.actual[mlp.name], self.keys[mlp.name]
            factor = self._factors[mlp.name]
            targets[mlp.name] = own
            if not plan.prunes or not plan.includes_layer(mlp.block):
                continue
            if own == factor * self._values[key] and key.index is None:
                targets[mlp.name] = int(factor * plan.scaled(self._values[key]))
            else:
                targets[mlp.name] = plan.of_own(own)
        return targets

    def _targets_by_layer(
        self, plan: PrunePlan, kept: Mapping[int, int]
    ) -> dict[str, int]:
        """Return the kept width of each MLP where the layers have widths of their own.

        Shared experts, and whatever else is as wide as it pleases in a layer, are
        narrowed in the proportion of the layer.
        """
        layers, targets = self.layers, {}
        for mlp in self.mlps:
            own, before = self.actual[mlp.name], layers[mlp.block]
            after = kept.get(mlp.block, before)
            targets[mlp.name] = own
            if after < before:
                share = Fraction(own * after, before)
                targets[mlp.name] = (
                    after if own == before else plan.rounded(math.ceil(share))
                )
        return targets

    def count_parameters(self, widths: Mapping[str, int]) -> int:
        """Return the parameters of the model with these widths; tied ones count once."""
        return self._parameters + sum(
            (widths[mlp.name] - mlp.width)
            * sum(mlp.weight(*place).numel() // mlp.width for place in mlp.regions)
            for mlp in self.mlps
        )

    def narrowed_config(self, targets: Mapping[str, int]) -> PretrainedConfig:
        """Return a copy of the config with the widths of `targets`, as far as it can hold them.

        Raises:
            UnsupportedModelError: The model's config does not accept the widths.
        """
        narrowed = self._narrowed(targets)
        self._check(narrowed, targets)
        return narrowed

    def inexpressible(self, targets: Mapping[str, int]) -> list[str]:
        """Return the names of the MLPs whose width in `targets` no config can hold.

        Their key also sets the width of others.
        """
        narrowed = self._narrowed(targets)
        return [
            name
            for name, key in self.keys.items()
            if key.get(narrowed) * self._factors[name] != targets[name]
        ]

    def _narrowed(self, targets: Mapping[str, int]) -> PretrainedConfig:
        wanted: dict[WidthKey, set[int]] = {}
        for name, key in self.keys.items():
            value = math.ceil(targets[name] / self._factors[name])
            wanted.setdefault(key, set()).add(value)
        narrowed = copy.deepcopy(self.config)
        for key, values in wanted.items():
            if len(values) == 1:
                key.set(narrowed, *values)
        return narrowed

    def copy_keys(self, source: PretrainedConfig, target: PretrainedConfig) -> None:
        """Give `target` the width keys of `source`, as `plain_config` leaves them."""
        for key in set(self.keys.values()):
            key.set(target, key.get(source))
        text = source.get_text_config(decoder=True)
        if hasattr(text, _DERIVES_WIDTH):
            target.get_text_config(decoder=True).block_auto_adjust_ff_dim = False

    def _check(self, narrowed: PretrainedConfig, targets: Mapping[str, int]) -> None:
        """Refuse a config that would not build the model it stands for."""
        inexpressible = set(self.inexpressible(targets))
        try:
            model = self._build(narrowed)
        except Exception as error:  # noqa: BLE001 - configs refuse values in any way
            raise UnsupportedModelError(
                f"{type(self.config).__name__} does not accept the kept widths "
                f"{sorted(set(targets.values()))} ({error}): choose another size."
            ) from None
        for mlp in find_glu_mlps(model):
            if mlp.name not in inexpressible and mlp.width != targets[mlp.name]:
                raise UnsupportedModelError(
                    f"{describe(model)} builds {mlp.name} with {mlp.width} neurons where its "
                    f"config asks for {targets[mlp.name]}: choose another size."
                )


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of `config` in which the width key is the width.

    LFM2 can derive its width from the key by a rule of its own, which it stops
    doing on request.
    """
    plain = copy.deepcopy(config)
    text = plain.get_text_config(decoder=True)
    if getattr(text, _DERIVES_WIDTH, False):
        width = int(2 * text.intermediate_size / 3)
        if text.block_ffn_dim_multiplier is not None:
            width = int(text.block_ffn_dim_multiplier * width)
            multiple = text.block_multiple_of
            width = multiple * ((width + multiple - 1) // multiple)
        text.intermediate_size = width
        text.block_auto_adjust_ff_dim = False
    return plain


def _find_keys(
    config: PretrainedConfig,
    model: PreTrainedModel,
    mlps: list[GluMlp],
    build: Build,
) -> dict[str, WidthKey]:
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
        if not _WIDTH_NAME.search(name):
            continue
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        if numbers and all(type(n) is int and n > 0 for n in numbers):
            yield WidthKey(path, name)
