"""How the report of a study begins: verdict, claims of the paper, its scores, what is left open.

The claims are those of arXiv 2512.22671, of its first and its third version.
"""

from __future__ import annotations

import csv
import math
from fractions import Fraction
from importlib.resources import files
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lm_eval_pruned.compare.answer import FALLS, KEEPS, RISES, UNKNOWN
from lm_eval_pruned.report.page import Section
from lm_eval_pruned.results.groups import (
    KNOWLEDGE,
    SIDES,
    TEXT,
    series_name,
)
from lm_eval_pruned.results.metrics import is_perplexity
from lm_eval_pruned.study.findings import OVER_TASKS, first_in
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from lm_eval_pruned.study.findings import Findings, TaskFinding

#: The expansion ratio at which arXiv 2512.22671 (v3) sees its gain.
EQUILIBRIUM = Fraction("2.4")
CLAIMS = (
    Column("claim", attrgetter("claim")),
    Column("paper", attrgetter("versions")),
    Column("shown here", attrgetter("shown")),
    Column("evidence", attrgetter("evidence")),
)


def study_sections(name: str, findings: Findings) -> list[Section]:
    """Return the sections of a study of the model with this name."""
    claims = Table("Claims of the paper", CLAIMS, claims_of(findings))
    published = published_of(name, [task.task for task in findings.tasks])
    scores = Section(published.label, ["Without documents, so not tested."], published)
    costs = [("Energy and latency", "../profile/profile.md")] * bool(findings.profile)
    return [
        Section("Verdict of the study", [" ".join(sentences(name, findings))]),
        Section(claims.label, table=claims, links=costs),
        *[scores] * bool(published.rows),
        Section("Limits of the study", notes=open_questions(findings)),
    ]


def sentences(name: str, findings: Findings) -> list[str]:
    """Return what was found: the verdict, its rule, and the criterion against the other cuts."""
    shown = "; ".join(states_text(findings, side) for side in SIDES[:-1])
    margin = findings.comparison.margin
    rule = (
        f"A task keeps its score where it is shown to lie within {margin and margin.text} of the "
        "unpruned model's at every size; what is not shown counts for nothing."
    )
    return [
        f"For {name} the dichotomy {findings.verdict}. {shown[0].upper()}{shown[1:]}.",
        rule,
        *(
            f"Compared with {way_text(way)} of the same size, {against_text(tasks)}."
            for way, tasks in findings.against.items()
        ),
    ]


def published_of(model: str, tasks: list[str]) -> Table:
    """Return the scores that the study published of a model on these tasks, by percentage."""
    text = files(__package__).joinpath("study_benchmarks.csv").read_text("utf-8")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in csv.DictReader(text.splitlines()):
        if row["base_model"] == model and row["task"] in tasks:
            key, size = (row["task"], row["metric"]), f"{row['prune_percent']} %"
            scores = rows.setdefault(key, {"task": key[0], "metric": key[1]})
            scores[size] = f"{float(row['value']):.3f}"
    titles = dict.fromkeys(title for scores in rows.values() for title in scores)
    columns = [
        Column(title, methodcaller("get", title), ">" * title.endswith("%"))
        for title in titles
    ]
    return Table("Scores that the study published", columns, [*rows.values()])


def open_questions(findings: Findings) -> list[str]:
    """Return what the results leave open, a sentence each."""
    low = [task for task in findings.tasks if task.floor and not task.can_fall]
    unknown = [
        task.task for task in findings.tasks if not task.floor and not task.can_fall
    ]
    alone = [task.task for task in findings.tasks if task.family.side == SIDES[-1]]
    texts = {
        f"No floor is known for {joined(unknown)}.": unknown,
        f"On no side: {joined(alone)}. Name their families, as in `--families "
        f"{''.join(alone[:1])}=knowledge`.": alone,
        "Each task is cut to its first documents (limit), too few for small differences.": (
            findings.base.config.get("limit")
        ),
        "Chance is estimated from random cuts of each size, one for each seed: "
        f"{findings.draws}.": findings.draws,
    }
    return [
        *(
            f"{task.task} cannot show a loss: unpruned, it is not shown to be above {task.level}."
            for task in low
        ),
        *(text for text, applies in texts.items() if applies),
    ]


