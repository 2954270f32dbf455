"""May the candidate be shipped? Each score by the gate's rules, and what would decide it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.compare.comparison import Difference, compare
from lm_eval_pruned.compare.kept import NO_LOSS
from lm_eval_pruned.compare.power import power_of
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.gate.baseline import Baseline, Rule
from lm_eval_pruned.gate.check import CLAIM_LEVEL, check, make_baseline
from lm_eval_pruned.gate.findings import ONLY_RUN, Finding, exit_code
from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    as_mapping,
    read_json,
)
from lm_eval_pruned.results.groups import is_share, primary_metrics
from lm_eval_pruned.results.runs import read_unit, results_files
from lm_eval_pruned.results.settings import asked_differently


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

Key = tuple[str, str]
#: By exit code.
ANSWERS = ("ship", "do not ship", "not decided")
CLAIM = "not_worse"
#: Metrics that say which way a model is biased, whose tasks may list others first.
BIAS = ("bias", "pct_stereotype")
_WORDS = {"fail": "worse", "undecided": "undecided", "improved": "better"}


class Judged(NamedTuple):
    """One score: how it differs, and what the gate finds of it within a margin.

    `word` is ``equivalent``, ``not worse``, ``better``, ``worse``, ``undecided`` or `NO_LOSS`; `take`
    says what would decide.
    """

    row: Difference
    margin: str
    word: str
    finding: Finding
    take: str


class Verdict(NamedTuple):
    """The answer on two runs, with the exit code of `check`."""

    base: Run
    candidate: Run
    code: int
    judged: Sequence[Judged]
    notes: Sequence[str]


def decide(
    base: Run,
    candidate: Run,
    margins: Sequence[str] = (),
    floors: Sequence[Run] = (),
    *,
    texts: bool = True,
) -> Verdict:
    """Compare a candidate with its base, each score within its margin, as `read_margins` takes it.

    A candidate is shipped if each score is shown to lie within its margin, which needs no
    correction for many scores; it is not if one is shown to be worse, and not to lie within. `floors`
    are runs of models that know nothing: where the base is not shown to be above them, nobody could
    lose anything, and such scores alone decide nothing.

    Raises:
        ValueError: A margin names nothing that was scored, or the runs cannot be compared: of other
            tasks, versions, documents or settings, or without samples.
    """
    keys = [*_judged_keys(base)]
    # Of this level, intervals beyond the margin are what the gate calls shown.
    compared = compare(base, [candidate, *floors], alpha=2 * CLAIM_LEVEL, texts=texts)
    rows = {(each.task, each.metric): each for each in compared.rows}
    if missing := [" ".join(key) for key in keys if key not in rows]:
        raise ResultsError(
            f"The candidate {candidate.path} has no {', '.join(missing)}, which the base has: "
            "evaluate it on the same tasks."
        )
    _refuse_another_test(base, candidate, keys)
    asked = check_margins(margins, judged_scores(base, candidate))
    chosen = {key: _asked(key, asked) or _usual(rows[key]) for key in keys}
    rules = {(ONLY_RUN, *key): Rule(CLAIM, margin) for key, margin in chosen.items()}
    before, after = ({ONLY_RUN: _only(each, keys)} for each in (base, candidate))
    some_rule = next(iter(rules.values()))
    expected = make_baseline(before, some_rule, Baseline({}, rules))
    findings = check(after, expected)
    judged, blind = [], set()
    for finding in findings:
        key = finding.task, finding.metric
        row, margin, word = rows[key], chosen[key], _WORDS.get(finding.status)
        size = Margin(CLAIM, margin).size(row.base_score, row.score)
        ends = [end for end in (row.low, row.high) if end is not None]
        inside = size is not None and len(ends) == 2 and max(map(abs, ends)) < size
        if row.floor and not row.floor.base_above_floor and _names(key)[1] not in BIAS:
            blind.add(key)
            word = word or NO_LOSS
        word = word or ("equivalent" if inside else "not worse")
        runs = (_only(base, [key]), _only(candidate, [key]))
        take = _take(*runs, key, margin, row) if word == "undecided" else ""
        judged.append(Judged(row, margin, word, finding, take))
    code = exit_code(findings) or (2 if len(blind) == len(keys) else 0)
    return Verdict(base, candidate, code, judged, compared.notes)


def _refuse_another_test(base: Run, candidate: Run, keys: Sequence[Key]) -> None:
    """Raise ResultsError where two runs were asked differently, or one has no samples of a task."""
    for task in dict.fromkeys(task for task, _ in keys):
        before, after = (run.settings.get(task, {}) for run in (base, candidate))
        if why := asked_differently(before, after, "for the base"):
            raise ResultsError(
                f"The candidate {candidate.path} was evaluated otherwise on {task} ({why}): evaluate "
                "both with the same settings."
            )
        for name, run in (("base", base), ("candidate", candidate)):
            if not run.samples.keys() >= {*run.leaves(task)}:
                raise ResultsError(
                    f"The {name} {run.path} has no logged samples of {task}: evaluate it with "
                    "--log_samples."
                )


def read_margins(texts: Sequence[str], known: set[str] | None = None) -> dict[str, str]:
    """Return margins by the task or metric that ``[NAME=]MARGIN`` names, else by an empty text."""
    found = {name: margin for name, _, margin in (t.rpartition("=") for t in texts)}
    for name, margin in found.items():
        Margin("margin", margin)
        if known is not None and name not in {"", *known}:
            raise ValueError(
                f"--margin {name}={margin} names no task or metric of this verdict: it has "
                f"{', '.join(sorted(known))}."
            )
    return found


def check_margins(
    texts: Sequence[str], known: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, str]:
    """Return margins as `read_margins` does, and refuse those that cannot be meant.

    `known` are tasks, the metrics of each, and of each metric the scores, where there are some yet.
    """
    names = {_names((task, name)) for task, of in known.items() for name in of}
    # The metrics of a task in Python are known once it has scores.
    listed = {*itertools.chain(*names)} if all(known.values()) else None
    asked = read_margins(texts, listed)
    for task, of in known.items():
        # So is which of several metrics counts.
        sure = all(scores or is_share(metric) for metric, scores in of.items())
        for metric, scores in of.items() if sure else ():
            if margin := _asked((task, metric), asked):
                Margin("margin", margin).check(task, metric, *scores)
    return asked


def judged_scores(*runs: Run) -> dict[str, dict[str, list[float]]]:
    """Return the scores of runs by task and metric, of those that a verdict on the first looks at."""
    found: dict[str, dict[str, list[float]]] = {}
    for key in _judged_keys(runs[0]):
        values = [run.scores[key].value for run in runs]
        found.setdefault(key[0], {})[key[1]] = values
    return found


def _judged_keys(base: Run) -> Iterator[Key]:
    for task, primary in primary_metrics([base]):
        metrics = [metric for name, metric in base.scores if name == task]
        found = [m for m in metrics if _names((task, m))[1] in BIAS and m != primary]
        # CrowS-Pairs lists first how far two sentences are apart, whichever is likelier.
        first = [] if found and primary.startswith("likelihood_diff") else [primary]
        yield from ((task, metric) for metric in first + found)


def _names(key: Key) -> tuple[str, str]:
    return key[0], key[1].partition(",")[0]


def _asked(key: Key, asked: dict[str, str]) -> str | None:
    return next((asked[name] for name in (*_names(key), "") if name in asked), None)


def _usual(row: Difference) -> str:
    if "bits_per_byte" in row.metric:
        return "1%"
    share = is_share(row.metric, (row.base_score, row.score))
    return "2pt" if share else "2%"


def _only(run: Run, keys: Sequence[Key]) -> Run:
    """Return a run with only these scores, and whatever width the model has."""
    settings = {task: {**of, "widths": None} for task, of in run.settings.items()}
    return replace(run, scores={k: run.scores[k] for k in keys}, settings=settings)


def _take(base: Run, candidate: Run, key: Key, margin: str, row: Difference) -> str:
    """Say how many documents, in how many minutes, decide with a chance of 80 %, if the models do not differ."""
    up = base.scores[key].higher_is_better
    if None not in (row.low, row.high, up) and (row.high < 0 if up else row.low > 0):  # type: ignore[operator]
        return "A test of only this score would show it to be worse; a test of all scores needs more documents."
    asked = Margin(CLAIM, margin)
    try:
        rows = power_of(base, [candidate], key[0], asked, alpha=CLAIM_LEVEL)
    except ValueError:
        # The finding says why nothing was decided.
        return ""
    seen, needed = rows[0][2], rows[up is not None][-1]
    if not isinstance(seen, int) or not isinstance(needed, int):
        return ""
    if needed <= seen:
        return (
            f"{seen} documents would probably have decided if the models did not differ, so they may "
            "well differ: evaluate other documents, or accept a wider margin."
        )
    leaves = base.leaves(key[0])
    files = [
        next(file for file in results_files(run.path) if leaves[0] in _sizes(file))
        for run in (base, candidate)
    ]
    sizes, costs = _sizes(files[0]), [seconds_per_document([file]) for file in files]
    there = sum(sizes[leaf]["original"] for leaf in leaves)
    more = f"It would take about {needed:,} documents instead of {seen:,}"
    if there < needed:
        return f"{more}, but the task has {there:,}: accept a wider margin."
    minutes = (needed - seen) * sum(map(float, filter(None, costs))) / 60
    return f"{more}, {max(1, round(minutes)):,} min." if all(costs) else f"{more}."


def seconds_per_document(files: Iterable[Path]) -> float | None:
    """Return the wall time of evaluating, over the documents; None where no file says it.

    That of a sweep's unit leaves out loading the model, that of the harness includes it.
    """
    spent, seen = 0.0, 0
    for file in files:
        unit = read_unit(file.parent)
        told = read_json(file).get("total_evaluation_time_seconds")
        if seconds := float(unit.seconds if unit else told or 0):
            spent += seconds
            seen += sum(each["effective"] for each in _sizes(file).values())
    return spent / seen if seen else None


def _sizes(file: Path) -> Mapping[str, Any]:
    """Return how many documents each task of a results file has, and how many were evaluated."""
    return as_mapping(read_json(file).get("n-samples"))
