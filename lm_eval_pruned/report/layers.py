"""What cutting one layer alone costs: the section of a report, its table and its plots.

The curves are those of ``sensitivity.json``. The zero line is the criterion ``random``: one that
does worse than all its seeds misjudges the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_pruned.report.page import Cell, Section, Table
from lm_eval_pruned.results.files import ResultsError, finite_or_none
from lm_eval_pruned.results.folder import SENSITIVITY, read_curves


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.runs import SweepResults
    from lm_eval_pruned.util.figures import Plot

#: The control, whose seeds are the range of chance.
RANDOM = "random"
#: The version of the file's entries that is read here.
VERSION = 1
#: The table of a report is of the share that is nearest to this one, in percent.
_SHOWN = 25
_MARKS = {"worse": " \u25bc", "better": " \u25b2", "": ""}
#: Rises below this, in nats per token, are drawn on a linear scale, greater ones on a
#: logarithmic one: one layer can cost a hundred times as much as another.
_LINEAR = 0.02


@dataclass(frozen=True)
class LayerCurves:
    """The curves of one model.

    Attributes:
        loss: Loss of the unpruned model, in nats per token.
        texts: Number of texts on which it was measured.
        tokens: Number of tokens in them.
        criteria: Names of the criteria without ``random``, in the order of the curves.
        shares: Shares of a layer that were removed, in whole percent, ascending.
        seeds: How many seeds of ``random`` every layer was measured with.
        rises: By ``layer``, ``criterion`` and ``share``: ``rise`` of the loss in nats per token, the
            mean over seeds; ``low`` and ``high`` of the seeds of ``random`` there; ``verdict``,
            which is ``worse`` or ``better`` than every one of them, or empty.
    """

    loss: float
    texts: int
    tokens: int
    criteria: tuple[str, ...]
    shares: tuple[int, ...]
    seeds: int
    rises: pd.DataFrame = field(repr=False)

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str = "the curves") -> LayerCurves:
        """Take curves from what a ``sensitivity.json`` holds.

        Args:
            data: Its content, which is distrusted.
            source: What messages call it.

        Raises:
            ResultsError: It holds no curves, or damaged ones, or those of a version that
                is not known here.
        """
        if data.get("version") != VERSION:
            raise ResultsError(
                f"{source} has sensitivity curves of version {data.get('version')}, and this "
                f"version of lm-eval-pruned reads {VERSION}: measure them again."
            )
        try:
            loss, texts = float(data["loss"]), int(data["texts"])
            tokens = int(data["tokens"])
            found = [
                (
                    int(curve["layer"]),
                    str(curve["criterion"]),
                    round(100 * (1 - width / curve["width_before"])),
                    float(value) - loss,
                )
                for curve in data["curves"]
                for width, value in zip(curve["widths"], curve["losses"], strict=True)
            ]
            if not found or any(finite_or_none(rise) is None for *_, rise in found):
                raise ValueError("no loss, or one that is no number")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ResultsError(
                f"{source} holds damaged sensitivity curves ({error}): measure them again."
            ) from None
        every = pd.DataFrame(found, columns=["layer", "criterion", "share", "rise"])
        control = every[every["criterion"] == RANDOM].groupby(["layer", "share"])
        control = control["rise"].agg(low="min", high="max", seeds="size")
        rises = every.groupby(["layer", "criterion", "share"], as_index=False).mean()
        rises = rises.join(control, on=["layer", "share"])
        above, below = rises["rise"] > rises["high"], rises["rise"] < rises["low"]
        verdict = np.select([above, below], ["worse", "better"], "")
        rises["verdict"] = np.where(rises["criterion"] == RANDOM, "", verdict)
        return cls(
            loss,
            texts,
            tokens,
            tuple(name for name in every["criterion"].unique() if name != RANDOM),
            tuple(sorted(every["share"].unique().tolist())),
            0 if control.empty else int(control["seeds"].min()),
            rises,
        )


def rises_table(curves: LayerCurves, share: int) -> Table:
    """Return the rise of the loss by layer and criterion where `share` percent are removed."""
    cells: dict[int, dict[str, Cell]] = {each: {} for each in curves.rises["layer"]}
    for each in curves.rises[curves.rises["share"] == share].itertuples():
        text = f"{each.rise:+.3f}{_MARKS[each.verdict]}"
        if each.criterion == RANDOM:
            text += f" [{each.low:+.3f}, {each.high:+.3f}]"
        cells[each.layer][each.criterion] = Cell(text, each.verdict)
    columns = {"layer": "layer", **{name: name for name in curves.criteria}}
    if curves.seeds:
        columns[RANDOM] = f"random, {_seeds(curves.seeds)}"
    rows: list[list[Cell | str]] = [
        [{"layer": Cell(str(layer)), **of}.get(name, "-") for name in columns]
        for layer, of in sorted(cells.items())
    ]
    return Table(f"Rise of the loss at {share} %", list(columns.values()), rows)


def explanation(curves: LayerCurves) -> list[str]:
    """Return how the numbers are to be read, and what they show, in sentences."""
    first = (
        "Each number is by how much the loss rises, in nats per token, where one layer alone is "
        f"cut and all others are whole: {curves.loss:.3f} unpruned, on {curves.texts} texts with "
        f"{curves.tokens:,} tokens."
    )
    if not curves.seeds:
        missing = (
            "The criterion random was not measured, so nothing says which layers a criterion "
            "misjudges: add random to --criteria."
        )
        return [first, missing]
    chance = (
        f"The zero line is random with {_seeds(curves.seeds)}: \u25bc worse and \u25b2 better than "
        "every seed. A criterion that chooses as chance does is worse than every seed in one of "
        f"{curves.seeds + 1} layers."
    )
    texts = [first, chance]
    worse = curves.rises[curves.rises["verdict"] == "worse"]
    for criterion in curves.criteria:
        of = worse[worse["criterion"] == criterion].groupby("share")["layer"]
        where = "; ".join(f"{_spans(list(each))} at {share} %" for share, each in of)
        said = f"worse than chance in {where}" if where else "nowhere worse than chance"
        texts.append(f"{criterion}: {said}.")
    return texts


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _spans(layers: list[int]) -> str:
    """Return such as ``layers 0, 3-5``."""
    spans = [
        [layer for _, layer in span]
        for _, span in groupby(enumerate(layers), lambda each: each[1] - each[0])
    ]
    texts = [f"{each[0]}-{each[-1]}" if each[1:] else str(each[0]) for each in spans]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(texts)}"


def layer_plots(curves: LayerCurves) -> list[Plot]:
    """Return the rise of the loss as a heat map by layer and share, and as lines over the layers.

    Needs the extra ``report``.
    """
    import altair as alt

    from lm_eval_pruned.util.figures import Plot, line_look, lines

    rises = curves.rises.rename(columns={"criterion": "line"})
    rises["removed"] = rises["share"].astype(str) + " % removed"
    width = max(240, min(720, 22 * rises["layer"].nunique()))
    scale: dict[str, Any] = {"type": "symlog", "constant": _LINEAR}
    heat = alt.Scale(scheme="cividis", reverse=True, domainMin=0, clamp=True, **scale)
    x, unit = "layer that alone is cut", "rise of the loss (nats per token)"
    named = [*curves.criteria, *([RANDOM] if curves.seeds else [])]
    maps = (
        alt.Chart(rises, width=width, height=alt.Step(24))
        .mark_rect()
        .encode(
            alt.X("layer:O", axis=alt.Axis(labelAngle=0)).title(x),
            alt.Y("removed:N", sort=None).title(None),
            alt.Color(
                "rise:Q",
                title=unit,
                scale=heat,
                legend=alt.Legend(format="~r", gradientLength=240, titleLimit=0),
            ),
        )
        .facet(row=alt.Row("line:N", sort=named, title=None))
    )
    over = alt.X("layer:Q", title=x, scale=alt.Scale(nice=False))
    look = line_look(named)
    panels = []
    for share, of in rises.groupby("share"):
        y = alt.Y("rise:Q", title=unit, scale=alt.Scale(**scale))
        chance = alt.Chart(of.dropna(subset=["low"]).drop_duplicates("layer"))
        chance = chance.mark_bar(size=14, opacity=0.25, color="var(--ink)")
        panel = chance.encode(over, alt.Y("low:Q"), alt.Y2("high"))
        panel += lines(of[["line", "layer", "rise"]], over, y, look)
        title = f"{share} % of its neurons removed"
        panels.append(panel.properties(title=title, width=width, height=180))
    return [
        Plot(
            "sensitivity",
            "Sensitivity of the layers",
            "Rise of the loss where one layer alone is cut, by layer, share of its neurons that "
            f"is removed and criterion ({', '.join(named)}).",
            maps,
        ),
        Plot(
            "sensitivity-by-layer",
            "Criteria by layer",
            "Rise of the loss where one layer alone is cut, by criterion; the bars span the "
            f"seeds of random. The axis is linear up to {_LINEAR} nats and logarithmic beyond.",
            alt.vconcat(*panels),
        ),
    ]


def layers_section(sweep: SweepResults) -> Section | None:
    """Heat map, lines and a table of the curves of a sweep that has them.

    Raises:
        ResultsError: Its ``sensitivity.json`` is damaged.
    """
    data = read_curves(sweep.path)
    if data is None:
        return None
    curves = LayerCurves.of(data, str(sweep.path / SENSITIVITY))
    share = min(curves.shares, key=lambda each: (abs(each - _SHOWN), each))
    return Section(
        "Layers",
        [
            *explanation(curves),
            f"The table is of {share} % removed; the others are in {SENSITIVITY}.",
        ],
        table=rises_table(curves, share),
        plots=layer_plots(curves),
    )