INSTRUCTIONS, REASONING, TRUTH = "instruction_following", "reasoning", "truthfulness"
#: Claims on a side or a family: the versions of the paper, of what, and the states that show it.
ON_SIDES = {
    "knowledge falls": ("v1, v3", KNOWLEDGE, [FALLS]),
    "language modelling falls": ("v1, v3", TEXT, [FALLS]),
    "instruction following improves": ("v1", INSTRUCTIONS, [RISES]),
    "multi-step reasoning (MUSR) is robust": ("v1, v3", REASONING, [KEEPS, RISES]),
}
#: Claims on one request of a fixed length: the figure of a profile, and which way it goes.
ON_COSTS = {
    "less energy per token": ("joules_per_output_token", "lower"),
    "a single request takes longer": ("seconds_end_to_end", "higher"),
}
#: What verdicts on tasks, whether one is better and whether one is worse, show of a claim.
_BETTER_WORSE = {(True, False): "yes", (False, True): "no", (True, True): "in part"}


class Claim(NamedTuple):
    """A claim of `versions` of the paper; `shown` is ``yes``, ``no``, ``in part`` or ``cannot tell``."""

    claim: str
    versions: str
    shown: str
    evidence: str


def claims_of(findings: Findings) -> list[Claim]:
    """Return the claims, each with what a study shows of it, and why."""
    return [
        *_on_sides(findings),
        _on_truth(findings),
        _on_equilibrium(findings),
        _on_decline(findings),
        *_on_criteria(findings),
        *_on_costs(findings),
    ]


def states_text(findings: Findings, name: str) -> str:
    """Return the tasks of a side or a family that count, by what they show."""
    groups: dict[str, list[str]] = {state: [] for state in OVER_TASKS}
    for task in findings.on(name):
        groups[task.state].append(task.task)
    text = _filled({f"{state} in {{}}": tasks for state, tasks in groups.items()}, ", ")
    evaluated = any(task.is_in([name]) for task in findings.tasks)
    why = "no task is shown to be above its floor" if evaluated else "it has no task"
    return f"{name.replace('_', ' ')}: {text or f'{UNKNOWN}, because {why}'}"


def against_text(tasks: Mapping[str, Collection[str]]) -> str:
    """Return in which tasks the criterion keeps more or less than other cuts of the same size."""
    phrases = {
        (True, False): "the criterion keeps more in {}",
        (False, True): "it keeps less in {}",
        (True, True): "it keeps more at some sizes and less at others in {}",
        (False, False): "no difference is shown in {}",
    }
    groups: dict[str, list[str]] = {phrase: [] for phrase in phrases.values()}
    for task, verdicts in tasks.items():
        groups[phrases["better" in verdicts, "worse" in verdicts]].append(task)
    return _filled(groups, "; ") or "nothing was tested"


def way_text(way: str) -> str:
    """Return the name of other cuts in a sentence."""
    return "random cuts" if way == "random" else f"`{way}`"


def joined(words: Sequence[str]) -> str:
    """Return words as a list in a sentence."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _filled(groups: Mapping[str, Sequence[str]], separator: str) -> str:
    """Return the phrases with their tasks filled in, without those that have none."""
    phrases = (text.format(joined(tasks)) for text, tasks in groups.items() if tasks)
    return separator.join(phrases)


def _answer(state: str, *claimed: str) -> str:
    return UNKNOWN if state == UNKNOWN else "yes" if state in claimed else "no"


def _on_sides(findings: Findings) -> Iterator[Claim]:
    for claim, (versions, name, states) in ON_SIDES.items():
        answer = _answer(findings.state(name), *states)
        yield Claim(claim, versions, answer, states_text(findings, name))


def _on_truth(findings: Findings) -> Claim:
    """Return the claim with Pearson's r of each task with each of knowledge, over the sizes."""
    answer = _answer(findings.state(TRUTH), RISES)
    if answer == "yes" and findings.state(KNOWLEDGE) != FALLS:
        answer = UNKNOWN
    knowledge, truth = (
        {task.task for task in findings.on(name)} for name in (KNOWLEDGE, TRUTH)
    )
    series, texts = series_name(findings.cuts[0]), [states_text(findings, TRUTH)]
    for pair in findings.comparison.correlations:
        one, other = (task for task, _ in pair.tasks)
        between = {one, other} & knowledge and {one, other} & truth
        r, n = pair.pearson, pair.n
        if between and r is not None and pair.series == series:
            texts.append(f"{one} and {other}: r = {r:.3f} over {n} sizes")
    claim = "truthfulness improves as knowledge falls"
    return Claim(claim, "v1", answer, "; ".join(texts))


