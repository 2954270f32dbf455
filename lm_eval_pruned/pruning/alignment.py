"""Widths that a device computes with at less than its speed.

Source: NVIDIA, Matrix Multiplication Background User's Guide, "Tensor Core
Requirements": dimensions are best multiples of 16 bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.widths import Widths

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.alignment")

#: Neurons of which CUDA wants a multiple where a weight has 16 bits. In float32, torch leaves
#: tensor cores alone unless it is told otherwise.
_CUDA_MULTIPLE = 8


def warn_misaligned(
    model: PreTrainedModel,
    plan: PrunePlan,
    widths: Widths,
    targets: Mapping[str, int],
) -> None:
    """Tell the user if a kept width slows the device down, and what would not."""
    quantised = getattr(model.config, "quantization_config", None) is not None
    if quantised or model.dtype.itemsize != 2 or "cuda" not in device_types(model):
        return
    odd = [
        mlp.name
        for mlp in widths.mlps
        # `choose_experts_implementation` tells what stacked experts need.
        if mlp.linears and targets[mlp.name] < widths.actual[mlp.name]
        if targets[mlp.name] % _CUDA_MULTIPLE
    ]
    multiple = math.lcm(_CUDA_MULTIPLE, plan.multiple_of)
    width = plan.width // multiple * multiple
    if not odd or not width:
        return
    arguments = dataclasses.replace(plan.arguments, multiple_of=multiple)
    aligned = dataclasses.replace(plan, width=width, arguments=arguments)
    if plan.layer_widths is not None:
        by_layer = {layer: aligned.rounded(kept) for layer, kept in plan.layer_widths}
        aligned = aligned.with_layers(by_layer)
    logger.warning(
        "%d neurons are no multiple of %d, which CUDA's kernels for 16-bit weights want: add "
        "multiple_of=%d (%d neurons) for speed.",
        targets[odd[0]],
        _CUDA_MULTIPLE,
        multiple,
        widths.targets(aligned)[odd[0]],
    )


def device_types(model: PreTrainedModel) -> set[str]:
    """Return the types of the devices that hold the parameters of a model."""
    return {parameter.device.type for parameter in model.parameters()}
