"""The sections of a report that are words and tables."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison_table import (
    documents_text,
    interval_text,
    number_text,
    p_text,
)
from lm_eval_pruned.compare.stopping import stopping_of
from lm_eval_pruned.report.findings import findings
from lm_eval_pruned.report.page import (
    MARKS,
    Cell,
    Section,
    Table,
    run_label,
    tone_of,
    verdict_cell,
)
from lm_eval_pruned.results.files import as_mapping, finite_or_none
from lm_eval_pruned.results.groups import primary_metrics, scale_name, series_name
from lm_eval_pruned.results.runs import setting_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.report.findings import Finding
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults


def findings_section(
    runs: Sequence[Run], comparison: Comparison, beside_random: Sequence[Finding] = ()
) -> Section | None:
    """One sentence for each family of tasks, and for each criterion beside random ones."""
    found = [*findings(runs, comparison), *beside_random]
    if not found:
        return None
    return Section(
        "Findings",
        [
            (
                f"Against the unpruned model, at q < {comparison.alpha:g}; sizes are expansion ratios. "
                "What could have been seen is the smallest difference that the test of the least "
                "sensitive size finds with a chance of 80 %. No difference shown is not the same "
                "as none."
            )
        ],
        findings=found,
    )


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
    # How many documents each was made on stands in the table.
    tests = sorted(
        {re.sub(r", (partial|all): .*$", "", row.method) for row in comparison.rows}
    )
    by_name = {run.name: run for run in runs}
    stopped = [
        stopping_of(base, by_name[row.run], row.task) is not None
        for row in comparison.rows
        if row.q is not None
    ]
    corrections = [
        "Benjamini-Hochberg over the sizes of each task, random controls apart"
    ]
    if any(stopped):
        bonferroni = "Bonferroni over the sizes of each task whose units could stop"
        corrections = [*(corrections if not all(stopped) else ()), bonferroni]
    legend = (
        "\u2191 higher is better, \u2193 lower is better. \u25b2 better and \u25bc worse than the unpruned model, "
        f"\u25c6 different, significant at {comparison.alpha:g} after {' and '.join(corrections)}, "
        "one metric for each task; \u25cb no difference shown, "
        "which is not the same as none; \u00d7 not tested. \u2020 restates the same answers in another metric: outside of "
        "the correction, without marks. Differences with intervals, p, q and the smallest "
        "detectable difference stand in the next table."
    )
    if any(row.of is not None for row in comparison.rows):
        legend += (
            " A score marked as partial is of a unit that stopped when it was decided; its "
            "interval, which holds for stopping, stands in the next table as well."
        )
    return Section(
        "Scores",
        [
            legend,
            f"Tests: {'; '.join(tests)}.",
        ],
        table=Table("Scores", columns, rows, text=2),
    )


def differences_section(
    others: Sequence[Run], comparison: Comparison
) -> Section | None:
    """Each difference that was tested or could not be, with what else could have been seen."""
    ratios = {run.name: run.expansion_ratio for run in others}
    runs = {run.name: run for run in others}
    labels = {run.name: run_label(run) for run in others}
    rows: list[list[Cell | str]] = []
    tasks = {row.task: None for row in comparison.rows}
    for row in sorted(
        comparison.rows,
        key=lambda row: (list(tasks).index(row.task), -(ratios[row.run] or 0)),
    ):
        if not row.primary:
            continue
        rows.append(
            [
                row.task,
                row.metric.removesuffix(",none"),
                labels[row.run],
                _score(row.base_score),
                _partial_score(runs[row.run], row),
                Cell(f"{row.difference:+.4f}", tone_of(row.verdict)),
                verdict_cell(row.verdict),
                interval_text(row.low, row.high, 4),
                number_text(row.smallest_detectable, ".4f"),
                p_text(row.q),
                documents_text(row),
            ]
        )
    if not rows:
        return None
    explanation = (
        "A difference of the smallest detectable size would have been found with a chance of 80 %, "
        "at the level that the correction leaves to its row, and the interval is that of the same "
        "level: it leaves out 0 exactly where a difference is shown. n counts the documents that both "
        "were scored on."
    )
    if any(row.of is not None for row in comparison.rows):
        explanation += (
            " Where n is partial, both scores are of the documents that were used; the interval of "
            "the score beside it, that of the difference and q hold for stopping."
        )
    return Section(
        "Differences from the unpruned model",
        [explanation],
        table=Table(
            "Differences from the unpruned model",
            ["task", "metric", "configuration", "unpruned", "score", "difference"]
            + ["verdict", f"{1 - comparison.alpha:.0%} interval"]
            + ["smallest detectable", "q", "n"],
            rows,
            text=3,
        ),
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
            number_text(each.trend.slope, "+.4f"),
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
        [
            explanation,
            f"Tests: {'; '.join(sorted({each.trend.method for each in comparison.trends}))}.",
        ],
        table=Table(
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
        "device": config.get("device"),
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
        table=Table("Versions and settings", ["what", "value"], rows, text=2),
        code=_numbers_on_one_line(
            json.dumps(sweep.definition, indent=2, ensure_ascii=False, default=str)
        ),
        folded="sweep.json",
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


def _partial_score(run: Run, row: Difference) -> str:
    """Return the score of a row, with its own interval where the unit stopped."""
    stopping = run.stopping.get(row.task) if row.of is not None else None
    low, high = (
        stopping.score_interval(row.task, row.metric) if stopping else (None, None)
    )
    within = (
        "" if low is None or high is None else f" ({_score(low)} to {_score(high)})"
    )
    return f"{_score(row.score)}{within}"


def _score_cell(row: Difference | None) -> Cell:
    if row is None:
        return Cell("-")
    text = f"{_score(row.score)} {MARKS.get(row.verdict, '')}".rstrip()
    if row.of is not None:
        text += f" ({documents_text(row)})"
    return Cell(text, tone_of(row.verdict))


def _fact(value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "-"
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _arrow(higher_is_better: bool | None) -> str:
    return {True: "\u2191", False: "\u2193", None: ""}[higher_is_better]
