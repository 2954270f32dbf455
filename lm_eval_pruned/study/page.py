"""The page that a study ends with: for each model a verdict, a table, two figures, and what is open."""

from __future__ import annotations

import base64
import csv
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.figure import measure_chart, points_of
from lm_eval_pruned.report.page import (
    MARKS,
    Cell,
    Section,
    Table,
    as_markdown,
    rendered,
)
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.results.groups import LEFT, TAKEN
from lm_eval_pruned.study.findings import (
    FAILS,
    UNKNOWN,
    Findings,
    TaskFinding,
    joined,
    size_of,
)
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.figures import Plot
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lm_eval_pruned.results.files import Run

    #: A score of the study, by task, metric and percentage.
    Published = Mapping[tuple[str, str, float], float]

#: Not shown to be above the floor.
BELOW = "\u2264"
LEGEND = (
    "\u25b2 better and \u25bc worse than the unpruned model, \u25cb no difference shown, which is not the same as "
    f"none; {BELOW} not shown to be above the floor. The floor is the best score that needs no "
    "knowledge: of chance, of the commonest answer, of models that answer the same to everything. "
    "Random cuts are means over their seeds; the study's own scores come without documents, so "
    "that nothing about them is tested."
)
#: Rows of energy and latency: what they are called, where a profile has them, and their unit.
PROFILED = {
    "ms per written token": (("latency_estimates", "seconds_per_output_token"), 1000),
    "J per written token": (("joules_per_output_token",), 1),
}


def read_published(model: str) -> Published:
    """Return the scores that the study published of a model, if it is one of its three."""
    file = files(__package__).joinpath("study_benchmarks.csv")
    rows = csv.DictReader(file.read_text("utf-8").splitlines())
    return {
        (row["task"], row["metric"], float(row["prune_percent"])): float(row["value"])
        for row in rows
        if row["base_model"] == model
    }


def write_page(
    folder: Path,
    found: Mapping[str, Findings],
    profiles: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, str],
) -> list[Path]:
    """Write ``study.html``, ``study.md``, ``study.csv`` and the figures; return their paths.

    `profiles` are what `lm_eval_pruned.profiling.measure.profile` returned, by model.
    """
    sections, rows = [], []
    for name, findings in found.items():
        published = read_published(name)
        table = table_of(findings, published, profiles.get(name, {}))
        cells = (
            dict(zip(table.columns, (cell.text for cell in row), strict=True))
            for row in table.cells()
        )
        rows += [{"model": name, **each} for each in cells]
        sections += [
            Section(f"{name}: verdict", [" ".join(verdict(name, findings, published))]),
            Section(f"{name}: scores", [LEGEND], table=table),
            Section(f"{name}: figures", plots=plots_of(name, findings)),
            Section(
                f"{name}: what cannot be said",
                notes=open_questions(findings, profiles.get(name)),
                links=[
                    ("All differences, tests and answers", f"{name}/report/report.html")
                ],
            ),
        ]
    title = f"The width pruning dichotomy in {joined([*found])}"
    asked = {
        "base": "a base model, without a chat template",
        "instruct": "in its chat template",
    }
    subtitle = "; ".join(f"{name}: {asked[kinds[name]]}" for name in found)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = csv_table(names, [{name: row.get(name) for name in names} for row in rows])
    page = rendered(
        "template.html",
        title=title,
        subtitle=subtitle,
        sections=sections,
        scores=base64.b64encode(text.encode("utf-8")).decode("ascii"),
        scripts=[],
    )
    written: dict[str, str | bytes] = {"study.html": page, "study.csv": text}
    written["study.md"] = as_markdown(title, subtitle, sections)
    for plot in (plot for section in sections for plot in section.plots):
        written[f"plots/{plot.name}.svg"] = plot.svg
        written[f"plots/{plot.name}.png"] = plot.png
    for file, content in written.items():
        write_atomically(folder / file, content)
    return [folder / file for file in written]


