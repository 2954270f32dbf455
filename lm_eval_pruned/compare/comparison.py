"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
from lm_eval_pruned.compare.stopping import partial_notes, sequential, stopping_of
from lm_eval_pruned.compare.trends import TaskCorrelation, TaskTrend, over_ratios
from lm_eval_pruned.compare.verdicts import Claim, Margin, claims, verdict_of
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.groups import is_control, primary_metrics
from lm_eval_pruned.results.runs import notes_on, read_run, read_sweep
from lm_eval_pruned.results.settings import COMPARED, differing, label, listed


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.pairing import Reader
    from lm_eval_pruned.results.stopping_record import Stopping

    Key = tuple[str, str]


@dataclass(frozen=True)
class Difference:
    """One row of the table: one run against the base, on one task and metric.

    Attributes:
        difference: `score` - `base_score`, in the metric's own unit.
        relative: The same as a share of `base_score`, or None.
        low: Lower end of the interval of the difference, or None. At the level that the
            adjustment leaves where there is a q: 0 is outside exactly where q < alpha.
        high: Upper end.
        p: p of the single test, or None where none was possible.
        q: p adjusted over the runs that are compared on the task (Benjamini-Hochberg), those
            that were pruned at random apart; or None.
        smallest_detectable: See `PairedTest`, at the level that the adjustment leaves, or None.
        documents: Documents both runs were scored on, or None.
        method: Test that was made, or why none was.
        primary: Whether this metric stands for its task; others stay outside of the adjustment.
        verdict: ``better`` or ``worse``, where q < alpha; ``different``, where the task does
            not say which way is up; ``not shown``, which is not the same as no difference;
            ``not tested``; ``not comparable``, where a score is not finite; ``restated``, where
            the metric is not primary. With a margin ``equivalent`` or ``not worse``, else
            ``undecided`` instead of ``not shown`` and ``not tested``.
        claim: What is shown of the margin that was asked for; None without one.
        of: Documents that there are, where the run stopped after fewer: all else is then of
            `documents` and holds for stopping. None else.
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
    of: int | None = None

    @classmethod
    def made(
        cls,
        run: str,
        key: Key,
        scores: tuple[float, float],
        test: PairedTest,
        q: float | None,
        level: float | None,
        **more: Any,
    ) -> Difference:
        """Make the row of a run from its test, and from q and the `level` left by the correction.

        `scores` are those of base and run; `more` are the other attributes, and those of the test
        that are another's.
        """
        before, after = scores
        low, high = test.interval(level or test.level)
        of_test = {"p": test.p, "method": test.method, "primary": True}
        return cls(
            run=run,
            task=key[0],
            metric=key[1],
            base_score=before,
            score=after,
            difference=after - before,
            relative=relative_change(before, after),
            low=low,
            high=high,
            q=q,
            smallest_detectable=None if q is None else test.smallest_detectable(level),
            **{**of_test, **more},
        )


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


def read_comparands(paths: Sequence[str]) -> tuple[Run, list[Run]]:
    """Read what ``compare BASE RUN [RUN...]`` names.

    A sweep folder as BASE stands for its baseline and, where it is the only
    argument, its other configurations are the runs; as RUN it stands for all its
    configurations but the baseline.

    Raises:
        ResultsError: Something cannot be read, or there is nothing to compare.
    """
    found: list[Run] = []
    for number, path in enumerate(paths):
        if is_sweep(path):
            baseline, others = split_sweep(list(read_sweep(path).runs), str(path))
            found += [] if number else [baseline]
            found += others if number or len(paths) == 1 else []
        else:
            found.append(read_run(path))
    if len(found) < 2:
        raise ResultsError(
            "There is nothing to compare: give a base and at least one other run, or a sweep "
            "folder with several configurations."
        )
    # Runs that would share a name are called by their paths.
    names = [run.name for run in found]
    return found[0], [
        run if names.count(run.name) == 1 else replace(run, name=str(run.path))
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


def compare(
    base: Run,
    runs: Sequence[Run],
    *,
    alpha: float = 0.05,
    subtasks: bool = False,
    margin: Margin | None = None,
    read: DocumentReader | None = None,
) -> Comparison:
    """Compare runs with a base.

    Args:
        base: What the others are compared with.
        runs: At least one.
        alpha: Level of the tests, between 0 and 1.
        subtasks: Whether to compare the members of groups that have scores too.
        margin: Whether differences lie within it is asked too.
        read: Reader whose documents are used again.

    Raises:
        ResultsError: Samples cannot be read, two runs saw different documents or
            different versions of a task, or have no task in common.
        ValueError: `alpha` is out of range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not between 0 and 1: give 0.05, say.")
    everything = [base, *(run for run in runs if run is not base)]
    notes = notes_on(everything)
    read = read or DocumentReader()
    pairs: list[_Pair] = []
    for run in runs:
        for one, other in ((base, run), (run, base)):
            has = other.tasks()
            lacks = [each for each in one.tasks(subtasks=subtasks) if each not in has]
            if lacks:
                what = ", ".join(lacks)
                notes.append(
                    f"{other.name} has no results for {what}, which {one.name} has."
                )
        shared = [task for task in base.tasks(subtasks=subtasks) if task in run.tasks()]
        if not shared:
            raise ResultsError(f"{base.name} and {run.name} have no task in common.")
        notes += settings_notes(base, run, shared)
        notes += partial_notes(base, run, shared)
        primary = primary_metrics([base, run], subtasks=subtasks)
        for key in base.scores:
            if key[0] in shared and key in run.scores:
                tested = difference_test(base, run, key, alpha, read)
                stopping = stopping_of(base, run, key[0])
                pairs.append(_Pair(run, key, key in primary, stopping, *tested))
    families = [(pair.key[0], is_control(pair.run)) for pair in pairs]
    tests = [
        pair.test if pair.primary and not pair.stopping else None for pair in pairs
    ]
    adjusted = false_discovery(
        [test.p if test else None for test in tests], families, alpha
    )
    asked = [
        (margin, base.scores[each.key], each.run.scores[each.key]) for each in pairs
    ]
    judged = zip(pairs, adjusted, claims(tests, asked, families), strict=True)
    rows = [_row(base, pair, *q, claim, alpha, margin) for pair, q, claim in judged]
    without = {
        row.task
        for row in rows
        if margin and row.primary and not margin.size(row.base_score, row.score)
    }
    if margin and without:
        notes.append(
            f"{margin.text} is no margin for {listed(sorted(without))}, whose scores are not "
            "between 0 and 1: give a share such as 2%, or a number in the metric's own unit."
        )
    weaker = {row.task for row in rows if "weaker" in row.method}
    if weaker:
        notes.append(
            f"Without usable samples, {', '.join(sorted(weaker))} had to be tested on the standard "
            "errors, as if the runs had seen different documents; that is weaker than a paired "
            "test: evaluate with --log_samples."
        )
    across = over_ratios(everything, alpha, read)
    return Comparison(base.name, alpha, tuple(rows), *across, tuple(notes), margin)


