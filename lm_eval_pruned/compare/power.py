"""``lm-eval-pruned power``: whether a comparison can reach a verdict, before it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scipy import stats

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    paired_documents,
    paired_test,
)
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.series import primary_metrics
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_eval_pruned.compare.margins import Margin


@dataclass(frozen=True)
class Chance:
    """The chance of one verdict.

    Attributes:
        verdict: What would be said.
        if_true: What has to be true for it.
        power: Chance that it is said then, at the number of documents that was asked about.
        documents: How many documents have a chance of 80 %; None where none do.
    """

    verdict: str
    if_true: str
    power: float
    documents: int | None


@dataclass(frozen=True)
class Power:
    """What a comparison of one run with the base can show.

    Attributes:
        run: Name of the run.
        metric: The metric.
        documents: Documents that it was scored on.
        changed: Share of the documents whose value changed.
        margin: The margin in the metric's own unit.
        chances: One for each verdict.
    """

    run: str
    metric: str
    documents: int
    changed: float
    margin: float
    chances: tuple[Chance, ...]


def power_of(
    base: Run,
    runs: Sequence[Run],
    task: str,
    margin: Margin,
    *,
    documents: int | None = None,
    alpha: float = 0.05,
) -> list[Power]:
    """Say how likely each run reaches a verdict, from the answers that changed so far.

    Args:
        base: The unpruned model.
        runs: What is compared with it.
        task: The task, whose primary metric counts.
        margin: What is to be shown; its size also stands for the difference to be seen.
        documents: How many documents to ask about; default: as many as there are.
        alpha: Level of one test, without a correction for others.

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
    read = DocumentReader()
    return [_power(base, run, task, margin, documents, alpha, read) for run in scored]


def _power(
    base: Run,
    run: Run,
    task: str,
    margin: Margin,
    documents: int | None,
    alpha: float,
    read: DocumentReader,
) -> Power:
    metric = next(
        (
            name
            for of, name in primary_metrics([base, run], subtasks=True)
            if of == task
        ),
        None,
    )
    pair = paired_documents(base, run, task, metric, read) if metric else None
    if metric is None or pair is None:
        raise ResultsError(
            f"{task} of {run.name} has no samples that make up its score: evaluate with "
            "--log_samples."
        )
    before, after = pair
    size = margin.size(base.scores[task, metric].value, run.scores[task, metric].value)
    if size is None:
        raise ValueError(
            f"{margin.text} is no margin for {metric} of {task}, whose score is not between 0 and "
            "1: give a share such as 2%, or a number in the metric's own unit."
        )
    test = paired_test(pair)
    seen = len(before.keys)
    n = documents or seen
    changed = int((before.values != after.values).sum())
    said = (
        ("equivalent", "no difference"),
        ("not worse", "no difference"),
        ("better or worse", f"a difference of {margin.text}"),
    )
    chances = tuple(
        Chance(*words, power(n), statistics.documents_for(power, n))
        for words, power in zip(
            said, _powers(test, changed, seen, size, alpha), strict=True
        )
    )
    return Power(run.name, metric, seen, changed / seen, size, chances)


def _powers(
    test: statistics.PairedTest, changed: int, seen: int, size: float, alpha: float
) -> tuple[Callable[[int], float], ...]:
    """Return the power by number of documents: equivalent, not worse, different by `size`."""
    if test.method.startswith("McNemar"):
        # As `PairedTest.smallest_detectable` does: no answer changed of few says little.
        share = (changed + 0.5) / (seen + 1)

        def of_shares(both_sides: bool) -> Callable[[int], float]:
            return lambda n: statistics.claim_power_of_shares(
                share, n, size, alpha, both_sides=both_sides
            )

        return (
            of_shares(True),
            of_shares(False),
            lambda n: statistics.difference_power_of_shares(share, n, size, alpha),
        )
    if test.low is None or test.high is None:
        raise ResultsError(f"Nothing can be said of other documents: {test.method}.")
    half = float(stats.t.isf(test.level / 2, test.units - 1))
    stderr = (test.high - test.low) / 2 / half

    def at(n: int) -> tuple[float, int]:
        units = max(2, round(test.units * n / seen))
        return stderr * math.sqrt(seen / n), units - 1

    def of_means(both_sides: bool) -> Callable[[int], float]:
        return lambda n: statistics.claim_power_of_means(
            *at(n), size, alpha, both_sides=both_sides
        )

    return (
        of_means(True),
        of_means(False),
        lambda n: statistics.difference_power_of_means(*at(n), size, alpha),
    )


def as_table(found: Sequence[Power], task: str, documents: int | None) -> str:
    """Return the chances as a Markdown table for people."""
    rows = [
        [
            each.run,
            each.metric,
            each.documents,
            f"{each.changed:.1%}",
            f"{each.margin:.4g}",
            chance.verdict,
            chance.if_true,
            f"{chance.power:.0%}",
            chance.documents or "-",
        ]
        for each in found
        for chance in each.chances
    ]
    asked = (
        "as many documents as there are"
        if documents is None
        else f"{documents} documents"
    )
    return (
        f"Chance of a verdict on {task} with {asked}, if as many answers change as did in these "
        "samples; one test, without a correction for others.\n\n"
        + markdown_table(
            [
                "run",
                "metric",
                "documents",
                "changed",
                "margin",
                "verdict",
                "if there is",
            ]
            + ["chance", "documents for 80 %"],
            rows,
            "llrrrllrr",
        )
        + "\n"
    )
