"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.agreement import agreement, collapse_notes
from lm_eval_pruned.compare.floors import Standing, standings
from lm_eval_pruned.compare.judge import Case, Difference, judged
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    paired_documents,
)
from lm_eval_pruned.compare.trends import TaskCorrelation, TaskTrend, over_ratios
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.groups import is_control, primary_metrics
from lm_eval_pruned.results.runs import is_sweep, read_run, read_sweep
from lm_eval_pruned.results.settings import COMPARED, differing, listed


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.margin import Margin

    Key = tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` says: tests at level `alpha`, and within `margin` if asked."""

    base: str
    alpha: float
    rows: tuple[Difference, ...]
    correlations: tuple[TaskCorrelation, ...]
    trends: tuple[TaskTrend, ...]
    notes: tuple[str, ...]
    margin: Margin | None = None
    floors: tuple[Standing, ...] = ()


def read_comparands(paths: Sequence[str]) -> tuple[Run, list[Run]]:
    """Read what ``compare BASE RUN [RUN...]`` names; ResultsError if that is nothing to compare.

    A sweep folder as BASE means its baseline; as RUN, or without another path, its other
    configurations. Its floors come with it. Runs of one name are called by their paths.
    """
    found: list[Run] = []
    for number, path in enumerate(paths):
        if not is_sweep(path):
            found.append(read_run(path))
            continue
        sweep = read_sweep(path)
        baseline, others = split_sweep(list(sweep.runs), str(path))
        found += [baseline] * (not number)
        found += [*others * (number > 0 or len(paths) == 1), *sweep.floors]
    if len(found) < 2:
        raise ResultsError(
            "There is nothing to compare: pass a base and at least one other run, or a sweep "
            f"folder with several configurations. {' '.join(found[0].notes)}".rstrip()
        )
    names = Counter(run.name for run in found)
    return found[0], [
        replace(run, name=str(run.path)) if names[run.name] > 1 else run
        for run in found[1:]
    ]


def split_sweep(runs: list[Run], where: str) -> tuple[Run, list[Run]]:
    """Return the baseline of a sweep and its other runs; ResultsError if none is unpruned."""
    baseline = next((run for run in runs if run.is_baseline), None)
    if baseline is None:
        raise ResultsError(
            f"{where} has no finished run of the unpruned model to compare with: add prune_percent "
            "0 to the sweep, or name a base: `compare BASE RUN`."
        )
    return baseline, [run for run in runs if run is not baseline]


def kept_in_sweep(path: str) -> dict[Key, str | None]:
    """Return what the scores of a sweep's configuration keep, by task and metric, as tables show it.

    `path` is a folder or a results file of the configuration; empty where it belongs to no sweep, or
    to one without results of the unpruned model.
    """
    above = Path(path).resolve().parents
    folder = next((each for each in above if is_sweep(each)), None)
    sweep = read_sweep(folder) if folder else None
    base = next((r for r in sweep.runs if r.is_baseline), None) if sweep else None
    if sweep is None or base is None:
        return {}
    rows = compare(base, [read_run(path), *sweep.floors]).rows
    return {(row.task, row.metric): row.kept_text for row in rows}


def compare(
    base: Run,
    runs: Sequence[Run],
    *,
    alpha: float = 0.05,
    subtasks: bool = False,
    margin: Margin | None = None,
    margins: Mapping[Key, Margin] | None = None,
    read: DocumentReader | None = None,
    texts: bool = True,
) -> Comparison:
    """Compare runs with a base, by tests at level `alpha`, and within a `margin` if there is one.

    `subtasks` are the members of groups that have scores, and `read` knows documents already. What is
    tested are the primary scores, or those of `margins`, within a margin for each.
    Without `texts`, nothing says which answer is the commonest. Runs of models that know nothing
    are not compared: they are the floors of the others.

    ResultsError if samples cannot be read, or two runs saw different documents or versions of a task,
    or have no task in common; ValueError if `alpha` is out of range.
    """
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha={alpha} is not between 0 and 1: pass one such as 0.05."
        )
    floors = [run for run in runs if run.is_floor]
    runs = [run for run in runs if not run.is_floor] or floors
    everything = [base, *(run for run in runs if run is not base)]
    notes = [note for run in everything for note in run.notes]
    cases: list[Case] = []
    read = read or DocumentReader()
    for run in runs:
        shared = [task for task in base.tasks(subtasks=subtasks) if task in run.tasks()]
        if not shared:
            raise ResultsError(f"{base.name} and {run.name} have no task in common.")
        for one, other in ((base, run), (run, base)):
            names, has = one.tasks(subtasks=subtasks), other.tasks()
            if lacks := ", ".join(task for task in names if task not in has):
                said = f"{other.name} has no results for {lacks}, which {one.name} has."
                notes.append(said)
        notes += settings_notes(base, run, shared)
        primary = (
            [*margins] if margins else primary_metrics([base, run], subtasks=subtasks)
        )
        if margin:
            for key in primary:
                margin.check(*key, base.scores[key].value, run.scores[key].value)
        both = [key for key in base.scores if key[0] in shared and key in run.scores]
        for key in both:
            pair = paired_documents(base, run, *key, read)
            family = key if margins else key[0], is_control(run)
            within = margins.get(key) if margins else margin
            cases.append(Case(base, run, key, pair, family, key in primary, within))
    counted = [(case.run, case.key, case.primary) for case in cases]
    known = standings(base, floors, counted, alpha, read)
    rows = [
        replace(
            row,
            floor=known.get((case.run.name, *case.key)),
            answers=agreement(case.pair, case.key[1], texts) if case.primary else None,
        )
        for case, row in zip(cases, judged(cases, alpha), strict=True)
    ]
    of_base = tuple(each for (name, *_), each in known.items() if name == base.name)
    low = [each for each in of_base if each.primary and each.above_floor is False]
    notes += [each.note(base.name) for each in low]
    notes += collapse_notes(base.name, [(r.run, r.task, r.answers) for r in rows])
    if margin:
        sizes = {r.task: margin.size(r.base_score, r.score) for r in rows if r.primary}
        if without := [task for task, size in sizes.items() if size is None]:
            notes.append(margin.misfit(listed(without)))
    told = tuple(rows), *over_ratios(everything, alpha, read), tuple(notes)
    return Comparison(base.name, alpha, *told, margin, of_base)


def settings_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return what two runs did not have in common beside the model."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        one, other = (each.settings.get(task, {}) for each in (base, run))
        names = differing(one, other, COMPARED)
        if names:
            found.setdefault(", ".join(names), []).append(task)
    return [
        f"{run.name} was evaluated with different settings than {base.name} "
        f"({labels}){'' if len(on) == len(tasks) else f' on {listed(on)}'}, so a "
        "difference may not come from the model."
        for labels, on in found.items()
    ]
