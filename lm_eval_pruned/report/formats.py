"""A page from a template, a report as Markdown, and all its scores as CSV."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.page import only_these
from lm_eval_pruned.results.groups import healing_name
from lm_eval_pruned.util.palette import variables
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.report.page import Section
    from lm_eval_pruned.results.files import Run

#: Columns of ``results.csv`` that are attributes of a `Difference`.
_COMPARED = (
    *("difference", "relative", "low", "high", "p", "q", "smallest_detectable"),
    *("method", "primary", "verdict"),
)


def rendered(template: str, **values: Any) -> str:
    """Return one page that needs no other file and no network, in the colours of reports."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("lm_eval_pruned.report", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    colours = {scheme: variables(scheme) for scheme in ("light", "dark")}
    return environment.get_template(template).render(
        values, colours=colours, only_these=only_these
    )


def as_markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return a report as Markdown; the plots are links to files below ``plots/``."""
    lines = [f"# {_plain(title)}", "", _plain(subtitle)]
    for section in sections:
        lines += ["", f"## {section.heading}"]
        for text in section.paragraphs:
            lines += ["", _plain(text)]
        for text, file in section.links:
            lines += ["", f"[{_plain(text)}]({file})"]
        if section.table is not None:
            table = section.table
            columns = [_not_html(name) for name in table.columns]
            rows = [[_not_html(cell.text) for cell in row] for row in table.cells()]
            align = "l" * table.text + "r" * (len(columns) - table.text)
            lines += ["", markdown_table(columns, rows, align)]
        for plot in section.plots:
            text = f"{plot.title}. {plot.description}".translate({91: "(", 93: ")"})
            lines += ["", f"![{_plain(text)}](plots/{plot.name}.png)"]
        if section.code:
            lines += ["", f"```{section.language}", section.code, "```"]
        if section.notes:
            lines += ["", *(f"- {_plain(note)}" for note in section.notes)]
    return "\n".join(lines) + "\n"


def as_csv(base: Run, others: Sequence[Run], comparison: Comparison) -> str:
    """Return all scores in long form, one row per run, task and metric."""
    found = {(row.run, row.task, row.metric): row for row in comparison.rows}
    rows = []
    for run in (base, *others):
        for (task, metric), score in run.scores.items():
            stopping = run.stopping.get(task)
            low, high = (
                stopping.score_interval(task, metric) if stopping else (None, None)
            )
            difference = found.get((run.name, task, metric))
            rows.append(
                {
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
                    "score_low": low,
                    "score_high": high,
                    "documents": score.documents,
                    "of": stopping.of if stopping and stopping.is_partial else None,
                    "base": base.name,
                }
                | {name: getattr(difference, name, None) for name in _COMPARED}
            )
    return csv_table(rows[0], rows)


def _plain(text: str) -> str:
    """Return text that Markdown neither takes for HTML nor for a table."""
    return _not_html(text).replace("|", "\\|").replace("\n", " ")


def _not_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