def _on_equilibrium(findings: Findings) -> Claim:
    names = [
        run.name
        for run in findings.cuts
        if run.pruning["intermediate_size_after"]
        == math.ceil(EQUILIBRIUM * run.pruning["hidden_size"])
    ]
    states, texts = [], []
    for task in (t for t in findings.tasks if t.family.name == INSTRUCTIONS):
        for row in (row for row in task.rows if row.run in names):
            states.append(task.state_at(row))
            change = f"{row.base_score:.3f} to {row.score:.3f}"
            texts.append(f"{task.task} {states[-1]}: {change}, floor {task.level}")
    claim = "instruction following improves at the expansion ratio 2.4"
    answer = _answer(first_in(OVER_TASKS, states), RISES)
    return Claim(claim, "v3", answer, "; ".join(texts) or "not evaluated")


def _on_decline(findings: Findings) -> Claim:
    fits = {task.task: _fit(findings, task) for task in findings.on(KNOWLEDGE, TEXT)}
    answers = [answer for answer, _ in fits.values()]
    shown = "no" if "no" in answers else UNKNOWN if UNKNOWN in answers else "yes"
    why = "; ".join(f"{task} {text}" for task, (_, text) in fits.items())
    claim = "the decline can be predicted from the size"
    if not fits:
        return Claim(claim, "v1, v3", UNKNOWN, "no task can show it")
    return Claim(claim, "v1, v3", shown, why)


def _fit(findings: Findings, task: TaskFinding) -> tuple[str, str]:
    """Return whether a line through the other sizes predicts each size between them, and how well.

    It does within the margin of the study; it does not where it misses by more, and misses the
    interval of the difference.
    """
    comparison, key = findings.comparison, (task.task, task.metric)
    trends = {(t.series, t.task, t.metric): t for t in comparison.trends}
    known = trends.get((series_name(findings.cuts[0]), *key))
    if known is None or known.q is None or known.q >= comparison.alpha:
        return UNKNOWN, "shows no trend over three or more sizes"
    if (known.slope > 0) != bool(findings.base.scores[key].higher_is_better):
        return "no", "does not decline"
    runs = {run.name: run for run in (findings.base, *findings.cuts)}
    names = [findings.base.name, *(row.run for row in task.rows)]
    ratios = np.array([runs[name].expansion_ratio for name in names])
    scores = np.array([task.rows[0].base_score, *(row.score for row in task.rows)])
    logs = is_perplexity(task.metric)
    heights = np.log(scores) if logs else scores
    misses, answers = [], {"yes"}
    for index, row in enumerate(task.rows[:-1], 1):
        line = np.polyfit(np.delete(ratios, index), np.delete(heights, index), 1)
        height = float(np.polyval(line, ratios[index]))
        predicted = math.exp(height) if logs else height
        error = abs(predicted - row.score)
        misses.append((error, runs[row.run].name))
        margin = row.case.margin_size
        if error > (margin or 0):
            low = -math.inf if row.low is None else row.low
            high = math.inf if row.high is None else row.high
            inside = low <= predicted - row.base_score <= high
            answers.add(UNKNOWN if inside else "no")
    worst, name = max(misses)
    answer = first_in(("no", UNKNOWN, "yes"), answers)
    return answer, f"is missed by {worst:.3f} at {name}"


def _on_criteria(findings: Findings) -> Iterator[Claim]:
    counted = {task.task for task in findings.on(*SIDES[:-1])}
    for way, tasks in findings.against.items():
        if way.startswith("recipe="):
            continue
        shown = set().union(*(tasks[task] for task in counted & tasks.keys()))
        answer = _BETTER_WORSE.get(("better" in shown, "worse" in shown), UNKNOWN)
        claim = f"`{findings.criterion}` keeps more than {way_text(way)}"
        yield Claim(claim, "v3", answer, against_text(tasks))


def _on_costs(findings: Findings) -> Iterator[Claim]:
    models = findings.profile.get("models", ())
    ratios = {model["name"]: model["expansion_ratio"] for model in models}
    for claim, (metric, direction) in ON_COSTS.items():
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
