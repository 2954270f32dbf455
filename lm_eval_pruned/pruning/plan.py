"""Expansion arithmetic: from what the user asked for to a kept width.

Everything here is exact rational arithmetic on plain integers: no torch, no
floats. Binary floating point would keep ``ceil(2.2 * 200) == 441`` neurons, not 440.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.allocations import UNIFORM
from lm_eval_pruned.pruning.argument_values import exact, layer_numbers, written_layers
from lm_eval_pruned.pruning.arguments import PruneArguments, takes_prune_arguments
from lm_eval_pruned.pruning.layer_widths import read_widths, written_source


if TYPE_CHECKING:
    from collections.abc import Collection

    from lm_eval_pruned.pruning.arguments import Number
    from lm_eval_pruned.pruning.depth import Depth


@dataclass(frozen=True)
class PrunePlan:
    """What to do to every GLU-MLP of a model, as pure data.

    Attributes:
        hidden_size: Model width H.
        width_before: Intermediate size I of the unpruned MLPs, in neurons.
        width: Kept width k, in neurons; equal to `width_before` for the baseline. Where
            the layers differ, their mean, rounded up.
        criterion: Name of the importance score (see `lm_eval_pruned.pruning.criteria`).
        asked: What the user asked for, as ``{argument: value}``; empty for the baseline.
        multiple_of: The kept width was rounded down to a multiple of this.
        seed: Seed of the ``random`` criterion; no other criterion reads it.
        layers: Numbers of the layers to prune, ascending, as the unpruned model counts
            them; None for all.
        calibration: JSON Lines file of calibration text; None where the criterion
            looks at weights alone.
        calibration_samples: How many of its texts to use; None for all.
        layer_widths: Where the layers differ, pairs of a layer's number and its kept
            width, ascending: of its experts if it has any, else of its MLP. A layer that
            is not named keeps its width. None for `width` in all.
        layer_criteria: Likewise the criterion of each layer; `criterion` scores the
            layers that are not named.
        allocation: Name of how the neurons are shared among the layers.
        min_width: Neurons that it leaves in each layer at least; None where nobody asked.
        tried: The criteria among which ``criterion=best`` chooses; else none.
        measured_on: Name, SHA-256, texts and tokens of the text on which losses were
            measured to settle the plan, as the results file holds them.
        depth: Which layers stay; None for all.

    Example:
        >>> plan = PrunePlan.from_arguments(2048, 8192, prune_percent=40)
        >>> plan.width, f"{plan.ratio:.4f}"
        (4916, '2.4004')
        >>> PrunePlan.from_arguments(2048, 8192, ratio=5)
        Traceback (most recent call last):
            ...
        ValueError: ratio=5 is above the model's own expansion ratio 8192/2048: pass at most 4, ...
    """

    hidden_size: int
    width_before: int
    width: int
    criterion: str
    asked: dict[str, str]
    multiple_of: int
    seed: int
    layers: tuple[int, ...] | None = None
    calibration: str | None = None
    calibration_samples: int | None = None
    layer_widths: tuple[tuple[int, int], ...] | None = None
    layer_criteria: tuple[tuple[int, str], ...] | None = None
    allocation: str = UNIFORM
    min_width: int | None = None
    tried: tuple[str, ...] = ()
    measured_on: Mapping[str, Any] | None = None
    depth: Depth | None = None

    @property
    def is_open(self) -> bool:
        """Whether weights or text have to be looked at before it says what each layer becomes.

        See `lm_eval_pruned.pruning.settling.settled`.
        """
        if not self.prunes:
            return False
        if self.tried and self.layer_criteria is None:
            return True
        return self.allocation != UNIFORM and self.layer_widths is None

    @property
    def ratio_before(self) -> float:
        """Expansion ratio I / H of the unpruned MLPs."""
        return self.width_before / self.hidden_size

    @property
    def ratio(self) -> float:
        """Expansion ratio k / H of the pruned MLPs; their mean where the layers differ."""
        return float(self.mean_width / self.hidden_size)

    @property
    def mean_width(self) -> Fraction:
        """Kept width, in neurons, as the mean of `layer_widths` where the layers differ."""
        if self.layer_widths is None:
            return Fraction(self.width)
        widths = [width for _, width in self.layer_widths]
        return Fraction(sum(widths), len(widths))

    @property
    def prunes(self) -> bool:
        """Whether any neuron is removed from a layer that stays."""
        return self.layer_widths is not None or self.width < self.width_before

    @property
    def changes_model(self) -> bool:
        """Whether the model becomes another: neurons are removed, or layers are dropped."""
        return self.prunes or self.depth is not None

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that score some layer, each once; `criterion` comes first."""
        others = [name for _, name in self.layer_criteria or ()]
        own = () if self.tried else (self.criterion,)
        return tuple(dict.fromkeys([*own, *others]))

    def criterion_of(self, layer: int) -> str:
        """Return the name of the criterion that scores the layer of that number."""
        return dict(self.layer_criteria or ()).get(layer, self.criterion)

    def includes_layer(self, layer: int) -> bool:
        """Return whether the layer is to be pruned that has this number among those that stay."""
        number = layer if self.depth is None else self.depth.kept[layer]
        return self.layers is None or number in self.layers

    def rounded(self, kept: int) -> int:
        """Return `kept`, rounded down to `multiple_of` where that leaves something."""
        return kept // self.multiple_of * self.multiple_of or kept

    def scaled(self, width_before: int) -> int:
        """Return the kept width of MLPs of another kind, in the same proportion.

        It is ``ceil(width_before * k / I)``, rounded down to `multiple_of` where
        that leaves something. ``scaled(I)`` is k.
        """
        return self.rounded(
            math.ceil(Fraction(width_before * self.width, self.width_before))
        )

    def of_own(self, width_before: int, target: int) -> int:
        """Return the kept width of an MLP that is narrower than others of its kind.

        A share to remove is a share of its own width; any other size is a target
        that narrower layers have reached already.

        Args:
            width_before: Its own width, in neurons.
            target: What is kept of the widest of its kind, in neurons.
        """
        if "prune_percent" in self.asked:
            kept = _kept_from_percent(
                self.asked["prune_percent"], self.hidden_size, width_before
            )
            return self.rounded(kept)
        return min(width_before, target)

    @classmethod
    @takes_prune_arguments
    def from_arguments(
        cls,
        hidden_size: int,
        width_before: int,
        *,
        available_layers: Collection[int] | None = None,
        **prune_arguments: Any,
    ) -> PrunePlan:
        """Resolve the user's arguments against a model's dimensions.

        Args:
            hidden_size: Model width H.
            width_before: Intermediate size I, in neurons.
            available_layers: Numbers of the layers that have a GLU-MLP; a mapping says
                their widths too, where these differ.
            ratio, ...: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`.

        Returns:
            The plan; without a size it is the baseline, whose `width` is `width_before`.

        Raises:
            ValueError: One sentence naming the argument, its value and what would
                work, for a value that is no number or out of range, more than one
                size argument, layers that the model lacks, or an unknown criterion.

        Source: sections 3.1 and 4.1 of arXiv 2512.22671; the widths are those of
        its checkpoints.
        """
        arguments = PruneArguments(**prune_arguments)
        return cls.of(arguments, hidden_size, width_before, available_layers)

    @classmethod
    def of(
        cls,
        arguments: PruneArguments,
        hidden_size: int,
        width_before: int,
        available_layers: Collection[int] | None = None,
        depth: Depth | None = None,
    ) -> PrunePlan:
        """Do the same with arguments that are together, for the layers that `depth` leaves."""
        seed, multiple = int(arguments.seed), int(arguments.multiple_of)
        chosen = _chosen_layers(arguments, available_layers, depth)
        if arguments.size is None:
            return cls(
                hidden_size,
                width_before,
                width_before,
                arguments.criterion,
                {} if depth is None else depth.asked,
                1,
                seed,
                depth=depth,
            )

        name, value = arguments.size
        samples = arguments.calibration_samples
        calibration: dict[str, Any] = {
            "calibration": None
            if arguments.calibration is None
            else str(arguments.calibration),
            "calibration_samples": None if samples is None else int(samples),
        }
        if name == "widths":
            own = _widths_before(available_layers, width_before)
            widths = _kept_by_layer(value, multiple, own)
            plan = cls(
                hidden_size,
                width_before,
                width_before,
                arguments.criterion,
                {name: written_source(value)},
                multiple,
                seed,
                **calibration,
            )
            return plan if widths == own else plan.with_layers(widths)

        kept = _KEPT_WIDTH[name](value, hidden_size, width_before)
        if multiple > kept:
            raise ValueError(
                f"multiple_of={multiple} is larger than the kept width {kept} that "
                f"{name}={value} gives: use a multiple of at most {kept}."
            )
        return cls(
            hidden_size,
            width_before,
            kept // multiple * multiple,
            arguments.criterion,
            {name: str(value), **({} if depth is None else depth.asked)},
            multiple,
            seed,
            chosen,
            **calibration,
            depth=depth,
            allocation=arguments.allocation,
            min_width=None if arguments.min_width is None else int(arguments.min_width),
            tried=arguments.tried,
        )

    def with_layers(
        self, widths: Mapping[int, int], criteria: Mapping[int, str] | None = None
    ) -> PrunePlan:
        """Return the same plan with widths, and criteria, of each layer's own.

        Args:
            widths: Kept width by number of the layer, in neurons; `width` becomes their
                mean.
            criteria: Canonical names likewise; default: as they are.
        """
        mean = math.ceil(Fraction(sum(widths.values()), len(widths)))
        names = self.layer_criteria
        if criteria is not None:
            names = tuple(sorted(criteria.items()))
        return dataclasses.replace(
            self,
            width=mean,
            layer_widths=tuple(sorted(widths.items())),
            layer_criteria=names,
        )


