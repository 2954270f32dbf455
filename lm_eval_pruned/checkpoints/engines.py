"""What engines that build models of their own, and processes that share a model, ask of a pruned one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.request import stored_once
from lm_eval_pruned.pruning.argument_values import UNIFORM
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.record import PruneRecord


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.plan import PrunePlan

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.parallel")


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model under the keys that its checkpoint has for them.

    Source: `transformers.PreTrainedModel.save_pretrained`, which renames them in the same way.
    """
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, stored_once(model)).items()


def record_of(request: LoadRequest) -> PruneRecord:
    """Describe what an engine did to the MLPs of `request`, but for which neurons it kept."""
    return PruneRecord.of(request.plan, request.widths, None)


def check_buildable(request: LoadRequest) -> None:
    """Refuse widths that no engine can build.

    An engine builds a model from its config, and a layer's experts as one. Dense MLPs it can
    build anew.

    Raises:
        UnsupportedModelError: Experts would have a width that the config cannot hold, or
            layers would be left out.
    """
    widths, plan = request.widths, request.plan
    why = None
    if request.prune_arguments.drop_layers is not None:
        why = (
            "drop_layers leaves out whole layers, which an engine that builds its model by itself "
            "would look for in the checkpoint"
        )
    elif plan.is_open:
        asked = "criterion" if plan.allocation == UNIFORM else "allocation"
        why = (
            f"{asked}={getattr(plan, asked)} finds the widths in the weights, and an engine needs "
            "them before it reads a weight"
        )
    if why is not None:
        raise UnsupportedModelError(
            f"{why}: use --model pruned-hf, or export the pruned model first (lm-eval-pruned "
            "prune)."
        )
    experts = {mlp.name for mlp in widths.mlps if mlp.kind == "expert"}
    for name in widths.inexpressible(widths.targets(plan)):
        if name in experts:
            raise UnsupportedModelError(
                f"{_asked(plan) or 'The checkpoint'} gives {name} a width of its own, and an engine that "
                f"builds experts from {widths.keys[name]} in the config cannot have that: prune "
                "all layers alike, or use --model pruned-hf."
            )


def divide_among(
    request: LoadRequest, processes: int, argument: str = "tp_plan"
) -> LoadRequest:
    """Return a request whose kept widths tensor parallelism can split evenly.

    It is `request` where those widths divide. Otherwise, and where an allocation is still to
    find the widths, ``multiple_of`` rounds them down, which a warning says.

    Args:
        request: What was asked for.
        processes: Number of processes that share each MLP.
        argument: What asked for them, for the messages.

    Raises:
        ValueError: A width does not divide, and rounding it down leaves nothing or is not asked.
    """
    odd, plan = _odd(request, processes), request.plan
    shared_out = plan.prunes and plan.allocation != UNIFORM and processes > 1
    if odd is None and not shared_out:
        return request
    problem = (
        f"{_asked(plan) or 'the baseline'} gives {odd} neurons, which do not divide among the "
        f"{processes} processes of {argument}"
    )
    multiple = math.lcm(processes, plan.multiple_of)
    # The multiple may be more than is kept, and the baseline has none.
    with contextlib.suppress(ValueError):
        given = dataclasses.replace(request.prune_arguments, multiple_of=multiple)
        rounded = request.asking(given)
        if _odd(rounded, processes) is None:
            if odd is not None:
                logger.warning(
                    "%s: multiple_of=%d rounds down what it keeps.", problem, multiple
                )
            return rounded
    raise ValueError(
        f"{problem}: pass a size that keeps multiples of {processes}, or use a number of "
        "processes that divides it."
    )


def _asked(plan: PrunePlan) -> str:
    return ", ".join(f"{name}={value}" for name, value in plan.asked.items())


def _odd(request: LoadRequest, processes: int) -> str | None:
    """Return name and width of the first MLP whose width does not divide."""
    targets = request.widths.targets(request.plan)
    return next((f"{n} {w}" for n, w in targets.items() if w % processes), None)
