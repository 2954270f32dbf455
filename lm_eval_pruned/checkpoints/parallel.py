"""Tensor parallelism: kept widths that divide among the processes."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING


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

    They are `arguments` where those widths divide. Otherwise each width is rounded down to the
    next that does, with ``multiple_of``, and a warning says so.

    Args:
        resolve: Returns what arguments ask of the model.
        arguments: Those that were given.
        processes: Number of processes that share each MLP.
        argument: What asked for them, for the messages.

    Raises:
        ValueError: A width does not divide, and ``multiple_of`` cannot round it.
    """
    asked = resolve(arguments)
    odd = _odd(asked, processes)
    if odd is None:
        return arguments
    name, width = odd
    said = ", ".join(f"{k}={v}" for k, v in asked.plan.asked.items()) or "the baseline"
    problem = (
        f"{said} gives {name} {width} neurons, which do not divide among the {processes} processes "
        f"of {argument}"
    )
    multiple = math.lcm(processes, int(arguments.multiple_of))
    if asked.plan.prunes and arguments.widths is None and width >= multiple:
        rounded = dataclasses.replace(arguments, multiple_of=multiple)
        request = resolve(rounded)
        if _odd(request, processes) is None:
            kept = request.widths.targets(request.plan)[name]
            logger.warning("%s: it keeps %d (multiple_of=%d).", problem, kept, multiple)
            return rounded
    raise ValueError(
        f"{problem}: pass a size that keeps multiples of {processes}, or use a number of processes "
        "that divides it."
    )


def _odd(request: LoadRequest, processes: int) -> tuple[str, int] | None:
    """Return the first MLP whose width does not divide, and the width."""
    targets = request.widths.targets(request.plan)
    return next(((n, w) for n, w in targets.items() if w % processes), None)
