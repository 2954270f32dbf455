"""The points of a report's figure: each task at each size, by several measures and costs."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison_table import (
    documents_text,
    interval_text,
    number_text,
    p_text,
)
from lm_eval_pruned.results.files import as_mapping, finite_or_none
from lm_eval_pruned.results.groups import FAMILIES, family_of, is_share, primary_metrics


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.results.documents import Levels
    from lm_eval_pruned.results.files import Run

SIGNIFICANT, NOT_SHOWN, NOT_TESTED, UNPRUNED = MARKS = (
    "significant",
    "no difference shown",
    "not tested",
    "unpruned",
)
#: The shape of a point whose unit stopped before its last document.
PARTIAL = "partial"
#: What may stand on the horizontal axis, by key in the points.
AXES = {
    "ratio": "expansion ratio (intermediate size / hidden size)",
    "parameters": "parameters (millions)",
    "joules": "energy per processed token (J)",
    "milliseconds": "wall time per generated token (ms)",
}
#: What may stand on the vertical one.
MEASURES = {
    "relative": "relative to unpruned",
    "raw": "score",
    "above_chance": "(score \u2212 chance) / (unpruned \u2212 chance)",
}
#: A score that is less above chance than this many of its standard errors has nothing to lose.
_ABOVE = 2


@dataclass(frozen=True)
class Curves:
    """What is drawn of one series of sizes.

    Attributes:
        points: One mapping for each task and size: what it is of, its place on each of
            `AXES` (None where it was not measured) and by each of `MEASURES`, with ``_low``
            and ``_high`` of the interval, and what a reader is told who points at it.
        levels: One for each task and level that is known: ``kind`` is chance or majority.
        notes: What is not drawn, and why.
    """

    points: list[dict[str, Any]]
    levels: list[dict[str, Any]]
    notes: list[str]

    def axes(self) -> list[str]:
        """Return the axes on which there is more than one place."""
        places = {axis: {point[axis] for point in self.points} for axis in AXES}
        return [axis for axis, found in places.items() if len(found - {None}) > 1]

    def partial(self) -> bool:
        """Return whether a unit stopped before its last document."""
        return any(point["shape"] == PARTIAL for point in self.points)

    def families(self) -> list[str]:
        """Return the families that have points, in the order of legends."""
        here = {point["family"] for point in self.points}
        return [family.name for family in FAMILIES if family.name in here]


def curves_of(
    members: Sequence[Run],
    base: Run,
    comparison: Comparison,
    levels: Mapping[tuple[str, str], Levels],
) -> Curves:
    """Return the points of one series.

    Args:
        members: The sizes, from the unpruned model down.
        base: The unpruned model.
        comparison: Of the sizes with it.
        levels: Chance and majority by task and metric.
    """
    found = {(row.run, row.task, row.metric): row for row in comparison.rows}
    costs = _costs(members)
    points, drawn, notes = [], [], []
    for task, metric in primary_metrics([base]):
        scores = {
            run.name: run.scores[task, metric].value
            for run in members
            if (task, metric) in run.scores
            and math.isfinite(run.scores[task, metric].value)
        }
        if len(scores) < 2:
            continue
        known = levels.get((task, metric))
        measures, missing = _measures(base, task, metric, scores, known)
        notes += missing
        share = is_share(metric, scores.values())
        family = family_of(task)
        about = {
            "task": task,
            "family": family.name,
            "side": family.side,
            "unit": "%" if share else metric.removesuffix(",none"),
        }
        for run in members:
            if run.name not in scores:
                continue
            row = found.get((run.name, task, metric))
            value = scores[run.name]
            # Of a unit that stopped, both scores are of the documents that it used.
            reference = row.base_score if row else base.scores[task, metric].value
            ends = _ends(run is base, reference, row, share)
            point: dict[str, Any] = {**about, **costs[run.name]}
            for name, scale in measures.items():
                place = finite_or_none(scale(reference, value))
                if place is None:
                    continue
                within = [
                    finite_or_none(None if end is None else scale(reference, end))
                    for end in ends
                ]
                point[name] = place
                low, high = within
                if low is not None and high is not None:
                    point |= {
                        f"{name}_low": min(low, high),
                        f"{name}_high": max(low, high),
                    }
            points.append(
                point | _told(run, base, metric, value, row, comparison.alpha)
            )
        for kind in ("chance", "majority"):
            level = getattr(known, kind, None)
            if level is not None and share:
                places = {
                    name: scale(base.scores[task, metric].value, level)
                    for name, scale in measures.items()
                    if name != "above_chance"
                }
                drawn.append(about | {"kind": kind} | places)
    return Curves(points, drawn, list(dict.fromkeys(notes)))


def _measures(
    base: Run,
    task: str,
    metric: str,
    scores: Mapping[str, float],
    levels: Levels | None,
) -> tuple[dict[str, Callable[[float, float], float | None]], list[str]]:
    """Return the scales on which a task can be drawn, and why it cannot be on others.

    A scale takes the unpruned model's score and the one that is placed.
    """
    score = base.scores[task, metric]
    falls = score.higher_is_better is False
    factor = 100 if is_share(metric, scores.values()) else 1
    measures: dict[str, Callable[[float, float], float | None]] = {
        "raw": lambda _, value: factor * value
    }
    notes = []
    if score.value:
        measures["relative"] = lambda base, value: _share(base, value, falls)
    else:
        notes.append(
            f"{task} is not drawn relative to the unpruned model, which scores 0: no other score "
            "is a share of that."
        )
    chance = levels.chance if levels else None
    if chance is not None and not falls:
        above = score.value - chance
        if above > _ABOVE * (score.stderr or 0) and above > 0:
            measures["above_chance"] = lambda base, value: (
                100 * (value - chance) / (base - chance) if base > chance else None
            )
        else:
            notes.append(
                f"{task} is not drawn above chance: the unpruned model scores {score.value:.1%} "
                f"where guessing scores {chance:.1%}. What is above chance is less than two standard "
                "errors, too little to take shares of."
            )
    return measures, notes


def _share(base: float, score: float, falls: bool) -> float | None:
    """Return a score in percent of another; where less is better the other way round."""
    one, other = (score, base) if falls else (base, score)
    share = 100 * other / one if one else None
    return share if share is not None and math.isfinite(share) and share >= 0 else None


def _ends(
    is_base: bool, base: float, row: Difference | None, share: bool
) -> tuple[float | None, float | None]:
    """Return the interval of a score: what the paired test leaves of its difference."""
    if is_base:
        return base, base
    if row is None or row.low is None or row.high is None:
        return None, None
    low, high = base + row.low, base + row.high
    # The interval of a difference may reach beyond what a share can be.
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


def _told(
    run: Run,
    base: Run,
    metric: str,
    value: float,
    row: Difference | None,
    alpha: float,
) -> dict[str, str]:
    """Return what a reader is told of one point, under the names that they read."""
    mark = UNPRUNED if run is base else NOT_TESTED
    if row is not None and row.q is not None:
        mark = NOT_SHOWN if row.verdict == "not shown" else SIGNIFICANT
    documents = base.scores[row.task, metric].documents if row else None
    stopped = row is not None and row.of is not None and mark != NOT_TESTED
    told = {
        "mark": mark,
        "shape": PARTIAL if stopped else mark,
        "configuration": run.name,
        "metric": metric.removesuffix(",none"),
        "score": f"{value:.4g}",
    }
    if row is not None:
        told |= {
            "difference": f"{row.difference:+.4g}",
            "interval": interval_text(row.low, row.high, 4),
            "q": p_text(row.q),
            "detectable": number_text(row.smallest_detectable, ".4f"),
            "n": documents_text(replace(row, documents=row.documents or documents)),
        }
    return told


def _costs(members: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Return the place of each run on each axis; measured ones over what all runs measured."""
    logs = {run.name: _logged(run) for run in members}
    shared = set.intersection(*(set(each) for each in logs.values()))
    costs: dict[str, dict[str, float | None]] = {}
    for run in members:
        sums: dict[str, float] = defaultdict(float)
        for key in shared:
            amount, by = logs[run.name][key]
            sums[key[-1]] += amount
            sums[f"per {key[-1]}"] += by
        parameters = finite_or_none(run.pruning.get("parameters_after"))
        costs[run.name] = {
            "ratio": run.expansion_ratio,
            "parameters": parameters and parameters / 1e6,
        }
        for cost in ("joules", "milliseconds"):
            by = sums[f"per {cost}"]
            costs[run.name][cost] = sums[cost] / by if by else None
    return costs


def _logged(run: Run) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Return amounts and tokens that a meter logged, by tasks, kind of request and cost."""
    found = {}
    for tasks, block in run.energy.items():
        for kind, record in as_mapping(block.get("request_types")).items():
            record = as_mapping(record)
            joules = finite_or_none(as_mapping(record.get("joules")).get("total"))
            per_token = finite_or_none(record.get("joules_per_processed_token"))
            seconds = finite_or_none(record.get("seconds"))
            generated = finite_or_none(record.get("generated_tokens"))
            if joules and per_token:
                found[tasks, kind, "joules"] = joules, joules / per_token
            if seconds and generated:
                found[tasks, kind, "milliseconds"] = 1000 * seconds, generated
    return found
