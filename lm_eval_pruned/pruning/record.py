"""The record of a pruning: what results files, tables and model cards say about it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.argument_values import (
    NO_REPAIR,
    UNIFORM,
    written_by_layer,
    written_layers,
)
from lm_eval_pruned.pruning.arguments import STUDY
from lm_eval_pruned.pruning.criteria import RANDOM
from lm_eval_pruned.pruning.plan import whole_or_mean
from lm_eval_pruned.pruning.widths import Cut
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


_GROUP = ("kind", "config_key", "width_before", "width_after", "mlps")


@dataclass(frozen=True)
class PruneRecord(Cut):
    """A cut that was made.

    Attributes:
        kept: Kept neurons of every GLU-MLP, each of shape (k,), int64, on the CPU;
            empty for the baseline, and where the process that loaded does not tell.
        calibration: The text on which the neurons were observed, if any, as the results file
            describes it.
        repaired: How many GLU-MLPs were repaired; None where no repair was asked for.
    """

    kept: tuple[Tensor, ...] = ()
    calibration: Mapping[str, Any] | None = None
    repaired: int | None = None

    @property
    def layers(self) -> int:
        """Number of layers that hold GLU-MLPs."""
        return len({mlp.layer_path for mlp in self.widths.mlps})

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The GLU-MLPs by kind, config key, and width before and after, in neurons."""
        widths, targets = self.widths, self.targets
        counts = Counter(
            (mlp.kind, str(widths.keys[n := mlp.name]), widths.actual[n], targets[n])
            for mlp in widths.mlps
        )
        return [
            dict(zip(_GROUP, (*group, mlps), strict=True))
            for group, mlps in counts.items()
        ]

    @property
    def digest(self) -> str | None:
        """SHA-256 over the kept indices of all MLPs (little-endian int64); None for the baseline."""
        if not self.kept:
            return None
        digest = hashlib.sha256()
        for indices in self.kept:
            digest.update(indices.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as the results file holds it (JSON types only)."""
        plan = self.plan
        recipe, repair = plan.arguments.recipe, plan.arguments.repair
        record: dict[str, Any] = {
            "criterion": plan.criterion if plan.prunes else None,
            "asked": plan.asked,
            "multiple_of": plan.multiple_of,
            "layers": self.layers,
            "hidden_size": plan.hidden_size,
            "intermediate_size_before": plan.width_before,
            "intermediate_size_after": whole_or_mean(plan.mean_width),
            "expansion_ratio_before": plan.width_before / plan.hidden_size,
            "expansion_ratio_after": plan.ratio,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "kept_digest": self.digest,
            "groups": self.groups,
            "config_expresses_widths": not self.inexpressible,
        }
        allocation = plan.arguments.allocation
        optional: dict[str, Any] = {
            "allocation": allocation if allocation != UNIFORM else None,
            "layers_pruned": plan.layers and written_layers(plan.layers),
            "measured_on": plan.measured_on and dict(plan.measured_on),
            "layer_widths": plan.layer_widths
            and {str(number): width for number, width in plan.layer_widths},
            "calibration": self.calibration and dict(self.calibration),
            "recipe": recipe if recipe != STUDY else None,
            "repair": repair if repair != NO_REPAIR and plan.prunes else None,
            "mlps_repaired": self.repaired,
            "seed": int(plan.arguments.seed) if plan.criterion == RANDOM else None,
        }
        record |= {k: value for k, value in optional.items() if value is not None}
        return record

    def as_table(self) -> str:
        """Return the record as a short Markdown table for people."""
        plan = self.plan
        mean = "mean " if plan.layer_widths is not None else ""
        width, ratio = (
            whole_or_mean(plan.mean_width),
            plan.width_before / plan.hidden_size,
        )
        rows = [
            (f"{mean}expansion ratio", ratio, plan.ratio, "14.4f"),
            (f"{mean}intermediate size", plan.width_before, width, "14,"),
            ("parameters", self.parameters_before, self.parameters_after, "14,"),
        ]
        done = f"criterion={plan.criterion}" if plan.prunes else "nothing removed"
        if self.repaired is not None:
            done += f", repair={plan.arguments.repair}"
        if text := self.calibration or plan.measured_on:
            done += f", calibrated on {text.get('device', 'cpu')}"
        sizes = [plan.as_written() or "baseline"]
        if plan.arguments.allocation != UNIFORM:
            sizes += [f"allocation={plan.arguments.allocation}"]
        pruned = f" ({written_layers(plan.layers)} pruned)" if plan.layers else ""
        digest = f"kept digest {(self.digest or 'none')[:12]}"
        below = ", ".join([*sizes, done, f"{self.layers} layers{pruned}", digest])
        if plan.layer_widths is not None:
            below += f"\nwidths by layer {written_by_layer(plan.layer_widths)}"
        cells = [(name, format(a, form), format(b, form)) for name, a, b, form in rows]
        return f"{markdown_table(['', 'before', 'after'], cells, padded=True)}\n{below}"
