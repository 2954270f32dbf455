"""A verdict as sections: what the terminal, the Markdown and the HTML page show."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison_table import (
    AGREEMENT,
    DIFFERENCES,
    FLOOR,
    record,
)
from lm_eval_pruned.compare.floors import NO_LOSS
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.report.changed_answers import LOST, Change, find_changes
from lm_eval_pruned.report.page import Section, as_markdown, write_page
from lm_eval_pruned.report.sections import energy_section
from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.groups import family_of, is_loss, is_perplexity
from lm_eval_pruned.results.runs import results_files
from lm_eval_pruned.util.tables import Cell, Column, Table
from lm_eval_pruned.verdict.decision import ANSWERS, Judged
from lm_eval_pruned.verdict.needed import seconds_per_document


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.compare.pairing import DocumentReader
    from lm_eval_pruned.verdict.decision import Verdict

#: How many of the answers that changed for the worse are shown.
SHOWN = 20
#: Tasks on bias, by parts of their names.
ON_BIAS = ("bias", "bbq", "crows", "winogender")
#: Words that keep a candidate from being shipped.
_REASONS = ("worse", "undecided")
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


def write_pages(
    verdict: Verdict, folder: Path, subtitle: str, read: DocumentReader, *, texts: bool
) -> str:
    """Write ``verdict.html`` and ``verdict.md``, with `texts` of answers or without.

    `read` knows the documents of both runs. Returns what a terminal shows.
    """
    title = f"May it be shipped? {ANSWERS[verdict.code].capitalize()}"
    lost = _lost(verdict, read)
    sections = _sections(verdict, lost, 160 * texts)
    rows = [
        record(e.row) | {"margin": e.margin, "verdict": e.word} for e in verdict.judged
    ]
    write_page(folder, "verdict", title, subtitle, sections, rows)
    short = _sections(verdict, lost, 40 * texts)
    return unescape(as_markdown(title, subtitle, short, padded=True))


def card_section(verdict: Verdict, base: str) -> str:
    """Return the tables for the card of the candidate, compared with what `base` names.

    A card is published: it has no texts of documents, and no folders of this machine.
    """
    title = f"May it be shipped? {ANSWERS[verdict.code].capitalize()}"
    named = re.sub(
        "[^,=]+", lambda m: Path(m[0]).name if Path(m[0]).exists() else m[0], base
    )
    subtitle = f"Compared with {named}, by `lm-eval-pruned verdict`."
    answer, *tables = _tables(verdict)
    text = as_markdown(title, subtitle, [replace(answer, notes=()), *tables])
    return re.sub(r"(?m)^#", "##", text)


def _sections(verdict: Verdict, lost: Sequence[Change], width: int) -> list[Section]:
    """Return what there is to say, the answer first; texts are cut to a width."""
    remarks = [Section("Remarks", notes=verdict.notes)] * bool(verdict.notes)
    worse = _worse_section(lost, width)
    return [*_tables(verdict), *([worse] if worse else []), *remarks]


def _tables(verdict: Verdict) -> list[Section]:
    judged, runs = verdict.judged, [verdict.base, verdict.candidate]
    on_bias = [e for e in judged if any(part in e.row.task for part in ON_BIAS)]
    others = [each for each in judged if each not in on_bias]
    found = [
        _answer_section(verdict),
        _scores_section("Scores", _HOW_TO_READ, others, verdict.beside),
        _agreement_section(verdict),
        _scores_section("Bias", _ON_BIAS, on_bias),
        _size_section(verdict),
        energy_section(runs),
    ]
    return [each for each in found if each is not None]


def headline(verdict: Verdict) -> str:
    """Return the answer, what is kept, what the loss on text is, and which other scores do not pass."""
    parts, margins = [], []
    for judged in verdict.judged:
        row, metadata = judged.row, verdict.base.metadata
        label = family_of(row.task, metadata).label.lower()
        if verdict.base.exact_floor(row.task, row.metric) is not None:
            parts.append(f"{label} kept {row.kept_text or 'not known'}")
            share = Margin("kept", judged.margin).share
            margins += [f"{1 - share:.0%}".replace("%", " %")] if share else []
        elif is_loss(row.metric) and row.relative is not None:
            name = "perplexity" if is_perplexity(row.metric) else "loss"
            parts.append(f"{name} {row.relative:+.1%}".replace("%", " %"))
        elif judged in verdict.open:
            parts.append(f"{_name(judged)} {judged.word}")
    parts += [
        f"{_name(each.judged)} {each.judged.word}"
        for each in verdict.pooled
        if each.judged in verdict.open
    ]
    answer = ANSWERS[verdict.code]
    line = f"{answer}: {', '.join(parts)}" if parts else answer
    return f"{line}; margin {', '.join(dict.fromkeys(margins))}" if margins else line


def _name(each: Judged) -> str:
    return f"{each.row.task} {each.row.metric.removesuffix(',none')}"


def _answer_section(verdict: Verdict) -> Section:
    words = [each.word for each in verdict.judged]
    lost, unsure = (
        [each.word for each in verdict.open].count(word) for word in _REASONS
    )
    of = f"of {len(words)} scores are"
    able = " that can show a loss" * (NO_LOSS in words)
    open_question = f"{unsure} {of} not shown to lie within their margins."
    if not unsure:
        open_question = (
            "No score can show a loss, because the base is not shown to be above the floor of any "
            "task: evaluate tasks that it can do."
        )
    head = (
        f"Each score{able} is shown to lie within its margin{', alone or on average' * bool(verdict.pooled)}.",
        f"{lost} {of} shown to be worse.",
        open_question,
    )[verdict.code]
    notes = [
        f"{_name(each)}: {each.word}. {each.take or each.message}"
        for word in _REASONS
        for each in verdict.open
        if each.word == word
    ]
    line = headline(verdict)
    paragraphs = [f"{line[:1].upper()}{line[1:]}.", head]
    paragraphs += [each.sentence for each in verdict.pooled]
    return Section(ANSWERS[verdict.code].capitalize(), paragraphs, notes=notes)


def _compared(title: str, shown_as: str = "") -> Column:
    """Return a column of `compare`, of the difference that was judged."""
    column = next(each for each in DIFFERENCES if each.title == title)
    value = lambda judged: column.value(judged.row)
    return column._replace(title=shown_as or title, value=value, coloured=False)


def _word(judged: Judged) -> Cell:
    word = f"{judged.word} (at floor)" if judged.row.at_floor else judged.word
    return Cell(word, judged.word)


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
    Column("margin", lambda judged: judged.margin, ">"),
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
        lambda row: seconds_per_document(results_files(row[1].path)),
        ".3g",
    ),
)


def _scores_section(
    heading: str, text: str, judged: Sequence[Judged], beside: Sequence[Difference] = ()
) -> Section | None:
    blind = [e for e in judged if e.row.floor and e.row.floor.base_above_floor is False]
    notes = [
        f"{_name(each)}: the base is not shown to be above the floor "
        f"({each.row.floor.floor_name}), so this score cannot show a loss."
        for each in blind
        if each.row.floor
    ]
    rows = [*judged, *(Judged(row, "-", "not judged", "", "") for row in beside)]
    about = [text, *[_ON_KL] * any(each.row.metric == KL for each in rows)]
    table = Table(heading, _SCORES, rows)
    return Section(heading, about, table=table, notes=notes) if rows else None


def _agreement_section(verdict: Verdict) -> Section | None:
    # Of a task with two measures, the answers are the same.
    by_task = {each.row.task: each.row for each in verdict.judged}
    rows = [row for row in by_task.values() if row.answers]
    table = Table("Agreement with the base", _AGREEMENT, rows)
    return Section(table.label, [AGREEMENT], table=table) if rows else None


def _size_section(verdict: Verdict) -> Section:
    rows = [("base", verdict.base), ("candidate", verdict.candidate)]
    return Section("Size and time", [_ON_TIME], Table("Size and time", _SIZE, rows))


def _lost(verdict: Verdict, read: DocumentReader) -> list[Change]:
    changes = find_changes(verdict.base, [verdict.candidate], read)[2]
    return [change for change in changes if change.kind == LOST]


def _worse_section(lost: Sequence[Change], width: int) -> Section | None:
    columns = [
        Column("task", lambda change: change.task),
        Column("document", lambda change: change.sample.number),
    ]
    texts = (
        Column("end of the prompt", lambda change: change.sample.prompt[-width:]),
        Column("base, right", lambda change: change.before[:width]),
        Column("candidate, wrong", lambda change: change.after[:width]),
    )
    columns += texts if width else ()
    table = Table("Answers that changed for the worse", columns, lost[:SHOWN])
    counted = f"{len(table.rows)} of {len(lost)} are shown."
    return Section(table.label, [counted], table=table) if lost else None
