"""How many rows of keys and values fit into the memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psutil
import torch

from .attention_support import base_model, config_of


#: Bytes of keys and values that are taken unasked.
SMALL = 2 * 2**30


def rows_in_memory(lm: Any, length: int) -> int:
    """Return how many rows of `length` tokens a third of the free memory holds.

    The same for all processes among which the model's tensors are split.
    """
    row = _bytes_in_a_layer(lm, length)
    all_layers = config_of(lm).get_text_config().num_hidden_layers
    rows = min(
        _free_memory(device) // 3 // (row * layers)
        for device, layers in _layers_by_device(lm, all_layers).items()
    )
    if is_split(base_model(lm.model)):
        # They run the same passes in step.
        least = torch.tensor(rows, device=lm.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        rows = int(least)
    return max(1, rows)


def rows_that_are_small(lm: Any, length: int) -> int:
    """Return how many rows of `length` tokens take at most `SMALL` bytes.

    The same on every machine, whatever memory is free.
    """
    layers = config_of(lm).get_text_config().num_hidden_layers
    return max(1, SMALL // (_bytes_in_a_layer(lm, length) * layers))


def _bytes_in_a_layer(lm: Any, length: int) -> int:
    """Return the bytes of the keys and values of a row in one layer."""
    config = config_of(lm).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    heads = -(-heads // (getattr(base_model(lm.model), "tp_size", None) or 1))
    return 2 * heads * size * lm.model.dtype.itemsize * length


def _layers_by_device(lm: Any, layers: int) -> Counter[torch.device]:
    """Return how many layers of a model lie on each device."""
    devices = {
        module.layer_idx: next((p.device for p in module.parameters()), lm.device)
        for module in lm.model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }
    # What is offloaded runs where the model does.
    found = Counter(
        lm.device if device.type in ("meta", "cpu") else device
        for device in devices.values()
    )
    return found or Counter({lm.device: layers})


def _free_memory(device: torch.device) -> int:
    """Return the bytes that a process can have on a device."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "mem_get_info"):
        return psutil.virtual_memory().available
    # What the allocator keeps for the next tensor is free as well.
    kept = backend.memory_reserved(device) - backend.memory_allocated(device)
    return backend.mem_get_info(device)[0] + kept


def is_split(model: Any) -> bool:
    """Return whether several processes hold a part of each of a model's tensors."""
    return (getattr(model, "tp_size", None) or 1) > 1
