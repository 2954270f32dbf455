"""From single measurements to figures with intervals."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_eval_pruned.energy.readings import COMPONENTS, EnergyReading, ratio
from lm_eval_pruned.profiling.model import (
    CONFIDENCE,
    ENERGY_WINDOW_SECONDS,
    MODES,
    SCHEMA_VERSION,
    Delta,
    Distribution,
    Estimate,
    Job,
    Profile,
    ProfileCell,
    ProfileRequest,
)


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling.measure import _Bench, _Shelf


def distribution(values: Sequence[float]) -> Distribution:
    """Describe samples; see `Distribution`."""
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return Distribution(
        len(values),
        float(np.mean(values)),
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
        float(p50),
        float(p90),
        float(p99),
    )


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its 95 % interval."""
    mean = float(np.mean(values))
    low, high = _interval(values)
    return Estimate(len(values), mean, low, high)


def delta(values: Sequence[float], baseline: Sequence[float]) -> Delta | None:
    """Compare pairs of the same repeat; None where a number is not positive."""
    if not values or min(*values, *baseline) <= 0:
        return None
    logs = np.log(values) - np.log(baseline)

    def percent(log: float) -> float:
        return 100 * float(np.expm1(log))

    middle = percent(float(np.mean(logs)))
    low, high = _interval(logs)
    if low is None or high is None:
        return Delta(middle, None, None, "one repeat, no interval")
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference seen"
    return Delta(middle, percent(low), percent(high), verdict)


def _interval(values: Any) -> tuple[float | None, float | None]:
    from scipy import stats

    if len(values) < 2:
        return None, None
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, stats.sem(values))
    return float(low), float(high)


def summarise(
    request: ProfileRequest,
    shelf: _Shelf,
    bench: _Bench,
    jobs: list[Job],
    interrupted: bool,
    monitor: EnergyMonitor,
) -> Profile:
    cells = []
    for size in request.batch_sizes:
        for mode in MODES:
            figures = {
                name: {
                    job.repeat: _figures(job, mode)
                    for job in jobs
                    if job.model == name and job.batch_size == size
                }
                for name in shelf.models
            }
            for name in shelf.models:
                mine = [j for j in jobs if j.model == name and j.batch_size == size]
                if mine:
                    cells.append(_cell(mine, mode, figures[name], figures["baseline"]))
    return Profile(
        SCHEMA_VERSION,
        asdict(request),
        _environment(request),
        "together" if shelf.together else "one at a time",
        bench.warm_up_batches,
        interrupted,
        energy_block(monitor, jobs),
        list(shelf.models.values()),
        cells,
    )


_LATENCIES = (
    "seconds_to_first_token",
    "seconds_per_output_token",
    "seconds_end_to_end",
)


#: Metrics that are compared with the baseline.
_COMPARED = (
    *_LATENCIES,
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "joules_per_prompt_token",
    "joules_per_decode_token",
    "joules_per_output_token",
    "mean_output_tokens",
)


def _figures(job: Job, mode: str) -> dict[str, float | None]:
    """Return one number per metric for one repeat."""
    timings, reading = job.passes[mode]
    prompt = sum(t.prompt_tokens for t in timings)
    output = sum(t.output_tokens for t in timings)
    rows = sum(t.rows for t in timings)
    first = sum(t.first for t in timings)
    after = sum(t.total - t.first for t in timings)
    decoded = output - rows
    steps = sum(t.steps - 1 for t in timings)
    prefill, decode, both = (
        _energy(job, reading)[phase]["total"] for phase in ("prefill", "decode", "both")
    )
    return {
        "seconds_to_first_token": first / len(timings),
        "seconds_per_output_token": ratio(after, steps),
        "seconds_end_to_end": (first + after) / len(timings),
        "prefill_tokens_per_second": ratio(prompt, first),
        "decode_tokens_per_second": ratio(decoded, after) if decoded else None,
        "joules_per_prompt_token": ratio(prefill, prompt),
        "joules_per_decode_token": ratio(decode, decoded),
        "joules_per_output_token": ratio(both, output),
        "mean_output_tokens": output / rows,
    }


def _energy(job: Job, reading: EnergyReading) -> dict[str, dict[str, float | None]]:
    """Return joules of one pass by phase and component."""
    prefill: dict[str, float | None] = {}
    decode: dict[str, float | None] = {}
    both = reading.joules.as_dict()
    for name in (*COMPONENTS, "total"):
        once = getattr(job.prefill.joules, name) if job.prefill is not None else None
        once = ratio(once, job.prefill_passes)
        whole = both[name]
        prefill[name] = once
        decode[name] = None if once is None or whole is None else whole - once
    return {"prefill": prefill, "decode": decode, "both": both}


