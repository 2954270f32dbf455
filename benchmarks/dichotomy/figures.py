"""Scores over sizes, by criterion and by chance."""

from __future__ import annotations

import altair as alt
import pandas as pd

from dichotomy.steps import CRITERIA, MODELS, UNIFORM
from dichotomy.tables import MEASURES
from dichotomy.words import Cells, Tables, grouped, number
from lm_eval_pruned.util.figures import HUES, Plot, line_look, lines


#: What is no criterion has no colour.
BY_CHANCE = "var(--ink)"


def draw(tables: Tables) -> dict[str, str]:
    """Return an SVG file for each model with scores of several sizes, by name."""
    drawings = {}
    for model in MODELS:
        rows = [
            row
            for row in tables["scores"]
            if row["model"] == model and row["step"] in UNIFORM and row["percent"]
        ]
        by_task = {
            task: of
            for (task,), of in grouped(rows, "task").items()
            if len({row["percent"] for row in of}) > 1
        }
        if by_task:
            name = f"scores-{model}"
            plot = Plot(name, model, _SAID, panels(by_task))
            drawings[f"{name}.svg"] = plot.svg
    return drawings


_SAID = "Means over seeds; bands span the seeds, and dotted rules are chance."


def panels(by_task: dict[str, list[Cells]]) -> alt.ConcatChart:
    """Return a panel for each task; a method looks the same in all of them."""
    methods = {row["method"] for rows in by_task.values() for row in rows}
    shown = [method for method in CRITERIA if method in methods]
    hues = {
        name: BY_CHANCE if name == "random" else HUES[line % len(HUES)]
        for line, name in enumerate(CRITERIA)
    }
    look = line_look(shown, hues)
    every = []
    for task in (each for each in MEASURES if each in by_task):
        measure, rows = MEASURES[task], by_task[task]
        scale = 100 if measure.share else 1
        base = [row for row in rows if row["method"] == "unpruned"]
        found = [
            {"line": method, "percent": float(row["percent"]), "score": scale * score}
            for method in shown
            for row in (*base, *(each for each in rows if each["method"] == method))
            if (score := number(row, "score")) is not None
        ]
        points = pd.DataFrame(found).groupby(["line", "percent"], as_index=False)
        points = points["score"].agg(score="mean", low="min", high="max")
        x = alt.X("percent:Q", title="neurons removed, %")
        y = alt.Y("score:Q", title=None, scale=alt.Scale(zero=False))
        panel = lines(points, x, y, look)
        level = number(base[0], "chance") if base else None
        if level is not None:
            chance = alt.Chart(pd.DataFrame({"score": [scale * level]}))
            panel += chance.mark_rule(strokeDash=[2, 2]).encode(y=y)
        every.append(panel.properties(title=measure.label, width=220, height=180))
    return alt.concat(*every, columns=3)
