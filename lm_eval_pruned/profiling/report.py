"""What ``lm-eval-pruned profile`` writes: JSON, a Markdown table and plots."""

from __future__ import annotations

import json
from itertools import groupby, starmap
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.palette import plots_missing
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lm_eval_pruned.util.figures import Plot

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
    """Write everything into `folder`, each file whole or not at all; return the paths."""
    write_json(profile, folder)
    files: dict[str, str | bytes] = {"profile.md": as_markdown(profile)}
    if plots_missing() is None:
        files |= draw(profile).files()
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in ("profile.json", *files)]


def write_json(profile: dict[str, Any], folder: Path) -> None:
    """Write the JSON alone, whole or not at all."""
    write_atomically(folder / "profile.json", json.dumps(profile, indent=2) + "\n")


def as_markdown(profile: dict[str, Any]) -> str:
    """Return the profile as Markdown: two tables per batch size and output length."""
    tokens = profile["request"]["max_new_tokens"]
    headings = {
        "fixed": f"every model generates exactly {tokens} tokens",
        "natural": f"generation ends at end of text, or at {tokens} tokens",
    }
    chunks = [f"# Profile of {profile['request']['pretrained']}", _setting(profile)]
    chunks.append(_table(_OF_MODELS, profile["models"]))
    of = itemgetter("batch_size", "mode")
    for (size, mode), group in groupby(sorted(profile["cells"], key=of), of):
        cells = list(group)
        changes = [
            {"model": cell["model"], "metric": metric.replace("_", " "), **found}
            for cell in cells
            for metric, found in cell["deltas"].items()
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
    if profile["interrupted"]:
        lines.append("**Interrupted**: the last repeat is not complete.")
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


def draw(profile: dict[str, Any]) -> Plot:
    """Draw figures against expansion ratio, for models whose layers are equally wide.

    There is a line for each batch size and output length.
    """
    import altair as alt

    from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios

    models = pd.DataFrame(profile["models"]).set_index("name")
    cells = pd.json_normalize(profile["cells"]).join(models, on="model")
    cells = cells[cells["layer_widths"] == ""]
    sizes = cells["batch_size"].astype(str)
    cells["line"] = "batch size " + sizes + ", " + cells["mode"] + " length"
    look = line_look(list(cells["line"].unique()))
    panels = []
    for label, metric, scale, _ in _COLUMNS[1:9]:
        # The figures of latencies are those of batches; repeats have intervals.
        where = "latency_estimates." * metric.startswith("seconds") + metric
        parts = {f"{where}.{part}": part for part in ("mean", "low", "high")}
        drawn = cells.reindex(columns=list(parts)).rename(columns=parts) * scale
        drawn = cells[["line", "expansion_ratio"]].join(drawn.astype(float))
        y = alt.Y("mean:Q", scale=alt.Scale(domainMin=0)).title(label)
        over = over_ratios("expansion_ratio")
        panels.append(lines(drawn.dropna(subset=["mean"]), over, y, look))
    about = "Means over repeats, with bands of their 95 % intervals."
    return Plot("profile", "Profile", about, alt.concat(*panels, columns=3))
