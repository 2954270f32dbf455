"""``lm-eval-pruned check``: results against a committed baseline, for CI.

The baseline is one JSON file: for each run, task and metric the expected score and
one rule of how far a result may fall behind it: ``absolute`` or ``relative``
tolerance, or ``alpha``, the level at which the logged samples must not show it to be
worse. It also holds of how many documents, shots and so on each score is: scores of
different tests are not compared. The file holds hashes and scores of documents, never
their text.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from lm_eval_pruned.analysis import statistics
from lm_eval_pruned.analysis.results_file import ResultsError, Run, read_json
from lm_eval_pruned.analysis.runs import is_sweep, read_run
from lm_eval_pruned.analysis.samples import TRANSFORMS, Documents, read_documents
from lm_eval_pruned.analysis.settings import (
    ASKED,
    CIRCUMSTANCES,
    MODEL,
    OF_FEWSHOT,
    PRUNING,
    differing,
    listed,
    notes_on,
    shown,
)
from lm_eval_pruned.analysis.sweep_results import read_sweep
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: Version of the baseline file. Version 1 did not say what its scores are of.
SCHEMA = 2
RULES = ("absolute", "relative", "alpha")
#: Digits that scores are written with, and what two equal scores may differ by.
_DIGITS = 10
_EQUAL = 1e-9
#: Name of the run where the results are not a sweep's.
_ONLY_RUN = "run"


@dataclass(frozen=True)
class Rule:
    """How far a score may fall behind.

    Attributes:
        kind: One of `RULES`.
        value: Tolerance in the metric's own unit, tolerance as a share of the expected
            score, or level of the test.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ResultsError(f"{self.kind} is {value!r}: give a number.")
        if self.kind == "alpha" and not 0 < value < 1:
            raise ResultsError(f"alpha={value} is not between 0 and 1: give 0.05, say.")
        if not 0 <= value < math.inf:
            raise ResultsError(
                f"{self.kind}={value} is no tolerance: give 0 or a positive number."
            )


@dataclass(frozen=True)
class Expectation:
    """What the baseline says about one metric.

    Attributes:
        score: Expected score.
        higher_is_better: Direction; None where any change counts as worse.
        rule: See `Rule`.
        documents: Scores of single documents; only for the rule ``alpha``.
    """

    score: float
    higher_is_better: bool | None
    rule: Rule
    documents: Documents | None = None


