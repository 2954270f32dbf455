"""Widths that a device computes with at less than its speed.

Source: NVIDIA, Matrix Multiplication Background User's Guide, "Tensor Core
Requirements": dimensions are best multiples of 16 bytes. Kernels for 4-bit weights,
such as those of bitsandbytes, scale them in blocks of 64.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.widths import Widths

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.alignment")

#: Neurons of which CUDA wants a multiple, by bits of a weight. In float32, torch leaves
#: tensor cores alone unless it is told otherwise.
_CUDA_MULTIPLES = {4: 64, 8: 16, 16: 8}


def warn_misaligned(
    model: PreTrainedModel,
    plan: PrunePlan,
    widths: Widths,
    targets: Mapping[str, int],
) -> None:
    """Tell the user if a kept width slows the device down, and what would not."""
    bits = weight_bits(model)
    wanted = _CUDA_MULTIPLES.get(bits, 1)
    odd = [
        mlp.name
        for mlp in widths.mlps
        # `choose_experts_implementation` tells what stacked experts need.
        if mlp.linears and targets[mlp.name] < widths.actual[mlp.name]
        if targets[mlp.name] % wanted
    ]
    multiple = math.lcm(wanted, plan.multiple_of)
    width = plan.width // multiple * multiple
    if not odd or not width or "cuda" not in device_types(model):
        return
    aligned = dataclasses.replace(plan, width=width, multiple_of=multiple)
    if plan.layer_widths is not None:
        by_layer = {layer: aligned.rounded(kept) for layer, kept in plan.layer_widths}
        aligned = aligned.with_layers(by_layer)
    logger.warning(
        "%d neurons are no multiple of %d, which CUDA's kernels for %d-bit weights want: add "
        "multiple_of=%d (%d neurons) for speed.",
        targets[odd[0]],
        wanted,
        bits,
        multiple,
        widths.targets(aligned)[odd[0]],
    )


def device_types(model: PreTrainedModel) -> set[str]:
    """Return the types of the devices that hold the parameters of a model."""
    return {parameter.device.type for parameter in model.parameters()}


def weight_bits(model: PreTrainedModel) -> int:
    """Return how many bits a weight of the model's linear layers takes."""
    said: Any = getattr(model.config, "quantization_config", None) or {}
    said = said if isinstance(said, dict) else said.to_dict()
    # Keys of quanto and torchao; before them that of bitsandbytes.
    names = f"{said.get('weights')} {said.get('quant_type')}"
    for bits in (4, 8):
        is_named = re.search(rf"(int|float|fp){bits}(?!\d)", names, re.IGNORECASE)
        if said.get(f"load_in_{bits}bit") or is_named:
            return bits
    return model.dtype.itemsize * 8
