"""Memory that is free, and the most that was used."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.profiling.model import Job


#: Share of the free memory that all models together may take.
MEMORY_SHARE = 0.6


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


@contextlib.contextmanager
def peak_memory(job: Job, device: torch.device) -> Iterator[None]:
    """Fill in the peaks of `job`: on CUDA above what was allocated before, on the host whole."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    known = _reset_peak_host()
    yield
    if device.type == "cuda":
        job.peak_device_bytes = torch.cuda.max_memory_allocated(device) - before
    if known:
        job.peak_host_bytes = _peak_host()


def _reset_peak_host() -> bool:
    """Start the system's record of peak memory afresh; Linux only (man 5 proc)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_host() -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
