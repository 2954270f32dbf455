"""The figure of a report: what pruning takes next to what it leaves.

Needs altair and vl-convert-python (the extra ``report``).
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from lm_eval_pruned.compare.comparison_table import DIFFERENCES
from lm_eval_pruned.report.curves import slug
from lm_eval_pruned.report.page import Figure, Section
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.results.files import finite_or_none
from lm_eval_pruned.results.groups import (
    FAMILIES,
    LEFT,
    TAKEN,
    UNKNOWN,
    family_of,
    is_perplexity,
    is_share,
    primary_metrics,
    series_of,
)
from lm_eval_pruned.util.figures import RATIO, Plot, line_look, lines, over_ratios


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.results.files import Run

TITLE = "What pruning takes, and what it leaves"
#: What scores are drawn against, by column of the points.
AXES = {"ratio": RATIO, "parameters": "parameters (millions)"}
#: How scores are drawn: file, title, axis and description.
MEASURES = {
    "relative": (
        "capabilities",
        "Scores relative to the unpruned model",
        "relative to unpruned (%)",
        (
            "Perplexities are inverted (unpruned / pruned), so that up is better. Tasks on which the "
            "unpruned model scores 0 are left out."
        ),
    ),
    "raw": (
        "scores",
        "Scores",
        "score (%)",
        (
            "Dashed rules are chance, dotted ones the level of always giving the commonest answer, "
            "where the samples tell. Of perplexities less is better."
        ),
    ),
    "above_chance": (
        "above-chance",
        "What is left above chance",
        "(score − chance) / (unpruned − chance) (%)",
        (
            "The unpruned model is at 100 %, guessing at 0 %. Tasks that it scores less than two "
            "standard errors above chance on are left out."
        ),
    ),
}
#: Levels that a panel has as rules, by column of the points, with their dashes.
_RULES: dict[str, list[float]] = {
    "unpruned": [1, 0],
    "chance": [7, 4],
    "majority": [1.5, 3],
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
    plots = []
    for series, members in series_of(runs).items():
        points = points_of(members, base, comparison, levels)
        if points.empty:
            continue
        for measure, drawn in points.groupby("measure", sort=False):
            if drawn["ratio"].nunique() < 2:
                continue
            name, title, *_ = MEASURES[measure]
            said = _description(drawn, measure, comparison.alpha)
            chart = measure_chart(drawn, measure)
            name, title = f"{name}-{slug(series)}", f"{title} ({series})"
            plots.append(Plot(name, title, said, chart))
    if not plots:
        return None
    scripts = [
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        files(__package__).joinpath("figure.js").read_text("utf-8"),
    ]
    specs = {plot.name: plot.spec for plot in plots}
    figure = Figure(TITLE, json.dumps(specs, ensure_ascii=False), scripts)
    return Section(TITLE, figure=figure, plots=plots)


def _description(points: pd.DataFrame, measure: str, alpha: float) -> str:
    diamonds = (
        "Diamonds are partial scores: the unit stopped when it was decided, score and unpruned "
        "score are of the documents that it used, and the interval holds for stopping. "
    )
    return (
        "One line for each task, from the unpruned model at the left to the smallest at the right. "
        f"Filled points differ significantly from the unpruned model (q < {alpha:g}); of open ones no "
        "difference was shown; crosses were not tested. "
        f"{diamonds * ('partial' in set(points['mark']))}Bands are {1 - alpha:.0%} intervals of the "
        f"paired difference. {MEASURES[measure][-1]}"
    )


def points_of(
    members: Sequence[Run],
    base: Run,
    comparison: Comparison,
    levels: Mapping[tuple[str, str], Levels],
) -> pd.DataFrame:
    """Return what is drawn of one series.

    Args:
        members: The sizes, from the unpruned model down.
        base: The unpruned model.
        comparison: Of the sizes with it.
        levels: Chance and majority by task and metric.

    Returns:
        A row for each task, size and measure: its place on each of `AXES`, ``value`` with ``low`` and
        ``high``, the levels of `_RULES`, and ``told``, the columns of the table of differences.
    """
    sizes = {
        run.name: {
            "ratio": run.expansion_ratio,
            "parameters": finite_or_none(run.pruning.get("parameters_after")),
        }
        for run in members
    }
    points: list[dict[str, Any]] = []
    for task, metric in primary_metrics([base]):
        rows = [
            row
            for row in comparison.rows
            if (row.task, row.metric) == (task, metric)
            and row.run in sizes
            and math.isfinite(row.score)
        ]
        if not rows:
            continue
        unpruned = base.scores[task, metric]
        known = levels.get((task, metric), Levels())
        share = is_share(metric, [unpruned.value, *(row.score for row in rows)])
        family = family_of(task)
        about = {
            "line": task,
            "family": family.name,
            "side": family.side,
            "unit": "%" if share else metric.removesuffix(",none"),
            "falls": unpruned.higher_is_better is False,
            # What is less than two standard errors above chance has nothing to lose.
            "lasts": unpruned.value - (known.chance or 0) > 2 * (unpruned.stderr or 0),
            "chance": known.chance if share else None,
            "majority": known.majority if share else None,
        }
        scored = dict.fromkeys(("base", "score", "low", "high"), unpruned.value)
        told = {column.title: "-" for column in DIFFERENCES}
        told |= {"run": base.name, "task": task, "score": f"{unpruned.value:.4f}"}
        size = sizes.get(base.name, {})
        points.append(about | size | scored | _mark(None) | {"told": told})
        for row in rows:
            # Of a unit that stopped, both scores are of the documents that it used.
            scored = {
                "base": row.base_score,
                "score": row.score,
                "low": row.base_score + (math.nan if row.low is None else row.low),
                "high": row.base_score + (math.nan if row.high is None else row.high),
            }
            told = {column.title: column.text(row) for column in DIFFERENCES}
            points.append(about | sizes[row.run] | scored | _mark(row) | {"told": told})
    if not points:
        return pd.DataFrame()
    found = pd.DataFrame(points)
    numbers = ["parameters", "chance", "majority"]
    found[numbers] = found[numbers].astype(float)
    found["parameters"] /= 1e6
    return pd.concat([_measured(found, measure) for measure in MEASURES])


def _mark(row: Difference | None) -> dict[str, Any]:
    """Return how the point of a row is drawn; None is the unpruned model."""
    if row is None or row.q is None:
        return {"mark": "not tested" if row else "unpruned", "filled": False}
    filled = row.verdict != "not shown"
    mark = "significant" if filled else "no difference shown"
    return {"mark": mark if row.of is None else "partial", "filled": filled}


def _measured(points: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the points that a measure has, with their places and levels by it."""
    base, chance, falls = points["base"], points["chance"], points["falls"]
    shares = points["unit"] == "%"

    def placed(scores: pd.Series) -> pd.Series:
        if measure == "raw":
            return scores.where(~shares, 100 * scores)
        if measure == "relative":
            part = 100 * (base / scores).where(falls, scores / base)
            return part.where(np.isfinite(part) & (part >= 0))
        kept = points["lasts"] & ~falls & (base > chance)
        return (100 * (scores - chance) / (base - chance)).where(kept)

    ends = points[["low", "high"]]
    # The interval of a difference may reach beyond what a share can be.
    ends = ends.where(~shares, ends.clip(0, 1), axis=0).apply(placed)
    rules = {"chance": 100 * chance, "majority": 100 * points["majority"]}
    if measure != "raw":
        floor = 0.0 if measure == "above_chance" else math.nan
        rules = {"unit": "%", "unpruned": 100, "chance": floor, "majority": math.nan}
    found = points.assign(
        measure=measure,
        value=placed(points["score"]),
        low=ends.min(axis=1, skipna=False),
        high=ends.max(axis=1, skipna=False),
        **rules,
    )
    return found.dropna(subset=["value", "ratio"])


def measure_chart(points: pd.DataFrame, measure: str) -> alt.ConcatChart:
    """Draw one measure: a panel for what pruning takes, for what it leaves, and for each unit.

    Args:
        points: Those of the measure, see `points_of`.
        measure: One of `MEASURES`.
    """
    axes = {name: text for name, text in AXES.items() if points[name].nunique() > 1}
    present = set(points["family"])
    families = {each.name: each.label for each in FAMILIES if each.name in present}
    told = pd.DataFrame(list(points["told"]), points.index)
    drawn = ["line", "family", "side", "unit", "mark", "filled", "value", "low", "high"]
    data = points[[*drawn, *AXES, *_RULES]].join(told)
    tasks = {
        task: f"var(--family-{family})"
        for family in families
        for task in data.loc[data["family"] == family, "line"]
    }
    look = line_look(list(tasks), tasks)
    panels = []
    data["side"] = pd.Categorical(data["side"], [TAKEN, LEFT, UNKNOWN])
    for (_, unit), rows in data.groupby(["side", "unit"], observed=True):
        here = [families[name] for name in families if name in set(rows["family"])]
        scale = alt.Scale(type="log" if is_perplexity(unit) else "linear")
        y = alt.Y("value:Q", scale=scale, axis=alt.Axis(tickCount=6, format=".6~r"))
        y = y.title([", ".join(here), MEASURES[measure][2] if unit == "%" else unit])
        rules = [
            alt.Chart(rows)
            .mark_rule(strokeDash=dash, color="var(--edge)")
            .encode(y=f"{level}:Q", tooltip=["line:N", f"{level}:Q"])
            for level, dash in _RULES.items()
            if rows[level].notna().any()
        ]
        chart = lines(rows, over_ratios("place", None), y, look, list(told))
        panels.append(
            alt.layer(*rules, chart, title=_axis_title(axes))
            .transform_calculate(place="datum[axis]")
            .transform_filter("isValid(datum.place)")
            .transform_filter("families == 'all' || datum.family == families")
        )
    chart = alt.concat(*panels, columns=2).add_params(
        _select("axis", "Against ", axes),
        _select("families", "Tasks ", {"all": "all", **families}),
    )
    one = data["unit"].nunique() == 1
    return chart.resolve_scale(y="shared" if one else "independent")


def _select(name: str, label: str, values: Mapping[str, str]) -> alt.Parameter:
    bind = alt.binding_select(
        options=list(values), labels=list(values.values()), name=label
    )
    return alt.param(name=name, value=next(iter(values)), bind=bind)


def _axis_title(axes: Mapping[str, str]) -> alt.Title:
    """Return the title of the horizontal axis; of an axis itself Vega-Lite lets it not change."""
    text = alt.expr(f"{json.dumps(axes)}[axis]")
    return alt.Title(text=text, orient="bottom", fontSize=11, fontWeight="normal")
