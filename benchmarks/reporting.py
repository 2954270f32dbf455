"""What the comparisons of two model types print in the same way."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lm_eval_pruned.model_wrappers.batching.cpu_linear import processor


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM


def spread(values: list[float]) -> str:
    """Return minimum, median and maximum."""
    return (
        f"min {min(values):.2f}  median {statistics.median(values):.2f}  "
        f"max {max(values):.2f}"
    )


def machine(device: str) -> str:
    """Return processor, device, number of threads and versions."""
    packages = ("lm-eval-pruned", "lm_eval", "transformers", "torch")
    vendor, family = processor()
    return (
        f"{vendor or platform.machine()} family {family}, {device}, "
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
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def likelihood_requests(tasks: list[Any], limit: int | None) -> list[Instance]:
    """Return the requests of type ``loglikelihood`` of tasks of the harness.

    Args:
        tasks: Names and configs of tasks.
        limit: Documents per task; None: all.
    """
    from lm_eval.tasks import TaskManager

    requests = []
    for task in TaskManager().load(tasks)["tasks"].values():
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit)
        requests += task.instances
    return requests


class Side:
    """One model type: its answers, times in seconds, and peak memory in bytes.

    CPU seconds are those of all threads: what other processes take does not show in them.
    """

    def __init__(self, name: str, lm: HFLM) -> None:
        self.name = name
        self.lm = lm
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peak = 0
        self.answers: list[Any] = []

    def timed(
        self, answer: Callable[..., list[Any]], requests: list[Any], **kwargs: Any
    ) -> list[Any]:
        """Have a method of `lm` answer `requests`; keep and return what it says."""
        with peak_memory(self.lm.device) as peaks:
            synchronise(self.lm.device)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            self.answers = answer(requests, **kwargs)
            synchronise(self.lm.device)
            self.cpu_seconds.append(time.process_time() - cpu_begin)
            self.seconds.append(time.perf_counter() - begin)
        self.peak = max(self.peak, *peaks)
        return self.answers


def synchronise(device: torch.device) -> None:
    """Wait for what a CUDA device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def on_the_fast_path(lm: HFLM) -> Iterator[None]:
    """Raise RuntimeError where an `lm` with fast paths took none of them in the block."""
    counts = getattr(lm, "token_counts", None)
    before = counts and counts.processed
    yield
    if counts and counts.processed == before:
        paths = lm.answer_paths.as_dict(lm.model).values()
        reasons = [
            r for path in paths if isinstance(path, dict) for r in path["reasons"]
        ]
        raise RuntimeError(
            f"hf-prefix answered on the plain path: {'; '.join(reasons) or 'its log says why'}."
        )


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
