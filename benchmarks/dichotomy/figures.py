"""Scores over sizes, by criterion and by chance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from dichotomy.steps import CRITERIA, MODELS, UNIFORM
from dichotomy.tables import MEASURES
from dichotomy.words import Cells, Tables, grouped, number
from lm_eval_pruned.util.figures import as_svg, line_look, style


if TYPE_CHECKING:
    from collections.abc import Sequence

#: What is no criterion has no colour.
BY_CHANCE = {"color": "0.35", "marker": "o", "linestyle": "--"}


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
            with style(name):
                drawings[name] = as_svg(panels(by_task))
    return drawings


def panels(by_task: dict[str, list[Cells]]) -> Figure:
    """Return a panel for each task; a method looks the same in all of them."""
    order = [task for task in MEASURES if task in by_task]
    across, down = min(3, len(order)), -(-len(order) // 3)
    figure = Figure(figsize=(2.9 * across, 2.6 * down + 0.4))
    every = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in every[len(order) :]:
        axes.remove()
    names: dict[str, Any] = {}
    for axes, task in zip(every, order, strict=False):
        rows = by_task[task]
        scale = 100 if MEASURES[task].share else 1
        base = [row for row in rows if row["method"] == "unpruned"]
        methods = {row["method"] for row in rows}
        for line, method in enumerate(CRITERIA):
            if method in methods:
                look = BY_CHANCE if method == "random" else line_look(line)
                names[method] = _line(axes, base, rows, method, look, scale)
        level = number(base[0], "chance") if base else None
        if level is not None:
            axes.axhline(scale * level, color="gray", linewidth=0.8, linestyle=":")
        low, high = axes.get_ylim()
        if MEASURES[task].share and high - low < 1:
            axes.set_ylim(max(low - 1, -0.1), high + 1)
        axes.set_title(MEASURES[task].label, loc="left", fontsize=9)
        axes.set_xlabel("neurons removed, %")
        axes.grid(axis="y", alpha=0.2)
    shown = [method for method in CRITERIA if method in names]
    lines = [names[method] for method in shown]
    figure.legend(lines, shown, loc="outside lower center", ncols=len(shown))
    return figure


def _line(
    axes, base: Sequence[Cells], rows: Sequence[Cells], method: str, look, scale: float
) -> Any:
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
    return axes.errorbar(
        sizes, means, yerr=spread, markersize=3, capsize=2, label=method, **look
    )
