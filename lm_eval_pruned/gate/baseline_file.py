"""The baseline: expected scores with their rules, made of results and kept in one file.

The file holds hashes and scores of documents, never their text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.margins import CLAIMS, Margin
from lm_eval_pruned.compare.pairing import is_partial
from lm_eval_pruned.results.documents import TRANSFORMS, Documents, read_documents
from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    finite_or_none,
    is_number,
    read_json,
)
from lm_eval_pruned.results.settings import MODEL
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of the baseline file. Version 1 did not say what its scores are of.
SCHEMA = 2
RULES = ("absolute", "relative", "alpha", *CLAIMS)
#: Those that look at single documents.
OF_DOCUMENTS = ("alpha", *CLAIMS)


@dataclass(frozen=True)
class Rule:
    """How far a score may fall behind.

    Attributes:
        kind: One of `RULES`.
        value: Tolerance in the metric's own unit, tolerance as a share of the expected
            score, level of the test, or for `CLAIMS` a margin as `Margin` takes it.
    """

    kind: str
    value: Any

    def __post_init__(self) -> None:
        kind, value = self.kind, self.value
        if kind in CLAIMS:
            try:
                Margin(kind, value)
            except ValueError as error:
                raise ResultsError(str(error)) from None
        elif not is_number(value):
            raise ResultsError(f"{kind} is {value!r}: give a number.")
        elif kind == "alpha" and not 0 < value < 1:
            raise ResultsError(f"alpha={value} is not between 0 and 1: give 0.05, say.")
        elif not 0 <= value < math.inf:
            raise ResultsError(
                f"{kind}={value} is no tolerance: give 0 or a positive number."
            )

    @property
    def margin(self) -> Margin | None:
        """What is claimed by a rule of `CLAIMS`."""
        return Margin(self.kind, self.value) if self.kind in CLAIMS else None


@dataclass(frozen=True)
class Expectation:
    """What the baseline says about one metric.

    Attributes:
        score: Expected score.
        higher_is_better: Direction; None where any change counts as worse.
        rule: See `Rule`.
        version: Of the task, or None.
        settings: How the task was evaluated, see `settings.settings_of`; None where an earlier
            version did not say.
        documents: Scores of single documents; only for the rules `OF_DOCUMENTS`.
    """

    score: float
    higher_is_better: bool | None
    rule: Rule
    version: Any
    settings: Mapping[str, Any] | None
    documents: Documents | None = None


#: What is expected, by run, task and metric.
Baseline = dict[tuple[str, str, str], Expectation]


def make_baseline(
    runs: Mapping[str, Run], rule: Rule, previous: Baseline | None = None
) -> Baseline:
    """Make a baseline of results.

    Args:
        runs: From `read_results`.
        rule: For metrics that `previous` has no rule for.
        previous: Whose rules stay.

    Raises:
        ResultsError: A score is NaN, infinite or partial, or a rule of `OF_DOCUMENTS` has no samples.
    """
    baseline: Baseline = {}
    for name, run in runs.items():
        for (task, metric), score in run.scores.items():
            if is_partial(run, task):
                raise ResultsError(
                    f"The scores of {task} in {run.path} are {run.stopping[task].text} documents: "
                    "a baseline needs all of them, so evaluate without --stop_when."
                )
            if not math.isfinite(score.value):
                raise ResultsError(
                    f"The score {metric} of {task} in {run.path} is {score.value}: a baseline "
                    "needs finite numbers."
                )
            key = name, task, metric
            kept = previous[key].rule if previous and key in previous else rule
            by_documents = kept.kind in OF_DOCUMENTS
            baseline[key] = Expectation(
                score.value,
                score.higher_is_better,
                kept,
                run.versions.get(task),
                {
                    setting: value
                    for setting, value in run.settings.get(task, {}).items()
                    if value is not None and setting not in MODEL
                },
                documents_of(run, task, metric, kept) if by_documents else None,
            )
    return baseline


class Undecidable(ResultsError):
    """Why the documents of results and baseline cannot be compared."""


def documents_of(run: Run, task: str, metric: str, rule: Rule) -> Documents:
    """Read documents and shorten their keys to what a baseline file holds."""
    documents = read_documents(run, task, metric)
    if documents is None:
        raise Undecidable(
            f"The rule {rule.kind} needs logged samples that make up {metric} of {task}, and {run.path} "
            "has none: evaluate with --log_samples, or use a tolerance for this metric."
        )
    clusters = documents.clusters
    if clusters is not None:
        numbers = {name: str(n) for n, name in enumerate(sorted(set(clusters)))}
        clusters = tuple(numbers[name] for name in clusters)
    keys = tuple((task, digest[:16], n) for task, digest, n in documents.keys)
    return replace(documents, keys=keys, clusters=clusters)


def write_baseline(file: str | Path, baseline: Baseline) -> None:
    """Write a baseline file whole or not at all; the same baseline gives the same bytes."""
    runs: dict[str, Any] = {}
    for (run, task, metric), expected in baseline.items():
        entry = runs.setdefault(run, {}).setdefault(task, {"metrics": {}})
        if expected.version is not None:
            entry["version"] = expected.version
        if expected.settings:
            entry["settings"] = dict(expected.settings)
        record = {
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


def _stable(value: float) -> float:
    """Return a score with ten digits: the last ones depend on the processor."""
    return float(f"{value:.10g}")


def _documents_as_dict(documents: Documents) -> dict[str, Any]:
    names = [f"{task} {digest} {n}" for task, digest, n in documents.keys]

    def by_name(values: Any) -> dict[str, Any]:
        return dict(zip(names, values, strict=True))

    record = {
        "transform": documents.transform,
        "values": by_name(map(_stable, documents.values)),
    }
    if (documents.weights != 1).any():
        record["weights"] = by_name(map(_stable, documents.weights))
    if documents.clusters is not None:
        record["clusters"] = by_name(documents.clusters)
    return record


def _documents_from_dict(record: Mapping[str, Any]) -> Documents:
    names = list(record["values"])
    parts = [name.rsplit(" ", 2) for name in names]
    weights = record.get("weights") or dict.fromkeys(names, 1)
    clusters = record.get("clusters")
    documents = Documents(
        tuple((task, digest, int(number)) for task, digest, number in parts),
        np.array([float(record["values"][name]) for name in names]),
        np.array([float(weights[name]) for name in names]),
        tuple(str(clusters[name]) for name in names) if clusters else None,
        record["transform"],
    )
    if (
        documents.transform not in TRANSFORMS
        or not names
        or not np.isfinite(documents.values).all()
    ):
        raise ValueError
    return documents


def read_baseline(file: str | Path, *, earlier: bool = False) -> Baseline:
    """Read a baseline file.

    Args:
        file: The file.
        earlier: Whether to take one of an earlier version, whose settings are None.

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
    baseline: Baseline = {}
    for run, tasks in data["runs"].items():
        if tasks == {}:
            raise ResultsError(f"{file} expects nothing of {run}: run with --update.")
        for task, entry in _mapping(file, run, tasks).items():
            of, settings = f"{run}, {task}", None
            entry = _mapping(file, of, entry)
            if schema == SCHEMA:
                settings = entry.get("settings", {})
                _mapping(file, f"settings of {of}", settings)
            metrics = _mapping(file, of, entry.get("metrics"))
            if not metrics:
                raise ResultsError(
                    f"{file} expects nothing of {of}: run with --update."
                )
            for metric, record in metrics.items():
                where = f"{of}, {metric}"
                fields = _expected(file, where, _mapping(file, where, record))
                baseline[run, task, metric] = Expectation(
                    **fields, version=entry.get("version"), settings=settings
                )
    if not baseline:
        raise ResultsError(f"{file} expects nothing: make it anew with --update.")
    if schema != SCHEMA and not earlier:
        raise ResultsError(
            f"{file} was made by an earlier version and does not say of how many documents and "
            "shots its scores are: make it anew with --update, which keeps its rules."
        )
    return baseline


