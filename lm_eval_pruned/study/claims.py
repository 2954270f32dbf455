"""The claims of arXiv 2512.22671, of its first and its third version, beside what a study shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lm_eval_pruned.results.groups import KNOWLEDGE, SIDES, TEXT, is_perplexity
from lm_eval_pruned.study.findings import against_text, size_of, way_text
from lm_eval_pruned.study.sides import (
    FALLS,
    KEEPS,
    OVER_TASKS,
    RISES,
    UNKNOWN,
    first_in,
    state_at,
)
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_eval_pruned.study.findings import Findings, TaskFinding

INSTRUCTIONS, REASONING, TRUTH = "instruction_following", "reasoning", "truthfulness"


class Claim(NamedTuple):
    """A claim of `versions` of the paper; `shown` is ``yes``, ``no``, ``in part`` or ``cannot tell``."""

    claim: str
    versions: str
    shown: str
    evidence: str


def claims_table(findings: Findings) -> Table:
    """Return the claims, each with what a study shows of it, and why."""
    rows = [
        *_of_sides(findings),
        *_of_sizes(findings),
        *_of_criteria(findings),
        *_of_cost(findings),
    ]
    columns = (
        Column("claim", lambda claim: claim.claim),
        Column("paper", lambda claim: claim.versions),
        Column("shown here", lambda claim: claim.shown),
        Column("evidence", lambda claim: claim.evidence),
    )
    return Table("Claims of the paper", columns, rows)


def _answer(state: str, *claimed: str) -> str:
    return UNKNOWN if state == UNKNOWN else "yes" if state in claimed else "no"


def _of_sides(findings: Findings) -> Iterator[Claim]:
    claimed = {
        "knowledge falls": ("v1, v3", KNOWLEDGE, FALLS),
        "language modelling falls": ("v1, v3", TEXT, FALLS),
        "instruction following improves": ("v1", INSTRUCTIONS, RISES),
        "multi-step reasoning (MUSR) is robust": ("v1, v3", REASONING, KEEPS, RISES),
    }
    for claim, (versions, of, *states) in claimed.items():
        answer = _answer(findings.state(of), *states)
        yield Claim(claim, versions, answer, findings.text(of))
    texts = [findings.text(TRUTH), *_correlations(findings)]
    answer = _answer(findings.state(TRUTH), RISES)
    if answer == "yes" and findings.state(KNOWLEDGE) != FALLS:
        answer = UNKNOWN
    claim = "truthfulness improves as knowledge falls"
    yield Claim(claim, "v1", answer, "; ".join(texts))


def _correlations(findings: Findings) -> Iterator[str]:
    """Yield Pearson's r of each task of truthfulness with each of knowledge, over the sizes."""
    knowledge = {task.task for task in findings.on(KNOWLEDGE)}
    truth = {task.task for task in findings.on(TRUTH)}
    for pair in findings.comparison.correlations:
        one, other = (task for task, _ in pair.tasks)
        between = {one, other} & knowledge and {one, other} & truth
        if between and pair.correlation.pearson is not None:
            r, n = pair.correlation.pearson, pair.correlation.n
            yield f"{one} and {other}: r = {r:.3f} over {n} sizes"


def _of_sizes(findings: Findings) -> Iterator[Claim]:
    names, states, texts = findings.at_equilibrium, [], []
    for task in findings.tasks:
        if task.family.name == INSTRUCTIONS:
            for row in (row for row in task.rows if row.run in names):
                states.append(state_at(row, task.can_fall))
                change = f"{row.base_score:.3f} to {row.score:.3f}"
                texts.append(f"{task.task} {states[-1]}: {change}, floor {task.level}")
    why = "; ".join(texts) or "not evaluated"
    claim = "instruction following improves at the expansion ratio 2.4"
    yield Claim(claim, "v3", _answer(first_in(OVER_TASKS, states), RISES), why)
    fits = [(task, *_fit(findings, task)) for task in findings.on(KNOWLEDGE, TEXT)]
    answers = [answer for _, answer, _ in fits]
    every = "no" if "no" in answers else UNKNOWN if UNKNOWN in answers else "yes"
    why = "; ".join(f"{task.task} {text}" for task, _, text in fits)
    claim = "the decline can be predicted from the size"
    yield Claim(
        claim, "v1, v3", every if fits else UNKNOWN, why or "no task can show it"
    )


