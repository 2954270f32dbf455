"""``lm-eval-pruned check``: results compared with a committed baseline, by the claims of ``verdict``.

What is said of each metric is for people, JSON, or GitHub Actions.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.answer import CODES, NO_LOSS, REFUTED, WORDS
from lm_eval_pruned.compare.baseline import BESIDE, Baseline, Key, Rule
from lm_eval_pruned.compare.cases import Case
from lm_eval_pruned.compare.comparison import settings_notes
from lm_eval_pruned.compare.floors import blind_scores
from lm_eval_pruned.compare.judge import (
    MEAN,
    PART,
    TOLERANCE,
    answer_of,
    claims_on,
)
from lm_eval_pruned.compare.margins import (
    CLAIMS,
    further_measures,
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.compare.pairing import (
    another_test,
    answers_changed_by,
    served_otherwise,
)
from lm_eval_pruned.results.documents import CHOICE_PROB, check_score, documents_of
from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    Score,
    finite_or_none,
)
from lm_eval_pruned.results.runs import is_sweep, read_run, read_sweep


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lm_eval_pruned.compare.judge import Claim

    #: A word of `answer.WORDS`, and a sentence.
    Decision = tuple[str, str]

#: Name of the run where the results are not a sweep's.
ONLY_RUN = "run"
#: By exit code.
_SUMMARY = {0: "passed", 1: "failed", 2: "refused", 3: "undecided"}
IMPROVED = (
    "better",
    "Better than the baseline; to expect this from now on, run with --update.",
)


@dataclass(frozen=True)
class Finding:
    """What the gate says about one metric: a word of `answer.WORDS`, both scores, and a sentence.

    `code` is the exit code that it makes of the whole check: of a claim, that of the answer on all claims
    of its run.
    """

    run: str
    task: str
    metric: str
    word: str
    expected: float | None
    score: float | None
    message: str
    code: int = field(default=0, repr=False)

    @property
    def status(self) -> str:
        """What the gate makes of the word."""
        return WORDS[self.word].status

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


def floors_in(path: str | Path) -> Sequence[Run]:
    """Return the runs of models that know nothing that a sweep holds."""
    return read_sweep(path).floors if is_sweep(path) else ()


def make_baseline(
    runs: Mapping[str, Run],
    kind: str,
    value: Any,
    previous: Baseline | None = None,
    floors: Sequence[Run] = (),
) -> Baseline:
    """Make a baseline of results, with the rules of `previous`, and a rule of a `kind` for other metrics.

    `floors` are runs of models that know nothing.

    A margin is for the measure that `judged_keys` yields of each task, and for further measures of the same
    answers; without a `value` it is the usual one of that metric.

    ResultsError if a score is NaN or infinite.
    """
    baseline, kept = Baseline(), previous.rules if previous else {}
    for name, run in runs.items():
        computed = any(k[0] == name and k[2] == CHOICE_PROB for k in kept)
        run = with_choice_prob(run) if kind in CLAIMS or computed else run
        baseline.runs[name] = replace(run, name="the baseline")
        kinds = dict.fromkeys(run.scores, kind)
        if kind in CLAIMS:
            judged = [*judged_keys(run)]
            kinds = dict.fromkeys(judged, kind)
            kinds |= dict.fromkeys(further_measures(run, judged), BESIDE)
        for task, metric in run.scores:
            key = name, task, metric
            if key not in kept and (task, metric) not in kinds:
                continue
            if refused := _refused(run, run, task, metric):
                raise ResultsError(f"{run.path}, {task} {metric}: {refused[1]}")
            usual = usual_margin(run, (task, metric)) if kind in CLAIMS else value
            limit = usual if value is None else value
            rule = kept.get(key) or Rule(kinds[task, metric], limit)
            rule.check(task, metric, run)
            baseline.rules[key] = rule
        claimed = [
            k[1:] for k, r in baseline.rules.items() if k[0] == name and r.margin
        ]
        baseline.blind[name] = blind_scores(run, floors, claimed)
    return baseline


def check(runs: Mapping[str, Run], baseline: Baseline) -> list[Finding]:
    """Compare results with a baseline; return a finding per metric, sorted by run, task and metric."""
    if any(metric == CHOICE_PROB for _, _, metric in baseline.rules):
        runs = {name: with_choice_prob(run) for name, run in runs.items()}
    before, after = _scores(baseline.runs), _scores(runs)
    tasks = {key[:2] for key in after}
    decided: dict[Key, Decision] = dict.fromkeys(
        after, ("new", "Not in the baseline; to add it, run with --update.")
    )
    cases: dict[Key, Case] = {}
    for key, rule in baseline.rules.items():
        name, task, metric = key
        # A verdict leaves out what a candidate does not have beside what is judged.
        if rule.kind == BESIDE and not (
            key in after and math.isfinite(after[key].value)
        ):
            decided.pop(key, None)
        elif key not in after and metric == CHOICE_PROB and (name, task) in tasks:
            decided[key] = "asked otherwise", _no_samples(key, rule)
        elif key not in after:
            missing = " ".join(key[name in runs :])
            decided[key] = "missing", f"The results have no {missing}."
        elif refused := _refused(baseline.runs[name], runs[name], task, metric):
            decided[key] = refused
        elif rule.margin is None:
            decided[key] = _within_tolerance(rule, before[key], after[key].value)
            if decided[key][0] in REFUTED:
                try:
                    check_score(runs[name], task, metric)
                except ResultsError as why:
                    decided[key] = "asked otherwise", str(why)
        else:
            try:
                cases[key] = _case(key, runs[name], baseline)
                decided.pop(key)
            except ResultsError as why:
                decided[key] = "asked otherwise", str(why)
    found = [
        Finding(
            *key,
            word,
            before[key].value if key in before else None,
            after[key].value if key in after else None,
            message,
            _CODE_OF.get(WORDS[word].status, 0),
        )
        for key, (word, message) in decided.items()
    ]
    for name in runs:
        of_run = {key: c for key, c in cases.items() if key[0] == name}
        found += _on_claims(name, runs, of_run, baseline)
    return sorted(
        found, key=lambda finding: (finding.run, finding.task, finding.metric)
    )


#: What a single finding that is no claim makes of the whole check, by its status.
_CODE_OF = {"fail": 1, "undecided": 3, "refused": 2}


def _on_claims(
    name: str, runs: Mapping[str, Run], cases: Mapping[Key, Case], baseline: Baseline
) -> list[Finding]:
    """Return what the claims on one run are found to be, as `verdict` decides them."""
    beside = [key for key in cases if baseline.rules[key].kind == BESIDE]
    others = [cases[key] for key in beside]
    judged = [case for key, case in cases.items() if key not in beside]
    blind = baseline.blind.get(name, set())
    claims = claims_on(judged, others, blind)
    changed = answers_changed_by(served_otherwise(baseline.runs[name], runs[name]))
    code = CODES[answer_of(claims, changed)] if judged else 0
    found = [
        Finding(
            name,
            claim.row.task,
            claim.row.metric,
            claim.word,
            claim.row.base_score,
            claim.row.score,
            claim.message,
            code,
        )
        for claim in claims
        if claim.about not in (PART, MEAN) or _counts(claim)
    ]
    if judged and changed:
        message = f"Served otherwise than the baseline: {', '.join(changed)}."
        found.append(Finding(name, "files", "", "undecided", None, None, message, code))
    return found


def _counts(claim: Claim) -> bool:
    """Whether a claim that has no entry in the baseline by itself has to be told."""
    return claim.about == MEAN or WORDS[claim.word].status != "pass"


def _scores(runs: Mapping[str, Run]) -> dict[Key, Score]:
    return {
        (name, *key): score
        for name, run in runs.items()
        for key, score in run.scores.items()
    }


def _refused(before: Run, run: Run, task: str, metric: str) -> Decision | None:
    """Say why a score cannot be compared with the expected one; None if it can."""
    score = run.scores[task, metric].value
    if not math.isfinite(score):
        return "not comparable", f"The score is {score}, not a finite number."
    one, other = before.settings.get(task, {}), run.settings.get(task, {})
    # Another width is another model.
    widths = ["widths"] * bool(one.get("widths") and other.get("widths"))
    why = another_test(before, run, task, widths)
    accept = "Evaluate with the settings of the baseline, or accept with --update."
    return (
        ("asked otherwise", f"Not comparable: {why.rstrip('.')}. {accept}")
        if why
        else None
    )


def _within_tolerance(rule: Rule, expected: Score, score: float) -> Decision:
    tolerance, allowed = rule.value, f"{rule.value:g}"
    if rule.kind == "relative":
        tolerance *= abs(expected.value)
        allowed += " of the expected score"
    # The file has ten digits of a score.
    if math.isclose(score, expected.value, abs_tol=tolerance + 1e-9):
        return "equivalent", f"Within {allowed} of the baseline."
    change, up = score - expected.value, expected.higher_is_better
    if up is not None and (change > 0) == up:
        return IMPROVED
    direction = "Changed" if up is None else "Worse"
    return "worse", f"{direction} by {abs(change):.6g}, and the rule allows {allowed}."


def _as_in_file(run: Run, task: str, metric: str) -> Run:
    """Return a run with hashes as short and values as exact as a baseline file holds them."""
    if documents := documents_of(run, task, metric):
        keys = tuple((task, digest[:16], n) for task, digest, n in documents.keys)
        values = np.array([float(f"{value:.10g}") for value in documents.values])
        short = replace(documents, keys=keys, values=values)
        return replace(run, documents={task: {metric: short}})
    return run


def _case(key: Key, run: Run, baseline: Baseline) -> Case:
    """Pair documents; raise ResultsError without any, or if they are others or weigh otherwise."""
    name, task, metric = key
    before = baseline.runs[name]
    check_score(run, task, metric)
    expected, now = (_as_in_file(item, task, metric) for item in (before, run))
    rule = baseline.rules[key]
    case = Case(expected, now, (task, metric), margin=rule.margin)
    if case.pair is None:
        raise ResultsError(_no_samples(key, rule))
    return case


def _no_samples(key: Key, rule: Rule) -> str:
    return (
        f"The rule {rule.kind} needs logged samples from which {key[2]} of {key[1]} can "
        f"be computed, weighted as in the baseline: evaluate with --log_samples, or {TOLERANCE}"
    )


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline besides the scores, one sentence each."""
    sentences = [note for run in runs.values() for note in run.notes]
    for name, before in baseline.runs.items():
        if run := runs.get(name):
            tasks = [task for task in before.tasks() if task in run.tasks()]
            sentences += settings_notes(before, run, tasks)
    return sentences


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where something failed, else 2 where something was asked otherwise, 3 where undecided, or 0."""
    return next((c for c in (1, 2, 3) if c in {f.code for f in findings}), 0)


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(WORDS[finding.word].summary for finding in findings)
    always = dict.fromkeys(word.summary for word in WORDS.values())
    rare = {WORDS[word].summary for word in ("undecided", "asked otherwise", NO_LOSS)}
    parts = [f"{counts[s]} {s}" for s in always if counts[s] or s not in rare]
    return f"Check {_SUMMARY[exit_code(findings)]}: {', '.join(parts)}.\n"


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
    rows = [
        {k: v for k, v in asdict(f).items() if k != "code"}
        | {"score": finite_or_none(f.score), "status": f.status}
        for f in findings
    ]
    data = {"passed": not exit_code(findings), "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def _github(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    in_text = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
    in_title = in_text | str.maketrans({":": "%3A", ",": "%2C"})
    annotations = [
        (WORDS[f.word].annotation, f.title, f"{f.message} ({f.scores()})")
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
