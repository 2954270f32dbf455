"""Widths: how wide the GLU-MLPs of a model are, and what each becomes."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from lm_eval_pruned.pruning.dropping import (
    attributes_that_change,
    layers_of,
    moved_name,
    shallow_config,
)
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    GluMlp,
    UnsupportedModelError,
    count_parameters,
    describe,
    find_glu_mlps,
)
from lm_eval_pruned.pruning.per_layer import (
    copy_layers,
    with_layers,
    without_layers,
)
from lm_eval_pruned.pruning.plan import PrunePlan
from lm_eval_pruned.pruning.width_keys import WidthKey, find_keys


if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.depth import Depth
    from lm_eval_pruned.pruning.width_keys import Build


_DERIVES_WIDTH = "block_auto_adjust_ff_dim"


class Widths:
    """The GLU-MLPs of one model, the widths they have, and the keys that set them.

    Attributes:
        original: The config.
        config: The same with plain width keys, see `plain_config`, and without the
            widths that it has for single layers.
        model_class: Class of the model.
        mlps: The GLU-MLPs, in order, without weights.
        keys: The key of each MLP, by the MLP's name.
        actual: The width of each MLP, by name. Differs from what the config says
            where layers were pruned one by one.
        configured: The width of each MLP as a model of `config` has it, by name.
        depth: Which layers stay; None for all. The others are those of a model that never
            had the rest, `whole` has them all.
        whole: Those of the model with all its layers.
        remembered: What modules remember of the number of layers; see
            `lm_eval_pruned.pruning.dropping.attributes_that_change`.
    """

    depth: Depth | None = None
    remembered: list[tuple[str, str, Any]]

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
        self.whole = self
        self.remembered = []
        uniform, by_layer = without_layers(config)
        self.config = plain_config(uniform)
        self._build = build
        model = build(self.config)
        self.model_class = type(model)
        self._parameters = count_parameters(model)
        self.mlps = find_glu_mlps(model)
        self.keys = find_keys(self.config, model, self.mlps, build)
        self.configured = {mlp.name: mlp.width for mlp in self.mlps}
        self._factors = {
            mlp.name: Fraction(mlp.width, self.keys[mlp.name].get(self.config))
            for mlp in self.mlps
        }
        self.actual = dict(actual or self._said_of_layers(by_layer))
        # One number for the key of all layers, or for a list with one number per layer.
        self._widest: dict[tuple[tuple[str, ...], str], int] = {}
        for name, key in self.keys.items():
            value = math.ceil(self.actual[name] / self._factors[name])
            place = key.path, key.name
            self._widest[place] = max(value, self._widest.get(place, 0))

    def _said_of_layers(
        self, by_layer: Mapping[tuple[tuple[str, ...], str, int], int]
    ) -> dict[str, int]:
        """Return the widths of a config that has some for single layers, by MLP."""
        said, used = dict(self.configured), set()
        for mlp in self.mlps:
            key = self.keys[mlp.name]
            place = key.path, key.name, mlp.block
            if place in by_layer:
                said[mlp.name] = math.floor(self._factors[mlp.name] * by_layer[place])
                used.add(place)
        for path, name, layer in by_layer.keys() - used:
            raise UnsupportedModelError(
                f"The config gives layer {layer} a {'.'.join((*path, name))} of its own, which is "
                "the width of none of its MLPs: correct the number of the layer, or leave it out."
            )
        return said

    def skeleton(self, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, of `config` or else of its own."""
        return self._build(self.config if config is None else config)

    def of(self, actual: Mapping[str, int]) -> Widths:
        """Return those of the same model with the width `actual` of each MLP, by name."""
        widths = Widths(self.original, self._build, actual)
        if self.depth is not None:
            widths.whole, widths.depth = self.whole, self.depth
            widths.remembered = self.remembered
        return widths

    def without_layers(self, depth: Depth | None) -> Widths:
        """Return those of the same model with the layers of `depth`; itself for None.

        Raises:
            UnsupportedModelError: Layers of this model cannot be dropped.
        """
        if depth is None:
            return self
        whole = self.skeleton()
        path, _ = layers_of(whole)
        new = {old: number for number, old in enumerate(depth.kept)}
        actual = {
            moved: width
            for name, width in self.actual.items()
            if (moved := moved_name(name, path, new)) is not None
        }
        try:
            config = shallow_config(self.original, depth)
            shallow = self._build(plain_config(without_layers(config)[0]))
            remembered = attributes_that_change(whole, shallow, depth)
            widths = Widths(config, self._build, actual)
        except UnsupportedModelError:
            raise
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            raise UnsupportedModelError(
                f"drop_layers cannot be used with {describe(whole)}, whose config does not accept "
                f"{len(depth.kept)} layers ({error}): leave it out."
            ) from None
        widths.whole, widths.depth, widths.remembered = self, depth, remembered
        return widths

    @property
    def primary(self) -> GluMlp:
        """The MLP to which sizes refer: the first expert, else the first of all."""
        experts = [mlp for mlp in self.mlps if mlp.kind == "expert"]
        return (experts or self.mlps)[0]

    def plan(self, arguments: PruneArguments) -> PrunePlan:
        """Resolve the user's arguments; see `PrunePlan.from_arguments`."""
        primary = self.primary
        key = self.keys[primary.name]
        widest = self._widest[key.path, key.name]
        return PrunePlan.of(
            arguments,
            primary.hidden_size,
            int(widest * self._factors[primary.name]),
            {self._number(layer): width for layer, width in self.layers.items()},
            self.depth,
        )

    def _number(self, layer: int) -> int:
        """Return the number that the whole model gives a layer."""
        return layer if self.depth is None else self.depth.kept[layer]

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
            factor, widest = self._factors[mlp.name], self._widest[key.path, key.name]
            targets[mlp.name] = own
            if not plan.prunes or not plan.includes_layer(mlp.block):
                continue
            target = int(factor * plan.scaled(widest))
            narrower = own != factor * widest
            targets[mlp.name] = plan.of_own(own, target) if narrower else target
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

    @property
    def parameters_before(self) -> int:
        """The parameters of the unpruned model; tied ones count once."""
        if self.depth is not None:
            return self.whole.count_parameters(self.whole.actual)
        return self.count_parameters(self.actual)

    def narrowed_config(self, targets: Mapping[str, int]) -> PretrainedConfig:
        """Return a copy of the config with the widths of `targets`, as far as it can hold them.

        It is a copy of the original where that builds these widths.

        Raises:
            UnsupportedModelError: The model's config does not accept the widths.
        """
        if targets == self.configured == self.actual:
            return copy.deepcopy(self.original)
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

    def described(self, targets: Mapping[str, int]) -> PretrainedConfig:
        """Return a copy of the config that says the widths of `targets` layer by layer.

        Where no key can hold them it has a ``per_layer_config``; where that cannot
        either, because MLPs of one layer share a key, it says what it can. A class
        need not build its layers from that; see `opens_in_stock`.
        """
        narrowed = self._narrowed(targets)
        said: dict[tuple[tuple[str, ...], str, int], set[int]] = {}
        for mlp in self.mlps:
            key = self.keys[mlp.name]
            value = math.ceil(targets[mlp.name] / self._factors[mlp.name])
            if (
                key.index is None
                and value * self._factors[mlp.name] == targets[mlp.name]
            ):
                said.setdefault((key.path, key.name, mlp.block), set()).add(value)
        alike = {place: value for place, (value, *more) in said.items() if not more}
        if alike.keys() != said.keys() or not self.inexpressible(targets):
            return narrowed
        try:
            return with_layers(narrowed, alike)
        except ValueError:
            return narrowed

    def opens_in_stock(self, targets: Mapping[str, int]) -> bool:
        """Return whether the installed transformers builds a model of these widths.

        It does where a key of the config holds them, and where the class builds its
        MLPs from ``per_layer_config``.
        """
        if not self.inexpressible(targets):
            return True
        try:
            built = find_glu_mlps(self._build(self.described(targets)))
        except Exception:  # noqa: BLE001 - classes read such configs in any way
            return False
        return {mlp.name: mlp.width for mlp in built} == dict(targets)

    def describe_layers(
        self, config: PretrainedConfig, targets: Mapping[str, int]
    ) -> None:
        """Write the widths of `targets` into a config with the keys of `narrowed_config`."""
        if targets == self.configured == self.actual:
            return
        copy_layers(self.described(targets), config)

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
        """Give `target` the width keys of `source`, and whether they are the widths."""
        for key in set(self.keys.values()):
            key.set(target, key.get(source))
        text = source.get_text_config(decoder=True)
        if hasattr(text, _DERIVES_WIDTH):
            derives = text.block_auto_adjust_ff_dim
            target.get_text_config(decoder=True).block_auto_adjust_ff_dim = derives

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


def widths_in_memory(model: PreTrainedModel) -> Widths:
    """Return the widths of a loaded model and the config keys that set them.

    Raises:
        UnsupportedModelError: The model cannot be pruned.
    """

    def build(config: PretrainedConfig) -> PreTrainedModel:
        with BUILDING, torch.device("meta"):
            return type(model)(copy.deepcopy(config))

    return Widths(
        model.config, build, {mlp.name: mlp.width for mlp in find_glu_mlps(model)}
    )
