"""Memory that is free, and the most that was used."""

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
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """Measure the most memory that a ``with`` block takes.

    Yields:
        At the end of the block, in bytes: ``peak_device_bytes``, on CUDA, above what was
        allocated before; ``peak_host_bytes``, on Linux, of the whole process.
    """
    peaks: dict[str, int] = {}
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        # Starts the system's record of the peak anew (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")
        host_known = True
    except OSError:
        host_known = False
    yield peaks
    if on_cuda:
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated(device) - before
    if host_known:
        status = Path("/proc/self/status").read_text()
        found = re.search(r"VmHWM:\s*(\d+) kB", status)
        if found is not None:
            peaks["peak_host_bytes"] = int(found[1]) * 1024
