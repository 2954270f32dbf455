"""The claims of arXiv 2512.22671, of its first and its third version, beside what a study shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lm_eval_pruned.report.page import Table
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


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.study.findings import Findings, TaskFinding

INSTRUCTIONS, REASONING, TRUTH = "instruction_following", "reasoning", "truthfulness"


class Claim(NamedTuple):
    """A claim of `versions` of the paper; `shown` is ``yes``, ``no``, ``in part`` or ``cannot tell``."""

    claim: str
    versions: str
    shown: str
    evidence: str


def claims_table(found: Findings) -> Table:
    """Return the claims, each with what a study shows of it, and why."""
    rows = [
        *_of_sides(found),
        *_of_sizes(found),
        *_of_criteria(found),
        *_of_cost(found),
    ]
    columns = ["claim", "paper", "shown here", "evidence"]
    return Table("Claims of the paper", columns, rows, text=4)


def _answer(state: str, *claimed: str) -> str:
    return UNKNOWN if state == UNKNOWN else "yes" if state in claimed else "no"


def _of_sides(found: Findings) -> Iterator[Claim]:
    claimed = {
        "knowledge falls": ("v1, v3", KNOWLEDGE, FALLS),
        "language modelling falls": ("v1, v3", TEXT, FALLS),
        "instruction following improves": ("v1", INSTRUCTIONS, RISES),
        "multi-step reasoning (MUSR) is robust": ("v1, v3", REASONING, KEEPS, RISES),
    }
    for claim, (versions, of, *states) in claimed.items():
        answer = _answer(found.state(of), *states)
        yield Claim(claim, versions, answer, found.text(of))
    texts = [found.text(TRUTH), *_correlations(found)]
    answer = _answer(found.state(TRUTH), RISES)
    if answer == "yes" and found.state(KNOWLEDGE) != FALLS:
        answer = UNKNOWN
    claim = "truthfulness improves as knowledge falls"
    yield Claim(claim, "v1", answer, "; ".join(texts))


def _correlations(found: Findings) -> Iterator[str]:
    """Yield Pearson's r of each task of truthfulness with each of knowledge, over the sizes."""
    knowledge = {task.task for task in found.on(KNOWLEDGE)}
    truth = {task.task for task in found.on(TRUTH)}
    for pair in found.comparison.correlations:
        one, other = (task for task, _ in pair.tasks)
        between = {one, other} & knowledge and {one, other} & truth
        if between and pair.correlation.pearson is not None:
            r, n = pair.correlation.pearson, pair.correlation.n
            yield f"{one} and {other}: r = {r:.3f} over {n} sizes"


def _of_sizes(found: Findings) -> Iterator[Claim]:
    names, states, texts = found.at_equilibrium, [], []
    for task in found.tasks:
        if task.family.name == INSTRUCTIONS:
            for row in (row for row in task.rows if row.run in names):
                states.append(state_at(row, task.can_fall))
                change = f"{row.base_score:.3f} to {row.score:.3f}"
                texts.append(f"{task.task} {states[-1]}: {change}, floor {task.level}")
    why = "; ".join(texts) or "not evaluated"
    claim = "instruction following improves at the expansion ratio 2.4"
    yield Claim(claim, "v3", _answer(first_in(OVER_TASKS, states), RISES), why)
    fits = [(each, *_fit(found, each)) for each in found.on(KNOWLEDGE, TEXT)]
    answers = [answer for _, answer, _ in fits]
    every = "no" if "no" in answers else UNKNOWN if UNKNOWN in answers else "yes"
    why = "; ".join(f"{task.task} {text}" for task, _, text in fits)
    claim = "the decline can be predicted from the size"
    yield Claim(
        claim, "v1, v3", every if fits else UNKNOWN, why or "no task can show it"
    )


def _fit(found: Findings, task: TaskFinding) -> tuple[str, str]:
    """Return whether a line through the other sizes predicts each size between them, and how well.

    It does within the margin of the study; it does not where it misses by more, and misses the
    interval of the difference.
    """
    of = (each for each in found.comparison.trends if each.task == task.task)
    known = next((each for each in of if each.metric == task.metric), None)
    if known is None or known.q is None or known.q >= found.comparison.alpha:
        return UNKNOWN, "shows no trend over three or more sizes"
    up = found.base.scores[task.task, task.metric].higher_is_better
    if (known.trend.slope > 0) != bool(up):
        return "no", "does not decline"
    ratios = [found.base.expansion_ratio, *(run.expansion_ratio for run in found.cuts)]
    scores = np.array([task.rows[0].base_score, *(row.score for row in task.rows)])
    logs = is_perplexity(task.metric)
    heights = np.log(scores) if logs else scores
    worst, missed, answer = 0.0, 0.0, "yes"
    for place, row in enumerate(task.rows[:-1], 1):
        others = np.delete(np.arange(len(scores)), place)
        line = np.polyfit(np.array(ratios, float)[others], heights[others], 1)
        at = float(np.polyval(line, ratios[place]))
        predicted = float(np.exp(at)) if logs else at
        error, margin = abs(predicted - row.score), found.comparison.margin
        if error >= worst:
            worst, missed = error, size_of(found.cuts[place - 1])
        if margin and error > (margin.size(row.base_score, row.score) or 0):
            change = predicted - row.base_score
            inside = None in (row.low, row.high) or row.low <= change <= row.high
            answer = "no" if not inside or answer == "no" else UNKNOWN
    return answer, f"is missed by {worst:.3f} at {missed:g} %"


def _of_criteria(found: Findings) -> Iterator[Claim]:
    counted = {task.task for task in found.on(*SIDES[:-1])}
    answers = {(True, False): "yes", (False, True): "no", (True, True): "in part"}
    for way in (way for way in found.beside if not way.startswith("recipe=")):
        of = found.against[way].items()
        seen = {verdict for task, shown in of if task in counted for verdict in shown}
        claim = f"`{found.criterion}` keeps more than {way_text(way)}"
        shown = answers.get(("better" in seen, "worse" in seen), UNKNOWN)
        yield Claim(claim, "v3", shown, against_text(found, way))


def _of_cost(found: Findings) -> Iterator[Claim]:
    claimed = {
        "less energy per token": ("joules_per_output_token", "lower"),
        "a single request takes longer": ("seconds_end_to_end", "higher"),
    }
    ratios = {m["name"]: m["expansion_ratio"] for m in found.profile.get("models", ())}
    for claim, (metric, direction) in claimed.items():
        changes = {
            ratios[cell["model"]]: cell["deltas"][metric]
            for cell in found.profile.get("cells", ())
            if cell["mode"] == "fixed" and metric in cell["deltas"]
            if cell["batch_size"] == 1
        }
        shown = {change["verdict"] for change in changes.values()} & {"lower", "higher"}
        answer = UNKNOWN if not shown else "yes" if shown == {direction} else "no"
        parts = [
            f"{of['percent']:+.1f} % at {ratio:.2f}"
            + f" [{of['low']:+.1f}, {of['high']:+.1f}]" * (of["low"] is not None)
            for ratio, of in changes.items()
        ]
        why = ", ".join(parts) or "not measured"
        yield Claim(claim, "v1", answer, f"one request of a fixed length: {why}")
