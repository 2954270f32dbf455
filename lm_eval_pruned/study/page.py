"""The page that a study ends with: for each model a verdict, a table, two figures, open questions."""

from __future__ import annotations

import base64
import csv
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.figure import MEASURES, measure_chart, points_of, slug
from lm_eval_pruned.report.page import (
    MARKS,
    Cell,
    Section,
    Table,
    as_markdown,
    rendered,
)
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.study.findings import open_questions, sentences, size_of
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.figures import Plot
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lm_eval_pruned.study.findings import Findings

LEGEND = (
    "\u25b2 better and \u25bc worse than the unpruned model, \u25cb no difference shown, which does not mean that "
    "there is none; \u2264 not shown to be above the floor, the best score without knowledge: from chance, "
    "from the commonest answer, or from a model that knows nothing. The second figure counts it as chance. "
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
    for name, found in models.items():
        table = _table(found, published_of(name))
        for row in table.cells():
            cells = zip(table.columns, (cell.text for cell in row), strict=True)
            rows.append({"model": name, **dict(cells)})
        notes = open_questions(found)
        links = {
            "All differences, tests and answers": f"{name}/report/report.html",
            "Energy and latency": f"{name}/profile/profile.md",
        }
        there = [each for each in links.items() if (folder / each[1]).is_file()]
        sections += [
            Section(f"{name}: verdict", [" ".join(sentences(name, found))]),
            Section(f"{name}: scores", [LEGEND], table=table),
            _figures(name, found),
            Section(f"{name}: limits of these results", notes=notes, links=there),
        ]
        how = "in its" if found.asked.get("apply_chat_template") else "without a"
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


def _table(found: Findings, published: Mapping[tuple[str, str, float], float]) -> Table:
    sizes = [size_of(run) for run in found.cuts]
    criterion, rows = found.cuts[0].pruning["criterion"], []
    for each in found.tasks:
        key, cells = (each.task, each.metric), {}
        for row in each.rows:
            below = "\u2264" * row.at_floor
            text = f"{row.score:.3f} {MARKS.get(row.verdict, '')}{below}"
            cells[row.run] = Cell(text.rstrip(), row.verdict)
        unpruned = f"{each.rows[0].base_score:.3f}{'' if each.can_fall else ' ≤'}"
        own = [cells.get(run.name, "-") for run in found.cuts]
        rows.append([each.task, criterion, each.level, unpruned, *own])
        for way, runs in found.beside.items():
            scored = [
                (size_of(r), r.scores[key].value) for r in runs if key in r.scores
            ]
            of = [[score for at, score in scored if at == size] for size in sizes]
            means = [sum(each) / len(each) if each else None for each in of]
            rows += [[each.task, way, "", "", *_texts(means)]] if scored else []
        told = [published.get((*key, size)) for size in (0.0, *sizes)]
        rows += [[each.task, "as published", "", *_texts(told)]] if any(told) else []
    columns = ["task", "cut by", "floor", "unpruned", *(f"{s:g} %" for s in sizes)]
    return Table("Scores by size", columns, rows, text=2)


def _texts(scores: list[float | None]) -> list[str]:
    return ["-" if score is None else f"{score:.3f}" for score in scores]


def _figures(name: str, found: Findings) -> Section:
    floors = {(e.task, e.metric): Levels(e.floor.floor) for e in found.tasks if e.floor}
    members = [found.base, *found.cuts]
    points = points_of(members, found.base, found.comparison, floors)
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
