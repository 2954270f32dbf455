"""The figures of reports, profiles and documentation: Altair charts as files and for a page.

Colours are the variables of a page, such as ``var(--ink)``, so that one chart suits light and
dark; files get the light ones. Needs altair and vl-convert-python (the extra ``report``).
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import altair as alt
import vl_convert

from lm_eval_pruned.util.palette import FAMILIES, VARIABLES


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

RATIO = "expansion ratio (intermediate size / hidden size)"
HUES = tuple(f"var(--family-{name})" for name in FAMILIES)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 6])
#: Shapes of points.
MARKS = {
    "tested": "circle",
    "not tested": "M-.8,-.8L.8,.8M-.8,.8L.8,-.8",
}
_INK = {"color": "var(--ink)"}
_TEXT = {"labelColor": "var(--ink)", "titleColor": "var(--ink)"}
_EDGE = {"domainColor": "var(--edge)", "tickColor": "var(--edge)"}
_LOOK = {
    "font": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif",
    "background": "transparent",
    "view": {"stroke": None, "continuousWidth": 360, "continuousHeight": 280},
    "title": _INK | {"subtitleColor": "var(--quiet)"},
    "axis": _TEXT | _EDGE | {"gridColor": "var(--line)", "titleFontWeight": "normal"},
    "axisX": {"grid": False, "labelOverlap": "greedy", "labelSeparation": 4},
    "header": _TEXT,
    "legend": _TEXT
    | {"labelLimit": 0, "symbolSize": 300, "symbolType": "stroke", "symbolOpacity": 1}
    | {"columns": 3, "orient": "bottom"},
    **dict.fromkeys(("mark", "text", "rule"), _INK),
}


def _svg(spec: dict[str, Any] | str) -> str:
    """Return a chart as SVG, with clips numbered from 0: the renderer counts them over a process."""
    svg = vl_convert.vegalite_to_svg(spec)
    clips = dict.fromkeys(re.findall(r"\bclip\d+\b", svg))
    names = {name: f"clip{number}" for number, name in enumerate(clips)}
    return re.sub(r"\bclip\d+\b", lambda match: names[match[0]], svg)


@dataclass(frozen=True)
class Plot:
    """A finished figure.

    Attributes:
        name: Name of its files, without suffix.
        description: What it shows, in a sentence or two; the text alternative.
    """

    name: str
    title: str
    description: str
    chart: alt.TopLevelMixin

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The chart as Vega-Lite."""
        with alt.data_transformers.enable("default", max_rows=None):
            return self.chart.to_dict() | {"config": _LOOK}

    @cached_property
    def inline(self) -> str:
        """An ``<svg>`` element in the colours of its page, with ids that no other plot has."""
        svg = _svg(self.spec)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        return svg[svg.index("<svg") :].replace("<svg", '<svg aria-hidden="true"', 1)

    @property
    def svg(self) -> str:
        """An SVG file on white ground."""
        return _svg(self._on_ground("light"))

    @property
    def dark_svg(self) -> str:
        """An SVG file on dark ground."""
        return _svg(self._on_ground("dark"))

    @property
    def png(self) -> bytes:
        """A PNG file on white ground."""
        return vl_convert.vegalite_to_png(self._on_ground("light"), scale=2)

    def files(self, folder: str = "") -> dict[str, str | bytes]:
        """Return both files by their names in a folder."""
        path = f"{folder}{self.name}"
        return {f"{path}.svg": self.svg, f"{path}.png": self.png}

    def _on_ground(self, colours: str) -> str:
        below = textwrap.wrap(self.description, 90)
        title = {"text": self.title, "subtitle": below, "anchor": "start"}
        config = _LOOK | {"background": "var(--ground)"}
        text = json.dumps(self.spec | {"title": title, "config": config})
        for name, colour in VARIABLES[colours].items():
            text = text.replace(f"var(--{name})", colour)
        return text


def over_ratios(field: str = "ratio") -> alt.X:
    """Return a horizontal axis that falls to the right, as expansion ratios do."""
    scale = alt.Scale(reverse=True, zero=False, nice=False, padding=8)
    axis = alt.Axis(tickCount=6, format=".4~r", title=RATIO)
    return alt.X(field, type="quantitative", scale=scale, axis=axis)


def line_look(
    names: Sequence[str], hues: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return colour and dash of each value of the column ``line``, no two alike, and one legend.

    Colours come from `hues`, by name, or else one after the other.
    """
    colours: list[str] = []
    dashes: list[list[int]] = []
    for n, name in enumerate(names):
        colour = hues[name] if hues else HUES[n % len(HUES)]
        dashes.append(DASHES[(colours.count(colour) if hues else n) % len(DASHES)])
        colours.append(colour)
    by_colour = alt.Scale(domain=list(names), range=colours)
    by_dash = alt.Scale(domain=list(names), range=dashes)
    return {
        "color": alt.Color("line:N", scale=by_colour, title=None),
        "strokeDash": alt.StrokeDash("line:N", scale=by_dash, title=None),
    }


def lines(
    data: pd.DataFrame,
    x: alt.X,
    y: alt.Y,
    look: Mapping[str, Any],
    tooltip: Sequence[Any] = (),
) -> alt.LayerChart | alt.FacetChart:
    """Draw a line with points for each value of the column ``line``.

    In `data`, ``low`` and ``high`` may be the ends of an interval of y, and ``mark``, one of `MARKS`,
    with ``filled`` says how a point is drawn. `look` is that of `line_look`; `tooltip` are columns
    that are shown where a reader points at a point.
    """
    hue = look["color"]
    chart = alt.Chart().encode(x=x, color=hue)
    line = chart.mark_line(strokeWidth=1.8)
    points = chart.mark_point(size=46, strokeWidth=1.6, opacity=1)
    points = points.encode(y=y, fill=hue)
    if "mark" in data:
        shapes = alt.Scale(domain=list(MARKS), range=list(MARKS.values()))
        drawn = alt.FieldOneOfPredicate(field="mark", oneOf=list(MARKS))
        ground = alt.value("var(--ground)")
        points = points.transform_filter(drawn).encode(
            shape=alt.Shape("mark:N", scale=shapes, legend=None),
            stroke=hue,
            fill=alt.when("datum.filled").then(hue).otherwise(ground),
        )
    layers = [line.encode(y=y, strokeDash=look["strokeDash"]), points]
    if "low" in data:
        ends = y.copy()
        ends.shorthand = "low:Q"
        band = chart.mark_area(opacity=0.16, clip=True).encode(
            y=ends, y2="high", detail="line:N"
        )
        known = "isValid(datum.low) && isValid(datum.high)"
        layers.insert(0, band.transform_filter(known))
    if tooltip:
        pointed = alt.Chart().mark_point(size=400, opacity=0, filled=True)
        layers.append(pointed.encode(x=x, y=y, tooltip=list(tooltip)))
    return alt.layer(*layers, data=data)
