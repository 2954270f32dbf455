"""What ``lm-eval-pruned profile`` writes: JSON and Markdown tables."""

from __future__ import annotations

import json
from itertools import groupby, starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: What a column of a table shows: heading, key of a row, multiple of its unit, format.
_Figure = tuple[str, str, float, str]
_COLUMNS: tuple[_Figure, ...] = (
    ("output tokens per prompt", "mean_output_tokens", 1, ".1f"),
    ("first token ms", "seconds_to_first_token", 1000, ".1f"),
    ("ms per output token", "seconds_per_output_token", 1000, ".2f"),
    ("end to end s", "seconds_end_to_end", 1, ".3f"),
    ("prefill tokens/s", "prefill_tokens_per_second", 1, ".1f"),
    ("decode tokens/s", "decode_tokens_per_second", 1, ".1f"),
    ("J per prompt token", "joules_per_prompt_token", 1, ".4f"),
    ("J per decode token", "joules_per_decode_token", 1, ".3f"),
    ("J per output token", "joules_per_output_token", 1, ".3f"),
    ("peak device MiB", "peak_device_bytes", 1 / 2**20, ",.0f"),
    ("peak host MiB", "peak_host_bytes", 1 / 2**20, ",.0f"),
)
_OF_MODELS: tuple[_Figure, ...] = (
    ("model", "name", 1, ""),
    ("intermediate size", "intermediate_size", 1, ","),
    ("expansion ratio", "expansion_ratio", 1, ".4f"),
    ("parameters", "parameters", 1, ","),
    ("model MiB", "model_bytes", 1 / 2**20, ",.1f"),
    ("widths by layer", "layer_widths", 1, ""),
)
_OF_CHANGES: tuple[_Figure, ...] = (
    ("model", "model", 1, ""),
    ("against the baseline", "metric", 1, ""),
    ("difference, %", "percent", 1, "+.1f"),
    ("from", "low", 1, "+.1f"),
    ("to", "high", 1, "+.1f"),
    ("verdict", "verdict", 1, ""),
)


def write(profile: dict[str, Any], folder: Path) -> list[Path]:
    """Write both files into `folder`, each whole or not at all; return the paths."""
    files = {
        "profile.md": as_markdown(profile),
        "profile.json": json.dumps(profile, indent=2) + "\n",
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def as_markdown(profile: dict[str, Any]) -> str:
    """Return the profile as Markdown: two tables per batch size and output length."""
    tokens = profile["request"]["max_new_tokens"]
    headings = {
        "fixed": f"every model generates exactly {tokens} tokens",
        "natural": f"generation ends at end of text, or at {tokens} tokens",
    }
    chunks = [f"# Profile of {profile['request']['pretrained']}", _setting(profile)]
    chunks.append(_table(_OF_MODELS, profile["models"]))
    size_and_mode = itemgetter("batch_size", "mode")
    in_order = sorted(profile["cells"], key=size_and_mode)
    for (size, mode), group in groupby(in_order, size_and_mode):
        cells = list(group)
        changes = [
            {"model": cell["model"], "metric": metric.replace("_", " "), **delta}
            for cell in cells
            for metric, delta in cell["deltas"].items()
        ]
        chunks.append(f"## Batch size {size}, {mode} length: {headings[mode]}")
        chunks.append(_table((("model", "model", 1, ""), *_COLUMNS), cells))
        chunks.append(_table(_OF_CHANGES, changes))
    return "\n\n".join(chunks) + "\n"


def _setting(profile: dict[str, Any]) -> str:
    environment, energy = profile["environment"], profile["energy"]
    done = max((cell["repeats"] for cell in profile["cells"]), default=0)
    lines = [
        f"{done} of {profile['request']['repeats']} repeats, each of which loads every model once.",
        f"{environment['device']} ({environment['device_name']}), {environment['threads']} threads.",
        "Intervals are 95 %, over repeats. n/m: not measured.",
    ]
    if energy["sources"]:
        lines.append(f"Energy by {energy['meter']}: {energy['scope']}.")
        for name, source in energy["sources"].items():
            lines.append(f"{name.upper()} {source['kind']}: {source['description']}.")
    lines += [f"Note: {note}." for note in energy["notes"]]
    return "\n".join(f"- {line}" for line in lines)


def _table(figures: Sequence[_Figure], rows: list[dict[str, Any]]) -> str:
    def column(heading: str, key: str, scale: float, form: str) -> Column:
        return Column(heading, lambda row: _written(row[key], scale, form), ">")

    first, *others = figures
    columns = [column(*first)._replace(form=""), *starmap(column, others)]
    return Table("Profile", columns, rows).markdown()


def _written(value: Any, scale: float, form: str) -> str:
    if isinstance(value, dict):
        text = _written(value["mean"], scale, form)
        if value.get("low") is None:
            return text
        return f"{text} ± {_written((value['high'] - value['low']) / 2, scale, form)}"
    if isinstance(value, str):
        return value
    return "n/m" if value is None else format(value * scale, form)
