"""What cutting one layer at a time costs: the section of a report, its table and its plot.

The curves are those of ``sensitivity.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_pruned.report.page import Section
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.runs import SENSITIVITY
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.runs import SweepResults
    from lm_eval_pruned.util.figures import Plot

#: Of the file's entries.
VERSION = 3
#: Costs below this, in nats per token, are drawn on a linear scale, greater ones on a
#: logarithmic one: one layer can cost a hundred times as much as another.
_LINEAR = 0.02


@dataclass(frozen=True)
class LayerCurves:
    """The curves of one model.

    Attributes:
        explanation: How the numbers are to be read.
        rises: What removing a share of a layer costs, in nats per token: by ``layer``, and by the
            share in whole percent, both ascending.
    """

    explanation: str
    rises: pd.DataFrame = field(repr=False)

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str = "the curves") -> LayerCurves:
        """Take curves from a ``sensitivity.json``; ResultsError if they cannot be read."""
        try:
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, not {VERSION}")
            explanation = (
                "Each number is what it costs to cut only that layer, in nats per token, to second order "
                f"in the error of its output (criterion={data['criterion']}, repair={data['repair']}). "
                f"The loss is {float(data['loss']):.3f} unpruned, on {data['texts']} texts with "
                f"{data['tokens']:,} tokens."
            )
            points = pd.DataFrame(data["curves"]).explode(["widths", "rises"])
            removed = 1 - points["widths"].astype(float) / points["width_before"]
            points["share"] = (100 * removed).round().astype(int)
            rises = points.astype({"layer": int, "rises": float}).pivot(
                index="layer", columns="share", values="rises"
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ResultsError(
                f"{source} holds no readable sensitivity curves ({error}): measure them "
                "again."
            ) from None
        return cls(explanation, rises)

    def table(self) -> Table:
        """Return a row for each layer and a column for each share."""

        def of_share(share: int) -> Column:
            cost = self.rises[share].dropna()
            return Column(f"{share} % removed", cost.get, "+.3f")

        columns = [Column("layer", str), *map(of_share, self.rises.columns)]
        return Table("What cutting one layer costs", columns, [*self.rises.index])

    def plot(self) -> Plot:
        """Return the costs over the layers, a line for each share. Needs the extra ``report``."""
        import altair as alt

        from lm_eval_pruned.util.figures import Plot, line_look, lines

        points = (
            self.rises.melt(ignore_index=False, value_name="rise")
            .dropna()
            .reset_index()
        )
        points["line"] = points["share"].astype(str) + " % removed"
        over = alt.X("layer:Q", scale=alt.Scale(nice=False))
        scale = alt.Scale(type="symlog", constant=_LINEAR)
        y = alt.Y("rise:Q", title="cost (nats per token)", scale=scale)
        look = line_look([f"{share} % removed" for share in self.rises.columns])
        caption = (
            "What it costs to cut one layer. The axis is linear up to "
            f"{_LINEAR} nats and logarithmic beyond."
        )
        chart = lines(points, over, y, look)
        return Plot("sensitivity-by-layer", "Cost by layer", caption, chart)


def layers_section(sweep: SweepResults) -> Section | None:
    """Lines and a table of the curves of a sweep; None where it has no ``sensitivity.json``."""
    file = sweep.path / SENSITIVITY
    if not file.is_file():
        return None
    curves = LayerCurves.of(read_json(file), str(file))
    paragraphs = [curves.explanation]
    return Section("Layers", paragraphs, table=curves.table(), plots=[curves.plot()])
