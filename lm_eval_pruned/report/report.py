"""``lm-eval-pruned report``: a sweep as Markdown, CSV, one HTML page and plots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.compare.comparison_table import record
from lm_eval_pruned.report import sections as words
from lm_eval_pruned.report.changed_answers import ALL, PAGE, changed_answers
from lm_eval_pruned.report.figure import (
    figure_section,
    layers_section,
    truthfulness_section,
)
from lm_eval_pruned.report.page import write_page
from lm_eval_pruned.results.groups import healing_name, model_arguments
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.compare.margins import Margin
    from lm_eval_pruned.report.page import Section
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults


def write_report(
    sweep: SweepResults,
    comparison: Comparison,
    output_path: str | Path | None = None,
    *,
    texts: bool = True,
    opening: Sequence[Section] = (),
) -> list[Path]:
    """Write the report of a sweep and return its files, ``report.html`` first.

    They go to `output_path`, by default ``report`` in the sweep's folder. `comparison` is what
    `compared` returned; without `texts`, ``flips.html`` and ``flips.jsonl`` do not say what was asked and
    answered. The report begins with the sections of `opening`.
    """
    base, others = sweep.split()
    target = Path(output_path) if output_path else sweep.path / "report"
    runs = [base, *others]
    title = f"Width pruning of {_model_name(base)}"
    count = len(base.tasks(subtasks=False))
    subtitle = (
        f"{len(runs)} configurations, {count} task{'s'[: count != 1]}, compared with "
        f"the unpruned model ({base.name})"
    )
    answers, changes = changed_answers(title, base, comparison.rows, texts=texts)
    sections = [
        *opening,
        words.families_section(runs, comparison),
        words.floors_section(comparison),
        figure_section(base, runs, comparison),
        words.scores_section(base, others, comparison),
        words.levels_section(base, others, comparison),
        words.differences_section(others, comparison),
        words.random_section(others, comparison),
        answers,
        truthfulness_section(runs, comparison),
        words.trends_section(comparison),
        words.energy_section(runs),
        layers_section(sweep),
        words.repeating_section(sweep, base),
        words.remarks_section(sweep, others, comparison),
    ]
    scores = csv_table(_records(base, others, comparison))
    present = [section for section in sections if section is not None]
    files = write_page(target, "report", title, subtitle, present, scores)
    more = {"results.csv": scores, **changes}
    for name, content in more.items():
        write_atomically(target / name, content)
    for name in {PAGE, ALL} - more.keys():
        # Of an earlier report, whose texts must not stay behind.
        (target / name).unlink(missing_ok=True)
    return [*files, *(target / name for name in more)]


def compared(
    sweep: SweepResults, *, alpha: float = 0.05, margin: Margin | None = None
) -> Comparison:
    """Compare a sweep's runs with its unpruned model, as `compare` does.

    ResultsError if the sweep has no run of it; ValueError if `alpha` is out of range.
    """
    base, others = sweep.split()
    comparable = [run for run in others if {*run.tasks()} & {*base.tasks()}]
    runs = [*comparable, *sweep.floors] if comparable else []
    return compare(base, runs, alpha=alpha, margin=margin)


def _records(
    base: Run, others: Sequence[Run], comparison: Comparison
) -> list[dict[str, Any]]:
    """Return all scores in long form, one row per run, task and metric."""
    differences = {
        (row.run, row.task, row.metric): record(row) for row in comparison.rows
    }
    rows = []
    for run in (base, *others):
        for (task, metric), score in run.scores.items():
            row = {
                "run": run.name,
                "expansion_ratio": run.expansion_ratio,
                "intermediate_size": run.pruning.get("intermediate_size_after"),
                "parameters": run.pruning.get("parameters_after"),
                "criterion": run.pruning.get("criterion"),
                "seed": run.pruning.get("seed"),
                "healed_by": healing_name(run) if run.healing else None,
                "task": task,
                "metric": metric,
                "higher_is_better": score.higher_is_better,
                "score": score.value,
                "stderr": score.stderr,
                "documents": score.documents,
                "base": base.name,
            }
            rows.append(row | differences.get((run.name, task, metric), {}) | row)
    return rows


def _model_name(run: Run) -> str:
    name = model_arguments(run).get("pretrained")
    return Path(str(name)).name if name else "SmolLM2-135M-Instruct (the default model)"
