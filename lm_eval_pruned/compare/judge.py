"""The one judge: how a score differs from that of its base, and what is shown of it.

`compare`, `report`, `study`, `check` and `verdict` show and decide by its rows. Several tasks can be
claimed together: the mean over them of their differences, with a wider margin for each.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare.floors import kept_sides
from lm_eval_pruned.compare.margins import PROBABILITIES
from lm_eval_pruned.compare.pairing import paired_documents, paired_test
from lm_eval_pruned.compare.statistics import (
    LEAST_UNITS,
    LEAST_UNITS_OF_MARGIN,
    PairedTest,
    false_discovery,
    unpaired_difference,
)
from lm_eval_pruned.results.documents import Documents, scored_on
from lm_eval_pruned.results.files import finite_or_none
from lm_eval_pruned.results.groups import is_bias, is_share


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

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
#: A single task may lose so many times the margin of their mean.
GUARD = 2.5


@dataclass(frozen=True, eq=False)
class Case:
    """A score of a run and of its base, by task and metric.

    The tests of one `family` are corrected together. Only a `primary` score counts as tested; others are
    further metrics of the same answers. A `margin` is what may be claimed of the difference.
    """

    base: Run
    run: Run
    key: tuple[str, str]
    family: Hashable = ""
    primary: bool = True
    margin: Margin | None = None

    @functools.cached_property
    def pair(self) -> Pair | None:
        """The documents that both were scored on, as `paired_documents` returns them."""
        return paired_documents(self.base, self.run, *self.key)

    @functools.cached_property
    def test(self) -> PairedTest:
        """The test of the difference on the documents of both, else on standard errors."""
        base, run = self.scores
        difference = run.value - base.value
        both = zip((self.base, self.run), self.scores, strict=True)
        endless = [run.name for run, score in both if not math.isfinite(score.value)]
        if endless:
            why = f"the score of {' and '.join(endless)} is not a finite number"
        elif self.pair:
            return paired_test(self.pair)
        elif base.stderr is None or run.stderr is None:
            why = "neither samples nor standard errors"
        else:
            return unpaired_difference(difference, base.stderr, run.stderr)
        return PairedTest(difference, f"none: {why}")

    @property
    def scores(self) -> tuple[Score, Score]:
        """The scores of base and run."""
        return self.base.scores[self.key], self.run.scores[self.key]

    @property
    def margin_size(self) -> float | None:
        """The margin in the metric's own unit; None without one, or where it does not fit the scores."""
        base, run = (score.value for score in self.scores)
        return self.margin.size(base, run) if self.margin else None

    @property
    def p_outside(self) -> float | None:
        """The p of "the true difference is not within the margin"; None where nothing can be claimed.

        A share of what a base has above its exact floor is tested as the share that is kept, so that
        the base's own spread counts.
        """
        margin, size, test = self.margin, self.margin_size, self.test
        if margin is None or not size or test.units_missing:
            return None
        up, one_sided = self.scores[0].higher_is_better, margin.claim == "not_worse"
        share, floor = margin.share, self.base.exact_floor(*self.key)
        pair = self.pair if self.pair and self.pair[0].transform == "mean" else None
        if share and floor is not None and pair and test.sides != (0.5, 0.5):
            groups = pair[0].groups
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
    families = [case.family for case in cases]
    ps = [case.test.p if case.primary else None for case in cases]
    outside = [case.p_outside if case.primary else None for case in cases]
    corrected = (
        false_discovery(ps, families, alpha),
        outside,
        false_discovery(outside, families),
    )
    rows = []
    for case, (q, level), p, (q_margin, _) in zip(cases, *corrected, strict=True):
        claim = None
        if p is not None and q_margin is not None:
            claim = Claim(case.margin_size or 0.0, p, q_margin)
        before, after = (score.value for score in case.scores)
        change, test = after - before, case.test
        low, high = test.interval(level or alpha)
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