def _widths_before(
    available: Collection[int] | None, width_before: int
) -> dict[int, int]:
    """Return the own width of each layer."""
    if available is None:
        raise ValueError("widths needs a model whose layers are known.")
    if isinstance(available, Mapping):
        return dict(available)
    return dict.fromkeys(available, width_before)


def _kept_by_layer(value: Any, multiple: int, own: Mapping[int, int]) -> dict[int, int]:
    """Return the kept width of every layer as the argument `widths` has it."""
    where = f"widths={written_source(value)}"
    kept = dict(own)
    for layer, width in read_widths(value).items():
        if layer not in own:
            raise ValueError(
                f"{where} names layer {layer}, but the GLU-MLPs of this model are in the layers "
                f"{written_layers(own)}."
            )
        if not 1 <= width <= own[layer]:
            raise ValueError(
                f"{where} gives layer {layer} {width} neurons, but it has {own[layer]}: write a "
                f"width from 1 to {own[layer]} there, or leave the layer out, which keeps them all."
            )
        if width == own[layer]:
            continue
        if multiple > width:
            raise ValueError(
                f"multiple_of={multiple} is larger than the kept width {width} that {where} gives "
                f"layer {layer}: use a multiple of at most {width}."
            )
        kept[layer] = width // multiple * multiple
    return kept


