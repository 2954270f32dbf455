"""Floors: what a model that knows nothing scores, who is shown to be above, and what is kept of that."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize

from lm_eval_pruned.compare import pairing, statistics
from lm_eval_pruned.results.documents import documents_of
from lm_eval_pruned.results.groups import is_control, is_share


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.results.files import Run

    Key = tuple[str, str]
    Floor = tuple[str, float, Run | None]


#: What is said instead of a share where the base is not shown to be above its floor.
NO_LOSS = "cannot show a loss"
#: In place of a test, for another metric of answers that were tested.
_RESTATED = "none: restated"
#: Ends of an interval are looked for no farther than this from the share.
_FARTHEST = 1e3


@dataclass(frozen=True)
class Kept:
    """What a candidate keeps: 1 is all that the base scores above the floor, 0 is the floor.

    From `low` to `high` is the interval; an end is None where the documents give none, because they
    are too few, or because the base could be at its floor.
    """

    share: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Percent with interval, such as ``61 % [52, 70]``."""
        ends = [
            "?" if end is None else f"{end:.0%}"[:-1] for end in (self.low, self.high)
        ]
        return f"{self.share:.0%} [{', '.join(ends)}]".replace("%", " %")


@dataclass(frozen=True)
class Standing:
    """Whether a model is shown to be above the floor of a task, and whether its base is.

    `floor` is the best score without knowledge and `floor_name` the run that has it, ``exact`` where
    the task declares it, or ``chance`` or ``commonest answer``, as the samples of the base tell.
    `p_floor` is one-sided, of "the model is not above"; `q_floor` is corrected over the runs of the
    task, without the base and random controls. Whether a model is above is None where its score is
    above the floor and was not tested.
    `kept` is the share of what the base has above the floor, with the interval of a single test; None
    for the base, and where the base is not shown to be above. See `share_kept`.
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

    def note(self, base: str) -> str:
        """Return what it means that the base is not above."""
        return (
            f"{self.task}: {base} ({self.score:.4f}) is not shown to be above the floor "
            f"({self.floor:.4f}, {self.floor_name}): this task {NO_LOSS} in this model."
        )


def standings(
    base: Run,
    floors: Sequence[Run],
    compared: Sequence[tuple[Run, Key, bool]],
    alpha: float,
) -> dict[tuple[str, str, str], Standing]:
    """Test runs and, on the same scores, their base against the best of the `floors`.

    `compared` says of each score whether it is the primary one of its task; others are not tested.
    Returns what is known by run, task and metric. ResultsError if a floor saw other documents.
    """
    keys: dict[Key, bool] = {}
    for _, key, primary in compared:
        keys[key] = primary or keys.get(key, False)
    highest = {key: highest_floor(base, floors, key) for key in keys}
    tested = [
        (run, key, floor, *_p_above(run, key, floor, primary))
        for run, key, primary in [*((base, *item) for item in keys.items()), *compared]
        if (floor := highest[key])
    ]
    families = [(key[0], run is base, is_control(run)) for run, key, *_ in tested]
    qs = statistics.false_discovery([p for *_, p, _ in tested], families, alpha)
    known: dict[tuple[str, str, str], Standing] = {}
    for (run, key, floor, p, test), (q, _) in zip(tested, qs, strict=True):
        name, level, _ = floor
        score = run.scores[key].value
        gain = score - level if run.scores[key].higher_is_better else level - score
        above = False if gain <= 0 else None if q is None else q < alpha
        of_base = known.get((base.name, *key))
        known[run.name, key[0], key[1]] = Standing(
            *key,
            score,
            name,
            level,
            p,
            q,
            test,
            base_above_floor=of_base.above_floor if of_base else above,
            above_floor=above,
            kept=_kept(base, run, key, floor, alpha)
            if of_base and of_base.above_floor
            else None,
        )
    return known


def _kept(base: Run, run: Run, key: Key, floor: Floor, alpha: float) -> Kept | None:
    """Return the share of what the base has above the floor that a run keeps, of scores that are means."""
    pair, (_, level, floor_run) = pairing.paired_documents(base, run, *key), floor
    if pair is None or pair[0].transform != "mean":
        return None
    below = floor_run and pairing.paired_documents(base, floor_run, *key)
    without, groups = below[1].values if below else level, pair[0].groups
    return share_kept(pair[0].values, pair[1].values, without, **groups, alpha=alpha)


def highest_floor(base: Run, floors: Sequence[Run], key: Key) -> Floor | None:
    """Return name, score and run of the best floor of a metric; None if none is known."""
    up, documents = base.scores[key].higher_is_better, documents_of(base, *key)
    exact = base.exact_floor(*key)
    if up is None:
        return None
    if exact is not None:
        # Scores of models that know nothing are estimates of it.
        return "exact", exact, None
    known: list[Floor]
    known = [(r.name, r.scores[key].value, r) for r in floors if key in r.scores]
    levels = documents.levels if documents else {}
    known += [(name, level, None) for name, level in levels.items()]
    finite = [floor for floor in known if math.isfinite(floor[1])]
    return max(finite, key=lambda floor: floor[1] if up else -floor[1], default=None)


def _p_above(
    run: Run, key: Key, floor: Floor, primary: bool
) -> tuple[float | None, str]:
    """Return the p of "the run is not above the floor", and the test that it comes from."""
    if not primary:
        return None, _RESTATED
    score, documents = run.scores[key], documents_of(run, *key)
    _, level, floor_run = floor
    if not math.isfinite(score.value):
        return None, "none: the score is not a finite number"
    if floor_run and (pair := pairing.paired_documents(floor_run, run, *key)):
        test = pairing.paired_test(pair)
    elif documents and documents.transform == "mean":
        constant = np.full(len(documents.values), level)
        groups = documents.groups
        if is_share(key[1]):
            groups["limits"] = -level, 1 - level
        test = statistics.paired_difference(constant, documents.values, **groups)
    elif score.stderr is not None:
        test = statistics.unpaired_difference(score.value - level, score.stderr)
    else:
        return None, "none: neither samples nor standard errors"
    return test.sides and test.sides[bool(score.higher_is_better)], test.method


def kept_sides(
    base: ArrayLike,
    candidate: ArrayLike,
    floor: ArrayLike,
    share: float,
    weights: ArrayLike | None = None,
    **groups: Any,
) -> tuple[float, float]:
    """Return the one-sided p of a candidate that keeps less than `share`, and of one that keeps more.

    It is that of ``candidate - floor`` against that share of ``base - floor``, so that the spread of the
    base counts. Arguments as for `share_kept`; 1 and 1 where the documents allow no test.
    """
    above, left = (
        np.asarray(v, float) - np.asarray(floor, float) for v in (base, candidate)
    )
    weights = np.ones(len(above)) if weights is None else np.asarray(weights, float)
    gains = weights * (left - share * above)
    # Rounding must not make equal values differ.
    gains[np.abs(gains) <= 1e-12 * np.abs(weights * above).max()] = 0.0
    sides = statistics.paired_mean(gains, weights, **groups).sides or (1.0, 1.0)
    # Where a lower score is better, the base is below its floor.
    return sides if (weights * above).sum() > 0 else sides[::-1]


def share_kept(
    base: ArrayLike,
    candidate: ArrayLike,
    floor: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    alpha: float = 0.05,
    **groups: Any,
) -> Kept | None:
    """Return (candidate - floor) / (base - floor) of two means over the same documents.

    The interval holds each share at which a paired test does not tell ``candidate - floor`` from
    that share of ``base - floor``, as Fieller's does. The test is that of `statistics.paired_mean`, for
    scores without bounds, over clusters.

    Values are of shape (n,), that of the floor can be one for all documents; `weights`, `clusters` and
    `strata` are those of `statistics.paired_difference`. The confidence is 1 - `alpha`. None where the
    mean of the base is exactly at the floor.

    Source: Fieller 1954, Journal of the Royal Statistical Society B 16, 175-185.

    Example:
        >>> share_kept([0.9, 0.7] * 10, [0.7, 0.5] * 10, 0.2).text
        '67 % [63, 69]'
    """
    weights = np.ones(np.shape(base)) if weights is None else np.asarray(weights, float)
    above, left = (
        float((weights * (np.asarray(v, float) - np.asarray(floor, float))).sum())
        for v in (base, candidate)
    )
    if above == 0:
        return None
    share = left / above

    def excess(supposed: float, side: int) -> float:
        sides = kept_sides(base, candidate, floor, supposed, weights, **groups)
        return sides[side] - alpha / 2

    def end(side: int) -> float | None:
        # At a larger share than the true one, the candidate keeps less.
        direction, step = (1, -1)[side], 1e-3
        while excess(share + direction * step, side) > 0:
            step *= 2
            if step > _FARTHEST:
                return None
        nearest = share + direction * step / 2 if step > 1e-3 else share
        return optimize.brentq(excess, nearest, share + direction * step, args=(side,))

    return Kept(share, end(1), end(0))
