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
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.widths import Widths

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.parallel")


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model under the keys that its checkpoint has for them.

    Source: `transformers.PreTrainedModel.save_pretrained`, which renames them in the same way.
    """
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, stored_once(model)).items()


def record_of(
    request: LoadRequest,
    widths: Widths,
    kept: tuple[Tensor, ...] | None,
    calibration: Calibration | None = None,
) -> PruneRecord:
    """Describe what an engine did to the MLPs of `request`.

    Args:
        request: What was loaded.
        widths: The widths that the checkpoint has.
        kept: The kept neurons of every MLP, each of shape (k,); none for the
            baseline, None where they are not known.
        calibration: The text behind the scores.
    """
    plan = widths.plan(request.prune_arguments)
    return PruneRecord.of(plan, widths, kept, calibration)


def check_buildable(request: LoadRequest) -> None:
    """Refuse widths that no engine can build.

    An engine builds a model from its config, and a layer's experts as one. Dense MLPs it can
    build anew.

    Raises:
        UnsupportedModelError: Experts would have a width that the config cannot hold, or
            layers would be left out.
    """
    widths, plan = request.widths, request.plan
    advice = "use --model pruned-hf, or export the pruned model first (lm-eval-pruned prune)."
    if request.prune_arguments.drop_layers is not None:
        raise UnsupportedModelError(
            "drop_layers leaves out whole layers, which an engine that builds its model by itself "
            f"would look for in the checkpoint: {advice}"
        )
    if plan.is_open:
        asked = f"allocation={plan.allocation}"
        if plan.allocation == UNIFORM:
            asked = f"criterion={plan.criterion}"
        raise UnsupportedModelError(
            f"{asked} finds the widths in the weights, and an engine needs them before it reads a "
            f"weight: {advice}"
        )
    experts = {mlp.name for mlp in widths.mlps if mlp.kind == "expert"}
    for name in widths.inexpressible(widths.targets(plan)):
        if name in experts:
            asked = ", ".join(f"{name}={value}" for name, value in plan.asked.items())
            raise UnsupportedModelError(
                f"{asked or 'The checkpoint'} gives {name} a width of its own, and an engine that "
                f"builds experts from {widths.keys[name]} in the config cannot have that: prune "
                "all layers alike, or use --model pruned-hf."
            )


def divide_among(
    resolve: Callable[[PruneArguments], LoadRequest],
    arguments: PruneArguments,
    processes: int,
    argument: str = "tp_plan",
) -> PruneArguments:
    """Return arguments whose kept widths tensor parallelism can split evenly.

    They are `arguments` where those widths divide. Otherwise, and where an allocation is still to
    find the widths, ``multiple_of`` rounds them down, which a warning says.

    Args:
        resolve: Returns what arguments ask of the model.
        arguments: Those that were given.
        processes: Number of processes that share each MLP.
        argument: What asked for them, for the messages.

    Raises:
        ValueError: A width does not divide, and rounding it down leaves nothing or is not asked.
    """
    if processes == 1:
        return arguments
    asked = resolve(arguments)
    odd, plan = _odd(asked, processes), asked.plan
    if odd is None and not (plan.prunes and plan.allocation != UNIFORM):
        return arguments
    said = ", ".join(f"{k}={v}" for k, v in plan.asked.items()) or "the baseline"
    problem = (
        f"{said} gives {odd} neurons, which do not divide among the {processes} processes of "
        f"{argument}"
    )
    multiple = math.lcm(processes, int(arguments.multiple_of))
    rounded = dataclasses.replace(arguments, multiple_of=multiple)
    # The multiple may be more than is kept.
    with contextlib.suppress(ValueError):
        if plan.prunes and _odd(resolve(rounded), processes) is None:
            if odd is not None:
                logger.warning(
                    "%s: multiple_of=%d rounds down what it keeps.", problem, multiple
                )
            return rounded
    raise ValueError(
        f"{problem}: pass a size that keeps multiples of {processes}, or use a number of "
        "processes that divides it."
    )


def _odd(request: LoadRequest, processes: int) -> str | None:
    """Return name and width of the first MLP whose width does not divide."""
    targets = request.widths.targets(request.plan)
    return next((f"{n} {w}" for n, w in targets.items() if w % processes), None)
