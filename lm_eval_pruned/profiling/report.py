"""What ``lm-eval-pruned profile`` writes: JSON, a Markdown table and plots."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.energy.readings import COMPONENTS
from lm_eval_pruned.profiling.model import MODES
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lm_eval_pruned.profiling.model import Cell, Distribution, Estimate, Profile


def plots_missing() -> str | None:
    """Return why plots cannot be drawn, or None if they can."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'lm-eval-pruned[report]'"
    return None


def write(profile: Profile, folder: Path) -> list[Path]:
    """Write everything into `folder`, each file whole or not at all; return the paths.

    Raises:
        OSError: The folder cannot be written.
    """
    files: dict[str, str | bytes] = {
        "profile.json": profile.as_json(),
        "profile.md": as_markdown(profile),
    }
    if plots_missing() is None:
        for name, draw in _PLOTS.items():
            for suffix in ("png", "svg"):
                files[f"{name}.{suffix}"] = draw(profile, suffix)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def write_json(profile: Profile, folder: Path) -> None:
    """Write the JSON alone, whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    write_atomically(folder / "profile.json", profile.as_json())


def as_markdown(profile: Profile) -> str:
    """Return the profile as Markdown: one table per batch size and output length."""
    request = profile.request
    chunks = [
        f"# Profile of {request['pretrained']}",
        _setting(profile),
        markdown_table(
            [
                "model",
                "intermediate size",
                "expansion ratio",
                "parameters",
                "model MiB",
            ],
            [
                [
                    m.name,
                    f"{m.intermediate_size:,}",
                    f"{m.expansion_ratio:.4f}",
                    f"{m.parameters:,}",
                    _number(m.model_bytes, "{:,.1f}", 1 / 2**20),
                ]
                for m in profile.models
            ],
        ),
    ]
    headings = {
        "fixed": f"every model generates exactly {request['max_new_tokens']} tokens",
        "natural": f"generation ends at end of text, or at {request['max_new_tokens']} tokens",
    }
    for size in request["batch_sizes"]:
        for mode, heading in headings.items():
            cells = [
                cell
                for cell in profile.cells
                if cell.batch_size == size and cell.mode == mode
            ]
            if cells:
                chunks.append(f"## Batch size {size}, {mode} length: {heading}")
                chunks += [
                    _main_table(cells),
                    _delta_table(cells),
                    _spread_table(cells),
                ]
    return "\n\n".join(chunk for chunk in chunks if chunk) + "\n"


def _setting(profile: Profile) -> str:
    request, environment, energy = profile.request, profile.environment, profile.energy
    done = max((cell.repeats for cell in profile.cells), default=0)
    protocol = (
        f"{done} of {request['repeats']} repeats, interleaved; models held in memory "
        f"{profile.models_held}; {profile.warm_up_batches} warm-up batches, not counted."
    )
    machine = (
        f"{environment['device']} ({environment['device_name']}), {environment['threads']} "
        f"thread(s), torch {environment['torch']}, transformers {environment['transformers']}."
    )
    lines = [protocol, machine, "Intervals are 95 %, over repeats. n/m: not measured."]
    if profile.interrupted:
        lines.append("**Interrupted**: the last repeat is not complete.")
    if energy["sources"]:
        lines.append(
            f"Energy by {energy['meter']}: {energy['scope']}. "
            + " ".join(
                f"{name.upper()} {energy['sources'][name]['kind']}: "
                f"{energy['sources'][name]['description']}."
                for name in COMPONENTS
            )
        )
    lines += [f"Note: {note}." for note in energy["notes"]]
    return "\n".join(f"- {line}" for line in lines)


def _main_table(cells: list[Cell]) -> str:
    return markdown_table(
        ["model", "output tokens per prompt", "first token ms", "ms per output token"]
        + ["end to end s", "prefill tokens/s", "decode tokens/s", "J per prompt token"]
        + ["J per decode token", "J per output token"]
        + ["peak device MiB", "peak host MiB"],
        [
            [
                cell.model,
                f"{cell.mean_output_tokens:.1f}",
                f"{1000 * cell.seconds_to_first_token.mean:.1f}",
                _number(_mean(cell.seconds_per_output_token), "{:.2f}", 1000),
                f"{cell.seconds_end_to_end.mean:.3f}",
                _estimate(cell.prefill_tokens_per_second, "{:.1f}"),
                _estimate(cell.decode_tokens_per_second, "{:.1f}"),
                _estimate(cell.joules_per_prompt_token, "{:.4f}"),
                _estimate(cell.joules_per_decode_token, "{:.3f}"),
                _estimate(cell.joules_per_output_token, "{:.3f}"),
                _number(cell.peak_device_bytes, "{:,.0f}", 1 / 2**20),
                _number(cell.peak_host_bytes, "{:,.0f}", 1 / 2**20),
            ]
            for cell in cells
        ],
    )


def _delta_table(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        for metric, change in cell.deltas.items():
            interval = (
                ""
                if change.low is None
                else f"{change.low:+.1f} % to {change.high:+.1f} %"
            )
            rows.append(
                [
                    cell.model,
                    metric.replace("_", " "),
                    f"{change.percent:+.1f} %",
                    interval,
                    change.verdict,
                ]
            )
    if not rows:
        return ""
    return markdown_table(
        ["model", "against the baseline", "difference", "95 % interval", "verdict"],
        rows,
    )


def _spread_table(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        for name, spread in (
            ("first token", cell.seconds_to_first_token),
            ("per output token", cell.seconds_per_output_token),
            ("end to end", cell.seconds_end_to_end),
        ):
            if spread is not None:
                figures = (spread.mean, spread.sd, spread.p50, spread.p90, spread.p99)
                cells_of = (_number(figure, "{:.2f}", 1000) for figure in figures)
                rows.append([cell.model, name, spread.n, *cells_of])
    columns = ["model", "latency, ms", "batches", "mean", "sd", "p50", "p90", "p99"]
    return markdown_table(columns, rows)


def _mean(spread: Distribution | None) -> float | None:
    return None if spread is None else spread.mean


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "n/m" if value is None else form.format(value * scale)


def _estimate(value: Estimate | None, form: str) -> str:
    if value is None:
        return "n/m"
    if value.low is None or value.high is None:
        return form.format(value.mean)
    return f"{form.format(value.mean)} ± {form.format((value.high - value.low) / 2)}"


def _draw(
    profile: Profile,
    suffix: str,
    panels: dict[
        str, Callable[[Cell], tuple[float, float | None, float | None] | None]
    ],
) -> bytes:
    """Draw panels against expansion ratio, one line per batch size and output length.

    Args:
        profile: The profile.
        suffix: ``png`` or ``svg``.
        panels: Label of the vertical axis, and what gives value, low and high of a cell.
    """
    from matplotlib.figure import Figure

    from lm_eval_pruned.util.figures import (
        as_png,
        as_svg,
        line_look,
        over_ratios,
        style,
    )

    place = {model.name: model.expansion_ratio for model in profile.models}
    lines = list(product(profile.request["batch_sizes"], MODES))
    with style("lm-eval-pruned"):
        figure = Figure(figsize=(5.5 * len(panels), 4))
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, value_of) in zip(columns, panels.items(), strict=True):
            for number, (size, mode) in enumerate(lines):
                points = sorted(
                    (place[cell.model], value)
                    for cell in profile.cells
                    if (cell.batch_size, cell.mode) == (size, mode)
                    and (value := value_of(cell)) is not None
                )
                if not points:
                    continue
                axes.errorbar(
                    [x for x, _ in points],
                    [v for _, (v, _, _) in points],
                    yerr=[
                        [
                            0 if low is None else max(0, v - low)
                            for _, (v, low, _) in points
                        ],
                        [
                            0 if high is None else max(0, high - v)
                            for _, (v, _, high) in points
                        ],
                    ],
                    capsize=3,
                    label=f"batch size {size}, {mode} length",
                    **line_look(number),
                )
            over_ratios(axes, place.values())
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
            else:
                axes.text(
                    0.5, 0.5, "not measured", ha="center", transform=axes.transAxes
                )
        return as_svg(figure).encode() if suffix == "svg" else as_png(figure)


def _of(
    metric: str,
) -> Callable[[Cell], tuple[float, float | None, float | None] | None]:
    def value(cell: Cell) -> tuple[float, float | None, float | None] | None:
        found: Any = getattr(cell, metric)
        return None if found is None else (found.mean, found.low, found.high)

    return value


def _latency(
    metric: str, scale: float
) -> Callable[[Cell], tuple[float, float | None, float | None] | None]:
    """Give the mean of a latency with the interval of its mean over the repeats."""

    def value(cell: Cell) -> tuple[float, float | None, float | None] | None:
        found = cell.latency_estimates.get(metric)
        if found is None:
            return None
        ends = (None if end is None else end * scale for end in (found.low, found.high))
        return (found.mean * scale, *ends)  # type: ignore[return-value]

    return value


_PLOTS: dict[str, Callable[[Profile, str], bytes]] = {
    "latency": lambda profile, suffix: _draw(
        profile,
        suffix,
        {
            "time to first token, ms": _latency("seconds_to_first_token", 1000),
            "time per output token, ms": _latency("seconds_per_output_token", 1000),
            "end to end, s": _latency("seconds_end_to_end", 1),
        },
    ),
    "throughput": lambda profile, suffix: _draw(
        profile,
        suffix,
        {
            "prefill tokens/s": _of("prefill_tokens_per_second"),
            "decode tokens/s": _of("decode_tokens_per_second"),
        },
    ),
    "energy": lambda profile, suffix: _draw(
        profile,
        suffix,
        {
            "J per prompt token": _of("joules_per_prompt_token"),
            "J per decode token": _of("joules_per_decode_token"),
            "J per output token": _of("joules_per_output_token"),
        },
    ),
}
