"""What ``lm-eval-pruned profile`` writes: JSON, a Markdown table and plots."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING

from lm_eval_pruned.energy.readings import COMPONENTS
from lm_eval_pruned.profiling.model import MODES
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from pathlib import Path

    from lm_eval_pruned.profiling.model import (
        Distribution,
        Estimate,
        Profile,
        ProfileCell,
        ProfiledModel,
    )


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
        for name, suffix in product(_PANELS, ("png", "svg")):
            files[f"{name}.{suffix}"] = draw(profile, name, suffix)
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
        _model_table(profile.models),
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


def _model_table(models: list[ProfiledModel]) -> str:
    columns = ["model", "intermediate size", "expansion ratio", "parameters"]
    rows = [
        [
            m.name,
            f"{m.intermediate_size:,}",
            f"{m.expansion_ratio:.4f}",
            f"{m.parameters:,}",
            _number(m.model_bytes, "{:,.1f}", 1 / 2**20),
        ]
        for m in models
    ]
    columns.append("model MiB")
    if any(m.layer_widths for m in models):
        columns.append("widths by layer")
        rows = [[*row, m.layer_widths] for row, m in zip(rows, models, strict=True)]
    return markdown_table(columns, rows)


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


def _main_table(cells: list[ProfileCell]) -> str:
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


def _delta_table(cells: list[ProfileCell]) -> str:
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


def _spread_table(cells: list[ProfileCell]) -> str:
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


#: By plot and label of a vertical axis, what is drawn and in which multiple of its unit.
_PANELS = {
    "latency": {
        "time to first token, ms": ("seconds_to_first_token", 1000),
        "time per output token, ms": ("seconds_per_output_token", 1000),
        "end to end, s": ("seconds_end_to_end", 1),
    },
    "throughput": {
        "prefill tokens/s": ("prefill_tokens_per_second", 1),
        "decode tokens/s": ("decode_tokens_per_second", 1),
    },
    "energy": {
        "J per prompt token": ("joules_per_prompt_token", 1),
        "J per decode token": ("joules_per_decode_token", 1),
        "J per output token": ("joules_per_output_token", 1),
    },
}


def draw(profile: Profile, plot: str, suffix: str) -> bytes:
    """Draw against expansion ratio, one line per batch size and output length.

    Models whose layers differ in width are open points beside the line.

    Args:
        profile: The profile.
        plot: ``latency``, ``throughput`` or ``energy``.
        suffix: ``png`` or ``svg``.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure

    from lm_eval_pruned.util import figures

    place = {model.name: model.expansion_ratio for model in profile.models}
    by_layer = {model.name for model in profile.models if model.layer_widths}
    lines = list(product(profile.request["batch_sizes"], MODES))
    panels = _PANELS[plot]
    with figures.style("lm-eval-pruned"):
        figure = Figure(figsize=(5.5 * len(panels), 4))
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, (metric, scale)) in zip(columns, panels.items(), strict=True):
            for number, (size, mode) in enumerate(lines):
                label = f"batch size {size}, {mode} length"
                look = figures.line_look(number)
                apart = {**look, "linestyle": "none", "markerfacecolor": "white"}
                for differ, what, how in (
                    (False, label, look),
                    (True, f"{label}, widths by layer", apart),
                ):
                    points = [
                        (place[cell.model], found)
                        for cell in profile.cells
                        if (cell.batch_size, cell.mode) == (size, mode)
                        and (cell.model in by_layer) == differ
                        and (found := _estimate_of(cell, metric)) is not None
                    ]
                    if not points:
                        continue
                    points.sort(key=lambda point: point[0])
                    axes.errorbar(
                        [ratio for ratio, _ in points],
                        [scale * found.mean for _, found in points],
                        # Ends, where there are any, are as far below the mean as above it.
                        yerr=[
                            0
                            if found.high is None
                            else scale * (found.high - found.mean)
                            for _, found in points
                        ],
                        capsize=3,
                        label=what,
                        **how,
                    )
            figures.over_ratios(axes, place.values())
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
            else:
                axes.text(
                    0.5, 0.5, "not measured", ha="center", transform=axes.transAxes
                )
        if suffix == "svg":
            return figures.as_svg(figure).encode()
        return figures.as_png(figure)


def _estimate_of(cell: ProfileCell, metric: str) -> Estimate | None:
    """Return the mean over the repeats; the fields of latencies hold that of the batches."""
    if metric.startswith("seconds"):
        return cell.latency_estimates.get(metric)
    return getattr(cell, metric)
