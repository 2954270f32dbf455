"""The one judge: how a score differs from that of its base, and what is shown of it.

`compare`, `report`, `study`, `check` and `verdict` show and decide by its rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.compare.kept import kept_sides
from lm_eval_pruned.compare.pairing import grouping, paired_test
from lm_eval_pruned.compare.statistics import (
    PairedTest,
    false_discovery,
    unpaired_difference,
)
from lm_eval_pruned.results.files import finite_or_none


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from lm_eval_pruned.compare.agreement import Agreement
    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.margin import Margin
    from lm_eval_pruned.compare.pairing import Pair
    from lm_eval_pruned.results.files import Run, Score


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

    def claiming(self, claim: str) -> Case:
        """Return the case with another claim of the same margin."""
        return self._replace(margin=self.margin and replace(self.margin, claim=claim))


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
    documents or clusters, 0 where not known. None means not known.

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
    smallest_detectable: float | None
    documents: int | None
    method: str
    primary: bool
    verdict: str
    claim: Claim | None = None
    floor: Standing | None = None
    answers: Agreement | None = None
    units: int = 0

    @property
    def at_floor(self) -> bool:
        """Whether the run is not shown to be above the floor; False where that was not tested."""
        return self.floor is not None and self.floor.above_floor is False

    @property
    def kept_text(self) -> str | None:
        """What the run keeps of the score above the floor, as `Standing` says it; None without a floor."""
        return self.floor.kept_text if self.floor else None

    @property
    def said(self) -> str:
        """The verdict, and that the run is at the floor where it is."""
        return f"{self.verdict} (at floor)" if self.at_floor else self.verdict


def judged(cases: Sequence[Case], alpha: float = 0.05) -> list[Difference]:
    """Test each case, correct the tests of each family, and say what they show at level `alpha`."""
    tests = [_difference_test(case, alpha) for case in cases]
    families = [case.family for case in cases]
    counted = [
        test if case.primary else None for case, test in zip(cases, tests, strict=True)
    ]
    corrected = false_discovery([t.p if t else None for t in counted], families, alpha)
    ps = [
        p_outside(case, test) if test else None
        for case, test in zip(cases, counted, strict=True)
    ]
    claimed = [
        None if p is None else Claim(case.margin_size or 0.0, p, q or 0.0)
        for case, p, (q, _) in zip(
            cases, ps, false_discovery(ps, families), strict=True
        )
    ]
    found = zip(cases, tests, corrected, claimed, strict=True)
    return [_difference(*each, alpha) for each in found]


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
    if share and floor is not None and case.pair and test.sides != (0.5, 0.5):
        about = grouping(case.pair[0])
        if about.pop("transform") == "mean":
            one, other = (documents.values for documents in case.pair)
            p = kept_sides(one, other, floor, 1 - share, **about)[1]
            if one_sided:
                return p
            return max(p, kept_sides(one, other, floor, 1 + share, **about)[0])
    low, high = -size, size
    if one_sided and up is not None:
        # The other side is not asked about.
        low, high = (low, math.inf) if up else (-math.inf, high)
    return test.p_outside(low, high)


def verdict_of(
    difference: float,
    q: float | None,
    alpha: float,
    higher_is_better: bool | None,
    margin: Margin | None = None,
    claim: Claim | None = None,
) -> str:
    """Return what a test says of a difference, in the words of `Difference.verdict`."""
    if q is None:
        verdict = "not tested"
    elif q >= alpha:
        verdict = "not shown"
    elif higher_is_better is None:
        verdict = "different"
    else:
        verdict = "better" if (difference > 0) == higher_is_better else "worse"
    if margin is None:
        return verdict
    # What is better is not worse, and says more; what is equivalent may differ for certain.
    says_more = margin.claim == "not_worse" and verdict == "better"
    if claim is not None and claim.q < alpha and not says_more:
        return margin.verdict
    return "undecided" if verdict.startswith("not ") else verdict


def _difference_test(case: Case, alpha: float) -> PairedTest:
    """Test on the documents of both, else on standard errors."""
    one, other = case.scores
    difference = other.value - one.value
    both = zip((case.base, case.run), case.scores, strict=True)
    endless = [run.name for run, score in both if not math.isfinite(score.value)]
    if endless:
        why = f"the score of {' and '.join(endless)} is not a finite number"
    elif case.pair:
        return paired_test(case.pair, alpha)
    elif one.stderr is None or other.stderr is None:
        why = "neither samples nor standard errors"
    else:
        return unpaired_difference(difference, one.stderr, other.stderr, alpha=alpha)
    return PairedTest(difference, f"none: {why}", level=alpha)


def _difference(
    case: Case,
    test: PairedTest,
    corrected: tuple[float | None, float | None],
    claim: Claim | None,
    alpha: float,
) -> Difference:
    before, after = (score.value for score in case.scores)
    (q, level), verdict, change = corrected, "restated", after - before
    if not math.isfinite(change):
        verdict = "not comparable"
    elif case.primary:
        up = case.scores[0].higher_is_better
        verdict = verdict_of(change, q, alpha, up, case.margin, claim)
    low, high = test.interval(level or test.level)
    return Difference(
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
        smallest_detectable=None if q is None else test.smallest_detectable(level),
        documents=len(case.pair[0].keys) if case.pair else None,
        method=test.method,
        primary=case.primary,
        verdict=verdict,
        claim=claim,
        units=test.units,
    )
