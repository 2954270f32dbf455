"""May the candidate be shipped? Each score by the gate's rules, and what would decide it."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.compare.floors import NO_LOSS
from lm_eval_pruned.compare.judge import (
    CLAIM_LEVEL,
    Case,
    Difference,
    claim_text,
    decisions,
    judged as judge,
    mean_of,
    p_of_claim,
    pools_of,
)
from lm_eval_pruned.compare.margins import (
    Margin,
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.compare.power import ALIKE, Pilot, documents_for
from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.files import ResultsError, Run, asked_differently
from lm_eval_pruned.results.groups import is_share, primary_metrics


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    Key = tuple[str, str]
    #: By task and metric, which is empty where it is not known yet: scores, where there are any yet.
    Scores = Mapping[Key, Sequence[float]]

#: By exit code.
ANSWERS = ("ship", "do not ship", "not decided")
_WORDS = {"fail": "worse", "undecided": "undecided", "improved": "better"}
_OF_POOLS = {"undecided": "not decided", "worse": "not shown, and the mean is worse"}


class Judged(NamedTuple):
    """What the gate says of one claim: on one score, or on the mean over several tasks.

    `claim` has a case for each task, none where nothing is claimed. `word` is ``equivalent``, ``not
    worse``, ``better``, ``worse``, ``undecided``, ``not judged`` or `NO_LOSS`; `take` says what would
    decide.
    """

    claim: Sequence[Case]
    row: Difference
    word: str
    message: str = ""
    take: str = ""

    @property
    def sentence(self) -> str:
        """The claim on a mean, whether it is shown, and the difference in points with its 90 % interval."""
        tasks = ", ".join(case.key[0] for case in self.claim)
        ends = (end for end in (self.row.low, self.row.high) if end is not None)
        interval = ", ".join(f"{100 * end:+.1f}" for end in ends)
        return (
            f"{claim_text(self.claim)} ({tasks}): {_OF_POOLS.get(self.word, 'shown')}; the mean "
            f"differs by {100 * self.row.difference:+.1f} points [{interval}]."
        )


class Verdict(NamedTuple):
    """The answer on two runs, with the exit code of `check`.

    The claims of `pooled` decide in place of those of their tasks, unless a task is shown to be worse.
    `open` is what is shown to be worse, or keeps the verdict from being decided; `beside` are scores
    that were compared and not judged, `rows` all differences between the two.
    """

    base: Run
    candidate: Run
    code: int
    judged: Sequence[Judged]
    pooled: Sequence[Judged]
    open: Sequence[Judged]
    beside: Sequence[Judged]
    notes: Sequence[str]
    rows: Sequence[Difference]


def decide(
    base: Run,
    candidate: Run,
    margins: Mapping[str, str] = MappingProxyType({}),
    floors: Sequence[Run] = (),
    *,
    measure: str | None = None,
) -> Verdict:
    """Compare a candidate with its base, each score within its margin, as `read_margins` returns them.

    `measure` is judged of each task that has it; see `judged_keys` for what is judged of others. A
    candidate is shipped if each score is shown to lie within its margin, which needs no
    correction for many scores; it is not if one is shown to be worse, and not to lie within. `floors`
    are runs of models that know nothing: where the base is not shown to be above them, nobody could
    lose anything, and such scores alone decide nothing.

    Raises:
        ValueError: A margin names nothing that was scored, or the runs cannot be compared: of other
            tasks, versions, documents or settings, or without samples.
    """
    base, candidate, *floors = map(with_choice_prob, [base, candidate, *floors])
    keys = [*judged_keys(base, measure, margins)]
    if missing := [" ".join(key) for key in keys if key not in candidate.scores]:
        raise ResultsError(
            f"The candidate {candidate.path} has no {', '.join(missing)}, which the base has: "
            "evaluate it on the same tasks."
        )
    runs = base, candidate
    scores = {key: [run.scores[key].value for run in runs] for key in keys}
    check_margins(margins, scores)
    within = {
        key: Margin(
            "not_worse", _margin_of(key, margins) or usual_margin(base, key, *values)
        )
        for key, values in scores.items()
    }
    # Of this level, intervals beyond the margin are what the gate calls shown.
    compared = compare(
        base,
        [candidate, *floors],
        alpha=2 * CLAIM_LEVEL,
        margins=within,
    )
    _refuse_another_test(base, candidate, keys)
    rows = {(row.task, row.metric): row for row in compared.rows}
    singles = [rows[key] for key in keys]
    # A margin that names a task is a claim on this task alone, and a floor shows no loss.
    pools = pools_of(
        row.case
        for row in singles
        if row.task not in margins and not row.cannot_show_a_loss and row.p is not None
    )
    means = judge([mean_of(pool) for pool in pools], 2 * CLAIM_LEVEL)
    claims, differences = [*([row.case] for row in singles), *pools], [*singles, *means]
    decided = decisions(differences, [CLAIM_LEVEL] * len(differences))
    judged = [*map(_judged, claims, differences, decided)]
    alone, pooled = judged[: len(keys)], judged[len(keys) :]
    counted = [*primary_metrics([base, candidate]), *(k for k in rows if k[1] == KL)]
    beside = [Judged([], rows[k], "not judged") for k in counted if k not in keys]
    in_pools = {case.key for pool in pools for case in pool}
    left = [
        claim
        for claim in [*pooled, *alone]
        if claim.word == "worse"
        or (claim.word == "undecided" and claim.row.case.key not in in_pools)
    ]
    words = {claim.word for claim in left}
    blind = all(row.cannot_show_a_loss for row in singles)
    code = 1 if "worse" in words else 2 if words or blind else 0
    known = compared.notes, compared.rows
    return Verdict(base, candidate, code, alone, pooled, left, beside, *known)


def _judged(
    claim: Sequence[Case], row: Difference, decision: tuple[str, str]
) -> Judged:
    """Return what the gate's decision on a difference says of a claim."""
    status, message = decision
    if not math.isfinite(row.score):
        status, message = "fail", f"The score is {row.score}, not a finite number."
    word = _WORDS.get(status, "")
    if status == "pass":
        size = claim[0].margin_size
        inside = size is not None and all(
            end is not None and abs(end) < size for end in (row.low, row.high)
        )
        word = "equivalent" if inside else "not worse"
        p = p_of_claim(claim) if claim[1:] else 0.0
        if p is None or p >= CLAIM_LEVEL:
            word = "undecided"
            message = f"Shown of the mean, and not of each task (p = {p or 1:.3g})."
    judged = Judged(claim, row, word, message)
    if word != "worse" and row.cannot_show_a_loss:
        # Such a score counts neither for nor against shipping.
        return judged._replace(word=NO_LOSS)
    take = _what_decides(claim, row) if word == "undecided" else ""
    return judged._replace(take=take)


