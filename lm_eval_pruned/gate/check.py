"""Results held against a baseline, on the tests and the correction of ``compare``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import difference_test, settings_notes
from lm_eval_pruned.compare.pairing import is_partial
from lm_eval_pruned.compare.statistics import LEAST_UNITS, PairedTest, false_discovery
from lm_eval_pruned.compare.verdicts import Claim, claims
from lm_eval_pruned.gate.baseline import (
    OF_DOCUMENTS,
    Baseline,
    Key,
    Rule,
    no_samples,
    short_documents,
)
from lm_eval_pruned.gate.formats import ONLY_RUN, Finding, place_of
from lm_eval_pruned.results.files import ResultsError, Run, Score
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import notes_on, read_run, read_sweep
from lm_eval_pruned.results.settings import ASKED, OF_FEWSHOT, differing, listed, shown


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lm_eval_pruned.results.documents import Documents

#: A status and a sentence, see `Finding`.
Decision = tuple[str, str]
#: Level of the tests behind a rule with a margin.
CLAIM_LEVEL = 0.05
#: What two equal scores may differ by, as a share of them.
_EQUAL = 1e-9
_IMPROVED = (
    "improved",
    "Better than the baseline; to expect this from now on, run with --update.",
)


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

    Returns:
        One finding per metric, sorted by run, task and metric.
    """
    before, after = _scores(baseline.runs), _scores(runs)
    found: dict[Key, Decision] = {}
    tests: dict[Key, PairedTest] = {}
    for key, rule in baseline.rules.items():
        name, task, _ = key
        if key not in after:
            missing = " ".join(key[name in runs :])
            found[key] = "fail", f"The results have no {missing}."
        elif refused := _refused(runs[name], baseline.runs[name], task, after[key]):
            found[key] = refused
        elif rule.kind not in OF_DOCUMENTS:
            found[key] = _within_tolerance(rule, before[key], after[key].value)
        else:
            try:
                tests[key] = _tested(key, runs[name], baseline)
            except ResultsError as why:
                found[key] = "undecided", str(why)
    found |= _by_documents(tests, before, after, baseline)
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
    new = "new", "Not in the baseline; to add it, run with --update."
    findings = []
    for key, (status, message) in sorted((dict.fromkeys(after, new) | found).items()):
        one = before[key].value if key in before else None
        other = after[key].value if key in after else None
        findings.append(Finding(*key, status, one, other, message))
    return findings


def _scores(runs: Mapping[str, Run]) -> dict[Key, Score]:
    return {
        (name, *key): run.scores[key]
        for name, run in runs.items()
        for key in run.scores
    }


def _refused(run: Run, before: Run, task: str, score: Score) -> Decision | None:
    """Say why a score cannot be held against the one that is expected, if so."""
    version, expected = run.versions.get(task), before.versions.get(task)
    if expected not in (None, version):
        return "fail", (
            f"The task has version {version}, and the baseline is of version {expected}: the "
            "scores cannot be compared. To accept, run with --update."
        )
    if not math.isfinite(score.value):
        return "fail", f"The score is {score.value}, not a finite number."
    why = (
        f"{run.stopping[task].text} documents, because the sweep stopped when decided"
        if is_partial(run, task)
        else _asked_otherwise(before.settings.get(task, {}), run.settings.get(task, {}))
    )
    if not why:
        return None
    return "undecided", (
        f"Not comparable: {why}. Evaluate as the baseline was, or accept with --update."
    )


