"""Widths: how wide the GLU-MLPs of a model are, which keys set that, and what a cut makes of each.

Keys are found, not listed: a key belongs to the MLPs whose width doubles when it doubles, in a model
without weights. LFM2 computes its width from several keys; here it is taken from one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
    text_config,
    without_weights,
)
from lm_eval_pruned.pruning.plan import PrunePlan


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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


class Widths:
    """The GLU-MLPs of one model, the widths they have, and the keys that set them.

    Attributes:
        skeleton: The model without weights, of `config`.
        original: The config that it has.
        config: What `plain_config` makes of it.
        mlps: The GLU-MLPs of `skeleton`, in order.
        keys: The key of each MLP, by the MLP's name.
        configured: The width that the config gives each MLP, by name.
        actual: The width that it has.
        layers: The width of each layer's experts, else of its MLP, in neurons, by number, ascending.
    """

    def __init__(
        self,
        build: Callable[..., PreTrainedModel],
        config: PretrainedConfig,
        actual: Iterable[int] | None = None,
    ):
        """Find the GLU-MLPs of a model, and the keys of their widths.

        Args:
            build: The class of the model, or another function that builds it of a config.
            config: Config of the model.
            actual: Width of each MLP, in order; default: as `config` says.
        """
        plain = plain_config(config)
        self.skeleton = without_weights(build, plain)
        if type(self.skeleton.config) is not type(config):
            # The class is handed the part of the config that is of text.
            config, plain = text_config(config), text_config(plain)
        self.original, self.config = config, plain
        self.mlps = find_glu_mlps(self.skeleton)
        self.keys = find_keys(plain, self.skeleton, self.mlps)
        self.configured = {mlp.name: mlp.width for mlp in self.mlps}
        widths = self.configured.values() if actual is None else actual
        self.actual = dict(zip(self.configured, widths, strict=True))
        # The first of a layer represents it, and the first of all the model.
        experts_first = sorted(self.mlps, key=lambda mlp: mlp.kind != "expert")
        self._first = experts_first[0]
        layers = {mlp.layer: self.actual[mlp.name] for mlp in reversed(experts_first)}
        self.layers = dict(sorted(layers.items()))

    def cut(self, arguments: PruneArguments) -> Cut:
        """Resolve the user's arguments, which refer to its experts, else to its first MLP.

        Raises:
            ValueError: An argument is out of range.
        """
        first = self._first
        widest = int(self.widest[first.name] * self.keys[first.name].factor)
        plan = PrunePlan.of(arguments, first.hidden_size, widest, self.layers)
        return Cut(self, plan)

    @functools.cached_property
    def widest(self) -> dict[str, int]:
        """The value of each MLP's key, of any layer, that builds the widest of its kind, by name."""
        kinds = {
            name: dataclasses.replace(key, layer=None)
            for name, key in self.keys.items()
        }
        values: dict[WidthKey, int] = defaultdict(int)
        for name, kind in kinds.items():
            value = math.ceil(self.actual[name] / kind.factor)
            values[kind] = max(value, values[kind])
        return {name: values[kind] for name, kind in kinds.items()}

    @functools.cached_property
    def uncut(self) -> Cut:
        """The model with all its neurons."""
        return self.cut(PruneArguments())

    @functools.cached_property
    def _per_neuron(self) -> dict[str, int]:
        """The parameters of a neuron of each MLP, by name."""
        return {
            mlp.name: sum(mlp.weight(*place).numel() for place in mlp.regions)
            // self.configured[mlp.name]
            for mlp in self.mlps
        }

    def count_parameters(self, widths: Mapping[str, int]) -> int:
        """Return the parameters of the model with these widths; tied ones count once."""
        return self.skeleton.num_parameters() + sum(
            (widths[name] - width) * self._per_neuron[name]
            for name, width in self.configured.items()
        )


