"""The record of a pruning: what results files, tables and model cards say about it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.pruning.allocations import UNIFORM
from lm_eval_pruned.pruning.argument_values import written_layers
from lm_eval_pruned.pruning.criteria import CALIBRATED
from lm_eval_pruned.pruning.layer_widths import written_by_layer
from lm_eval_pruned.pruning.plan import PrunePlan, whole_or_mean
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from torch import Tensor

    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.widths import Widths


@dataclass(frozen=True)
class WidthGroup:
    """GLU-MLPs of one kind and one width.

    Attributes:
        kind: ``dense``, ``expert`` or ``shared``.
        config_key: The config key of their width, such as ``moe_intermediate_size``.
        mlps: How many they are.
        width_before: Their width before, in neurons.
        width_after: Their width after, in neurons.
    """

    kind: str
    config_key: str
    mlps: int
    width_before: int
    width_after: int


@dataclass(frozen=True)
class PruneRecord:
    """What was done to a model.

    Attributes:
        plan: The plan that was carried out.
        layers: Number of layers that stay and hold GLU-MLPs.
        parameters_before: Parameters of the unpruned model; tied ones count once.
        parameters_after: Parameters of the pruned model.
        kept: Kept neurons of every GLU-MLP, each of shape (k,), int64, on the CPU;
            empty for the baseline, and where the process that loaded does not tell.
        groups: The GLU-MLPs by kind and width.
        config_expresses_widths: Whether stock transformers can open the model once
            it is saved.
        calibration: The text on which the neurons were observed; None where the
            criterion looks at weights alone.
    """

    plan: PrunePlan
    layers: int
    parameters_before: int
    parameters_after: int
    kept: tuple[Tensor, ...]
    groups: tuple[WidthGroup, ...]
    config_expresses_widths: bool
    calibration: Calibration | None

    @classmethod
    def of(
        cls,
        plan: PrunePlan,
        widths: Widths,
        parameters_before: int,
        parameters_after: int,
        kept: tuple[Tensor, ...] | None,
        calibration: Calibration | None = None,
    ) -> PruneRecord:
        """Describe what `plan` did to the MLPs of `widths`; `kept` None says that it is not known.

        Raises:
            ValueError: Neurons were removed, and `kept` does not say which stayed.
        """
        if plan.is_open:
            raise ValueError(
                "The record needs a plan that says what each layer became."
            )
        if plan.prunes and kept is not None and len(kept) != len(widths.mlps):
            raise ValueError(
                f"The record needs the kept neurons of {len(widths.mlps)} MLPs, not of {len(kept)}."
            )
        targets = widths.targets(plan)
        counts = Counter(
            (
                mlp.kind,
                str(widths.keys[mlp.name]),
                widths.actual[mlp.name],
                targets[mlp.name],
            )
            for mlp in widths.mlps
        )
        return cls(
            plan,
            len({mlp.stack for mlp in widths.mlps}),
            parameters_before,
            parameters_after,
            kept or (),
            tuple(
                WidthGroup(kind, key, count, before, after)
                for (kind, key, before, after), count in counts.items()
            ),
            widths.opens_in_stock(targets),
            # Others may have been tried on the text, and not been chosen.
            calibration if {*plan.criteria} & {*CALIBRATED} else None,
        )

    @property
    def digest(self) -> str | None:
        """SHA-256 over the kept indices of all MLPs (little-endian int64), or None.

        Where layers were dropped, ``layers`` and the numbers of those that stay come first.
        """
        depth = self.plan.depth
        if not self.kept and depth is None:
            return None
        digest = hashlib.sha256()
        if depth is not None:
            digest.update(b"layers" + np.array(depth.kept, "<i8").tobytes())
        for indices in self.kept:
            digest.update(indices.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as the results file holds it (JSON types only)."""
        plan = self.plan
        record: dict[str, Any] = {
            "criterion": plan.criterion if plan.prunes else None,
            "asked": plan.asked,
            "multiple_of": plan.multiple_of,
            "layers": self.layers,
            "hidden_size": plan.hidden_size,
            "intermediate_size_before": plan.width_before,
            "intermediate_size_after": whole_or_mean(plan.mean_width),
            "expansion_ratio_before": plan.ratio_before,
            "expansion_ratio_after": plan.ratio,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "kept_digest": self.digest,
            "groups": [asdict(group) for group in self.groups],
            "config_expresses_widths": self.config_expresses_widths,
        }
        if plan.depth is not None:
            record |= plan.depth.as_dict()
        if plan.layers is not None:
            record["layers_pruned"] = written_layers(plan.layers)
        if plan.allocation != UNIFORM:
            record["allocation"] = plan.allocation
            record["min_width"] = plan.min_width
        if plan.tried:
            record["criteria_tried"] = list(plan.tried)
        if plan.measured_on is not None:
            record["measured_on"] = dict(plan.measured_on)
        if plan.layer_widths is not None:
            record["layer_widths"] = {str(n): width for n, width in plan.layer_widths}
        if plan.layer_criteria is not None:
            record["layer_criteria"] = {str(n): name for n, name in plan.layer_criteria}
        if self.calibration is not None:
            record["calibration"] = self.calibration.as_dict()
        if "random" in plan.criteria:
            record["seed"] = plan.seed
        return record

    def as_table(self) -> str:
        """Return the record as a short Markdown table for people."""
        plan = self.plan
        before, after = self.parameters_before, self.parameters_after
        asked = ", ".join(f"{name}={value}" for name, value in plan.asked.items())
        if plan.allocation != UNIFORM:
            asked += f", allocation={plan.allocation}"
        depth = plan.depth
        criterion = "nothing removed" if depth is None else "no neuron removed"
        if plan.prunes:
            criterion = f"criterion={plan.criterion}"
        if plan.prunes and plan.layer_criteria is not None:
            criterion = f"criteria by layer {written_by_layer(plan.layer_criteria)}"
        digest = (self.digest or "none")[:12]
        layers = f"{self.layers} layers"
        if plan.layers is not None:
            layers += f" ({written_layers(plan.layers)} pruned)"
        mean = "mean " if plan.layer_widths is not None else ""
        rows = [
            (
                f"{mean}expansion ratio",
                f"{plan.ratio_before:14.4f}",
                f"{plan.ratio:14.4f}",
            ),
            (
                f"{mean}intermediate size",
                f"{plan.width_before:14,}",
                f"{whole_or_mean(plan.mean_width):14,}",
            ),
            ("parameters", f"{before:14,}", f"{after:14,}"),
        ]
        if depth is not None:
            rows.insert(2, ("layers", f"{depth.before:14,}", f"{len(depth.kept):14,}"))
        lines = [
            markdown_table(["", "before", "after"], rows, padded=True),
            f"{asked or 'baseline'}, {criterion}, {layers}, kept digest {digest}",
        ]
        if depth is not None:
            lines += [f"layers dropped {written_layers(depth.dropped)}"]
        if plan.layer_widths is not None:
            lines += [f"widths by layer {written_by_layer(plan.layer_widths)}"]
        elif len(self.groups) > 1:
            lines += [
                f"{group.mlps} {group.kind} MLPs of {group.config_key}: "
                f"{group.width_before:,} to {group.width_after:,} neurons"
                for group in self.groups
            ]
        return "\n".join(lines)
