"""``lm-eval-pruned check``: results compared with a committed baseline, by the tests of ``compare``.

What is said of each metric is for people, JSON, or GitHub Actions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.baseline import OF_DOCUMENTS, Baseline, Key, Rule
from lm_eval_pruned.compare.comparison import settings_notes
from lm_eval_pruned.compare.judge import (
    CLAIM_LEVEL,
    IMPROVED,
    TOLERANCE,
    Case,
    Decision,
    decisions,
    judged,
)
from lm_eval_pruned.compare.margins import (
    CLAIMS,
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.results.documents import CHOICE_PROB, documents_of
from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    Score,
    asked_differently,
    finite_or_none,
)
from lm_eval_pruned.results.runs import is_sweep, read_run, read_sweep


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


#: Name of the run where the results are not a sweep's.
ONLY_RUN = "run"
#: By status: annotation of GitHub Actions, and words of the summary.
STATUSES = {
    "fail": ("error", "failed"),
    "undecided": ("error", "undecided"),
    "pass": ("", "as expected"),
    "improved": ("notice", "improved"),
    "new": ("notice", "not in the baseline"),
}


@dataclass(frozen=True)
class Finding:
    """What the gate says about one metric: one of `STATUSES`, both scores, and a sentence.

    ``undecided`` is a score that cannot be compared with the baseline.
    """

    run: str
    task: str
    metric: str
    status: str
    expected: float | None
    score: float | None
    message: str

    @property
    def title(self) -> str:
        """Run, task and metric in words; the only run has no name."""
        names = (self.run, self.task, self.metric)
        return " ".join(names[self.run == ONLY_RUN :])

    def scores(self, form: str = "expected {}, got {}") -> str:
        """Return both scores in words."""
        both = (self.expected, self.score)
        return form.format(*("none" if x is None else f"{x:.6g}" for x in both))


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
    for name, run in runs.items():
        run = with_choice_prob(run) if kind in CLAIMS else run
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
            rule = kept.get(key) or Rule(kind, usual if value is None else value)
            rule.check(task, metric, score)
            baseline.rules[key] = rule
    return baseline


def check(runs: Mapping[str, Run], baseline: Baseline) -> list[Finding]:
    """Compare results with a baseline; return a finding per metric, sorted by run, task and metric."""
    if any(metric == CHOICE_PROB for _, _, metric in baseline.rules):
        runs = {name: with_choice_prob(run) for name, run in runs.items()}
    before, after = _scores(baseline.runs), _scores(runs)
    decided: dict[Key, Decision] = dict.fromkeys(
        after, ("new", "Not in the baseline; to add it, run with --update.")
    )
    cases: dict[Key, Case] = {}
    for key, rule in baseline.rules.items():
        name, task, metric = key
        if key not in after:
            missing = " ".join(key[name in runs :])
            decided[key] = "fail", f"The results have no {missing}."
        elif refused := _refused(baseline.runs[name], runs[name], task, metric):
            decided[key] = refused
        elif rule.kind not in OF_DOCUMENTS:
            decided[key] = _within_tolerance(rule, before[key], after[key].value)
        else:
            try:
                cases[key] = _case(key, runs[name], baseline)
            except ResultsError as why:
                decided[key] = "undecided", str(why)
    levels = [
        CLAIM_LEVEL if case.margin else float(baseline.rules[key].value)
        for key, case in cases.items()
    ]
    families = [case.family for case in cases.values()]
    answers = decisions(judged([*cases.values()]), levels, families)
    decided |= zip(cases, answers, strict=True)
    return [
        Finding(
            *key,
            status,
            before[key].value if key in before else None,
            after[key].value if key in after else None,
            message,
        )
        for key, (status, message) in sorted(decided.items())
    ]


def _scores(runs: Mapping[str, Run]) -> dict[Key, Score]:
    return {
        (name, *key): score
        for name, run in runs.items()
        for key, score in run.scores.items()
    }


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
        return IMPROVED
    direction = "Changed" if up is None else "Worse"
    return "fail", f"{direction} by {abs(change):.6g}, and the rule allows {allowed}."


def _as_in_file(run: Run, task: str, metric: str) -> Run:
    """Return a run with hashes as short and values as exact as a baseline file holds them."""
    if documents := documents_of(run, task, metric):
        keys = tuple((task, digest[:16], n) for task, digest, n in documents.keys)
        values = np.array([float(f"{value:.10g}") for value in documents.values])
        short = replace(documents, keys=keys, values=values)
        return replace(run, documents={task: {metric: short}})
    return run


def _case(key: Key, run: Run, baseline: Baseline) -> Case:
    """Pair documents; raise ResultsError without any, or if they are others or weigh otherwise.

    The rules ``alpha`` are one family, and those with a margin another: a gate of many metrics does
    not close by chance.
    """
    name, task, metric = key
    before = baseline.runs[name]
    expected, now = (_as_in_file(item, task, metric) for item in (before, run))
    rule = baseline.rules[key]
    case = Case(
        expected, now, (task, metric), rule.margin is not None, margin=rule.margin
    )
    if case.pair is None:
        raise ResultsError(
            f"The rule {rule.kind} needs logged samples from which {metric} of {task} can "
            f"be computed, weighted as in the baseline: evaluate with --log_samples, or {TOLERANCE}"
        )
    return case


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline besides the scores, one sentence each."""
    sentences = [note for run in runs.values() for note in run.notes]
    for name, before in baseline.runs.items():
        if run := runs.get(name):
            tasks = [task for task in before.tasks() if task in run.tasks()]
            sentences += settings_notes(before, run, tasks)
    return sentences


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where something failed, else 2 where something is undecided, else 0."""
    statuses = {finding.status for finding in findings}
    return 1 if "fail" in statuses else 2 if "undecided" in statuses else 0


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    parts = [
        f"{counts[status]} {words}"
        for status, (_, words) in STATUSES.items()
        if counts[status] or status != "undecided"
    ]
    word = ("passed", "failed", "undecided")[exit_code(findings)]
    return f"Check {word}: {', '.join(parts)}.\n"


def _text(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    lines = [
        f"{finding.status.upper():8} {finding.title}: {finding.scores('{} -> {}')}. "
        f"{finding.message}\n"
        for finding in findings
        if finding.status != "pass"
    ]
    lines += [f"NOTE     {note}\n" for note in notes]
    return "".join([*lines, _summary(findings)])


def _json(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    rows = [asdict(f) | {"score": finite_or_none(f.score)} for f in findings]
    data = {"passed": not exit_code(findings), "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def _github(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    in_text = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
    in_title = in_text | str.maketrans({":": "%3A", ",": "%2C"})
    annotations = [
        (STATUSES[f.status][0], f.title, f"{f.message} ({f.scores()})")
        for f in findings
    ]
    annotations += [("warning", "not as in the baseline", note) for note in notes]
    lines = [
        f"::{kind} title={title.translate(in_title)}::{text.translate(in_text)}\n"
        for kind, title, text in annotations
        if kind
    ]
    return "".join([*lines, _summary(findings)])


#: What writes findings and notes, by the value of ``--format``.
FORMATS = {"text": _text, "json": _json, "github": _github}
