"""Scores that outlive a load: the widths of a sweep are cut by one scoring.

Which neurons are kept at any width follows from the same scores, which are small
(one float32 per neuron), while the weights are not kept at all.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.sensitivity import Sensitivity


@dataclass
class ScoreTable:
    """What one criterion said about one model.

    Attributes:
        scores: By name of the GLU-MLP, shape (I,), float32, on the CPU.
        calibration: The text behind the scores, for criteria that need one.
        by_criterion: Scores of criteria that were compared, by criterion and MLP.
        curves: The losses by which they were, with one layer cut at a time.
        influence: Block influence of each layer, and what the results file says of its text.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    calibration: Calibration | None = None
    by_criterion: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    curves: Sensitivity | None = None
    influence: tuple[Sequence[float], Mapping[str, Any]] | None = None

    def of_plan(self, plan: PrunePlan, mlps: Iterable[GluMlp]) -> ScoreTable:
        """Take the scores of each MLP by its layer's criterion, for a plan that is settled."""
        if plan.tried:
            chosen = {
                mlp.name: self.by_criterion.get(plan.criterion_of(mlp.block), {})
                for mlp in mlps
            }
            self.scores = {name: of[name] for name, of in chosen.items() if name in of}
        return self


#: The tables of several loads, by the keys of `lm_eval_pruned.checkpoints.load.Stored.of`.
KnownScores = dict[Hashable, ScoreTable]
