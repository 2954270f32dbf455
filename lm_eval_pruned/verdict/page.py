"""A verdict as sections: what the terminal, the Markdown and the HTML page show."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison_table import interval_text, number_text
from lm_eval_pruned.gate.check import CLAIM_LEVEL
from lm_eval_pruned.report.changed_answers import LOST, find_changes, written
from lm_eval_pruned.report.page import Cell, Section, Table, as_markdown, rendered
from lm_eval_pruned.report.sections import energy_section
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.verdict.decision import Judged, Verdict

TITLE = "May it be shipped?"
#: How many of the answers that changed for the worse are shown.
SHOWN = 20
#: Tasks on bias, by parts of their names.
ON_BIAS = ("bias", "bbq", "crows", "winogender", "fairness")
_HEADS = {
    "ship": "Ship: every score is shown to lie within its margin.",
    "do not ship": "Do not ship: {bad} of {all} scores fail.",
    "not decided": "Not decided: {open} of {all} scores are not shown to lie within their margins.",
}


def write_pages(
    verdict: Verdict, folder: str | Path, subtitle: str, *, texts: bool = True
) -> list[Path]:
    """Write ``verdict.html`` and ``verdict.md`` to a folder, and return them.

    `texts` says whether the pages show documents and answers.
    """
    sections = all_sections(verdict, texts=texts)
    rows = [
        asdict(each.row)
        | {"margin": each.margin, "verdict": each.word, "floor": each.floor}
        for each in verdict.judged
    ]
    page = rendered(
        "template.html",
        title=_title(verdict),
        subtitle=subtitle,
        sections=sections,
        scores=base64.b64encode(csv_table(rows[0], rows).encode()).decode("ascii"),
        scripts=[],
    )
    files = {
        "verdict.html": page,
        "verdict.md": as_markdown(_title(verdict), subtitle, sections),
    }
    for name, content in files.items():
        write_atomically(Path(folder, name), content)
    return [Path(folder, name) for name in files]


def as_text(verdict: Verdict) -> str:
    """Return a verdict for a terminal."""
    first, *others = all_sections(verdict)
    parts = [*first.paragraphs]
    for section in (first, *others):
        if section is not first:
            parts += [section.heading.upper(), *section.paragraphs]
        if table := section.table:
            cells = [[_cut(each.text) for each in row] for row in table.cells()]
            align = "l" * table.text + "r" * (len(table.columns) - table.text)
            parts.append(markdown_table(table.columns, cells, align, padded=True))
        if section.notes:
            parts.append("\n".join(f"- {note}" for note in section.notes))
    return "\n\n".join(parts) + "\n"


def all_sections(verdict: Verdict, *, texts: bool = True) -> list[Section]:
    """Return what there is to say, the answer first."""
    judged = verdict.judged
    on_bias = [
        each for each in judged if any(part in each.row.task for part in ON_BIAS)
    ]
    others = [each for each in judged if each not in on_bias]
    found = [
        _answer_section(verdict),
        _scores_section("Scores", others),
        _agreement_section(verdict),
        _scores_section("Bias", on_bias),
        _size_section(verdict),
        energy_section([verdict.base, verdict.candidate]),
        _worse_section(verdict, texts),
        Section("Remarks", notes=verdict.notes) if verdict.notes else None,
    ]
    return [each for each in found if each is not None]


def _title(verdict: Verdict) -> str:
    return f"{TITLE} {verdict.answer.capitalize()}"


def _answer_section(verdict: Verdict) -> Section:
    words = [each.word for each in verdict.judged]
    counts = {
        "bad": words.count("worse"),
        "open": words.count("undecided"),
        "all": len(words),
    }
    head = _HEADS[verdict.answer].format(**counts)
    notes = [
        f"{_name(each)}: {each.word}. {_advice(each.finding.message)}{_take(each)}"
        for each in sorted(verdict.judged, key=lambda each: each.word != "worse")
        if each.word in ("worse", "undecided")
    ]
    return Section("The answer", [head], notes=notes)


def _name(each: Judged) -> str:
    return f"{each.row.task} {each.row.metric.removesuffix(',none')}"


def _advice(message: str) -> str:
    return message.replace(
        "use a tolerance for this metric", "hold this metric by `lm-eval-pruned check`"
    ).replace("in the baseline", "of the base")


def _take(each: Judged) -> str:
    """Say what would decide a score."""
    need, seen = each.need, each.row.documents
    if need is None or seen is None:
        return ""
    if need.documents is None:
        return " No number of documents can be given that would decide."
    if need.documents <= seen:
        return (
            f" {seen} documents had a good chance to decide if the models did not differ: they may "
            "well differ. A wider margin, or the other documents of the task, would tell."
        )
    text = f" It would take about {need.documents:,} documents in place of {seen:,}"
    if need.seconds is not None:
        text += (
            f", {_minutes((need.documents - seen) * need.seconds)} more for both models"
        )
    if need.there_are is not None and need.there_are < need.documents:
        text += f"; the task has {need.there_are:,}, so take a wider margin or a larger task"
    return f"{text}."


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds >= 90 else "less than two minutes"


def _scores_section(heading: str, judged: Sequence[Judged]) -> Section | None:
    if not judged:
        return None
    colours = {"better": "better", "worse": "worse"}
    rows, notes = [], []
    for each in judged:
        row = each.row
        numbers = [row.base_score, row.score, each.floor]
        cells: list[Any] = [
            row.task,
            row.metric.removesuffix(",none"),
            Cell(each.word, colours.get(each.word, "")),
        ]
        cells += [number_text(number, ".4f") for number in numbers]
        cells += [f"{row.difference:+.4f}", interval_text(row.low, row.high, 4)]
        rows.append([*cells, each.margin, str(row.documents or "-")])
        low = row.base_score <= each.floor if each.floor is not None else False
        if low and each.finding.status != "fail":
            notes.append(
                f"The base has no more than the floor in {_name(each)}: this task cannot show a "
                "loss."
            )
    text = (
        "The floor is the score without knowledge. Differences are candidate minus base; their "
        f"intervals cover {1 - 2 * CLAIM_LEVEL:.0%}, so that one beyond the margin is not worse at "
        f"level {CLAIM_LEVEL:g}."
    )
    if heading == "Bias":
        text = (
            "Of the answers to questions that their context leaves open: acc is the share of "
            "\u201cnot known\u201d; bias is 0.5 without one, and 1 where each answer follows the "
            "stereotype. A change in either direction counts."
        )
    columns = ["task", "metric", "verdict", "base", "candidate", "floor", "difference"]
    columns += ["90% interval", "margin", "documents"]
    return Section(
        heading, [text], table=Table(heading, columns, rows, text=3), notes=notes
    )


def _agreement_section(verdict: Verdict) -> Section | None:
    if not verdict.agreements:
        return None
    rows = [
        [
            task,
            str(each.documents),
            f"{each.equal:.1%}",
            number_text(each.divergence, ".4f"),
            number_text(each.beginning, ".1%"),
        ]
        for task, each in verdict.agreements.items()
    ]
    text = (
        "How far both models answer alike, right or wrong. KL is that of the choices, in nats; the "
        "last column is how much of the base's text the candidate's begins with, in words."
    )
    columns = ["task", "documents", "equal answers", "KL", "same beginning"]
    heading = "Agreement with the base"
    return Section(heading, [text], table=Table(heading, columns, rows))


def _size_section(verdict: Verdict) -> Section | None:
    rows = []
    for name, run in (("base", verdict.base), ("candidate", verdict.candidate)):
        of = run.config
        parameters = run.pruning.get("parameters_after") or of.get(
            "model_num_parameters"
        )
        numbers = [number_text(n, ",") for n in (parameters, of.get("weight_bytes"))]
        rows.append([name, *numbers, str(of.get("model_dtype") or "-")])
    if all(row[1:3] == ["-", "-"] for row in rows):
        return None
    columns = ["model", "parameters", "bytes in memory", "dtype"]
    return Section("Size", table=Table("Size", columns, rows))


def _worse_section(verdict: Verdict, texts: bool) -> Section | None:
    changes = [
        c for c in find_changes(verdict.base, [verdict.candidate])[2] if c[0] == LOST
    ]
    if not changes:
        return None
    columns, rows = ["task", "document"], []
    for _, _, task, before, question, after in changes[:SHOWN]:
        row = [task, question.number]
        if texts:
            asked = question.prompt[-160:]
            row += [
                asked,
                written(before, question)[:160],
                written(after, question)[:160],
            ]
        rows.append(row)
    columns += (
        ["end of the question", "base, right", "candidate, wrong"] if texts else []
    )
    heading = "Answers that changed for the worse"
    said = f"{min(SHOWN, len(changes))} of {len(changes)}."
    return Section(
        heading, [said], table=Table(heading, columns, rows, text=len(columns))
    )


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 48 else f"{line[:20]} ... {line[-23:]}"
