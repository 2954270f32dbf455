"""The sections of a report that draw something over the expansion ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison_table import number_text
from lm_eval_pruned.report.page import Section, Table, run_label
from lm_eval_pruned.results.files import as_mapping, finite_or_none
from lm_eval_pruned.results.groups import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.results.files import Run

#: Tasks that stand for knowledge and for truthfulness, the study's own first.
KNOWLEDGE = ("mmlu", "gsm8k", "arc_challenge", "boolq", "lambada_openai", "wikitext")
TRUTHFULNESS = ("truthfulqa_mc2", "truthfulqa_mc1", "pruned_demo_truthfulness")


def truthfulness_section(runs: Sequence[Run], comparison: Comparison) -> Section | None:
    """A truthfulness task against a knowledge task, one point per size."""
    from lm_eval_pruned.report.plots import scatter_plot, slug

    plots = []
    for series, members in series_of(runs).items():
        metrics = dict(primary_metrics(members))
        knowledge = next((task for task in KNOWLEDGE if task in metrics), None)
        truth = next((task for task in TRUTHFULNESS if task in metrics), None)
        if knowledge is None or truth is None or len(members) < 2:
            continue
        pair = {(knowledge, metrics[knowledge]), (truth, metrics[truth])}
        found = next(
            (
                each
                for each in comparison.correlations
                if each.series == series and set(each.tasks) == pair
            ),
            None,
        )
        correlation = found and found.correlation
        if not found or not correlation or correlation.pearson is None:
            caption = f"too few different points for a correlation (n = {len(members)})"
        else:
            logs = any(is_perplexity(metric) for _, metric in pair)
            caption = (
                f"Pearson r{' of log perplexity' if logs else ''} = {correlation.pearson:.3f}, {1 - comparison.alpha:.0%} interval "
                f"[{correlation.pearson_low:.2f}, {correlation.pearson_high:.2f}] if sizes were "
                f"independent draws, n = {correlation.n}"
            )
        plots.append(
            scatter_plot(
                f"knowledge-truthfulness-{slug(series)}",
                f"{truth} against {knowledge} ({series})",
                "One point per configuration, labelled with its expansion ratio, joined in the "
                f"order of pruning. {caption}.".replace("\n", "; "),
                [
                    (
                        run.scores[knowledge, metrics[knowledge]].value,
                        run.scores[truth, metrics[truth]].value,
                        f"{run.expansion_ratio:.2f}",
                    )
                    for run in members
                ],
                _axis(knowledge, metrics[knowledge]),
                _axis(truth, metrics[truth]),
                caption,
            )
        )
    if not plots:
        return None
    return Section("Knowledge against truthfulness", plots=plots)


def energy_section(runs: Sequence[Run]) -> Section | None:
    """What the meter logged, by configuration and kind of request."""
    from lm_eval_pruned.report.plots import Line, lines_plot

    rows: list[list[str]] = []
    kinds: set[str] = set()
    notes: dict[str, None] = {}
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        for tasks, block in run.energy.items():
            sources = as_mapping(block.get("sources"))
            kinds |= {
                f"{part.upper()}: {as_mapping(source).get('kind')}"
                for part, source in sources.items()
            }
            for note in block.get("notes") or ():
                notes[str(note)] = None
            for kind, record in as_mapping(block.get("request_types")).items():
                record = as_mapping(record)
                seconds = finite_or_none(record.get("seconds"))
                joules = finite_or_none(as_mapping(record.get("joules")).get("total"))
                generated = finite_or_none(record.get("generated_tokens"))
                per_token = finite_or_none(record.get("joules_per_processed_token"))
                latency = 1000 * seconds / generated if seconds and generated else None
                rows.append(
                    [
                        run_label(run),
                        tasks,
                        kind,
                        number_text(seconds, ",.1f"),
                        number_text(joules, ",.1f"),
                        number_text(per_token, ".4g"),
                        number_text(latency, ".4g"),
                    ]
                )
                for what, value in (("energy", per_token), ("latency", latency)):
                    ratio = None if run.is_shallow else run.expansion_ratio
                    if value is not None and ratio is not None:
                        curves.setdefault((what, f"{tasks}, {kind}"), []).append(
                            (ratio, value)
                        )
    if not rows:
        return None
    plots = []
    for what, title, unit in (
        ("energy", "Energy per token", "energy per processed token (J)"),
        ("latency", "Latency per token", "wall time per generated token (ms)"),
    ):
        lines = [
            Line(name, *zip(*sorted(points), strict=True))
            for (kind, name), points in curves.items()
            if kind == what and len(points) > 1
        ]
        if lines:
            plots.append(
                lines_plot(
                    what,
                    title,
                    f"{title} against the expansion ratio, as logged while the tasks ran.",
                    lines,
                    unit,
                )
            )
    return Section(
        "Energy and latency",
        [
            "As the meter logged them while the tasks ran, with all that the machine did beside. "
            + (
                f"Sources: {'; '.join(sorted(kinds))}. "
                if kinds
                else "The sources are not known. "
            )
            + "Modelled energy is an estimate, not a measurement. The time per generated token "
            "includes reading the prompts."
        ],
        table=Table(
            "Energy and latency",
            ["configuration", "tasks", "requests", "seconds", "joules"]
            + ["J / processed token", "ms / generated token"],
            rows,
            text=3,
        ),
        plots=plots,
        notes=list(notes),
    )


def _axis(task: str, metric: str) -> str:
    name = metric.removesuffix(",none")
    unit = "" if "perplexity" in name or "bits" in name else " (share of 1)"
    return f"{task}, {name}{unit}"
