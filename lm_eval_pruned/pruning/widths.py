"""Widths: how wide the GLU-MLPs of a model are, and what each becomes."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from lm_eval_pruned.pruning.config_widths import (
    COMPUTES_WIDTH,
    WidthKey,
    copy_layers,
    find_keys,
    taken_apart,
)
from lm_eval_pruned.pruning.depth import (
    attributes_that_change,
    shallow_config,
)
from lm_eval_pruned.pruning.layouts import (
    BUILDING,
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    text_config,
)
from lm_eval_pruned.pruning.plan import PrunePlan


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.config_widths import Build
    from lm_eval_pruned.pruning.depth import Change, Depth
    from lm_eval_pruned.pruning.layouts import GluMlp


class Widths:
    """The GLU-MLPs of one model, the widths they have, and the keys that set them.

    Attributes:
        original: The config.
        config: What `lm_eval_pruned.pruning.config_widths.taken_apart` makes of it.
        model_class: Class of the model.
        mlps: The GLU-MLPs, in order, without weights.
        keys: The key of each MLP, by the MLP's name.
        actual: The width of each MLP, by name.
        configured: The width of each MLP as a model of `config` has it, by name.
        depth: Which layers stay; None for all. The others are those of a model that never
            had the rest, `whole` has them all.
        whole: Those of the model with all its layers.
        remembered: What modules remember of the number of layers; see
            `lm_eval_pruned.pruning.depth.attributes_that_change`.
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
        """
        self.original = config
        self.config, by_layer = taken_apart(config)
        self._build = build
        model = build(self.config)
        self.model_class = type(model)
        self._parameters = model.num_parameters()
        self.mlps = find_glu_mlps(model)
        self.keys = find_keys(self.config, model, self.mlps, build)
        self.configured = {mlp.name: mlp.width for mlp in self.mlps}
        self.actual = dict(actual or self.configured)
        for mlp in self.mlps if actual is None else ():
            key = self.keys[mlp.name].of_layer(mlp.block)
            if key in by_layer:
                self.actual[mlp.name] = math.floor(key.factor * by_layer[key])
        self.depth: Depth | None = None
        self.whole = self
        self.remembered: list[Change] = []

    def skeleton(self, config: PretrainedConfig | None = None) -> PreTrainedModel:
        """Return the model on the meta device, built from `config` or from the one that it has."""
        return self._build(config or self.config)

    def of(self, actual: Mapping[str, int]) -> Widths:
        """Return those of the same whole model with the width `actual` of each MLP, by name."""
        widths = copy.copy(self)
        for derived in ("layers", "_widest"):
            vars(widths).pop(derived, None)
        widths.actual, widths.whole = dict(actual), widths
        return widths

    def without_layers(self, depth: Depth | None) -> Widths:
        """Return those of the same model with the layers of `depth`; itself for None."""
        if depth is None:
            return self
        whole = self.skeleton()
        own = [self.actual[mlp.name] for mlp in self.mlps if mlp.block in depth.kept]
        try:
            config = shallow_config(self.original, depth)
            shallow = self._build(taken_apart(config)[0])
            remembered = attributes_that_change(whole, shallow, depth)
            names = [mlp.name for mlp in find_glu_mlps(shallow)]
            widths = Widths(config, self._build, dict(zip(names, own, strict=True)))
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"drop_layers cannot be used with {describe(whole)}, whose config does not accept "
                f"{len(depth.kept)} layers ({error}): leave it out."
            ) from None
        widths.whole, widths.depth, widths.remembered = self, depth, remembered
        return widths

    @functools.cached_property
    def _experts_first(self) -> list[GluMlp]:
        """The MLPs; the first of a layer represents it, and the first of all the model."""
        return sorted(self.mlps, key=lambda mlp: mlp.kind != "expert")

    @functools.cached_property
    def layers(self) -> dict[int, int]:
        """The width of each layer's experts, else of its MLP, in neurons, by number, ascending."""
        found = {m.block: self.actual[m.name] for m in reversed(self._experts_first)}
        return dict(sorted(found.items()))

    @functools.cached_property
    def _widest(self) -> dict[str, int]:
        """Return the value of each MLP's key, of any layer, that builds the widest of its kind."""
        kinds = {name: key.of_layer(None) for name, key in self.keys.items()}
        values: dict[WidthKey, int] = defaultdict(int)
        for name, kind in kinds.items():
            value = math.ceil(self.actual[name] / kind.factor)
            values[kind] = max(value, values[kind])
        return {name: values[kind] for name, kind in kinds.items()}

    def plan(self, arguments: PruneArguments) -> PrunePlan:
        """Resolve the user's arguments, which refer to its experts, else to its first MLP."""
        first = self._experts_first[0]
        kept = self.depth.kept if self.depth else range(max(self.layers) + 1)
        return PrunePlan.of(
            arguments,
            first.hidden_size,
            int(self._widest[first.name] * self.keys[first.name].factor),
            {kept[n]: width for n, width in self.layers.items()},
            self.depth,
        )

    def targets(self, plan: PrunePlan) -> dict[str, int]:
        """Return the kept width of each MLP, by name.

        Where the layers have widths of their own, shared experts, and whatever else is as wide
        as it pleases in a layer, are narrowed in the proportion of the layer.
        """
        targets = dict(self.actual)
        if not plan.prunes:
            return targets
        widest, before = self._widest, self.layers
        after = before | dict(plan.layer_widths or ())
        for mlp in self.mlps:
            own, old, new = targets[mlp.name], before[mlp.block], after[mlp.block]
            if plan.layer_widths is None:
                if plan.includes_layer(mlp.block):
                    unit = self.keys[mlp.name].factor
                    targets[mlp.name] = plan.kept_of(own, widest[mlp.name], unit)
            elif own == old:
                targets[mlp.name] = new
            elif new < old:
                targets[mlp.name] = plan.rounded(-(-own * new // old))
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
        return self.whole.count_parameters(self.whole.actual)

    def narrowed_config(self, targets: Mapping[str, int]) -> PretrainedConfig:
        """Return a copy of the config with the widths of `targets`, as far as keys hold them."""
        if targets == self.configured == self.actual:
            return copy.deepcopy(self.original)
        narrowed = copy.deepcopy(self.config)
        for key, value in self._values(targets).items():
            key.set(narrowed, value)
        return narrowed

    def inexpressible(self, targets: Mapping[str, int]) -> list[str]:
        """Return the names of the MLPs whose width in `targets` no key of the config can hold.

        Stock transformers builds a model of these widths if there are none.
        """
        values, keys = self._values(targets), self.keys
        return [n for n in keys if values[keys[n]] * keys[n].factor != targets[n]]

    def _values(self, targets: Mapping[str, int]) -> dict[WidthKey, int]:
        """Return the value of each key: what its MLPs agree on, else the one that it has."""
        wanted: dict[WidthKey, set[int]] = defaultdict(set)
        for name, key in self.keys.items():
            wanted[key].add(math.ceil(targets[name] / key.factor))
        return {
            key: values.pop() if len(values) == 1 else key.get(self.config)
            for key, values in wanted.items()
        }

    def copy_keys(self, source: PretrainedConfig, target: PretrainedConfig) -> None:
        """Give `target` the width keys of `source`, and whether they are the widths."""
        for key in set(self.keys.values()):
            key.set(target, key.get(source))
        computes = getattr(text_config(source), COMPUTES_WIDTH, None)
        if computes is not None:
            setattr(text_config(target), COMPUTES_WIDTH, computes)

    def describe_layers(
        self, config: PretrainedConfig, targets: Mapping[str, int]
    ) -> None:
        """Write the widths of `targets` into ``per_layer_config`` where no key can hold them.

        Where that cannot either, because MLPs of one layer share a key, nothing is written: a
        config that says other widths than the tensors have is refused, one without them is not.
        `config` has the keys of `narrowed_config`.
        """
        if targets == self.configured == self.actual:
            return
        said: dict[WidthKey, int] = {}
        for mlp in self.mlps if self.inexpressible(targets) else ():
            key = self.keys[mlp.name]
            value = targets[mlp.name] / key.factor
            if key.layer is not None:
                continue
            if said.setdefault(key.of_layer(mlp.block), int(value)) != value:
                said.clear()
                break
        try:
            copy_layers(self.config, config, said)
        except ValueError:
            copy_layers(self.config, config)


def widths_in_memory(model: PreTrainedModel) -> Widths:
    """Return the widths of a loaded model and the config keys that set them."""

    def build(config: PretrainedConfig) -> PreTrainedModel:
        with BUILDING, torch.device("meta"):
            return type(model)(copy.deepcopy(config))

    actual = {mlp.name: mlp.width for mlp in find_glu_mlps(model)}
    return Widths(model.config, build, actual)
