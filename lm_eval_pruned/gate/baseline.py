"""The baseline: expected scores with a rule for each, made of results and kept in one JSON file.

The file says of how many documents, shots and so on each score is: scores of different tests are
not compared. It holds hashes and scores of documents, never their text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.compare.pairing import is_partial
from lm_eval_pruned.compare.verdicts import CLAIMS, Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Documents, read_documents
from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    Score,
    finite_or_none,
    read_json,
)
from lm_eval_pruned.results.settings import MODEL
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

#: Version of the baseline file.
SCHEMA = 2
RULES = ("absolute", "relative", "alpha", *CLAIMS)
#: Those that look at single documents.
OF_DOCUMENTS = ("alpha", *CLAIMS)
#: Run, task and metric.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Rule:
    """How far a score may fall behind.

    `kind` is one of `RULES`; `value` is the tolerance in the metric's own unit or as a share of the
    expected score, the level of the test, or a margin as `Margin` takes it.
    """

    kind: str
    value: Any

    def __post_init__(self) -> None:
        most = 1 if self.kind == "alpha" else math.inf
        if not self.margin and not 0 <= float(self.value) < most:
            raise ValueError(
                f"{self.kind}={self.value} is not between 0 and {most}: give 0.05, say."
            )

    @property
    def margin(self) -> Margin | None:
        """What is claimed by a rule of `CLAIMS`."""
        return Margin(self.kind, self.value) if self.kind in CLAIMS else None


@dataclass(frozen=True)
class Baseline:
    """Expected scores with versions and settings, a rule for each, and documents for `OF_DOCUMENTS`."""

    runs: dict[str, Run] = field(default_factory=dict)
    rules: dict[Key, Rule] = field(default_factory=dict)
    documents: dict[Key, Documents] = field(default_factory=dict)


def make_baseline(
    runs: Mapping[str, Run], rule: Rule, previous: Baseline | None = None
) -> Baseline:
    """Make a baseline of results.

    Rules of `previous` stay; `rule` is for metrics that it has none for.

    Raises:
        ResultsError: A score is NaN, infinite or partial, or a rule of `OF_DOCUMENTS` has no samples.
    """
    baseline = Baseline()
    for name, run in runs.items():
        settings = {
            task: {k: v for k, v in known.items() if v is not None and k not in MODEL}
            for task, known in run.settings.items()
        }
        baseline.runs[name] = replace(run, name="the baseline", settings=settings)
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
            kept = previous.rules.get(key, rule) if previous else rule
            baseline.rules[key] = kept
            if kept.kind in OF_DOCUMENTS:
                documents = short_documents(run, task, metric)
                if documents is None:
                    raise ResultsError(f"{run.path}: {no_samples(kept, task, metric)}")
                baseline.documents[key] = documents
    return baseline


def no_samples(rule: Rule, task: str, metric: str) -> str:
    """Return why a rule of `OF_DOCUMENTS` cannot decide where there are no usable samples."""
    return (
        f"The rule {rule.kind} needs logged samples that make up {metric} of {task}, weighted as in "
        "the baseline: evaluate with --log_samples, or use a tolerance for this metric."
    )


def short_documents(run: Run, task: str, metric: str) -> Documents | None:
    """Read documents, with keys and clusters as short as a baseline file holds them."""
    documents = read_documents(run, task, metric)
    if documents is None:
        return None
    clusters = documents.clusters
    if clusters is not None:
        numbers = {name: str(n) for n, name in enumerate(sorted(set(clusters)))}
        clusters = tuple(numbers[name] for name in clusters)
    keys = tuple((task, digest[:16], n) for task, digest, n in documents.keys)
    return replace(documents, keys=keys, clusters=clusters)


def write_baseline(file: str | Path, baseline: Baseline) -> None:
    """Write a baseline file whole or not at all; the same baseline gives the same bytes."""
    runs: dict[str, Any] = {}
    for key, rule in baseline.rules.items():
        name, task, metric = key
        run = baseline.runs[name]
        entry = runs.setdefault(name, {}).setdefault(task, {"metrics": {}})
        if run.versions.get(task) is not None:
            entry["version"] = run.versions[task]
        if run.settings.get(task):
            entry["settings"] = run.settings[task]
        score = run.scores[task, metric]
        entry["metrics"][metric] = record = {
            "score": _stable(score.value),
            "higher_is_better": score.higher_is_better,
            rule.kind: rule.value,
        }
        if key in baseline.documents:
            record["documents"] = _as_dict(baseline.documents[key])
    data = {"schema_version": SCHEMA, "runs": runs}
    text = json.dumps(
        data, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False
    )
    write_atomically(file, text + "\n")


def _stable(value: float) -> float:
    """Return a score with ten digits: the last ones depend on the processor."""
    return float(f"{value:.10g}")


def _as_dict(documents: Documents) -> dict[str, Any]:
    def by_name(values: Iterable[Any]) -> dict[str, Any]:
        names = (f"{task} {digest} {n}" for task, digest, n in documents.keys)
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


def _from_dict(record: Mapping[str, Any]) -> Documents:
    names = list(record["values"])
    weights = record.get("weights") or dict.fromkeys(names, 1)
    clusters = record.get("clusters")
    keys = (name.rsplit(" ", 2) for name in names)
    documents = Documents(
        tuple((task, digest, int(number)) for task, digest, number in keys),
        np.array([float(record["values"][name]) for name in names]),
        np.array([float(weights[name]) for name in names]),
        tuple(str(clusters[name]) for name in names) if clusters else None,
        record["transform"],
    )
    finite = len(names) and np.isfinite(documents.values).all()
    if not finite or documents.transform not in TRANSFORMS:
        raise ValueError("these are no documents")
    return documents


def read_baseline(file: str | Path) -> Baseline:
    """Read a baseline file.

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
    if data.get("schema_version") != SCHEMA:
        raise ResultsError(
            f"{file} is no baseline of schema version {SCHEMA}: make it anew in another file with "
            "--update."
        )
    baseline, where = Baseline(), "runs"
    try:
        for name, tasks in _each(data["runs"]):
            where = name
            scores, versions, settings = {}, {}, {}
            for task, entry in _each(tasks):
                where = f"{name}, {task}"
                versions[task] = entry.get("version")
                settings[task] = dict(entry.get("settings", {}))
                for metric, record in _each(entry["metrics"]):
                    where = f"{name}, {task}, {metric}"
                    key = name, task, metric
                    scores[task, metric], rule = _score_and_rule(record)
                    baseline.rules[key] = rule
                    if rule.kind in OF_DOCUMENTS:
                        baseline.documents[key] = _from_dict(record["documents"])
            run = Run("the baseline", file, scores, versions, settings=settings)
            baseline.runs[name] = run
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ResultsError(
            f"{file}, entry of {where}: {why.rstrip('.')}; mend it, or make the baseline anew in "
            "another file with --update."
        ) from None
    return baseline


def _each(entries: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield entries; without any, a gate would let everything pass."""
    if not entries:
        raise ValueError("expects nothing")
    yield from entries.items()


def _score_and_rule(record: Mapping[str, Any]) -> tuple[Score, Rule]:
    score, direction = finite_or_none(record["score"]), record.get("higher_is_better")
    if score is None or direction not in (True, False, None):
        raise ValueError(f"score {record['score']!r} or higher_is_better {direction!r}")
    rules = [Rule(kind, record[kind]) for kind in RULES if kind in record]
    if len(rules) != 1:
        raise ValueError(f"has {len(rules)} rules, not one of {', '.join(RULES)}")
    return Score(score, None, direction, None), rules[0]
