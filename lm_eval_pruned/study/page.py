"""The page that a study ends with: for each model a verdict, a table, two figures, open questions."""

from __future__ import annotations

import base64
import csv
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.report.figure import measure_chart, points_of, slug
from lm_eval_pruned.report.page import (
    MARKS,
    Cell,
    Section,
    Table,
    as_markdown,
    rendered,
)
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.study.verdict import open_questions, sentences, size_of
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.figures import Plot
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lm_eval_pruned.study.findings import Findings, TaskFinding
    from lm_eval_pruned.study.verdict import Published

LEGEND = (
    "\u25b2 better and \u25bc worse than the unpruned model, \u25cb no difference shown, which is not the same "
    "as none; \u2264 not shown to be above the floor, the best score without knowledge: of chance, of "
    "the commonest answer, of a model that knows nothing. Random cuts are means over seeds. Published "
    "scores come without documents, so nothing tests them."
)
#: Figures by what `points_of` calls them.
FIGURES = {
    "relative": (
        "Scores relative to the unpruned model",
        "Filled points differ significantly. Perplexities are inverted, so that up is better.",
    ),
    "above_chance": (
        "What is left above the floor",
        "The floor, which the axis calls chance, is at 0 %. Tasks that start near it are left out.",
    ),
}


class Studied(NamedTuple):
    """A model: what was found, how it was asked, and its profile, empty without one."""

    found: Findings
    asked: str
    profile: Mapping[str, Any]


def published_of(model: str) -> Published:
    """Return the scores that the study published of a model; none of others than its own."""
    text = files(__package__).joinpath("study_benchmarks.csv").read_text("utf-8")
    return {
        (row["task"], row["metric"], float(row["prune_percent"])): float(row["value"])
        for row in csv.DictReader(text.splitlines())
        if row["base_model"] == model
    }


def write_page(folder: Path, models: Mapping[str, Studied]) -> list[Path]:
    """Write ``study.html``, ``study.md`` and the figures, and return their paths."""
    sections, rows = [], []
    for name, (found, _, profile) in models.items():
        published = published_of(name)
        table = _table(found, published, profile)
        for row in table.cells():
            cells = zip(table.columns, (cell.text for cell in row), strict=True)
            rows.append({"model": name, **dict(cells)})
        told = [" ".join(sentences(name, found, published))]
        notes = open_questions(found, bool(profile))
        link = ("All differences, tests and answers", f"{name}/report/report.html")
        sections += [
            Section(f"{name}: verdict", told),
            Section(f"{name}: scores", [LEGEND], table=table),
            Section(f"{name}: figures", plots=_plots(name, found)),
            Section(f"{name}: what cannot be said", notes=notes, links=[link]),
        ]
    title = f"The width pruning dichotomy in {', '.join(models)}"
    subtitle = "; ".join(f"{name}: {each.asked}" for name, each in models.items())
    columns = dict.fromkeys(column for row in rows for column in row)
    scores = base64.b64encode(csv_table(columns, rows).encode()).decode("ascii")
    shown: Any = {"title": title, "subtitle": subtitle, "sections": sections}
    page = rendered("template.html", **shown, scores=scores, scripts=[])
    written: dict[str, str | bytes] = {"study.html": page}
    written["study.md"] = as_markdown(**shown)
    for plot in (plot for section in sections for plot in section.plots):
        written |= {
            f"plots/{plot.name}.svg": plot.svg,
            f"plots/{plot.name}.png": plot.png,
        }
    for file, content in written.items():
        write_atomically(folder / file, content)
    return [folder / file for file in written]


def _table(found: Findings, published: Published, profile: Mapping[str, Any]) -> Table:
    sizes = [size_of(run) for run in found.cuts]
    rows: list[list[Cell | str]] = []
    for each in found.tasks:
        key, floor = (each.task, each.metric), "-"
        if each.floor:
            floor = f"{each.floor.floor:.3f} ({each.floor_by})"
        above = iter(each.above)
        unpruned = _marked(each, next(above), each.base_score, "")
        cells = {
            row.run: Cell(_marked(each, row.run, row.score, row.verdict), row.verdict)
            for row in each.rows
        }
        first: list[Cell | str] = [each.task, found.cuts[0].pruning["criterion"]]
        own = [cells.get(run.name, "-") for run in found.cuts]
        rows.append([*first, floor, unpruned, *own])
        for way, runs in found.beside.items():
            scored = [run for run in runs if key in run.scores]
            of = [
                [r.scores[key].value for r in scored if size_of(r) == s] for s in sizes
            ]
            means = [f"{sum(each) / len(each):.3f}" if each else "-" for each in of]
            rows += [[key[0], way, "", "", *means]] if scored else []
        told = [published.get((*key, size)) for size in (0.0, *sizes)]
        if any(told):
            texts = ["-" if score is None else f"{score:.3f}" for score in told]
            rows.append([each.task, "as published", "", *texts])
    fixed = [cell for cell in profile.get("cells", ()) if cell["mode"] == "fixed"]
    if len(fixed) == 1 + len(sizes):
        decode = [
            cell["latency_estimates"]["seconds_per_output_token"] for cell in fixed
        ]
        joules = [cell["joules_per_output_token"] for cell in fixed]
        for what, values, unit in (("ms", decode, 1000), ("J", joules, 1)):
            texts = [f"{v['mean'] * unit:.3g}" if v else "-" for v in values]
            rows.append([f"{what} per written token", "", "", *texts])
    columns = [
        "task",
        "cut by",
        "floor",
        "unpruned",
        *(f"{size:g} %" for size in sizes),
    ]
    return Table("Scores by size", columns, rows, text=2)


def _marked(each: TaskFinding, run: str, score: float, verdict: str) -> str:
    below = "\u2264" if each.above[run] is False else ""
    return f"{score:.3f} {MARKS.get(verdict, '')}{below}".rstrip()


def _plots(name: str, found: Findings) -> list[Plot]:
    floors = {
        (each.task, each.metric): Levels(each.floor.floor)
        for each in found.tasks
        if each.floor
    }
    members = [found.base, *found.cuts]
    points, plots = points_of(members, found.base, found.comparison, floors), []
    for measure, (title, said) in FIGURES.items():
        drawn = points[points["measure"] == measure]
        if drawn["ratio"].nunique() > 1:
            chart = measure_chart(drawn, measure)
            plots.append(Plot(f"{slug(name)}-{measure}", title, said, chart))
    return plots
