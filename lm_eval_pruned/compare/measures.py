"""Which scores of a task decide whether a model may replace another, and by how much they may be worse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from lm_eval_pruned.results.documents import CHOICE_PROB, KL
from lm_eval_pruned.results.files import Run, Score
from lm_eval_pruned.results.groups import is_bias, is_share, primary_metrics


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from lm_eval_pruned.compare.pairing import Reader

    Key = tuple[str, str]

#: Metrics that are the probability of the right answers, which needs fewer documents than their share.
PROBABILITIES = ("mc2", CHOICE_PROB.partition(",")[0])


def with_choice_prob(run: Run, read: Reader, tasks: Sequence[str] = ()) -> Run:
    """Return a run with the score `CHOICE_PROB` of each task that has choices, one of which is right.

    Of `tasks`, or else of all that are no members of groups.
    """
    scores = {}
    for task in tasks or run.tasks(subtasks=False):
        if documents := read(run, task, CHOICE_PROB):
            mean = float(documents.values.mean())
            scores[task, CHOICE_PROB] = Score(mean, None, True, len(documents.values))
    return replace(run, scores={**run.scores, **scores})


def judged_keys(
    base: Run,
    measure: str | None = None,
    named: Collection[str] = (),
    *,
    subtasks: bool = False,
) -> Iterator[Key]:
    """Yield what is judged of each task: `measure` where it has it, else what decides soonest.

    That is a score with an exact floor, the probability of the right answer, or the score that counts;
    beside it, how far a model is biased, and the divergence from the base if it is among the `named`.
    """
    for task, primary in primary_metrics([base], subtasks=subtasks):
        metrics = {
            name.partition(",")[0]: name
            for of, name in base.scores
            if of == task and math.isfinite(base.scores[of, name].value)
        }
        beside = [
            name for name in metrics.values() if is_bias(name) and name != primary
        ]
        # CrowS-Pairs lists first how far two sentences are apart, whichever is likelier.
        apart = beside and primary.startswith("likelihood_diff")
        soonest = [] if base.exact_floor(task, primary) is not None else PROBABILITIES
        wanted = (metrics[name] for name in (measure, *soonest) if name in metrics)
        first = primary if is_bias(primary) else next(wanted, primary)
        if KL.partition(",")[0] in named and KL in metrics.values() and first != KL:
            beside.append(KL)
        yield from ((task, metric) for metric in [*[first] * (not apart), *beside])


def usual_margin(run: Run, key: Key, *scores: float) -> str:
    """Return how much worse a score may be by default: of one with an exact floor, 95 % are kept.

    `scores` are those of the models, as far as they are known. Less than 15 points of a bias take more
    than the 40 questions of the demo, once one answer changes.
    """
    if run.exact_floor(*key) is not None:
        return "5%"
    if is_bias(key[1]):
        return "15pt"
    return "2pt" if is_share(key[1], scores) else "2%"


def check_measure(measure: str | None, metrics: Iterable[str]) -> None:
    """Raise ValueError for a measure that no task of a verdict has; `metrics` are those of all tasks."""
    names = sorted({metric.partition(",")[0] for metric in metrics})
    if measure and names and measure not in names:
        raise ValueError(
            f"--measure {measure} is a metric of no task of this verdict: name one of "
            f"{', '.join(names)}."
        )
