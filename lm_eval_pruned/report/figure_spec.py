"""The figure of a report as Vega-Lite: one specification for each panel, measure and axis.

Colours are the variables of the page, such as ``var(--ink)``, so that one drawing suits
light, dark and print; a file of its own gets them filled in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.figure_data import (
    AXES,
    MEASURES,
    NOT_SHOWN,
    NOT_TESTED,
    PARTIAL,
    SIGNIFICANT,
)
from lm_eval_pruned.report.figure_labels import (
    HEIGHT,
    LINE,
    levels_of_panel,
    names_of,
    rules_of,
)
from lm_eval_pruned.results.groups import FAMILIES, LEFT, TAKEN, UNKNOWN


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.report.figure_data import Curves

#: Room to the right of a panel for the names of its tasks.
LABELS = 140
_DASHES: tuple[Sequence[int], ...] = ([], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 6])
_CROSS = "M-.6,-.6L.6,.6M-.6,.6L.6,-.6"
#: Larger than Vega's own, so that it is told from a circle at a glance.
_DIAMOND = "M0,-1.5L1.3,0L0,1.5L-1.3,0Z"
#: Leaves what belongs to a family that is chosen, or to none.
_SHOWN = (
    "isValid(datum.family) ? indexof(shown, datum.family) >= 0 : !isValid(datum.families)"
    " || length(shown) && test(regexp(join(shown, '|')), datum.families)"
)
#: What a reader is told who points at a point, by key in the points.
_TOLD = {
    "configuration": "configuration",
    "metric": "metric",
    "score": "score",
    "difference": "difference",
    "interval": "interval of it",
    "q": "q",
    "detectable": "smallest detectable",
    "n": "documents (n)",
    "mark": "verdict",
}


@dataclass(frozen=True)
class Panel:
    """One panel, for each axis.

    Attributes:
        title: The families in it.
        specs: Vega-Lite specifications by axis, without width; the data ``points`` is left
            to whoever draws it.
    """

    title: str
    specs: dict[str, dict[str, Any]]


def panels_of(curves: Curves, measure: str) -> list[Panel]:
    """Return the panels of one measure: what pruning takes, what it leaves, and the rest.

    Scores in different units are drawn in different panels.

    Args:
        curves: What is drawn.
        measure: One of `figure_data.MEASURES`.
    """
    drawn = [point for point in curves.points if measure in point]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for side in (TAKEN, LEFT, UNKNOWN):
        for point in drawn:
            if point["side"] == side:
                unit = point["unit"] if measure == "raw" else "%"
                groups.setdefault((side, unit), []).append(point)
    shared = {unit: _domain(drawn, groups, unit, measure, curves) for _, unit in groups}
    panels = []
    for (side, unit), points in groups.items():
        families = [
            family.label
            for family in FAMILIES
            if family.name in {point["family"] for point in points}
        ]
        levels = [
            level
            for level in curves.levels
            if level["side"] == side and level.get(measure) is not None
            if measure != "raw" or level["unit"] == unit
        ]
        specs = {
            axis: _spec(points, levels, measure, unit, axis, shared[unit])
            for axis in curves.axes()
        }
        panels.append(Panel(", ".join(families), specs))
    return panels


def _domain(
    drawn: Sequence[dict[str, Any]],
    groups: dict[tuple[str, str], list[dict[str, Any]]],
    unit: str,
    measure: str,
    curves: Curves,
) -> tuple[float, float]:
    """Return what the vertical axis spans: the same in all panels of a unit, 0 included."""
    points = [each for (_, of), those in groups.items() if of == unit for each in those]
    values = [point[measure] for point in points]
    span = max(values) - min(values) or 1.0
    # An interval that is wider than everything that was seen is cut off.
    ends = [
        min(max(point[f"{measure}{end}"], min(values) - span), max(values) + span)
        for point in points
        for end in ("_low", "_high")
        if f"{measure}{end}" in point
    ]
    levels = [each[measure] for each in curves.levels if each.get(measure) is not None]
    if unit != "%":
        low, high = min([*values, *ends]), max([*values, *ends])
        room = (high / low) ** 0.05 if low > 0 else 1.0
        return low / room, high * room
    top = max([*values, *ends, *levels, *([] if measure == "raw" else [100])])
    return min([0.0, *values, *ends]), top + 0.03 * abs(top)


def _spec(
    points: Sequence[dict[str, Any]],
    levels: Sequence[dict[str, Any]],
    measure: str,
    unit: str,
    axis: str,
    domain: tuple[float, float],
) -> dict[str, Any]:
    low, high = domain
    logarithmic = unit != "%" and low > 0 and high / low > 20
    title = MEASURES[measure] + (f" ({unit})" if unit == "%" else f": {unit}")
    places = sorted({point[axis] for point in points if point[axis] is not None})
    y = {
        "field": measure,
        "type": "quantitative",
        "scale": {
            "domain": [low, high],
            "nice": False,
            "zero": False,
            "type": "log" if logarithmic else "linear",
        },
        "axis": {"title": title, "tickCount": 6, "format": ".6~r", "grid": True},
    }
    x = {
        "field": axis,
        "type": "quantitative",
        "scale": {
            "domain": [places[0], places[-1]],
            "reverse": True,
            "nice": False,
            "zero": False,
            "padding": 8,
        },
        "axis": {
            "title": AXES[axis],
            "grid": False,
            "labelOverlap": "greedy",
            "labelSeparation": 4,
            **(
                {"values": places, "format": ".2f"}
                if axis == "ratio"
                else {"tickCount": 4, "format": ".4~r"}
            ),
        },
    }
    tasks = list(dict.fromkeys(point["task"] for point in points))
    colour = {
        "field": "family",
        "type": "nominal",
        "legend": None,
        "scale": {
            "domain": [family.name for family in FAMILIES],
            "range": [f"var(--family-{family.name})" for family in FAMILIES],
        },
    }
    dash = {
        "field": "task",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": tasks, "range": _dashes(points, tasks)},
    }
    place = {"x": x, "y": y}
    detail = {"field": "task", "type": "nominal"}
    ends = [f"datum.{measure}_{end}" for end in ("low", "high")]
    cut = f"clamp({{}}, {json.dumps(low)}, {json.dumps(high)})"
    interval = {
        "transform": [
            {"filter": f"isValid({ends[0]}) && isValid({ends[1]})"},
            {"calculate": cut.format(ends[0]), "as": "from"},
            {"calculate": cut.format(ends[1]), "as": "to"},
        ],
        # Where sizes are not in the order of their cost, a band would fold over itself.
        "mark": {"type": "area", "opacity": 0.16}
        if axis in ("ratio", "parameters")
        else {"type": "rule", "opacity": 0.6},
        "encoding": {
            "x": x,
            "y": y | {"field": "from"},
            "y2": {"field": "to"},
            "color": colour,
            "detail": detail,
        },
    }
    line = {
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {
            **place,
            "color": colour,
            "strokeDash": dash,
            "order": {"field": "ratio", "type": "quantitative", "sort": "descending"},
        },
    }
    shapes = {
        SIGNIFICANT: "circle",
        NOT_SHOWN: "circle",
        NOT_TESTED: _CROSS,
        PARTIAL: _DIAMOND,
    }
    marks = {
        "transform": [{"filter": {"field": "shape", "oneOf": list(shapes)}}],
        "mark": {"type": "point", "size": 46, "strokeWidth": 1.6, "opacity": 1},
        "encoding": {
            **place,
            "stroke": colour,
            "fill": {
                "condition": {"test": f"datum.mark === '{SIGNIFICANT}'", **colour},
                "value": "var(--ground)",
            },
            "shape": {
                "field": "shape",
                "type": "nominal",
                "legend": None,
                "scale": {"domain": list(shapes), "range": list(shapes.values())},
            },
        },
    }
    pointed = {
        "mark": {
            "type": "point",
            "size": 400,
            "opacity": 0,
            "filled": True,
            "color": "var(--ink)",
        },
        "encoding": {
            **place,
            "tooltip": [
                {"field": "task", "title": "title"},
                {"field": axis, "title": AXES[axis].split(" (")[0], "format": ".4~r"},
                *({"field": key, "title": text} for key, text in _TOLD.items()),
            ],
        },
    }
    names = names_of(points, measure, domain, logarithmic)
    leader = {
        "data": {"values": names},
        "mark": {"type": "rule", "opacity": 0.6, "strokeWidth": 0.8},
        "encoding": {
            **place,
            "x2": {"value": {"expr": "width + 12"}},
            "y2": {"field": "label"},
            "color": colour,
        },
    }
    name = {
        "data": {"values": names},
        "mark": {
            "type": "text",
            "align": "left",
            "dx": 15,
            "limit": LABELS - 15,
            "fontSize": 11,
            "lineHeight": LINE,
            "baseline": "middle",
        },
        "encoding": {
            "x": {"value": {"expr": "width"}},
            "y": y | {"field": "first"},
            "text": {"field": "lines"},
            "color": colour,
        },
    }
    shown = [*rules_of(measure, y), interval, line, leader, name, marks]
    shown += [*levels_of_panel(levels, measure, y), pointed]
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "height": HEIGHT,
        "params": [{"name": "shown", "value": [family.name for family in FAMILIES]}],
        "data": {"name": "points"},
        "transform": [
            {"filter": _of(points, measure, unit)},
            {"filter": f"isValid(datum.{axis}) && isValid(datum.{measure})"},
        ],
        "layer": [
            layer
            | {
                "transform": [
                    {"filter": _SHOWN},
                    *layer.get("transform", ()),
                ]
            }
            for layer in shown
        ],
        "resolve": {"scale": {"strokeDash": "independent"}},
        "config": _LOOK,
    }


def _of(points: Sequence[dict[str, Any]], measure: str, unit: str) -> str:
    """Return the filter that leaves the points of one panel."""
    wanted = [f"datum.side === {json.dumps(points[0]['side'])}"]
    if measure == "raw":
        wanted.append(f"datum.unit === {json.dumps(unit)}")
    return " && ".join(wanted)


def _dashes(
    points: Sequence[dict[str, Any]], tasks: Sequence[str]
) -> list[Sequence[int]]:
    """Return how the line of each task is broken: no two of a family alike."""
    family = {point["task"]: point["family"] for point in points}
    seen: dict[str, int] = {}
    dashes: list[Sequence[int]] = []
    for task in tasks:
        number = seen.get(family[task], 0)
        seen[family[task]] = number + 1
        dashes.append(_DASHES[number % len(_DASHES)] or [1, 0])
    return dashes


_LOOK = {
    "font": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink)",
        "domainColor": "var(--edge)",
        "tickColor": "var(--edge)",
        "gridColor": "var(--line)",
        "gridOpacity": 0.6,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
}
