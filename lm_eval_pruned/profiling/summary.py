"""From a table of batches and a table of passes to figures with intervals."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from lm_eval_pruned.energy.readings import COMPONENTS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling.options import ProfiledModel, ProfileRequest

#: Version of the JSON; raised when a key changes its meaning.
SCHEMA_VERSION = 1
#: Output lengths: each model generates as many tokens as the others, or as many as it likes.
MODES = ("fixed", "natural")
CONFIDENCE = 0.95
#: A prefill pass is repeated until its energy window is this long, in seconds.
ENERGY_WINDOW_SECONDS = 1.0
#: What a table has one row for, or several: a pass of a model over all prompts.
_PASS = ["batch_size", "mode", "model", "repeat"]
_JOULES = (*COMPONENTS, "total")


def summarise(
    request: ProfileRequest,
    models: list[ProfiledModel],
    monitor: EnergyMonitor,
    timings: list[dict[str, Any]],
    passes: list[dict[str, Any]],
    **protocol: Any,
) -> dict[str, Any]:
    """Return what ``profile.json`` holds (JSON types only). None: not measured.

    Args:
        request: What was measured.
        models: The models, the baseline first.
        monitor: What measured the energy.
        timings: One row for each batch; see `lm_eval_pruned.profiling.measure.Profiler`.
        passes: One row for each pass.
        **protocol: How it was measured.

    Returns:
        ``schema_version``, ``request``, ``environment``, the protocol, ``energy`` (meter,
        scope, source of each component, and what went wrong), ``models``
        (`ProfiledModel`), and ``cells``, one for each model, batch size and mode:

        - ``repeats``, and in one repeat ``prompts`` and ``prompt_tokens`` without padding;
        - ``mean_output_tokens`` per prompt, the end-of-text token included;
        - ``seconds_to_first_token`` and ``seconds_end_to_end`` from handing over the ids, and
          ``seconds_per_output_token``, the time after the first token per further step of the
          batch: the `distribution` over the batches of all repeats; in
          ``latency_estimates`` the `estimate` over the repeats;
        - ``prefill_tokens_per_second``: prompt tokens to the first token;
          ``decode_tokens_per_second``: tokens after the first one of each row;
        - ``joules``: mean energy of a pass by component, of ``prefill``, ``decode``
          (generation less prefill) and ``both``; per prompt token, per decode token (those
          after the first) and per output token, the `estimate` over the repeats;
        - ``peak_device_bytes``: most memory of the model on the CUDA device, its weights
          included; ``peak_host_bytes``: most memory of the whole process (resident set);
        - ``deltas``: the `change` from the baseline by metric; none for the baseline.
    """
    device = torch.device(request.device)
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in ("torch", "transformers", "lm-eval-pruned")},
        "device": request.device,
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    by_batch = pd.DataFrame(timings).set_index(_PASS).sort_index()
    by_pass = _passes(passes)
    meter = monitor.describe()
    return {
        "schema_version": SCHEMA_VERSION,
        "request": asdict(request),
        "environment": environment,
        **protocol,
        "energy": {
            "meter": meter and meter.name,
            "scope": meter and meter.scope,
            "sources": meter and {k: asdict(each) for k, each in meter.sources.items()},
            "hardware": meter and meter.hardware,
            "notes": list(dict.fromkeys([*monitor.failures, *_notes(by_pass)])),
        },
        "models": [asdict(model) for model in models],
        "cells": _cells(request, models, by_batch, by_pass),
    }


def _passes(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the passes by `_PASS`, with joules of both phases and of each; NaN: not measured."""
    table = pd.DataFrame(rows).set_index(_PASS).sort_index()
    for name in _JOULES:
        both, prefill = (f"{phase}_{name}" for phase in ("both", "prefill"))
        table[[both, prefill]] = table[[both, prefill]].astype(float)
        table[f"decode_{name}"] = table[both] - table[prefill]
    return table


