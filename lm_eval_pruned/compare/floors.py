"""Floors: what a model that knows nothing scores, and whether a model is shown to be above it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare import pairing, statistics
from lm_eval_pruned.compare.kept import NO_LOSS, Kept, share_kept
from lm_eval_pruned.results.groups import is_control, is_share


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
    for the base, and where the base is not shown to be above. See `kept.share_kept`.
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
    read: pairing.Reader,
) -> dict[tuple[str, str, str], Standing]:
    """Test runs and, on the same scores, their base against the best of the `floors`.

    `compared` says of each score whether it is the primary one of its task; others are not tested.
    Returns what is known by run, task and metric. ResultsError if a floor saw other documents.
    """
    keys: dict[Key, bool] = {}
    for _, key, main in compared:
        keys[key] = main or keys.get(key, False)
    highest = {key: highest_floor(base, floors, key, read) for key in keys}
    asked = [
        (run, key, of, *(_p_above(run, key, of, read) if main else (None, _RESTATED)))
        for run, key, main in [*((base, *each) for each in keys.items()), *compared]
        if (of := highest[key])
    ]
    families = [(key[0], run is base, is_control(run)) for run, key, *_ in asked]
    qs = statistics.false_discovery([p for *_, p, _ in asked], families, alpha)
    found: dict[tuple[str, str, str], Standing] = {}
    for (run, key, floor, p, test), (q, _) in zip(asked, qs, strict=True):
        name, level, _ = floor
        score = run.scores[key].value
        gain = score - level if run.scores[key].higher_is_better else level - score
        above = False if gain <= 0 else None if q is None else q < alpha
        own = found.get((base.name, *key))
        shown = own.above_floor if own else above, above
        seen = own is not None and shown[0]
        kept = _kept(base, run, key, floor, alpha, read) if seen else None
        told = *key, score, name, level, p, q, test, *shown, kept
        found[run.name, key[0], key[1]] = Standing(*told)
    return found


def _kept(
    base: Run, run: Run, key: Key, floor: Floor, alpha: float, read: pairing.Reader
) -> Kept | None:
    """Return the share of what the base has above the floor that a run keeps, of scores that are means."""
    pair, (_, level, of) = pairing.paired_documents(base, run, *key, read), floor
    if pair is None or pair[0].transform != "mean":
        return None
    below = of and pairing.paired_documents(base, of, *key, read)
    how = pairing.grouping(pair[0])
    del how["transform"]
    without = below[1].values if below else level
    return share_kept(pair[0].values, pair[1].values, without, **how, alpha=alpha)


def highest_floor(
    base: Run, floors: Sequence[Run], key: Key, read: pairing.Reader
) -> Floor | None:
    """Return name, score and run of the best floor of a metric; None if none is known."""
    up, documents = base.scores[key].higher_is_better, read(base, *key)
    found: list[Floor]
    exact = base.exact_floor(*key)
    if exact is not None and up is not None:
        # Scores of models that know nothing are estimates of it.
        return "exact", exact, None
    found = [(r.name, r.scores[key].value, r) for r in floors if key in r.scores]
    levels = (documents.levels.chance, documents.levels.majority) if documents else ()
    for name, level in zip(("chance", "commonest answer"), levels, strict=False):
        found += [] if level is None else [(name, level, None)]
    known = [each for each in found if up is not None and math.isfinite(each[1])]
    return max(known, key=lambda each: each[1] if up else -each[1], default=None)


def _p_above(
    run: Run, key: Key, floor: Floor, read: pairing.Reader
) -> tuple[float | None, str]:
    """Return the p of "the run is not above the floor", and the test that it comes from."""
    score, documents, (_, level, of) = run.scores[key], read(run, *key), floor
    if not math.isfinite(score.value):
        return None, "none: the score is not a finite number"
    if of and (pair := pairing.paired_documents(of, run, *key, read)):
        test = pairing.paired_test(pair)
    elif documents and documents.transform == "mean":
        constant = np.full(len(documents.values), level)
        about = pairing.grouping(documents)
        if is_share(key[1]):
            about["limits"] = -level, 1 - level
        test = statistics.paired_difference(constant, documents.values, **about)
    elif score.stderr is not None:
        test = statistics.unpaired_difference(score.value - level, score.stderr)
    else:
        return None, "none: neither samples nor standard errors"
    return test.sides and test.sides[bool(score.higher_is_better)], test.method
