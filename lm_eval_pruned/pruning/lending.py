"""Modules on another device for a while, and what can be computed there.

Weights return as they were, and where they were, without being copied back: those of a mapped file
stay mapped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.calibration")

#: Where Linux says how many bytes a container may use, and how many it uses.
_CONTAINER = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free on a device, in bytes; 0 where only the device knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return 0
    free = psutil.virtual_memory().available
    # A container without a limit says "max".
    with contextlib.suppress(OSError, ValueError):
        most, used = (
            int((_CONTAINER / f"memory.{name}").read_text())
            for name in ("max", "current")
        )
        free = min(free, most - used)
    return max(0, free)


@functools.cache
def _has_float64(kind: str) -> bool:
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except TypeError:
        return False
    return True


def float64_device(device: torch.device) -> torch.device:
    """Return a device, or the CPU where it has no float64, as Apple's GPUs have none."""
    return device if _has_float64(device.type) else torch.device("cpu")


def float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on its device or on the CPU; see `float64_device`."""
    return tensor.to(float64_device(tensor.device)).double()


@contextlib.contextmanager
def lent(modules: Iterable[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Have the tensors of modules on a device, and afterwards where they were.

    Args:
        modules: Those whose tensors go, without those inside them.
        device: None: they stay where they are.
    """
    copies: dict[int, Tensor] = {}
    with contextlib.ExitStack() as undo:
        for module in modules if device is not None else ():
            weights = module.named_parameters(recurse=False)
            for name, tensor in [*weights, *module.named_buffers(recurse=False)]:
                undo.callback(setattr, module, name, tensor)
                if id(tensor) not in copies:
                    data = tensor.detach().to(device)
                    if isinstance(tensor, nn.Parameter):
                        data = nn.Parameter(data, tensor.requires_grad)
                    copies[id(tensor)] = data
                setattr(module, name, copies[id(tensor)])
        yield


@contextlib.contextmanager
def moved(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """Have a whole model on `device`, by default where it is; stay where it does not fit."""
    with contextlib.ExitStack() as stack:
        if device not in (None, model.device):
            try:
                stack.enter_context(lent(model.modules(), device))
            except torch.OutOfMemoryError:
                logger.warning(
                    "The model does not fit on %s, so its text runs on %s.",
                    device,
                    model.device,
                )
        yield
