"""Holding results against a baseline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.margins import CLAIMS
from lm_eval_pruned.compare.pairing import is_partial
from lm_eval_pruned.gate.baseline_file import (
    OF_DOCUMENTS,
    Baseline,
    Undecidable,
)
from lm_eval_pruned.gate.findings import (
    ONLY_RUN,
    Finding,
    failed_with,
    title_of,
    undecided_with,
)
from lm_eval_pruned.gate.rules import (
    AlphaTest,
    alpha_test,
    claimed,
    significance,
    within_tolerance,
)
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.results.settings import ASKED, OF_FEWSHOT, differing, shown
from lm_eval_pruned.results.sweep_results import read_sweep


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
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

    The p values of all ``alpha`` rules are adjusted together (Benjamini-Hochberg), and
    those of all rules with a margin, so
    that a gate of many metrics does not close by chance. They are one-sided where the
    direction is known: the rule asks whether a result is worse.

    Args:
        runs: From `read_results`.
        baseline: From `read_baseline`.

    Returns:
        One finding per metric, sorted by run, task and metric.

    Raises:
        ResultsError: A rule of documents meets samples that cannot be read.
    """
    findings = {}
    tests: dict[tuple[str, str, str], AlphaTest] = {}
    for key, expected in baseline.expectations.items():
        run_name, task, metric = key
        run = runs.get(run_name)
        score = run.scores.get((task, metric)) if run else None
        finding = Finding(
            *key, "pass", expected.score, score.value if score else None, ""
        )
        if run is None or score is None:
            what = (
                f"no run {run_name}"
                if run is None
                else f"no result for {task}"
                if task not in run.tasks()
                else f"no metric {metric}"
            )
            findings[key] = failed_with(finding, f"The results have {what}.")
            continue
        version = baseline.versions.get((run_name, task))
        asked = _asked_otherwise(baseline.settings.get((run_name, task), {}), run, task)
        if version is not None and run.versions.get(task) not in (None, version):
            message = (
                f"The task has version {run.versions[task]}, and the baseline is of version "
                f"{version}: the scores cannot be compared. To accept, run with --update."
            )
            findings[key] = failed_with(finding, message)
        elif not math.isfinite(score.value):
            message = f"The score is {score.value}, not a finite number."
            findings[key] = failed_with(finding, message)
        elif version is not None and task not in run.versions:
            message = f"The results do not say whether the task has version {version}."
            findings[key] = undecided_with(finding, message)
        elif {score.higher_is_better, expected.higher_is_better} == {True, False}:
            message = (
                "Not comparable: what was better is now worse (higher_is_better is "
                f"{score.higher_is_better}). To accept, run with --update."
            )
            findings[key] = undecided_with(finding, message)
        elif is_partial(run, task):
            message = (
                f"Not comparable: {run.stopping[task].text} documents, because the sweep stopped "
                "when decided. Evaluate without --stop_when."
            )
            findings[key] = undecided_with(finding, message)
        elif asked:
            message = f"Not comparable: {asked}. Evaluate as the baseline was, or accept with --update."
            findings[key] = undecided_with(finding, message)
        elif expected.rule.kind in OF_DOCUMENTS:
            findings[key] = finding
            try:
                tests[key] = alpha_test(run, task, metric, expected)
            except Undecidable as reason:
                findings[key] = undecided_with(finding, str(reason))
        else:
            findings[key] = within_tolerance(finding, expected)
    for kinds in (("alpha",), CLAIMS):
        family = {
            key: test
            for key, test in tests.items()
            if baseline.expectations[key].rule.kind in kinds
        }
        outside, worse, better = (
            statistics.false_discovery_rate([getattr(t, p) for t in family.values()])
            for p in ("outside", "worse", "better")
        )
        for (key, test), q_outside, q, q_better in zip(
            family.items(), outside, worse, better, strict=True
        ):
            expected = baseline.expectations[key]
            findings[key] = (
                claimed(findings[key], expected, test, q_outside, q, q_better)
                if kinds is CLAIMS
                else significance(findings[key], expected, test, q, q_better)
            )
    for key in tests:
        group = _deciding_group(key, runs, findings, tests)
        if findings[key].status == "undecided" and group:
            message = f"Too few documents alone, decided as a part of {group}."
            findings[key] = replace(findings[key], status="pass", message=message)
    for run_name, run in runs.items():
        for (task, metric), score in run.scores.items():
            key = run_name, task, metric
            if key not in findings:
                findings[key] = Finding(
                    *key,
                    "new",
                    None,
                    score.value,
                    "Not in the baseline; to add it, run with --update.",
                )
    return [findings[key] for key in sorted(findings)]


def unusable_rules(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return which rules cannot even hold the results that they were made of."""
    return [
        f"{title_of(finding)}: {finding.message}"
        for finding in check(runs, baseline)
        if finding.status == "undecided"
    ]


def _deciding_group(
    key: tuple[str, str, str],
    runs: Mapping[str, Run],
    findings: Mapping[tuple[str, str, str], Finding],
    tests: Iterable[tuple[str, str, str]],
) -> str | None:
    """Return the group whose test covers a subtask with too few documents of its own."""
    run, task, metric = key
    for other_run, group, other_metric in tests:
        if (
            (other_run, other_metric) == (run, metric)
            and group != task
            and task in runs[run].members(group)
            and findings[run, group, metric].status != "undecided"
        ):
            return group
    return None


def _asked_otherwise(before: Mapping[str, Any], run: Run, task: str) -> str:
    """Return in what a task was asked otherwise than the baseline's, in words.

    Another width counts too: it is another model that was asked.
    """
    after = run.settings.get(task, {})
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
