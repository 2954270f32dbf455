"""A verdict as sections: what the terminal, the Markdown and the HTML page show."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison_table import interval_text, number_text
from lm_eval_pruned.compare.kept import NO_LOSS
from lm_eval_pruned.compare.margin import Margin
from lm_eval_pruned.report.changed_answers import LOST, find_changes
from lm_eval_pruned.report.page import Cell, Section, Table, as_files, as_markdown
from lm_eval_pruned.report.sections import energy_section
from lm_eval_pruned.results.groups import family_of, is_loss, is_perplexity
from lm_eval_pruned.results.runs import results_files
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import csv_table
from lm_eval_pruned.verdict.decision import ANSWERS, Judged
from lm_eval_pruned.verdict.needed import seconds_per_document


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.verdict.decision import Verdict

#: How many of the answers that changed for the worse are shown.
SHOWN = 20
#: Tasks on bias, by parts of their names.
ON_BIAS = ("bias", "bbq", "crows", "winogender")
#: Words that keep a candidate from being shipped.
_REASONS = ("worse", "undecided")
_COLUMNS = ["task", "metric", "verdict", "base", "candidate", "floor", "kept"]
_COLUMNS += ["difference", "90% interval", "margin", "documents"]
_HOW_TO_READ = (
    "The floor is the score without knowledge, and kept the share of what the base has above it, with "
    "its 90 % interval. The difference is candidate minus base; a score is "
    "not worse if its 90 % interval lies above the margin, and equivalent if it lies within the margin "
    "on both sides."
)
_ON_BIAS = (
    "Bias is 0.5 where answers follow stereotypes as often as they contradict them, and 1 where "
    "each follows one; a change either way counts. acc is the share of right answers; here "
    "the right answer is often that nobody can know."
)
_ON_AGREEMENT = (
    "How often both models answer alike, right or wrong. KL is the divergence over the choices, in nats; "
    "the last column is the share of the base's text, in words, before the candidate's differs."
)
_ON_TIME = (
    "Time is the wall time of the evaluation, over all documents, on the machine that made the "
    "results; results that lm_eval wrote include loading the model. It is not the latency of a "
    "server: lm-eval-pruned profile measures latency and throughput."
)


def write_pages(verdict: Verdict, folder: Path, subtitle: str, *, texts: bool) -> str:
    """Write ``verdict.html`` and ``verdict.md``, with `texts` of answers or without.

    Returns what a terminal shows.
    """
    title = f"May it be shipped? {ANSWERS[verdict.code].capitalize()}"
    sections = _sections(verdict, 160 * texts)
    rows = [
        asdict(e.row) | {"margin": e.margin, "verdict": e.word} for e in verdict.judged
    ]
    files = as_files("verdict", title, subtitle, sections, csv_table(rows[0], rows))
    for name, content in files.items():
        write_atomically(folder / name, content)
    short = _sections(verdict, 40 * texts)
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


def _sections(verdict: Verdict, width: int) -> list[Section]:
    """Return what there is to say, the answer first; texts are cut to a width."""
    remarks = [Section("Remarks", notes=verdict.notes)] * bool(verdict.notes)
    worse = _worse_section(verdict, width)
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


def _scores_section(
    heading: str, text: str, judged: Sequence[Judged], beside: Sequence[Difference] = ()
) -> Section | None:
    rows: list[list[Cell | str]] = []
    notes = []
    for each in [*judged, *(Judged(row, "-", "not judged", "", "") for row in beside)]:
        row, floor = each.row, each.row.floor
        word = f"{each.word} (at floor)" if row.at_floor else each.word
        scores = row.base_score, row.score, floor.floor if floor else None
        rows.append(
            [
                row.task,
                row.metric.removesuffix(",none"),
                Cell(word, each.word),
                *(number_text(score, ".4f") for score in scores),
                row.kept_text or "-",
                f"{row.difference:+.4f}",
                interval_text(row.low, row.high, 4),
                each.margin,
                str(row.documents or "-"),
            ]
        )
        if each in judged and floor and floor.base_above_floor is False:
            notes.append(
                f"{_name(each)}: the base is not shown to be above the floor "
                f"({floor.floor_name}), so this score cannot show a loss."
            )
    table = Table(heading, _COLUMNS, rows, text=3)
    return Section(heading, [text], table=table, notes=notes) if rows else None


def _agreement_section(verdict: Verdict) -> Section | None:
    rows = []
    # Of a task with two measures, the answers are the same.
    for row in {each.row.task: each.row for each in verdict.judged}.values():
        if of := row.answers:
            more = number_text(of.kl, ".4f"), number_text(of.beginning, ".1%")
            rows.append(
                [row.task, str(row.documents), f"{of.equal_answers:.1%}", *more]
            )
    columns = ["task", "documents", "equal answers", "KL", "same beginning"]
    table = Table("Agreement with the base", columns, rows)
    return Section(table.label, [_ON_AGREEMENT], table=table) if rows else None


def _size_section(verdict: Verdict) -> Section:
    rows = []
    for name, run in (("base", verdict.base), ("candidate", verdict.candidate)):
        sizes = map(run.config.get, ("model_num_parameters", "weight_bytes"))
        time = number_text(seconds_per_document(results_files(run.path)), ".3g")
        rows.append([name, *(number_text(each, ",") for each in sizes), time])
    columns = ["model", "parameters", "bytes in memory", "s / document"]
    table = Table("Size and time", columns, rows)
    return Section(table.label, [_ON_TIME], table=table)


def _worse_section(verdict: Verdict, width: int) -> Section | None:
    changes = find_changes(verdict.base, [verdict.candidate])[2]
    lost = [each for each in changes if each.kind == LOST]
    rows = []
    for _, _, task, question, *answers in lost[:SHOWN]:
        texts = [question.prompt[-width:], *(each[:width] for each in answers)]
        rows.append([task, question.number, *(texts if width else [])])
    columns = ["task", "document"]
    columns += ["end of the prompt", "base, right", "candidate, wrong"] * bool(width)
    table = Table(
        "Answers that changed for the worse", columns, rows, text=len(columns)
    )
    counted = f"{len(rows)} of {len(lost)} are shown."
    return Section(table.label, [counted], table=table) if rows else None