@dataclass(frozen=True)
class Cut:
    """What is to become of the GLU-MLPs of a model, and of the config that describes them.

    Attributes:
        widths: Those that they have.
        plan: What is to be done to them.
    """

    widths: Widths
    plan: PrunePlan

    @functools.cached_property
    def targets(self) -> dict[str, int]:
        """The kept width of each MLP, by name.

        Where the layers have widths of their own, shared experts, and whatever else is as wide
        as it pleases in a layer, are narrowed in the proportion of the layer.
        """
        plan, widths = self.plan, self.widths
        targets = dict(widths.actual)
        if not plan.prunes:
            return targets
        before = widths.layers
        after = before | dict(plan.layer_widths or ())
        for mlp in widths.mlps:
            width, old, new = targets[mlp.name], before[mlp.layer], after[mlp.layer]
            if plan.layer_widths is None:
                if plan.includes_layer(mlp.layer):
                    unit, widest = widths.keys[mlp.name].factor, widths.widest[mlp.name]
                    targets[mlp.name] = plan.kept_of(width, widest, unit)
            elif width == old:
                targets[mlp.name] = new
            elif new < old:
                targets[mlp.name] = plan.rounded(-(-width * new // old))
        return targets

    @functools.cached_property
    def _values(self) -> dict[WidthKey, int]:
        """The value of each key: what its MLPs agree on, else the one that it has."""
        wanted: dict[WidthKey, set[int]] = defaultdict(set)
        for name, key in self.widths.keys.items():
            wanted[key].add(math.ceil(self.targets[name] / key.factor))
        return {
            key: values.pop() if len(values) == 1 else key.get(self.widths.config)
            for key, values in wanted.items()
        }

    def config(self) -> PretrainedConfig:
        """Return a copy of the model's config with its widths, as far as keys hold them."""
        if self.targets == self.widths.configured:
            return copy.deepcopy(self.widths.original)
        narrowed = copy.deepcopy(self.widths.config)
        for key, value in self._values.items():
            key.set(narrowed, value)
        return narrowed

    @property
    def inexpressible(self) -> list[str]:
        """The names of the MLPs whose width no key of the config can hold.

        Stock transformers builds the model if there are none.
        """
        values, keys = self._values, self.widths.keys
        return [
            name
            for name, key in keys.items()
            if values[key] * key.factor != self.targets[name]
        ]

    def check_opens(self) -> None:
        """Refuse widths that the code of the model does not build of the config.

        Raises:
            UnsupportedModelError: An MLP gets another width, as where the code rounds it.
        """
        if self.inexpressible:
            return
        built = without_weights(type(self.widths.skeleton), self.config())
        for mlp in find_glu_mlps(built):
            wanted = self.targets[mlp.name]
            if mlp.width != wanted:
                multiple = math.gcd(mlp.width, self.widths.configured[mlp.name])
                raise UnsupportedModelError(
                    f"{describe(built)} gives {mlp.name} {mlp.width} neurons where its config says "
                    f"{wanted}, so nothing would open the pruned checkpoint: pass "
                    f"multiple_of={multiple}."
                )

    @property
    def parameters_before(self) -> int:
        """The parameters of the unpruned model; tied ones count once."""
        return self.widths.count_parameters(self.widths.actual)

    @property
    def parameters_after(self) -> int:
        """The parameters of what is left."""
        return self.widths.count_parameters(self.targets)

    def copy_keys(self, source: PretrainedConfig, target: PretrainedConfig) -> None:
        """Give `target` the width keys of `source`, and whether they are the widths."""
        for key in set(self.widths.keys.values()):
            key.set(target, key.get(source))
        computes = getattr(text_config(source), COMPUTES_WIDTH, None)
        if computes is not None:
            setattr(text_config(target), COMPUTES_WIDTH, computes)


def widths_in_memory(model: PreTrainedModel) -> Widths:
    """Return the widths of a loaded model and the config keys that set them."""
    actual = [mlp.width for mlp in find_glu_mlps(model)]
    return Widths(type(model), model.config, actual)


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
            width = mlp.width
            if doubled.get(mlp.name) == width or mlp.name in keys:
                continue
            if reshaped:
                why = f"{key} in its config also sets the shape of {min(reshaped)}"
                refusals[mlp.name] = why
            elif doubled.get(mlp.name) == 2 * width:
                layer = None if type(value) is int else mlp.layer
                single = dataclasses.replace(key, layer=layer)
                factor = Fraction(width, single.get(config))
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