def difference_test(
    base: Run, run: Run, key: Key, alpha: float = 0.05, read: Reader | None = None
) -> tuple[PairedTest, int | None]:
    """Test what a run differs by, on its documents where both have samples, else on stderrs.

    Returns the test, at the level of the last look where there were several, and how many documents
    it is of. ResultsError if the runs saw different documents or task versions.
    """
    one, other = base.scores[key], run.scores[key]
    stopping = stopping_of(base, run, key[0])
    level = stopping.nominal_level if stopping else alpha
    pair = paired_documents(base, run, *key, read)
    documents, difference = len(pair[0].keys) if pair else None, other.value - one.value
    endless = [r.name for r in (base, run) if not math.isfinite(r.scores[key].value)]
    if endless:
        why = f"the score of {' and '.join(endless)} is no finite number"
    elif pair:
        return paired_test(pair, level), documents
    elif one.stderr is None or other.stderr is None:
        why = "neither samples nor standard errors"
    elif stopping:
        why = f"{stopping.text} documents, without usable samples"
    else:
        stderrs = (one.stderr, other.stderr)
        return unpaired_difference(difference, *stderrs, alpha=alpha), None
    return PairedTest(difference, f"none: {why}", level=level), documents


class _Pair(NamedTuple):
    run: Run
    key: Key
    primary: bool
    stopping: Stopping | None
    test: PairedTest
    documents: int | None


def _row(
    base: Run,
    pair: _Pair,
    q: float | None,
    level: float | None,
    claim: Claim | None,
    alpha: float,
    margin: Margin | None,
) -> Difference:
    """Return a row with its verdict, and with all else at the level that the correction leaves."""
    run, key, primary, stopping, test, documents = pair
    before, after = base.scores[key].value, run.scores[key].value
    p, method, of = test.p, test.method, None
    if stopping:
        of = stopping.of if stopping.is_partial else None
        if of is not None and p is not None:
            # On the documents that were used.
            before = after - test.difference
        method += f", group sequential, {stopping.text} documents" if documents else ""
        size = margin.size(before, after) if margin else None
        p, q, claim = sequential(stopping, key[1], test.difference, margin, size)
        q, level, claim = (q, test.level, claim) if primary else (None, None, None)
    if not (math.isfinite(before) and math.isfinite(after)):
        verdict = "not comparable"
    elif primary:
        up = base.scores[key].higher_is_better
        verdict = verdict_of(after - before, q, alpha, up, margin, claim)
    else:
        verdict = "restated"
    return Difference.made(
        *(run.name, key, (before, after), test, q, level),
        p=p,
        documents=documents,
        method=method,
        primary=primary,
        verdict=verdict,
        claim=claim,
        of=of,
    )


def relative_change(base: float, run: float) -> float | None:
    """Return (run - base) / base, or None where the base is 0 or either is no number."""
    if base == 0 or not (math.isfinite(base) and math.isfinite(run)):
        return None
    return (run - base) / abs(base)


def settings_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return what two runs did not have in common beside the model."""
    found: dict[tuple[str, ...], list[str]] = {}
    for task in tasks:
        one, other = (each.settings.get(task, {}) for each in (base, run))
        names = differing(one, other, COMPARED)
        if stopping_of(base, run, task):
            # It has other documents by design, and is answered in parts.
            expected = ("answer_paths", "documents", "task_hash")
            names = [name for name in names if name not in expected]
        if names:
            found.setdefault(tuple(map(label, names)), []).append(task)
    return [
        f"{run.name} was evaluated with other settings than {base.name} "
        f"({', '.join(labels)}){'' if len(on) == len(tasks) else f' on {listed(on)}'}, so a "
        "difference need not come from the model."
        for labels, on in found.items()
    ]
