"""The page that a study ends with: for each model a verdict, claims, scores, figures, open questions."""

from __future__ import annotations

import base64
import csv
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.figure import MEASURES, measure_chart, points_of, slug
from lm_eval_pruned.report.page import (
    Cell,
    Section,
    Table,
    as_markdown,
    rendered,
)
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.study.claims import claims_table
from lm_eval_pruned.study.findings import open_questions, over_all, sentences, size_of
from lm_eval_pruned.study.sides import FALLS, KEEPS, RISES, UNKNOWN
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.figures import Plot
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lm_eval_pruned.study.findings import Findings

#: What is shown of a score, and its colour.
MARKS = {
    RISES: ("\u25b2", "better"),
    FALLS: ("\u25bc", "worse"),
    KEEPS: ("=", ""),
    UNKNOWN: ("\u25cb", ""),
}
LEGEND = (
    "\u25b2 rises and \u25bc falls, = is shown to lie within the margin, \u25cb cannot tell; \u2264 not shown to "
    "be above the floor, the best score without knowledge: exact, from chance, "
    "from the commonest answer, or from a model that knows nothing. The second figure puts it at 0. "
    "Random cuts are means over seeds. Published scores come without documents, so they are not tested."
)


def published_of(model: str) -> dict[tuple[str, str, float], float]:
    """Return the scores that the study published of a model, by task, metric and percentage."""
    text = files(__package__).joinpath("study_benchmarks.csv").read_text("utf-8")
    return {
        (row["task"], row["metric"], float(row["prune_percent"])): float(row["value"])
        for row in csv.DictReader(text.splitlines())
        if row["base_model"] == model
    }


def write_page(folder: Path, models: Mapping[str, Findings]) -> list[Path]:
    """Write ``study.html``, ``study.md`` and the figures, and return their paths."""
    sections, rows, subtitles = [], [], []
    if len(models) > 1:
        sections.append(Section("All models", [over_all(models)]))
    for name, findings in models.items():
        table = _table(findings, published_of(name))
        for row in table.cells():
            cells = zip(table.columns, (cell.text for cell in row), strict=True)
            rows.append({"model": name, **dict(cells)})
        notes = open_questions(findings)
        links = {
            "All differences, tests and answers": f"{name}/report/report.html",
            "Energy and latency": f"{name}/profile/profile.md",
        }
        there = [each for each in links.items() if (folder / each[1]).is_file()]
        sections += [
            Section(f"{name}: verdict", [" ".join(sentences(name, findings))]),
            Section(f"{name}: claims", table=claims_table(findings)),
            Section(f"{name}: scores", [LEGEND], table=table),
            _figures(name, findings),
            Section(f"{name}: limits of these results", notes=notes, links=there),
        ]
        how = (
            "in its" if findings.definition.get("apply_chat_template") else "without a"
        )
        subtitles.append(f"{name}: prompted {how} chat template")
    columns = dict.fromkeys(column for row in rows for column in row)
    scores = base64.b64encode(csv_table(columns, rows).encode()).decode("ascii")
    title = f"The width pruning dichotomy in {', '.join(models)}"
    shown: Any = {"title": title, "subtitle": "; ".join(subtitles)}
    shown["sections"] = sections
    page = rendered("template.html", **shown, scores=scores, scripts=[])
    written: dict[str, str | bytes] = {"study.html": page}
    written["study.md"] = as_markdown(**shown)
    plots = [plot for section in sections for plot in section.plots]
    written |= {f"plots/{plot.name}.svg": plot.svg for plot in plots}
    written |= {f"plots/{plot.name}.png": plot.png for plot in plots}
    for file, content in written.items():
        write_atomically(folder / file, content)
    return [folder / file for file in written]


def _table(
    findings: Findings, published: Mapping[tuple[str, str, float], float]
) -> Table:
    sizes = [size_of(run) for run in findings.cuts]
    rows = []
    for task in findings.tasks:
        key, cells = (task.task, task.metric), {}
        for row, state in zip(task.rows, task.states, strict=True):
            mark, colour = MARKS[state]
            below = "\u2264" * row.at_floor
            cells[row.run] = Cell(f"{row.score:.3f} {mark}{below}", colour)
        unpruned = f"{task.rows[0].base_score:.3f}{'' if task.can_fall else ' ≤'}"
        own = [cells.get(run.name, "-") for run in findings.cuts]
        rows.append([task.task, findings.criterion, task.level, unpruned, *own])
        for way, runs in findings.beside.items():
            scored = [
                (size_of(r), r.scores[key].value) for r in runs if key in r.scores
            ]
            seeds = [[score for at, score in scored if at == size] for size in sizes]
            means = [sum(drawn) / len(drawn) if drawn else None for drawn in seeds]
            rows += [[task.task, way, "", "", *_texts(means)]] if scored else []
        public = [published.get((*key, size)) for size in (0.0, *sizes)]
        rows += (
            [[task.task, "as published", "", *_texts(public)]] if any(public) else []
        )
    columns = ["task", "cut by", "floor", "unpruned", *(f"{s:g} %" for s in sizes)]
    return Table("Scores by size", columns, rows, text=2)


def _texts(scores: list[float | None]) -> list[str]:
    return ["-" if score is None else f"{score:.3f}" for score in scores]


def _figures(name: str, findings: Findings) -> Section:
    floors = {
        (e.task, e.metric): Levels(e.floor.floor) for e in findings.tasks if e.floor
    }
    members = [findings.base, *findings.cuts]
    points = points_of(members, findings.base, findings.comparison, floors)
    plots, notes = [], []
    for measure in ("relative", "kept"):
        drawn, (_, title, _, said) = (
            points[points["measure"] == measure],
            MEASURES[measure],
        )
        if drawn["ratio"].nunique() > 1:
            chart = measure_chart(drawn, measure)
            plots.append(Plot(f"{slug(name)}-{measure}", title, said, chart))
        else:
            notes.append(f"{title}: not drawn, because no task is left. {said}")
    return Section(f"{name}: figures", plots=plots, notes=notes)
