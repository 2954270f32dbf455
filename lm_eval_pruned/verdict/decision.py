"""May the candidate be shipped? Each score by the gate's rules, and what would decide it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import Difference, compare
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.compare.power import power_of
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.gate.baseline import Baseline, Rule
from lm_eval_pruned.gate.check import CLAIM_LEVEL, check, make_baseline
from lm_eval_pruned.gate.findings import ONLY_RUN, Finding, exit_code
from lm_eval_pruned.results.files import ResultsError, Run, newest_first, read_json
from lm_eval_pruned.results.folder import read_unit
from lm_eval_pruned.results.groups import is_perplexity, is_share, primary_metrics
from lm_eval_pruned.verdict.agreement import Agreement, agreement_on


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Key = tuple[str, str]
#: By exit code.
ANSWERS = ("ship", "do not ship", "not decided")
CLAIM = "not_worse"
#: Metrics that say which way a model is biased, whose tasks may list others first.
BIAS = ("bias", "pct_stereotype")
#: Where the score says nothing of bias, beside which the metrics of `BIAS` do.
NO_BIAS = "likelihood_diff"


@dataclass(frozen=True)
class Need:
    """How many documents decide a score with a chance of 80 %, if the models do not differ.

    `documents` is None where no number does, `there_are` how many the task has, and `seconds`
    what both models took for one.
    """

    documents: int | None
    there_are: int | None
    seconds: float | None


@dataclass(frozen=True)
class Judged:
    """One score: how it differs, what the gate finds, and in one word what that means.

    The word is ``equivalent``, ``not worse``, ``better``, ``worse`` or ``undecided``.
    """

    row: Difference
    margin: str
    word: str
    finding: Finding
    floor: float | None = None
    need: Need | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer on two runs, of which every score is one of `judged`."""

    base: Run
    candidate: Run
    code: int
    judged: Sequence[Judged]
    agreements: Mapping[str, Agreement] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def answer(self) -> str:
        """One of `ANSWERS`."""
        return ANSWERS[self.code]


def decide(base: Run, candidate: Run, margins: Sequence[str] = ()) -> Verdict:
    """Hold a candidate against its base, each score within its margin.

    A candidate is shipped only if every score is shown to lie within its margin, so that no
    correction for many scores is needed; it is not if one is shown to be worse, and not within.

    Args:
        base: Results of the model that is served today.
        candidate: Results of the one that may replace it.
        margins: As `read_margins` takes them.

    Raises:
        ValueError: A margin cannot be read, or names nothing that was scored.
        ResultsError: The runs cannot be compared.
    """
    asked, read = read_margins(margins), DocumentReader()
    alpha = 2 * CLAIM_LEVEL
    compared = compare(base, [candidate], alpha=alpha, read=read)
    rows = {(each.task, each.metric): each for each in compared.rows}
    keys = [*_judged_keys(base)]
    if missing := [" ".join(key) for key in keys if key not in rows]:
        raise ResultsError(
            f"The candidate {candidate.path} has no {', '.join(missing)}, which the base has: "
            "evaluate it on the same tasks."
        )
    known = {name for key in keys for name in (key[0], key[1].partition(",")[0], None)}
    if unknown := [name for name, _ in asked if name not in known]:
        raise ValueError(
            f"--margin {unknown[0]}=... names no task or metric of this verdict: it has "
            f"{', '.join(sorted(filter(None, known)))}."
        )
    by_key = {key: _margin_of(rows[key], asked) for key in keys}
    rules = {(ONLY_RUN, *key): Rule(CLAIM, by_key[key]) for key in keys}
    any_rule = next(iter(rules.values()))
    expected = make_baseline(
        {ONLY_RUN: _only(base, keys)}, any_rule, Baseline({}, rules)
    )
    findings = check({ONLY_RUN: _only(candidate, keys)}, expected)
    judged = []
    for finding in findings:
        key = finding.task, finding.metric
        word = _word(finding, rows[key], Margin(CLAIM, by_key[key]))
        need = None
        if word == "undecided":
            need = _need(_only(base, [key]), _only(candidate, [key]), key, by_key[key])
        floor = floor_of(base, *key, read)
        judged.append(Judged(rows[key], by_key[key], word, finding, floor, need))
    found = {task: agreement_on(base, candidate, task) for task in base.tasks()}
    agreements = {task: each for task, each in found.items() if each}
    code = exit_code(findings)
    return Verdict(base, candidate, code, judged, agreements, compared.notes)


