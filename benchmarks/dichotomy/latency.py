"""The latencies of a profile, as rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import as_mapping, read_json


if TYPE_CHECKING:
    from pathlib import Path


def latency_rows(folder: Path, model: str) -> list[dict[str, Any]]:
    """Return one row for each model, batch size and output length; none without a profile.

    Args:
        folder: ``--output_path`` of ``lm-eval-pruned profile``.
        model: Value of the column ``model``.

    Raises:
        ResultsError: ``profile.json`` cannot be read.
    """
    file = folder / "profile.json"
    if not file.is_file():
        return []
    profile = read_json(file)
    models = {each["name"]: each for each in profile["models"]}
    environment = profile["environment"]
    rows = []
    for cell in profile["cells"]:
        of = models[cell["model"]]
        change = as_mapping(cell["deltas"].get("seconds_end_to_end"))
        rows.append(
            {
                "model": model,
                "name": cell["model"],
                "width": of["intermediate_size"],
                "ratio": of["expansion_ratio"],
                "parameters": of["parameters"],
                "batch_size": cell["batch_size"],
                "length": cell["mode"],
                "repeats": cell["repeats"],
                "ms_first_token": _milliseconds(cell["seconds_to_first_token"]),
                "ms_per_token": _milliseconds(cell["seconds_per_output_token"]),
                "seconds": cell["seconds_end_to_end"]["mean"],
                "seconds_change": change.get("percent"),
                "seconds_low": change.get("low"),
                "seconds_high": change.get("high"),
                "seconds_verdict": change.get("verdict"),
                "device": f"{environment['device_name']}, {environment['threads']} thread(s)",
            }
        )
    return rows


def _milliseconds(spread: Any) -> float | None:
    return None if spread is None else 1000 * spread["mean"]
