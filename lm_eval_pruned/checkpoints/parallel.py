"""Tensor parallelism: whether the kept widths divide among the processes."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lm_eval_pruned.checkpoints.request import LoadRequest


def check_divisible(
    request: LoadRequest, processes: int, argument: str = "tp_plan"
) -> None:
    """Refuse kept widths that tensor parallelism cannot split evenly.

    Args:
        request: The model and its pruning.
        processes: Number of processes that share each MLP.
        argument: What asked for them, for the message.

    Raises:
        ValueError: A kept width is no multiple of `processes`; the message names the
            nearest that is.
    """
    widths, plan = request.widths, request.plan
    for name, width in widths.targets(plan).items():
        rest = width % processes
        if not rest:
            continue
        below, above = width - rest, width - rest + processes
        nearest = [w for w in (below, above) if 0 < w <= widths.actual[name]]
        nearest.sort(key=lambda candidate: abs(candidate - width))
        asked = ", ".join(f"{k}={v}" for k, v in plan.asked.items()) or "the baseline"
        way_out = (
            f"the nearest width that does is {nearest[0]}, and multiple_of={processes} rounds to one"
            if nearest
            else f"use fewer than {processes} processes"
        )
        raise ValueError(
            f"{asked} gives {name} {width} neurons, which do not divide among the {processes} "
            f"processes of {argument}: {way_out}."
        )
