"""The two mechanical explanations, on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dichotomy.mechanisms import NEED_NO_LENGTH, PARTS
from dichotomy.seeds import SEEDED
from dichotomy.steps import MODELS
from dichotomy.words import (
    Cells,
    change,
    each_one,
    grouped,
    number,
    shown,
    step_text,
)
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

MC2_TITLE = "MC2 and the level of equally likely answers"
IFEVAL_TITLE = "IFEval and the length of answers"
COUNTS = """\
In how many pruned models each is shown (q < 0.05); what has several seeds stands with the single comparisons alone:"""
MC2 = """\
A model that finds all answers of a question equally likely scores the share of them that is true. If pruning makes answers equally likely, the distance of a question's score from that level shrinks, which a paired
t test over questions asks. The change of each question is regressed on its way to its level: the slope is the share of the way that it moves, which times the mean way is the part of the mean change that is explained,
and the intercept is the rest, the change of a question that is at its level already. A slope alone shows that scores of the unpruned model are forgotten, not that answers become equally likely.

The same is asked of another level, whether the shortest answer is true: MC2 takes the likelihoods of whole answers, so if every word becomes less likely, the longer answers lose most."""
IFEVAL = """\
Each answer of the unpruned model is cut to as many words as the pruned model's answer has, and scored again with the harness's own checks. *By length* is what the cut alone changes; *rest* is the difference between the pruned
model's answers and the cut ones. Where the pruned model says more, nothing can be cut, and the effect of a longer answer is in the rest.

Instructions are split in two. *Shorter is enough* are those that an answer goes on to satisfy when its end is cut away: {names}, those with a relation only where it is *less than*. The list is
fixed and follows from what the checks ask, because a list that was found by cutting the answers under test would choose by the outcome."""


def mc2_section(rows: Sequence[Cells]) -> list[str]:
    """Say in how many pruned models MC2 drifts to its level."""
    blocks = [f"### {MC2_TITLE}", MC2]
    rows = [row for row in rows if row["step"] not in SEEDED]
    if not rows:
        return [*blocks, "No samples of it yet."]
    table = [
        [
            *(MODELS[model], step_text(step), toward, len(of)),
            *(shown(of, "closer", -1), shown(of, "closer", +1)),
            shown(of, "rest"),
        ]
        for (model, step, toward), of in grouped(
            rows, "model", "step", "toward"
        ).items()
    ]
    columns = [
        *("model", "sweep", "level of", "pruned models", "come closer", "move away"),
        "not explained by it",
    ]
    return [
        *blocks,
        COUNTS,
        markdown_table(columns, table, "lllrrrr"),
        each_one(MC2_TITLE),
    ]


def mc2_details(rows: Sequence[Cells]) -> list[str]:
    """Show how far MC2 of each pruned model drifts to its level."""
    table = [
        [
            *(MODELS[row["model"]], _method(row), _size(row), row["toward"], row["n"]),
            *(_points(row, each) for each in ("level", "base", "score")),
            *(_points(row, "distance_base"), _points(row, "distance")),
            *(change(row, "closer"), f"{float(row['moved']):.2f}"),
            *(f"{100 * float(row['explained']):+.1f}", change(row, "rest")),
        ]
        for row in rows
    ]
    columns = [
        *("model", "method", "removed", "level of", "questions", "level", "unpruned"),
        *("pruned", "distance, unpruned", "pruned", "change of the distance"),
        *("share moved", "explained", "rest"),
    ]
    titled = [f"## {MC2_TITLE}", markdown_table(columns, table, "llrl" + "r" * 10)]
    return titled if table else []


def ifeval_section(rows: Sequence[Cells]) -> list[str]:
    """Say in how many pruned models the length of answers explains IFEval."""
    names = ", ".join(f"`{name}`" for name in NEED_NO_LENGTH)
    blocks = [f"### {IFEVAL_TITLE}", IFEVAL.format(names=names)]
    rows = [row for row in rows if row["step"] not in SEEDED]
    if not rows:
        return [*blocks, "No samples of it yet."]
    table = []
    for (model, step), by_part in grouped(rows, "model", "step").items():
        for part in PARTS:
            of = [row for row in by_part if row["part"] == part]
            if of:
                table.append(
                    [
                        *(MODELS[model], step_text(step), part, len(of)),
                        *(
                            f"{shown(of, test, +1)} / {shown(of, test, -1)}"
                            for test in ("total", "length", "rest")
                        ),
                    ]
                )
    columns = [
        *("model", "sweep", "instructions", "pruned models", "score rises / falls"),
        *("by length", "by the rest"),
    ]
    return [
        *(*blocks, COUNTS, markdown_table(columns, table, "lllrrrr")),
        each_one(IFEVAL_TITLE),
    ]


def ifeval_details(rows: Sequence[Cells]) -> list[str]:
    """Show what of IFEval the length of answers explains, by pruned model."""
    table = [
        [
            *(MODELS[row["model"]], step_text(row["step"]), _method(row), _size(row)),
            *(row["part"], row["instructions"]),
            f"{float(row['words_base']):.0f} / {float(row['words']):.0f}",
            *(_points(row, "base"), _points(row, "score"), change(row, "total")),
            *(change(row, "length"), change(row, "rest")),
        ]
        for row in rows
    ]
    columns = [
        *("model", "sweep", "method", "removed", "instructions", "n"),
        *("words, unpruned / pruned", "unpruned", "pruned", "change", "by length"),
        "rest",
    ]
    titled = [f"## {IFEVAL_TITLE}", markdown_table(columns, table, "lllrl" + "r" * 7)]
    return titled if table else []


def _method(row: Cells) -> str:
    return f"{row['method']}, seed {row['seed']}" if row["seed"] else row["method"]


def _size(row: Cells) -> str:
    return f"{row['percent']} %" if row["percent"] else row["run"]


def _points(row: Cells, column: str) -> str:
    value = number(row, column)
    return "" if value is None else f"{100 * value:.1f}"
