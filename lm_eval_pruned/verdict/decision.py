"""May the candidate be shipped? Each score by the gate's rules, and what would decide it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.compare.floors import NO_LOSS
from lm_eval_pruned.compare.judge import (
    CLAIM_LEVEL,
    Case,
    Difference,
    decisions,
    judged as judge,
)
from lm_eval_pruned.compare.margins import (
    Margin,
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.compare.pairing import DocumentReader, paired_documents
from lm_eval_pruned.compare.pooled import claim_text, mean_of, p_of_claim, pools_of
from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.groups import is_bias, is_share, primary_metrics
from lm_eval_pruned.results.settings import asked_differently
from lm_eval_pruned.verdict.needed import what_decides


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


class Pooled(NamedTuple):
    """One claim on the mean over `keys`, tasks and metrics, and how it was judged.

    `text` is the claim: how far the score falls on average and in each task.
    """

    keys: Sequence[Key]
    judged: Judged
    text: str

    @property
    def sentence(self) -> str:
        """The claim, whether it is shown, and the mean difference in points with its 90 % interval."""
        row, tasks = self.judged.row, ", ".join(task for task, _ in self.keys)
        shown = {
            "undecided": "not decided",
            "worse": "not shown, and the mean is worse",
        }
        ends = (end for end in (row.low, row.high) if end is not None)
        interval = ", ".join(f"{100 * end:+.1f}" for end in ends)
        return (
            f"{self.text} ({tasks}): {shown.get(self.judged.word, 'shown')}; the mean differs by "
            f"{100 * row.difference:+.1f} points [{interval}]."
        )


class Verdict(NamedTuple):
    """The answer on two runs, with the exit code of `check`.

    The claims of `pooled` decide in place of those of their tasks, unless a task is shown to be worse.
    """

    base: Run
    candidate: Run
    code: int
    judged: Sequence[Judged]
    beside: Sequence[Difference]
    notes: Sequence[str]
    pooled: Sequence[Pooled] = ()

    @property
    def open(self) -> list[Judged]:
        """What is shown to be worse, or keeps the verdict from being decided."""
        held = {key for each in self.pooled for key in each.keys}
        return [
            each
            for each in [*(pool.judged for pool in self.pooled), *self.judged]
            if each.word == "worse"
            or (
                each.word == "undecided"
                and (each.row.task, each.row.metric) not in held
            )
        ]


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
    cases = [
        Case(
            *(base, candidate, key, paired_documents(base, candidate, *key, read)),
            *("", True, chosen[key]),
        )
        for key in keys
    ]
    # A margin that names a task is a claim on this task alone, and a floor shows no loss.
    pools = pools_of(
        case
        for case, row in zip(cases, rows, strict=True)
        if case.key[0] not in asked and not _at_floor(row) and row.p is not None
    )
    means = [mean_of(pool) for pool in pools]
    found = _judged(
        [*([case] for case in cases), *pools],
        [*cases, *(mean._replace(family="") for mean in means)],
        [*rows, *judge(means, 2 * CLAIM_LEVEL)],
    )
    alone, together = found[: len(cases)], found[len(cases) :]
    pooled = [
        Pooled([case.key for case in pool], each, claim_text(pool))
        for pool, each in zip(pools, together, strict=True)
    ]
    blind = all(_at_floor(row) for row in rows)
    counted = [*primary_metrics([base, candidate]), *(k for k in by_key if k[1] == KL)]
    beside = [by_key[key] for key in counted if key not in keys]
    verdict = Verdict(base, candidate, 0, alone, beside, compared.notes, pooled)
    words = {each.word for each in verdict.open}
    code = 1 if "worse" in words else 2 if words or blind else 0
    return verdict._replace(code=code)


def _judged(
    claims: Sequence[Sequence[Case]], cases: Sequence[Case], rows: Sequence[Difference]
) -> list[Judged]:
    """Return what the gate says of `cases`, of which a claim may be made up of several."""
    found = []
    told = decisions(cases, rows, [CLAIM_LEVEL] * len(cases))
    for claim, case, row, (status, message) in zip(
        claims, cases, rows, told, strict=True
    ):
        if not math.isfinite(row.score):
            status, message = "fail", f"The score is {row.score}, not a finite number."
        word = _WORDS.get(status)
        if status == "pass":
            word = "equivalent" if _inside(row, case) else "not worse"
            p = p_of_claim(claim) if claim[1:] else 0.0
            if p is None or p >= CLAIM_LEVEL:
                status = word = "undecided"
                message = f"Shown of the mean, and not of each task (p = {p or 1:.3g})."
        if status != "fail" and _at_floor(row):
            # Such a score counts neither for nor against shipping.
            status, word = "pass", NO_LOSS
        take = what_decides(claim, row) if status == "undecided" else ""
        margin = case.margin.text if case.margin else ""
        found.append(Judged(row, margin, str(word), message, take))
    return found


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
