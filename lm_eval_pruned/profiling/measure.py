"""Measure models side by side: prefill and decode, at a fixed and at the natural output length.

Only the fixed length compares speed: a model that stops earlier is not faster.
"""

from __future__ import annotations

import contextlib
import platform
import re
import time
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import release_memory

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.energy.readings import ratio
from lm_eval_pruned.model_wrappers.batching.fast_path import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.profiling.options import ProfileRequest, batches_of, plan_models
from lm_eval_pruned.profiling.summary import MODES, cells_of


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import BatchEncoding, PreTrainedModel

    from lm_eval_pruned.energy.meter import EnergyMonitor

#: Version of the JSON; raised when a key changes its meaning.
SCHEMA_VERSION = 1
#: A prefill pass is repeated until its energy window is this long, in seconds.
ENERGY_WINDOW_SECONDS = 1.0


def profile(
    request: ProfileRequest,
    prompts: Sequence[str],
    *,
    monitor: EnergyMonitor,
) -> Iterator[dict[str, Any]]:
    """Measure the models of `request` on `prompts`, in seconds of the clock of `monitor`.

    Yields:
        After each repeat what ``profile.json`` holds (JSON types only), with ``models`` of
        `plan_models` and ``cells`` of `cells_of`; ``interrupted`` unless it is the last one.

    Raises:
        ValueError: A size is out of range, or a prompt is too long for the model.
    """
    from tqdm import trange

    if torch.device(request.device).type != "cpu":
        # Energy without that of the GPU is then no total.
        monitor.required.add("gpu")
    profiler = _Profiler(request, prompts, monitor)
    models = profiler.models
    try:
        monitor.start()
        for repeat in trange(request.repeats, desc="Profiling", unit="repeat"):
            shift = repeat % len(models)
            # The order rotates: a machine that gets slower does so for all models.
            for spec in models[shift:] + models[:shift]:
                profiler.measure(repeat, spec)
                release_memory()
            yield profiler.result(interrupted=repeat + 1 < request.repeats)
    finally:
        monitor.stop()


