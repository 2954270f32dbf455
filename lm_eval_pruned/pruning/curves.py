"""Curves of layers: by how much a model's predictions move when a single layer is cut.

Pure data, without torch: the curves that allocations are made of, and that tables and plots show.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.tables import Column, Table, csv_table


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: What a file of curves says it is, and the version of its entries.
FORMAT, VERSION = "lm-eval-pruned sensitivity", 3


@dataclass(frozen=True)
class LayerCurve:
    """What cutting a single layer costs.

    Attributes:
        layer: Number of the layer, as ``layers=`` counts.
        width_before: Its width in the unpruned model, in neurons; that of its experts if any.
        widths: Kept widths, in neurons, ascending, below `width_before`.
        rises: What cutting this layer alone to each of `widths` costs, in nats per token, as
            `lm_eval_pruned.pruning.curvature` has it.
    """

    layer: int
    width_before: int
    widths: Sequence[int]
    rises: Sequence[float]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of one model, and the cut and the text that they hold for.

    Attributes:
        model: The folder or Hub name of the model.
        loss: Its loss on the text, in nats per token, unpruned.
        curves: One for each layer that has a GLU-MLP, ascending.
        criterion: Which neurons are removed.
        repair: How the layer is repaired after its cut.
        file: Name of the file of text.
        sha256: Digest of the file.
        texts: How many of its texts were used.
        tokens: How many tokens these have.
        device: Where the model ran.

    Example:
        >>> curve = LayerCurve(0, 100, (50, 90), (0.75, 0.25))
        >>> curves = Sensitivity(
        ...     "folder", 3.25, (curve,), "maw", "none", "text.jsonl", "ab12", 2, 256
        ... )
        >>> print(curves.as_csv(), end="")
        layer,width,rise
        0,50,0.75
        0,90,0.25
        >>> curves.by_share()
        {'10 % removed': {0: 0.25}, '50 % removed': {0: 0.75}}
    """

    model: str
    loss: float
    curves: tuple[LayerCurve, ...]
    criterion: str
    repair: str
    file: str
    sha256: str
    texts: int
    tokens: int
    device: str = "cpu"

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Sensitivity:
        """Make one of what `as_dict` returned; KeyError, TypeError or ValueError for something else."""
        values = {
            name: content[name] for name in content.keys() - {"format", "version"}
        }
        curves = tuple(LayerCurve(**curve) for curve in values.pop("curves"))
        return cls(curves=curves, **values)

    @property
    def explanation(self) -> str:
        """How the numbers are to be read."""
        return (
            "Each number is what it costs to cut only that layer, in nats per token, to second order "
            f"in the error of its output (criterion={self.criterion}, repair={self.repair}). "
            f"The loss is {self.loss:.3f} unpruned, on {self.texts} texts with "
            f"{self.tokens:,} tokens."
        )

    def by_share(self) -> dict[str, dict[int, float]]:
        """Return the costs in nats per token by what of a layer is removed, ascending, and by layer."""
        points = [
            (curve.layer, 100 * (1 - width / curve.width_before), rise)
            for curve, width, rise in self._points()
        ]
        # In whole percent, unless two widths of a layer would be one.
        apart = (
            digits
            for digits in range(4)
            if len({(layer, round(x, digits)) for layer, x, _ in points}) == len(points)
        )
        digits = next(apart, 4)
        costs: dict[float, dict[int, float]] = defaultdict(dict)
        for layer, share, rise in points:
            costs[round(share, digits)][layer] = rise
        return {f"{share:g} % removed": costs[share] for share in sorted(costs)}

    def table(self) -> Table:
        """Return a row for each layer, and a column for each share."""
        columns = [Column("layer", str)]
        columns += [
            Column(title, costs.get, "+.3f") for title, costs in self.by_share().items()
        ]
        layers = [curve.layer for curve in self.curves]
        return Table("What cutting one layer costs", columns, layers)

    def as_csv(self) -> str:
        """Return one row for each point of each curve, as CSV with a header."""
        rows = [
            {"layer": curve.layer, "width": width, "rise": rise}
            for curve, width, rise in self._points()
        ]
        return csv_table(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return what a file holds (JSON types only)."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def as_json(self) -> str:
        """Return the content of a JSON file."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"

    def _points(self) -> Iterator[tuple[LayerCurve, int, float]]:
        for curve in self.curves:
            for width, rise in zip(curve.widths, curve.rises, strict=True):
                yield curve, width, rise
