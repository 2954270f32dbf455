"""The two mechanical explanations, on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dichotomy.mechanisms import NEED_NO_LENGTH, PARTS
from dichotomy.steps import MODELS
from dichotomy.words import Cells, change, grouped, number, shown
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

MC2 = """\
### MC2 and the level of equally likely answers

A model that finds all answers of a question equally likely scores the share of them that is true. If pruning makes answers equally likely, the distance of a question's score from that level shrinks, which a paired
t test over questions asks. The change of each question is regressed on its way to its level: the slope is the share of the way that it moves, which times the mean way is the part of the mean change that is explained,
and the intercept is the rest, the change of a question that is at its level already. A slope alone shows that scores of the unpruned model are forgotten, not that answers become equally likely.

The same is asked of another level, whether the shortest answer is true: MC2 takes the likelihoods of whole answers, so if every word becomes less likely, the longer answers lose most."""
IFEVAL = """\
### IFEval and the length of answers

Each answer of the unpruned model is cut to as many words as the pruned model's answer has, and scored again with the harness's own checks. *By length* is what the cut alone changes; *rest* is the difference between the pruned
model's answers and the cut ones. Where the pruned model says more, nothing can be cut, and the effect of a longer answer is in the rest.

Instructions are split in two. *Shorter is enough* are those that an answer goes on to satisfy when its end is cut away: {names}, those with a relation only where it is *less than*. The list is
fixed and follows from what the checks ask, because a list that was found by cutting the answers under test would choose by the outcome."""


def mc2_section(rows: Sequence[Cells]) -> list[str]:
    """Show how far MC2 drifts to its level."""
    blocks = [MC2]
    if not rows:
        return [*blocks, "No samples of it yet."]
    bullets, table = [], []
    for (model, step, toward), of in grouped(rows, "model", "step", "toward").items():
        closer, away = (
            shown(of, "closer", sign) for sign in (lambda x: x < 0, lambda x: x > 0)
        )
        rest = shown(of, "rest", lambda x: x != 0)
        bullets.append(
            f"- {MODELS[model]}, `{step}`, level of {toward}, pruned models: {len(of)}. Scores come closer to their levels in {closer}, and move away in {away}; "
            f"the part of the change that the move does not explain is shown in {rest}."
        )
        for row in of:
            table.append(
                [
                    *(
                        MODELS[model],
                        _method(row),
                        _size(row),
                        toward,
                        row["n"],
                    ),
                    *(
                        _points(row, "level"),
                        _points(row, "base"),
                        _points(row, "score"),
                    ),
                    *(_points(row, "distance_base"), _points(row, "distance")),
                    *(change(row, "closer"), f"{float(row['moved']):.2f}"),
                    *(f"{100 * float(row['explained']):+.1f}", change(row, "rest")),
                ]
            )
    columns = [
        *(
            "model",
            "method",
            "removed",
            "level of",
            "questions",
            "level",
            "unpruned",
            "pruned",
        ),
        *("distance, unpruned", "pruned", "change of the distance", "share moved"),
        *("explained", "rest"),
    ]
    return [
        *blocks,
        "\n".join(bullets),
        markdown_table(columns, table, "llrl" + "r" * 10),
    ]


def ifeval_section(rows: Sequence[Cells]) -> list[str]:
    """Show what of IFEval the length of answers explains."""
    names = ", ".join(f"`{name}`" for name in NEED_NO_LENGTH)
    blocks = [IFEVAL.format(names=names)]
    if not rows:
        return [*blocks, "No samples of it yet."]
    bullets, table = [], []
    for (model, step), of in grouped(rows, "model", "step").items():
        for part in PARTS:
            here = [row for row in of if row["part"] == part]
            if here:
                counts = [
                    shown(here, test, sign)
                    for test in ("total", "length", "rest")
                    for sign in (lambda x: x > 0, lambda x: x < 0)
                ]
                bullets.append(
                    f"- {MODELS[model]}, `{step}`, instructions: {part}, pruned models: {len(here)}. The score is shown to rise in {counts[0]} and to fall in {counts[1]}; length alone raises it in {counts[2]} and "
                    f"lowers it in {counts[3]}; the rest raises it in {counts[4]} and lowers it in {counts[5]}."
                )
        for row in of:
            table.append(
                [
                    *(MODELS[model], f"`{step}`", _method(row), _size(row)),
                    *(row["part"], row["instructions"]),
                    f"{float(row['words_base']):.0f} / {float(row['words']):.0f}",
                    *(
                        _points(row, "base"),
                        _points(row, "score"),
                        change(row, "total"),
                    ),
                    *(change(row, "length"), change(row, "rest")),
                ]
            )
    columns = [
        *(
            "model",
            "sweep",
            "method",
            "removed",
            "instructions",
            "n",
            "words, unpruned / pruned",
        ),
        *("unpruned", "pruned", "change", "by length", "rest"),
    ]
    return [
        *blocks,
        "\n".join(bullets),
        markdown_table(columns, table, "lllrl" + "r" * 7),
    ]


def _method(row: Cells) -> str:
    return f"{row['method']}, seed {row['seed']}" if row["seed"] else row["method"]


def _size(row: Cells) -> str:
    return f"{row['percent']} %" if row["percent"] else row["run"]


def _points(row: Cells, column: str) -> str:
    value = number(row, column)
    return "" if value is None else f"{100 * value:.1f}"
