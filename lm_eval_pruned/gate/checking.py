"""Holding results against a baseline."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.pairing import is_partial
from lm_eval_pruned.gate.baseline_file import (
    OF_DOCUMENTS,
    Baseline,
    Expectation,
    Undecidable,
)
from lm_eval_pruned.gate.formats import ONLY_RUN, Finding, place_of
from lm_eval_pruned.gate.rules import (
    Decision,
    by_documents,
    document_test,
    within_tolerance,
)
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import notes_on, read_run, read_sweep
from lm_eval_pruned.results.settings import (
    ASKED,
    CIRCUMSTANCES,
    OF_FEWSHOT,
    PRUNING,
    differing,
    listed,
    shown,
)


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def read_results(path: str | Path) -> dict[str, Run]:
    """Read the runs to be checked, by the names they have in a baseline.

    Raises:
        ResultsError: They cannot be read, or a unit of the sweep failed.
    """
    if not is_sweep(path):
        return {ONLY_RUN: read_run(path)}
    sweep = read_sweep(path)
    if sweep.failures:
        failure = sweep.failures[0]
        raise ResultsError(
            f"{len(sweep.failures)} units of {path} failed, first {failure.task} of "
            f"{failure.run} ({failure.message}): run the sweep again with --retry_failed."
        )
    return {run.name: run for run in sweep.runs}


def check(runs: Mapping[str, Run], baseline: Baseline) -> list[Finding]:
    """Hold results against a baseline.

    Tests are one-sided where the direction is known: the rule asks whether a result is worse.

    Args:
        runs: From `read_results`.
        baseline: From `read_baseline`.

    Returns:
        One finding per metric, sorted by run, task and metric.

    Raises:
        ResultsError: A rule of documents meets samples that cannot be read.
    """
    scores = {
        (name, *key): score.value
        for name, run in runs.items()
        for key, score in run.scores.items()
    }
    found: dict[tuple[str, str, str], Decision] = {}
    tests = {}
    for key, expected in baseline.items():
        name, task, metric = key
        refused = _refused(runs.get(name), task, metric, expected, name)
        if refused:
            found[key] = refused
        elif expected.rule.kind not in OF_DOCUMENTS:
            found[key] = within_tolerance(scores[key], expected)
        else:
            try:
                tests[key] = document_test(runs[name], task, metric, expected)
            except Undecidable as reason:
                found[key] = "undecided", str(reason)
    found |= by_documents(tests, baseline)
    for name, task, metric in tests:
        # The test of a group covers a subtask with too few documents of its own.
        groups = [
            group
            for run, group, of in tests
            if (run, of) == (name, metric)
            and group != task
            and task in runs[name].members(group)
            and found[run, group, of][0] != "undecided"
        ]
        if found[name, task, metric][0] == "undecided" and groups:
            message = f"Too few documents alone, decided as a part of {groups[0]}."
            found[name, task, metric] = "pass", message
    for key in scores:
        message = "Not in the baseline; to add it, run with --update."
        found.setdefault(key, ("new", message))
    return [
        Finding(
            *key,
            status,
            baseline[key].score if key in baseline else None,
            scores.get(key),
            message,
        )
        for key, (status, message) in sorted(found.items())
    ]


def _refused(
    run: Run | None, task: str, metric: str, expected: Expectation, name: str
) -> Decision | None:
    """Say why a score cannot be held against the one that is expected, if so."""
    if run is None:
        return "fail", f"The results have no run {name}."
    if task not in run.tasks():
        return "fail", f"The results have no result for {task}."
    score = run.scores.get((task, metric))
    if score is None:
        return "fail", f"The results have no metric {metric}."
    version = run.versions.get(task)
    if None not in (version, expected.version) and version != expected.version:
        return "fail", (
            f"The task has version {version}, and the baseline is of version "
            f"{expected.version}: the scores cannot be compared. To accept, run with --update."
        )
    if not math.isfinite(score.value):
        return "fail", f"The score is {score.value}, not a finite number."
    if version is None and expected.version is not None:
        return "undecided", (
            f"The results do not say whether the task has version {expected.version}."
        )
    if {score.higher_is_better, expected.higher_is_better} == {True, False}:
        return "undecided", (
            "Not comparable: what was better is now worse (higher_is_better is "
            f"{score.higher_is_better}). To accept, run with --update."
        )
    if is_partial(run, task):
        return "undecided", (
            f"Not comparable: {run.stopping[task].text} documents, because the sweep stopped "
            "when decided. Evaluate without --stop_when."
        )
    asked = _asked_otherwise(expected.settings or {}, run.settings.get(task, {}))
    if asked:
        return "undecided", (
            f"Not comparable: {asked}. Evaluate as the baseline was, or accept with --update."
        )
    return None


def _asked_otherwise(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return in what a task was asked otherwise than the baseline's, in words.

    Another width counts too: it is another model that was asked.
    """
    without_shots = before.get("num_fewshot") == after.get("num_fewshot") == 0
    names = [
        name
        for name in differing(before, after, ASKED)
        if not (without_shots and name in OF_FEWSHOT)
    ]
    if None not in (before.get("widths"), after.get("widths")):
        names += differing(before, after, ["widths"])
    return ", ".join(
        f"{name} {shown(after.get(name))} and in the baseline {shown(before.get(name))}"
        for name in names
    )


#: What it means that a hash is another.
_HASHES = {
    "task_hash": "task_hash is another: the documents, the prompts or their order are",
    "kept_digest": "kept_digest is another: other neurons are kept",
}


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline beside the scores, one sentence each."""
    tasks = {
        (name, task): expected.settings
        for (name, task, _), expected in baseline.items()
        if expected.settings is not None and name in runs and task in runs[name].tasks()
    }
    found: dict[str, list[str]] = {}
    for (name, task), before in tasks.items():
        after = runs[name].settings.get(task, {})
        changes = {
            setting: f"{setting} {shown(before.get(setting))} -> {shown(after.get(setting))}"
            for setting in differing(before, after, (*ASKED, *CIRCUMSTANCES, *PRUNING))
        }
        said = [_HASHES.get(setting, text) for setting, text in changes.items()]
        if before.get("documents") is None:
            said.append("documents: the baseline does not say how many")
        for change in said:
            found.setdefault(change, []).append(place_of(name, task))
    return notes_on(runs.values()) + [
        f"{change} ({'everywhere' if len(where) == len(tasks) else listed(where)})."
        for change, where in found.items()
    ]


def update_notes(
    runs: Mapping[str, Run], baseline: Baseline, previous: Baseline
) -> list[str]:
    """Return what an update changes beside the scores, and which rules cannot decide.

    Args:
        runs: The results that the baseline was made of.
        baseline: The new one.
        previous: What it takes the place of, or an empty one.
    """
    gone = [
        f"{place_of(run, task)} {metric}"
        for run, task, metric in previous
        if (run, task, metric) not in baseline
    ]
    return [
        *([f"No longer expected: {listed(gone)}."] if gone else []),
        *(notes(runs, previous) if previous else []),
        *(
            f"{finding.title}: {finding.message}"
            for finding in check(runs, baseline)
            if finding.status == "undecided"
        ),
    ]