class _Profiler:
    """Runs one model after the other on the same batches, and keeps a row for each batch."""

    def __init__(
        self, request: ProfileRequest, prompts: Sequence[str], monitor: EnergyMonitor
    ) -> None:
        self.request, self.monitor = request, monitor
        self.models = plan_models(request)
        self.batches, self.pad_token = batches_of(request, prompts)
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.warm_up_batches = 0

    def measure(self, repeat: int, spec: dict[str, Any]) -> None:
        """Load a model; measure a prefill and a pass in each mode at all batch sizes."""
        request, tokens = self.request, self.request.max_new_tokens
        arguments = {**request.load_arguments, **spec["asked"]}
        if spec["asked"]:
            arguments |= {"criterion": request.criterion, "seed": request.seed}
        torch.manual_seed(request.seed)
        model = load_pruned(
            request.pretrained, device=request.device, dtype=request.dtype, **arguments
        )
        spec["model_bytes"] = int(model.get_memory_footprint())
        timed = partial(
            generate, model, pad_token=self.pad_token, clock=self.monitor.clock
        )
        for size, batches in self.batches.items():
            for batch in batches[:2]:
                timed(batch, max_new_tokens=min(8, tokens), fixed=True)
                self.warm_up_batches += 1
            _peaks(model.device, clear=True)
            key = {"batch_size": size, "model": spec["name"], "repeat": repeat}
            run = partial(timed, max_new_tokens=1, fixed=True)
            _, prefill = self.window(run, size, ENERGY_WINDOW_SECONDS)
            key |= {f"prefill_{part}": joules for part, joules in prefill.items()}
            rows = []
            for mode in MODES:
                run = partial(timed, max_new_tokens=tokens, fixed=mode == "fixed")
                batch_rows, both = self.window(run, size)
                shared = {f"both_{part}": joules for part, joules in both.items()}
                rows += [{**key, "mode": mode, **shared, **row} for row in batch_rows]
                if (ratio(both["total"], prefill["total"]) or 1) < 1:
                    self.notes.append(
                        f"{spec['name']}, batch size {size}, {mode}: in some repeat, generation took "
                        "less energy than the prefill, so the decode energy is noise"
                    )
            self.rows += [row | _peaks(model.device) for row in rows]

    def window(
        self, run: Callable[..., dict[str, Any]], size: int, least: float = 0
    ) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
        """Generate for all batches, for `least` seconds or longer; add the joules of a batch."""
        timed: list[dict[str, Any]] = []
        self.monitor.begin_window("pass")
        clock = self.monitor.clock
        start = clock() if least else 0.0
        while not timed or (least and clock() - start < least):
            timed += map(run, self.batches[size])
        reading = self.monitor.end_window("pass")
        self.notes += reading.notes
        if (reading.seconds or 0.0) < ENERGY_WINDOW_SECONDS:
            self.notes.append(
                f"energy windows at batch size {size} are shorter than "
                f"{ENERGY_WINDOW_SECONDS:g} s and unreliable; use more prompts or tokens"
            )
        joules = asdict(reading.joules).items()
        return timed, {part: ratio(energy, len(timed)) for part, energy in joules}

    def result(self, *, interrupted: bool) -> dict[str, Any]:
        """Return what `profile` yields; `interrupted` is what it is called if nothing follows."""
        name = platform.processor() or platform.machine()
        if torch.device(self.request.device).type == "cuda":
            name = torch.cuda.get_device_name(self.request.device)
        meter = self.monitor.describe()
        return {
            "schema_version": SCHEMA_VERSION,
            "request": asdict(self.request),
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                **{p: version(p) for p in ("torch", "transformers", "lm-eval-pruned")},
                "device": self.request.device,
                "device_name": name,
                "threads": torch.get_num_threads(),
            },
            "models_held": "one at a time",
            "warm_up_batches": self.warm_up_batches,
            "interrupted": interrupted,
            "energy": {
                "meter": meter and meter.name,
                "scope": meter and meter.scope,
                "sources": meter and {k: asdict(s) for k, s in meter.sources.items()},
                "hardware": meter and meter.hardware,
                "notes": list(dict.fromkeys([*self.monitor.failures, *self.notes])),
            },
            "models": self.models,
            "cells": cells_of(self.rows, self.models[0]["name"]),
        }


def _peaks(device: torch.device, *, clear: bool = False) -> dict[str, int]:
    """Return the peaks of memory that are known; `clear` begins new ones."""
    peaks: dict[str, int] = {}
    if device.type == "cuda":
        peaks["peak_device_bytes"] = torch.cuda.max_memory_allocated(device)
        if clear:
            torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        if clear:
            # Starts the system's record of the peak anew (man 5 proc).
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        if high := re.search(r"VmHWM:\s*(\d+) kB", status):
            peaks["peak_host_bytes"] = int(high[1]) * 1024
    return peaks


def generate(
    model: PreTrainedModel,
    batch: BatchEncoding,
    max_new_tokens: int,
    *,
    fixed: bool,
    pad_token: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Generate greedily and take the time of the first and the last token.

    Where `fixed`, the end of text is forbidden, so that there are exactly `max_new_tokens`; else
    rows that have ended are filled with `pad_token`.

    Returns:
        ``rows``, the number of prompts; ``prompt_tokens`` without padding; ``output_tokens``
        up to the end of text of each row; ``steps``, the output length of the longest row;
        and the seconds until the ``first`` token and in ``total``.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    ids, ends = batch["input_ids"], end_tokens(model)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if fixed else None,
        eos_token_id=ends or None,
        pad_token_id=pad_token,
        use_cache=True,
    )
    first: list[float] = []

    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        return clock()

    def never_stop(*_: Any, **__: Any) -> torch.Tensor:
        # A criterion is what is called after the first token.
        if not first:
            first.append(now())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    start = now()
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([never_stop]),
        )
    end = now()
    tokens = output[:, ids.shape[1] :]
    return {
        "rows": len(tokens),
        "prompt_tokens": int(batch["attention_mask"].sum()),
        "output_tokens": tokens.numel() if fixed else count_generated(tokens, ends),
        "steps": tokens.shape[1],
        "first": first[0] - start,
        "total": end - start,
    }
