"""Cases: one score of a run beside that of its base, or the mean over several tasks, with what is claimed."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare.claims import GUARD, Test, unpaired
from lm_eval_pruned.compare.margins import PROBABILITIES
from lm_eval_pruned.compare.pairing import paired_documents, paired_test
from lm_eval_pruned.results.documents import Documents, scored_on
from lm_eval_pruned.results.metrics import BOUNDS, SHARE, metric_of


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from lm_eval_pruned.compare.margins import Margin
    from lm_eval_pruned.compare.pairing import Pair
    from lm_eval_pruned.results.files import Run, Score
    from lm_eval_pruned.results.metrics import Metric


@dataclass(frozen=True, eq=False)
class Case:
    """A score of a run and of its base, by task and metric.

    The tests of one `family` are corrected together. Only a `primary` score counts as tested; others are
    further metrics of the same answers. A `margin` is what may be claimed of the difference. `member` is
    the task of a group, or the kind of text, whose documents these are, where they are not those of all.
    """

    base: Run
    run: Run
    key: tuple[str, str]
    family: Hashable = ""
    primary: bool = True
    margin: Margin | None = None
    member: str = ""

    @functools.cached_property
    def pair(self) -> Pair | None:
        """The documents that both were scored on, as `paired_documents` returns them."""
        return paired_documents(self.base, self.run, *self.key)

    @functools.cached_property
    def test(self) -> Test:
        """The test of the difference on the documents of both, else on standard errors."""
        base, run = self.scores
        difference = run.value - base.value
        both = zip((self.base, self.run), self.scores, strict=True)
        endless = [run.name for run, score in both if not math.isfinite(score.value)]
        if endless:
            why = f"the score of {' and '.join(endless)} is not a finite number"
        elif self.pair:
            return paired_test(self.pair, self.base, *self.key, self.floor)
        elif base.stderr is None or run.stderr is None:
            why = "neither samples nor standard errors"
        else:
            return unpaired(difference, base.stderr, run.stderr)
        return Test(difference, f"none: {why}")

    @property
    def task(self) -> str:
        """The task, or the member of a group."""
        return self.member or self.key[0]

    @property
    def scores(self) -> tuple[Score, Score]:
        """The scores of base and run."""
        return self.base.scores[self.key], self.run.scores[self.key]

    @property
    def metric(self) -> Metric:
        """What is known of the metric."""
        return metric_of(*self.key, self.base.metadata.get(self.key[0]))

    @property
    def floor(self) -> float:
        """The floor that a share is one above of: the exact one, else 0."""
        return self.base.exact_floor(*self.key) or 0.0

    @property
    def up(self) -> bool | None:
        """Whether more is better; None where neither way is."""
        return self.scores[0].higher_is_better

    @property
    def margin_size(self) -> float | None:
        """The margin in the metric's own unit; None without one, or where it does not fit the scores."""
        above = self.scores[0].value - self.floor
        return self.margin.size(above, self.metric.limits) if self.margin else None

    def p_outside(self, *, both: bool = False) -> float | None:
        """Return the p of "the claim is wrong"; None where nothing can be claimed.

        The claim is that of the margin; that the difference lies within it on both sides where `both`, or where
        neither way is better. Then the larger p of two one-sided tests counts.

        Source: Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15, 657-680.
        """
        size = self.margin_size
        if self.margin is None or not size:
            return None
        both = both or self.up is None or self.margin.claim == "equivalent"
        sides = (1, -1) if both else (1,) if self.up else (-1,)
        ps = [self.test.p_margin(size, self.margin.share, side) for side in sides]
        known = [p for p in ps if p is not None]
        return max(known) if len(known) == len(ps) else None

    @property
    def p_inside(self) -> float | None:
        """The p of "no more than the margin is lost"; None where that cannot be tested."""
        size = self.margin_size
        if self.margin is None or not size or self.up is None:
            return None
        return self.test.p_within(size, self.margin.share, 1 if self.up else -1)


def guarded(case: Case) -> Case:
    """Return a case with the wider margin that a part of a claim is held to."""
    return replace(case, margin=case.margin and case.margin.times(GUARD))


def members_of(case: Case) -> list[Case]:
    """Return the cases of the members of a group, or of a loss those of each kind of text, guarded.

    None where documents do not say which they are.
    """
    if case.pair is None:
        return []
    documents = case.pair[0]
    names = [task for task, *_ in documents.keys]
    if case.metric.loss and documents.level:
        names = [*documents.level]
    parts: dict[str, list[tuple[str, str, int]]] = {}
    for name, key in zip(names, documents.keys, strict=True):
        parts.setdefault(name, []).append(key)
    if len(parts) == 1:
        return []
    return [guarded(_only(case, name, tuple(keys))) for name, keys in parts.items()]


def _only(case: Case, member: str, keys: tuple[tuple[str, str, int], ...]) -> Case:
    """Return the case of some of the documents."""
    assert case.pair
    base, run = (
        scored_on(run, case.key, documents.taken(keys))
        for run, documents in zip((case.base, case.run), case.pair, strict=True)
    )
    return replace(case, base=base, run=run, member=member)


def pools_of(cases: Iterable[Case]) -> list[list[Case]]:
    """Return the cases that are claimed together: of one measure, with one margin in points."""
    pools: dict[object, list[Case]] = {}
    for case in cases:
        if pool := pool_of(case):
            pools.setdefault(pool, []).append(case)
    return [pool for pool in pools.values() if len(pool) > 1]


def pool_of(case: Case) -> tuple[object, ...] | None:
    """Return the measure, the claim and the margin of a score, or None if it cannot be pooled with others.

    Only a mean between 0 and 1 can be, if more of it is better and its margin is in points.
    """
    size, margin = case.margin_size, case.margin
    if (
        not (size and margin and case.pair and case.pair[0].transform == "mean")
        or margin.share
        or not case.up
        or case.metric.bias
        or case.metric.limits != SHARE
    ):
        return None
    name = case.key[1].partition(",")[0]
    return PROBABILITIES[0] if name in PROBABILITIES else name, margin.claim, size


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
    known = {key[0]: {BOUNDS: {key[1].partition(",")[0]: [*SHARE]}}}
    pairs = [case.pair for case in cases if case.pair]
    before, after = (_joined(documents) for documents in zip(*pairs, strict=True))
    return replace(
        cases[0],
        base=replace(scored_on(cases[0].base, key, before), metadata=known),
        run=scored_on(cases[0].run, key, after),
        key=key,
        family=key,
    )


def parts_of(cases: Sequence[Case]) -> list[Case]:
    """Return what has to be shown of a claim on one task or the mean over several, each at the same level.

    That is the score or the mean, and the guards of the members of a group and of each task of several.
    """
    if not cases[1:]:
        return [cases[0], *members_of(cases[0])]
    members = itertools.chain(*map(members_of, cases))
    return [mean_of(cases), *map(guarded, cases), *members]


def p_of_claim(cases: Sequence[Case]) -> float | None:
    """Return the p of "the claim is wrong", the largest of its parts; None where a part cannot be tested.

    Source: Berger and Hsu 1996, Statistical Science 11, 283-319.
    """
    parts = parts_of(cases)
    known = [p for case in parts if (p := case.p_outside()) is not None]
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
        task.clusters or [digest for _, digest, _ in task.keys] for task in tasks
    )
    return Documents(
        tuple(keys),
        np.concatenate([task.values for task in tasks]),
        np.concatenate(weights),
        tuple(itertools.chain(*clusters)),
        "mean",
    )