def verdict(name: str, found: Findings, published: Published) -> list[str]:
    """Return the verdict on a model in five sentences."""
    taken, left = found.on(TAKEN), found.on(LEFT)
    falls, drops = ([each.task for each in of if each.falls] for of in (taken, left))
    rises = [each.task for each in left if each.rises and each.task not in drops]
    kept = [e.task for e in left if e.can_fall and e.task not in (*drops, *rises)]
    parts = [
        f"{joined(names)} {what}"
        for names, what in (
            (falls, "lose"),
            (rises, "rise above the floor"),
            (drops, "lose as well"),
            (kept, "show no change"),
        )
        if names
    ]
    why = {
        UNKNOWN: "of one of its two sides, no task has an unpruned score above its floor",
        FAILS: "; ".join(parts)
        if falls
        else "no loss of knowledge or language is shown",
    }
    told = why.get(found.verdict, "; ".join(parts))
    return [
        f"For {name} the dichotomy {found.verdict}: {told}.",
        _losses(found, taken),
        _gains(found, left),
        _against_chance(found),
        _beside_the_study(found, published),
    ]


def _losses(found: Findings, taken: Sequence[TaskFinding]) -> str:
    first: dict[float, list[str]] = {}
    sizes = {run.name: size_of(run) for run in found.cuts}
    for each in taken:
        if each.falls:
            first.setdefault(min(sizes[run] for run in each.falls), []).append(
                each.task
            )
    told = [f"at {size:g} % for {joined(first[size])}" for size in sorted(first)]
    if not told:
        return "No loss of knowledge or language is shown at any size."
    return f"A loss is first shown {'; '.join(told)}."


def _gains(found: Findings, left: Sequence[TaskFinding]) -> str:
    sizes, told, flat = {run.name: size_of(run) for run in found.cuts}, [], []
    for each in left:
        better = [row for row in each.rows.values() if row.verdict == "better"]
        if not better:
            flat.append(each.task)
            continue
        row = better[-1]
        gain = f"{each.task} goes from {row.base_score:.3f} to {row.score:.3f} at {sizes[row.run]:g} %"
        if each.floor is None:
            told.append(f"{gain}, and no floor is known")
        else:
            where = "above" if each.above[row.run] else "not shown to be above"
            told.append(
                f"{gain}, {where} the {each.floor.value:.3f} of {each.floor.by}"
            )
    told += [f"no rise is shown for {joined(flat)}"] if flat else []
    text = "; ".join(told) or "nothing that the study calls robust was evaluated"
    return f"{text[:1].upper()}{text[1:]}."


def _against_chance(found: Findings) -> str:
    if not found.random:
        return (
            "No random cuts were evaluated, so nothing tells the criterion from chance."
        )
    groups: dict[str, list[str]] = {}
    for task, verdicts in found.random.items():
        ways = verdicts & {"better", "worse"}
        groups.setdefault("both" if len(ways) == 2 else "".join(ways), []).append(task)
    words = {
        "better": "the criterion keeps more on",
        "worse": "it keeps less on",
        "both": "it keeps more at some sizes and less at others on",
        "": "no difference is shown on",
    }
    told = [f"{words[way]} {joined(groups[way])}" for way in words if way in groups]
    return f"Against random cuts of the same sizes, {'; '.join(told)}."


def _beside_the_study(found: Findings, published: Published) -> str:
    if not published:
        return "The study published no scores of this model."
    run, sizes = found.cuts[-1], {percent for *_, percent in published}
    if (size := size_of(run)) not in sizes:
        return f"The study published no scores at {size:g} %, the largest cut here."
    alike, apart = [], []
    for each in found.tasks:
        ends = [published.get((each.task, each.metric, at)) for at in (0.0, size)]
        row = each.rows.get(run.name)
        if row is not None and ends[0] is not None and ends[1] is not None:
            same = (ends[1] > ends[0]) == (row.difference > 0)
            (alike if same else apart).append(each.task)
    told = [
        f"{joined(tasks)} {what}"
        for tasks, what in ((alike, "move as published"), (apart, "move the other way"))
        if tasks
    ]
    return f"At {size:g} %, {'; '.join(told) or 'no task is among the published ones'}."


