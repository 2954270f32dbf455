"""Expansion arithmetic: from what the user asked for to a kept width.

Everything here is exact rational arithmetic on plain integers: no torch, no
floats. Binary floating point would keep ``ceil(2.2 * 200) == 441`` neurons, not 440.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.argument_values import (
    UNIFORM,
    exact,
    layer_numbers,
    read_widths,
    written_layers,
    written_source,
)
from lm_eval_pruned.pruning.arguments import PruneArguments


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from typing_extensions import Unpack

    from lm_eval_pruned.pruning.arguments import Number, PruneKeywords


@dataclass(frozen=True)
class PrunePlan:
    """What to do to every GLU-MLP of a model, as pure data.

    Attributes:
        arguments: What the user asked for.
        hidden_size: Model width H.
        width_before: Intermediate size I of the unpruned MLPs, in neurons.
        width: Kept width k, in neurons; equal to `width_before` for the baseline. Where
            the layers differ, their mean, rounded up.
        asked: The size that was asked for, as ``{argument: value}``; empty for the baseline.
        layers: Numbers of the layers to prune, ascending; None for all.
        layer_widths: Where the layers differ, the number and kept width of each, ascending:
            of its experts if it has any, else of its MLP. Layers that are not named stay.
        measured_on: The text whose losses settled the plan, as the results file describes it.

    Example:
        >>> plan = PrunePlan.from_arguments(2048, 8192, prune_percent=40)
        >>> plan.width, f"{plan.ratio:.4f}"
        (4916, '2.4004')
    """

    arguments: PruneArguments
    hidden_size: int
    width_before: int
    width: int
    asked: dict[str, str]
    layers: tuple[int, ...] | None = None
    layer_widths: tuple[tuple[int, int], ...] | None = None
    measured_on: Mapping[str, Any] | None = None

    @property
    def criterion(self) -> str:
        """Name of the importance score."""
        return self.arguments.criterion

    @property
    def multiple_of(self) -> int:
        """The kept width was rounded down to a multiple of this."""
        return int(self.arguments.multiple_of)

    @property
    def is_open(self) -> bool:
        """Whether weights or text have to be looked at before it says what each layer becomes."""
        return (
            self.prunes
            and self.arguments.allocation != UNIFORM
            and self.layer_widths is None
        )

    @property
    def ratio(self) -> float:
        """Expansion ratio k / H of the pruned MLPs; their mean where the layers differ."""
        return float(self.mean_width / self.hidden_size)

    @property
    def mean_width(self) -> Fraction:
        """Kept width, in neurons, as the mean of `layer_widths` where the layers differ."""
        widths = [width for _, width in self.layer_widths or ((0, self.width),)]
        return Fraction(sum(widths), len(widths))

    @property
    def prunes(self) -> bool:
        """Whether any neuron is removed."""
        return self.layer_widths is not None or self.width < self.width_before

    def as_written(self) -> str:
        """Return the size that was asked for, as it is written on the command line."""
        return ", ".join(f"{name}={value}" for name, value in self.asked.items())

    def includes_layer(self, layer: int) -> bool:
        """Return whether the layer of this number is to be pruned."""
        return self.layers is None or layer in self.layers

    def rounded(self, kept: int, source: str = "") -> int:
        """Return `kept`, rounded down to `multiple_of` where that leaves something.

        Raises:
            ValueError: It leaves nothing of the width that a `source` gives.
        """
        rounded = kept // self.multiple_of * self.multiple_of
        if source and not rounded:
            raise ValueError(
                f"multiple_of={self.multiple_of} is larger than the kept width {kept} that "
                f"{source}: use a multiple of at most {kept}."
            )
        return rounded or kept

    def kept_of(self, width: int, widest: int, unit: Fraction = Fraction(1)) -> int:
        """Return the kept width of an MLP of `width` neurons.

        The widest MLPs of a kind keep ``ceil(widest * k / I)``, `rounded`. Of a narrower one,
        `prune_percent` takes its share of the MLP's own width; any other size is a target that
        it may have reached already. `widest` is in units of `unit` neurons.
        """
        percent = self.arguments.prune_percent
        if percent is not None and width != unit * widest:
            kept = _kept_width("prune_percent", percent, self.hidden_size, width)
            return self.rounded(kept)
        kept = -(-widest * self.width // self.width_before)
        return min(width, int(unit * self.rounded(kept)))

    @classmethod
    def from_arguments(
        cls,
        hidden_size: int,
        width_before: int,
        **prune_arguments: Unpack[PruneKeywords],
    ) -> PrunePlan:
        """Resolve the user's arguments against a model's dimensions.

        Args:
            hidden_size: Model width H.
            width_before: Intermediate size I, in neurons.
            **prune_arguments: Those of `lm_eval_pruned.pruning.arguments.PruneArguments`.

        Raises:
            ValueError: An argument is out of range or unknown, or does not go with another;
                one sentence says what would work.

        Source: sections 3.1 and 4.1 of arXiv 2512.22671; the widths are those of
        its checkpoints.
        """
        arguments = PruneArguments(**prune_arguments)
        return cls.of(arguments, hidden_size, width_before, None)

    @classmethod
    def of(
        cls,
        arguments: PruneArguments,
        hidden_size: int,
        width_before: int,
        before: Mapping[int, int] | None,
    ) -> PrunePlan:
        """Plan as `from_arguments` does for layers whose widths differ: `before` has each by its number."""
        plan = cls(arguments, hidden_size, width_before, width_before, {})
        if arguments.size is None:
            return plan
        name, value = arguments.size
        for of_layers in ("widths", "layers", "skip_layers") if before is None else ():
            if (layers := getattr(arguments, of_layers)) is not None:
                raise ValueError(
                    f"{of_layers}={layers} needs a model whose layers are known."
                )
        written = written_source(value) if name == "widths" else str(value)
        plan = dataclasses.replace(plan, asked={name: written})
        if name == "widths":
            widths = plan._kept_by_layer(before or {})
            return plan if widths == before else plan.with_layers(widths)
        chosen = _chosen_layers(arguments, before or {})
        kept = _kept_width(name, value, hidden_size, width_before)
        width = plan.rounded(kept, f"{name}={value} gives")
        return dataclasses.replace(plan, width=width, layers=chosen)

    def with_layers(self, widths: Mapping[int, int]) -> PrunePlan:
        """Return the same plan with the width of each layer, in neurons, by its number."""
        mean = math.ceil(Fraction(sum(widths.values()), len(widths)))
        by_layer = tuple(sorted(widths.items()))
        return dataclasses.replace(self, width=mean, layer_widths=by_layer)

    def _kept_by_layer(self, before: Mapping[int, int]) -> dict[int, int]:
        """Return the kept width of every layer as the argument `widths` has it."""
        where = f"widths={self.asked['widths']}"
        named = read_widths(self.arguments.widths)
        _check_present(where, named, before)
        for layer, width in named.items():
            if not 1 <= width <= before[layer]:
                raise ValueError(
                    f"{where} gives layer {layer} {width} neurons, but it has {before[layer]}: write "
                    f"a width from 1 to {before[layer]} there, or leave the layer out, which keeps "
                    "them all."
                )
            if width < before[layer]:
                named[layer] = self.rounded(width, f"{where} gives layer {layer}")
        return {**before, **named}


def whole_or_mean(width: Fraction) -> int | float:
    """Return a width as JSON has it: a whole number, unless it is a mean that is not."""
    return int(width) if width.denominator == 1 else round(float(width), 4)


def _check_present(
    where: str, named: Collection[int], present: Collection[int]
) -> None:
    if missing := {*named} - {*present}:
        raise ValueError(
            f"{where} names layer {min(missing)}, but the GLU-MLPs of this model are in the layers "
            f"{written_layers(present)}."
        )


def _chosen_layers(
    arguments: PruneArguments, present: Collection[int]
) -> tuple[int, ...] | None:
    """Return the numbers of the layers to prune, or None for all."""
    name = "skip_layers" if arguments.layers is None else "layers"
    value = getattr(arguments, name)
    if value is None:
        return None
    named = set(layer_numbers(name, value))
    _check_present(f"{name}={value}", named, present)
    chosen = named if name == "layers" else {*present} - named
    if not chosen:
        raise ValueError(
            f"{name}={value} leaves no layer to prune: leave out at least one of "
            f"{written_layers(present)}."
        )
    return tuple(sorted(chosen))


def _kept_width(name: str, value: Number, hidden_size: int, width_before: int) -> int:
    """Return the neurons to keep of `width_before`, as the size called `name` asks."""
    if name == "ratio":
        ratio, whole = exact(name, value, "2.0"), Fraction(width_before, hidden_size)
        most = f"{math.floor(whole * 10000) / 10000:.4f}".rstrip("0").rstrip(".")
        if ratio <= 0:
            raise ValueError(
                f"ratio={value} keeps no neuron: pass an expansion ratio above 0 and at most "
                f"{most}, the model's own."
            )
        if ratio > whole:
            raise ValueError(
                f"ratio={value} is above the model's own expansion ratio "
                f"{width_before}/{hidden_size}: pass at most {most}, or leave ratio out for the "
                "baseline."
            )
        return math.ceil(ratio * hidden_size)
    if name == "prune_percent":
        percent = exact(name, value, "40")
        if not 0 <= percent < 100:
            raise ValueError(
                f"prune_percent={value} is outside [0, 100): pass the share of neurons to remove, "
                "such as prune_percent=40."
            )
        return width_before - math.floor(percent / 100 * width_before)
    width = exact(name, value, str(width_before))
    if width.denominator != 1 or not 1 <= width <= width_before:
        raise ValueError(
            f"{name}={value} is not a kept width of this model: pass a whole number from 1 to "
            f"{width_before}."
        )
    return int(width)
