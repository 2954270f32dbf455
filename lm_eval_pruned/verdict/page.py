"""A verdict as sections: what the terminal, the Markdown and the HTML page show."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison_table import (
    AGREEMENT,
    DIFFERENCES,
    FLOOR,
    record,
)
from lm_eval_pruned.report.changed_answers import LOST, find_changes
from lm_eval_pruned.report.page import Section, as_markdown, table_section, write_page
from lm_eval_pruned.report.sections import energy_section
from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.groups import family_of, is_bias, is_loss, is_perplexity
from lm_eval_pruned.util.tables import Cell, Column, csv_table
from lm_eval_pruned.verdict.decision import ANSWERS, Judged


if TYPE_CHECKING:
    from lm_eval_pruned.verdict.decision import Verdict

#: By exit code.
TITLES = tuple(f"May it be shipped? {answer.capitalize()}" for answer in ANSWERS)
#: How many of the answers that changed for the worse are shown.
SHOWN = 20
_HOW_TO_READ = (
    f"{FLOOR} The interval of what is kept covers 90 %. The difference is candidate minus base; a score "
    "is not worse if its 90 % interval lies above the margin, and equivalent if it lies within the margin "
    "on both sides."
)
_ON_BIAS = (
    "Bias is 0.5 where answers follow stereotypes as often as they contradict them, and 1 where "
    "each follows one; BBQ's scores are then 0 and 1. A change either way counts. acc is the share of right answers; here "
    "the right answer is often that nobody can know."
)
_ON_KL = (
    "kl is the divergence of the candidate's predictions from the base's on each text, over the whole "
    "vocabulary, in nats per token."
)
_ON_TIME = (
    "Time is the wall time of the evaluation, over all documents, on the machine that made the "
    "results; results that lm_eval wrote include loading the model. It is not the latency of a "
    "server: lm-eval-pruned profile measures latency and throughput."
)


def write_pages(verdict: Verdict, folder: Path, subtitle: str, *, texts: bool) -> str:
    """Write ``verdict.html`` and ``verdict.md``, with `texts` of answers or without.

    Returns what a terminal shows, which leaves out the answers that changed.
    """
    title, tables = TITLES[verdict.code], _tables(verdict)
    changes = find_changes(verdict.base, verdict.rows)[2]
    lost = [change for change in changes if change.kind == LOST]
    shown = lost[:SHOWN]
    changed = table_section(
        "Answers that changed for the worse",
        [f"{len(shown)} of {len(lost)} are shown."],
        _CHANGED if texts else _CHANGED[:2],
        shown,
    )
    remarks = [Section("Remarks", notes=verdict.notes)] * bool(verdict.notes)
    rows = [
        record(judged.row) | {"margin": _margin(judged), "verdict": judged.word}
        for judged in verdict.judged
    ]
    sections = [*tables, *([changed] if changed else []), *remarks]
    write_page(folder, "verdict", title, subtitle, sections, csv_table(rows))
    return as_markdown(title, subtitle, [*tables, *remarks], terminal=True)


def card_section(verdict: Verdict, base: str) -> str:
    """Return the tables for the card of the candidate, compared with what `base` names.

    A card is published: it has no texts of documents, and no folders of this machine.
    """
    named = re.sub(
        "[^,=]+", lambda m: Path(m[0]).name if Path(m[0]).exists() else m[0], base
    )
    subtitle = f"Compared with {named}, by `lm-eval-pruned verdict`."
    answer, *tables = _tables(verdict)
    sections = [replace(answer, notes=()), *tables]
    return re.sub(
        r"(?m)^#", "##", as_markdown(TITLES[verdict.code], subtitle, sections)
    )


def headline(verdict: Verdict) -> str:
    """Return the answer, what is kept, what the loss on text is, and which other scores do not pass."""
    parts, margins = [], []
    for judged in verdict.judged:
        row, metadata = judged.row, verdict.base.metadata
        label = family_of(row.task, metadata).label.lower()
        if verdict.base.exact_floor(row.task, row.metric) is not None:
            kept = row.floor and row.floor.kept_text
            parts.append(f"{label} kept {kept or 'not known'}")
            share = row.case.margin and row.case.margin.share
            margins += [f"{1 - share:.0%}".replace("%", " %")] if share else []
        elif is_loss(row.metric) and row.relative is not None:
            name = "perplexity" if is_perplexity(row.metric) else "loss"
            parts.append(f"{name} {row.relative:+.1%}".replace("%", " %"))
        elif judged in verdict.open:
            parts.append(f"{_name(judged)} {judged.word}")
    parts += [
        f"{_name(pool)} {pool.word}" for pool in verdict.pooled if pool in verdict.open
    ]
    answer = ANSWERS[verdict.code]
    line = f"{answer}: {', '.join(parts)}" if parts else answer
    return f"{line}; margin {', '.join(dict.fromkeys(margins))}" if margins else line


def _name(judged: Judged) -> str:
    return f"{judged.row.task} {judged.row.metric.removesuffix(',none')}"


def _tables(verdict: Verdict) -> list[Section]:
    """Return what there is to say without texts of documents, the answer first."""
    judged = verdict.judged
    bias_tasks = {score.row.task for score in judged if is_bias(score.row.metric)}
    on_bias = [score for score in judged if score.row.task in bias_tasks]
    others = [score for score in judged if score.row.task not in bias_tasks]
    scores = [*others, *verdict.beside]
    about = [_HOW_TO_READ, *[_ON_KL] * any(score.row.metric == KL for score in scores)]
    size = [("base", verdict.base), ("candidate", verdict.candidate)]
    # Of a task with two measures, the answers are the same.
    rows = {score.row.task: score.row for score in judged}
    answered = [row for row in rows.values() if row.answers]
    sections = [
        _answer_section(verdict),
        table_section("Scores", about, _SCORES, scores),
        table_section("Agreement with the base", [AGREEMENT], _AGREEMENT, answered),
        table_section("Bias", [_ON_BIAS], _SCORES, on_bias),
        table_section("Size and time", [_ON_TIME], _SIZE, size),
        energy_section([verdict.base, verdict.candidate]),
    ]
    return [section for section in sections if section is not None]


def _answer_section(verdict: Verdict) -> Section:
    """Return the answer, which scores could show a loss and which not, and what was decided of them."""
    judged, pooled = verdict.judged, verdict.pooled
    blind = [score for score in judged if score.row.cannot_show_a_loss]
    worse, undecided = (
        [claim for claim in verdict.open if claim.word == word]
        for word in ("worse", "undecided")
    )
    names = (f"{_name(e)} ({e.row.floor.floor_name})" for e in blind if e.row.floor)
    not_above = "the base is not shown to be above the floor of"
    if not blind:
        able = "Each score can show a loss"
    elif blind == judged:
        able = f"No score can show a loss, because {not_above} any task: {', '.join(names)}"
    else:
        able = (
            f"{len(judged) - len(blind)} of {len(judged)} scores can show a loss; {not_above} the "
            f"others: {', '.join(names)}"
        )
    line = headline(verdict)
    lost = f"{len(worse)} of {len(judged)} scores are shown to be worse."
    unsure = f"{len(undecided)} of {len(judged)} scores are not shown to lie within their margins."
    shipped = (
        f"Each score{' that can show a loss' * bool(blind)} is shown to lie within its margin"
        f"{', alone or on average' * bool(pooled)}."
    )
    if not undecided:
        unsure = "Evaluate tasks that the base can do."
    notes = [
        f"{_name(claim)}: {claim.word}. {claim.take or claim.message}"
        for claim in [*worse, *undecided]
    ]
    return Section(
        ANSWERS[verdict.code].capitalize(),
        [
            f"{line[:1].upper()}{line[1:]}. {able}.",
            (shipped, lost, unsure)[verdict.code],
            *(pool.sentence for pool in pooled),
        ],
        notes=notes,
    )


def _compared(title: str, shown_as: str = "") -> Column:
    """Return a column of `compare`, of the difference that was judged."""
    column = next(column for column in DIFFERENCES if column.title == title)
    value = lambda judged: column.value(judged.row)
    return column._replace(title=shown_as or title, value=value, coloured=False)


def _word(judged: Judged) -> Cell:
    word = f"{judged.word} (at floor)" if judged.row.at_floor else judged.word
    return Cell(word, judged.word)


def _margin(judged: Judged) -> str | None:
    margin = judged.row.case.margin
    return margin.text if margin else None


#: Of `Judged`.
_SCORES = (
    _compared("task"),
    Column("metric", lambda judged: judged.row.metric.removesuffix(",none")),
    Column("verdict", _word),
    _compared("base"),
    _compared("score", "candidate"),
    _compared("floor"),
    _compared("kept"),
    _compared("difference"),
    _compared("interval", "90% interval"),
    Column("margin", _margin, ">"),
    _compared("documents"),
)
#: Of `Difference`.
_AGREEMENT = (
    Column("task", lambda row: row.task),
    Column("documents", lambda row: row.documents, "d"),
    Column("equal answers", lambda row: row.answers.equal_answers, ".1%"),
    Column("KL", lambda row: row.answers.kl, ".4f"),
    Column("same beginning", lambda row: row.answers.beginning, ".1%"),
)
#: Of a name and a run.
_SIZE = (
    Column("model", lambda row: row[0]),
    Column("parameters", lambda row: row[1].config.get("model_num_parameters"), ","),
    Column("bytes in memory", lambda row: row[1].config.get("weight_bytes"), ","),
    Column(
        "s / document",
        lambda row: row[1].seconds_per_document(row[1].evaluated),
        ".3g",
    ),
)
#: Of `Change`; the last three are texts.
_CHANGED = (
    Column("task", lambda change: change.task),
    Column("document", lambda change: change.sample.number),
    Column("end of the prompt", lambda change: change.sample.prompt[-160:]),
    Column("base, right", lambda change: change.before[:160]),
    Column("candidate, wrong", lambda change: change.after[:160]),
)
