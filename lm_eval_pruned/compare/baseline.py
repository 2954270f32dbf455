"""The baseline: expected scores with a rule for each, kept in one JSON file.

The file says of how many documents, shots and so on each score is: scores of different tests are
not compared. It holds hashes and scores of documents, never their text.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lm_eval_pruned.compare.margins import CLAIMS, Margin
from lm_eval_pruned.results.documents import TRANSFORMS, Documents, documents_of
from lm_eval_pruned.results.files import MODEL, Run, Score
from lm_eval_pruned.results.metrics import BOUNDS, is_loss
from lm_eval_pruned.results.parts import (
    ResultsError,
    as_mapping,
    direction,
    finite_or_none,
    part,
    read_json,
    reading,
    version,
)
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of the baseline file.
SCHEMA = 3
#: The rule of another measure of the answers that a claim is about.
BESIDE = "beside"
#: Those that an option sets.
OPTIONS = ("absolute", "relative", *CLAIMS)
RULES = (*OPTIONS, BESIDE)
#: Run, task and metric.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Rule:
    """How far a score may fall behind.

    `kind` is one of `RULES`; `value` is the tolerance in the metric's own unit or as a share of the
    expected score, or a margin as `Margin` takes it.
    """

    kind: str
    value: Any

    def __post_init__(self) -> None:
        if not self.margin and not 0 <= float(self.value) < math.inf:
            raise ValueError(
                f"{self.kind}={self.value} is not a number from 0 on: pass one such as 0.05."
            )

    @property
    def margin(self) -> Margin | None:
        """What is claimed by a rule of `CLAIMS`, or would be of another measure."""
        if self.kind not in (*CLAIMS, BESIDE):
            return None
        return Margin("not_worse" if self.kind == BESIDE else self.kind, self.value)

    def check(self, task: str, metric: str, run: Run | None = None) -> None:
        """Raise ValueError for a margin that allows any difference of the metric."""
        if self.margin:
            self.margin.check(task, metric, run)


@dataclass(frozen=True)
class Baseline:
    """Expected scores with versions, settings and documents, and a rule for each.

    `blind` are the scores that cannot show a loss in each run, as `floors.blind_scores` returns them.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    rules: dict[Key, Rule] = field(default_factory=dict)
    blind: dict[str, set[Key]] = field(default_factory=dict)


def write_baseline(file: str | Path, baseline: Baseline) -> None:
    """Write a baseline file whole or not at all; the same baseline gives the same bytes."""
    runs: dict[str, Any] = {}
    for key, rule in baseline.rules.items():
        name, task, metric = key
        run = baseline.runs[name]
        score, known = run.scores[task, metric], run.settings.get(task, {}).items()
        settings = {k: v for k, v in known if v is not None and k not in MODEL}
        about = {"version": run.versions.get(task), "settings": settings, "metrics": {}}
        up: Any = score.higher_is_better
        record = {"score": score.value, "higher_is_better": up, rule.kind: rule.value}
        floor = run.exact_floor(task, metric)
        if rule.margin and floor is not None:
            record["floor"] = floor
        name_of = metric.partition(",")[0]
        declared = as_mapping(run.metadata.get(task, {}).get(BOUNDS)).get(name_of)
        if rule.margin and declared is not None:
            record[BOUNDS] = declared
        if at_floor := sorted(
            member
            for one, other, member in baseline.blind.get(name, ())
            if (one, other) == (task, metric)
        ):
            record["at_floor"] = at_floor
        if rule.margin and (documents := documents_of(run, task, metric)):
            kept = documents if is_loss(metric) else replace(documents, level=())
            record["documents"] = _as_dict(kept)
        runs.setdefault(name, {}).setdefault(task, about)["metrics"][metric] = record
    text = json.dumps({"schema_version": SCHEMA, "runs": runs}, allow_nan=False)
    # The last digits depend on the processor.
    data = json.loads(text, parse_float=lambda number: float(f"{float(number):.10g}"))
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    write_atomically(file, text + "\n")


