"""The figure of a report: what pruning takes next to what it leaves, with its controls.

Needs vl-convert-python (the extra ``report``), which carries Vega-Lite: what draws the
figure in a browser stands in the page itself, and draws its SVG and PNG files too.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import vl_convert

from lm_eval_pruned.report.figure_data import AXES, MEASURES, curves_of
from lm_eval_pruned.report.figure_spec import LABELS, panels_of
from lm_eval_pruned.report.page import Figure, Section
from lm_eval_pruned.report.plots import Plot, slug
from lm_eval_pruned.results.groups import FAMILIES, series_of
from lm_eval_pruned.util.palette import variables


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.report.figure_data import Curves
    from lm_eval_pruned.report.figure_spec import Panel
    from lm_eval_pruned.results.documents import Levels
    from lm_eval_pruned.results.files import Run

#: Width of a panel in a file, in pixels.
_WIDTH = 330
#: What is beside a panel: its axis, and the names of its tasks.
_MARGINS = 62 + LABELS
#: Files and titles of the measures.
_FILES = {
    "relative": ("capabilities", "Scores relative to the unpruned model"),
    "raw": ("scores", "Scores"),
    "above_chance": ("above-chance", "What is left above chance"),
}


def figure_section(
    base: Run,
    runs: Sequence[Run],
    comparison: Comparison,
    levels: Mapping[tuple[str, str], Levels],
) -> Section | None:
    """Return the figure over all series of sizes, with one file for each series and measure.

    Args:
        base: The unpruned model.
        runs: All runs.
        comparison: Of the runs with the unpruned model.
        levels: Chance and majority of the unpruned model, by task and metric.
    """
    series: dict[str, Any] = {}
    plots, notes, families, axes = [], [], set(), set()
    partial = False
    for name, members in series_of(runs).items():
        curves = curves_of(members, base, comparison, levels)
        if not curves.axes():
            continue
        panels = {measure: panels_of(curves, measure) for measure in MEASURES}
        series[name] = {
            "points": curves.points,
            "panels": {
                measure: [{"title": each.title, "specs": each.specs} for each in found]
                for measure, found in panels.items()
            },
        }
        families |= set(curves.families())
        axes |= set(curves.axes())
        notes += curves.notes
        partial = partial or curves.partial()
        for measure, found in panels.items():
            if found:
                plots.append(_plot(name, measure, found, curves, comparison.alpha))
    if not series:
        return None
    first = next(iter(series.values()))
    drawn = [
        measure
        for measure in MEASURES
        if any(each["panels"][measure] for each in series.values())
    ]
    shown = {
        family.name: family.label for family in FAMILIES if family.name in families
    }
    figure = Figure(
        "What pruning takes, and what it leaves",
        _description(comparison.alpha, partial),
        {
            "measure": ("Scores", {name: _MEASURES[name] for name in drawn}),
            "axis": (
                "Against",
                {name: AXES[name].split(" (")[0] for name in AXES if name in axes},
            ),
            "series": ("Pruned by", {name: name for name in series}),
        },
        shown,
        json.dumps(
            {"series": series, "margins": _MARGINS}, ensure_ascii=False, allow_nan=False
        ),
        [
            (panel["title"], _svg(next(iter(panel["specs"].values())), first["points"]))
            for panel in first["panels"][drawn[0]]
        ],
        [
            vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
            files(__package__).joinpath("figure.js").read_text("utf-8"),
        ],
    )
    return Section(
        figure.title, figure=figure, plots=plots, notes=list(dict.fromkeys(notes))
    )


_MEASURES = {
    "relative": "relative to unpruned",
    "raw": "as they are",
    "above_chance": "above chance, relative to unpruned",
}


def _description(alpha: float, partial: bool) -> str:
    diamonds = (
        "Diamonds are partial scores: the unit stopped when it was decided, score and unpruned "
        "score are of the documents that it used, and the interval holds for stopping. "
    )
    return (
        "One line for each task, from the unpruned model at the left to the smallest at the right. Filled points differ "
        f"significantly from the unpruned model (q < {alpha:g}); of open ones no difference was shown; crosses "
        f"were not tested. {diamonds * partial}Bands are {1 - alpha:.0%} intervals of the paired difference. Dashed rules "
        "are chance, dotted ones the level of always giving the commonest answer, where the samples "
        "tell. Relative to unpruned, perplexities are inverted (unpruned / pruned), so that up is better; "
        "as they are, less is better, and the axis may be logarithmic."
    )


def _svg(spec: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    drawn = vl_convert.vegalite_to_svg(
        {**spec, "width": _WIDTH, "datasets": {"points": points}}
    )
    return drawn[drawn.index("<svg") :]


def _plot(
    series: str,
    measure: str,
    panels: Sequence[Panel],
    curves: Curves,
    alpha: float,
) -> Plot:
    """Return a measure over the expansion ratio as files, in the colours of paper."""
    axis = next(iter(panels[0].specs))
    name, title = _FILES[measure]
    shared = {
        key: panels[0].specs[axis][key] for key in ("$schema", "params", "config")
    }
    spec = {
        **shared,
        "config": {**shared["config"], "background": "var(--ground)"},
        "title": {
            "text": f"{title} ({series})",
            "subtitle": [
                f"filled: significant (q < {alpha:g}); open: not shown; crosses: not tested",
                *(["diamonds: partial, stopped when decided"] * curves.partial()),
                f"bands: {1 - alpha:.0%} interval of the paired difference",
                *(["dashed: chance; dotted: commonest answer"] * (measure == "raw")),
            ],
            "anchor": "start",
            "color": "var(--ink)",
            "subtitleColor": "var(--quiet)",
        },
        "datasets": {"points": curves.points},
        "hconcat": [
            {
                key: value
                for key, value in panel.specs[axis].items()
                if key not in shared
            }
            | {
                "width": _WIDTH,
                "title": {
                    "text": panel.title,
                    "anchor": "start",
                    "color": "var(--ink)",
                    "frame": "group",
                },
            }
            for panel in panels
        ],
    }
    # Among several panels, each is as wide as it is told and not as the whole is.
    text = re.sub(r'"width( \+ \d+)?"}', rf'"{_WIDTH}\1"}}', json.dumps(spec))
    for variable, colour in variables("light").items():
        text = text.replace(f"var(--{variable})", colour)
    svg = vl_convert.vegalite_to_svg(text)
    return Plot(
        f"{name}-{slug(series)}",
        f"{title} ({series})",
        _description(alpha, curves.partial()),
        "",
        svg,
        vl_convert.vegalite_to_png(text, scale=2),
    )
