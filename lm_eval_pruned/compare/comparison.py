"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.across_ratios import across_ratios
from lm_eval_pruned.compare.comparison_rows import (
    Comparison,
    Difference,
    verdict_of,
)
from lm_eval_pruned.compare.margins import Claim, Margin, claims
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
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.results.series import is_control, primary_metrics
from lm_eval_pruned.results.settings import listed, notes_on, other_settings
from lm_eval_pruned.results.sweep_results import read_sweep


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.stopping_record import Stopping


def read_comparands(paths: Sequence[str]) -> tuple[Run, list[Run]]:
    """Read what ``compare BASE RUN [RUN...]`` names.

    A sweep folder as BASE stands for its baseline and, where it is the only
    argument, its other configurations are the runs; as RUN it stands for all its
    configurations but the baseline.

    Raises:
        ResultsError: Something cannot be read, or there is nothing to compare.
    """
    runs: list[Run] = []
    base: Run | None = None
    for number, path in enumerate(paths):
        if is_sweep(path):
            baseline, others = split_sweep(list(read_sweep(path).runs), str(path))
            if number == 0:
                base = baseline
            if number > 0 or len(paths) == 1:
                runs += others
        elif number == 0:
            base = read_run(path)
        else:
            runs.append(read_run(path))
    if base is None or not runs:
        raise ResultsError(
            "There is nothing to compare: give a base and at least one other run, or a sweep "
            "folder with several configurations."
        )
    return base, _with_distinct_names(base, runs)


def split_sweep(runs: list[Run], where: str) -> tuple[Run, list[Run]]:
    """Return the baseline of a sweep and its other runs.

    Raises:
        ResultsError: No run of the sweep is unpruned.
    """
    baselines = [run for run in runs if run.is_baseline]
    if not baselines:
        raise ResultsError(
            f"{where} has no finished run of the unpruned model to compare with: add prune_percent "
            "0 to the sweep, or name a base: `compare BASE RUN`."
        )
    return baselines[0], [run for run in runs if run is not baselines[0]]


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
    stoppings: list[Stopping | None] = []
    families: list[tuple[str, bool]] = []
    notes = notes_on([base, *(run for run in runs if run is not base)])
    read = read or DocumentReader()
    for run in runs:
        shared = [task for task in base.tasks(subtasks=subtasks) if task in run.tasks()]
        for one, other in ((base, run), (run, base)):
            missing = [
                task
                for task in one.tasks(subtasks=subtasks)
                if task not in other.tasks()
            ]
            if missing:
                notes.append(
                    f"{other.name} has no results for {', '.join(missing)}, which {one.name} has."
                )
        if not shared:
            raise ResultsError(f"{base.name} and {run.name} have no task in common.")
        notes += _settings_notes(base, run, shared)
        notes += partial_notes(base, run, shared)
        primary = primary_metrics([base, run], subtasks=subtasks)
        for key in base.scores:
            if key[0] in shared and key in run.scores:
                test, documents = _test(base, run, *key, alpha, read)
                tests.append(test)
                stoppings.append(stopping_of(base, run, key[0]))
                families.append((key[0], is_control(run)))
                rows.append(_row(base, run, key, key in primary, test, documents))
        notes += _prompts_notes(base, run, shared, read)
    ps = [
        row.p if row.primary and stopping is None else None
        for row, stopping in zip(rows, stoppings, strict=True)
    ]
    adjusted = [
        (q, level) if stopping is None else (stopped_q, stopping.nominal_level)
        for q, level, stopped_q, stopping in zip(
            statistics.false_discovery_rate(ps, families),
            statistics.false_discovery_levels(ps, alpha, families),
            sequential_q(rows, stoppings),
            stoppings,
            strict=True,
        )
    ]
    rows = [
        _decided(row, test, q, level, alpha, base)
        for row, test, (q, level) in zip(rows, tests, adjusted, strict=True)
    ]
    if margin is not None:
        rows, unusable = _with_claims(
            margin, rows, tests, stoppings, families, alpha, base
        )
        notes += unusable
    weaker = sorted({row.task for row in rows if "weaker" in row.method})
    if weaker:
        notes.append(
            f"Without usable samples, {', '.join(weaker)} had to be tested on the standard errors, "
            "as if the runs had seen different documents; that is weaker than a paired test: "
            "evaluate with --log_samples."
        )
    everything = [base, *(run for run in runs if run is not base)]
    correlations, trends = across_ratios(everything, alpha=alpha, read=read)
    return Comparison(
        base.name, alpha, tuple(rows), correlations, trends, tuple(notes), margin
    )


def _test(
    base: Run,
    run: Run,
    task: str,
    metric: str,
    alpha: float,
    read: DocumentReader,
) -> tuple[statistics.PairedTest, int | None]:
    """Return the test of one row, and how many documents it is of."""
    before, after = base.scores[task, metric], run.scores[task, metric]
    pair = paired_documents(base, run, task, metric, read)
    documents = len(pair[0].keys) if pair else None
    stopping = stopping_of(base, run, task)
    nothing = _not_finite(base, run, task, metric)
    if nothing or (not pair and None in (before.stderr, after.stderr)):
        why = (
            f"the score of {' and '.join(nothing)} is no finite number"
            if nothing
            else "neither samples nor standard errors"
        )
        change = after.value - before.value
        none = statistics.PairedTest(change, None, None, None, f"none: {why}", 0, alpha)
        return none, documents
    if pair:
        test = paired_test(pair, stopping.nominal_level if stopping else alpha)
        if stopping is not None:
            test = sequential_test(test, stopping, metric)
    elif stopping is not None:
        change = after.value - before.value
        why = f"none: {stopping.text} documents, without usable samples"
        test = statistics.PairedTest(change, None, None, None, why, 0, alpha)
    else:
        assert before.stderr is not None
        assert after.stderr is not None
        test = statistics.unpaired_difference(
            before.value, before.stderr, after.value, after.stderr, alpha=alpha
        )
    return test, documents


