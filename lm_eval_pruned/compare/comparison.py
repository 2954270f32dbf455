"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.agreement import Agreement, agreement, collapse_notes
from lm_eval_pruned.compare.floors import Standing, standings
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    paired_documents,
    paired_test,
)
from lm_eval_pruned.compare.statistics import (
    PairedTest,
    false_discovery,
    unpaired_difference,
)
from lm_eval_pruned.compare.trends import TaskCorrelation, TaskTrend, over_ratios
from lm_eval_pruned.compare.verdicts import Claim, Margin, claims, verdict_of
from lm_eval_pruned.results.files import ResultsError, Run, finite_or_none
from lm_eval_pruned.results.groups import is_control, primary_metrics
from lm_eval_pruned.results.runs import is_sweep, read_run, read_sweep
from lm_eval_pruned.results.settings import COMPARED, differing, listed


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.pairing import Pair

    Key = tuple[str, str]
    #: A test, and of how many documents it is.
    Tested = tuple[PairedTest, int | None]


@dataclass(frozen=True)
class Difference:
    """One row of the table: one run against the base, on one task and metric.

    `difference` is `score` - `base_score` in the metric's own unit, `relative` the same as a share of
    `base_score`; from `low` to `high` is its interval, at the level that the correction leaves where
    there is a `q`. `p` is of the single test, `q` corrected over the runs that are compared on the
    task (Benjamini-Hochberg), without those that were pruned at random; only the `primary` metric
    of a task has one. None means not known.

    The verdict is ``better``, ``worse`` or, where the task does not say which way is up,
    ``different``, where q < alpha; else ``not shown``, which does not mean that there is no
    difference,
    ``not tested``, ``not comparable`` (a score is not finite) or ``restated`` (not primary). With a
    margin it can be ``equivalent`` or ``not worse``, and is ``undecided`` where nothing is shown.
    """

    run: str
    task: str
    metric: str
    base_score: float
    score: float
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    smallest_detectable: float | None
    documents: int | None
    method: str
    primary: bool
    verdict: str
    claim: Claim | None = None
    floor: Standing | None = None
    answers: Agreement | None = None

    @property
    def at_floor(self) -> bool:
        """Whether the run is not shown to be above the floor; False where that was not tested."""
        return self.floor is not None and self.floor.above_floor is False

    @property
    def kept_text(self) -> str | None:
        """What the run keeps of the score above the floor, as `Standing` says it; None without a floor."""
        return self.floor.kept_text if self.floor else None

    @property
    def said(self) -> str:
        """The verdict, and that the run is at the floor where it is."""
        return f"{self.verdict} (at floor)" if self.at_floor else self.verdict


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
    read: DocumentReader | None = None,
    texts: bool = True,
) -> Comparison:
    """Compare runs with a base, by tests at level `alpha`, and within a `margin` if there is one.

    `subtasks` are the members of groups that have scores, and `read` knows documents already.
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
    asked: list[tuple[Run, Key, bool, Tested, Agreement | None]] = []
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
        primary = primary_metrics([base, run], subtasks=subtasks)
        if margin is not None:
            for key in primary:
                margin.check(*key, base.scores[key].value, run.scores[key].value)
        both = [key for key in base.scores if key[0] in shared and key in run.scores]
        for key in both:
            pair = paired_documents(base, run, *key, read)
            test = difference_test(base, run, key, pair, alpha)
            answers = agreement(pair, key[1], texts) if key in primary else None
            asked.append((run, key, key in primary, test, answers))
    families = [(key[0], is_control(run)) for run, key, *_ in asked]
    tests = [test if main else None for _, _, main, (test, _), _ in asked]
    corrected = false_discovery([t.p if t else None for t in tests], families, alpha)
    scores = [(margin, base.scores[key], run.scores[key]) for run, key, *_ in asked]
    claimed, rows = claims(tests, scores, families), []
    counted = [each[:3] for each in asked]
    known = standings(base, floors, counted, alpha, read)
    found = zip(asked, corrected, claimed, strict=True)
    for (run, key, main, test, answers), shown, claim in found:
        of = (test, shown, claim, margin, main)
        more: dict[str, Any] = {
            "floor": known.get((run.name, *key)),
            "answers": answers,
        }
        rows.append(difference_of(base, run, key, alpha, *of, **more))
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


def difference_test(
    base: Run, run: Run, key: Key, pair: Pair | None, alpha: float = 0.05
) -> Tested:
    """Test what a run differs by, on the `pair` of their documents, else on standard errors.

    Returns the test, and how many documents it is of.
    """
    one, other = base.scores[key], run.scores[key]
    documents, difference = len(pair[0].keys) if pair else None, other.value - one.value
    endless = [r.name for r in (base, run) if not math.isfinite(r.scores[key].value)]
    if endless:
        why = f"the score of {' and '.join(endless)} is not a finite number"
    elif pair:
        return paired_test(pair, alpha), documents
    elif one.stderr is None or other.stderr is None:
        why = "neither samples nor standard errors"
    else:
        stderrs = one.stderr, other.stderr
        return unpaired_difference(difference, *stderrs, alpha=alpha), None
    return PairedTest(difference, f"none: {why}", level=alpha), documents


def difference_of(
    base: Run,
    run: Run,
    key: Key,
    alpha: float,
    tested: Tested,
    corrected: tuple[float | None, float | None],
    claim: Claim | None = None,
    margin: Margin | None = None,
    primary: bool = True,
    **more: Any,
) -> Difference:
    """Return a row of what `difference_test` found and `false_discovery` left, with its verdict."""
    (test, documents), (q, level) = tested, corrected
    before, after = base.scores[key].value, run.scores[key].value
    verdict, change = "restated", after - before
    if not math.isfinite(change):
        verdict = "not comparable"
    elif primary:
        up = base.scores[key].higher_is_better
        verdict = verdict_of(change, q, alpha, up, margin, claim)
    share = finite_or_none(change / abs(before)) if before else None
    ends = test.interval(level or test.level)
    size = None if q is None else test.smallest_detectable(level)
    found: list[Any] = [before, after, change, share, *ends, test.p, q, size, documents]
    found += [test.method, primary, verdict, claim]
    return Difference(run.name, *key, *found, **more)


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
