"""The one judge: how a score differs from that of its base, and what is shown of it.

`compare`, `report`, `study`, `check` and `verdict` show and decide by its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.compare.floors import kept_sides
from lm_eval_pruned.compare.pairing import grouping, paired_test
from lm_eval_pruned.compare.statistics import (
    LEAST_UNITS,
    LEAST_UNITS_OF_MARGIN,
    PairedTest,
    false_discovery,
    unpaired_difference,
)
from lm_eval_pruned.results.files import finite_or_none
from lm_eval_pruned.results.groups import is_bias


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.margins import Margin
    from lm_eval_pruned.compare.pairing import Agreement, Pair
    from lm_eval_pruned.results.files import Run, Score

#: A status of `check.STATUSES`, and a sentence.
Decision = tuple[str, str]
#: Level of the tests behind a claim with a margin.
CLAIM_LEVEL = 0.05
IMPROVED = (
    "improved",
    "Better than the baseline; to expect this from now on, run with --update.",
)
TOLERANCE = "use a tolerance for this metric."


class Case(NamedTuple):
    """A score of a run and of its base, by task and metric, with the documents that both were scored on.

    The tests of one `family` are corrected together. Only a `primary` score is tested; others are
    further metrics of the same answers. A `margin` is what may be claimed of the difference.
    """

    base: Run
    run: Run
    key: tuple[str, str]
    pair: Pair | None
    family: Hashable
    primary: bool = True
    margin: Margin | None = None

    @property
    def scores(self) -> tuple[Score, Score]:
        """The scores of base and run."""
        return self.base.scores[self.key], self.run.scores[self.key]

    @property
    def margin_size(self) -> float | None:
        """The margin in the metric's own unit; None without one, or where it does not fit the scores."""
        base, run = (score.value for score in self.scores)
        return self.margin.size(base, run) if self.margin else None


@dataclass(frozen=True)
class Claim:
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
    claim: Claim | None = None
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
        return bool(
            self.floor and not self.floor.base_above_floor and not is_bias(self.metric)
        )

    @property
    def said(self) -> str:
        """The verdict, and that the run is at the floor where it is."""
        return f"{self.verdict} (at floor)" if self.at_floor else self.verdict


def judged(cases: Sequence[Case], alpha: float = 0.05) -> list[Difference]:
    """Test each case, correct the tests of each family, and say what they show at level `alpha`."""
    tested = [(case, _difference_test(case, alpha)) for case in cases]
    families = [case.family for case in cases]
    ps = [test.p if case.primary else None for case, test in tested]
    outside = [p_outside(*pair) if pair[0].primary else None for pair in tested]
    corrected = (
        false_discovery(ps, families, alpha),
        outside,
        false_discovery(outside, families),
    )
    rows = []
    for (case, test), (q, level), p, (q_margin, _) in zip(
        tested, *corrected, strict=True
    ):
        claim = None
        if p is not None and q_margin is not None:
            claim = Claim(case.margin_size or 0.0, p, q_margin)
        before, after = (score.value for score in case.scores)
        change = after - before
        low, high = test.interval(level)
        row = Difference(
            case.run.name,
            *case.key,
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
            verdict=_verdict(case, change, q, claim, alpha),
            case=case,
            claim=claim,
            units=test.units,
        )
        rows.append(row)
    return rows


def p_outside(case: Case, test: PairedTest) -> float | None:
    """Return the p of "the true difference is not within the margin"; None where nothing can be claimed.

    A share of what a base has above its exact floor is tested as the share that is kept, so that the
    base's own spread counts.
    """
    margin, size = case.margin, case.margin_size
    if margin is None or not size or test.units_missing:
        return None
    up, one_sided = case.scores[0].higher_is_better, margin.claim == "not_worse"
    share, floor = margin.share, case.base.exact_floor(*case.key)
    pair = case.pair if case.pair and case.pair[0].transform == "mean" else None
    if share and floor is not None and pair and test.sides != (0.5, 0.5):
        groups = grouping(pair[0])
        base, run = (documents.values for documents in pair)
        p = kept_sides(base, run, floor, 1 - share, **groups)[1]
        if one_sided:
            return p
        return max(p, kept_sides(base, run, floor, 1 + share, **groups)[0])
    low, high = -size, size
    if one_sided and up is not None:
        # The other side is not asked about.
        low, high = (low, math.inf) if up else (-math.inf, high)
    return test.p_outside(low, high)


