"""``lm-eval-pruned power``: whether a comparison can reach a verdict, before it is made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy import stats

from lm_eval_pruned.compare.pairing import paired_documents, paired_test
from lm_eval_pruned.compare.statistics import (
    POWER,
    PairedTest,
    Shares,
    power_of_means,
    power_of_shares,
)
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.groups import primary_metrics
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_eval_pruned.compare.margins import Margin

#: No benchmark has more documents.
_MOST_DOCUMENTS = 10_000_000


def power_of(
    base: Run,
    runs: Sequence[Run],
    task: str,
    margin: Margin,
    *,
    documents: int | None = None,
    alpha: float = 0.05,
) -> list[list[object]]:
    """Say how likely each run reaches a verdict, from the answers that changed so far.

    Args:
        base: The unpruned model.
        runs: What is compared with it.
        task: The task, whose primary metric counts.
        margin: What is to be shown; its size also stands for the difference to be seen.
        documents: How many documents to ask about; default: as many as there are.
        alpha: Level of one test, without a correction for others.

    Returns:
        A row for each run and verdict: run, metric, documents that it was scored on, share of
        them whose value changed, margin in the metric's own unit, the verdict and what has to be
        true for it, its chance then, and how many documents have a chance of 80 %, if any.

    Raises:
        ResultsError: Nobody has results of `task`, or samples of it.
        ValueError: `documents` or `alpha` is out of range, or the margin is none of this
            metric.
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha} is not between 0 and 0.5: give 0.05, say.")
    if documents is not None and documents < 2:
        raise ValueError(f"documents={documents} are too few: give 2 or more.")
    scored = [run for run in runs if task in run.tasks() and task in base.tasks()]
    if not scored:
        raise ResultsError(
            f"{base.name} and its runs have no results of {task} in common, but of "
            f"{', '.join(base.tasks()) or 'nothing'}: evaluate some documents of it first."
        )
    found: list[list[object]] = []
    for run in scored:
        metric = dict(primary_metrics([base, run], subtasks=True)).get(task)
        pair = paired_documents(base, run, task, metric) if metric else None
        if metric is None or pair is None:
            raise ResultsError(
                f"{task} of {run.name} has no samples that make up its score: evaluate with "
                "--log_samples."
            )
        size = margin.size(*(each.scores[task, metric].value for each in (base, run)))
        if size is None:
            raise ValueError(
                f"{margin.text} is no margin for {metric} of {task}, whose score is not between 0 "
                "and 1: give a share such as 2%, or a number in the metric's own unit."
            )
        seen = len(pair[0].keys)
        power = _power(paired_test(pair), seen, size, alpha)
        changed = int((pair[0].values != pair[1].values).sum()) / seen
        n = documents or seen
        chances = power(n)
        for place, (verdict, if_true) in enumerate(
            (
                ("equivalent", "no difference"),
                ("not worse", "no difference"),
                ("better or worse", f"a difference of {margin.text}"),
            )
        ):
            row = [run.name, metric, seen, changed, size, verdict, if_true]
            found.append([*row, chances[place], documents_for(power, place, n)])
    return found


def _power(
    test: PairedTest, seen: int, size: float, alpha: float
) -> Callable[[int], tuple[float, float, float]]:
    """Return the chances by number of documents: equivalent, not worse, different by `size`."""
    of = test.distribution
    if isinstance(of, Shares):
        return lambda n: power_of_shares(of.changing, n, size, alpha)
    if test.low is None or test.high is None:
        raise ResultsError(f"Nothing can be said of other documents: {test.method}.")
    half = float(stats.t.isf(test.level / 2, test.units - 1))
    stderr = (test.high - test.low) / 2 / half

    def of_means(n: int) -> tuple[float, float, float]:
        units = max(2, round(test.units * n / seen))
        return power_of_means(stderr * math.sqrt(seen / n), units - 1, size, alpha)

    return of_means


def documents_for(
    power: Callable[[int], Sequence[float]], place: int, n: int
) -> int | None:
    """Return how many documents have a chance of `POWER`, to within 4 %, rounded up to two digits.

    Args:
        power: Chances by number of documents; about rising.
        place: Which of them.
        n: Where to start.

    Returns:
        None where no number of documents has it.
    """
    low = high = max(n, 1)
    while power(high)[place] < POWER:
        low, high = high, 2 * high
        if high > _MOST_DOCUMENTS:
            return None
    while low > 1 and power(low)[place] >= POWER:
        low, high = low // 2, low
    while high - low > max(1, high // 25):
        middle = (low + high) // 2
        low, high = (middle, high) if power(middle)[place] < POWER else (low, middle)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit


def as_table(
    found: Sequence[Sequence[object]], task: str, documents: int | None
) -> str:
    """Return the chances as a Markdown table for people."""
    titles = ["run", "metric", "documents", "changed", "margin", "verdict"]
    titles += ["if there is", "chance", "documents for 80 %"]
    forms = ("", "", "", ".1%", ".4g", "", "", ".0%", "")
    rows = [
        [
            "-" if v is None else format(v, form)
            for v, form in zip(row, forms, strict=True)
        ]
        for row in found
    ]
    asked = (
        "as many documents as there are"
        if documents is None
        else f"{documents} documents"
    )
    return (
        f"Chance of a verdict on {task} with {asked}, if as many answers change as did in these "
        "samples; one test, without a correction for others.\n\n"
        f"{markdown_table(titles, rows, 'llrrrllrr')}\n"
    )
