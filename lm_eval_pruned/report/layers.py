"""The section of a report on single layers: what cutting each of them alone costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.report.layer_curves import LayerCurves, explanation, rises_table
from lm_eval_pruned.report.page import Section
from lm_eval_pruned.report.sensitivity_plots import heat_map, layer_lines
from lm_eval_pruned.results.folder import SENSITIVITY, read_curves


if TYPE_CHECKING:
    from lm_eval_pruned.results.runs import SweepResults

#: The table is of the share that is nearest to this one, in percent.
_SHOWN = 25


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
        plots=[heat_map(curves), layer_lines(curves)],
    )