def _verdict(
    case: Case, change: float, q: float | None, claim: Claim | None, alpha: float
) -> str:
    """Return what a test says of a difference, in the words of `Difference.verdict`."""
    up, margin = case.scores[0].higher_is_better, case.margin
    if not math.isfinite(change):
        return "not comparable"
    if not case.primary:
        return "restated"
    if q is None:
        verdict = "not tested"
    elif q >= alpha:
        verdict = "not shown"
    elif up is None:
        verdict = "different"
    else:
        verdict = "better" if (change > 0) == up else "worse"
    if margin is None:
        return verdict
    # What is better is not worse, and says more; what is equivalent may differ for certain.
    says_more = margin.claim == "not_worse" and verdict == "better"
    if claim is not None and claim.q < alpha and not says_more:
        return margin.verdict
    return "undecided" if verdict.startswith("not ") else verdict


def _difference_test(case: Case, alpha: float) -> PairedTest:
    """Test on the documents of both, else on standard errors."""
    base, run = case.scores
    difference = run.value - base.value
    both = zip((case.base, case.run), case.scores, strict=True)
    endless = [run.name for run, score in both if not math.isfinite(score.value)]
    if endless:
        why = f"the score of {' and '.join(endless)} is not a finite number"
    elif case.pair:
        return paired_test(case.pair, alpha)
    elif base.stderr is None or run.stderr is None:
        why = "neither samples nor standard errors"
    else:
        return unpaired_difference(difference, base.stderr, run.stderr, alpha=alpha)
    return PairedTest(difference, f"none: {why}", level=alpha)


def decisions(
    rows: Sequence[Difference],
    levels: Sequence[float],
    families: Sequence[Hashable] | None = None,
) -> Iterator[Decision]:
    """Decide what `judged` made of cases: a margin, or else whether a score is worse.

    Tests are one-sided where the direction is known, and corrected by `families`, by default together.
    """
    sides = [*map(_sides, rows)]
    worse, better = (
        [q for q, _ in false_discovery([ps[way] for ps in sides], families)]
        for way in (0, 1)
    )
    yield from map(_decision, rows, levels, worse, better)


def _decision(
    row: Difference, alpha: float, worse: float | None, better: float | None
) -> Decision:
    margin, claim, size = row.case.margin, row.claim, row.case.margin_size
    way = "different" if row.case.scores[0].higher_is_better is None else "worse"
    within = f"{margin.verdict} within {margin.text}" if margin else ""
    if margin and claim is None and size and row.p is not None:
        return "undecided", (
            f"A margin of a score without bounds takes {LEAST_UNITS_OF_MARGIN - row.units} more "
            f"independent documents than the {row.units} that were evaluated."
        )
    if margin and claim is None:
        why = f"The margin {margin.text} cannot be tested here: {TOLERANCE}"
        return "undecided", why
    if claim and claim.q < alpha:
        return "pass", f"Shown to be {within} (q = {claim.q:.3g})."
    if worse is None or row.units < LEAST_UNITS:
        return "undecided", (
            f"{row.units} independent documents are too few to decide, which takes at least "
            f"{LEAST_UNITS}: {TOLERANCE}"
        )
    if worse < alpha:
        change = f"{way} by {abs(row.difference):.6g}"
        return "fail", f"Significantly {change} (q = {worse:.3g} < {alpha:g})."
    if better is not None and better < alpha:
        return IMPROVED
    if claim:
        return "undecided", (
            f"Not decided whether {within} (q = {claim.q:.3g} >= {alpha:g}) or worse: "
            "`lm-eval-pruned power` estimates how many documents would decide."
        )
    return "pass", f"Not significantly {way} (q = {worse:.3g} >= {alpha:g})."


def _sides(row: Difference) -> tuple[float | None, float | None]:
    """Return p of a change for the worse and for the better; of any change where neither is better."""
    up = row.case.scores[0].higher_is_better
    if up is None or row.p is None:
        return row.p, None
    toward, away = row.p / 2, 1 - row.p / 2
    return (away, toward) if (row.difference > 0) == up else (toward, away)
