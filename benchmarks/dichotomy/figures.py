"""Scores over sizes, by criterion and by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from dichotomy.steps import MODELS, UNIFORM
from dichotomy.tables import MEASURES
from dichotomy.words import Cells, Tables, grouped, number
from lm_eval_pruned.util.figures import as_svg, line_look, style


if TYPE_CHECKING:
    from collections.abc import Sequence


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
            name = f"scores-{model}.svg"
            drawings[name] = _draw(name, by_task)
    return drawings


def _draw(name: str, by_task: dict[str, list[Cells]]) -> str:
    order = [task for task in MEASURES if task in by_task]
    with style(name):
        figure = Figure(figsize=(2.9 * min(3, len(order)), 2.6 * -(-len(order) // 3)))
        every = figure.subplots(-(-len(order) // 3), min(3, len(order)), squeeze=False)
        panels = list(every.flat)
        for axes in panels[len(order) :]:
            axes.remove()
        for axes, task in zip(panels, order, strict=False):
            rows = by_task[task]
            scale = 100 if MEASURES[task].share else 1
            base = [row for row in rows if row["method"] == "unpruned"]
            methods = sorted({row["method"] for row in rows} - {"unpruned"})
            for line, method in enumerate(methods):
                _line(axes, base, rows, method, line_look(line), scale)
            level = number(base[0], "chance") if base else None
            if level is not None:
                axes.axhline(scale * level, color="gray", linewidth=0.8, linestyle=":")
            axes.set_title(MEASURES[task].label, loc="left", fontsize=9)
            axes.set_xlabel("neurons removed, %")
            axes.grid(axis="y", alpha=0.2)
        panels[0].legend(fontsize=7)
        return as_svg(figure)


def _line(
    axes, base: Sequence[Cells], rows: Sequence[Cells], method: str, look, scale: float
) -> None:
    """Draw the means over seeds, and bars from the lowest seed to the highest."""
    values: dict[float, list[float]] = {}
    for row in (*base, *(row for row in rows if row["method"] == method)):
        score = number(row, "score")
        if score is not None:
            values.setdefault(float(row["percent"]), []).append(scale * score)
    sizes = sorted(values)
    means = [sum(values[size]) / len(values[size]) for size in sizes]
    spread = [
        [mean - min(values[size]) for size, mean in zip(sizes, means, strict=True)],
        [max(values[size]) - mean for size, mean in zip(sizes, means, strict=True)],
    ]
    axes.errorbar(
        sizes, means, yerr=spread, markersize=3, capsize=2, label=method, **look
    )
