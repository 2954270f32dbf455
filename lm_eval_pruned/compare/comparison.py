"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.cases import Case
from lm_eval_pruned.compare.claims import CLAIM_LEVEL
from lm_eval_pruned.compare.floors import Standing, standings
from lm_eval_pruned.compare.judge import Difference, judged
from lm_eval_pruned.compare.pairing import agreement
from lm_eval_pruned.compare.trends import Correlation, Trend, over_ratios
from lm_eval_pruned.results.files import COMPARED, ResultsError, Run, listed
from lm_eval_pruned.results.groups import is_control, primary_metrics
from lm_eval_pruned.results.runs import is_sweep, read_run, read_sweep


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_eval_pruned.compare.margins import Margin

    Key = tuple[str, str]

#: A model has collapsed to one answer where this share of its answers, or more, is the same.
COLLAPSED = 0.9


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` says: tests at level `alpha`, and within `margin` if asked."""

    base: str
    alpha: float
    rows: tuple[Difference, ...]
    correlations: tuple[Correlation, ...]
    trends: tuple[Trend, ...]
    notes: tuple[str, ...]
    margin: Margin | None = None
    floors: tuple[Standing, ...] = ()


def read_comparands(paths: Sequence[str]) -> tuple[Run, list[Run]]:
    """Read what ``compare BASE RUN [RUN...]`` names; ResultsError if that is nothing to compare.

    A sweep folder as BASE means its baseline; as RUN, or without another path, its other
    configurations. Its floors come with it. Runs of one name are called by their paths.
    """
    runs: list[Run] = []
    for number, path in enumerate(paths):
        if not is_sweep(path):
            runs.append(read_run(path))
            continue
        sweep = read_sweep(path)
        baseline, others = sweep.split()
        if number == 0:
            runs.append(baseline)
        if number > 0 or len(paths) == 1:
            runs += others
        runs += sweep.floors
    if len(runs) < 2:
        raise ResultsError(
            "There is nothing to compare: pass a base and at least one other run, or a sweep "
            f"folder with several configurations. {' '.join(runs[0].notes)}".rstrip()
        )
    names = Counter(run.name for run in runs)
    return runs[0], [
        replace(run, name=str(run.path)) if names[run.name] > 1 else run
        for run in runs[1:]
    ]


def compare(
    base: Run,
    runs: Sequence[Run],
    *,
    alpha: float = 0.05,
    subtasks: bool = False,
    margin: Margin | None = None,
    margins: Mapping[Key, Margin] | None = None,
) -> Comparison:
    """Compare runs with a base, by tests at level `alpha`, and within a `margin` if there is one.

    `subtasks` are the members of groups that have scores. What is tested are the primary scores, or
    those of `margins`, within a margin for each.
    Runs of models that know nothing are not compared: they are the floors of the others.

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
    for run in runs:
        shared = [task for task in base.tasks(subtasks=subtasks) if task in run.tasks()]
        if not shared:
            raise ResultsError(f"{base.name} and {run.name} have no task in common.")
        notes += _missing_tasks(base, run, subtasks)
        notes += settings_notes(base, run, shared)
        primary = (
            [*margins] if margins else primary_metrics([base, run], subtasks=subtasks)
        )
        for key in [key for key in base.scores if key[0] in shared]:
            if key not in run.scores:
                continue
            if margin and key in primary:
                margin.check(*key, base)
            family = key if margins else key[0], is_control(run)
            within = margins.get(key) if margins else margin
            cases.append(Case(base, run, key, family, key in primary, within))
    scored = [(case.run, case.key, case.primary) for case in cases]
    level = CLAIM_LEVEL if margins else alpha
    known = standings(base, floors, scored, alpha, level)
    rows = tuple(
        replace(
            row,
            floor=known.get((row.run, row.task, row.metric)),
            answers=agreement(row.case.pair, row.metric) if row.primary else None,
        )
        for row in judged(cases, alpha)
    )
    of_base = tuple(s for (name, *_), s in known.items() if name == base.name)
    low = [s for s in of_base if s.primary and s.above_floor is False]
    notes += [standing.note(base.name) for standing in low]
    notes += _collapse_notes(base.name, rows)
    if margin:
        sizes = {row.task: row.case.margin_size for row in rows if row.primary}
        if without := [task for task, size in sizes.items() if size is None]:
            notes.append(margin.misfit(listed(without)))
    # A verdict is on one size.
    correlations, trends = ((), ()) if margins else over_ratios(everything, alpha)
    return Comparison(
        base.name, alpha, rows, correlations, trends, tuple(notes), margin, of_base
    )


def _missing_tasks(base: Run, run: Run, subtasks: bool) -> Iterator[str]:
    """Yield what each of two runs has no results for, and the other has."""
    for one, other in ((base, run), (run, base)):
        names, has = one.tasks(subtasks=subtasks), other.tasks()
        if lacks := ", ".join(task for task in names if task not in has):
            yield f"{other.name} has no results for {lacks}, which {one.name} has."


def _collapse_notes(base: str, rows: Sequence[Difference]) -> list[str]:
    """Return a note for each task to which a run, or its base, gives one answer."""
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        both = row.answers
        if both and max(both.base_commonest, both.commonest) >= COLLAPSED:
            by_run = {base: both.base_commonest, row.run: both.commonest}
            shares.setdefault(row.task, {}).update(by_run)
    return [
        f"{task}: the answers collapse to one. Share of the commonest answer: "
        f"{', '.join(f'{share:.0%} of {run}' for run, share in by_run.items())}."
        for task, by_run in shares.items()
    ]


def settings_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return what two runs did not have in common beside the model."""
    tasks_by_names: dict[str, list[str]] = {}
    for task in tasks:
        before, after = (item.settings.get(task, {}) for item in (base, run))
        names = [name for name in COMPARED if before.get(name) != after.get(name)]
        if names:
            tasks_by_names.setdefault(", ".join(names), []).append(task)
    return [
        f"{run.name} was evaluated with different settings than {base.name} "
        f"({names}){'' if len(on) == len(tasks) else f' on {listed(on)}'}, so a "
        "difference may not come from the model."
        for names, on in tasks_by_names.items()
    ]