def table_of(
    found: Findings, published: Published, profile: Mapping[str, Any]
) -> Table:
    """Return all tasks by size: the study's cut, random cuts, ``recipe=best``, what was published."""
    sizes = [size_of(run) for run in found.cuts]
    columns = ["task", "cut by", "floor", "unpruned", *(f"{s:g} %" for s in sizes)]
    ways = {"random": found.controls, "recipe=best": found.best}
    rows: list[list[Cell | str]] = []
    for each in found.tasks:
        key = (each.task, each.metric)
        floor = "-" if each.floor is None else f"{each.floor.value:.3f} {each.floor.by}"
        base = f"{found.base.scores[key].value:.3f}{_below(each, each.base)}"
        cells = [_cell(each, run) for run in found.cuts]
        rows.append(
            [each.task, found.cuts[0].pruning["criterion"], floor, base, *cells]
        )
        for way, runs in ways.items():
            if runs:
                means = [_mean(runs, key, size) for size in sizes]
                rows.append([each.task, way, "", "", *means])
        told = [published.get((*key, size)) for size in (0.0, *sizes)]
        if any(told):
            shown = ("-" if score is None else f"{score:.3f}" for score in told)
            rows.append([each.task, "as published", "", *shown])
    for what, (path, unit) in PROFILED.items():
        values = {
            model: _profiled(profile, model, path, unit) for model in [0.0, *sizes]
        }
        if profile and any(values.values()):
            rows.append([what, "", "", *(v or "-" for v in values.values())])
    return Table("Scores by size", columns, rows, text=2)


def _below(each: TaskFinding, run: str) -> str:
    return f" {BELOW}" if each.above[run] is False else ""


def _cell(each: TaskFinding, run: Run) -> Cell:
    if (row := each.rows.get(run.name)) is None:
        return Cell("-")
    mark = MARKS.get(row.verdict, "")
    return Cell(f"{row.score:.3f} {mark}{_below(each, run.name)}", row.verdict)


def _mean(runs: Sequence[Run], key: tuple[str, str], size: float) -> str:
    scores = [
        r.scores[key].value for r in runs if size_of(r) == size and key in r.scores
    ]
    return f"{sum(scores) / len(scores):.3f}" if scores else "-"


def _profiled(
    profile: Mapping[str, Any], size: float, path: Sequence[str], unit: float
) -> str | None:
    models = profile.get("models", [])
    whole = models[0]["intermediate_size"] if models else 0
    for model in models:
        lost = round(100 * (1 - model["intermediate_size"] / whole), 1)
        for cell in profile["cells"]:
            if lost == size and (cell["model"], cell["mode"]) == (
                model["name"],
                "fixed",
            ):
                found: Any = cell
                for name in path:
                    found = (found or {}).get(name)
                return f"{found['mean'] * unit:.3g}" if found else None
    return None


def plots_of(name: str, found: Findings) -> list[Plot]:
    """Return two figures: all scores relative to the unpruned model, and what is above the floor."""
    floors = {
        (each.task, each.metric): Levels(each.floor.value if each.floor else None)
        for each in found.tasks
    }
    points = points_of([found.base, *found.cuts], found.base, found.comparison, floors)
    said = {
        "relative": "Scores relative to the unpruned model. Perplexities are inverted, so that up is better.",
        "above_chance": (
            "What is left above the floor: the unpruned model is at 100 %, the floor at 0 %. Tasks on "
            "which the unpruned model is less than two standard errors above it are left out."
        ),
    }
    plots = []
    for measure, text in said.items():
        drawn = points[points["measure"] == measure]
        if drawn["ratio"].nunique() > 1:
            chart = measure_chart(drawn, measure)
            if measure == "above_chance":
                chart = chart.properties(title="share of what is above the floor")
            plots.append(Plot(f"{name}-{measure}", text.partition(".")[0], text, chart))
    return plots


def open_questions(found: Findings, profile: Mapping[str, Any] | None) -> list[str]:
    """Return what the results do not tell, one sentence each."""
    blind = [each for each in found.tasks if not each.can_fall]
    unknown = [each.task for each in found.tasks if each.above[each.base] is None]
    limit = found.base.config.get("limit")
    draws = len({run.pruning.get("seed") for run in found.controls})
    notes = [
        f"{each.task} cannot show a loss in this model: its unpruned score is not shown to be "
        f"above the {each.floor.value:.3f} of {each.floor.by}."
        for each in blind
        if each.floor is not None
    ]
    if unknown:
        notes.append(f"No floor is known for {joined(unknown)}.")
    if limit is not None:
        notes.append(
            f"Scores are of the first documents of each task (limit {limit:g}): smaller differences "
            "than those shown can exist."
        )
    if found.controls:
        notes.append(
            f"Chance is {draws} random {'cut' if draws == 1 else 'cuts'} of each size."
        )
    if not found.best:
        notes.append("recipe=best was not evaluated.")
    if profile is None:
        notes.append("Energy and latency were not measured.")
    elif profile.get("cells"):
        notes.append(
            "Energy is gross, of all that the machine did while tokens were written, as many by "
            "every model; modelled energy is an estimate."
        )
    return [*notes, *found.notes[:10]]