def _chosen_layers(
    arguments: PruneArguments,
    available: Collection[int] | None,
    depth: Depth | None,
) -> tuple[int, ...] | None:
    """Return the numbers of the layers to prune, or None for all."""
    name = "skip_layers" if arguments.layers is None else "layers"
    value = getattr(arguments, name)
    if value is None:
        return None
    if available is None:
        raise ValueError(f"{name}={value} needs a model whose layers are known.")
    named = set(layer_numbers(name, value))
    if arguments.measures_depth and depth is not None:
        # Which layers the text would drop could not be known.
        named -= {*depth.dropped}
    missing = sorted(named - set(available))
    if missing:
        raise ValueError(
            f"{name}={value} names layer {missing[0]}, but the GLU-MLPs of this model are in the "
            f"layers {written_layers(available)}."
        )
    chosen = named if name == "layers" else set(available) - named
    if not chosen:
        raise ValueError(
            f"{name}={value} leaves no layer to prune: leave out at least one of "
            f"{written_layers(available)}."
        )
    going: Any = arguments.drop_layers
    if arguments.measures_depth and depth is None and len(chosen) <= going:
        raise ValueError(
            f"{name}={value} leaves {len(chosen)} of the layers to prune, all of which "
            f"drop_by={arguments.drop_by} could drop with drop_layers={going}: leave more than "
            f"{going}, or drop fewer."
        )
    return tuple(sorted(chosen))


def whole_or_mean(width: Fraction) -> int | float:
    """Return a width as JSON has it: a whole number, unless it is a mean that is none.

    Example:
        >>> whole_or_mean(Fraction(1050)), whole_or_mean(Fraction(2101, 2))
        (1050, 1050.5)
    """
    return int(width) if width.denominator == 1 else round(float(width), 4)


def _down_to_four_places(value: Fraction) -> str:
    return f"{math.floor(value * 10000) / 10000:.4f}".rstrip("0").rstrip(".")


def _kept_from_ratio(value: Number, hidden_size: int, width_before: int) -> int:
    ratio = exact("ratio", value, "2.0")
    own = Fraction(width_before, hidden_size)
    if ratio <= 0:
        raise ValueError(
            f"ratio={value} keeps no neuron: pass an expansion ratio above 0 and at most "
            f"{_down_to_four_places(own)}, the model's own."
        )
    if ratio > own:
        raise ValueError(
            f"ratio={value} is above the model's own expansion ratio {width_before}/{hidden_size}: "
            f"pass at most {_down_to_four_places(own)}, or leave ratio out for the baseline."
        )
    return math.ceil(ratio * hidden_size)


def _kept_from_percent(value: Number, hidden_size: int, width_before: int) -> int:
    percent = exact("prune_percent", value, "40")
    if not 0 <= percent < 100:
        raise ValueError(
            f"prune_percent={value} is outside [0, 100): pass the share of neurons to remove, "
            "such as prune_percent=40."
        )
    return width_before - math.floor(percent / 100 * width_before)


def _kept_from_width(value: Number, hidden_size: int, width_before: int) -> int:
    width = exact("intermediate_size", value, str(width_before))
    if width.denominator != 1 or not 1 <= width <= width_before:
        raise ValueError(
            f"intermediate_size={value} is not a kept width of this model: pass a whole number "
            f"from 1 to {width_before}."
        )
    return int(width)


_KEPT_WIDTH = {
    "ratio": _kept_from_ratio,
    "prune_percent": _kept_from_percent,
    "intermediate_size": _kept_from_width,
}