def read_baseline(file: str | Path) -> Baseline:
    """Read a baseline file; ResultsError if it is none, is damaged, or of another version."""
    file, baseline = Path(file), Baseline()
    if not file.exists():
        raise ResultsError(f"The baseline {file} does not exist: --update makes it.")
    with reading(
        f"The baseline {file} cannot be read",
        f"write another file, which gets schema_version {SCHEMA}, with --update.",
    ):
        data = read_json(file)
        if data["schema_version"] != SCHEMA:
            raise ValueError(f"schema_version is {data['schema_version']}")
        for name, tasks in data["runs"].items():
            scores: dict[tuple[str, str], Score] = {}
            known: dict[str, dict[str, dict[str, Any]]] = {
                task: {"floors": {}, BOUNDS: {}} for task in tasks
            }
            documents: dict[str, dict[str, Documents]] = {task: {} for task in tasks}
            for task, entry in tasks.items():
                for metric, record in entry["metrics"].items():
                    key, up = (
                        (name, task, metric),
                        direction(record["higher_is_better"]),
                    )
                    kinds = [kind for kind in RULES if kind in record]
                    if len(kinds) != 1 or finite_or_none(record["score"]) is None:
                        raise ValueError(f"{key} needs a score and one of {RULES}")
                    rule = baseline.rules[key] = Rule(kinds[0], record[kinds[0]])
                    if not rule.margin and finite_or_none(rule.value) is None:
                        raise ValueError(f"{rule.kind} is {rule.value!r}, not a number")
                    scores[task, metric] = Score(float(record["score"]), None, up, None)
                    name_of = metric.partition(",")[0]
                    if "floor" in record:
                        if finite_or_none(floor := record["floor"]) is None:
                            raise ValueError(f"floor is {floor!r}, not a number")
                        known[task]["floors"][name_of] = floor
                    if BOUNDS in record:
                        known[task][BOUNDS][name_of] = record[BOUNDS]
                    for member in record.get("at_floor", ()):
                        baseline.blind.setdefault(name, set()).add(
                            (task, metric, str(member))
                        )
                    if "documents" in record:
                        of_metric = _from_dict(**record["documents"])
                        documents[task][metric] = of_metric
            baseline.runs[name] = Run(
                "the baseline",
                file,
                scores,
                versions={t: version(item.get("version")) for t, item in tasks.items()},
                settings={t: part(item, "settings") for t, item in tasks.items()},
                metadata=known,
                documents=documents,
            )
            for one, task, metric in baseline.rules:
                if one == name:
                    run = baseline.runs[name]
                    baseline.rules[one, task, metric].check(task, metric, run)
        if not baseline.rules:
            raise ValueError("it expects no scores")
    return baseline


def _as_dict(documents: Documents) -> dict[str, Any]:
    names = [
        f"{task} {digest[:16]} {number}" for task, digest, number in documents.keys
    ]
    table = pd.DataFrame({"values": documents.values}, index=names)
    if (documents.weights != 1).any():
        table["weights"] = documents.weights
    if documents.level:
        table["level"] = documents.level
    if documents.clusters is not None:
        codes, _ = pd.factorize(pd.Series(documents.clusters), sort=True)
        table["clusters"] = codes.astype(str)
    return {"transform": documents.transform, **table.to_dict()}


def _from_dict(transform: str, **columns: Mapping[str, Any]) -> Documents:
    table = pd.DataFrame(columns)
    if transform not in TRANSFORMS or table.empty or table.isna().any(axis=None):
        raise ValueError("documents without scores or a known transform")
    names = (name.rsplit(" ", 2) for name in table.index)
    keys = tuple((task, digest, int(number)) for task, digest, number in names)
    numbers = table.reindex(columns=["values", "weights"], fill_value=1).astype(float)
    clusters = tuple(table["clusters"]) if "clusters" in table else None
    values, weights = numbers.to_numpy().T
    level = tuple(map(str, table["level"])) if "level" in table else ()
    return Documents(keys, values, weights, clusters, transform, level)
