"""How many documents a claim needs: the judge is asked about documents that are drawn from a pilot."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare.cases import Case, p_of_claim, pool_of
from lm_eval_pruned.compare.margins import (
    Margin,
    check_measure,
    judged_keys,
    usual_margin,
    with_choice_prob,
)
from lm_eval_pruned.results.documents import Documents, scored_on
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.files import Run

ALIKE, SEEN = "no difference", "the difference seen"
#: What is to be shown, and what is true then.
QUESTIONS = (("equivalent", ALIKE), ("not worse", ALIKE), ("not worse", SEEN))
#: The chance that a number of documents is to give.
POWER = 0.8
#: So many draws have a standard error of 3 points where the chance is 80 %.
DRAWS = 200
#: The search for a number of documents ends here.
MOST = 20_000
_BATCH = 25


class Pilot:
    """The paired documents of a case, which are drawn again in any number.

    Units, which are documents or clusters, are drawn with replacement from each stratum.
    """

    def __init__(self, case: Case) -> None:
        if case.pair is None:
            raise ValueError(
                f"{' '.join(case.key)} has no logged samples to draw from."
            )
        self.case, self.pair = case, case.pair
        documents = self.pair[0]
        self.size = size = len(documents.values)
        self.changed = int((documents.values != self.pair[1].values).sum())
        labels = documents.clusters or range(size)
        unit = np.unique(np.array(labels), return_inverse=True)[1]
        self._order = np.argsort(unit, kind="stable")
        self._lengths = np.bincount(unit)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._names = np.array([task for task, *_ in documents.keys])
        of_unit = self._names[self._order[self._starts]]
        self._strata = [np.flatnonzero(of_unit == name) for name in np.unique(of_unit)]

    def _units(self, times: float, rng: np.random.Generator) -> np.ndarray:
        """Draw units: each stratum has its share, rounded up or down at random, and all have their sum."""
        strata = [self._strata[i] for i in rng.permutation(len(self._strata))]
        until = np.cumsum([*map(len, strata)])
        total = max(1, round(times * int(until[-1])))
        # Systematic sampling: the same part of a unit is added to the end of each share.
        ends = np.floor(total * (until / until[-1]) + rng.random()).astype(int)
        counts = np.diff(ends, prepend=0)
        return np.concatenate(
            [rng.choice(s, n) for s, n in zip(strata, counts, strict=True)]
        )

    def drawn(self, times: float, rng: np.random.Generator, alike: bool) -> Case:
        """Return the case with `times` as many documents.

        With `alike`, base and run are exchanged in half of the units, so that they do not differ.
        """
        units = self._units(times, rng)
        lengths = self._lengths[units]
        ends = np.cumsum(lengths)
        first = np.repeat(self._starts[units] - (ends - lengths), lengths)
        chosen = self._order[first + np.arange(ends[-1])]
        exchanged = np.repeat(alike & (rng.random(len(units)) < 0.5), lengths)
        clusters = np.repeat(np.arange(len(units)), lengths)
        # Strata keep their names, and each document of the draw is another one.
        names = self._names[chosen].tolist()
        digests = (f"{self.case.key[0]} {number}" for number in range(len(names)))
        keys = tuple(zip(names, digests, repeat(0)))
        one, other = self.pair
        values = one.values[chosen], other.values[chosen]
        labels = tuple(clusters.tolist()) if one.clusters else None
        level = tuple(np.array(one.level)[chosen].tolist()) if one.level else ()
        groups = one.weights[chosen], labels, one.transform, level
        before, after = (
            Documents(keys, np.where(exchanged, theirs, ours), *groups)
            for ours, theirs in (values, values[::-1])
        )
        return replace(
            self.case,
            base=scored_on(self.case.base, self.case.key, before),
            run=scored_on(self.case.run, self.case.key, after),
        )


def pilots_of(
    base: Run,
    run: Run,
    tasks: Sequence[str],
    margin: str | None = None,
    measure: str | None = None,
) -> list[list[Case]]:
    """Return the cases of each claim that may be made on a task, or of the one on several.

    Of a task, claims on `measure` or else on what a verdict judges and on the score that counts;
    of several tasks, the claim on the mean of what it judges first.

    ResultsError if results or samples of a task are missing; ValueError for a margin that cannot be
    meant, and where there is no mean over the tasks.
    """
    by_task = []
    for task in tasks:
        if task not in {*base.tasks()} & {*run.tasks()}:
            raise ResultsError(
                f"{base.name} and its runs share no results of {task}: pass a task that both have "
                f"({base.name} has {', '.join(base.tasks()) or 'none'}), or evaluate some of its documents."
            )
        one, other = (with_choice_prob(item, [task]) for item in (base, run))
        check_measure(measure, (metric for name, metric in one.scores if name == task))
        keys = [*judged_keys(one, measure, subtasks=True)]
        if not measure:
            keys += primary_metrics([one, other], subtasks=True)
        keys = [key for key in dict.fromkeys(keys) if key[0] == task]
        by_task.append([_pilot(one, other, key, margin) for key in keys])
    if len(tasks) == 1:
        return [[case] for case in by_task[0]]
    first = [cases[0] for cases in by_task]
    pools = {pool_of(case) for case in first}
    if len(pools) > 1 or None in pools:
        raise ValueError(
            f"There is no mean over {', '.join(tasks)}, which takes scores between 0 and 1 of one "
            "measure, with a margin in points: name one with --measure and --margin, or one task."
        )
    return [first]


def _pilot(base: Run, run: Run, key: tuple[str, str], margin: str | None) -> Case:
    within = Margin("not_worse", margin or usual_margin(base, key))
    within.check(*key, base)
    case = Case(base, run, key, margin=within)
    if case.pair is None:
        raise ResultsError(
            f"{key[0]} of {run.name} has no logged samples from which its score can be computed: "
            "evaluate with --log_samples."
        )
    return case


def chances(
    cases: Sequence[Case], documents: int | None = None, alpha: float = 0.05
) -> list[list[object]]:
    """Say how likely a claim is to be shown on so many `documents`, and how many it needs.

    The claim is that of a case, or of a mean over several with their guards (see `p_of_claim`), in a
    single test at level `alpha`. Documents are drawn from those of the cases, in their proportions
    (default: as many as there are). Returns a row for each of `QUESTIONS`: name of the run, metric,
    documents seen, share of them whose value changed, margin in the metric's own unit, verdict, what is
    true, the chance then, and how many documents give a chance of 80 %, or None above `MOST`.

    ValueError for numbers out of range, for cases without samples, and where a margin does not fit.
    """
    if not 0 < alpha < 0.5 or (documents is not None and documents < 2):
        raise ValueError(
            f"alpha={alpha} has to be between 0 and 0.5, and documents={documents} at least 2."
        )
    for case in cases:
        if case.margin and case.margin_size is None:
            raise ValueError(case.margin.misfit(case.key[0]))
    pilots = [*map(Pilot, cases)]
    seen = sum(pilot.size for pilot in pilots)
    changed = sum(pilot.changed for pilot in pilots) / seen
    pilot = [cases[0].run.name, cases[0].key[1], seen, changed, cases[0].margin_size]
    return [
        [
            *pilot,
            verdict,
            truth,
            chance_of(verdict, truth, pilots, documents or seen, alpha),
            documents_for(verdict, truth, pilots, alpha),
        ]
        for verdict, truth in QUESTIONS
    ]


def chance_of(
    verdict: str,
    truth: str,
    pilots: Sequence[Pilot],
    n: int,
    alpha: float,
    *,
    rough: bool = False,
) -> float:
    """Return the chance of a verdict on `n` documents, from at most `DRAWS` draws.

    The same arguments have the same draws. Where it is `rough`, drawing ends once the chance is
    certainly not `POWER`.
    """
    rng, count, shown = np.random.default_rng([n, len(pilots)]), 0, 0
    times = n / sum(pilot.size for pilot in pilots)
    for count in range(1, DRAWS + 1):
        p = _p(verdict, [pilot.drawn(times, rng, truth == ALIKE) for pilot in pilots])
        shown += p is not None and p < alpha
        spread = math.sqrt(POWER * (1 - POWER) / count)
        if rough and not count % _BATCH and abs(shown / count - POWER) > 3 * spread:
            break
    return shown / count


def _p(verdict: str, cases: Sequence[Case]) -> float | None:
    claim = verdict.replace(" ", "_")
    return p_of_claim(
        [
            replace(case, margin=case.margin and replace(case.margin, claim=claim))
            for case in cases
        ]
    )


def documents_for(
    verdict: str, truth: str, pilots: Sequence[Pilot], alpha: float
) -> int | None:
    """Return how many documents have a chance of `POWER`, rounded up to two digits.

    Its standard error is about 8 %, from that of the chances. None above `MOST`, and where the
    difference seen is no smaller than the margin.
    """
    p = _p(verdict, [pilot.case for pilot in pilots])
    if truth == SEEN and p is not None and p >= 0.5:
        return None

    def enough(n: int) -> bool:
        return chance_of(verdict, truth, pilots, n, alpha, rough=True) >= POWER

    seen = min(MOST, sum(pilot.size for pilot in pilots))
    low, high = (1, seen) if enough(seen) else (seen, MOST)
    if high == MOST and not enough(MOST):
        return None
    while high > 1.06 * low + 1:
        middle = round(math.sqrt(low * high))
        low, high = (low, middle) if enough(middle) else (middle, high)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit
