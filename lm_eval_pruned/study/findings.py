"""What a study found: each task against its floor, and the verdict on the dichotomy in sentences."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.report.pairs import compared_pairs
from lm_eval_pruned.results.files import ResultsError, as_mapping
from lm_eval_pruned.results.groups import (
    LEFT,
    TAKEN,
    family_of,
    is_control,
    is_perplexity,
    primary_metrics,
)
from lm_eval_pruned.results.runs import FLOOR


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults


@dataclass(frozen=True)
class TaskFinding:
    """One task: the `rows` of its cuts from the largest size down, and its `floor` if it is known."""

    task: str
    metric: str
    floor: Standing | None
    rows: list[Difference]

    @property
    def level(self) -> str:
        """The floor and what has it: a level, or a model that knows nothing."""
        if self.floor is None:
            return "-"
        return f"{self.floor.floor:.3f} ({self.floor.floor_name.removeprefix(FLOOR)})"

    @property
    def can_fall(self) -> bool:
        """Whether a loss can be seen: an unpruned model at the floor has none to show."""
        return self.floor is None or self.floor.base_above_floor is not False

    @property
    def falls(self) -> list[Difference]:
        """Rows that are worse than the unpruned model, if that can be seen."""
        return [row for row in self.rows if row.verdict == "worse" and self.can_fall]

    @property
    def rises(self) -> list[Difference]:
        """Rows that are better than the unpruned model and not at the floor."""
        return [row for row in self.rows if row.said == "better"]


@dataclass(frozen=True)
class Findings:
    """The runs of one model, what of its tasks falls and rises, and the verdicts against chance.

    `asked` are the options of its sweep; `against` has the verdicts of cuts by the criterion against
    the other cuts of the same size, by their name in `beside` and task.
    """

    base: Run
    cuts: list[Run]
    beside: dict[str, list[Run]]
    tasks: list[TaskFinding]
    comparison: Comparison
    against: dict[str, dict[str, set[str]]]
    failed: list[str]
    asked: Mapping[str, Any]

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
        tasks += [TaskFinding(*key, floor, rows)] if rows else []
    against: dict[str, dict[str, set[str]]] = {}
    for way, runs in beside.items():
        against[way] = defaultdict(set)
        pairs = [
            (other, run)
            for run in cuts
            for other in runs
            if other.expansion_ratio == run.expansion_ratio
        ]
        for row in compared_pairs(pairs, alpha, read):
            against[way][row.task].add(row.verdict)
    failed = [f"{e.task} failed on {e.run}: {e.message}" for e in sweep.failures]
    asked = as_mapping(sweep.definition.get("definition"))
    return Findings(base, cuts, beside, tasks, comparison, against, failed, asked)


def size_of(run: Run) -> float:
    """Return the percentage of the neurons that was asked for, or that a run has lost."""
    record = run.pruning
    if asked := record["asked"].get("prune_percent"):
        return float(asked)
    kept = record["intermediate_size_after"] / record["intermediate_size_before"]
    return round(100 - 100 * kept, 1)


def sentences(name: str, found: Findings) -> list[str]:
    """Return what was found: verdict, losses, gains, the criterion against chance and the best cut."""
    losses = _told(_losses(found))
    others = {"random cuts": "random", "`recipe=best`": "recipe=best"}
    return [
        f"For {name} the dichotomy {found.verdict}: {_why(found)}.",
        f"A loss is first shown {losses}."
        if losses
        else "No loss is shown at any size.",
        f"{_gains(found) or 'No rise is shown in what the study calls robust'}.",
        *(
            f"Compared with {words} of the same size, {_told(_against(found, way)) or 'nothing was tested'}."
            for words, way in others.items()
        ),
    ]


def open_questions(found: Findings) -> list[str]:
    """Return what the results leave open, a sentence each."""
    unknown = [
        each.task
        for each in found.tasks
        if each.floor is None and not is_perplexity(each.metric)
    ]
    limit = found.base.config.get("limit")
    draws = len({run.pruning.get("seed") for run in found.beside["random"]})
    # Told already, in the first lines.
    floors = {each.note(found.base.name) for each in found.comparison.floors}
    notes = [note for note in found.comparison.notes if note not in floors]
    told = {
        f"No floor is known for {_joined(unknown)}.": unknown,
        f"Each task is cut to its first documents (limit {limit}), too few for small differences.": limit,
        f"Chance is estimated from random cuts of each size, one for each seed: {draws}.": draws,
    }
    return [
        *(
            f"{each.task} cannot show a loss: unpruned, it is not shown to be above {each.level}."
            for each in found.tasks
            if not each.can_fall
        ),
        *(text for text, applies in told.items() if applies),
        *[*found.failed, *notes][:8],
    ]


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _told(groups: Mapping[str, Sequence[str]]) -> str:
    """Return the phrases with their tasks filled in, without those that have none."""
    every = (phrase.format(_joined(tasks)) for phrase, tasks in groups.items() if tasks)
    return "; ".join(every)


def _why(found: Findings) -> str:
    taken, left = found.on(TAKEN), found.on(LEFT)
    if found.verdict == "cannot be decided":
        return "on one of its two sides, no task has a score that is shown to be above its floor"
    drops = [each.task for each in left if each.falls]
    rises = [each.task for each in left if each.rises and each.task not in drops]
    kept = [e.task for e in left if e.can_fall and e.task not in (*drops, *rises)]
    falls = [each.task for each in taken if each.falls]
    groups = {"a loss in {}": falls, "a rise above the floor in {}": rises}
    told = _told(
        groups | {"a loss in {} as well": drops, "no change shown in {}": kept}
    )
    return told if falls else f"no loss of knowledge or language is shown; {told}"


def _losses(found: Findings) -> Mapping[str, list[str]]:
    phrases = {run.name: f"at {size_of(run):g} % in {{}}" for run in found.cuts}
    groups: dict[str, list[str]] = {phrase: [] for phrase in phrases.values()}
    for each in found.on(TAKEN):
        for row in each.falls[:1]:
            groups[phrases[row.run]].append(each.task)
    return groups


def _gains(found: Findings) -> str:
    sizes, told = {run.name: size_of(run) for run in found.cuts}, []
    for each in found.on(LEFT):
        for row in [row for row in each.rows if row.verdict == "better"][-1:]:
            above = row.floor and row.floor.above_floor
            told.append(
                f"{each.task} goes from {row.base_score:.3f} to {row.score:.3f} at {sizes[row.run]:g} "
                f"%, {'above' if above else 'not shown to be above'} its floor, {each.level}"
            )
    return "; ".join(told)


def _against(found: Findings, way: str) -> Mapping[str, list[str]]:
    phrases = {
        (True, False): "the criterion keeps more in {}",
        (False, True): "it keeps less in {}",
        (True, True): "it keeps more at some sizes and less at others in {}",
        (False, False): "no difference is shown in {}",
    }
    groups: dict[str, list[str]] = {phrase: [] for phrase in phrases.values()}
    for task, verdicts in found.against[way].items():
        groups[phrases["better" in verdicts, "worse" in verdicts]].append(task)
    return groups
