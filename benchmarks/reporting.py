"""What the comparisons of two model types print in the same way."""

from __future__ import annotations

import platform
import statistics
import threading
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

import psutil
import torch


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def spread(values: list[float]) -> str:
    """Return minimum, median and maximum."""
    return (
        f"min {min(values):.2f}  median {statistics.median(values):.2f}  "
        f"max {max(values):.2f}"
    )


def machine(device: str) -> str:
    """Return processor, device, number of threads and versions."""
    packages = ("lm-eval-pruned", "lm_eval", "transformers", "torch")
    return (
        f"{platform.processor() or platform.machine()}, {device}, "
        f"{torch.get_num_threads()} threads; "
        + ", ".join(f"{name} {version(name)}" for name in packages)
    )


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Append the peak, in bytes, to the list that it yields.

    On CUDA that of the memory allocated, elsewhere that of the process's resident memory.
    """
    peaks = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield peaks
        peaks.append(torch.cuda.max_memory_allocated())
        return
    stop = threading.Event()

    def watch() -> None:
        process = psutil.Process()
        while not stop.wait(0.01):
            peaks[0] = max(peaks[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peaks
    stop.set()
    thread.join()


def print_profile(run: Callable[[], object], device: str) -> None:
    """Run once under the profiler and print the operations that take longest."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    print(
        profile.key_averages().table(
            sort_by=f"self_{'cpu' if device == 'cpu' else 'cuda'}_time_total",
            row_limit=20,
            max_name_column_width=40,
        )
    )