def _asked_otherwise(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return in what a task was asked otherwise than the baseline's, in words.

    Another width counts too: it is another model that was asked.
    """
    names = [*ASKED, "widths"]
    if before.get("num_fewshot") == after.get("num_fewshot") == 0:
        names = [name for name in names if name not in OF_FEWSHOT]
    if None in (before.get("widths"), after.get("widths")):
        names.remove("widths")
    return ", ".join(
        f"{name} {shown(after.get(name))} and in the baseline {shown(before.get(name))}"
        for name in differing(before, after, names)
    )


def _within_tolerance(rule: Rule, expected: Score, score: float) -> Decision:
    change, tolerance = score - expected.value, rule.value
    allowed = f"{tolerance:g}"
    if rule.kind == "relative":
        tolerance *= abs(expected.value)
        allowed += " of the expected score"
    if abs(change) <= tolerance + _EQUAL * max(1.0, abs(expected.value)):
        return "pass", f"Within {allowed} of the baseline."
    up = expected.higher_is_better
    if up is not None and (change > 0) == up:
        return _IMPROVED
    direction = "Changed" if up is None else "Worse"
    return "fail", f"{direction} by {abs(change):.6g}, allowed is {allowed}."


def _tested(key: Key, run: Run, baseline: Baseline) -> PairedTest:
    """Test the documents of the results against those of the baseline.

    Raises:
        ResultsError: There are none, or they are other documents or weighted otherwise.
    """
    before = baseline.runs[key[0]]

    def read(each: Run, task: str, metric: str) -> Documents | None:
        stored = each is before
        return baseline.documents[key] if stored else short_documents(run, task, metric)

    test, documents = difference_test(before, run, key[1:], read=read)
    if documents is None:
        raise ResultsError(no_samples(baseline.rules[key], *key[1:]))
    return test


def _by_documents(
    tests: Mapping[Key, PairedTest],
    before: Mapping[Key, Score],
    after: Mapping[Key, Score],
    baseline: Baseline,
) -> dict[Key, Decision]:
    """Decide the rules of documents together.

    The p of all rules ``alpha`` are adjusted as one family, and those of all rules with a
    margin as another, so that a gate of many metrics does not close by chance.
    """
    ups = {key: before[key].higher_is_better for key in tests}
    asked = [(baseline.rules[key].margin, before[key], after[key]) for key in tests]
    families = [margin is not None for margin, *_ in asked]
    sides: list[tuple[float | None, float | None]] = []
    for key, test in tests.items():
        one_sided = (test.p, None) if ups[key] is None else test.sides or (None, None)
        sides.append(one_sided[::-1] if ups[key] is False else one_sided)
    judged = zip(
        *(tests, claims(list(tests.values()), asked, families)),
        *(false_discovery([p[side] for p in sides], families) for side in (0, 1)),
        strict=True,
    )
    return {
        key: _decision(
            *(baseline.rules[key], tests[key], claim, worse, better, ups[key]),
            baseline.documents[key],
        )
        for key, claim, (worse, _), (better, _) in judged
    }


def _decision(
    rule: Rule,
    test: PairedTest,
    claim: Claim | None,
    worse: float | None,
    better: float | None,
    up: bool | None,
    documents: Documents,
) -> Decision:
    """Decide by the adjusted p of the margin, of worse and of better."""
    margin = rule.margin
    alpha = CLAIM_LEVEL if margin else float(rule.value)
    direction = "different" if up is None else "worse"
    is_worse = worse is not None and worse < alpha
    if margin and claim is None:
        return "undecided", (
            f"No interval can be given that would lie within {margin.text}: use a tolerance for "
            "this metric."
        )
    if margin and claim and claim.q < alpha:
        return "pass", (
            f"Shown to be {margin.verdict} within {margin.text} (q = {claim.q:.3g})."
        )
    if (worse is None or test.units < LEAST_UNITS) and (is_worse or not margin):
        return "undecided", (
            f"{test.units} independent documents are too few to decide, at least {LEAST_UNITS} "
            "are needed: use a tolerance instead of alpha."
        )
    if is_worse:
        return "fail", (
            f"Significantly {direction} by {abs(test.difference):.6g} (q = {worse:.3g} < {alpha:g})."
        )
    if better is not None and better < alpha:
        return _IMPROVED
    if margin and claim:
        return "undecided", (
            f"Not shown to be {margin.verdict} within {margin.text} (q = {claim.q:.3g} >= "
            f"{alpha:g}), nor worse: `lm-eval-pruned power` says how many documents decide."
        )
    if test.method.startswith("McNemar"):
        right = int(documents.values.sum())
        wrong = len(documents.values) - right
        worsened = max(right, wrong) if up is None else right if up else wrong
        # McNemar's mid-p of so many changes in one direction; of both sides where none is worse.
        smallest = 0.5 ** (worsened + (up is not None))
        if smallest >= alpha:
            return "undecided", (
                "Too few documents to decide: not even the worst possible score would be significant "
                f"(p = {smallest:.3g} >= {alpha:g}): use a tolerance instead of alpha."
            )
    return "pass", f"Not significantly {direction} (q = {worse:.3g} >= {alpha:g})."


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline beside the scores, one sentence each."""
    found = notes_on(runs.values())
    for name, before in baseline.runs.items():
        if name in runs:
            has = runs[name].tasks()
            tasks = [task for task in before.tasks() if task in has]
            found += settings_notes(before, runs[name], tasks)
    return found


def update_notes(
    runs: Mapping[str, Run], baseline: Baseline, previous: Baseline
) -> list[str]:
    """Return what an update of `previous` changes beside the scores, and which rules cannot decide."""
    gone = [
        f"{place_of(run, task)} {metric}"
        for run, task, metric in previous.rules
        if (run, task, metric) not in baseline.rules
    ]
    return [
        *([f"No longer expected: {listed(gone)}."] if gone else []),
        *notes(runs, previous),
        *(
            f"{finding.title}: {finding.message}"
            for finding in check(runs, baseline)
            if finding.status == "undecided"
        ),
    ]