def pools_of(cases: Iterable[Case]) -> list[list[Case]]:
    """Return the cases that are claimed together: of one measure, with one margin in points."""
    pools: dict[object, list[Case]] = {}
    for case in cases:
        if pool := pool_of(case):
            pools.setdefault(pool, []).append(case)
    return [pool for pool in pools.values() if len(pool) > 1]


def pool_of(case: Case) -> tuple[str, float] | None:
    """Return the measure and the margin of a score, or None if it cannot be pooled with others.

    Only a mean between 0 and 1 can be, if more of it is better and its margin is in points.
    """
    before, after = case.scores
    size, metric = case.margin_size, case.key[1]
    if (
        not (size and case.pair and case.pair[0].transform == "mean")
        or (case.margin and case.margin.share)
        or not before.higher_is_better
        or is_bias(metric)
        or not is_share(metric, (before.value, after.value))
    ):
        return None
    name = metric.partition(",")[0]
    return PROBABILITIES[0] if name in PROBABILITIES else name, size


def claim_text(pool: Sequence[Case]) -> str:
    """Return what is claimed of several tasks together, in a sentence without its end."""
    size, name = 100 * (pool[0].margin_size or 0.0), pool[0].key[1].partition(",")[0]
    what = "The probability of the right answer" if name in PROBABILITIES else name
    return (
        f"{what} falls by less than {size:g} points on average over these {len(pool)} tasks, and by "
        f"less than {GUARD * size:g} in each"
    )


def mean_of(cases: Sequence[Case]) -> Case:
    """Return the mean over tasks as a case; every score is a mean between 0 and 1, and higher is better.

    Each task weighs the same, however many documents it has, and is a stratum: another draw would hold
    the same tasks. A document that several tasks ask about is one unit.

    Source: Miller 2024, arXiv 2411.00640 (differences by document, means over strata); LLM-Accuracy-Stats,
    arXiv 2602.10144 (one test over tasks).
    """
    key = f"mean of {len(cases)} tasks", cases[0].key[1]
    pairs = [case.pair for case in cases if case.pair]
    before, after = (_joined(documents) for documents in zip(*pairs, strict=True))
    return replace(
        cases[0],
        base=scored_on(cases[0].base, key, before),
        run=scored_on(cases[0].run, key, after),
        key=key,
        family=key,
    )


def guarded(case: Case) -> Case:
    """Return a case of a pool with the wider margin that its task is held to by itself."""
    points = 100 * GUARD * (case.margin_size or 0.0)
    margin = case.margin and replace(case.margin, text=f"{points:.6g}pt")
    return replace(case, margin=margin)


def p_of_claim(cases: Sequence[Case]) -> float | None:
    """Return the p of "the claim is wrong": that of one task, or of a mean over several with its guards.

    The largest p counts: a claim that has several parts is shown where each of them is, at the same
    level. None where a part cannot be tested.

    Source: Berger and Hsu 1996, Statistical Science 11, 283-319.
    """
    parts = [mean_of(cases), *map(guarded, cases)] if cases[1:] else cases
    known = [p for case in parts if (p := case.p_outside) is not None]
    return max(known) if len(known) == len(parts) else None


def _joined(tasks: Sequence[Documents]) -> Documents:
    count, total = len(tasks), sum(len(task.values) for task in tasks)
    weights = [task.weights * total / count / task.weights.sum() for task in tasks]
    keys = (
        (f"{number}\0{name}", digest, repetition)
        for number, task in enumerate(tasks)
        for name, digest, repetition in task.keys
    )
    clusters = (
        task.clusters
        or [f"{digest} {repetition}" for _, digest, repetition in task.keys]
        for task in tasks
    )
    return Documents(
        tuple(keys),
        np.concatenate([task.values for task in tasks]),
        np.concatenate(weights),
        tuple(itertools.chain(*clusters)),
        "mean",
    )
