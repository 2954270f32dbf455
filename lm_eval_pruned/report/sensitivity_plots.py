"""The curves of layers as figures: a heat map, and lines over the layers.

Needs matplotlib (the extra ``report``).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

from lm_eval_pruned.report.layer_curves import RANDOM
from lm_eval_pruned.report.plots import finished_plot
from lm_eval_pruned.util.figures import INK, line_look, style


if TYPE_CHECKING:
    from lm_eval_pruned.report.layer_curves import LayerCurves
    from lm_eval_pruned.report.plots import Plot

#: Rises below this, in nats per token, are drawn on a linear scale, greater ones on a
#: logarithmic one: one layer can cost a hundred times as much as another.
_LINEAR = 0.02
#: Light to dark in print and for every kind of colour vision.
_COLOURS = "cividis_r"


def heat_map(curves: LayerCurves) -> Plot:
    """Draw the rise of the loss by layer and share removed, one map for each criterion."""
    name = "sensitivity"
    criteria = [*curves.criteria, *([RANDOM] if curves.seeds else [])]
    most = max(2 * _LINEAR, *(max(each) for each in curves.rises.values()))
    norm = SymLogNorm(_LINEAR, vmin=0, vmax=most, clip=True)
    with style(name):
        height = 0.9 + len(criteria) * (0.45 + 0.22 * len(curves.shares))
        figure = Figure(figsize=(8, height))
        maps = figure.subplots(len(criteria), 1, sharex=True, squeeze=False)[:, 0]
        edges = _edges(curves.layers)
        for axes, criterion in zip(maps, criteria, strict=True):
            values = [
                [
                    math.nan if rise is None else rise
                    for rise in (
                        curves.rise(layer, criterion, share) for layer in curves.layers
                    )
                ]
                for share in curves.shares
            ]
            drawn = axes.pcolormesh(
                edges,
                range(len(curves.shares) + 1),
                values,
                cmap=_COLOURS,
                norm=norm,
                edgecolor="face",
                linewidth=0.1,
            )
            axes.set_yticks(
                [number + 0.5 for number in range(len(curves.shares))],
                [f"{share} %" for share in curves.shares],
            )
            title = criterion
            if criterion == RANDOM and curves.seeds > 1:
                title = f"{RANDOM}, mean of {curves.seeds} seeds"
            axes.set_title(title, loc="left", fontsize=9)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        maps[-1].set_xlabel("layer that alone is cut")
        maps[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        figure.supylabel("neurons removed", fontsize=9)
        bar = figure.colorbar(drawn, ax=list(maps), aspect=30, pad=0.02)
        bar.set_label("rise of the loss (nats per token)")
        bar.outline.set_visible(False)
        ticks = [tick for tick in (0, 0.02, 0.1, 0.5, 1, 2, 5, 10) if tick <= most]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
        return finished_plot(
            figure,
            name,
            "Sensitivity of the layers",
            "Rise of the loss where one layer alone is cut, by layer, share of its neurons that "
            f"is removed and criterion ({', '.join(criteria)}).",
        )


def layer_lines(curves: LayerCurves) -> Plot:
    """Draw the rise of the loss over the layers, one panel for each share removed."""
    name = "sensitivity-by-layer"
    with style(name):
        figure = Figure(figsize=(8, 0.6 + 2.1 * len(curves.shares)))
        panels = figure.subplots(len(curves.shares), 1, sharex=True, squeeze=False)
        handles = {}
        for axes, share in zip(panels[:, 0], curves.shares, strict=True):
            axes.axhline(0, color=INK, linewidth=0.6)
            if curves.seeds:
                spans = [
                    (layer, *span)
                    for layer in curves.layers
                    if (span := curves.chance(layer, share)) is not None
                ]
                for half, (layer, low, high) in enumerate(spans):
                    bar = axes.bar(
                        layer,
                        max(high - low, 1e-4),
                        0.8,
                        low,
                        color=INK,
                        alpha=0.25,
                        linewidth=0,
                    )
                    if half == 0:
                        handles[f"random, {curves.seeds} seeds"] = bar
            for number, criterion in enumerate(curves.criteria):
                points = [
                    (layer, rise)
                    for layer in curves.layers
                    if (rise := curves.rise(layer, criterion, share)) is not None
                ]
                if points:
                    (handles[criterion],) = axes.plot(
                        *zip(*points, strict=True),
                        linewidth=1,
                        markersize=3.5,
                        **line_look(number),
                    )
            axes.set_yscale("symlog", linthresh=_LINEAR)
            axes.yaxis.set_major_locator(
                SymmetricalLogLocator(base=10, linthresh=_LINEAR)
            )
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.grid(axis="y", color=INK, alpha=0.15)
            axes.set_title(f"{share} % of its neurons removed", loc="left", fontsize=9)
        panels[-1, 0].set_xlabel("layer that alone is cut")
        panels[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        figure.supylabel("rise of the loss (nats per token)", fontsize=9)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside right upper",
            fontsize=8,
        )
        return finished_plot(
            figure,
            name,
            "Criteria by layer",
            "Rise of the loss where one layer alone is cut, by criterion; the bars span the "
            "seeds of random. The axis is linear up to "
            f"{_LINEAR} nats and logarithmic beyond.",
        )


def _edges(layers: tuple[int, ...]) -> list[float]:
    """Return where the columns of a map begin and end, layers being its middles."""
    middles = [(one + other) / 2 for one, other in pairwise(layers)]
    return [layers[0] - 0.5, *middles, layers[-1] + 0.5]