def _not_finite(base: Run, run: Run, task: str, metric: str) -> list[str]:
    return [
        each.name
        for each in (base, run)
        if not math.isfinite(each.scores[task, metric].value)
    ]


def _row(
    base: Run,
    run: Run,
    key: tuple[str, str],
    primary: bool,
    test: statistics.PairedTest,
    documents: int | None,
) -> Difference:
    """Return a row that has no q and no verdict on it yet."""
    before, after = base.scores[key].value, run.scores[key].value
    stopping = stopping_of(base, run, key[0])
    of = stopping.of if stopping and stopping.is_partial else None
    if of is not None and test.method[:4] != "none":
        # On the documents that were used.
        before = after - test.difference
    return Difference(
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
        documents=documents,
        method=test.method,
        primary=primary,
        verdict="not comparable" if _not_finite(base, run, *key) else "not tested",
        of=of,
    )


def _decided(
    row: Difference,
    test: statistics.PairedTest,
    q: float | None,
    level: float | None,
    alpha: float,
    base: Run,
) -> Difference:
    """Return a row with its q and verdict, and all else at the level that the correction leaves."""
    if q is None or level is None:
        return replace(row, verdict=_verdict(row, q, alpha, base))
    low, high = test.at_level(level)
    return replace(
        row,
        low=low,
        high=high,
        q=q,
        smallest_detectable=test.smallest_detectable(level),
        verdict=_verdict(row, q, alpha, base),
    )


def _verdict(row: Difference, q: float | None, alpha: float, base: Run) -> str:
    if row.verdict == "not comparable":
        return row.verdict
    if not row.primary:
        return "restated"
    if q is None:
        return row.verdict
    higher_is_better = base.scores[row.task, row.metric].higher_is_better
    return verdict_of(row.difference, q, alpha, higher_is_better)


def _with_claims(
    margin: Margin,
    rows: Sequence[Difference],
    tests: Sequence[statistics.PairedTest],
    stoppings: Sequence[Stopping | None],
    families: Sequence[tuple[str, bool]],
    alpha: float,
    base: Run,
) -> tuple[list[Difference], list[str]]:
    """Return rows whose verdicts are about the margin, and notes on those that have none."""
    found = claims(
        margin,
        [
            test if row.primary and stopping is None else None
            for row, test, stopping in zip(rows, tests, stoppings, strict=True)
        ],
        [
            (
                row.base_score,
                row.score,
                base.scores[row.task, row.metric].higher_is_better,
            )
            for row in rows
        ],
        families,
        alpha,
    )
    of_stopped = sequential_claims(margin, rows, tests, stoppings)
    found = [
        one if stopping is None else other
        for one, other, stopping in zip(found, of_stopped, stoppings, strict=True)
    ]
    asked = sorted(
        {
            row.task
            for row, claim in zip(rows, found, strict=True)
            if row.primary
            and claim is None
            and margin.size(row.base_score, row.score) is None
        }
    )
    note = (
        f"{margin.text} is no margin for {listed(asked)}, whose scores are not between 0 and 1: "
        "give a share such as 2%, or a number in the metric's own unit."
    )
    decided = [
        replace(row, claim=claim, verdict=_claimed(margin, row, claim, alpha))
        for row, claim in zip(rows, found, strict=True)
    ]
    return decided, [note] if asked else []


def _claimed(margin: Margin, row: Difference, claim: Claim | None, alpha: float) -> str:
    if row.verdict in ("not comparable", "restated"):
        return row.verdict
    shown = claim is not None and claim.q < alpha
    # What is better is not worse, and says more; what is equivalent may differ for certain.
    if shown and not (margin.claim == "not_worse" and row.verdict == "better"):
        return margin.verdict
    return "undecided" if row.verdict.startswith("not ") else row.verdict


def _settings_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return what two runs did not have in common beside the model."""
    partial = [t for t in tasks if is_partial(base, t) or is_partial(run, t)]

    def settings(each: Run) -> dict[str, dict[str, Any]]:
        # A unit that could stop has other documents by design, and is answered in blocks.
        left_out = {
            task: (
                "answer_paths",
                *(("documents", "task_hash") if task in partial else ()),
            )
            for task in tasks
            if stopping_of(base, run, task)
        }
        return {
            task: {k: v for k, v in known.items() if k not in left_out.get(task, ())}
            for task, known in each.settings.items()
        }

    return [
        f"{run.name} was evaluated with other settings than {base.name} "
        f"({', '.join(labels)}){'' if len(on) == len(tasks) else f' on {listed(on)}'}, so a "
        "difference need not come from the model."
        for labels, on in other_settings(settings(base), settings(run), tasks).items()
    ]


def _prompts_notes(
    base: Run, run: Run, tasks: Sequence[str], read: DocumentReader
) -> list[str]:
    notes = {}
    for task, metric in base.scores:
        if task not in tasks or task in notes or (task, metric) not in run.scores:
            continue
        before, after = (read(each, task, metric) for each in (base, run))
        others = before.other_prompts(after) if before and after else 0
        if before and others:
            notes[task] = (
                f"{others} of {len(before.keys)} documents of {task} had another prompt "
                f"(prompt_hash) in {run.name} than in {base.name}."
            )
    return list(notes.values())


def _with_distinct_names(base: Run, runs: list[Run]) -> list[Run]:
    """Call runs that would share a name by their paths."""
    names = [base.name, *(run.name for run in runs)]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.path))
        for run in runs
    ]
