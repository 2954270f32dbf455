"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.across_ratios import across_ratios
from lm_eval_pruned.compare.comparison_rows import Comparison, Difference
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    is_partial,
    paired_documents,
    paired_test,
)
from lm_eval_pruned.compare.stopping import (
    partial_notes,
    sequential_claims,
    sequential_q,
    sequential_test,
    stopping_of,
)
from lm_eval_pruned.compare.verdicts import claims, verdict_of
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.groups import is_control, primary_metrics
from lm_eval_pruned.results.runs import notes_on, read_run, read_sweep
from lm_eval_pruned.results.settings import listed, other_settings


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.margins import Claim, Margin


def read_comparands(paths: Sequence[str]) -> tuple[Run, list[Run]]:
    """Read what ``compare BASE RUN [RUN...]`` names.

    A sweep folder as BASE stands for its baseline and, where it is the only
    argument, its other configurations are the runs; as RUN it stands for all its
    configurations but the baseline.

    Raises:
        ResultsError: Something cannot be read, or there is nothing to compare.
    """
    bases: list[Run] = []
    runs: list[Run] = []
    for number, path in enumerate(paths):
        if is_sweep(path):
            baseline, others = split_sweep(list(read_sweep(path).runs), str(path))
        else:
            baseline, others = None, [read_run(path)]
        if number == 0:
            bases = [baseline] if baseline else others
        if number > 0 or (baseline and len(paths) == 1):
            runs += others
    if not bases or not runs:
        raise ResultsError(
            "There is nothing to compare: give a base and at least one other run, or a sweep "
            "folder with several configurations."
        )
    base = bases[0]
    # Runs that would share a name are called by their paths.
    names = [base.name, *(run.name for run in runs)]
    return base, [
        run if names.count(run.name) == 1 else replace(run, name=str(run.path))
        for run in runs
    ]


def split_sweep(runs: list[Run], where: str) -> tuple[Run, list[Run]]:
    """Return the baseline of a sweep and its other runs.

    Raises:
        ResultsError: No run of the sweep is unpruned.
    """
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
        margin: Within which differences are asked to lie; the verdicts say whether that
            is shown.
        read: Reader whose documents are used again.

    Raises:
        ResultsError: Samples cannot be read, two runs saw different documents or
            different versions of a task, or have no task in common.
        ValueError: `alpha` is out of range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not between 0 and 1: give 0.05, say.")
    rows: list[Difference] = []
    tests: list[statistics.PairedTest] = []
    owners: list[Run] = []
    everything = [base, *(run for run in runs if run is not base)]
    notes = notes_on(everything)
    read = read or DocumentReader()
    for run in runs:
        shared = [task for task in base.tasks(subtasks=subtasks) if task in run.tasks()]
        notes += _missing_notes(base, run, subtasks)
        if not shared:
            raise ResultsError(f"{base.name} and {run.name} have no task in common.")
        notes += _settings_notes(base, run, shared)
        notes += partial_notes(base, run, shared)
        primary = primary_metrics([base, run], subtasks=subtasks)
        for key in base.scores:
            if key[0] in shared and key in run.scores:
                row, test = _row(base, run, key, key in primary, alpha, read)
                rows.append(row)
                tests.append(test)
                owners.append(run)
    rows, asked = _decided(base, owners, rows, tests, alpha, margin)
    if margin is not None and asked:
        notes.append(
            f"{margin.text} is no margin for {listed(asked)}, whose scores are not between 0 and "
            "1: give a share such as 2%, or a number in the metric's own unit."
        )
    weaker = sorted({row.task for row in rows if "weaker" in row.method})
    if weaker:
        notes.append(
            f"Without usable samples, {', '.join(weaker)} had to be tested on the standard errors, "
            "as if the runs had seen different documents; that is weaker than a paired test: "
            "evaluate with --log_samples."
        )
    over_ratios = across_ratios(everything, alpha, read)
    return Comparison(base.name, alpha, tuple(rows), *over_ratios, tuple(notes), margin)


