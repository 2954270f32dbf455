"""``lm-eval-pruned power``: whether a comparison can reach a verdict, before it is made."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy import special, stats

from lm_eval_pruned.compare.gaffke import POWER, Gaffke
from lm_eval_pruned.compare.pairing import paired_documents, paired_test
from lm_eval_pruned.compare.statistics import (
    LEAST_UNITS_OF_MARGIN,
    PairedTest,
    Shares,
    chance_seen,
)
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_eval_pruned.compare.margin import Margin

    #: Chance of each of `VERDICTS`.
    Chances = tuple[float, float, float]

#: What can be shown, and what has to be true for it.
VERDICTS = {
    "equivalent": "no difference",
    "not worse": "no difference",
    "better or worse": "a difference of {}",
}


def power_of(
    base: Run,
    runs: Sequence[Run],
    task: str,
    margin: Margin,
    *,
    metric: str | None = None,
    documents: int | None = None,
    alpha: float = 0.05,
) -> list[list[object]]:
    """Estimate how likely each run reaches a verdict on a task, from the answers changed so far.

    The chances are those of one test at level `alpha` on so many `documents` (default: as many as
    there are), of `metric` or else the one that counts: to claim the `margin`, and to see a difference of its size. Returns a row for each run
    and verdict: run, metric, documents, share of them whose value changed, margin in the metric's own
    unit, verdict, what is assumed to be true, the chance then, and how many documents give a chance
    of 80 %, if any.

    ResultsError if nobody has results or samples of `task`; ValueError for numbers out of range.
    """
    if not 0 < alpha < 0.5 or (documents is not None and documents < 2):
        raise ValueError(
            f"alpha={alpha} has to be between 0 and 0.5, and documents={documents} at least 2."
        )
    found: list[list[object]] = []
    for run in runs:
        counts = dict(primary_metrics([base, run], subtasks=True)).get(task)
        name = metric or counts
        if name is None or run.is_floor:
            continue
        pair = paired_documents(base, run, task, name)
        if pair is None:
            raise ResultsError(
                f"{task} of {run.name} has no logged samples from which its score can be computed: "
                "evaluate with --log_samples."
            )
        scores = [each.scores[task, name].value for each in (base, run)]
        margin.check(task, name, *scores)
        size = margin.size(*scores)
        if size is None:
            raise ValueError(margin.misfit(task))
        seen, changed = len(pair[0].keys), (pair[0].values != pair[1].values).mean()
        power = partial(chances, paired_test(pair), seen, size, alpha)
        about, n = [run.name, name, seen, changed, size], documents or seen
        for place, (verdict, if_true) in enumerate(VERDICTS.items()):
            row = [*about, verdict, if_true.format(margin.text), power(n)[place]]
            found.append([*row, documents_for(power, place, n)])
    if not found:
        raise ResultsError(
            f"{base.name} and its runs share no results of {task}: pass a task that both have "
            f"({base.name} has {', '.join(base.tasks()) or 'none'}), or evaluate some of its documents."
        )
    return found


def chances(test: PairedTest, seen: int, size: float, alpha: float, n: int) -> Chances:
    """Return the chances of `VERDICTS` on `n` documents, of which the test has `seen`."""
    of = test.distribution
    if isinstance(of, Shares):
        return power_of_shares(of.changing, n, size, alpha)
    if isinstance(of, Gaffke):
        return power_of_means(of._replace(times=n / seen), size, alpha)
    raise ResultsError(f"The chances cannot be estimated: {test.method}.")


def power_of_means(of: Gaffke, size: float, alpha: float) -> Chances:
    """Return the chances of `VERDICTS` of `Gaffke`'s test at `alpha`, of a margin of `size`.

    The mean of its units, as often as they count, is taken for normal.
    """
    scale = of.perplexity or 1.0
    stderr = scale * of.stderr / math.sqrt(of.times)

    def chance(level: float) -> float:
        reach = scale * max(of.reach(side, level) for side in (0, 1))
        with np.errstate(divide="ignore"):
            return float(special.ndtr(np.divide(size - reach, stderr)))

    enough = of.bounded or of.times * len(of.weights) >= LEAST_UNITS_OF_MARGIN
    within = chance(2 * alpha) if enough or not stderr else 0.0
    return max(0.0, 2 * within - 1), within, chance(alpha)


def power_of_shares(changing: float, n: int, size: float, alpha: float) -> Chances:
    """Return the chances of `VERDICTS` of `n` right-or-wrong documents, of a margin of `size`.

    Counted out over all outcomes of the tests that are made, where a share `changing` of the answers
    changes; with many changes, margins are from the normal distribution.
    """
    different = chance_seen(changing, n, size, alpha)
    if n * changing > 200:
        away = size / math.sqrt(changing / n) - stats.norm.isf(alpha)
        within = float(special.ndtr(away))
        return max(0.0, 2 * within - 1), within, different
    changes = np.arange(stats.binom.isf(1e-7, n, changing) + 1)
    ups, downs = np.meshgrid(changes, changes)
    chance = stats.binom.pmf(ups + downs, n, changing)
    chance *= stats.binom.pmf(ups, ups + downs, 0.5)
    gain, outcome = (ups - downs) / n, Shares(ups, downs, n)
    not_worse = (gain > -size) & (outcome.tails(-size)[0] < alpha)
    equivalent = not_worse & (gain < size) & (outcome.tails(size)[1] < alpha)
    return float(chance[equivalent].sum()), float(chance[not_worse].sum()), different


def documents_for(
    power: Callable[[int], Sequence[float]], place: int, n: int
) -> int | None:
    """Return how many documents have a chance of `POWER`, within 4 %, rounded up to two digits.

    `power` gives the chance at `place`. The search starts at `n`; None where it finds no number.
    """
    low, high = 1, n
    while power(high)[place] < POWER:
        low, high = high, 2 * high
        if high > 10_000_000:
            return None
    while high - low > max(1, high // 25):
        middle = (low + high) // 2
        low, high = (middle, high) if power(middle)[place] < POWER else (low, middle)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit
