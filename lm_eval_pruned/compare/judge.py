"""The one judge: how a score differs from that of its base, what is shown of it, and what a gate makes of it.

`compare`, `report` and `study` show its rows; `check` and `verdict` decide by its claims, with one answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.answer import NO_LOSS, REFUTED, SHOWN, answer, word_of
from lm_eval_pruned.compare.cases import (
    Case,
    claim_text,
    guarded,
    mean_of,
    members_of,
    pools_of,
)
from lm_eval_pruned.compare.claims import CLAIM_LEVEL, LEAST_UNITS
from lm_eval_pruned.compare.statistics import false_discovery
from lm_eval_pruned.results.files import finite_or_none
from lm_eval_pruned.results.metrics import is_bias


if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.pairing import Agreement

TOLERANCE = "use a tolerance for this metric."
#: What a claim is about: a score that is judged, the mean over several tasks, a member of a group or a task of
#: several by itself, or another measure of the same answers.
SCORE, MEAN, PART, OTHER = "score", "mean", "part", "other"


@dataclass(frozen=True)
class Shown:
    """Whether a difference is shown to lie within `margin`, in the metric's own unit.

    `p` is that of "the true difference lies outside", `q` the same, adjusted as for differences.
    """

    margin: float
    p: float
    q: float


@dataclass(frozen=True)
class Difference:
    """One row of the table: one run against the base, on one task and metric.

    `difference` is `score` - `base_score` in the metric's own unit, `relative` the same as a share of
    `base_score`; from `low` to `high` is its interval, at the level that the correction leaves where
    there is a `q`. `p` is of the single test, `q` corrected over the tests of its family
    (Benjamini-Hochberg); only the `primary` metric of a task has one. `units` are independent
    documents or clusters, 0 where not known. None means not known. The `case` that was judged is not
    among what files hold.

    The verdict is ``better``, ``worse`` or, where the task does not say which way is up,
    ``different``, where q < alpha; else ``not shown``, which does not mean that there is no
    difference,
    ``not tested``, ``not comparable`` (a score is not finite) or ``restated`` (not primary). With a
    margin it can be ``equivalent`` or ``not worse``, and is ``undecided`` where nothing is shown.
    """

    run: str
    task: str
    metric: str
    base_score: float
    score: float
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    documents: int | None
    method: str
    primary: bool
    verdict: str
    case: Case = field(repr=False, compare=False)
    claim: Shown | None = None
    floor: Standing | None = None
    answers: Agreement | None = None
    units: int = 0

    @property
    def at_floor(self) -> bool:
        """Whether the run is not shown to be above the floor; False where that was not tested."""
        return self.floor is not None and self.floor.above_floor is False

    @property
    def cannot_show_a_loss(self) -> bool:
        """Whether nobody could lose anything: the base is not shown to be above the floor."""
        known = self.floor is not None and self.floor.base_above_floor is False
        return known and not is_bias(self.metric)

    @property
    def said(self) -> str:
        """The verdict, and that the run is at the floor where it is."""
        return f"{self.verdict} (at floor)" if self.at_floor else self.verdict


def judged(cases: Sequence[Case], alpha: float = 0.05) -> list[Difference]:
    """Test each case, correct the tests of each family, and say what they show at level `alpha`."""
    families = [case.family for case in cases]
    ps = [case.test.p if case.primary else None for case in cases]
    outside = [case.p_outside() if case.primary else None for case in cases]
    corrected = (
        false_discovery(ps, families, alpha),
        outside,
        false_discovery(outside, families),
    )
    rows = []
    for case, (q, level), p, (q_margin, _) in zip(cases, *corrected, strict=True):
        claim = None
        if p is not None and q_margin is not None:
            claim = Shown(case.margin_size or 0.0, p, q_margin)
        before, after = (score.value for score in case.scores)
        change, test = after - before, case.test
        low, high = test.interval(level or alpha)
        row = Difference(
            case.run.name,
            case.task,
            case.key[1],
            base_score=before,
            score=after,
            difference=change,
            relative=finite_or_none(change / abs(before)) if before else None,
            low=low,
            high=high,
            p=test.p,
            q=q,
            documents=len(case.pair[0].keys) if case.pair else None,
            method=test.method,
            primary=case.primary,
            verdict=_word(case, change, q, claim, alpha),
            case=case,
            claim=claim,
            units=test.units,
        )
        rows.append(row)
    return rows


def _word(
    case: Case, change: float, q: float | None, claim: Shown | None, alpha: float
) -> str:
    """Return the word of `answer.WORDS` for a row of a table whose p values are corrected."""
    if not math.isfinite(change):
        return "not comparable"
    if not case.primary:
        return "restated"
    shown = claim is not None and claim.q < alpha
    differs = q is not None and q < alpha
    return word_of(
        case.up,
        claimed=case.margin.verdict if case.margin else "",
        shown=shown,
        within=shown and case.margin is not None and case.margin.claim == "equivalent",
        worse=differs and (change > 0) != case.up,
        better=differs and (change > 0) == case.up,
        tested=q is not None,
    )


@dataclass(frozen=True, eq=False)
class Claim:
    """A claim of a verdict or a gate, and what is shown of it.

    `cases` are those that it is made on, several for a mean; `row` is the difference with its interval of
    90 %, `about` one of `SCORE`, `MEAN`, `PART` and `OTHER`, `word` one of `answer.WORDS`. Shipping takes
    the claim where it `is_taken`. `p` is that of "the claim is wrong", `q` that of "no loss", corrected for
    all that were tested beside it. `fell` says whether a loss is shown, however small.
    """

    cases: Sequence[Case]
    row: Difference
    about: str
    word: str
    is_taken: bool
    p: float | None
    q: float | None
    fell: bool

    @property
    def name(self) -> str:
        """The task and the metric, and the group of a member."""
        case = self.row.case
        group = f"{case.key[0]}: " if case.member else ""
        return f"{group}{self.row.task} {self.row.metric.removesuffix(',none')}"

    @property
    def sentence(self) -> str:
        """The claim on a mean, what is shown of it, and the difference in points with its 90 % interval."""
        tasks = ", ".join(case.key[0] for case in self.cases)
        ends = (end for end in (self.row.low, self.row.high) if end is not None)
        interval = ", ".join(f"{100 * end:+.1f}" for end in ends)
        return (
            f"{claim_text(self.cases)} ({tasks}): {self.word}; the mean differs by "
            f"{100 * self.row.difference:+.1f} points [{interval}]."
        )

    @property
    def message(self) -> str:
        """What is shown and by which p, or why nothing is."""
        case, row = self.row.case, self.row
        margin, test = case.margin, case.test
        if self.word == "not comparable":
            return f"The score is {row.score}, not a finite number."
        if self.word in ("worse", "different"):
            change = f"Significantly {self.word} by {abs(row.difference):.6g}"
            if self.about in (SCORE, MEAN) or margin is None:
                return f"{change} ({_p('q', self.q)} < {CLAIM_LEVEL:g})."
            beyond = f"by more than {margin.text} for certain"
            return f"{change}, {beyond} ({_p('p', case.p_inside)} < {CLAIM_LEVEL:g})."
        if self.word == NO_LOSS:
            return "The base is not shown to be above its floor, so nobody could lose anything."
        if margin is None or self.word == "not judged":
            return ""
        claimed = f"{margin.verdict} within {margin.text}"
        if self.word in SHOWN and _is_shown(self.p):
            return f"Shown to be {claimed} ({_p('p', self.p)})."
        if self.word in SHOWN:
            return "Shown to be better."
        if case.margin_size is None:
            return margin.misfit(case.key[0])
        if test.units_missing:
            return (
                f"A margin of a score without limits takes {test.units_missing} more independent documents "
                f"than the {row.units} that were evaluated."
            )
        if self.p is None:
            return (
                f"{row.units} independent documents are too few to decide, which takes at least "
                f"{LEAST_UNITS}: {TOLERANCE}"
            )
        return (
            f"Not decided whether {claimed} ({_p('p', self.p)} >= {CLAIM_LEVEL:g}) or worse: "
            "`lm-eval-pruned power` estimates how many documents would decide."
        )


def _p(name: str, value: float | None) -> str:
    return f"{name} = {value:.3g}" if value is not None else f"no {name}"


def claims_on(
    cases: Sequence[Case],
    others: Sequence[Case] = (),
    blind: Collection[tuple[str, str, str]] = (),
    alone: Collection[str] = (),
) -> list[Claim]:
    """Test all claims that a verdict or a gate makes of one run.

    These are the claims of `cases`; those on the mean of several tasks of one measure and margin, which
    stand for the claims of their tasks; with a wider margin, those of each such task and of each member of
    a group; and `others`, further measures of the same answers, of which only a loss beyond the wider
    margin counts. `blind` are scores, as (task, metric, member), whose base is not shown to be above its
    floor. Tasks that are named in `alone` are part of no mean.
    """

    def is_blind(case: Case) -> bool:
        return (*case.key, case.member) in blind

    alike = [c for c in cases if c.key[0] not in alone and c.test.p is not None]
    pools = pools_of(case for case in alike if not is_blind(case))
    pooled = {case.key for pool in pools for case in pool}
    claims = []
    rows = _rows([*cases, *map(mean_of, pools)])
    worse = _corrected([p_worse(row.case) for row in rows])
    better = _corrected([p_worse(row.case, rather=False) for row in rows])
    made_on = [*([case] for case in cases), *pools]
    for row, on, q, up in zip(rows, made_on, worse, better, strict=True):
        about, case = MEAN if on[1:] else SCORE, row.case
        p, fell = case.p_outside(), _is_shown(q)
        # Of few documents without limits, a gain is shown no more than a claim.
        word = _claim_word(row, p, fell=fell, rose=_is_shown(up) and p is not None)
        if is_blind(case) and word not in REFUTED:
            word = NO_LOSS
        is_taken = word != NO_LOSS and (about == MEAN or case.key not in pooled)
        claims.append(Claim(on, row, about, word, is_taken, p, q, fell))
    parts = [guarded(case) for pool in pools for case in pool]
    for case in cases:
        parts += [] if is_blind(case) else members_of(case)
    for claim in _on_guards(PART, parts):
        if is_blind(claim.row.case) and claim.word not in REFUTED:
            claim = replace(claim, word=NO_LOSS, is_taken=False)
        claims.append(claim)
    for claim in _on_guards(OTHER, [*map(guarded, others)]):
        word = claim.word if claim.word in REFUTED else "not judged"
        claims.append(replace(claim, word=word, is_taken=False))
    return claims


def _on_guards(about: str, cases: Sequence[Case]) -> list[Claim]:
    """Return claims with the wider margin, which a loss beyond it refutes."""
    rows, claims = _rows(cases), []
    fallen = _corrected([p_worse(row.case) for row in rows])
    for row, q in zip(rows, fallen, strict=True):
        p = row.case.p_outside()
        word = _claim_word(row, p, fell=_is_shown(row.case.p_inside), rose=False)
        claims.append(Claim([row.case], row, about, word, True, p, q, _is_shown(q)))
    return claims


def _is_shown(p: float | None) -> bool:
    return p is not None and p < CLAIM_LEVEL


def answer_of(claims: Sequence[Claim], changed: Sequence[str] = ()) -> str:
    """Return the answer on all claims of a run.

    `changed` are settings that change its answers, whatever the weights, as `answers_changed_by` returns
    them: where there are any, nothing is shown.
    """
    words = [(claim.word, claim.is_taken) for claim in claims]
    return answer([*words, *(("asked otherwise", True) for _ in changed)])


def _rows(cases: Sequence[Case]) -> list[Difference]:
    """Return differences with intervals of 90 %, those that the claims of one side correspond to."""
    return judged([replace(c, family=n) for n, c in enumerate(cases)], 2 * CLAIM_LEVEL)


def p_worse(case: Case, *, rather: bool = True) -> float | None:
    """Return the p of "not worse"; of "no difference" where neither way is better.

    Of "not better" unless `rather`. None where nothing is tested.
    """
    if case.test.units < LEAST_UNITS or (case.up is None and not rather):
        return None
    if case.up is None:
        return case.test.p
    return case.test.p_beyond(0.0, -1 if rather == case.up else 1)


def _corrected(ps: Sequence[float | None]) -> list[float | None]:
    return [q for q, _ in false_discovery(ps)]


def _claim_word(row: Difference, p: float | None, *, fell: bool, rose: bool) -> str:
    case = row.case
    if not math.isfinite(row.difference):
        return "not comparable"
    shown = _is_shown(p)
    return word_of(
        case.up,
        claimed=case.margin.verdict if case.margin else "",
        shown=shown,
        within=shown and _is_shown(case.p_outside(both=True)),
        worse=fell,
        better=rose,
    )