def read_margins(texts: Sequence[str]) -> list[tuple[str | None, str]]:
    """Return the name, a task or metric or None, and the margin of each ``[NAME=]MARGIN``."""
    found = []
    for text in texts:
        name, _, margin = text.rpartition("=")
        Margin("margin", margin)
        found.append((name or None, margin))
    return found


def floor_of(run: Run, task: str, metric: str, read: DocumentReader) -> float | None:
    """Return the highest score without knowledge: by chance, or of the commonest answer."""
    documents = read(run, task, metric)
    levels = documents and (documents.levels.chance, documents.levels.majority)
    return max((each for each in levels or () if each is not None), default=None)


def _judged_keys(base: Run) -> Iterator[Key]:
    for task, primary in primary_metrics([base]):
        metrics = [metric for name, metric in base.scores if name == task]
        found = [m for m in metrics if m.partition(",")[0] in BIAS and m != primary]
        if not (found and primary.startswith(NO_BIAS)):
            found.insert(0, primary)
        yield from ((task, metric) for metric in found)


def _margin_of(row: Difference, asked: Sequence[tuple[str | None, str]]) -> str:
    """Return the margin of a score: the last for its task, else for its metric, else for all."""
    for name in (row.task, row.metric.partition(",")[0], None):
        if own := [margin for of, margin in asked if of == name]:
            return own[-1]
    scores = (row.base_score, row.score)
    if "bits_per_byte" in row.metric:
        return "1%"
    shares = not is_perplexity(row.metric) and is_share(row.metric, scores)
    return "2pt" if shares else "2%"


def _only(run: Run, keys: Sequence[Key]) -> Run:
    """Return a run with these scores alone, and whatever width the model has."""
    settings = {t: {**of, "widths": None} for t, of in run.settings.items()}
    return replace(run, scores={k: run.scores[k] for k in keys}, settings=settings)


def _word(finding: Finding, row: Difference, margin: Margin) -> str:
    words = {"fail": "worse", "undecided": "undecided", "improved": "better"}
    if finding.status != "pass":
        return words[finding.status]
    size = margin.size(row.base_score, row.score) or 0.0
    both = None not in (row.low, row.high)
    inside = both and -size < row.low and row.high < size  # type: ignore[operator]
    return "equivalent" if inside else "not worse"


def _need(base: Run, candidate: Run, key: Key, margin: str) -> Need:
    task, _ = key
    both = base.scores[key].higher_is_better is None
    try:
        found = power_of(
            base, [candidate], task, Margin(CLAIM, margin), alpha=CLAIM_LEVEL
        )
        documents: Any = found[0 if both else 1][-1]
    except ValueError:
        # No chance can be given; the finding says why nothing was decided.
        documents = None
    costs = [_costs(run, task) for run in (base, candidate)]
    seconds = [each for _, each in costs if each is not None]
    return Need(documents, costs[0][0], sum(seconds) if len(seconds) == 2 else None)


def _costs(run: Run, task: str) -> tuple[int | None, float | None]:
    """Return how many documents there are of a task, and the seconds that one took."""
    leaves = run.leaves(task)
    files = newest_first(run.path) if run.path.is_dir() else [run.path]
    for file in files:
        data = read_json(file)
        sizes = data.get("n-samples") or {}
        if not all(leaf in sizes for leaf in leaves):
            continue
        unit = read_unit(file.parent)
        spent = unit.seconds if unit else data.get("total_evaluation_time_seconds")
        seen = sum(each["effective"] for each in sizes.values())
        seconds = float(spent) / seen if spent and seen else math.nan
        there = sum(sizes[leaf]["original"] for leaf in leaves)
        return there, seconds if math.isfinite(seconds) else None
    return None, None