def _expected(file: Path, where: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the record of one metric says, as arguments of `Expectation`."""
    score, direction = record.get("score"), record.get("higher_is_better")
    if finite_or_none(score) is None:
        raise ResultsError(f"{file}: the score of {where} is {score!r}, not a number.")
    if direction is not None and not isinstance(direction, bool):
        raise ResultsError(f"{file}: higher_is_better of {where} is {direction!r}.")
    rules = [kind for kind in RULES if kind in record]
    if len(rules) != 1:
        raise ResultsError(
            f"{file}: {where} has {len(rules)} rules: give it one of {', '.join(RULES)}."
        )
    try:
        rule = Rule(rules[0], record[rules[0]])
    except ResultsError as error:
        raise ResultsError(f"{file}: {where}: {error}") from None
    documents = None
    if rule.kind in OF_DOCUMENTS:
        if "documents" not in record:
            raise ResultsError(
                f"{file}: {where} has the rule {rule.kind} but no documents: run with --update."
            )
        try:
            documents = _documents_from_dict(record["documents"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ResultsError(
                f"{file}: the documents of {where} are damaged."
            ) from None
    return {
        "score": finite_or_none(score),
        "higher_is_better": direction,
        "rule": rule,
        "documents": documents,
    }


def _mapping(file: Path, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ResultsError(f"{file}: the entry of {where} is damaged.")
    return value