def _what_decides(claim: Sequence[Case], row: Difference) -> str:
    """Say how many documents, in how many minutes, decide with a chance of 80 %, if the models do not differ."""
    base, candidate = claim[0].base, claim[0].run
    up = claim[0].scores[0].higher_is_better
    if None not in (row.low, row.high, up) and (row.high < 0 if up else row.low > 0):  # type: ignore[operator]
        return "A test of only this score would show it to be worse; a test of all scores needs more documents."
    if any(case.pair is None or case.margin_size is None for case in claim):
        # The finding says why nothing was decided.
        return ""
    pilots = [*map(Pilot, claim)]
    seen = sum(pilot.size for pilot in pilots)
    word = "equivalent" if up is None else "not worse"
    needed = documents_for(word, ALIKE, pilots, CLAIM_LEVEL)
    if needed is None:
        return ""
    if needed <= seen:
        return (
            f"{seen} documents would probably have decided if the models did not differ, so they may "
            "well differ: evaluate other documents, or accept a wider margin."
        )
    more = f"It would take about {needed:,} documents instead of {seen:,}"
    more += " of these tasks together" if claim[1:] else ""
    leaves = [leaf for case in claim for leaf in base.leaves(case.key[0])]
    available = sum(base.evaluated[leaf].available for leaf in leaves)
    if available < needed:
        tasks = "the tasks have" if claim[1:] else "the task has"
        return f"{more}, but {tasks} {available:,}: accept a wider margin."
    costs = [run.seconds_per_document(leaves) for run in (base, candidate)]
    minutes = (needed - seen) * sum(map(float, filter(None, costs))) / 60
    return f"{more}, {max(1, round(minutes)):,} min." if all(costs) else f"{more}."


def _refuse_another_test(base: Run, candidate: Run, keys: Iterable[Key]) -> None:
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


def read_margins(texts: Iterable[str]) -> dict[str, str]:
    """Return margins by the task or metric that ``[NAME=]MARGIN`` names, else by an empty text."""
    margins = {name: text for name, _, text in (t.rpartition("=") for t in texts)}
    for text in margins.values():
        Margin("margin", text)
    return margins


def check_margins(margins: Mapping[str, str], scores: Scores) -> None:
    """Raise ValueError for margins that cannot be meant of these scores."""
    names = {
        name for task, metric in scores for name in (task, metric.partition(",")[0])
    }
    # The metrics of a task in Python are known once it has scores.
    all_known = all(metric for _, metric in scores)
    for name in sorted(margins.keys() - names - {""}) if all_known else ():
        raise ValueError(
            f"--margin {name}={margins[name]} names no task or metric of this verdict: it has "
            f"{', '.join(sorted(names))}."
        )
    # So is which of several metrics counts.
    vague = {
        task for (task, m), values in scores.items() if not (values or is_share(m))
    }
    for key, values in scores.items():
        margin = _margin_of(key, margins)
        if margin and key[0] not in vague:
            Margin("margin", margin).check(*key, *values)


def _margin_of(key: Key, margins: Mapping[str, str]) -> str | None:
    names = key[0], key[1].partition(",")[0], ""
    return next((margins[name] for name in names if name in margins), None)
