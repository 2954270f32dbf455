"""From a table with a row for each batch to figures with intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from lm_eval_pruned.energy.readings import COMPONENTS


if TYPE_CHECKING:
    from collections.abc import Sequence

#: Output lengths: each model generates as many tokens as the others, or as many as it likes.
MODES = ("fixed", "natural")
CONFIDENCE = 0.95
_PASS = ["batch_size", "mode", "model", "repeat"]
_PEAKS = ("peak_device_bytes", "peak_host_bytes")
#: Each figure as a ratio of two columns, of a batch or of sums over batches.
_RATIOS = {
    "seconds_to_first_token": ("first", "batches"),
    "seconds_per_output_token": ("after", "steps_after"),
    "seconds_end_to_end": ("total", "batches"),
    "prefill_tokens_per_second": ("prompt_tokens", "first"),
    "decode_tokens_per_second": ("tokens_after", "after"),
    "joules_per_prompt_token": ("prefill_total", "prompt_tokens"),
    "joules_per_decode_token": ("decode_total", "tokens_after"),
    "joules_per_output_token": ("both_total", "output_tokens"),
    "mean_output_tokens": ("output_tokens", "rows"),
}
_LATENCIES = [name for name in _RATIOS if name.startswith("seconds")]


def cells_of(rows: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return the figures of each model, batch size and output length as JSON types.

    Args:
        rows: One for each batch of a repeat: ``batch_size``, ``mode``, ``model``, ``repeat``, what
            `lm_eval_pruned.profiling.measure.generate` returns, its share of the pass's joules by
            component (``prefill_...``, ``both_...``) and the pass's ``peak_..._bytes``.
        baseline: The model that the others are compared with.

    Returns:
        None is *not measured*. Of each latency the `distribution` over batches, and in
        ``latency_estimates`` the `estimate` over repeats; other ratios as `estimate`; ``joules``
        of a pass, ``decode`` being ``both`` less ``prefill``; ``deltas``, the `change` from the
        baseline.
    """
    keys, parts = _PASS[:3], (*COMPONENTS, "total")
    table = pd.DataFrame(rows).set_index(_PASS).astype(float).assign(batches=1)
    table["steps_after"] = table["steps"] - 1
    table["tokens_after"] = table["output_tokens"] - table["rows"]
    # After its only token, a batch of one step decodes nothing.
    table["after"] = (table["total"] - table["first"]) * (table["steps"] > 1)
    for part in parts:
        table[f"decode_{part}"] = table[f"both_{part}"] - table[f"prefill_{part}"]
    passes = table.groupby(level=_PASS, sort=False).sum(min_count=1)
    ratios, cells = _ratios(passes), []
    for key, batches in table.groupby(level=keys, sort=False):
        size, mode, name = key
        sums, by_repeat = (table.xs(key, level=keys) for table in (passes, ratios))
        base = ratios.xs((size, mode, baseline), level=keys)
        ours, theirs = by_repeat.align(base, join="inner")
        changes = {m: change(ours[m], theirs[m]) for m in _RATIOS if name != baseline}
        estimates = {metric: estimate(by_repeat[metric]) for metric in _RATIOS}
        by_batch = _ratios(batches)
        joules = {
            phase: {p: _number(sums[f"{phase}_{p}"].mean(skipna=False)) for p in parts}
            for phase in ("prefill", "decode", "both")
        }
        highest = batches.reindex(columns=_PEAKS).max().items()
        cell = {
            "model": name,
            "batch_size": int(size),
            "mode": mode,
            "repeats": len(by_repeat),
            "prompts": int(sums["rows"].iloc[0]),
            "prompt_tokens": int(sums["prompt_tokens"].iloc[0]),
            **estimates,
            **{m: distribution(by_batch[m].dropna()) for m in _LATENCIES},
            "latency_estimates": {m: e for m in _LATENCIES if (e := estimates[m])},
            "mean_output_tokens": float(by_repeat["mean_output_tokens"].mean()),
            "joules": joules,
            **{m: None if np.isnan(peak) else int(peak) for m, peak in highest},
            "deltas": {metric: delta for metric, delta in changes.items() if delta},
        }
        cells.append(cell)
    return cells


def _ratios(table: pd.DataFrame) -> pd.DataFrame:
    ratios = {
        name: table[above] / table[below] for name, (above, below) in _RATIOS.items()
    }
    # Where nothing was decoded, there is nothing to divide by.
    return pd.DataFrame(ratios).replace([np.inf, -np.inf], np.nan)


def distribution(seconds: Sequence[float]) -> dict[str, Any] | None:
    """Describe the latencies of batches; None for no batch.

    ``sd`` (n - 1) is None for one; below 100 samples, ``p99`` is close to the largest.
    """
    described = pd.Series(seconds, dtype=float).describe([0.5, 0.9, 0.99])
    names = {"mean": "mean", "sd": "std", "p50": "50%", "p90": "90%", "p99": "99%"}
    figures = {key: _number(described[name]) for key, name in names.items()}
    return {"n": len(seconds), **figures} if len(seconds) else None


def estimate(values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
    """Return ``n``, ``mean`` and the ends ``low`` and ``high`` of its 95 % interval.

    `values` has one for each repeat. With a NaN among them, there is no estimate; a single one
    has no interval (None).
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
        ``high`` of its 95 % interval (Student's t on log ratios), and ``verdict``.
    """
    if not len(values) or not (np.minimum(values, baseline) > 0).all():
        return None
    logs: dict[str, Any] = estimate(np.log(values) - np.log(baseline)) or {}
    percent, low, high = (
        end and 100 * math.expm1(end)
        for end in (logs["mean"], logs["low"], logs["high"])
    )
    verdict = "no difference seen"
    if low is None or high is None:
        verdict = "one repeat, no interval"
    elif low > 0 or high < 0:
        verdict = "higher" if low > 0 else "lower"
    return {"percent": percent, "low": low, "high": high, "verdict": verdict}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
