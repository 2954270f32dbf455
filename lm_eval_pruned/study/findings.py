"""What a study found: each task against its floor, and whether the dichotomy holds for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.report.pairs import compared_pairs
from lm_eval_pruned.results.files import ResultsError, as_mapping
from lm_eval_pruned.results.folder import FLOOR
from lm_eval_pruned.results.groups import (
    LEFT,
    TAKEN,
    family_of,
    is_control,
    is_perplexity,
    primary_metrics,
)


if TYPE_CHECKING:
    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults


@dataclass(frozen=True)
class TaskFinding:
    """One task: the `rows` of its cuts from the largest size down, and its `floor` if it is known.

    `above` says by run, the unpruned one first, whether the score is shown to be above the floor;
    None where nothing can say.
    """

    task: str
    metric: str
    base_score: float
    floor: Standing | None
    above: dict[str, bool | None]
    rows: list[Difference]

    @property
    def floor_by(self) -> str:
        """What has the floor: a level, or a model that knows nothing; empty if none is known."""
        return self.floor.floor_name.removeprefix(FLOOR) if self.floor else ""

    @property
    def can_fall(self) -> bool:
        """Whether a loss can be seen: an unpruned model at the floor has none to show."""
        return next(iter(self.above.values())) is not False

    @property
    def falls(self) -> list[Difference]:
        """Rows that are worse than the unpruned model, if that can be seen."""
        return [row for row in self.rows if row.verdict == "worse" and self.can_fall]

    @property
    def rises(self) -> list[Difference]:
        """Rows that are better than the unpruned model and not at the floor."""
        better = [row for row in self.rows if row.verdict == "better"]
        return [row for row in better if self.above[row.run] is not False]


@dataclass(frozen=True)
class Findings:
    """The runs of one model, what of its tasks falls and rises, and the verdicts against chance."""

    base: Run
    cuts: list[Run]
    beside: dict[str, list[Run]]
    tasks: list[TaskFinding]
    comparison: Comparison
    random: dict[str, set[str]]
    failed: list[str]

    def on(self, side: str) -> list[TaskFinding]:
        """Return the tasks that the study says are `TAKEN` or `LEFT`."""
        return [each for each in self.tasks if family_of(each.task).side == side]

    @property
    def verdict(self) -> str:
        """Whether what the study says of its models can be said of this one."""
        taken = [each for each in self.on(TAKEN) if each.can_fall]
        left = [each for each in self.on(LEFT) if each.can_fall or each.rises]
        if not taken or not left:
            return "cannot be decided"
        drops = [each for each in left if each.falls]
        if drops == left or not any(each.falls for each in taken):
            return "does not hold"
        rises = any(each.rises for each in left)
        return "holds" if rises and not drops else "holds in part"


def read_findings(sweep: SweepResults, alpha: float = 0.05) -> Findings:
    """Compare the runs of a study; ResultsError where no unpruned or no pruned model is done."""
    recipes = {
        str(each["id"]): as_mapping(each.get("arguments")).get("recipe")
        for each in sweep.definition["configurations"]
    }
    base, others = split_sweep(list(sweep.runs), str(sweep.path))
    others = [run for run in others if set(run.tasks()) & set(base.tasks())]
    beside = {
        "random": [run for run in others if is_control(run)],
        "recipe=best": [run for run in others if recipes.get(run.name) == "best"],
    }
    cuts = [run for run in others if not any(run in runs for runs in beside.values())]
    cuts.sort(key=lambda run: -(run.expansion_ratio or 0))
    if not cuts:
        raise ResultsError(f"{sweep.path} holds no finished pruned model yet.")
    read, tasks = DocumentReader(), []
    comparison = compare(base, [*cuts, *sweep.floors], alpha=alpha, read=read)
    for key in primary_metrics([base]):
        rows = [row for row in comparison.rows if (row.task, row.metric) == key]
        floor = next((row.floor for row in rows if row.floor), None)
        # Whatever knows a language is far away from the perplexity of what does not.
        unknown = True if floor is None and is_perplexity(key[1]) else None
        above = {base.name: floor.base_above_floor if floor else unknown}
        above |= {r.run: r.floor.above_floor if r.floor else unknown for r in rows}
        tasks.append(TaskFinding(*key, base.scores[key].value, floor, above, rows))
    pairs = [
        (control, run)
        for run in cuts
        for control in beside["random"]
        if control.expansion_ratio == run.expansion_ratio
    ]
    random: dict[str, set[str]] = {}
    for row in compared_pairs(pairs, alpha, read):
        random.setdefault(row.task, set()).add(row.verdict)
    failed = [f"{e.task} failed on {e.run}: {e.message}" for e in sweep.failures]
    return Findings(base, cuts, beside, tasks, comparison, random, failed)