def _fit(findings: Findings, task: TaskFinding) -> tuple[str, str]:
    """Return whether a line through the other sizes predicts each size between them, and how well.

    It does within the margin of the study; it does not where it misses by more, and misses the
    interval of the difference.
    """
    trends = (
        trend
        for trend in findings.comparison.trends
        if (trend.task, trend.metric) == (task.task, task.metric)
    )
    known = next(trends, None)
    if known is None or known.q is None or known.q >= findings.comparison.alpha:
        return UNKNOWN, "shows no trend over three or more sizes"
    up = findings.base.scores[task.task, task.metric].higher_is_better
    if (known.trend.slope > 0) != bool(up):
        return "no", "does not decline"
    ratios = [run.expansion_ratio or 0.0 for run in (findings.base, *findings.cuts)]
    scores = np.array([task.rows[0].base_score, *(row.score for row in task.rows)])
    logs = is_perplexity(task.metric)
    heights = np.log(scores) if logs else scores
    worst, missed, answer = 0.0, 0.0, "yes"
    for place, row in enumerate(task.rows[:-1], 1):
        others = np.delete(np.arange(len(scores)), place)
        line = np.polyfit(np.array(ratios)[others], heights[others], 1)
        at = float(np.polyval(line, ratios[place]))
        predicted = float(np.exp(at)) if logs else at
        error, margin = abs(predicted - row.score), findings.comparison.margin
        if error >= worst:
            worst, missed = error, size_of(findings.cuts[place - 1])
        if margin and error > (margin.size(row.base_score, row.score) or 0):
            change = predicted - row.base_score
            ends = row.low, row.high
            inside = ends[0] is None or ends[1] is None or ends[0] <= change <= ends[1]
            answer = "no" if not inside or answer == "no" else UNKNOWN
    return answer, f"is missed by {worst:.3f} at {missed:g} %"


def _of_criteria(findings: Findings) -> Iterator[Claim]:
    counted = {task.task for task in findings.on(*SIDES[:-1])}
    answers = {(True, False): "yes", (False, True): "no", (True, True): "in part"}
    for way in (way for way in findings.beside if not way.startswith("recipe=")):
        seen = set().union(
            *(shown for task, shown in findings.against[way].items() if task in counted)
        )
        claim = f"`{findings.criterion}` keeps more than {way_text(way)}"
        shown = answers.get(("better" in seen, "worse" in seen), UNKNOWN)
        yield Claim(claim, "v3", shown, against_text(findings, way))


def _of_cost(findings: Findings) -> Iterator[Claim]:
    claimed = {
        "less energy per token": ("joules_per_output_token", "lower"),
        "a single request takes longer": ("seconds_end_to_end", "higher"),
    }
    ratios = {
        m["name"]: m["expansion_ratio"] for m in findings.profile.get("models", ())
    }
    for claim, (metric, direction) in claimed.items():
        changes = {
            ratios[cell["model"]]: cell["deltas"][metric]
            for cell in findings.profile.get("cells", ())
            if cell["mode"] == "fixed" and metric in cell["deltas"]
            if cell["batch_size"] == 1
        }
        shown = {change["verdict"] for change in changes.values()} & {"lower", "higher"}
        answer = UNKNOWN if not shown else "yes" if shown == {direction} else "no"
        parts = [
            f"{change['percent']:+.1f} % at {ratio:.2f}{_interval(change)}"
            for ratio, change in changes.items()
        ]
        why = ", ".join(parts) or "not measured"
        yield Claim(claim, "v1", answer, f"one request of a fixed length: {why}")


def _interval(change: Mapping[str, Any]) -> str:
    if change["low"] is None:
        return ""
    return f" [{change['low']:+.1f}, {change['high']:+.1f}]"
