"""Widths: how wide the GLU-MLPs of a model are, and what each becomes."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.config_widths import (
    COMPUTES_WIDTH,
    WidthKey,
    find_keys,
    plain_config,
)
from lm_eval_pruned.pruning.depth import (
    attributes_that_change,
    shallow_config,
)
from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    text_config,
    without_weights,
)
from lm_eval_pruned.pruning.plan import PrunePlan


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.depth import Change, Depth


class Widths:
    """The GLU-MLPs of one model, the widths they have, and the keys that set them.

    Attributes:
        skeleton: The model without weights, of `config`.
        original: The config that it has.
        config: What `lm_eval_pruned.pruning.config_widths.plain_config` makes of it.
        mlps: The GLU-MLPs of `skeleton`, in order.
        keys: The key of each MLP, by the MLP's name.
        configured: The width that the config gives each MLP, by name.
        actual: The width that it has.
        layers: The width of each layer's experts, else of its MLP, in neurons, by number, ascending.
        depth: Which layers stay; None for all. The others are those of a model that never
            had the rest, `whole` has them all.
        whole: Those of the model with all its layers.
        remembered: What modules remember of the number of layers; see
            `lm_eval_pruned.pruning.depth.attributes_that_change`.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        config: PretrainedConfig,
        actual: Mapping[str, int] | None = None,
    ):
        """Find the GLU-MLPs of a model, and the keys of their widths.

        Args:
            skeleton: The model that `plain_config` of `config` describes, without weights.
            config: Config of the model.
            actual: Width of each MLP by name; default: as `config` says.
        """
        if type(skeleton.config) is not type(config):
            # The class is handed the part of the config that is of text.
            config = text_config(config)
        self.skeleton, self.original = skeleton, config
        self.config = plain_config(config)
        self.mlps = find_glu_mlps(skeleton)
        self.keys = find_keys(self.config, skeleton, self.mlps)
        self.configured = {mlp.name: mlp.width for mlp in self.mlps}
        self.actual = dict(actual or self.configured)
        # The first of a layer represents it, and the first of all the model.
        experts_first = sorted(self.mlps, key=lambda mlp: mlp.kind != "expert")
        self._first = experts_first[0]
        layers = {mlp.layer: self.actual[mlp.name] for mlp in reversed(experts_first)}
        self.layers = dict(sorted(layers.items()))
        self.depth: Depth | None = None
        self.whole = self
        self.remembered: list[Change] = []

    def without_layers(self, depth: Depth | None) -> Widths:
        """Return those of the same model with the layers of `depth`; itself for None."""
        if depth is None:
            return self
        actual = [self.actual[mlp.name] for mlp in self.mlps if mlp.layer in depth.kept]
        build = type(self.skeleton)
        try:
            config = shallow_config(self.original, depth)
            shallow = without_weights(build, plain_config(config))
            whole = without_weights(build, self.config)
            remembered = attributes_that_change(whole, shallow, depth)
            names = [mlp.name for mlp in find_glu_mlps(shallow)]
            widths = Widths(shallow, config, dict(zip(names, actual, strict=True)))
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"drop_layers cannot be used with {describe(self.skeleton)}, whose config does not accept "
                f"{len(depth.kept)} layers ({error}): leave it out."
            ) from None
        widths.whole, widths.depth, widths.remembered = self, depth, remembered
        return widths

    @functools.cached_property
    def _widest(self) -> dict[str, int]:
        """Return the value of each MLP's key, of any layer, that builds the widest of its kind."""
        kinds = {name: replace(key, layer=None) for name, key in self.keys.items()}
        values: dict[WidthKey, int] = defaultdict(int)
        for name, kind in kinds.items():
            value = math.ceil(self.actual[name] / kind.factor)
            values[kind] = max(value, values[kind])
        return {name: values[kind] for name, kind in kinds.items()}

    def plan(self, arguments: PruneArguments) -> PrunePlan:
        """Resolve the user's arguments, which refer to its experts, else to its first MLP."""
        first = self._first
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
            width, old, new = targets[mlp.name], before[mlp.layer], after[mlp.layer]
            if plan.layer_widths is None:
                if plan.includes_layer(mlp.layer):
                    unit = self.keys[mlp.name].factor
                    targets[mlp.name] = plan.kept_of(width, widest[mlp.name], unit)
            elif width == old:
                targets[mlp.name] = new
            elif new < old:
                targets[mlp.name] = plan.rounded(-(-width * new // old))
        return targets

    def count_parameters(self, widths: Mapping[str, int]) -> int:
        """Return the parameters of the model with these widths; tied ones count once."""
        return self.skeleton.num_parameters() + sum(
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
        if targets == self.configured:
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


def widths_in_memory(model: PreTrainedModel) -> Widths:
    """Return the widths of a loaded model and the config keys that set them."""
    skeleton = without_weights(type(model), plain_config(model.config))
    actual = {mlp.name: mlp.width for mlp in find_glu_mlps(model)}
    return Widths(skeleton, model.config, actual)
