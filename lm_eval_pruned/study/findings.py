"""What a study found: each task against its floor, and whether the dichotomy holds for the model."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

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
from lm_eval_pruned.study.preset import FLOOR


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults

HOLDS, PARTLY, FAILS, UNKNOWN = (
    "holds",
    "holds in part",
    "does not hold",
    "is not decided",
)


@dataclass(frozen=True)
class Floor:
    """The best score that needs no knowledge, and what has it: chance, or a model that knows nothing."""

    value: float
    by: str
    run: Run | None = None


@dataclass(frozen=True)
class TaskFinding:
    """One task on all sizes.

    Attributes:
        task, metric: Of the scores.
        floor: None where none is known.
        above: By run, whether the score is shown to be above the floor; None where nobody knows.
        rows: By run, the comparison with the unpruned model; the largest size first.
        base: Name of the unpruned run.
    """

    task: str
    metric: str
    floor: Floor | None
    above: dict[str, bool | None]
    rows: dict[str, Difference]
    base: str

    @property
    def side(self) -> str:
        """What the study says of tasks of this family: ``taken``, ``left`` or ``unknown``."""
        return family_of(self.task).side

    @property
    def can_fall(self) -> bool:
        """Whether a loss can be seen: a model at the floor has none to show."""
        return self.above[self.base] is not False

    @property
    def falls(self) -> list[str]:
        """Runs that are worse than the unpruned model, if it had anything to lose."""
        found = [name for name, row in self.rows.items() if row.verdict == "worse"]
        return found if self.can_fall else []

    @property
    def rises(self) -> list[str]:
        """Runs that are better than the unpruned model and above the floor."""
        better = (name for name, row in self.rows.items() if row.verdict == "better")
        return [name for name in better if self.above[name] is not False]


@dataclass(frozen=True)
class Findings:
    """Everything that the page says of one model.

    Attributes:
        base, cuts: The unpruned model, and the study's own cuts from the largest size down.
        controls: Random cuts.
        best: Cuts by ``recipe=best``.
        tasks: Those with results, in their order.
        comparison: Of the cuts with the unpruned model.
        random: Verdicts of the cuts against random ones, by task.
        notes: What failed or was not evaluated alike.
    """

    base: Run
    cuts: list[Run]
    controls: list[Run]
    best: list[Run]
    tasks: list[TaskFinding]
    comparison: Comparison
    random: dict[str, set[str]]
    notes: list[str]

    def on(self, side: str) -> list[TaskFinding]:
        """Return the tasks of one side, such as `TAKEN`."""
        return [each for each in self.tasks if each.side == side]

    @property
    def verdict(self) -> str:
        """Whether what the study says of its models can be said of this one."""
        taken = [each for each in self.on(TAKEN) if each.can_fall]
        left = [each for each in self.on(LEFT) if each.can_fall or each.rises]
        if not taken or not left:
            return UNKNOWN
        if not any(each.falls for each in taken) or all(each.falls for each in left):
            return FAILS
        rises = any(each.rises for each in left)
        return HOLDS if rises and not any(each.falls for each in left) else PARTLY


def read_findings(sweep: SweepResults, alpha: float) -> Findings:
    """Compare the runs of a study's sweep; ResultsError where no size or no unpruned run is done."""
    recipes = {
        str(each["id"]): as_mapping(each.get("arguments")).get("recipe")
        for each in sweep.definition["configurations"]
    }
    floors = [run for run in sweep.runs if run.name.startswith(FLOOR)]
    rest = [run for run in sweep.runs if run not in floors]
    base, others = split_sweep(rest, str(sweep.path))
    read = DocumentReader()
    others = [r for r in others if set(r.tasks()) & set(base.tasks())]
    controls = [run for run in others if is_control(run)]
    best = [run for run in others if recipes.get(run.name) == "best"]
    cuts = [run for run in others if run not in controls and run not in best]
    if not cuts:
        raise ResultsError(f"{sweep.path} holds no finished pruned model yet.")
    cuts.sort(key=lambda run: -(run.expansion_ratio or 0))
    comparison = compare(base, cuts, alpha=alpha, read=read)
    tasks = []
    for key in primary_metrics([base]):
        rows = {r.run: r for r in comparison.rows if (r.task, r.metric) == key}
        floor = floor_of(base, floors, key, read)
        scored = [base, *(run for run in cuts if run.name in rows)]
        above = {run.name: is_above(run, floor, key, alpha, read) for run in scored}
        ordered = {run.name: rows[run.name] for run in cuts if run.name in rows}
        tasks.append(TaskFinding(*key, floor, above, ordered, base.name))
    pairs = [
        (control, run)
        for run in cuts
        for control in controls
        if control.expansion_ratio == run.expansion_ratio
    ]
    random: dict[str, set[str]] = {}
    for row in compared_pairs(pairs, alpha, read):
        random.setdefault(row.task, set()).add(row.verdict)
    failed = [f"{e.task} failed on {e.run}: {e.message}" for e in sweep.failures]
    notes = [*failed, *comparison.notes]
    return Findings(base, cuts, controls, best, tasks, comparison, random, notes)


def floor_of(
    base: Run, floors: Iterable[Run], key: tuple[str, str], read: DocumentReader
) -> Floor | None:
    """Return the best score of chance, the commonest answer, and models that know nothing."""
    documents, up = read(base, *key), base.scores[key].higher_is_better
    levels = documents.levels if documents else Levels()
    named = {"chance": levels.chance, "the commonest answer": levels.majority}
    found = [Floor(value, by) for by, value in named.items() if value is not None]
    found += [
        Floor(run.scores[key].value, run.name.removeprefix(FLOOR), run)
        for run in floors
        if key in run.scores
    ]
    if up is None or not found:
        return None
    return (max if up else min)(found, key=lambda floor: floor.value)


def is_above(
    run: Run,
    floor: Floor | None,
    key: tuple[str, str],
    alpha: float,
    read: DocumentReader,
) -> bool | None:
    """Return whether a score is shown to be better than the floor; None where nobody can say."""
    score = run.scores[key]
    if floor is None:
        # A perplexity needs no floor: a model that knows nothing is far away from any other.
        return True if is_perplexity(key[1]) else None
    sign = 1 if score.higher_is_better else -1
    if floor.run is not None:
        test, _ = difference_test(floor.run, run, key, alpha, read)
        if test.p is not None:
            return test.p < alpha and sign * test.difference > 0
    if score.stderr is None:
        return None
    width = NormalDist().inv_cdf(1 - alpha / 2) * score.stderr
    return sign * (score.value - floor.value) > width


def size_of(run: Run) -> float:
    """Return the percentage of the neurons that a run has lost."""
    before, after = (
        run.pruning[f"intermediate_size_{when}"] for when in ("before", "after")
    )
    return round(100 * (1 - after / before), 1)


def joined(words: Sequence[str]) -> str:
    """Return words as part of a sentence.

    Example:
        >>> joined(["mmlu", "boolq", "piqa"])
        'mmlu, boolq and piqa'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]][len(words) < 2 :])
