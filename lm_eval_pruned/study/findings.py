"""What a study found: each task against its floor, and whether the dichotomy holds for the model."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.compare.comparison import compare, difference_test, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.report.pairs import compared_pairs
from lm_eval_pruned.results.documents import Levels
from lm_eval_pruned.results.files import ResultsError, as_mapping
from lm_eval_pruned.results.groups import (
    LEFT,
    TAKEN,
    family_of,
    is_control,
    is_perplexity,
    primary_metrics,
)


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults

#: What the ids of configurations that know nothing begin with.
FLOOR = "floor-"


class Floor(NamedTuple):
    """The best score without knowledge, and what has it: a level, or a model that knows nothing."""

    value: float
    by: str
    run: Run | None = None


@dataclass(frozen=True)
class TaskFinding:
    """One task: the `rows` of its cuts from the largest size down, and its `floor` if it is known.

    `above` says by run, the unpruned one first, whether the score is shown to be above the floor;
    None where nothing can say.
    """

    task: str
    metric: str
    base_score: float
    floor: Floor | None
    above: dict[str, bool | None]
    rows: list[Difference]

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
    floors = [run for run in sweep.runs if run.name.startswith(FLOOR)]
    base, others = split_sweep(
        [run for run in sweep.runs if run not in floors], str(sweep.path)
    )
    others = [run for run in others if set(run.tasks()) & set(base.tasks())]
    beside = {
        "random": [run for run in others if is_control(run)],
        "recipe=best": [run for run in others if recipes.get(run.name) == "best"],
    }
    cuts = [run for run in others if not any(run in runs for runs in beside.values())]
    cuts.sort(key=lambda run: -(run.expansion_ratio or 0))
    if not cuts:
        raise ResultsError(f"{sweep.path} holds no finished pruned model yet.")
    floors += getattr(sweep, "floors", ())
    read, tasks = DocumentReader(), []
    comparison = compare(base, cuts, alpha=alpha, read=read)
    for key in primary_metrics([base]):
        rows = [row for row in comparison.rows if (row.task, row.metric) == key]
        floor, here = _floor(base, floors, key, read), {row.run for row in rows}
        above = {
            run.name: _is_above(run, floor, key, alpha, read)
            for run in (base, *cuts)
            if run is base or run.name in here
        }
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


def _floor(
    base: Run, floors: Sequence[Run], key: tuple[str, str], read: DocumentReader
) -> Floor | None:
    documents, up = read(base, *key), base.scores[key].higher_is_better
    levels = documents.levels if documents else Levels()
    named = {"chance": levels.chance, "commonest answer": levels.majority}
    found = [Floor(value, by) for by, value in named.items() if value is not None]
    for run in floors:
        if key in run.scores:
            name = run.name.removeprefix(FLOOR)
            found.append(Floor(run.scores[key].value, name, run))
    best = max if up else min
    return best(found, key=lambda each: each.value) if found else None


def _is_above(
    run: Run,
    floor: Floor | None,
    key: tuple[str, str],
    alpha: float,
    read: DocumentReader,
) -> bool | None:
    """Return whether a score is shown to be better than the floor; None where nothing can say."""
    score = run.scores[key]
    if floor is None:
        # Whatever knows a language is far away from the perplexity of what does not.
        return True if is_perplexity(key[1]) else None
    gain = score.value - floor.value
    if score.higher_is_better is False:
        gain = -gain
    if floor.run is not None:
        test, _ = difference_test(floor.run, run, key, alpha, read)
        if test.p is not None:
            return test.p < alpha and gain > 0
    if score.stderr is None:
        return None
    return gain > NormalDist().inv_cdf(1 - alpha / 2) * score.stderr