def _cell(
    jobs: list[Job],
    mode: str,
    figures: dict[int, dict[str, float | None]],
    baseline: dict[int, dict[str, float | None]],
) -> ProfileCell:
    timings = [timing for job in jobs for timing in job.passes[mode][0]]
    once = jobs[0].passes[mode][0]
    energies = [_energy(job, job.passes[mode][1]) for job in jobs]

    def series(metric: str) -> list[float] | None:
        values = [figures[repeat][metric] for repeat in sorted(figures)]
        return None if None in values else values  # type: ignore[return-value]

    def estimated(metric: str) -> Estimate | None:
        values = series(metric)
        return None if values is None else estimate(values)

    deltas = {}
    if jobs[0].model != "baseline":
        for metric in _COMPARED:
            pairs = [
                (figures[repeat][metric], baseline[repeat][metric])
                for repeat in sorted(figures)
                if repeat in baseline
            ]
            if pairs and all(None not in pair for pair in pairs):
                change = delta(*zip(*pairs, strict=True))  # type: ignore[arg-type]
                if change is not None:
                    deltas[metric] = change
    per_token = [(t.total - t.first) / (t.steps - 1) for t in timings if t.steps > 1]
    prefill_rate = estimated("prefill_tokens_per_second")
    assert prefill_rate is not None
    return ProfileCell(
        model=jobs[0].model,
        batch_size=jobs[0].batch_size,
        mode=mode,
        repeats=len(jobs),
        prompts=sum(t.rows for t in once),
        prompt_tokens=sum(t.prompt_tokens for t in once),
        mean_output_tokens=sum(t.output_tokens for t in timings)
        / sum(t.rows for t in timings),
        seconds_to_first_token=distribution([t.first for t in timings]),
        seconds_per_output_token=distribution(per_token) if per_token else None,
        seconds_end_to_end=distribution([t.total for t in timings]),
        latency_estimates={
            metric: found
            for metric in _LATENCIES
            if (found := estimated(metric)) is not None
        },
        prefill_tokens_per_second=prefill_rate,
        decode_tokens_per_second=estimated("decode_tokens_per_second"),
        joules={
            phase: {
                name: _mean([energy[phase][name] for energy in energies])
                for name in (*COMPONENTS, "total")
            }
            for phase in ("prefill", "decode", "both")
        },
        joules_per_prompt_token=estimated("joules_per_prompt_token"),
        joules_per_decode_token=estimated("joules_per_decode_token"),
        joules_per_output_token=estimated("joules_per_output_token"),
        peak_device_bytes=_largest([job.peak_device_bytes for job in jobs]),
        peak_host_bytes=_largest([job.peak_host_bytes for job in jobs]),
        deltas=deltas,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if values and len(known) == len(values) else None


def _largest(values: list[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def energy_block(monitor: EnergyMonitor, jobs: list[Job]) -> dict[str, Any]:
    meter = monitor.describe()
    notes = list(monitor.failures)
    for job in jobs:
        for mode, (_, reading) in job.passes.items():
            notes += reading.notes
            decode = _energy(job, reading)["decode"]["total"]
            if decode is not None and decode < 0:
                notes.append(
                    f"{job.model}, batch size {job.batch_size}, {mode}: generation took less "
                    "energy than its prefill alone in some repeat, so the decode energy is noise"
                )
            if reading.seconds is not None and reading.seconds < ENERGY_WINDOW_SECONDS:
                notes.append(
                    f"batch size {job.batch_size}, {mode}: energy windows shorter than "
                    f"{ENERGY_WINDOW_SECONDS:g} s are unreliable; use more prompts or tokens"
                )
    return {
        "meter": meter and meter.name,
        "scope": meter and meter.scope,
        "sources": meter and {k: asdict(source) for k, source in meter.sources.items()},
        "hardware": meter and meter.hardware,
        "notes": list(dict.fromkeys(notes)),
    }


def _environment(request: ProfileRequest) -> dict[str, Any]:
    device = torch.device(request.device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{
            package: version(package)
            for package in ("torch", "transformers", "lm-eval-pruned")
        },
        "device": request.device,
        "device_name": name,
        "threads": torch.get_num_threads(),
    }
