"""The page that a study ends with: for each model a verdict, claims, scores, figures, open questions."""

from __future__ import annotations

import csv
from importlib.resources import files
from operator import methodcaller
from typing import TYPE_CHECKING

from lm_eval_pruned.report.figure import MEASURES, measure_plots
from lm_eval_pruned.report.page import Section, write_page
from lm_eval_pruned.study.claims import claims_table
from lm_eval_pruned.study.findings import open_questions, over_all, sentences, size_of
from lm_eval_pruned.study.sides import FALLS, KEEPS, RISES, UNKNOWN
from lm_eval_pruned.util.tables import Cell, Column, Table


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.study.findings import Findings

#: What is shown of a score, and its colour.
MARKS = {
    RISES: ("\u25b2", "better"),
    FALLS: ("\u25bc", "worse"),
    KEEPS: ("=", ""),
    UNKNOWN: ("\u25cb", ""),
}
#: After a score that is not shown to be above the floor.
AT_FLOOR = " \u2264"
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


def write_study(folder: Path, models: Mapping[str, Findings]) -> list[Path]:
    """Write ``study.html``, ``study.md`` and the figures, and return their paths."""
    sections, records, subtitles = [], [], []
    if len(models) > 1:
        sections.append(Section("All models", [over_all(models)]))
    for name, findings in models.items():
        table = _table(findings, published_of(name))
        for row in table.cells():
            shown = zip(table.titles, (cell.text for cell in row), strict=True)
            records.append({"model": name, **dict(shown)})
        links = {
            "All differences, tests and answers": f"{name}/report/report.html",
            "Energy and latency": f"{name}/profile/profile.md",
        }
        there = [each for each in links.items() if (folder / each[1]).is_file()]
        notes = open_questions(findings)
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
    title = f"The width pruning dichotomy in {', '.join(models)}"
    return write_page(folder, "study", title, "; ".join(subtitles), sections, records)


def _table(
    findings: Findings, published: Mapping[tuple[str, str, float], float]
) -> Table:
    """Return the scores by size: cut by the criterion, by each other way, and as published."""
    sizes = {run.name: f"{size_of(run):g} %" for run in findings.cuts}
    rows: list[dict[str, str | Cell]] = []
    for task in findings.tasks:
        key = task.task, task.metric
        base = f"{task.rows[0].base_score:.3f}{'' if task.can_fall else AT_FLOOR}"
        first = {"task": task.task, "cut by": findings.criterion, "floor": task.level}
        shown = zip(task.rows, task.states, strict=True)
        cells = {sizes[row.run]: _score(row, state) for row, state in shown}
        rows.append({**first, "unpruned": base, **cells})
        ways = {way: _means(runs, key) for way, runs in findings.beside.items()}
        public = {n: v for (*of, n), v in published.items() if (*of,) == key}
        ways["as published"] = {
            f"{n:g} %" if n else "unpruned": f"{v:.3f}" for n, v in public.items()
        }
        rows += [
            {"task": task.task, "cut by": way, **texts}
            for way, texts in ways.items()
            if texts
        ]
    forms = {"task": "", "cut by": "", "floor": "", "unpruned": ">"}
    forms |= dict.fromkeys(sizes.values(), ">")
    columns = [
        Column(name, methodcaller("get", name), form) for name, form in forms.items()
    ]
    return Table("Scores by size", columns, rows)


def _means(runs: Sequence[Run], key: tuple[str, str]) -> dict[str, str]:
    """Return the mean of a score over runs of a size, such as the seeds of random cuts, by size."""
    scores: dict[str, list[float]] = {}
    for run in (run for run in runs if key in run.scores):
        scores.setdefault(f"{size_of(run):g} %", []).append(run.scores[key].value)
    return {size: f"{sum(of) / len(of):.3f}" for size, of in scores.items()}


def _score(row: Difference, state: str) -> Cell:
    mark, colour = MARKS[state]
    return Cell(f"{row.score:.3f} {mark}{AT_FLOOR.strip() * row.at_floor}", colour)


def _figures(name: str, findings: Findings) -> Section:
    members, measures = [findings.base, *findings.cuts], ("relative", "kept")
    drawn = measure_plots(name, members, findings.base, findings.comparison, measures)
    notes = [
        f"{MEASURES[each][1]}: not drawn, because no task is left. {MEASURES[each][3]}"
        for each in measures
        if each not in drawn
    ]
    return Section(f"{name}: figures", plots=[*drawn.values()], notes=notes)
