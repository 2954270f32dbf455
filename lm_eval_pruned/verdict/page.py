"""A verdict as sections: what the terminal, the Markdown and the HTML page show."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.answer import DO_NOT_SHIP, NO_LOSS, REFUTED, SHIP
from lm_eval_pruned.compare.claims import LEAST_UNITS_OF_MARGIN
from lm_eval_pruned.compare.comparison_table import (
    AGREEMENT,
    DIFFERENCES,
    FLOOR,
    record,
)
from lm_eval_pruned.compare.judge import MEAN, OTHER, PART, SCORE
from lm_eval_pruned.report.changed_answers import LOST, find_changes
from lm_eval_pruned.report.page import Section, as_markdown, table_section, write_page
from lm_eval_pruned.report.sections import energy_section
from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.files import listed
from lm_eval_pruned.results.groups import family_of, primary_metrics
from lm_eval_pruned.results.metrics import SHARE, is_bias, is_loss, is_perplexity
from lm_eval_pruned.util.tables import Cell, Column, csv_table
from lm_eval_pruned.verdict.decision import what_decides
from lm_eval_pruned.verdict.divergence import KINDS, LONG_TEXT, TEXTS, divergences_of
from lm_eval_pruned.verdict.hub import without_paths
from lm_eval_pruned.verdict.models import CONTEXT
from lm_eval_pruned.verdict.sizes import bytes_on_disk
from lm_eval_pruned.verdict.written import ENDINGS, WRITTEN


if TYPE_CHECKING:
    from pathlib import Path

    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.judge import Claim, Difference
    from lm_eval_pruned.verdict.decision import Verdict

#: How many of the answers that changed for the worse are shown.
SHOWN = 20
#: What the first line calls the losses on other texts than the first.
_LOSSES = {KINDS: " on other kinds of text", LONG_TEXT: " on long text"}
#: How many members of groups or other measures the first line names.
NAMED = 3
_HOW_TO_READ = (
    f"{FLOOR} The interval of what is kept covers 90 %. The difference is candidate minus base; a score "
    "is not worse if its 90 % interval lies above the margin, and equivalent if it lies within the margin "
    f"on both sides. Of scores without limits, both take {LEAST_UNITS_OF_MARGIN} independent documents."
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
_ON_WRITING = (
    "Of written answers, `ended` is the share that ends by itself, and `repeated` the share of tokens that are "
    "among the four before them."
)
_ON_DIVERGENCE = (
    "In nats, over all positions that are compared; `same top` is the share of positions with the same likeliest "
    "token, `change of right` the root mean square of the change in the probability of the right one. Close to "
    "the base, a mean divergence does not rank candidates (arXiv 2606.19558)."
)
_ON_SIZE = (
    "Bytes in memory are those of the weights after the evaluation, bytes on disk those of the files they were "
    "loaded from: what prunes or quantises while it loads shows only in memory, and what is unpacked for it, such "
    "as GGUF, only on disk."
)
_ON_TIME = (
    "Time is the wall time of the evaluation, over all documents, on the machine that made the "
    "results; results that lm_eval wrote include loading the model. It is not the latency of a "
    "server: lm-eval-pruned profile measures latency and throughput."
)


def title_of(verdict: Verdict) -> str:
    """Return the title of a page."""
    return f"May it be shipped? {verdict.answer.capitalize()}"


def write_pages(verdict: Verdict, folder: Path, subtitle: str, *, texts: bool) -> str:
    """Write ``verdict.html`` and ``verdict.md``, with `texts` of answers or without.

    Returns what a terminal shows, which leaves out the answers that changed.
    """
    title, tables = title_of(verdict), _tables(verdict)
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
        record(_with_floor(verdict, claim))
        | {"margin": _margin(claim), "verdict": claim.word}
        for claim in verdict.about(SCORE)
    ]
    sections = [*tables, *([changed] if changed else []), *remarks]
    write_page(folder, "verdict", title, subtitle, sections, csv_table(rows))
    return as_markdown(title, subtitle, [*tables, *remarks], terminal=True)


def _with_floor(verdict: Verdict, claim: Claim) -> Difference:
    """Return the difference of a claim with the floor and the answers that `compare` found."""
    case, row = claim.row.case, claim.row
    found = next((r for r in verdict.rows if r.case.key == case.key), None)
    if found is None or case.member:
        return row
    return replace(row, floor=found.floor, answers=found.answers)


def card_section(verdict: Verdict, base: str) -> str:
    """Return the tables for the card of the candidate, compared with what `base` names.

    A card is published: it has no texts of documents, and no folders of this machine. So it has no notes,
    which quote errors, and both runs go by other names than those of their files.
    """
    subtitle = f"Compared with {without_paths(base)}, by `lm-eval-pruned verdict`."
    named = verdict._replace(
        base=replace(verdict.base, name="base"),
        candidate=replace(verdict.candidate, name="candidate"),
    )
    sections = [replace(section, notes=()) for section in _tables(named)]
    return re.sub(r"(?m)^#", "##", as_markdown(title_of(verdict), subtitle, sections))


def headline(verdict: Verdict) -> str:
    """Return the answer, what is kept, what the loss on text is, and which other scores do not pass."""
    parts, margins = [], []
    for claim in verdict.about(SCORE):
        row, metadata = _with_floor(verdict, claim), verdict.base.metadata
        label = family_of(row.task, metadata).label.lower()
        margin = row.case.margin
        if verdict.base.exact_floor(row.task, row.metric) is not None:
            kept = row.floor and row.floor.kept_text
            parts.append(f"{label} kept {kept or 'not known'}")
            share = margin and margin.share
            margins += [f"{1 - share:.0%}".replace("%", " %")] if share else []
        elif is_loss(row.metric) and row.relative is not None:
            name = "perplexity" if is_perplexity(row.metric) else "loss"
            about = _LOSSES.get(row.task, "")
            parts.append(f"{name}{about} {row.relative:+.1%}".replace("%", " %"))
        elif claim in verdict.open:
            parts.append(f"{claim.name} {claim.word}")
    fallen = verdict.fallen
    named = [c for c in verdict.about(PART) if c in verdict.open and c not in fallen]
    parts += [
        f"{claim.name} {claim.word}"
        for claim in [*verdict.about(MEAN), *named[:NAMED]]
        if claim in verdict.open
    ]
    if verdict.changed:
        parts.insert(0, f"{' and '.join(verdict.changed)} not as in the base")
    line = f"{verdict.answer}: {', '.join(parts)}" if parts else verdict.answer
    if fallen:
        texts = [*map(_fall, fallen[:NAMED])]
        texts += [f"{len(fallen) - NAMED} more"] * (len(fallen) > NAMED)
        joint = ", although " if verdict.answer == SHIP else "; " if parts else ": "
        line += f"{joint}{', '.join(texts)}"
    return f"{line}; margin {', '.join(dict.fromkeys(margins))}" if margins else line


def _fall(claim: Claim) -> str:
    """Say by how much a score fell, with its interval of 90 %; in points where it lies between 0 and 1."""
    row, points = claim.row, claim.row.case.metric.limits == SHARE
    times, unit = (100, " points") if points else (1, "")
    verb = "fell" if row.difference < 0 else "rose"
    ends = [f"{times * end:+.3g}" for end in (row.low, row.high) if end is not None]
    return f"{claim.name} {verb} by {abs(times * row.difference):.3g}{unit} [{', '.join(ends)}]"


def _tables(verdict: Verdict) -> list[Section]:
    """Return what there is to say without texts of documents, the answer first."""
    known: list[tuple[Claim, Difference]]
    known = [(claim, _with_floor(verdict, claim)) for claim in verdict.claims]
    judged = [pair for pair in known if pair[0].about == SCORE]
    bias_tasks = {row.task for _, row in judged if is_bias(row.metric)}
    on_bias = [pair for pair in judged if pair[1].task in bias_tasks]
    scores: list[tuple[Claim | None, Difference]]
    scores = [pair for pair in judged if pair[1].task not in bias_tasks]
    told = [*verdict.fallen, *verdict.open]
    scores += [pair for pair in known if pair[0].about == PART and pair[0] in told]
    counted = primary_metrics([verdict.base, verdict.candidate])
    scores += [
        p
        for p in known
        if p[0].about == OTHER and (p[0] in told or p[1].case.key in counted)
    ]
    keys = {pair[1].case.key for pair in known}
    left = [row for row in verdict.rows if row.case.key in [*counted, *_kl(verdict)]]
    scores += [(None, row) for row in left if row.case.key not in keys]
    about = [_HOW_TO_READ, *[_ON_KL] * any(row.metric == KL for _, row in scores)]
    about += [_ON_WRITING] * any(row.metric in ENDINGS for _, row in scores)
    fields = {t: about.get("level", "") for t, about in verdict.base.metadata.items()}
    apart = divergences_of(verdict.candidate, fields)
    size = [("base", verdict.base), ("candidate", verdict.candidate)]
    # Of a task with two measures, the answers are the same.
    rows = {row.task: row for _, row in judged}
    answered = [row for row in rows.values() if row.answers]
    wrote = any(row.answers and row.answers.same_tokens is not None for row in answered)
    agreement = _AGREEMENT if wrote else _AGREEMENT[:-1]
    sections = [
        _answer_section(verdict),
        _files_section(verdict),
        table_section("Scores", about, _SCORES, scores),
        table_section("Agreement with the base", [AGREEMENT], agreement, answered),
        table_section("Divergence from the base", [_ON_DIVERGENCE], _DIVERGENCE, apart),
        table_section("Bias", [_ON_BIAS], _SCORES, on_bias),
        table_section("Size and time", [_ON_SIZE, _ON_TIME], _SIZE, size),
        energy_section([verdict.base, verdict.candidate]),
    ]
    return [section for section in sections if section is not None]


def _kl(verdict: Verdict) -> list[tuple[str, str]]:
    return [row.case.key for row in verdict.rows if row.metric == KL]


def _answer_section(verdict: Verdict) -> Section:
    """Return the answer, which scores could show a loss and which not, and what was decided of them."""
    judged, means = verdict.about(SCORE), verdict.about(MEAN)
    blind = [claim for claim in judged if claim.word == NO_LOSS]
    lost = [claim for claim in verdict.open if claim.word in REFUTED]
    undecided = [claim for claim in verdict.open if claim.word not in REFUTED]
    keys = [claim.row.case.key for claim in blind]
    low = [floor for floor in verdict.floors if (floor.task, floor.metric) in keys]
    names = "; ".join(f"{_name(floor)}: {floor.why_not}" for floor in low)
    not_above = "the base is not shown to be above the floor of"
    if not blind:
        able = "Every score here could have shown a loss." * (verdict.answer == SHIP)
    elif blind == judged:
        able = f"No score can show a loss, because {not_above} any task ({names})."
    else:
        able = (
            f"{len(judged) - len(blind)} of {len(judged)} scores can show a loss; {not_above} the "
            f"others ({names})."
        )
    line = headline(verdict)
    if verdict.answer == SHIP:
        reason = (
            f"Each score{' that can show a loss' * bool(blind)} is shown to lie within its margin"
            f"{', alone or on average' * bool(means)}."
        )
    elif verdict.answer == DO_NOT_SHIP:
        reason = f"{len(lost)} of {len(verdict.claims)} claims are shown to be wrong."
    elif verdict.changed and not undecided:
        reason = "The two are served otherwise, so that their answers say nothing of the weights."
    elif undecided:
        reason = f"{len(undecided)} of {len(verdict.claims)} claims are not shown."
    else:
        reason = "Evaluate tasks that the base can do."
    told = [*lost, *undecided]
    parts = [claim for claim in told if claim.about == PART]
    # There may be dozens, and each takes seconds.
    rest = parts[NAMED:]
    notes = [f"{c.name}: {c.word}. {_why(c)}" for c in told if c not in rest]
    if rest:
        notes.append(f"{len(rest)} more: {listed([claim.name for claim in rest])}.")
    return Section(
        verdict.answer.capitalize(),
        [
            f"{line[:1].upper()}{line[1:]}. {able}".rstrip(),
            reason,
            *(m.sentence for m in means),
            *[_untested(verdict)] * any(t in verdict.base.tasks() for t in TEXTS),
        ],
        notes=notes,
    )


def _files_section(verdict: Verdict) -> Section | None:
    """Return the settings, apart from the weights, in which the two models differ."""
    notes = [
        f"{name}: {_short(before)} in the base, {_short(after)} in the candidate"
        for name, (before, after) in verdict.served.items()
    ]
    return Section("Files that differ", notes=notes) if notes else None


def _short(value: Any) -> str:
    """Return the value of a setting, shortened for the page."""
    text = json.dumps(value, ensure_ascii=False)
    return f"`{shorten(text, 160, placeholder=' ...')}`"


def _untested(verdict: Verdict) -> str:
    """Say in a sentence what no task of a verdict has tested."""
    tasks = {*verdict.base.tasks(), *verdict.candidate.tasks()}
    about = verdict.base.metadata.get(LONG_TEXT, {})
    longest = f"context beyond {int(about.get('context', CONTEXT)):,} tokens"
    missing = [
        "tools", "images",
        longest if LONG_TEXT in tasks else "long context",
        *["written answers"] * (WRITTEN not in tasks),
        "languages other than English, German and Spanish" if KINDS in tasks else "other languages",
    ]  # fmt: skip
    return f"Not tested: {', '.join(missing)}."


def _why(claim: Claim) -> str:
    """Return what would decide a claim, or what is known of it."""
    more = what_decides(claim) if claim.word == "undecided" else ""
    known = claim.message
    if claim.p is not None and more:
        return more
    return f"{known} {more}".rstrip()


def _name(row: Standing) -> str:
    return f"{row.task} {row.metric.removesuffix(',none')}"


def _compared(title: str, shown_as: str = "") -> Column:
    """Return a column of `compare`, of the difference that was judged."""
    column = next(column for column in DIFFERENCES if column.title == title)
    value = lambda pair: column.value(pair[1])
    return column._replace(title=shown_as or title, value=value, coloured=False)


def _word(pair: tuple[Claim | None, Difference]) -> Cell:
    claim, row = pair
    word = claim.word if claim else "not judged"
    low = " (at floor)" * (row.at_floor and word != "not judged")
    return Cell(f"{word}{low}", word)


def _task(pair: tuple[Claim | None, Difference]) -> str:
    row = pair[1]
    return f"{row.case.key[0]}: {row.task}" if row.case.member else row.task


def _margin(claim: Claim | None) -> str | None:
    margin = claim.row.case.margin if claim and claim.about != OTHER else None
    return margin.text if margin else None


#: Of a claim, None where nothing is judged, and its difference.
_SCORES = (
    Column("task", _task),
    Column("metric", lambda pair: pair[1].metric.removesuffix(",none")),
    Column("verdict", _word),
    _compared("base"),
    _compared("score", "candidate"),
    _compared("floor"),
    _compared("kept"),
    _compared("difference"),
    _compared("interval", "90% interval"),
    Column("margin", lambda pair: _margin(pair[0]), ">"),
    _compared("documents"),
)
#: Of `Difference`.
_AGREEMENT = (
    Column("task", lambda row: row.task),
    Column("documents", lambda row: row.documents, "d"),
    Column("equal answers", lambda row: row.answers.equal_answers, ".1%"),
    Column("KL", lambda row: row.answers.kl, ".4f"),
    Column("same beginning", lambda row: row.answers.beginning, ".1%"),
    Column("same 8 tokens", lambda row: row.answers.same_tokens, ".1%"),
)
#: Of `Divergence`.
_DIVERGENCE = (
    Column("task", lambda row: row.task),
    Column("part", lambda row: row.level),
    Column("positions", lambda row: row.positions, ",d"),
    Column("mean", lambda row: row.mean, ".4f"),
    Column("median", lambda row: row.median, ".4f"),
    Column("90 %", lambda row: row.at_90, ".4f"),
    Column("99 %", lambda row: row.at_99, ".4f"),
    Column("99.9 %", lambda row: row.at_999, ".4f"),
    Column("same top", lambda row: row.same_top, ".1%"),
    Column("change of right", lambda row: row.change_of_right, ".2%"),
)
#: Of a name and a run.
_SIZE = (
    Column("model", lambda row: row[0]),
    Column("parameters", lambda row: row[1].config.get("model_num_parameters"), ","),
    Column("bytes in memory", lambda row: row[1].config.get("weight_bytes"), ","),
    Column("bytes on disk", lambda row: bytes_on_disk(row[1]), ","),
    Column(
        "s / document",
        lambda row: row[1].seconds_per_document(row[1].evaluated),
        ".3g",
    ),
)
#: Of `Change`; the last three are texts.
_CHANGED = (
    Column("task", lambda change: change.task),
    Column("document", lambda change: change.question.number),
    Column("end of the prompt", lambda change: change.question.prompt[-160:]),
    Column("base, right", lambda change: change.before[:160]),
    Column("candidate, wrong", lambda change: change.after[:160]),
)
