"""The sections of a report that are words and tables."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.analysis.comparison_table import (
    documents_text,
    interval_text,
    number_text,
    p_text,
)
from lm_eval_pruned.analysis.report_page import Cell, Section, Table, run_label
from lm_eval_pruned.analysis.results_file import as_mapping, finite_or_none
from lm_eval_pruned.analysis.series import primary_metrics, scale_name, series_name
from lm_eval_pruned.analysis.settings import setting_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.analysis.comparison_rows import Comparison, Difference
    from lm_eval_pruned.analysis.results_file import Run
    from lm_eval_pruned.analysis.sweep_results import SweepResults


def scores_section(base: Run, others: Sequence[Run], comparison: Comparison) -> Section:
    """All scores, with marks where the difference to the unpruned model is significant."""
    found = {(row.run, row.task, row.metric): row for row in comparison.rows}
    runs = sorted(
        others, key=lambda run: (series_name(run), -(run.expansion_ratio or 0))
    )
    rows: list[list[Cell | str]] = []
    shown = base.tasks(subtasks=False)
    primary = primary_metrics([base]) + [
        (row.task, row.metric) for row in comparison.rows if row.primary
    ]
    for task, metric in base.scores:
        if task not in shown:
            continue
        score = base.scores[task, metric]
        arrow = _arrow(score.higher_is_better)
        dagger = "" if (task, metric) in primary else " \u2020"
        rows.append(
            [
                task,
                f"{metric.removesuffix(',none')} {arrow}{dagger}",
                _score(score.value),
                *(_score_cell(found.get((run.name, task, metric))) for run in runs),
            ]
        )
    columns = ["task", "metric", run_label(base)] + [run_label(run) for run in runs]
    tests = sorted({row.method for row in comparison.rows})
    tested = sum(row.q is not None for row in comparison.rows)
    legend = (
        "\u2191 higher is better, \u2193 lower is better. \u25b2 better and \u25bc worse than the unpruned model, "
        f"\u25c6 different, significant at {comparison.alpha:g} after Benjamini-Hochberg over {tested} "
        "comparisons, one metric for each task; \u00d7 not tested; no mark: no difference was shown, "
        "which is not the same as none. \u2020 restates the same answers in another metric: outside of "
        "the correction, without marks. Differences with intervals, p, q and the smallest "
        "detectable difference are in results.csv."
    )
    return Section(
        "Scores",
        [
            legend,
            f"Tests: {'; '.join(tests)}.",
        ],
        Table("Scores", columns, rows, text=2),
    )


def trends_section(comparison: Comparison) -> Section | None:
    """The slope of each task over the expansion ratios."""
    if not comparison.trends:
        return None
    rows: list[list[Cell | str]] = [
        [
            each.series,
            each.task,
            scale_name(each.metric),
            str(each.trend.n),
            Cell(number_text(each.trend.slope, "+.4f"), note=each.trend.method),
            interval_text(each.trend.low, each.trend.high, 4),
            p_text(each.trend.p),
            "not tested" if each.q is None else p_text(each.q),
        ]
        for each in comparison.trends
    ]
    explanation = (
        "Slope: change of the score per 1 of expansion ratio, positive where the score falls with "
        "pruning. Each document has a slope over the ratios, and their mean is tested over "
        "documents, because the sizes are cut from each other and so no independent draws. A "
        "score that first rises and then falls can have a slope of 0."
    )
    return Section(
        "Trends over expansion ratios",
        [explanation],
        Table(
            "Trends",
            ["series", "task", "metric", "n", "slope"]
            + [f"{1 - comparison.alpha:.0%} interval", "p", "q"],
            rows,
            text=3,
        ),
    )


def configurations_section(runs: Sequence[Run]) -> Section:
    """What each configuration asked for, and what it got."""
    rows = []
    for run in runs:
        pruning = run.pruning
        before, after = (
            finite_or_none(pruning.get(f"parameters_{when}"))
            for when in ("before", "after")
        )
        asked = as_mapping(pruning.get("asked"))
        rows.append(
            [
                run.name,
                ", ".join(f"{key}={value}" for key, value in asked.items()) or "-",
                series_name(run) if not run.is_baseline else "-",
                number_text(
                    finite_or_none(pruning.get("intermediate_size_after")), ",.0f"
                ),
                number_text(run.expansion_ratio, ".4f"),
                number_text(after, ",.0f"),
                "-" if not before or not after else f"{1 - after / before:.1%}",
                str(pruning.get("kept_digest") or "-")[:12],
            ]
        )
    return Section(
        "Configurations",
        table=Table(
            "Configurations",
            ["configuration", "asked", "criterion", "intermediate size"]
            + ["expansion ratio", "parameters", "removed", "kept digest"],
            rows,
            text=3,
        ),
    )


def repeating_section(sweep: SweepResults, base: Run) -> Section:
    """Versions and settings of the unpruned run, and the definition of the sweep."""
    config = base.config
    facts: dict[str, Any] = {
        "lm-eval": setting_of(base, "lm_eval_version"),
        "transformers": setting_of(base, "transformers_version"),
        "lm-eval-pruned (this report)": version("lm-eval-pruned"),
        "model": config.get("model"),
        "model arguments of the unpruned model": config.get("model_args"),
        "model revision": config.get("model_sha") or config.get("model_revision"),
        "dtype": setting_of(base, "dtype"),
        "device (as asked)": config.get("device"),
        "batch size": config.get("batch_size"),
        "limit": config.get("limit"),
        "few-shot examples": setting_of(base, "num_fewshot"),
        "chat template": setting_of(base, "chat_template"),
        "task versions": base.versions,
        "seeds (random, numpy, torch, few-shot)": [
            setting_of(base, f"{name}_seed")
            for name in ("random", "numpy", "torch", "fewshot")
        ],
    }
    rows = [[name, _fact(value)] for name, value in facts.items()]
    return Section(
        "To repeat this",
        [
            "Settings of the unpruned model's run, and below them the sweep's own sweep.json."
        ],
        Table("Versions and settings", ["what", "value"], rows, text=2),
        code=_numbers_on_one_line(
            json.dumps(sweep.definition, indent=2, ensure_ascii=False, default=str)
        ),
    )


def _numbers_on_one_line(text: str) -> str:
    """Keep lists of numbers, such as those of ``--samples``, from filling pages."""
    return re.sub(
        r"\[\n\s*(-?\d+(?:,\s+-?\d+)*)\n\s*\]",
        lambda match: "[" + " ".join(match[1].split()) + "]",
        text,
    )


def remarks_section(
    sweep: SweepResults, runs: Sequence[Run], comparison: Comparison
) -> Section | None:
    """What failed, and what the reader of the scores has to know."""
    notes = [
        f"{failure.task} failed on {failure.run}: {failure.message}"
        for failure in sweep.failures
    ]
    notes += comparison.notes
    compared = {row.run for row in comparison.rows}
    notes += [
        f"{run.name} shares no task with the unpruned model and is not compared."
        for run in runs[1:]
        if run.name not in compared
    ]
    return Section("Remarks", notes=notes) if notes else None


def _score_cell(row: Difference | None) -> Cell:
    if row is None:
        return Cell("-", note="not evaluated")
    marks = {
        "better": "\u25b2",
        "worse": "\u25bc",
        "different": "\u25c6",
        "not tested": "\u00d7",
        "not comparable": "\u00d7",
    }
    parts = [f"{row.difference:+.4f}"]
    if row.low is not None and row.high is not None:
        parts.append(f"[{row.low:+.4f}, {row.high:+.4f}]")
    parts += [
        f"{name} = {value:.3g}"
        for name, value in (("p", row.p), ("q", row.q))
        if value is not None
    ]
    mark = row.verdict if row.verdict in ("better", "worse") else ""
    text = f"{_score(row.score)} {marks.get(row.verdict, '')}".rstrip()
    if row.of is not None:
        text += f" ({documents_text(row)})"
    return Cell(text, mark, f"{', '.join(parts)}; {row.method}; {row.verdict}")


def _fact(value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "-"
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _arrow(higher_is_better: bool | None) -> str:
    return {True: "\u2191", False: "\u2193", None: ""}[higher_is_better]
