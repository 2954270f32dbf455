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
    from collections.abc import Collection, Mapping

    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.widths import Widths

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.alignment")

#: Neurons of which CUDA wants a multiple, by bits of a weight. In float32, torch leaves
#: tensor cores alone unless it is told otherwise.
_CUDA_MULTIPLES = {4: 64, 8: 16, 16: 8}


def wanted_multiple(device_types: Collection[str], bits: int) -> int:
    """Return the multiple of neurons that matrix products are fast at.

    Args:
        device_types: Types of the devices that hold the model, such as ``cuda``.
        bits: Bits of a weight.
    """
    return _CUDA_MULTIPLES.get(bits, 1) if "cuda" in device_types else 1


def warn_misaligned(
    model: PreTrainedModel,
    plan: PrunePlan,
    widths: Widths,
    targets: Mapping[str, int],
) -> None:
    """Tell the user if a kept width slows the device down, and what would not."""
    bits = weight_bits(model)
    wanted = wanted_multiple(device_types(model), bits)
    pruned = [
        mlp.name
        for mlp in widths.mlps
        # `choose_experts_implementation` tells what stacked experts need.
        if targets[mlp.name] < widths.actual[mlp.name] and mlp.linears
    ]
    odd = [name for name in pruned if targets[name] % wanted]
    multiple = math.lcm(wanted, plan.multiple_of)
    width = plan.width // multiple * multiple
    if not odd or not width:
        return
    by_layer = plan.layer_widths and tuple(
        (layer, kept // multiple * multiple or kept)
        for layer, kept in plan.layer_widths
    )
    aligned = dataclasses.replace(
        plan, width=width, multiple_of=multiple, layer_widths=by_layer
    )
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
    quantisation: Any = getattr(model.config, "quantization_config", None)
    if quantisation is not None:
        if not isinstance(quantisation, dict):
            quantisation = quantisation.to_dict()
        for bits in (4, 8):
            # The key of bitsandbytes; then those of quanto and torchao.
            names = f"{quantisation.get('weights')} {quantisation.get('quant_type')}"
            if quantisation.get(f"load_in_{bits}bit") or re.search(
                rf"(int|float|fp){bits}(?!\d)", names, re.IGNORECASE
            ):
                return bits
    return model.dtype.itemsize * 8
