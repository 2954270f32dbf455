"""How the report of a study begins: verdict, claims of the paper, its scores, what is left open."""

from __future__ import annotations

import csv
from importlib.resources import files
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING

from lm_eval_pruned.report.page import Section
from lm_eval_pruned.results.groups import SIDES
from lm_eval_pruned.study.claims import (
    against_text,
    claims_of,
    joined,
    states_text,
    way_text,
)
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from lm_eval_pruned.study.findings import Findings

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
