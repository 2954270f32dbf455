"""Floors: what a model that knows nothing scores, who is shown to be above, and what is kept of that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.answer import NO_LOSS
from lm_eval_pruned.compare.claims import CLAIM_LEVEL, Kept, p_of, paired, unpaired
from lm_eval_pruned.compare.pairing import limits_of, paired_documents, paired_test
from lm_eval_pruned.compare.statistics import false_discovery
from lm_eval_pruned.results.documents import documents_of, scored_on
from lm_eval_pruned.results.groups import is_control, model_arguments
from lm_eval_pruned.results.metrics import is_bias


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.files import Run

    Key = tuple[str, str]
    Floor = tuple[str, float, Run | None]


#: In place of a test, for another metric of answers that were tested.
_RESTATED = "none: restated"


@dataclass(frozen=True)
class Standing:
    """Whether a model is shown to be above the floor of a task, and whether its base is.

    `floor` is the best score without knowledge and `floor_name` the run that has it, ``exact`` where
    the task declares it, or ``chance`` or ``commonest answer``, as the samples of the base tell.
    `p_floor` is one-sided, of "the model is not above"; `q_floor` is corrected over the runs of the
    task, without the base and random controls. Whether a model is above is None where its score is
    above the floor and was not tested.
    `kept` is the share of what the base has above the floor, with the interval of a single test; None
    for the base, and where the base is not shown to be above. `needed` documents would
    show a base to be above in 80 % of cases, if it scored as it does now; None where it is not higher.
    """

    task: str
    metric: str
    score: float
    floor_name: str
    floor: float
    p_floor: float | None
    q_floor: float | None
    floor_test: str
    base_above_floor: bool | None
    above_floor: bool | None
    kept: Kept | None = None
    needed: int | None = None

    @property
    def kept_text(self) -> str | None:
        """What is kept in percent, such as ``61 % [52, 70]``, or that there is no loss to see."""
        if self.base_above_floor is False:
            return NO_LOSS
        return self.kept.text if self.kept else None

    @property
    def primary(self) -> bool:
        """Whether the metric is the one that counts of its task."""
        return self.floor_test != _RESTATED

    @property
    def why_not(self) -> str:
        """Why a base is not shown to be above: its score, or too few documents."""
        if self.needed:
            return (
                f"{self.score:.4f} on few documents, of which it takes about {self.needed:,} to show that it "
                f"is above {self.floor:.4f}, {self.floor_name}"
            )
        return f"{self.score:.4f}, and the floor is {self.floor:.4f}, {self.floor_name}"

    def note(self, base: str) -> str:
        """Return what it means that the base is not above."""
        return (
            f"{self.task}: {base} is not shown to be above the floor ({self.why_not}): this task {NO_LOSS} in "
            "this model."
        )


def standings(
    base: Run,
    floors: Sequence[Run],
    compared: Sequence[tuple[Run, Key, bool]],
    alpha: float,
    level: float | None = None,
) -> dict[tuple[str, str, str], Standing]:
    """Test runs and, on the same scores, their base against the floors, at a `level`, by default `alpha`.

    `compared` says of each score whether it is the primary one of its task; others are not tested. What is
    kept has an interval of confidence 1 - `alpha`.
    Returns what is known by run, task and metric. ResultsError if a floor saw other documents.
    """
    keys: dict[Key, bool] = {}
    for _, key, primary in compared:
        keys[key] = primary or keys.get(key, False)
    level = alpha if level is None else level
    highest = {key: highest_floor(base, floors, key) for key in keys}
    none: tuple[float | None, str] = None, _RESTATED
    others = [item for item in compared if item[0] is not base]
    tested = [
        (run, key, floor, *(_p_above(run, key, *floor[1:]) if primary else none))
        for run, key, primary in [*((base, *item) for item in keys.items()), *others]
        if (floor := highest[key])
    ]
    families = [(key[0], run is base, is_control(run)) for run, key, *_ in tested]
    qs = false_discovery([p for *_, p, _ in tested], families, alpha)
    known: dict[tuple[str, str, str], Standing] = {}
    for (run, key, floor, p, test), (q, _) in zip(tested, qs, strict=True):
        name, bottom, _ = floor
        score = run.scores[key].value
        gain = score - bottom if run.scores[key].higher_is_better else bottom - score
        above = False if gain <= 0 else None if q is None else q < level
        needed = None
        if above is False and gain > 0 and p is not None and run is base:
            needed = _needed(run.scores[key].documents, p)
        of_base = known.get((base.name, *key))
        known[run.name, key[0], key[1]] = Standing(
            *key,
            score,
            name,
            bottom,
            p,
            q,
            test,
            base_above_floor=of_base.above_floor if of_base else above,
            above_floor=above,
            needed=needed,
            kept=_kept(base, run, key, floor, alpha)
            if of_base and of_base.above_floor
            else None,
        )
    return known


def blind_scores(
    base: Run, floors: Sequence[Run], keys: Sequence[Key]
) -> set[tuple[str, str, str]]:
    """Return the scores that cannot show a loss, as (task, metric, member): the base is not above their floor.

    A member of a group is empty where the score of the whole group cannot; of others, each member is tested
    against the exact floor, or against chance.
    """
    known = standings(base, floors, [(base, key, True) for key in keys], CLAIM_LEVEL)
    blind = set()
    for key in keys:
        standing = known.get((base.name, *key))
        if standing and standing.above_floor is False and not is_bias(key[1]):
            blind.add((*key, ""))
            continue
        documents = documents_of(base, *key)
        members = documents.members if documents else {}
        for name, own in members.items() if len(members) > 1 else ():
            exact = base.exact_floor(*key)
            level = own.levels.get("chance") if exact is None else exact
            if level is None or base.scores[key].higher_is_better is None:
                continue
            p, _ = _p_above(scored_on(base, key, own), key, level)
            if p is not None and p >= CLAIM_LEVEL:
                blind.add((*key, name))
    return blind


def _kept(base: Run, run: Run, key: Key, floor: Floor, alpha: float) -> Kept | None:
    """Return the share of what the base has above the floor that a run keeps, of scores that are means."""
    pair, (_, level, floor_run) = paired_documents(base, run, *key), floor
    if pair is None or pair[0].transform != "mean":
        return None
    below = floor_run and paired_documents(base, floor_run, *key)
    known = paired_test(pair, base, *key, below[1].values if below else level)
    return known.kept(alpha)


def _needed(documents: int | None, p: float) -> int | None:
    """Return how many documents give p < 5 % in 80 % of cases, by a normal distribution; None above a hundredfold."""
    times = (
        float(stats.norm.isf(CLAIM_LEVEL) + stats.norm.isf(0.2))
        / stats.norm.isf(min(p, 0.49))
    ) ** 2
    if not documents or times > 100:
        return None
    number = math.ceil(max(times, 1) * documents)
    unit = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def highest_floor(base: Run, floors: Sequence[Run], key: Key) -> Floor | None:
    """Return name, score and run of the floor of a metric; None if none is known.

    It is the one that the task declares; else chance, where the choices are known, or what is shown to
    score more than chance does: a guess, or one answer to all documents, is above it by luck. Without
    choices it is the best of the `floors`.
    """
    up, documents = base.scores[key].higher_is_better, documents_of(base, *key)
    exact = base.exact_floor(*key)
    if up is None:
        return None
    if exact is not None:
        # Scores of models that know nothing are estimates of it.
        return "exact", exact, None
    levels = documents.levels if documents else {}
    known: list[Floor] = [(name, level, None) for name, level in levels.items()]
    for run in floors:
        if key not in run.scores or not math.isfinite(run.scores[key].value):
            continue
        p = 0.0 if not levels else _p_above(run, key, levels["chance"], None)[0]
        guesses = levels and model_arguments(run).get("loglikelihood") == "equal"
        if p is not None and p < CLAIM_LEVEL and not guesses:
            known.append((run.name, run.scores[key].value, run))
    return max(known, key=lambda floor: floor[1] if up else -floor[1], default=None)


def _p_above(
    run: Run, key: Key, level: float, floor_run: Run | None = None
) -> tuple[float | None, str]:
    """Return the p of "the run is not above the floor", and the test that it comes from."""
    score, documents = run.scores[key], documents_of(run, *key)
    side = 1 if score.higher_is_better else -1
    if not math.isfinite(score.value):
        return None, "none: the score is not a finite number"
    if floor_run and (pair := paired_documents(floor_run, run, *key)):
        test = paired_test(pair, run, *key)
        return test.p_beyond(0.0, side), test.method
    if documents and documents.transform == "mean":
        values = np.full(len(documents.values), level)
        limits = limits_of(run, *key, documents.values)
        known = documents.groups
        test = paired(values, documents.values, level, limits=limits, **known)
        return p_of(test.clears(side)) if test.tested else None, test.method
    if score.stderr is not None:
        alone = unpaired(score.value - level, score.stderr)
        return alone.p_beyond(0.0, side), alone.method
    return None, "none: neither samples nor standard errors"
