"""The figures of a report: over expansion ratios what pruning takes and leaves, over layers what it costs.

Needs altair and vl-convert-python (the extra ``report``).
"""

from __future__ import annotations

import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from lm_eval_pruned.compare.claims import Kept
from lm_eval_pruned.compare.comparison_table import (
    CORRELATIONS,
    DIFFERENCES,
    table_of,
)
from lm_eval_pruned.pruning.curves import VERSION, Sensitivity
from lm_eval_pruned.report.page import Section
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.groups import (
    FAMILIES,
    SIDES,
    family_of,
    is_control,
    primary_metrics,
    series_name,
    series_of,
)
from lm_eval_pruned.results.metrics import is_loss, is_perplexity, is_share
from lm_eval_pruned.results.runs import SENSITIVITY
from lm_eval_pruned.util.figures import HUES, Plot, line_look, lines, over_ratios


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults

#: How scores are drawn: file, title, axis and description.
MEASURES = {
    "raw": (
        "scores",
        "Scores",
        "score (%)",
        "Lower perplexities are better.",
    ),
    "kept": (
        "kept",
        "What is kept",
        "kept: (score − floor) / (unpruned − floor) (%)",
        (
            "The unpruned model is at 100 %, the floor at 0 %. "
            "Tasks on which the unpruned model is not shown to be above the floor are left out: they "
            "cannot show a loss. Text has no floor, so its loss has a panel in nats. Thin lines are "
            "random cuts."
        ),
    ),
}
#: What a reader sees who points at a point.
TOOLTIP = [column.title for column in DIFFERENCES]
#: Levels that a panel has as rules, by column of the points, with their dashes.
_RULES: dict[str, list[float]] = {
    "unpruned": [1, 0],
    (FLOOR := "highest floor"): [7, 2, 1.5, 2],
}
#: The unit of a text's loss above that of the unpruned model.
NATS = "more loss than unpruned (nats)"
NATS_OF_BYTES = "more loss than unpruned (nats per byte)"
#: Tasks that represent knowledge and truthfulness, those of the study first.
KNOWLEDGE = ("mmlu", "gsm8k", "arc_challenge", "boolq", "lambada_openai", "wikitext")
TRUTHFULNESS = ("truthfulqa_mc2", "truthfulqa_mc1", "pruned_demo_truthfulness")
#: Costs below this, in nats per token, are drawn on a linear scale, greater ones on a
#: logarithmic one: one layer can cost a hundred times as much as another.
LINEAR = 0.02


def figure_section(
    base: Run, runs: Sequence[Run], comparison: Comparison
) -> Section | None:
    """Return the figure over all series of sizes, with one file for each series and measure."""
    plots = []
    controls = [run for run in runs if is_control(run)]
    for series, members in series_of(runs).items():
        beside = [] if is_control(members[-1]) else controls
        points = points_of([*members, *beside], base, comparison)
        for measure, (file, title, _, more) in MEASURES.items():
            drawn, keeps = points[points["measure"] == measure], measure == "kept"
            if not keeps:
                drawn = drawn[drawn["control"] == ""]
            # Text alone has no share that is kept.
            lacks = keeps and "%" not in {*drawn["unit"]}
            if lacks or drawn["ratio"].nunique() < 2:
                continue
            name, text = (
                f"{file}-{slug(series)}",
                f"{_caption(comparison, keeps)} {more}",
            )
            chart = measure_chart(drawn, measure)
            plots.append(Plot(name, f"{title} ({series})", text, chart))
    scripts = [
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"),
        files(__package__).joinpath("figure.js").read_text("utf-8"),
    ]
    heading = "What pruning takes, and what it leaves"
    return Section(heading, plots=plots, scripts=scripts) if plots else None


def _caption(comparison: Comparison, keeps: bool) -> str:
    text = (
        "One line for each task, from the unpruned model at the left to the smallest at the right. "
        f"Filled points differ significantly from the unpruned model (q < {comparison.alpha:g}); open "
        "points show no difference; crosses were not tested. "
        f"Bands are {1 - comparison.alpha:.0%} intervals of "
    )
    cut = "; they are cut off where they reach far beyond the lines."
    if keeps:
        return f"{text}single tests{cut}"
    text += f"the paired difference{cut}"
    if comparison.floors:
        text += (
            " Dash-dotted lines, in the colours of the tasks, are floors: the best scores without "
            "knowledge."
        )
    primary = [floor for floor in comparison.floors if floor.primary]
    if low := [floor.task for floor in primary if floor.above_floor is False]:
        text += (
            f" The unpruned model is not shown to be above that of {', '.join(low)}."
        )
    return text


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "all"


