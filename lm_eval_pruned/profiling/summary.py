"""From a table of batches and a table of passes to figures with intervals."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from lm_eval_pruned.energy.readings import COMPONENTS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling.options import ProfileRequest

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
    models: list[dict[str, Any]],
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
        scope, source of each component, and what went wrong), ``models`` (see
        `lm_eval_pruned.profiling.options.plan_models`), and ``cells``, one for each model,
        batch size and mode:

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
    on_card = device.type == "cuda"
    processor = platform.processor() or platform.machine()
    by_batch = pd.DataFrame(timings).set_index(_PASS).sort_index()
    by_pass = pd.DataFrame(passes).set_index(_PASS).sort_index()
    for name in _JOULES:
        both, prefill = f"both_{name}", f"prefill_{name}"
        by_pass[[both, prefill]] = by_pass[[both, prefill]].astype(float)
        by_pass[f"decode_{name}"] = by_pass[both] - by_pass[prefill]
    metrics = _per_repeat(by_batch, by_pass)
    measured = set(metrics.index.droplevel("repeat"))
    every = product(request.batch_sizes, MODES, [model["name"] for model in models])
    meter = monitor.describe()
    return {
        "schema_version": SCHEMA_VERSION,
        "request": asdict(request),
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{p: version(p) for p in ("torch", "transformers", "lm-eval-pruned")},
            "device": request.device,
            "device_name": torch.cuda.get_device_name(device) if on_card else processor,
            "threads": torch.get_num_threads(),
        },
        **protocol,
        "energy": {
            "meter": meter and meter.name,
            "scope": meter and meter.scope,
            "sources": meter and {k: asdict(each) for k, each in meter.sources.items()},
            "hardware": meter and meter.hardware,
            "notes": list(dict.fromkeys([*monitor.failures, *_notes(by_pass)])),
        },
        "models": models,
        "cells": [
            _cell(key, models[0]["name"], metrics, by_batch.loc[key], by_pass.loc[key])
            for key in every
            if key in measured
        ],
    }


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


def _cell(
    key: tuple[int, str, str],
    baseline: str,
    metrics: pd.DataFrame,
    batches: pd.DataFrame,
    passes: pd.DataFrame,
) -> dict[str, Any]:
    """Return the figures of a model at a batch size and a mode."""
    size, mode, name = key
    of, sums, steps = metrics.loc[key], batches.sum(), batches["steps"] - 1
    estimates = {metric: estimate(of[metric]) for metric in of}
    # The repeats of the baseline that have a partner.
    base = metrics.loc[(size, mode, baseline)].reindex(of.index).dropna(how="all")
    deltas = {m: change(of.loc[base.index, m], base[m]) for m in of}
    return {
        "model": name,
        "batch_size": size,
        "mode": mode,
        "repeats": len(of),
        "prompts": int(sums["rows"]) // len(of),
        "prompt_tokens": int(sums["prompt_tokens"]) // len(of),
        "mean_output_tokens": float(sums["output_tokens"] / sums["rows"]),
        "seconds_to_first_token": distribution(batches["first"]),
        "seconds_per_output_token": distribution(
            ((batches["total"] - batches["first"]) / steps)[steps > 0]
        ),
        "seconds_end_to_end": distribution(batches["total"]),
        "latency_estimates": {
            m: found
            for m, found in estimates.items()
            if found and m.startswith("seconds")
        },
        **{m: e for m, e in estimates.items() if "per_second" in m or "joules" in m},
        "joules": {
            phase: {
                part: _number(passes[f"{phase}_{part}"].mean(skipna=False))
                for part in _JOULES
            }
            for phase in ("prefill", "decode", "both")
        },
        **{
            peak: int(passes[peak].max()) if peak in passes else None
            for peak in ("peak_device_bytes", "peak_host_bytes")
        },
        "deltas": {m: d for m, d in deltas.items() if d and name != baseline},
    }


def distribution(seconds: Sequence[float]) -> dict[str, Any] | None:
    """Describe the latencies of batches; None for no batch.

    Returns:
        ``n``, ``mean``, ``sd`` (n - 1; None for one), and the percentiles ``p50``,
        ``p90`` and ``p99``, interpolated: below 100 samples, p99 is close to the largest.
    """
    if not len(seconds):
        return None
    values = pd.Series(seconds)
    found = [values.mean(), values.std(), *values.quantile([0.5, 0.9, 0.99])]
    keys = ("mean", "sd", "p50", "p90", "p99")
    return {"n": len(values), **dict(zip(keys, map(_number, found), strict=True))}


def estimate(values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
    """Return ``n``, ``mean`` and the ends ``low`` and ``high`` of its 95 % interval.

    Args:
        values: One for each repeat. With a NaN among them, there is no estimate; a single
            value has no interval (None).
    """
    if np.isnan(values).any():
        return None
    n, mean = len(values), float(np.mean(values))
    margin = pd.Series(values).sem() * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    ends = {"low": _number(mean - margin), "high": _number(mean + margin)}
    return {"n": n, "mean": mean, **ends}


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
    _, *figures = (estimate(np.log(values) - np.log(baseline)) or {}).values()
    percent, low, high = (
        None if each is None else 100 * math.expm1(each) for each in figures
    )
    verdict = "no difference seen"
    if low is None or high is None:
        verdict = "one repeat, no interval"
    elif low > 0 or high < 0:
        verdict = "higher" if low > 0 else "lower"
    return {"percent": percent, "low": low, "high": high, "verdict": verdict}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _notes(passes: pd.DataFrame) -> list[str]:
    """Return what is wrong with the energies of passes."""
    notes = []
    for (size, mode, model, _), row in passes.iterrows():  # type: ignore[misc]
        notes += row["reading"].notes
        if row["decode_total"] < 0:
            notes.append(
                f"{model}, batch size {size}, {mode}: generation took less energy than its "
                "prefill alone in some repeat, so the decode energy is noise"
            )
        if (row["reading"].seconds or np.inf) < ENERGY_WINDOW_SECONDS:
            notes.append(
                f"batch size {size}, {mode}: energy windows shorter than "
                f"{ENERGY_WINDOW_SECONDS:g} s are unreliable; use more prompts or tokens"
            )
    return notes
