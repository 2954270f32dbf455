"""Which models a sweep evaluates: its sizes, criteria, allocations and seeds, combined."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, plan_rows
from lm_eval_pruned.pruning.argument_values import known_allocation, read_widths
from lm_eval_pruned.pruning.arguments import (
    EXCLUSIVE,
    SEVERAL_SIZES,
    PruneArguments,
    without_idle,
)
from lm_eval_pruned.pruning.criteria import canonical_name
from lm_eval_pruned.sweeps.fingerprints import fingerprint
from lm_eval_pruned.sweeps.options import parse_number


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.checkpoints.planning import PlanRow


@dataclass(frozen=True)
class Configuration:
    """One model of the sweep.

    Attributes:
        id: Readable and unique, such as ``ratio-2.4``.
        arguments: What prunes it, such as ``{"ratio": 2.4}``; empty for the baseline.
        kept_width: In neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Of the pruned model; tied ones count once.
        reduction: Share of the baseline's parameters that is removed, 0 to 1.
        healed: Whether it is trained again before it is evaluated.
    """

    id: str
    arguments: dict[str, Any]
    kept_width: int | float
    expansion_ratio: float
    parameters: int
    reduction: float
    healed: bool = False


def configurations_of(
    options: dict[str, Any], base: dict[str, Any]
) -> list[Configuration]:
    """Return the configurations of a sweep: baseline first, then in the order asked for.

    Args:
        options: Of the sweep.
        base: Arguments of the model that all of them share.

    Raises:
        ValueError: A size, a criterion or a seed is of no use.
    """
    criteria = list(
        dict.fromkeys(
            canonical_name(name, or_best=True)
            for name in options.get("criteria", [PruneArguments.criterion])
        )
    )
    allocations = list(
        dict.fromkeys(
            known_allocation("allocation", name)
            for name in options.get("allocations", [PruneArguments.allocation])
        )
    )
    seeds = list(
        dict.fromkeys(_whole("seeds", text) for text in options.get("seeds", []))
    )
    if seeds and "random" not in criteria:
        raise ValueError(
            f"seeds={' '.join(map(str, seeds))} were given, but only the criterion random has "
            "any: add --criteria random, or leave --seeds out."
        )
    plan = functools.partial(plan_rows, **model_source(base))
    baseline = plan(argument="prune_percent", values=["0"])[0]
    found = [
        Configuration(
            "baseline",
            {},
            baseline.intermediate_size,
            baseline.expansion_ratio,
            baseline.parameters,
            0.0,
        )
    ]
    for option, argument in SEVERAL_SIZES.items():
        values = [
            text if argument == "widths" else _canonical(text)
            for text in options.get(option, [])
        ]
        chosen = EXCLUSIVE["says which layers to prune"]
        rows = plan(
            argument=argument,
            values=values,
            multiple_of=base.get("multiple_of") or PruneArguments.multiple_of,
            **{name: base[name] for name in chosen if base.get(name) is not None},
        )
        for value, row in zip(values, rows, strict=True):
            if row.intermediate_size == baseline.intermediate_size:
                continue
            for allocation, criterion in itertools.product(allocations, criteria):
                for seed in seeds if seeds and criterion == "random" else [None]:
                    arguments: dict[str, Any] = {
                        argument: value if argument == "widths" else parse_number(value)
                    }
                    if allocation != PruneArguments.allocation:
                        arguments["allocation"] = allocation
                    if criterion != PruneArguments.criterion:
                        arguments["criterion"] = criterion
                    if seed is not None:
                        arguments["seed"] = seed
                    found.append(_configuration(arguments, base, row))
    found += _depths(options.get("drop_layers", []), base, plan)
    return list({each.id: each for each in found}.values())


def model_source(base: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that say which checkpoint a sweep is of."""
    if not base.get("pretrained"):
        from lm_eval_pruned.checkpoints.default_model import find_default_model

        base = {**base, **find_default_model().model_args()}
    names = ("pretrained", *SOURCE_ARGUMENTS)
    return {name: base[name] for name in names if base.get(name)}


def _depths(
    values: list[str], base: dict[str, Any], plan: Callable[..., list[PlanRow]]
) -> list[Configuration]:
    """Return the configurations that lack whole layers."""
    rows = plan(argument="drop_layers", values=values)
    return [
        _configuration({"drop_layers": parse_number(value)}, base, row)
        for value, row in zip(values, rows, strict=True)
    ]


def _configuration(
    arguments: dict[str, Any], base: dict[str, Any], row: PlanRow
) -> Configuration:
    # Refused here, not once the baseline has been evaluated.
    PruneArguments.taken_from(without_idle({**base, **arguments}))
    return Configuration(
        _id(arguments),
        arguments,
        row.intermediate_size,
        row.expansion_ratio,
        row.parameters,
        row.reduction,
    )


def _id(arguments: dict[str, Any]) -> str:
    named = dict(arguments)
    if "widths" in named:
        # Two files may have one name, and one file may change.
        digest = fingerprint({"widths": read_widths(named["widths"])})[:8]
        named["widths"] = f"{Path(named['widths']).stem}-{digest}"
    return "_".join(f"{name}-{value}" for name, value in named.items()).replace(
        "/", "over"
    )


def _canonical(text: str) -> str:
    """Return one notation for one number, so that 2.40 is the same configuration as 2.4."""
    try:
        number = Decimal(text)
        return f"{number.normalize():f}" if number.is_finite() else text
    except InvalidOperation:
        return text


def _whole(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(
            f"{name} has {text}, which is not a whole number of 0 or more: pass some such as "
            "0 1 2."
        )
    return number
