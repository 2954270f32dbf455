"""Results compared with a baseline, by the tests and the correction of ``compare``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.comparison import settings_notes
from lm_eval_pruned.compare.judge import Case, Difference, judged
from lm_eval_pruned.compare.margin import CLAIMS
from lm_eval_pruned.compare.measures import (
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.compare.pairing import DocumentReader, paired_documents
from lm_eval_pruned.compare.statistics import (
    LEAST_UNITS,
    LEAST_UNITS_OF_MARGIN,
    false_discovery,
)
from lm_eval_pruned.gate.baseline import OF_DOCUMENTS, Baseline, Key, Rule
from lm_eval_pruned.gate.findings import ONLY_RUN, Finding
from lm_eval_pruned.results.documents import CHOICE_PROB
from lm_eval_pruned.results.files import ResultsError, Run, Score
from lm_eval_pruned.results.runs import is_sweep, read_run, read_sweep
from lm_eval_pruned.results.settings import asked_differently


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lm_eval_pruned.results.documents import Documents

#: A status and a sentence, see `Finding`.
Decision = tuple[str, str]
#: Level of the tests behind a rule with a margin.
CLAIM_LEVEL = 0.05
_IMPROVED = (
    "improved",
    "Better than the baseline; to expect this from now on, run with --update.",
)
_TOLERANCE = "use a tolerance for this metric."
_NEW = "new", "Not in the baseline; to add it, run with --update."


def read_results(path: str | Path) -> dict[str, Run]:
    """Read runs by the names they have in a baseline; ResultsError if a unit of a sweep failed."""
    if not is_sweep(path):
        return {ONLY_RUN: read_run(path)}
    sweep = read_sweep(path)
    for failure in sweep.failures:
        raise ResultsError(
            f"{failure.task} of {failure.run} failed in {path} ({failure.message}): run the sweep "
            "again with --retry_failed."
        )
    return {run.name: run for run in sweep.runs}


def make_baseline(
    runs: Mapping[str, Run], kind: str, value: Any, previous: Baseline | None = None
) -> Baseline:
    """Make a baseline of results, with the rules of `previous`, and a rule of a `kind` for other metrics.

    A margin is for what decides soonest of each task, see `judged_keys`; without a `value` it is the
    usual one of that metric.

    ResultsError if a score is NaN or infinite.
    """
    baseline, kept = Baseline(), previous.rules if previous else {}
    read = DocumentReader()
    for name, run in runs.items():
        run = with_choice_prob(run, read) if kind in CLAIMS else run
        baseline.runs[name] = replace(run, name="the baseline")
        deciding = [*judged_keys(run)] if kind in CLAIMS else run.scores
        for task, metric in run.scores:
            key = name, task, metric
            if key not in kept and (task, metric) not in deciding:
                continue
            if refused := _refused(run, run, task, metric):
                raise ResultsError(f"{run.path}, {task} {metric}: {refused[1]}")
            score = run.scores[task, metric]
            usual = usual_margin(run, (task, metric), score.value)
            own = kept.get(key) or Rule(kind, usual if value is None else value)
            own.check(task, metric, score)
            baseline.rules[key] = own
            found = own.kind in OF_DOCUMENTS and _documents(read, run, task, metric)
            if found:
                baseline.documents[key] = found
    return baseline


def check(runs: Mapping[str, Run], baseline: Baseline) -> list[Finding]:
    """Compare results with a baseline; return a finding per metric, sorted by run, task and metric.

    Tests are one-sided where the direction is known: the rule asks whether a result is worse.
    """
    read = DocumentReader()
    if any(metric == CHOICE_PROB for _, _, metric in baseline.rules):
        runs = {name: with_choice_prob(run, read) for name, run in runs.items()}
    before, after = (
        {(name, *key): score for name in of for key, score in of[name].scores.items()}
        for of in (baseline.runs, runs)
    )
    found: dict[Key, Decision] = dict.fromkeys(after, _NEW)
    cases: dict[Key, Case] = {}
    for key, rule in baseline.rules.items():
        name, task, metric = key
        if key not in after:
            found[key] = "fail", f"The results have no {' '.join(key[name in runs :])}."
        elif refused := _refused(baseline.runs[name], runs[name], task, metric):
            found[key] = refused
        elif rule.kind not in OF_DOCUMENTS:
            found[key] = _within_tolerance(rule, before[key], after[key].value)
        else:
            try:
                cases[key] = _case(key, runs[name], baseline, read)
            except ResultsError as why:
                found[key] = "undecided", str(why)
    rows = judged([*cases.values()])
    levels = [
        CLAIM_LEVEL if case.margin else float(baseline.rules[key].value)
        for key, case in cases.items()
    ]
    found |= zip(cases, decisions([*cases.values()], rows, levels), strict=True)
    findings = []
    for key, (status, said) in sorted(found.items()):
        one, other = (of[key].value if key in of else None for of in (before, after))
        findings.append(Finding(*key, status, one, other, said))
    return findings


def _refused(before: Run, run: Run, task: str, metric: str) -> Decision | None:
    """Say why a score cannot be compared with the expected one; None if it can."""
    version, expected = run.versions.get(task), before.versions.get(task)
    if expected not in (None, version):
        return "fail", (
            f"The task has version {version}, and the baseline has version {expected}: the "
            "scores cannot be compared. To accept, run with --update."
        )
    score = run.scores[task, metric].value
    if not math.isfinite(score):
        return "fail", f"The score is {score}, not a finite number."
    one, other = before.settings.get(task, {}), run.settings.get(task, {})
    # Another width is another model.
    widths = ["widths"] * bool(one.get("widths") and other.get("widths"))
    why = asked_differently(one, other, "in the baseline", widths)
    accept = "Evaluate with the settings of the baseline, or accept with --update."
    return ("undecided", f"Not comparable: {why}. {accept}") if why else None


def _within_tolerance(rule: Rule, expected: Score, score: float) -> Decision:
    tolerance, allowed = rule.value, f"{rule.value:g}"
    if rule.kind == "relative":
        tolerance *= abs(expected.value)
        allowed += " of the expected score"
    # The file has ten digits of a score.
    if math.isclose(score, expected.value, abs_tol=tolerance + 1e-9):
        return "pass", f"Within {allowed} of the baseline."
    change, up = score - expected.value, expected.higher_is_better
    if up is not None and (change > 0) == up:
        return _IMPROVED
    direction = "Changed" if up is None else "Worse"
    return "fail", f"{direction} by {abs(change):.6g}, and the rule allows {allowed}."


def _documents(
    read: DocumentReader, run: Run, task: str, metric: str
) -> Documents | None:
    """Read documents, with hashes as short and values as exact as a baseline file holds them."""
    if documents := read(run, task, metric):
        keys = tuple((task, digest[:16], n) for task, digest, n in documents.keys)
        values = np.array([float(f"{value:.10g}") for value in documents.values])
        return replace(documents, keys=keys, values=values)
    return None


def _case(key: Key, run: Run, baseline: Baseline, known: DocumentReader) -> Case:
    """Pair documents; raise ResultsError without any, or if they are others or weigh otherwise.

    The rules ``alpha`` are one family, and those with a margin another: a gate of many metrics does
    not close by chance.
    """
    name, task, metric = key
    before, stored = baseline.runs[name], baseline.documents.get(key)
    rule = baseline.rules[key]
    read = lambda each, *of: stored if each is before else _documents(known, run, *of)
    pair = paired_documents(before, run, task, metric, read)
    if pair is None:
        raise ResultsError(
            f"The rule {rule.kind} needs logged samples from which {metric} of {task} can "
            f"be computed, weighted as in the baseline: evaluate with --log_samples, or {_TOLERANCE}"
        )
    family = rule.margin is not None
    return Case(before, run, (task, metric), pair, family, margin=rule.margin)


def decisions(
    cases: Sequence[Case], rows: Sequence[Difference], levels: Sequence[float]
) -> Iterator[Decision]:
    """Decide what `judged` made of cases: a margin, or else whether a score is worse.

    Tests are one-sided where the direction is known.
    """
    families = [case.family for case in cases]
    sides = [*map(_sides, cases, rows)]
    worse, better = (
        [q for q, _ in false_discovery([ps[way] for ps in sides], families)]
        for way in (0, 1)
    )
    for case, row, alpha, *qs in zip(cases, rows, levels, worse, better, strict=True):
        yield _decision(case, row, alpha, *qs)


def _decision(
    case: Case, row: Difference, alpha: float, worse: float | None, better: float | None
) -> Decision:
    margin, claim = case.margin, row.claim
    way = "different" if case.scores[0].higher_is_better is None else "worse"
    within = f"{margin.verdict} within {margin.text}" if margin else ""
    too_few = (
        f"{row.units} independent documents are too few to decide, which takes at least "
        f"{LEAST_UNITS}: {_TOLERANCE}"
    )
    if margin and claim is None and case.margin_size and row.p is not None:
        return "undecided", (
            f"A margin of a score without bounds takes {LEAST_UNITS_OF_MARGIN - row.units} more "
            f"independent documents than the {row.units} that were evaluated."
        )
    if margin and claim is None:
        said = f"The margin {margin.text} cannot be tested here: {_TOLERANCE}"
        return "undecided", said
    if claim and claim.q < alpha:
        return "pass", f"Shown to be {within} (q = {claim.q:.3g})."
    if worse is None or row.units < LEAST_UNITS:
        return "undecided", too_few
    if worse < alpha:
        change = f"{way} by {abs(row.difference):.6g}"
        return "fail", f"Significantly {change} (q = {worse:.3g} < {alpha:g})."
    if better is not None and better < alpha:
        return _IMPROVED
    if claim:
        return "undecided", (
            f"Not decided whether {within} (q = {claim.q:.3g} >= {alpha:g}) or worse: "
            "`lm-eval-pruned power` estimates how many documents would decide."
        )
    return "pass", f"Not significantly {way} (q = {worse:.3g} >= {alpha:g})."


def _sides(case: Case, row: Difference) -> tuple[float | None, float | None]:
    """Return p of a change for the worse and for the better; of any change where neither is better."""
    up = case.scores[0].higher_is_better
    if up is None or row.p is None:
        return row.p, None
    toward, away = row.p / 2, 1 - row.p / 2
    return (away, toward) if (row.difference > 0) == up else (toward, away)


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline besides the scores, one sentence each."""
    found = [note for run in runs.values() for note in run.notes]
    for name, before in baseline.runs.items():
        if run := runs.get(name):
            tasks = [task for task in before.tasks() if task in run.tasks()]
            found += settings_notes(before, run, tasks)
    return found
