"""The cost of cutting one layer at a time: the section of a report, its table and its plot.

The curves are those of ``sensitivity.json``. The reference is the criterion ``random``: one that
does worse than all its seeds misjudges the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lm_eval_pruned.report.page import MARKS, Section
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.runs import SENSITIVITY
from lm_eval_pruned.util.tables import Cell, Column, Table


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.runs import SweepResults
    from lm_eval_pruned.util.figures import Plot

#: The control, whose seeds are the range of chance.
RANDOM = "random"
#: Of the file's entries.
VERSION = 2
#: The table of a report is of the share that is nearest to this one, in percent.
_SHOWN = 25
#: Rises below this, in nats per token, are drawn on a linear scale, greater ones on a
#: logarithmic one: one layer can cost a hundred times as much as another.
_LINEAR = 0.02


@dataclass(frozen=True)
class LayerCurves:
    """The curves of one model.

    Attributes:
        text: Unpruned loss, in nats per token, and the text that it was measured on, in words.
        criteria: Names of the criteria without ``random``, in the order of the curves.
        shares: Shares of a layer that were removed, in whole percent, ascending.
        seeds: How many seeds of ``random`` every layer was measured with.
        rises: By ``layer``, ``criterion`` and ``share``: ``rise`` of the loss in nats per token, the
            mean over seeds; ``low`` and ``high`` of the seeds of ``random`` there; ``verdict``,
            which is ``worse`` or ``better`` than every one of them, or empty.
        repair: How the layer was repaired after its cut.
    """

    text: str
    criteria: tuple[str, ...]
    shares: tuple[int, ...]
    seeds: int
    rises: pd.DataFrame = field(repr=False)
    repair: str = "none"

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], source: str = "the curves"
    ) -> LayerCurves:
        """Take curves from a ``sensitivity.json``; ResultsError if they cannot be read."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, not {VERSION}")
            loss, every = float(data["loss"]), pd.DataFrame(data["curves"])
            text = f"{loss:.3f} unpruned, on {data['texts']} texts with {data['tokens']:,} tokens"
            every = every.explode(["widths", "rises"]).astype({"layer": int})
            removed = 1 - every["widths"].astype(float) / every["width_before"]
            every["share"] = (100 * removed).round().astype(int)
            every["rise"] = every["rises"].astype(float)
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(
                f"{source} holds no readable sensitivity curves ({error}): measure them "
                "again."
            ) from None
        control = every[every["criterion"] == RANDOM].groupby(["layer", "share"])
        chance = control["rise"].agg(low="min", high="max", seeds="size")
        rises = every.groupby(["layer", "criterion", "share"], as_index=False)["rise"]
        rises = rises.mean().join(chance, on=["layer", "share"])
        above, below = rises["rise"] > rises["high"], rises["rise"] < rises["low"]
        rises["verdict"] = np.select([above, below], ["worse", "better"], "")
        rises.loc[rises["criterion"] == RANDOM, "verdict"] = ""
        criteria = tuple(name for name in every["criterion"].unique() if name != RANDOM)
        shares = tuple(sorted(every["share"].unique().tolist()))
        seeds = 0 if chance.empty else int(chance["seeds"].min())
        repair = str(data.get("repair", "none"))
        return cls(text, criteria, shares, seeds, rises, repair)

    def table(self, share: int) -> Table:
        """Return the rise of the loss by layer and criterion where `share` percent are removed."""
        names = {name: name for name in self.criteria}
        names |= {RANDOM: f"random, seeds: {self.seeds}"} if self.seeds else {}
        shown = self.rises[self.rises["share"] == share]
        known = {(rise.layer, rise.criterion): rise for rise in shown.itertuples()}

        def of_criterion(name: str) -> Column:
            cell = lambda layer: _rise(known.get((layer, name)))
            return Column(names[name], cell, ">")

        layers = sorted(self.rises["layer"].unique().tolist())
        columns = [Column("layer", str), *map(of_criterion, names)]
        return Table(f"Rise of the loss at {share} %", columns, layers)

    @property
    def explanation(self) -> list[str]:
        """How the numbers are to be read."""
        first = (
            "Each number is the rise of the loss, in nats per token, when only that layer is cut, to second "
            f"order in the error of its output. The loss is {self.text}."
        )
        chance = (
            f"The reference is the criterion random, seeds: {self.seeds}; \u25bc worse and \u25b2 better "
            "than every seed. A criterion only as good as chance is worse than every seed in one of "
            f"{self.seeds + 1} layers."
        )
        repaired = f"The layer is repaired after its cut (repair={self.repair})."
        repairs = [repaired] * (self.repair != "none")
        return [first, *repairs, *[chance] * bool(self.seeds)]

    def plots(self) -> list[Plot]:
        """Return the rise of the loss over the layers, by criterion. Needs the extra ``report``."""
        import altair as alt

        from lm_eval_pruned.util.figures import Plot, line_look, lines

        names = {"criterion": "line", "low": "least", "high": "most"}
        rises = self.rises.rename(columns=names)
        rises["removed"] = rises["share"].astype(str) + " % removed"
        over = alt.X("layer:Q", scale=alt.Scale(nice=False))
        scale = alt.Scale(type="symlog", constant=_LINEAR)
        y = alt.Y("rise:Q", title="rise of the loss (nats per token)", scale=scale)
        seeds = alt.Chart().mark_bar(size=14, opacity=0.25, color="var(--ink)")
        seeds = seeds.transform_filter(f"datum.line == '{RANDOM}'")
        seeds = seeds.encode(over, alt.Y("least:Q"), alt.Y2("most"))
        look = line_look([*self.criteria, *[RANDOM] * bool(self.seeds)])
        size = {
            "width": max(240, min(720, 22 * rises["layer"].nunique())),
            "height": 180,
        }
        panels = alt.layer(
            seeds, *lines(rises, over, y, look).layer, data=rises, **size
        )
        panels = panels.facet(row=alt.Row("removed:N", sort=None, title=None))
        text = (
            "Rise of the loss when one layer is cut, by criterion; the bars span the seeds of "
            f"random. The axis is linear up to {_LINEAR} nats and logarithmic beyond."
        )
        chart = panels.resolve_scale(y="independent")
        return [Plot("sensitivity-by-layer", "Criteria by layer", text, chart)]


def _rise(point: Any) -> Cell | None:
    if point is None:
        return None
    text = f"{point.rise:+.3f} {MARKS.get(point.verdict, '')}".rstrip()
    if point.criterion == RANDOM:
        text += f" [{point.low:+.3f}, {point.high:+.3f}]"
    return Cell(text, point.verdict)


def layers_section(sweep: SweepResults) -> Section | None:
    """Lines and a table of the curves of a sweep; None where it has no ``sensitivity.json``."""
    file = sweep.path / SENSITIVITY
    if not file.is_file():
        return None
    curves = LayerCurves.from_json(read_json(file), str(file))
    share = min(curves.shares, key=lambda percent: (abs(percent - _SHOWN), percent))
    rest = f"The table is for {share} % removed; {SENSITIVITY} has the others."
    texts, table = [*curves.explanation, rest], curves.table(share)
    return Section("Layers", texts, table=table, plots=curves.plots())