def points_of(
    members: Sequence[Run], base: Run, comparison: Comparison
) -> pd.DataFrame:
    """Return what is drawn of one series, in a row for each task, size and measure.

    Columns are ``ratio``, ``value`` with ``low`` and ``high``, the levels of `_RULES`, those of
    the table of differences, and ``control``, the name of a random series among others; else empty.
    """
    ratios = {run.name: run.expansion_ratio for run in members}
    random = {run.name: series_name(run) for run in members if is_control(run)}
    if len(random) == sum(not run.is_baseline for run in members):
        random = {}
    points: list[dict[str, Any]] = []
    finite = [r for r in comparison.rows if r.run in ratios and math.isfinite(r.score)]
    for key in primary_metrics([base]):
        rows = [row for row in finite if (row.task, row.metric) == key]
        if not rows:
            continue
        unpruned, family = base.scores[key].value, family_of(key[0], base.metadata)
        share = is_share(*key, base.metadata.get(key[0]))
        unit = "%" if share else key[1].removesuffix(",none")
        standing = next((row.floor for row in rows if row.floor), None)
        named = {"run": base.name, "task": key[0], "score": f"{unpruned:.4f}"}
        look: dict[str, Any] = {"mark": "unpruned", "filled": False}
        floor = standing.floor if standing else None
        above = standing is not None and standing.base_above_floor
        kept = Kept(1.0, 1.0, 1.0) if above else None
        drawn = [(named | look, [unpruned] * 3, kept)]
        for row in rows:
            named = {column.title: column.cell(row).text for column in DIFFERENCES}
            look = {
                "mark": "not tested" if row.q is None else "tested",
                "filled": row.verdict in ("better", "worse", "different"),
            }
            ends = row.base_score + np.array([row.low, row.high], dtype=float)
            kept = row.floor.kept if row.floor else None
            drawn.append((named | look, [row.score, *ends], kept))
        about = {"line": key[0], "family": family.name, "side": family.side}
        points += [
            about | shown | place
            for shown, scores, kept in drawn
            for place in _places(unit, unpruned, scores, floor, kept)
        ]
    if not points:
        return pd.DataFrame(columns=["measure", "ratio", "unit", "control"])
    data = pd.DataFrame(points)
    data["ratio"] = data["run"].map(ratios)
    data["control"] = data["run"].map(random).fillna("")
    data = data.fillna(dict.fromkeys(TOOLTIP, "-"))
    return data.dropna(subset=["value", "ratio"])


def _places(
    unit: str, base: float, scores: ArrayLike, floor: float | None, kept: Kept | None
) -> list[dict[str, Any]]:
    """Return where a point lies by each measure: its score, and what is kept, or how much more loss text has.

    `scores` are value, low and high, `base` that of the unpruned model; shares are in percent.
    """
    scores = np.array(scores, dtype=float)
    level = math.nan if floor is None else floor
    raw: dict[str, Any] = {"measure": "raw", "unit": unit, FLOOR: level}
    place: dict[str, Any] = {
        "measure": "kept",
        "unit": "%",
        FLOOR: 0.0,
        "unpruned": 100.0,
    }
    if is_loss(unit):
        place |= {"unit": NATS_OF_BYTES, FLOOR: math.nan, "unpruned": 0.0}
        shown = (scores - base) * math.log(2)
    else:
        ends = (kept.share, kept.low, kept.high) if kept else (None,) * 3
        shown = 100 * np.array(ends, dtype=float)
    if is_perplexity(unit):
        place["unit"] = NATS
        # An interval may reach below what a perplexity can be.
        shown = np.log(np.where(scores > 0, scores, math.nan) / base)
    if unit == "%":
        # The interval of a difference may reach beyond what a share can be.
        scores, raw[FLOOR] = 100 * scores.clip(0, 1), 100 * level
    return [
        about | dict(zip(("value", "low", "high"), values.tolist(), strict=True))
        for about, values in ((raw, scores), (place, shown))
    ]


def measure_chart(points: pd.DataFrame, measure: str) -> alt.ConcatChart:
    """Draw one measure: a panel for each side of the dichotomy, and for each unit."""
    present = set(points["family"])
    families = {f.name: f.label for f in FAMILIES if f.name in present}
    data = points.drop(columns="measure")
    hues = {
        task: f"var(--family-{family})"
        for family in families
        for task in data.loc[data["family"] == family, "line"]
    }
    look, own_floors = line_look(list(hues), hues), measure != "kept"
    panels = []
    data["side"] = pd.Categorical(data["side"], SIDES)
    for (_, unit), every in data.groupby(["side", "unit"], observed=True):
        beside = every["control"] != ""
        rows, random = every[~beside], every[beside]
        here = [families[name] for name in families if name in set(rows["family"])]
        scale = alt.Scale(type="log") if is_perplexity(unit) else _around(every)
        y = alt.Y("value:Q", scale=scale, axis=alt.Axis(tickCount=6, format=".6~r"))
        y = y.title([", ".join(here), MEASURES[measure][2] if unit == "%" else unit])
        rules = [
            alt.Chart(rows)
            .mark_rule(strokeDash=dash, color="var(--edge)")
            .encode(look["color"] if level == FLOOR and own_floors else alt.Color())
            .encode(y=f"{level}:Q", tooltip=["line:N", f"{level}:Q"])
            for level, dash in _RULES.items()
            if level in rows and rows[level].notna().any()
        ]
        drawn = lines(rows, over_ratios(), y, look, TOOLTIP)
        if len(random):
            chart = alt.Chart(random).encode(x=over_ratios(), y=y, color=look["color"])
            thin = chart.mark_line(strokeWidth=0.7, point={"size": 12}, opacity=0.7)
            rules.append(thin.encode(detail="control:N", tooltip=TOOLTIP))
        panels.append(alt.layer(*rules, drawn))
    return alt.concat(*panels, columns=2).resolve_scale(y="independent")


