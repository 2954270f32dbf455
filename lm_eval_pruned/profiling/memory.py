"""The most memory that was in use: of the CUDA allocator, and on Linux of the whole process."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


def clear_peaks(device: torch.device | None) -> None:
    """Look for new peaks from now on."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        # Starts the system's record of the peak anew (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")


def peaks(device: torch.device | None) -> dict[str, int]:
    """Return ``peak_device_bytes`` and ``peak_host_bytes``, those that are known of the device."""
    found: dict[str, int] = {}
    if device is None:
        return found
    if device.type == "cuda":
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text()
        high = re.search(r"VmHWM:\s*(\d+) kB", status)
        found["peak_host_bytes"] = int(high[1]) * 1024  # type: ignore[index]
    return found
