"""Tensor parallelism: kept widths that divide among the processes."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import SIZES, UNIFORM


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import PruneArguments

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.parallel")


def divide_among(
    resolve: Callable[[PruneArguments], LoadRequest],
    arguments: PruneArguments,
    processes: int,
    argument: str = "tp_plan",
) -> PruneArguments:
    """Return arguments whose kept widths tensor parallelism can split evenly.

    They are `arguments` where those widths divide, with ``multiple_of`` where an allocation is
    still to find them. Otherwise they ask for the nearest that do, of two that are equally near
    for the lower: as ``intermediate_size``, or as ``widths`` where layers differ; a warning says
    which. What a layer has beside its own width, such as shared experts, is narrowed in
    proportion and rounded down.

    Args:
        resolve: Returns what arguments ask of the model.
        arguments: Those that were given.
        processes: Number of processes that share each MLP.
        argument: What asked for them, for the messages.

    Raises:
        ValueError: A width does not divide, and no width of a pruned layer near it does.
    """
    if processes == 1:
        return arguments
    asked = resolve(arguments)
    multiple = math.lcm(processes, int(arguments.multiple_of))
    odd = _odd(asked, processes)
    if odd is None and asked.plan.prunes and arguments.allocation != UNIFORM:
        # The widths it will find have a mean that divides.
        return dataclasses.replace(arguments, multiple_of=multiple)
    if odd is None:
        return arguments
    name, width = odd
    said = ", ".join(f"{k}={v}" for k, v in asked.plan.asked.items()) or "the baseline"
    problem = (
        f"{said} gives {name} {width} neurons, which do not divide among the {processes} processes "
        f"of {argument}"
    )
    near = _nearest(asked, arguments, multiple) if asked.plan.prunes else None
    if near is None or _odd(request := resolve(near), processes) is not None:
        raise ValueError(
            f"{problem}: pass a size that keeps multiples of {processes}, or use a number of "
            "processes that divides it."
        )
    size, value = near.size or ("", "")
    kept = request.widths.targets(request.plan)[name]
    written = f" ({size}={value})" if size == "intermediate_size" else ""
    logger.warning("%s: it keeps %d%s.", problem, kept, written)
    return near


def _nearest(
    asked: LoadRequest, arguments: PruneArguments, multiple: int
) -> PruneArguments | None:
    """Return arguments for the nearest widths that are multiples, or None where there is none."""
    plan = asked.plan
    given: dict[str, Any] = dict.fromkeys(SIZES) | {"multiple_of": multiple}
    before = asked.widths.layers
    measured = plan.tried or plan.allocation != UNIFORM
    if len({*before.values()}) == 1 and plan.layer_widths is None or measured:
        width = _near(plan.width, plan.width_before, multiple)
        given["intermediate_size"] = width
        return None if width is None else dataclasses.replace(arguments, **given)
    targets = asked.widths.targets(plan)
    kept: dict[int, int | None] = {}
    for mlp in asked.widths.mlps:
        own = asked.widths.actual[mlp.name]
        if own == before[mlp.block] and targets[mlp.name] < own:
            kept[mlp.block] = _near(targets[mlp.name], own, multiple)
    if None in kept.values():
        return None
    # Widths say themselves which layers are pruned.
    given |= dict.fromkeys(("layers", "skip_layers")) | {"widths": kept}
    return dataclasses.replace(arguments, **given)


def _near(width: int, below: int, multiple: int) -> int | None:
    """Return the multiple nearest to `width` that prunes an MLP of `below` neurons, if any.

    Of two that are equally near it is the lower.
    """
    low = width // multiple * multiple
    found = [k for k in (low, low + multiple) if 0 < k < below]
    return min(found, key=lambda k: abs(k - width)) if found else None


def _odd(request: LoadRequest, processes: int) -> tuple[str, int] | None:
    """Return the first MLP whose width does not divide, and the width."""
    targets = request.widths.targets(request.plan)
    return next(((n, w) for n, w in targets.items() if w % processes), None)
