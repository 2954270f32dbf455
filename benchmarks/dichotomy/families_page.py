"""What falls, holds and rises, by family of tasks and by method, on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dichotomy.contrasts import OF_DEPTH
from dichotomy.seeds import SEEDED
from dichotomy.steps import MODELS, PERCENTS, PLAIN, UNIFORM
from dichotomy.tables import MEASURES
from dichotomy.words import (
    CHANGES,
    NOTHING,
    Cells,
    change,
    each_one,
    grouped,
    has_nothing_to_lose,
    number,
    score,
    spans,
    step_text,
    verdict_tables,
)
from lm_eval_pruned.results.groups import FAMILIES, family_of
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

TITLE = "What falls, what holds, what rises"
TEXT = """\
Scores of pruned models beside those of the unpruned model. *Needs no knowledge* is the score of guessing, or of always giving the commonest answer, whichever is higher. Models that
lack whole layers stand under [width against depth](#width-against-depth), and what was measured with several seeds under [healing](#healing), [sampled answers](#answers-that-are-sampled) and [examples](#examples-in-the-prompt)."""
_SIZES = [str(percent) for percent in PERCENTS]


def family_section(rows: Sequence[Cells]) -> list[str]:
    """Say what falls, holds and rises, by method."""
    blocks = [f"## {TITLE}", TEXT]
    rows = shown_here(rows)
    if not rows:
        return [*blocks, NOTHING]
    steps = (*UNIFORM, PLAIN)
    by_maw = [row for row in rows if row["step"] in steps and row["method"] == "maw"]
    pruned = [row for row in rows if row["method"] != "unpruned" and not row["seed"]]
    return [
        *blocks,
        *level_sentences(rows),
        "By `maw`, the study's criterion, cutting all layers alike:",
        _numbers(by_maw, rows),
        "By any method:",
        *verdict_tables(
            [row for row in pruned if row["percent"]], {"method": _method}, CHANGES
        ),
        each_one(TITLE),
    ]


def family_details(rows: Sequence[Cells]) -> list[str]:
    """Show the change of each score, by family, method and size."""
    rows = shown_here(rows)
    blocks = [f"## {TITLE}"] if rows else []
    for family in FAMILIES:
        here = [row for row in rows if family_of(row["task"]) is family]
        pruned = [row for row in here if row["method"] != "unpruned"]
        if pruned:
            blocks += [f"### {family.label}", *perplexity_table(here)]
            blocks.append(_numbers(pruned, here))
    return blocks


def shown_here(rows: Sequence[Cells]) -> list[Cells]:
    """Return the rows that no other section has."""
    return [row for row in rows if row["step"] not in SEEDED | OF_DEPTH]


def _numbers(pruned: Sequence[Cells], rows: Sequence[Cells]) -> str:
    bases = {
        (row["model"], row["step"], row["task"]): row
        for row in rows
        if row["method"] == "unpruned"
    }
    table = []
    for key, of in grouped(pruned, "model", "task", "step", "method", "seed").items():
        model, task, step, _, seed = key
        if not any(row["percent"] for row in of):
            continue
        base = bases[model, step, task]
        by_percent = {row["percent"]: change(row, interval=False) for row in of}
        method = _method(of[0]) + (f", seed {seed}" if seed else "")
        table.append(
            [
                *(MODELS[model], MEASURES[task].label, method, base["n"], score(base)),
                *(by_percent.get(size, "") for size in _SIZES),
                spans(of, CHANGES),
            ]
        )
    columns = [
        *("model", "task", "method", "n", "unpruned"),
        *(f"{size} %" for size in _SIZES),
        "verdict",
    ]
    return markdown_table(columns, table, "lllrr" + "r" * len(_SIZES) + "l")


def _method(row: Cells) -> str:
    if row["step"] == PLAIN:
        return f"{row['method']} ({step_text(row['step'])})"
    return row["method"]


def perplexity_table(rows: Sequence[Cells]) -> list[str]:
    """Show the perplexities of words, which are not tested, where a task has them."""
    sizes = ["0", *_SIZES]
    table = []
    for key, of in grouped(rows, "model", "step", "method", "seed").items():
        model, step, method, seed = key
        values = {
            row["percent"]: f"{value:.1f}"
            for row in of
            if (value := number(row, "word_perplexity")) is not None and row["percent"]
        }
        if values:
            named = f"{method}, seed {seed}" if seed else method
            cells = [values.get(size, "") for size in sizes]
            table.append([MODELS[model], step_text(step), named, *cells])
    if not table:
        return []
    columns = ["model", "sweep", "method", *(f"{size} %" for size in sizes)]
    return [
        "Word perplexity of the held text, by the share of neurons removed:",
        markdown_table(columns, table, "lll" + "r" * len(sizes)),
        "Bits per byte, which are tested:",
    ]


def level_sentences(rows: Sequence[Cells]) -> list[str]:
    """Say where the unpruned models stand beside what needs no knowledge."""
    said = []
    unpruned = (row for row in rows if row["method"] == "unpruned")
    for (model, task), (base, *_) in grouped(unpruned, "model", "task").items():
        levels = [
            value
            for each in ("chance", "majority")
            if (value := number(base, each)) is not None
        ]
        who = f"- {MEASURES[task].label}: the unpruned {MODELS[model]}"
        if not levels:
            if has_nothing_to_lose(base):
                said.append(f"{who} solves none of {base['n']}, so no score can fall.")
            continue
        level = f"{100 * max(levels):.1f}"
        what = (
            "always giving the commonest answer"
            if len(levels) == 2 and levels[1] >= levels[0]
            else "finding all answers equally likely"
        )
        verdict = "is not shown to be" if has_nothing_to_lose(base) else "is"
        said.append(
            f"{who} ({score(base)}) {verdict} above what needs no knowledge ({level}, {what})."
        )
    return ["\n".join(said)] if said else []
