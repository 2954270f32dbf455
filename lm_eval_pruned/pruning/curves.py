"""Curves of layers: by how much a model's predictions move when a single layer is cut.

Pure data, without torch: the curves that allocations are made of, and that tables and plots show.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Mapping

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
    widths: tuple[int, ...]
    rises: tuple[float, ...]


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
        """Make one of what `as_dict` returned."""
        values = {
            name: content[name] for name in content.keys() - {"format", "version"}
        }
        curves = []
        for curve in values.pop("curves"):
            lists: Any = {name: tuple(curve[name]) for name in ("widths", "rises")}
            curves.append(LayerCurve(**curve | lists))
        return cls(curves=tuple(curves), **values)

    def as_csv(self) -> str:
        """Return one row for each point of each curve, as CSV with a header."""
        rows = [
            {"layer": curve.layer, "width": width, "rise": rise}
            for curve in self.curves
            for width, rise in zip(curve.widths, curve.rises, strict=True)
        ]
        return csv_table(rows)

    def as_dict(self) -> dict[str, Any]:
        """Return what a file holds (JSON types only)."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def as_json(self) -> str:
        """Return the content of a JSON file."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
