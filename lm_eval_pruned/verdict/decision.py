"""May the candidate be shipped? Each score by the gate's rules, and what would decide it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.compare.judge import Case, Difference
from lm_eval_pruned.compare.kept import NO_LOSS
from lm_eval_pruned.compare.margin import Margin
from lm_eval_pruned.compare.measures import (
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.compare.power import power_of
from lm_eval_pruned.gate.check import CLAIM_LEVEL, decisions
from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    as_mapping,
    read_json,
)
from lm_eval_pruned.results.groups import is_bias, is_share, primary_metrics
from lm_eval_pruned.results.runs import read_unit, results_files
from lm_eval_pruned.results.settings import asked_differently


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Key = tuple[str, str]
#: By exit code.
ANSWERS = ("ship", "do not ship", "not decided")
CLAIM = "not_worse"
_WORDS = {"fail": "worse", "undecided": "undecided", "improved": "better"}


class Judged(NamedTuple):
    """One score: how it differs, and what the gate says of it within a margin.

    `word` is ``equivalent``, ``not worse``, ``better``, ``worse``, ``undecided`` or `NO_LOSS`; `take`
    says what would decide.
    """

    row: Difference
    margin: str
    word: str
    message: str
    take: str


class Verdict(NamedTuple):
    """The answer on two runs, with the exit code of `check`."""

    base: Run
    candidate: Run
    code: int
    judged: Sequence[Judged]
    beside: Sequence[Difference]
    notes: Sequence[str]


def decide(
    base: Run,
    candidate: Run,
    margins: Sequence[str] = (),
    floors: Sequence[Run] = (),
    *,
    measure: str | None = None,
    read: DocumentReader | None = None,
    texts: bool = True,
) -> Verdict:
    """Compare a candidate with its base, each score within its margin, as `read_margins` takes it.

    `measure` is judged of each task that has it; see `judged_keys` for what is judged of others. A
    candidate is shipped if each score is shown to lie within its margin, which needs no
    correction for many scores; it is not if one is shown to be worse, and not to lie within. `floors`
    are runs of models that know nothing: where the base is not shown to be above them, nobody could
    lose anything, and such scores alone decide nothing.

    Raises:
        ValueError: A margin names nothing that was scored, or the runs cannot be compared: of other
            tasks, versions, documents or settings, or without samples.
    """
    read = read or DocumentReader()
    runs = base, candidate, *floors
    base, candidate, *floors = (with_choice_prob(run, read) for run in runs)
    keys = [*judged_keys(base, measure, read_margins(margins))]
    if missing := [" ".join(key) for key in keys if key not in candidate.scores]:
        raise ResultsError(
            f"The candidate {candidate.path} has no {', '.join(missing)}, which the base has: "
            "evaluate it on the same tasks."
        )
    known = judged_scores(base, candidate, measure=measure, margins=margins)
    asked = check_margins(margins, known)
    chosen = {
        key: Margin(
            CLAIM, _asked(key, asked) or usual_margin(base, key, *known[key[0]][key[1]])
        )
        for key in keys
    }
    # Of this level, intervals beyond the margin are what the gate calls shown.
    compared = compare(
        base,
        [candidate, *floors],
        alpha=2 * CLAIM_LEVEL,
        margins=chosen,
        read=read,
        texts=texts,
    )
    _refuse_another_test(base, candidate, keys)
    by_key = {(row.task, row.metric): row for row in compared.rows}
    rows = [by_key[key] for key in keys]
    cases = [Case(base, candidate, key, None, "", margin=chosen[key]) for key in keys]
    levels = [CLAIM_LEVEL] * len(keys)
    judged, statuses = [], []
    for case, row, decision in zip(
        cases, rows, decisions(cases, rows, levels), strict=True
    ):
        status, message = decision
        if not math.isfinite(row.score):
            status, message = "fail", f"The score is {row.score}, not a finite number."
        word = _WORDS.get(status)
        if status == "pass":
            word = "equivalent" if _inside(row, case) else "not worse"
        if status != "fail" and _at_floor(row):
            # Such a score counts neither for nor against shipping.
            status, word = "pass", NO_LOSS
        take = _take(case, row) if status == "undecided" else ""
        judged.append(Judged(row, chosen[case.key].text, str(word), message, take))
        statuses.append(status)
    blind = all(_at_floor(row) for row in rows)
    code = 1 if "fail" in statuses else 2 if "undecided" in statuses or blind else 0
    counted = [*primary_metrics([base, candidate]), *(k for k in by_key if k[1] == KL)]
    beside = [by_key[key] for key in counted if key not in keys]
    return Verdict(base, candidate, code, judged, beside, compared.notes)


def _at_floor(row: Difference) -> bool:
    """Whether nobody could lose anything: the base is not shown to be above the floor."""
    no_bias = not is_bias(row.metric)
    return bool(row.floor and not row.floor.base_above_floor and no_bias)


def _inside(row: Difference, case: Case) -> bool:
    """Whether the interval lies within the margin on both sides."""
    size, ends = case.margin_size, (row.low, row.high)
    return size is not None and all(end is not None and abs(end) < size for end in ends)


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


def check_measure(measure: str | None, metrics: Iterable[str]) -> None:
    """Raise ValueError for a measure that no task of a verdict has; `metrics` are those of all tasks."""
    names = sorted({metric.partition(",")[0] for metric in metrics})
    if measure and names and measure not in names:
        raise ValueError(
            f"--measure {measure} is a metric of no task of this verdict: name one of "
            f"{', '.join(names)}."
        )


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


def judged_scores(
    *runs: Run, measure: str | None = None, margins: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Return the scores of runs by task and metric, of those that a verdict on the first looks at."""
    found: dict[str, dict[str, list[float]]] = {}
    for key in judged_keys(runs[0], measure, read_margins(margins)):
        values = [run.scores[key].value for run in runs]
        found.setdefault(key[0], {})[key[1]] = values
    return found


def _names(key: Key) -> tuple[str, str]:
    return key[0], key[1].partition(",")[0]


def _asked(key: Key, asked: dict[str, str]) -> str | None:
    return next((asked[name] for name in (*_names(key), "") if name in asked), None)


def _take(case: Case, row: Difference) -> str:
    """Say how many documents, in how many minutes, decide with a chance of 80 %, if the models do not differ."""
    base, candidate, key, margin = case.base, case.run, case.key, case.margin
    up = case.scores[0].higher_is_better
    if None not in (row.low, row.high, up) and (row.high < 0 if up else row.low > 0):  # type: ignore[operator]
        return "A test of only this score would show it to be worse; a test of all scores needs more documents."
    if margin is None:
        return ""
    try:
        options: Any = {"metric": key[1], "alpha": CLAIM_LEVEL}
        rows = power_of(base, [candidate], key[0], margin, **options)
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