def _row(
    base: Run,
    run: Run,
    key: tuple[str, str],
    primary: bool,
    alpha: float,
    read: DocumentReader,
) -> tuple[Difference, statistics.PairedTest]:
    """Return a row that is not decided yet, and its test."""
    one, other = base.scores[key], run.scores[key]
    before, after = one.value, other.value
    endless = [
        each.name for each in (base, run) if not math.isfinite(each.scores[key].value)
    ]
    pair = paired_documents(base, run, *key, read)
    stopping = stopping_of(base, run, key[0])
    why = ""
    if endless:
        why = f"the score of {' and '.join(endless)} is no finite number"
    elif not pair and (one.stderr is None or other.stderr is None):
        why = "neither samples nor standard errors"
    elif not pair and stopping:
        why = f"{stopping.text} documents, without usable samples"
    if why:
        test = statistics.PairedTest.none(after - before, why, level=alpha)
    elif pair:
        test = paired_test(pair, stopping.nominal_level if stopping else alpha)
        test = sequential_test(test, stopping, key[1]) if stopping else test
    else:
        stderrs = one.stderr or 0.0, other.stderr or 0.0
        test = statistics.unpaired_difference(
            before, stderrs[0], after, stderrs[1], alpha=alpha
        )
    of = stopping.of if stopping and stopping.is_partial else None
    if of is not None and not test.method.startswith("none"):
        # On the documents that were used.
        before = after - test.difference
    row = Difference(
        run=run.name,
        task=key[0],
        metric=key[1],
        base_score=before,
        score=after,
        difference=after - before,
        relative=statistics.relative_change(before, after),
        low=test.low,
        high=test.high,
        p=test.p,
        q=None,
        smallest_detectable=None,
        documents=len(pair[0].keys) if pair else None,
        method=test.method,
        primary=primary,
        verdict="not comparable" if endless else "" if primary else "restated",
        of=of,
    )
    return row, test


def _decided(
    base: Run,
    owners: Sequence[Run],
    rows: Sequence[Difference],
    tests: Sequence[statistics.PairedTest],
    alpha: float,
    margin: Margin | None,
) -> tuple[list[Difference], list[str]]:
    """Return rows with q and verdict, and with all else at the level that the correction leaves.

    Returns:
        The rows, and the tasks for whose scores `margin` is none.
    """
    stoppings, families = [], []
    for run, row in zip(owners, rows, strict=True):
        stoppings.append(stopping_of(base, run, row.task))
        families.append((row.task, is_control(run)))
    directions = [base.scores[row.task, row.metric].higher_is_better for row in rows]
    counted = [
        test if row.primary and stopping is None else None
        for row, test, stopping in zip(rows, tests, stoppings, strict=True)
    ]
    found: list[Claim | None] = [None] * len(rows)
    of_stopped = found
    if margin is not None:
        scores = [
            (row.base_score, row.score, direction)
            for row, direction in zip(rows, directions, strict=True)
        ]
        found = claims(margin, counted, scores, families, alpha)
        of_stopped = sequential_claims(margin, rows, tests, stoppings)
    adjusted = statistics.false_discovery(
        [test.p if test else None for test in counted], families, alpha
    )
    stopped_qs = sequential_q(rows, stoppings)
    decided, asked = [], set()
    for place, (row, test) in enumerate(zip(rows, tests, strict=True)):
        (q, level), claim, stopping = adjusted[place], found[place], stoppings[place]
        if stopping is not None:
            q, level = stopped_qs[place], stopping.nominal_level
            claim = of_stopped[place]
        verdict = row.verdict or verdict_of(
            row.difference, q, alpha, directions[place], margin, claim
        )
        row = replace(row, claim=claim, verdict=verdict)
        if q is not None and level is not None:
            low, high = test.interval(level)
            smallest = test.smallest_detectable(level)
            row = replace(row, low=low, high=high, q=q, smallest_detectable=smallest)
        decided.append(row)
        if margin and row.primary and not margin.size(row.base_score, row.score):
            asked.add(row.task)
    return decided, sorted(asked)


def _missing_notes(base: Run, run: Run, subtasks: bool) -> list[str]:
    notes = []
    for one, other in ((base, run), (run, base)):
        has = other.tasks()
        missing = [task for task in one.tasks(subtasks=subtasks) if task not in has]
        if missing:
            notes.append(
                f"{other.name} has no results for {', '.join(missing)}, which {one.name} has."
            )
    return notes


def _settings_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return what two runs did not have in common beside the model."""

    def settings(each: Run) -> dict[str, dict[str, Any]]:
        found = {task: dict(known) for task, known in each.settings.items()}
        for task in tasks:
            # A unit that could stop has other documents by design, and is answered in blocks.
            left_out = ["answer_paths"] if stopping_of(base, run, task) else []
            if is_partial(base, task) or is_partial(run, task):
                left_out += ["documents", "task_hash"]
            for name in left_out:
                found.get(task, {}).pop(name, None)
        return found

    return [
        f"{run.name} was evaluated with other settings than {base.name} "
        f"({', '.join(labels)}){'' if len(on) == len(tasks) else f' on {listed(on)}'}, so a "
        "difference need not come from the model."
        for labels, on in other_settings(settings(base), settings(run), tasks).items()
    ]
