"""The figures of a report: as SVG to be put into a page, and as PNG and SVG files.

Needs matplotlib (the extra ``report``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lm_eval_pruned.util.figures import (
    COLOURS,
    INK,
    as_png,
    as_svg,
    line_look,
    over_ratios,
    style,
)


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        label: Entry in the legend.
        x: Expansion ratios.
        y: Values, as many.
        marked: Whether each point is significant: True is drawn filled, False open, and
            None, a point that was not tested, as a cross. Empty where that was not asked.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    marked: Sequence[bool | None] = ()


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Attributes:
        name: Name of its files, without suffix.
        title: Heading.
        description: What it shows, in a sentence or two; the text alternative.
        inline: ``<svg>`` element with transparent ground and text in ``currentColor``.
        svg: SVG file on white ground.
        png: PNG file on white ground, 200 dpi.
    """

    name: str
    title: str
    description: str
    inline: str
    svg: str
    png: bytes


def lines_plot(
    name: str,
    title: str,
    description: str,
    lines: Sequence[Line],
    y_label: str,
    *,
    reference: float | None = None,
    marks: str | None = None,
) -> Plot:
    """Draw lines over the expansion ratio, which falls from left to right.

    Args:
        name: Name of the files.
        title: Heading.
        description: Text alternative.
        lines: The lines.
        y_label: Label of the axis, with its unit.
        reference: Value of a horizontal line, such as the baseline's.
        marks: What filled points mean; None where no line is marked.
    """
    with style(name):
        figure = Figure(figsize=(8, 4.2))
        axes = figure.subplots()
        if reference is not None:
            axes.axhline(reference, color=INK, linewidth=0.8)
        handles = []
        for number, line in enumerate(lines):
            look = line_look(number)
            axes.plot(line.x, line.y, linewidth=1.4, **{**look, "marker": None})
            marked = line.marked or [True] * len(line.x)
            for x, y, significant in zip(line.x, line.y, marked, strict=True):
                point = _point(look["marker"], look["color"], significant)
                axes.plot(
                    x, y, markersize=6, linestyle="none", color=look["color"], **point
                )
            handles.append(Line2D([], [], label=line.label, **look))
        if marks is not None:
            meanings = {True: marks, False: "no difference shown", None: "not tested"}
            drawn = {mark for line in lines for mark in line.marked}
            handles += [
                Line2D([], [], linestyle="none", label=label, **_point("o", INK, mark))
                for mark, label in meanings.items()
                if mark is not None or mark in drawn
            ]
        over_ratios(axes, [x for line in lines for x in line.x])
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=INK, alpha=0.15)
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
        return finished_plot(figure, name, title, description)


def _point(marker: str, colour: str, significant: bool | None) -> dict[str, Any]:
    """Return how a point is drawn that is significant, is not, or was not tested."""
    return {
        "marker": "x" if significant is None else marker,
        "markeredgecolor": colour,
        "markerfacecolor": colour if significant else "none",
    }


def scatter_plot(
    name: str,
    title: str,
    description: str,
    points: Sequence[tuple[float, float, str]],
    x_label: str,
    y_label: str,
    caption: str,
) -> Plot:
    """Draw labelled points, joined in their order.

    Args:
        name: Name of the files.
        title: Heading.
        description: Text alternative.
        points: x, y and label of each, from the baseline down.
        x_label: Label of the axis, with its unit.
        y_label: Label of the axis, with its unit.
        caption: Written above the points.
    """
    with style(name):
        figure = Figure(figsize=(6, 4.2))
        axes = figure.subplots()
        x, y, labels = zip(*points, strict=True)
        axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=0.5)
        axes.plot(x, y, color=COLOURS[0], marker="o", linestyle="none")
        for place in zip(x, y, labels, strict=True):
            axes.annotate(
                place[2],
                place[:2],
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8,
            )
        axes.margins(0.12)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(caption, fontsize=9, loc="left")
        axes.grid(color=INK, alpha=0.15)
        return finished_plot(figure, name, title, description)


def finished_plot(figure: Figure, name: str, title: str, description: str) -> Plot:
    """Return a figure as the files and the element that a report takes."""
    return Plot(
        name,
        title,
        description,
        _inline(as_svg(figure, transparent=True), name),
        as_svg(figure),
        as_png(figure),
    )


def _inline(svg: str, name: str) -> str:
    """Return the ``<svg>`` element alone, in the page's colours and with ids of its own."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(INK, "currentColor", svg, flags=re.IGNORECASE)
    for number, colour in enumerate(COLOURS):
        svg = re.sub(colour, f"var(--line-{number})", svg, flags=re.IGNORECASE)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    # The page scales it, up to the size that gives its text the page's size.
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    return re.sub(
        r'<svg([^>]*?) width="[^"]*"',
        rf'<svg aria-hidden="true" style="max-width: {width / 11:.0f}rem"\1',
        svg,
        count=1,
    )


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "all"
