"""Curves of layers: by how much the loss on calibration text rises when a single layer is cut.

Pure data, without torch: the curves that allocations are made of, and that tables and plots show.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from pathlib import Path

#: What a file of curves says it is, and the version of its entries.
FORMAT, VERSION = "lm-eval-pruned sensitivity", 2


@dataclass(frozen=True)
class LayerCurve:
    """What cutting a single layer costs, by one criterion.

    Attributes:
        layer: Number of the layer, as ``layers=`` counts.
        width_before: Its width in the unpruned model, in neurons; that of its experts if any.
        criterion: Canonical name of the criterion that chose the neurons.
        seed: Seed of the criterion ``random``; None for any other.
        widths: Kept widths, in neurons, ascending, below `width_before`.
        rises: By how much the loss rises with this layer cut to each of `widths`, in nats per token,
            as `lm_eval_pruned.pruning.curvature` has it.
    """

    layer: int
    width_before: int
    criterion: str
    seed: int | None
    widths: tuple[int, ...]
    rises: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of one model, and the text that they hold for.

    Attributes:
        model: Folder or Hub name of the model.
        loss: Loss of the unpruned model, in nats per token, on the text of the backward pass.
        curves: One curve for each layer, criterion and seed.
        file: Name of the calibration file, without its folder.
        sha256: SHA-256 of that file.
        texts: Number of texts that were used.
        tokens: Number of tokens in them, after cutting.
        repair: How the layer is repaired after its cut.
        device: Where the model ran.

    Example:
        >>> curve = LayerCurve(0, 100, "maw", None, (50, 90), (0.75, 0.25))
        >>> curves = Sensitivity("folder", 3.25, (curve,), "text.jsonl", "ab12", 2, 256)
        >>> print(curves.as_csv(), end="")
        layer,width,criterion,seed,rise
        0,50,maw,,0.75
        0,90,maw,,0.25
    """

    model: str
    loss: float
    curves: tuple[LayerCurve, ...]
    file: str
    sha256: str
    texts: int
    tokens: int
    repair: str = "none"
    device: str = "cpu"

    def as_csv(self) -> str:
        """Return one row for each point of each curve, as CSV with a header."""
        columns = ("layer", "width", "criterion", "seed", "rise")
        rows = (
            (curve.layer, width, curve.criterion, curve.seed, rise)
            for curve in self.curves
            for width, rise in zip(curve.widths, curve.rises, strict=True)
        )
        return csv_table([dict(zip(columns, row, strict=True)) for row in rows])

    def as_dict(self) -> dict[str, Any]:
        """Return what a file holds (JSON types only)."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def write(self, file: str | Path) -> None:
        """Write the curves to a JSON file, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        write_atomically(file, text + "\n")