@dataclass(frozen=True)
class Baseline:
    """A baseline file.

    Attributes:
        expectations: By (run, task, metric).
        versions: Task version by (run, task).
        settings: How the task was evaluated, by (run, task); see `settings.settings_of`.
    """

    expectations: Mapping[tuple[str, str, str], Expectation]
    versions: Mapping[tuple[str, str], Any]
    settings: Mapping[tuple[str, str], Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What the gate says about one metric.

    Attributes:
        run: Name of the run.
        task: The task.
        metric: The metric.
        status: ``pass``, ``improved`` (passes), ``new`` (passes), ``fail``, or
            ``undecided`` where the score cannot be held against the baseline.
        expected: Score of the baseline, or None.
        score: Score of the results, or None.
        message: One sentence.
    """

    run: str
    task: str
    metric: str
    status: str
    expected: float | None
    score: float | None
    message: str

    @property
    def failed(self) -> bool:
        """Whether the result is known to be bad."""
        return self.status == "fail"


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where something failed, else 2 where something is undecided, else 0."""
    statuses = {finding.status for finding in findings}
    return 1 if "fail" in statuses else 2 if "undecided" in statuses else 0


def read_results(path: str | Path) -> dict[str, Run]:
    """Read the runs to be checked, by the names they have in a baseline.

    Raises:
        ResultsError: They cannot be read, or a unit of the sweep failed.
    """
    if not is_sweep(path):
        return {_ONLY_RUN: read_run(path)}
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

    The p values of all ``alpha`` rules are adjusted together (Benjamini-Hochberg), so
    that a gate of many metrics does not close by chance. They are one-sided where the
    direction is known: the rule asks whether a result is worse.

    Args:
        runs: From `read_results`.
        baseline: From `read_baseline`.

    Returns:
        One finding per metric, sorted by run, task and metric.

    Raises:
        ResultsError: An ``alpha`` rule meets samples that cannot be read.
    """
    findings = {}
    tests: dict[tuple[str, str, str], _Test] = {}
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
            findings[key] = _failed(finding, f"The results have {what}.")
            continue
        version = baseline.versions.get((run_name, task))
        asked = _asked_otherwise(baseline.settings.get((run_name, task), {}), run, task)
        if version is not None and run.versions.get(task) not in (None, version):
            message = (
                f"The task has version {run.versions[task]}, and the baseline is of version "
                f"{version}: the scores cannot be compared. To accept, run with --update."
            )
            findings[key] = _failed(finding, message)
        elif not math.isfinite(score.value):
            message = f"The score is {score.value}, not a finite number."
            findings[key] = _failed(finding, message)
        elif version is not None and task not in run.versions:
            message = f"The results do not say whether the task has version {version}."
            findings[key] = _undecided(finding, message)
        elif {score.higher_is_better, expected.higher_is_better} == {True, False}:
            message = (
                "Not comparable: what was better is now worse (higher_is_better is "
                f"{score.higher_is_better}). To accept, run with --update."
            )
            findings[key] = _undecided(finding, message)
        elif asked:
            message = f"Not comparable: {asked}. Evaluate as the baseline was, or accept with --update."
            findings[key] = _undecided(finding, message)
        elif expected.rule.kind == "alpha":
            findings[key] = finding
            try:
                tests[key] = _test(run, task, metric, expected)
            except _Undecidable as reason:
                findings[key] = _undecided(finding, str(reason))
        else:
            findings[key] = _within(finding, expected)
    worse = statistics.false_discovery_rate([test.worse for test in tests.values()])
    better = statistics.false_discovery_rate([test.better for test in tests.values()])
    for (key, test), q, q_better in zip(tests.items(), worse, better, strict=True):
        findings[key] = _significant(
            findings[key], baseline.expectations[key], test, q, q_better
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


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline beside the scores, one sentence each."""
    found: dict[str, list[str]] = {}
    tasks = [key for key in baseline.settings if key[1] in _tasks(runs, key[0])]
    for name, task in tasks:
        before = baseline.settings[name, task]
        after = runs[name].settings.get(task, {})
        names = (*ASKED, *CIRCUMSTANCES, *PRUNING)
        for setting in differing(before, after, names):
            values = f"{shown(before.get(setting))} -> {shown(after.get(setting))}"
            found.setdefault(f"{setting} {values}", []).append(_where(name, task))
        if before.get("documents") is None:
            what = "documents: the baseline does not say how many"
            found.setdefault(what, []).append(_where(name, task))
    return notes_on(runs.values()) + [
        f"{change} ({'everywhere' if len(where) == len(tasks) else listed(where)})."
        for change, where in _without_hashes(found).items()
    ]


def update_notes(
    runs: Mapping[str, Run], baseline: Baseline, previous: Baseline
) -> list[str]:
    """Return what an update changes or drops beside the scores, one sentence each."""
    gone = [
        f"{_where(run, task)} {metric}"
        for run, task, metric in previous.expectations
        if (run, task, metric) not in baseline.expectations
    ]
    dropped = [f"No longer expected: {listed(gone)}."] if gone else []
    return dropped + notes(runs, previous)


def unusable_rules(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return which rules cannot even hold the results that they were made of."""
    return [
        f"{_title(finding)}: {finding.message}"
        for finding in check(runs, baseline)
        if finding.status == "undecided"
    ]


def make_baseline(
    runs: Mapping[str, Run], rule: Rule, previous: Baseline | None = None
) -> Baseline:
    """Make a baseline of results.

    Args:
        runs: From `read_results`.
        rule: For metrics that `previous` has no rule for.
        previous: Whose rules stay.

    Raises:
        ResultsError: A score is NaN or infinite, or a rule ``alpha`` has no samples.
    """
    expectations = {}
    versions = {}
    settings = {}
    for name, run in runs.items():
        for (task, metric), score in run.scores.items():
            if not math.isfinite(score.value):
                raise ResultsError(
                    f"The score {metric} of {task} in {run.path} is {score.value}: a baseline "
                    "needs finite numbers."
                )
            key = name, task, metric
            known = previous.expectations.get(key) if previous else None
            kept = known.rule if known else rule
            documents = None
            if kept.kind == "alpha":
                documents = _documents(run, task, metric)
            expectations[key] = Expectation(
                score.value, score.higher_is_better, kept, documents
            )
            if task in run.versions:
                versions[name, task] = run.versions[task]
            settings[name, task] = {
                setting: value
                for setting, value in run.settings.get(task, {}).items()
                if value is not None and setting not in MODEL
            }
    return Baseline(expectations, versions, settings)


def read_baseline(file: str | Path, *, earlier: bool = False) -> Baseline:
    """Read a baseline file.

    Args:
        file: The file.
        earlier: Whether to take one of an earlier version, whose settings are empty.

    Raises:
        ResultsError: It does not exist, is damaged, or is of a version not read here.
    """
    file = Path(file)
    if not file.exists():
        raise ResultsError(
            f"The baseline {file} does not exist: make it with `lm-eval-pruned check RESULTS "
            f"--baseline {file} --update`."
        )
    data = read_json(file)
    schema = data.get("schema_version")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ResultsError(
            f"{file} has schema version {schema}, and this version of lm-eval-pruned reads up to "
            f"{SCHEMA}: upgrade lm-eval-pruned."
        )
    if schema not in (1, SCHEMA) or not isinstance(data.get("runs"), dict):
        raise ResultsError(f"{file} is no baseline of `lm-eval-pruned check`.")
    expectations = {}
    versions = {}
    settings = {}
    for run, tasks in data["runs"].items():
        if tasks == {}:
            raise ResultsError(f"{file} expects nothing of {run}: run with --update.")
        for task, entry in _mapping(file, run, tasks).items():
            entry = _mapping(file, f"{run}, {task}", entry)
            if entry.get("version") is not None:
                versions[run, task] = entry["version"]
            if schema == SCHEMA:
                where = f"settings of {run}, {task}"
                settings[run, task] = _mapping(file, where, entry.get("settings", {}))
            metrics = _mapping(file, f"{run}, {task}", entry.get("metrics"))
            if not metrics:
                raise ResultsError(
                    f"{file} expects nothing of {run}, {task}: run with --update."
                )
            for metric, record in metrics.items():
                where = f"{run}, {task}, {metric}"
                expectations[run, task, metric] = _expectation(
                    file, where, _mapping(file, where, record)
                )
    if not expectations:
        raise ResultsError(f"{file} expects nothing: make it anew with --update.")
    if schema != SCHEMA and not earlier:
        raise ResultsError(
            f"{file} was made by an earlier version and does not say of how many documents and "
            "shots its scores are: make it anew with --update, which keeps its rules."
        )
    return Baseline(expectations, versions, settings)


def write_baseline(file: str | Path, baseline: Baseline) -> None:
    """Write a baseline file whole or not at all; the same baseline gives the same bytes."""
    runs: dict[str, Any] = {}
    for (run, task, metric), expected in baseline.expectations.items():
        entry = runs.setdefault(run, {}).setdefault(task, {"metrics": {}})
        if (run, task) in baseline.versions:
            entry["version"] = baseline.versions[run, task]
        if baseline.settings.get((run, task)):
            entry["settings"] = dict(baseline.settings[run, task])
        record: dict[str, Any] = {
            "score": _stable(expected.score),
            "higher_is_better": expected.higher_is_better,
            expected.rule.kind: expected.rule.value,
        }
        if expected.documents is not None:
            record["documents"] = _documents_as_dict(expected.documents)
        entry["metrics"][metric] = record
    text = json.dumps(
        {"schema_version": SCHEMA, "runs": runs},
        indent=2,
        sort_keys=True,
        allow_nan=False,
        ensure_ascii=False,
    )
    write_atomically(file, text + "\n")


def _within(finding: Finding, expected: Expectation) -> Finding:
    assert finding.score is not None
    change = finding.score - expected.score
    rule = expected.rule
    tolerance = rule.value
    if rule.kind == "relative":
        tolerance *= abs(expected.score)
    allowed = f"{rule.value:g}" + (
        " of the expected score" if rule.kind == "relative" else ""
    )
    fuzz = _EQUAL * max(1.0, abs(expected.score))
    if abs(change) <= tolerance + fuzz:
        return replace(finding, message=f"Within {allowed} of the baseline.")
    if _is_improvement(change, expected):
        return replace(finding, status="improved", message=_IMPROVED)
    direction = "Changed" if expected.higher_is_better is None else "Worse"
    return _failed(finding, f"{direction} by {abs(change):.6g}, allowed is {allowed}.")


def _significant(
    finding: Finding,
    expected: Expectation,
    test: _Test,
    q: float | None,
    q_better: float | None,
) -> Finding:
    assert finding.score is not None
    alpha = expected.rule.value
    least = statistics.LEAST_UNITS
    if q is None or test.units < least:
        message = (
            f"{test.units} independent documents are too few to decide, at least {least} are "
            "needed: use a tolerance instead of alpha."
        )
        return _undecided(finding, message)
    if q < alpha:
        change = abs(finding.score - expected.score)
        direction = "different" if expected.higher_is_better is None else "worse"
        return _failed(
            finding,
            f"Significantly {direction} by {change:.6g} (q = {q:.3g} < {alpha:g}).",
        )
    if q_better is not None and q_better < alpha:
        return replace(finding, status="improved", message=_IMPROVED)
    if test.smallest is not None and test.smallest >= alpha:
        message = (
            "Too few documents to decide: not even the worst possible score would be significant "
            f"(p = {test.smallest:.3g} >= {alpha:g}): use a tolerance instead of alpha."
        )
        return _undecided(finding, message)
    direction = "different" if expected.higher_is_better is None else "worse"
    return replace(
        finding, message=f"Not significantly {direction} (q = {q:.3g} >= {alpha:g})."
    )


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


def _failed(finding: Finding, message: str) -> Finding:
    return replace(finding, status="fail", message=message)


def _undecided(finding: Finding, message: str) -> Finding:
    return replace(finding, status="undecided", message=message)


def _tasks(runs: Mapping[str, Run], name: str) -> list[str]:
    return runs[name].tasks() if name in runs else []


def _without_hashes(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Say once that a hash differs, whatever its values."""
    merged: dict[str, list[str]] = {}
    for change, where in found.items():
        name = change.split(" ", 1)[0]
        said = _HASHES.get(name, change)
        merged.setdefault(said, []).extend(where)
    return merged


#: What it means that a hash is another.
_HASHES = {
    "task_hash": "task_hash is another: the documents, the prompts or their order are",
    "kept_digest": "kept_digest is another: other neurons are kept",
}


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


_IMPROVED = "Better than the baseline; to expect this from now on, run with --update."


def _is_improvement(change: float, expected: Expectation) -> bool:
    better = expected.higher_is_better
    return better is not None and (change > 0) == better


class _Undecidable(ResultsError):
    """Why the documents of results and baseline cannot be compared."""


@dataclass(frozen=True)
class _Test:
    """What the documents say.

    Attributes:
        worse: p of "the results are not worse", or not different where the direction
            is not known; None where no test could be made.
        better: p of "the results are not better"; None where that is not known.
        smallest: The p that nothing but wrong answers would have; None where documents
            are not independent and right or wrong.
        units: Independent documents, or clusters of them.
    """

    worse: float | None
    better: float | None
    smallest: float | None
    units: int


def _test(run: Run, task: str, metric: str, expected: Expectation) -> _Test:
    before, after = expected.documents, _documents(run, task, metric)
    assert before is not None
    position = {key: index for index, key in enumerate(after.keys)}
    if position.keys() != set(before.keys):
        raise _Undecidable(
            "Evaluated on other documents than the baseline (matched by doc_hash): evaluate with "
            "the same --limit and data, or run with --update."
        )
    order = [position[key] for key in before.keys]
    if before.transform != after.transform or not np.allclose(
        before.weights, after.weights[order]
    ):
        raise _Undecidable(
            "The documents are weighted otherwise than in the baseline: run with --update."
        )

    def compared(
        values: np.ndarray, alternative: statistics.Alternative
    ) -> statistics.PairedTest:
        return statistics.paired_difference(
            before.values,
            values,
            weights=before.weights,
            clusters=before.clusters,
            strata=before.strata,
            transform=before.transform,
            alpha=expected.rule.value,
            alternative=alternative,
        )

    sides = _SIDES[expected.higher_is_better]
    test = compared(after.values[order], sides[0])
    worst = []
    if (
        before.clusters is None
        and before.transform == "mean"
        and (before.weights == 1).all()
        and np.isin(before.values, (0, 1)).all()
    ):
        worst = [
            np.full(len(order), value) for value in _WORST[expected.higher_is_better]
        ]
    smallest = [p for p in (compared(w, sides[0]).p for w in worst) if p is not None]
    better = compared(after.values[order], sides[1]).p if len(sides) > 1 else None
    return _Test(test.p, better, min(smallest, default=None), test.units)


#: Alternatives for worse and better, by `Expectation.higher_is_better`.
_SIDES: dict[bool | None, tuple[statistics.Alternative, ...]] = {
    True: ("less", "greater"),
    False: ("greater", "less"),
    None: ("two-sided",),
}
#: The worst answers of right-or-wrong documents.
_WORST = {True: (0.0,), False: (1.0,), None: (0.0, 1.0)}


def _documents(run: Run, task: str, metric: str) -> Documents:
    """Read documents and shorten their keys to what a baseline file holds."""
    documents = read_documents(run, task, metric)
    if documents is None:
        raise _Undecidable(
            f"The rule alpha needs logged samples that make up {metric} of {task}, and {run.path} "
            "has none: evaluate with --log_samples, or use a tolerance for this metric."
        )
    clusters = documents.clusters
    if clusters is not None:
        numbers = {
            name: str(number) for number, name in enumerate(sorted(set(clusters)))
        }
        clusters = tuple(numbers[name] for name in clusters)
    return replace(
        documents,
        keys=tuple((task, digest[:16], n) for task, digest, n in documents.keys),
        clusters=clusters,
    )


def _documents_as_dict(documents: Documents) -> dict[str, Any]:
    names = [f"{task} {digest} {n}" for task, digest, n in documents.keys]
    record: dict[str, Any] = {
        "transform": documents.transform,
        "values": dict(zip(names, map(_stable, documents.values), strict=True)),
    }
    if (documents.weights != 1).any():
        record["weights"] = dict(
            zip(names, map(_stable, documents.weights), strict=True)
        )
    if documents.clusters is not None:
        record["clusters"] = dict(zip(names, documents.clusters, strict=True))
    return record


def _expectation(file: Path, where: str, record: Mapping[str, Any]) -> Expectation:
    score = record.get("score")
    if (
        isinstance(score, bool)
        or not isinstance(score, int | float)
        or not math.isfinite(score)
    ):
        raise ResultsError(f"{file}: the score of {where} is {score!r}, not a number.")
    rules = [kind for kind in RULES if kind in record]
    if len(rules) != 1:
        raise ResultsError(
            f"{file}: {where} has {len(rules)} rules: give it one of {', '.join(RULES)}."
        )
    direction = record.get("higher_is_better")
    if direction is not None and not isinstance(direction, bool):
        raise ResultsError(f"{file}: higher_is_better of {where} is {direction!r}.")
    try:
        rule = Rule(rules[0], record[rules[0]])
    except ResultsError as error:
        raise ResultsError(f"{file}: {where}: {error}") from None
    documents = None
    if rule.kind == "alpha":
        if "documents" not in record:
            raise ResultsError(
                f"{file}: {where} has the rule alpha but no documents: run with --update."
            )
        try:
            documents = _documents_from_dict(record["documents"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ResultsError(
                f"{file}: the documents of {where} are damaged."
            ) from None
    return Expectation(float(score), direction, rule, documents)


def _documents_from_dict(record: Mapping[str, Any]) -> Documents:
    if record["transform"] not in TRANSFORMS:
        raise ValueError(record["transform"])
    values = record["values"]
    names = list(values)
    weights = record.get("weights")
    clusters = record.get("clusters")
    keys = []
    for name in names:
        task, digest, number = name.rsplit(" ", 2)
        keys.append((task, digest, int(number)))
    numbers = np.array([float(values[name]) for name in names])
    if not names or not np.isfinite(numbers).all():
        raise ValueError
    return Documents(
        tuple(keys),
        numbers,
        np.array([float(weights[name]) for name in names])
        if weights
        else np.ones(len(names)),
        tuple(str(clusters[name]) for name in names) if clusters else None,
        record["transform"],
    )


def _mapping(file: Path, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ResultsError(f"{file}: the entry of {where} is damaged.")
    return value


def _stable(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def as_text(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings for people; what needs no attention is only counted."""
    lines = []
    for finding in findings:
        if finding.status != "pass":
            scores = f"{_number(finding.expected)} -> {_number(finding.score)}"
            lines.append(
                f"{finding.status.upper():8} {_title(finding)}: {scores}. {finding.message}"
            )
    lines += [f"NOTE     {note}" for note in notes]
    lines.append(_summary(findings))
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings as a JSON object; numbers that are not finite become null."""
    rows = [
        {
            name: None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in asdict(finding).items()
        }
        for finding in findings
    ]
    passed = exit_code(findings) == 0
    data = {"passed": passed, "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def as_junit(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings as JUnit XML, one test case per metric."""
    counts = {
        status: str(sum(finding.status == status for finding in findings))
        for status in ("fail", "undecided")
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name="lm-eval-pruned check",
        tests=str(len(findings)),
        failures=counts["fail"],
        errors=counts["undecided"],
    )
    for finding in findings:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"{finding.run}.{finding.task}",
            name=finding.metric,
        )
        scores = f"expected {_number(finding.expected)}, got {_number(finding.score)}"
        if finding.status in ("fail", "undecided"):
            kind = "failure" if finding.failed else "error"
            bad = ElementTree.SubElement(case, kind, message=finding.message)
            bad.text = scores
        else:
            ElementTree.SubElement(
                case, "system-out"
            ).text = f"{finding.message} {scores}"
    if notes:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(notes)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_github(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings as workflow commands, which GitHub Actions shows as annotations."""
    commands = {
        "fail": "error",
        "undecided": "error",
        "improved": "notice",
        "new": "notice",
    }
    lines = []
    for finding in findings:
        if finding.status in commands:
            title = _escape(_title(finding)).replace(":", "%3A").replace(",", "%2C")
            scores = (
                f"expected {_number(finding.expected)}, got {_number(finding.score)}"
            )
            lines.append(
                f"::{commands[finding.status]} title={title}::"
                + _escape(f"{finding.message} ({scores})")
            )
    lines += [
        f"::warning title=not as in the baseline::{_escape(note)}" for note in notes
    ]
    lines.append(_summary(findings))
    return "\n".join(lines) + "\n"


FORMATS = {
    "text": as_text,
    "json": as_json,
    "junit": as_junit,
    "github": as_github,
}


def _where(run: str, task: str) -> str:
    return task if run == _ONLY_RUN else f"{run} {task}"


def _title(finding: Finding) -> str:
    return f"{_where(finding.run, finding.task)} {finding.metric}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _summary(findings: Sequence[Finding]) -> str:
    counts = {
        status: sum(finding.status == status for finding in findings)
        for status in ("fail", "undecided", "improved", "new", "pass")
    }
    word = ("passed", "failed", "undecided")[exit_code(findings)]
    undecided = f"{counts['undecided']} undecided, " if counts["undecided"] else ""
    return (
        f"Check {word}: {counts['fail']} failed, {undecided}{counts['pass']} as expected, "
        f"{counts['improved']} improved, {counts['new']} not in the baseline."
    )


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
