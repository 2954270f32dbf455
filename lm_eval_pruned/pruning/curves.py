"""Loss curves: what the loss on calibration text becomes when a single layer is cut.

Pure data, without torch: the curves that `lm_eval_pruned.pruning.measuring` measures, that
allocations are made of, and that tables and plots show.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import csv_table


#: What a file of curves says it is, and the version of its entries.
FORMAT, VERSION = "lm-eval-pruned sensitivity", 1


@dataclass(frozen=True)
class LayerCurve:
    """What cutting a single layer costs, by one criterion.

    Attributes:
        layer: Number of the layer, as ``layers=`` counts.
        width_before: Its width in the unpruned model, in neurons; that of its experts if any.
        criterion: Canonical name of the criterion that chose the neurons.
        seed: Seed of the criterion ``random``; None for any other.
        widths: Kept widths that were measured, in neurons, ascending, below `width_before`.
        losses: Loss of the model with this layer cut to each of `widths`, in nats per token.
    """

    layer: int
    width_before: int
    criterion: str
    seed: int | None
    widths: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The curves of one model, and the text on which they were measured.

    Attributes:
        model: Folder or Hub name of the model.
        loss: Loss of the unpruned model, in nats per token.
        curves: One curve for each layer, criterion and seed.
        file: Name of the calibration file, without its folder.
        sha256: SHA-256 of that file.
        texts: Number of texts that were used.
        tokens: Number of tokens in them, after cutting.
        path: How the model was run; there is one way.
        repair: How the layer was repaired after its cut. If it was, the loss is measured with half
            of its neurons, and others follow from the error of its output.
        device: Where the model ran.

    Raises:
        ValueError: A loss is NaN or infinite.

    Example:
        >>> curve = LayerCurve(0, 100, "maw", None, (50, 90), (4.0, 3.5))
        >>> curves = Sensitivity("folder", 3.25, (curve,), "text.jsonl", "ab12", 2, 256)
        >>> curves.rises(curves.curve(0, "maw"))
        (0.75, 0.25)
        >>> print(curves.as_csv(), end="")
        layer,width,criterion,seed,loss,rise
        0,50,maw,,4.0,0.75
        0,90,maw,,3.5,0.25
    """

    model: str
    loss: float
    curves: tuple[LayerCurve, ...]
    file: str
    sha256: str
    texts: int
    tokens: int
    path: str = "layer by layer"
    repair: str = "none"
    device: str = "cpu"

    def __post_init__(self) -> None:
        losses = [self.loss, *(loss for curve in self.curves for loss in curve.losses)]
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"The loss of {self.model} on {self.file}, or with one layer cut, is NaN or "
                "infinite: use another dtype, such as dtype=float32, or other text."
            )

    def curve(self, layer: int, criterion: str, seed: int | None = None) -> LayerCurve:
        """Return the curve of a layer by a criterion; `seed` is only for ``random``."""
        by_name = {(c.layer, c.criterion, c.seed): c for c in self.curves}
        alone = by_name.get((layer, criterion, None))
        return alone or by_name[layer, criterion, seed]

    def rises(self, curve: LayerCurve) -> tuple[float, ...]:
        """Return by how much the loss is above the unpruned model's at each width of `curve`."""
        return tuple(loss - self.loss for loss in curve.losses)

    def as_csv(self) -> str:
        """Return one row for each point of each curve, as CSV with a header."""
        columns = ("layer", "width", "criterion", "seed", "loss", "rise")
        rows = (
            (curve.layer, width, curve.criterion, curve.seed, loss, loss - self.loss)
            for curve in self.curves
            for width, loss in zip(curve.widths, curve.losses, strict=True)
        )
        return csv_table([dict(zip(columns, row, strict=True)) for row in rows])

    def as_dict(self) -> dict[str, Any]:
        """Return what a file holds (JSON types only)."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def write(self, file: str | Path) -> None:
        """Write the curves to a JSON file, whole or not at all."""
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False)
        write_atomically(file, text + "\n")


def read_sensitivity(file: str | Path) -> Sensitivity:
    """Read what `Sensitivity.write` wrote; raise ValueError where it is missing or damaged."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        if (found.pop("format"), found.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is not a file of {FORMAT}, version {VERSION}")
        for each in found["curves"]:
            each |= {name: tuple(each[name]) for name in ("widths", "losses")}
        found["curves"] = tuple(LayerCurve(**each) for each in found["curves"])
        return Sensitivity(**found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read as sensitivity curves ({error}): measure them again."
        ) from None