def _per_repeat(batches: pd.DataFrame, passes: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each pass, with the metrics that are compared with the baseline."""
    by_pass = batches.groupby(level=_PASS)
    sums, count = by_pass.sum(), by_pass.size()
    first, output = sums["first"], sums["output_tokens"]
    after, decoded = sums["total"] - first, output - sums["rows"]
    metrics = {
        "seconds_to_first_token": first / count,
        "seconds_per_output_token": after / (sums["steps"] - count),
        "seconds_end_to_end": sums["total"] / count,
        "prefill_tokens_per_second": sums["prompt_tokens"] / first,
        "decode_tokens_per_second": decoded.where(decoded > 0) / after,
        "joules_per_prompt_token": passes["prefill_total"] / sums["prompt_tokens"],
        "joules_per_decode_token": passes["decode_total"] / decoded,
        "joules_per_output_token": passes["both_total"] / output,
        "mean_output_tokens": output / sums["rows"],
    }
    # Where nothing was decoded, there is nothing to divide by.
    return pd.DataFrame(metrics).replace([np.inf, -np.inf], np.nan)


def _cells(
    request: ProfileRequest,
    models: list[ProfiledModel],
    batches: pd.DataFrame,
    passes: pd.DataFrame,
) -> list[dict[str, Any]]:
    metrics = _per_repeat(batches, passes)
    names = [model.name for model in models]
    cells = []
    for key in product(request.batch_sizes, MODES, names):
        if key not in metrics.index.droplevel("repeat"):
            continue
        size, mode, name = key
        of, timed, took = metrics.loc[key], batches.loc[key], passes.loc[key]
        steps = timed["steps"] - 1
        per_token = ((timed["total"] - timed["first"]) / steps)[steps > 0]
        estimates = {metric: estimate(of[metric]) for metric in of}
        # The repeats of the baseline that have a partner.
        against = (
            metrics.loc[(size, mode, "baseline")].reindex(of.index).dropna(how="all")
        )
        deltas = {m: change(of.loc[against.index, m], against[m]) for m in of}
        cells.append(
            {
                "model": name,
                "batch_size": size,
                "mode": mode,
                "repeats": len(of),
                "prompts": int(timed["rows"].sum()) // len(of),
                "prompt_tokens": int(timed["prompt_tokens"].sum()) // len(of),
                "mean_output_tokens": float(
                    timed["output_tokens"].sum() / timed["rows"].sum()
                ),
                "seconds_to_first_token": distribution(timed["first"]),
                "seconds_per_output_token": distribution(per_token),
                "seconds_end_to_end": distribution(timed["total"]),
                "latency_estimates": {
                    metric: found
                    for metric, found in estimates.items()
                    if metric.startswith("seconds_") and found is not None
                },
                **{
                    m: each for m, each in estimates.items() if "tokens_per_second" in m
                },
                "joules": {
                    phase: {
                        part: _number(took[f"{phase}_{part}"].mean(skipna=False))
                        for part in _JOULES
                    }
                    for phase in ("prefill", "decode", "both")
                },
                **{m: each for m, each in estimates.items() if m.startswith("joules")},
                **{
                    peak: int(took[peak].max()) if peak in took else None
                    for peak in ("peak_device_bytes", "peak_host_bytes")
                },
                "deltas": {m: d for m, d in deltas.items() if d and name != names[0]},
            }
        )
    return cells


def distribution(seconds: Sequence[float]) -> dict[str, Any] | None:
    """Describe the latencies of batches; None for no batch.

    Returns:
        ``n``, ``mean``, ``sd`` (n - 1; None for one), and the percentiles ``p50``,
        ``p90`` and ``p99``, interpolated: below 100 samples, p99 is close to the largest.
    """
    if not len(seconds):
        return None
    p50, p90, p99 = (float(each) for each in np.percentile(seconds, [50, 90, 99]))
    sd = float(np.std(seconds, ddof=1)) if len(seconds) > 1 else None
    mean = float(np.mean(seconds))
    return {
        "n": len(seconds),
        "mean": mean,
        "sd": sd,
        "p50": p50,
        "p90": p90,
        "p99": p99,
    }


def estimate(values: Sequence[float]) -> dict[str, Any] | None:
    """Return ``n``, ``mean`` and the ends ``low`` and ``high`` of its 95 % interval.

    Args:
        values: One for each repeat. With a NaN among them, there is no estimate; with one
            value alone, no interval (None).
    """
    if np.isnan(values).any():
        return None
    low, high = _interval(values)
    return {"n": len(values), "mean": float(np.mean(values)), "low": low, "high": high}


def change(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any] | None:
    """Compare pairs of the same repeat; None where a number is not positive.

    Returns:
        ``percent`` of the baseline (geometric mean of the ratios), the ends ``low`` and
        ``high`` of its 95 % interval (Student's t on log ratios), and ``verdict``: ``no
        difference seen`` where that holds 0, ``higher``, ``lower``, or ``one repeat, no
        interval``.
    """
    if not len(values) or not (np.minimum(values, baseline) > 0).all():
        return None
    logs = np.log(values) - np.log(baseline)

    def percent(log: float | None) -> float | None:
        return None if log is None else 100 * float(np.expm1(log))

    low, high = _interval(logs)
    if low is None or high is None:
        verdict = "one repeat, no interval"
    else:
        verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference seen"
    return {
        "percent": percent(float(np.mean(logs))),
        "low": percent(low),
        "high": percent(high),
        "verdict": verdict,
    }


def _interval(values: Any) -> tuple[float | None, float | None]:
    from scipy import stats

    if len(values) < 2:
        return None, None
    mean = float(np.mean(values))
    if np.ptp(values) == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, stats.sem(values))
    return float(low), float(high)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _notes(passes: pd.DataFrame) -> list[str]:
    """Return what is wrong with the energies of passes."""
    notes = []
    for (size, mode, model, _), row in passes.iterrows():  # type: ignore[misc]
        reading = row["reading"]
        notes += reading.notes
        if row["decode_total"] < 0:
            notes.append(
                f"{model}, batch size {size}, {mode}: generation took less energy than its "
                "prefill alone in some repeat, so the decode energy is noise"
            )
        if reading.seconds is not None and reading.seconds < ENERGY_WINDOW_SECONDS:
            notes.append(
                f"batch size {size}, {mode}: energy windows shorter than "
                f"{ENERGY_WINDOW_SECONDS:g} s are unreliable; use more prompts or tokens"
            )
    return notes