def _around(points: pd.DataFrame) -> alt.Scale:
    """Return an axis for all values and levels, which intervals extend at each end by as much at most.

    One score with few documents would otherwise leave a flat line of all others.
    """
    levels = [level for level in _RULES if level in points]
    values = points[["value", *levels]].to_numpy(float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    reach = high - low or abs(high) / 2 or 1.0
    ends = np.fmin(low, points["low"].min()), np.fmax(high, points["high"].max())
    domain = max(low - reach, float(ends[0])), min(high + reach, float(ends[1]))
    return alt.Scale(domain=domain, zero=False)


def truthfulness_section(runs: Sequence[Run], comparison: Comparison) -> Section | None:
    """A truthfulness task against a knowledge task, one point per size, with Pearson's r."""
    plots, rows = [], []
    for series, members in series_of(runs).items():
        metrics = dict(primary_metrics(members))
        knowledge = next((task for task in KNOWLEDGE if task in metrics), None)
        truthful = next((task for task in TRUTHFULNESS if task in metrics), None)
        if knowledge is None or truthful is None or len(members) < 2:
            continue
        pair = [(knowledge, metrics[knowledge]), (truthful, metrics[truthful])]
        rows += [
            row
            for row in comparison.correlations
            if row.series == series and {*row.tasks} == {*pair}
        ]
        scores = [[run.scores[key].value for key in pair] for run in members]
        points = pd.DataFrame(scores, columns=["x", "y"])
        points["ratio"] = [run.expansion_ratio for run in members]
        x, y = (f"{task}, {metric.removesuffix(',none')}" for task, metric in pair)
        scale = alt.Scale(zero=False)
        axes = alt.X("x:Q", scale=scale, title=x), alt.Y("y:Q", scale=scale, title=y)
        chart = alt.Chart(points).encode(*axes)
        labels = chart.mark_text(align="left", dx=6, dy=-6)
        chart = alt.layer(
            chart.mark_line(color=HUES[0], opacity=0.5).encode(order="ratio:Q"),
            chart.mark_point(color=HUES[0], filled=True, opacity=1),
            labels.encode(text=alt.Text("ratio:Q", format=".2f")),
        )
        title = f"{truthful} against {knowledge} ({series})"
        text = "One point per configuration, labelled with its expansion ratio."
        plots.append(Plot(f"knowledge-truthfulness-{slug(series)}", title, text, chart))
    heading = "Knowledge against truthfulness"
    text = "The interval treats sizes as independent draws, which steps of pruning are not."
    table = table_of(heading, CORRELATIONS, rows, comparison.alpha) if rows else None
    return Section(heading, [text], table=table, plots=plots) if plots else None


def costs_plot(curves: Sensitivity) -> Plot:
    """Return what cutting one layer costs, over the layers, with a line for each share."""
    by_share = curves.by_share()
    points = [
        {"line": share, "layer": layer, "rise": rise}
        for share, costs in by_share.items()
        for layer, rise in costs.items()
    ]
    over = alt.X("layer:Q", scale=alt.Scale(nice=False))
    scale = alt.Scale(type="symlog", constant=LINEAR)
    y = alt.Y("rise:Q", title="cost (nats per token)", scale=scale)
    chart = lines(pd.DataFrame(points), over, y, line_look([*by_share]))
    caption = (
        f"What it costs to cut one layer. The axis is linear up to {LINEAR} nats and logarithmic "
        "beyond."
    )
    return Plot("sensitivity-by-layer", "Cost by layer", caption, chart)


def layers_section(sweep: SweepResults) -> Section | None:
    """Lines and a table of the curves of a sweep; None where it has no ``sensitivity.json``.

    ResultsError if it cannot be read.
    """
    file = sweep.path / SENSITIVITY
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        curves = Sensitivity.of(content)
        plots = [costs_plot(curves)]
        return Section("Layers", [curves.explanation], curves.table(), plots)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(
            f"{file} holds no readable sensitivity curves ({error}): measure them again."
        ) from None
