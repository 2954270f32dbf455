"""A report as one HTML page and as Markdown, and all its scores as CSV."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import Comparison, Difference
from lm_eval_pruned.report.page import only_these
from lm_eval_pruned.results.groups import healing_name
from lm_eval_pruned.util.palette import variables
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.report.page import Section
    from lm_eval_pruned.results.files import Run

_COLUMNS = (
    "run",
    "expansion_ratio",
    "intermediate_size",
    "parameters",
    "criterion",
    "seed",
    "healed_by",
    "task",
    "metric",
    "higher_is_better",
    "score",
    "stderr",
    "score_low",
    "score_high",
    "documents",
    "of",
    "base",
    "difference",
    "relative",
    "low",
    "high",
    "p",
    "q",
    "smallest_detectable",
    "method",
    "primary",
    "verdict",
)


def as_html(title: str, subtitle: str, sections: Sequence[Section], scores: str) -> str:
    """Return one page that needs no other file and no network.

    Args:
        title: Heading.
        subtitle: Below it.
        sections: What it says.
        scores: ``results.csv``, which the page hands on.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lm_eval_pruned.report", "."),
        autoescape=True,
        trim_blocks=True,
    )
    template = environment.get_template("template.html")
    return template.render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        scores=base64.b64encode(scores.encode("utf-8")).decode("ascii"),
        allowed=only_these(
            [
                script
                for section in sections
                if section.figure
                for script in section.figure.scripts
            ]
        ),
        colours={scheme: variables(scheme) for scheme in ("light", "dark")},
    )


def as_markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the same as Markdown; the plots are links to files below ``plots/``."""
    lines = [f"# {_plain(title)}", "", _plain(subtitle)]
    for section in sections:
        lines += ["", f"## {section.heading}"]
        for text in section.paragraphs:
            lines += ["", _plain(text)]
        if section.findings:
            lines += [
                "",
                *(f"- **{_plain(f.lead)}**{_plain(f.rest)}" for f in section.findings),
            ]
        for text, file in section.links:
            lines += ["", f"[{_plain(text)}]({file})"]
        if section.table is not None:
            table = section.table
            columns = [_not_html(name) for name in table.columns]
            rows = [[_not_html(cell.text) for cell in row] for row in table.cells()]
            align = "l" * table.text + "r" * (len(columns) - table.text)
            lines += ["", markdown_table(columns, rows, align)]
        for plot in section.plots:
            alternative = f"{plot.title}. {plot.description}".replace("]", ")").replace(
                "[", "("
            )
            lines += ["", f"![{_plain(alternative)}](plots/{plot.name}.png)"]
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
            row = found.get((run.name, task, metric))
            compared: dict[str, Any] = {}
            if row is not None:
                compared = {
                    name: getattr(row, name)
                    for name in _COLUMNS
                    if name in Difference.__dataclass_fields__
                    and name not in ("documents", "of")
                }
            if stopping := run.stopping.get(task):
                low, high = stopping.score_interval(task, metric)
                of = stopping.of if stopping.is_partial else None
                compared |= {"score_low": low, "score_high": high, "of": of}
            compared.update(
                run=run.name,
                expansion_ratio=run.expansion_ratio,
                intermediate_size=run.pruning.get("intermediate_size_after"),
                parameters=run.pruning.get("parameters_after"),
                criterion=run.pruning.get("criterion"),
                seed=run.pruning.get("seed"),
                healed_by=healing_name(run) if run.healing else None,
                task=task,
                metric=metric,
                higher_is_better=score.higher_is_better,
                score=score.value,
                stderr=score.stderr,
                documents=score.documents,
                base=base.name,
            )
            rows.append(compared)
    return csv_table(_COLUMNS, rows)


def _plain(text: str) -> str:
    """Return text that Markdown neither takes for HTML nor for a table."""
    return _not_html(text).replace("|", "\\|").replace("\n", " ")


def _not_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
