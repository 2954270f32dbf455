"""How much memory is free, and how much a pass took at its peak."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Iterator


def free_bytes(device: torch.device) -> int:
    """Return how much memory of a device is free, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


@contextlib.contextmanager
def peak_memory(device: torch.device | None, held: int) -> Iterator[dict[str, int]]:
    """Yield what holds the most bytes in use, once the block is left; nothing without a device.

    ``peak_device_bytes``, on CUDA, are those of the block and of a model of `held` bytes;
    ``peak_host_bytes``, on Linux, are those of the whole process.
    """
    peaks: dict[str, int] = {}
    if device is None:
        yield peaks
        return
    others = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - held
    cleared = 0
    with contextlib.suppress(OSError):
        # Starts the system's record of the peak anew (man 5 proc).
        cleared = Path("/proc/self/clear_refs").write_text("5")
    yield peaks
    if device.type == "cuda":
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated(device) - others
    status = Path("/proc/self/status").read_text() if cleared else ""
    if found := re.search(r"VmHWM:\s*(\d+) kB", status):
        peaks["peak_host_bytes"] = int(found[1]) * 1024
