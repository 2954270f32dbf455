"""Margins: how far a score may differ from the base's, and which scores of a task have one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.documents import (
    CHOICE_PROB,
    KL,
    documents_of,
    scored_on,
)
from lm_eval_pruned.results.groups import primary_metrics
from lm_eval_pruned.results.metrics import is_bias, is_share, metric_of
from lm_eval_pruned.results.parts import as_mapping


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.metrics import Limits

    Key = tuple[str, str]

#: Key of a task's metadata: by metric that is judged, how much worse it may be.
MARGINS = "margins"
#: What may be claimed with a margin, by the option that asks for it.
CLAIMS = ("equivalent", "not_worse")
#: Metrics that are the probability of the right answers, which needs fewer documents than their share.
PROBABILITIES = ("mc2", CHOICE_PROB.partition(",")[0])


@dataclass(frozen=True)
class Margin:
    """How far a score may be away from that of the base.

    `claim` is ``equivalent``, neither better nor worse by the margin, or ``not_worse``; `text` is as
    the user wrote it: ``1pt``, a percentage point of a score between 0 and 1; ``2%``, a `share` of the
    base's score, which is None for others; or ``0.5``, in the metric's own unit.

    Example:
        >>> Margin("equivalent", "1pt").size(0.4, (0, 1))
        0.01
        >>> Margin("not_worse", "2%").size(20.0, None)
        0.4
    """

    claim: str
    text: str
    number: float = field(init=False, repr=False)
    unit: str = field(init=False, repr=False)
    share: float | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(pts?|%|)", str(self.text).strip())
        if not parts or not 0 < float(parts[1]) < math.inf:
            raise ValueError(
                f"{self.claim}={self.text} is not a margin: pass percentage points such as 1pt, a "
                "share of the base's score such as 2%, or a positive number in the metric's own "
                "unit."
            )
        number, unit = float(parts[1]), parts[2]
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "share", number / 100 if unit == "%" else None)

    def size(self, above: float, limits: Limits | None) -> float | None:
        """Return the margin in the metric's own unit.

        `above` is what the base scores above its floor, `limits` are those of the score. None for
        percentage points of a score that has no limits or lies beyond -1 and 1, and for a share of 0.
        """
        if self.share:
            return self.share * abs(above) or None
        if not self.unit:
            return self.number
        fits = limits is not None and max(map(abs, limits)) <= 1
        return self.number / 100 if fits else None

    def check(self, task: str, metric: str, run: Run | None = None) -> None:
        """Raise ValueError where two scores cannot differ by more: the unit was forgotten.

        `run` knows what the task declares.
        """
        metadata = run.metadata.get(task) if run else None
        if not self.unit and self.number >= 1 and is_share(task, metric, metadata):
            raise ValueError(
                f"{self.claim}={self.text} allows any difference of {task} {metric.partition(',')[0]}, "
                f"whose scores lie between 0 and 1: did you mean {str(self.text).strip()}pt?"
            )

    def times(self, factor: float) -> Margin:
        """Return a margin that is so many times as wide."""
        return replace(self, text=f"{factor * self.number:.6g}{self.unit}")

    @property
    def verdict(self) -> str:
        """What is claimed, in words."""
        return self.claim.replace("_", " ")

    def misfit(self, tasks: str) -> str:
        """Return what to say of tasks for which `size` is None."""
        return (
            f"{self.text} is not a margin for {tasks}, whose scores are not known to lie between 0 and 1: pass "
            "a share such as 2%, or a number in the metric's own unit."
        )


def with_choice_prob(run: Run, tasks: Sequence[str] = ()) -> Run:
    """Return a run with the score `CHOICE_PROB` of each task that has choices, one of which is right.

    Of `tasks`, or else of all that are no members of groups.
    """
    scores = dict(run.scores)
    for task in tasks or run.tasks(subtasks=False):
        if documents := documents_of(run, task, CHOICE_PROB):
            scores |= scored_on(run, (task, CHOICE_PROB), documents).scores
    return replace(run, scores=scores)


def judged_keys(
    base: Run,
    measure: str | None = None,
    named: Collection[str] = (),
    *,
    subtasks: bool = False,
) -> Iterator[Key]:
    """Yield what is judged of each task: `measure` where it has it, else what needs the fewest documents.

    That is a score with an exact floor, the probability of the right answer, or the score that counts;
    beside it, how far a model is biased, and the divergence from the base if it is among the `named`. Of a
    task that declares ``margins``, these metrics are judged.
    """
    for task, primary in primary_metrics([base], subtasks=subtasks):
        metrics = {
            metric.partition(",")[0]: metric
            for scored, metric in base.scores
            if scored == task and math.isfinite(base.scores[scored, metric].value)
        }
        declared = _declared(base, task)
        if measure not in metrics and declared:
            yield from ((task, metrics[name]) for name in declared if name in metrics)
            continue
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


def further_measures(base: Run, keys: Collection[Key]) -> list[Key]:
    """Return the other measures of the answers that `keys` are judged by, of which a loss can be shown.

    These have limits and logged documents, and one way is better.
    """
    tasks = {task for task, _ in keys}
    return [
        key
        for key, score in base.scores.items()
        if key[0] in tasks
        and key not in keys
        and score.higher_is_better is not None
        and math.isfinite(score.value)
        and not is_bias(key[1])
        and metric_of(*key, base.metadata.get(key[0])).limits
        and documents_of(base, *key)
    ]


def usual_margin(run: Run, key: Key) -> str:
    """Return how much worse a score may be by default: what the task declares; with an exact floor, 95 % are kept.

    Less than 15 points of a bias take more than the 40 questions of the demo, once one answer changes.
    """
    if text := _declared(run, key[0]).get(key[1].partition(",")[0]):
        return str(text)
    if run.exact_floor(*key) is not None:
        return "5%"
    if is_bias(key[1]):
        return "15pt"
    return "2pt" if is_share(*key, run.metadata.get(key[0])) else "2%"


def _declared(run: Run, task: str) -> Mapping[str, Any]:
    """Return the margins that a task declares, by the name of the metric."""
    return as_mapping(run.metadata.get(task, {}).get(MARGINS))


def check_measure(measure: str | None, metrics: Iterable[str]) -> None:
    """Raise ValueError for a measure that no task of a verdict has; `metrics` are those of all tasks."""
    names = sorted({metric.partition(",")[0] for metric in metrics})
    if measure and names and measure not in names:
        raise ValueError(
            f"--measure {measure} is a metric of no task of this verdict: name one of "
            f"{', '.join(names)}."
        )
