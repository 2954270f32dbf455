"""What was found, in a few sentences that follow from the verdicts of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dichotomy.mechanisms import LENGTH, LIKELIHOOD, PARTS
from dichotomy.steps import MODELS, PLAIN, UNIFORM
from dichotomy.words import (
    CHANGES,
    Cells,
    Tables,
    grouped,
    has_nothing_to_lose,
    label_of,
    listed,
    shown,
    sizes_text,
)


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: What is compared with what in the last sentences: question, and how the first of both is called.
COMPARED = {
    "best": "the best criterion of each layer, beside `maw` in all",
    "sensitivity": "widths by sensitivity, beside uniform ones",
    "skip0": "layer 0 left alone, beside cut as the others",
    "aligned": "widths that are multiples of 64, beside those that the percentages leave",
    "depth": "narrower models, beside shallower ones with as many parameters",
    "healed": "models that were trained again, beside the same before",
}


def short_section(tables: Tables) -> list[str]:
    """Answer the questions of the page, model by model, as far as there are tests."""
    blocks = ["## In short"]
    for model, name in MODELS.items():
        mine = {
            table: [row for row in rows if row["model"] == model]
            for table, rows in tables.items()
        }
        said = [
            *(_dichotomy(mine["scores"]), _levels(mine["scores"])),
            *(_chance(mine["chance"]), _drift(mine["mc2"])),
            _length([row for row in mine["ifeval"] if row["step"] in UNIFORM]),
            _length([row for row in mine["ifeval"] if row["step"] == PLAIN]),
            *(_compared(question, mine["contrasts"]) for question in COMPARED),
        ]
        bullets = [f"- {sentence}" for sentence in said if sentence]
        if bullets:
            blocks += [f"**{name}**", "\n".join(bullets)]
    return blocks if len(blocks) > 1 else []


def _dichotomy(rows: Sequence[Cells]) -> str:
    steps = (*UNIFORM, PLAIN)
    mine = [row for row in rows if row["step"] in steps and row["method"] == "maw"]
    by_verdict: dict[str, list[str]] = {}
    for of in grouped(mine, "step", "task").values():
        for verdict in CHANGES[:-1]:
            sizes = [row["percent"] for row in of if row["verdict"] == verdict]
            if sizes:
                said = f"{_name(of[0])} (at {sizes_text(sizes)})"
                by_verdict.setdefault(verdict, []).append(said)
        if not {row["verdict"] for row in of} & set(CHANGES[:-1]):
            by_verdict.setdefault("undecided at every size", []).append(_name(of[0]))
    parts = [
        f"*{verdict}*: {listed(by_verdict[verdict])}"
        for verdict in (*CHANGES[:-1], "undecided at every size")
        if verdict in by_verdict
    ]
    return f"Cut by `maw`, all layers alike. {'; '.join(parts)}." if parts else ""


def _levels(rows: Sequence[Cells]) -> str:
    unpruned = (row for row in rows if row["method"] == "unpruned")
    names = [
        _name(base)
        for base, *_ in grouped(unpruned, "task").values()
        if has_nothing_to_lose(base)
    ]
    return (
        f"The unpruned model is itself not shown to be above what needs no knowledge in {listed(names)}: scores there cannot show that knowledge is lost, and a change may be one of habit alone."
        if names
        else ""
    )


def _chance(rows: Sequence[Cells]) -> str:
    uniform = [row for row in rows if row["step"] in UNIFORM and row["verdict"]]
    parts = []
    for (criterion,), of in grouped(uniform, "criterion").items():
        better, worse = (_how_many(of, each) for each in ("better", "worse"))
        parts.append(f"`{criterion}` better in {better}, worse in {worse} of {len(of)}")
    said = "Beside neurons removed at random, counted over tasks and sizes"
    return f"{said}: {'; '.join(parts)}." if parts else ""


def _drift(rows: Sequence[Cells]) -> str:
    parts = []
    for toward, said in (
        (LIKELIHOOD, "toward those of a model that finds all answers equally likely"),
        (LENGTH, "toward those of one that prefers the shortest answer"),
    ):
        of = [row for row in rows if row["step"] in UNIFORM and row["toward"] == toward]
        if of:
            parts.append(
                f"{said} in {shown(of, 'closer', -1)} and away from them in {shown(of, 'closer', +1)} of {len(of)} pruned models"
            )
    return f"Scores of TruthfulQA MC2 move {'; '.join(parts)}." if parts else ""


def _length(rows: Sequence[Cells]) -> str:
    parts = []
    for part, said in zip(
        PARTS[1:],
        ("that a shorter answer satisfies as well are followed", "of other kinds"),
        strict=True,
    ):
        of = [row for row in rows if row["part"] == part]
        if of:
            parts.append(
                f"{said} more often in {shown(of, 'total', +1)} and less often in {shown(of, 'total', -1)} of {len(of)} pruned models"
            )
    if not parts:
        return ""
    plain = "Without a chat template, " if rows[0]["step"] == PLAIN else ""
    return f"{plain}IFEval's instructions {'; those '.join(parts)}."


def _compared(question: str, rows: Iterable[Cells]) -> str:
    by_task = grouped(
        (
            row
            for row in rows
            if row["question"] == question
            and row["verdict"]
            and (question != "healed" or row["other"] == "the same before")
        ),
        "task",
    )
    found: dict[str, list[str]] = {}
    for of in by_task.values():
        for verdict in ("better", "worse"):
            if count := _how_many(of, verdict):
                said = f"{_name(of[0])} ({count} of {len(of)})"
                found.setdefault(f"{verdict} in", []).append(said)
        if not {row["verdict"] for row in of} & {"better", "worse"}:
            found.setdefault("nothing shown for", []).append(_name(of[0]))
    parts = [
        f"{each} {listed(found[each])}"
        for each in ("better in", "worse in", "nothing shown for")
        if each in found
    ]
    first = COMPARED[question]
    return f"{first[0].upper()}{first[1:]}: {'; '.join(parts)}." if parts else ""


def _how_many(rows: Sequence[Cells], verdict: str) -> int:
    return sum(row["verdict"] == verdict for row in rows)


def _name(row: Cells) -> str:
    plain = " without a chat template" if row.get("step") == PLAIN else ""
    return label_of(row).partition(",")[0] + plain
