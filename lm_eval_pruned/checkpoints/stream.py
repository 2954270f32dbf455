"""A pruned checkpoint for engines that build models of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.allocation_names import UNIFORM
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.record import PruneRecord


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.widths import Widths


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model under the keys that its checkpoint has for them.

    Source: `transformers.PreTrainedModel.save_pretrained`, which renames them in the same way.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        # A saved checkpoint holds it once.
        state.pop(name, None)
    yield from revert_weight_conversion(model, state).items()


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
    return PruneRecord.of(
        plan,
        widths,
        widths.parameters_before,
        widths.count_parameters(widths.targets(plan)),
        kept,
        calibration,
    )


def check_buildable(request: LoadRequest) -> None:
    """Refuse widths that no engine can build.

    An engine builds a model from its config, and a layer's experts as one. Dense MLPs it can
    build anew.

    Raises:
        UnsupportedModelError: Experts would have a width that the config cannot hold, or
            layers would be left out.
    """
    widths, plan = request.widths, request.plan
    if request.prune_arguments.drop_layers is not None:
        raise UnsupportedModelError(
            "drop_layers leaves out whole layers, which an engine that builds its model by itself "
            "would look for in the checkpoint: use --model pruned-hf, or export the pruned model "
            "first (lm-eval-pruned prune)."
        )
    if plan.is_open:
        asked = f"allocation={plan.allocation}"
        if plan.allocation == UNIFORM:
            asked = f"criterion={plan.criterion}"
        raise UnsupportedModelError(
            f"{asked} finds the widths in the weights, and an engine needs them before it reads a "
            "weight: use --model pruned-hf, or export the pruned model first (lm-eval-pruned prune)."
        )
    experts = {mlp.name for mlp in widths.mlps if mlp.kind == "expert"}
    names = [n for n in widths.inexpressible(widths.targets(plan)) if n in experts]
    if not names:
        return
    asked = ", ".join(f"{name}={value}" for name, value in plan.asked.items())
    raise UnsupportedModelError(
        f"{asked or 'The checkpoint'} gives {names[0]} a width of its own, and an engine that "
        f"builds experts from {widths.keys[names[0]]} in the config cannot have that: prune "
        "all layers alike, or use --model pruned-hf."
    )
