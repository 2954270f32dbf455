"""What a study found: what each task and each side shows, and whether the dichotomy holds.

What is not shown counts for nothing: a task keeps its score only where it is shown to lie within
the margin of a study at every size.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.answer import FALLS, KEEPS, RISES, UNKNOWN, WORDS
from lm_eval_pruned.report.sections import compared_pairs
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.groups import (
    BEHAVIOUR,
    FAMILIES,
    KNOWLEDGE,
    SIDES,
    TEXT,
    is_control,
    primary_metrics,
    series_name,
)
from lm_eval_pruned.results.metrics import is_loss
from lm_eval_pruned.results.runs import FLOOR


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.groups import Family
    from lm_eval_pruned.results.runs import SweepResults

#: Which of the states of its sizes is that of a task: a loss at any size, else a gain at any.
OVER_SIZES = (FALLS, RISES, UNKNOWN, KEEPS)
#: Which of the states of its tasks is that of a side: one can show a loss, all must show the rest.
OVER_TASKS = (FALLS, UNKNOWN, RISES, KEEPS)


def first_in(order: Sequence[str], states: Collection[str]) -> str:
    """Return the state that counts of several; `UNKNOWN` where there is none."""
    return next((state for state in order if state in states), UNKNOWN)


@dataclass(frozen=True)
class TaskFinding:
    """One task: the `rows` of its cuts from the largest size down, and its `floor` if it is known."""

    task: str
    metric: str
    family: Family
    floor: Standing | None
    rows: list[Difference]

    def is_in(self, names: Sequence[str]) -> bool:
        """Return whether the family of the task, or its side, is among `names`."""
        return self.family.name in names or self.family.side in names

    @property
    def level(self) -> str:
        """The floor and what has it: a level, or a model that knows nothing."""
        if self.floor is None:
            return "-"
        return f"{self.floor.floor:.3f} ({self.floor.floor_name.removeprefix(FLOOR)})"

    @property
    def can_fall(self) -> bool:
        """Whether a loss can be seen: the unpruned model is shown to be above the floor.

        A loss on text has no floor where no model that knows nothing was evaluated.
        """
        if self.floor is None:
            return is_loss(self.metric)
        return bool(self.floor.base_above_floor)

    def state_at(self, row: Difference) -> str:
        """Return what one size shows."""
        state = WORDS[row.verdict].state
        above = row.floor is None or row.floor.above_floor
        return state if (above if state == RISES else self.can_fall) else UNKNOWN

    @property
    def state(self) -> str:
        """What all sizes show."""
        return first_in(OVER_SIZES, [self.state_at(row) for row in self.rows])

    @property
    def counts(self) -> bool:
        """Whether the task can decide anything: an unpruned model at the floor can only rise."""
        return self.can_fall or self.state == RISES


@dataclass(frozen=True)
class Findings:
    """The `cuts` of one model by one criterion, and what of its tasks falls, keeps and rises.

    `against` has the verdicts of the cuts against those of the same size that were cut in other
    ways, by way and task: of several seeds, what is shown against each.
    """

    base: Run
    cuts: list[Run]
    tasks: list[TaskFinding]
    comparison: Comparison
    against: dict[str, dict[str, set[str]]]
    draws: int
    profile: Mapping[str, Any]

    @property
    def criterion(self) -> str:
        """What ranked the neurons of the cuts."""
        return str(self.cuts[0].pruning.get("criterion"))

    def on(self, *names: str) -> list[TaskFinding]:
        """Return the tasks that count of sides, or of families."""
        return [task for task in self.tasks if task.counts and task.is_in(names)]

    def state(self, *names: str) -> str:
        """Return what the tasks of sides or families show together."""
        return first_in(OVER_TASKS, {task.state for task in self.on(*names)})

    @property
    def verdict(self) -> str:
        """Whether what the study says of its models can be said of this one."""
        states = {side: self.state(side) for side in SIDES[:-1]}
        if UNKNOWN in states.values():
            return "cannot be decided"
        losses = [states[KNOWLEDGE], states[TEXT]].count(FALLS)
        if states[BEHAVIOUR] == FALLS or not losses:
            return "does not hold"
        return "holds" if losses == 2 else "holds in part"


def read_findings(
    sweep: SweepResults,
    comparison: Comparison,
    families: Mapping[str, str],
) -> Findings:
    """Return what the comparison of a sweep with its unpruned model, within a margin, shows.

    `families` are those of tasks that declare none. ResultsError if no pruned model is done.
    """
    base, others = sweep.split()
    ways: dict[str, list[Run]] = defaultdict(list)
    for run in others:
        if {*run.tasks()} & {*base.tasks()}:
            ways["random" if is_control(run) else series_name(run)].append(run)
    main = min(ways, key=_rank, default="random")
    if main == "random":
        raise ResultsError(f"{sweep.path} holds no finished pruned model yet.")
    cuts = sorted(ways.pop(main), key=lambda run: -(run.expansion_ratio or 0))
    places = [run.name for run in cuts]
    known = {family.name: family for family in FAMILIES}
    tasks = []
    for key in primary_metrics([base]):
        rows = [
            row
            for row in comparison.rows
            if (row.task, row.metric) == key and row.run in places
        ]
        rows.sort(key=lambda row: places.index(row.run))
        floor = next((row.floor for row in rows if row.floor), None)
        declared = base.metadata.get(key[0], {}).get("family") or families.get(key[0])
        family = known.get(str(declared), FAMILIES[-1])
        tasks += [TaskFinding(*key, family, floor, rows)] if rows else []
    alpha = comparison.alpha
    against = {way: _against(cuts, runs, alpha) for way, runs in ways.items()}
    draws = len({run.pruning.get("seed") for run in ways.get("random", ())})
    file = sweep.path / "profile" / "profile.json"
    profile = read_json(file) if file.is_file() else {}
    return Findings(base, cuts, tasks, comparison, against, draws, profile)


def _rank(way: str) -> list[bool]:
    """Return what puts plain cuts by a criterion before all other ways, and random cuts last."""
    return [way == "random", "healed by" in way, way.startswith("recipe=")]


def _against(
    cuts: Sequence[Run], others: Sequence[Run], alpha: float
) -> dict[str, set[str]]:
    """Return by task what is shown of any cut against all others of the same size."""
    pairs = [
        (other, run)
        for run in cuts
        for other in others
        if other.expansion_ratio == run.expansion_ratio
    ]
    shown: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in compared_pairs(pairs, alpha):
        shown[row.task, row.run.partition(" against ")[0]].add(row.verdict)
    by_task: dict[str, set[str]] = defaultdict(set)
    for (task, _), verdicts in shown.items():
        by_task[task] |= verdicts if len(verdicts) == 1 else {"not shown"}
    return by_task
