"""A comparison as Markdown tables, CSV and JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.answer import NO_LOSS
from lm_eval_pruned.results.groups import scale_name
from lm_eval_pruned.util.tables import Column, Table, csv_table, interval_text


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.compare.judge import Difference


def _claim(name: str) -> Callable[[Difference], Any]:
    return lambda row: row.claim and getattr(row.claim, name)


def _answers(name: str) -> Callable[[Difference], Any]:
    return lambda row: row.answers and getattr(row.answers, name)


def _commonest(row: Difference) -> str | None:
    both = row.answers and (row.answers.base_commonest, row.answers.commonest)
    return "{:.0%} -> {:.0%}".format(*both) if both else None


_INTERVAL = Column(
    "interval", lambda row: interval_text(row.low, row.high), ">", terminal=True
)
#: Of `Difference`. CSV and JSON have its attributes.
DIFFERENCES = (
    Column("run", lambda row: row.run, terminal=True),
    Column("task", lambda row: row.task, terminal=True),
    Column("metric", lambda row: row.metric),
    Column("base", lambda row: row.base_score, ".4f"),
    Column("score", lambda row: row.score, ".4f", terminal=True),
    Column("difference", lambda row: row.difference, "+.4f", True, coloured=True),
    _INTERVAL,
    Column("relative", lambda row: row.relative, "+.1%"),
    Column("p", lambda row: row.p, "p"),
    Column("q", lambda row: row.q, "p", terminal=True),
    Column("margin", _claim("margin"), ".4g"),
    Column("q margin", _claim("q"), "p"),
    Column("documents", lambda row: row.documents, "d"),
    Column("floor", lambda row: row.floor and row.floor.floor, ".4f", terminal=True),
    Column("kept", lambda row: row.floor and row.floor.kept_text, ">", terminal=True),
    Column("equal answers", _answers("equal_answers"), ".0%", terminal=True),
    Column("KL", _answers("kl"), ".3f"),
    Column("commonest answer", _commonest, ">"),
    Column("test", lambda row: row.method),
    Column("verdict", lambda row: row.said, terminal=True, coloured=True),
)
#: Of `Standing`, of the base.
ABOVE = {True: "yes", False: f"no: {NO_LOSS}", None: "not tested"}
FLOORS = (
    Column("task", lambda row: row.task, terminal=True),
    Column("metric", lambda row: row.metric),
    Column("without knowledge", lambda row: row.floor_name, terminal=True),
    Column("floor", lambda row: row.floor, ".4f", terminal=True),
    Column("base", lambda row: row.score, ".4f", terminal=True),
    Column("p", lambda row: row.p_floor, "p", terminal=True),
    Column("test", lambda row: row.floor_test),
    Column("base is above", lambda row: ABOVE[row.above_floor], terminal=True),
)
#: Of `Trend`.
TRENDS = (
    Column("series", lambda row: row.series),
    Column("task", lambda row: row.task),
    Column("metric", lambda row: scale_name("", row.metric)),
    Column("n", lambda row: row.n, "d"),
    Column("slope", lambda row: row.slope, "+.4f"),
    _INTERVAL,
    Column("p", lambda row: row.p, "p"),
    Column("q", lambda row: row.q, "p"),
    Column("documents", lambda row: row.units or None, "d"),
    Column("test", lambda row: row.method),
)


#: Of `Correlation`.
CORRELATIONS = (
    Column("series", lambda row: row.series),
    Column("task", lambda row: scale_name(*row.tasks[0])),
    Column("task", lambda row: scale_name(*row.tasks[1])),
    Column("n", lambda row: row.n, "d"),
    Column("Pearson r", lambda row: row.pearson, "+.3f"),
    Column(
        "interval",
        lambda row: interval_text(row.pearson_low, row.pearson_high, 2),
        ">",
    ),
)
DIFFERENCE = (
    "difference = run - base; q: p after Benjamini-Hochberg over the runs of each task without random "
    "controls, so that among many tasks some may show a difference by chance; interval: widened to match "
    "q, so that it excludes 0 exactly where a difference is shown."
)
FLOOR = (
    "Floor: the score without knowledge that the task declares; else chance, or the best score of a model that "
    "knows nothing, or of always giving the commonest right answer, where it is shown to be above chance; at "
    "floor: not shown to be above it (one-sided tests); kept: the share of what the base has above the floor, "
    "where it is shown to have any. If the base is not shown to be above its floor, the task cannot show a loss."
)
_ALIKE = (
    "equal answers: share of documents with the same answer as the base; KL: mean divergence of the "
    "distribution over choices from that of the base, in nats; "
)
ANSWERS = (
    f"{_ALIKE}commonest answer: its share of all answers, for the base and the run."
)
AGREEMENT = f"{_ALIKE}same beginning: share of the base's text, in words, before the candidate's differs."
TREND = (
    "Trend over expansion ratios (change of the score when the ratio rises by 1, positive if the score "
    "falls with pruning; tested on the slopes of single documents):"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (the interval treats sizes as independent draws, "
    "which steps of pruning are not):"
)


#: Characters of a line in a terminal, and the columns that go first where there are more.
WIDTH, SPARED = 80, ("equal answers", "floor", "score", "q", "without knowledge", "p")


def table_of(
    label: str, columns: Sequence[Column], rows: Sequence[Any], alpha: float
) -> Table:
    """Return rows in those of the columns that say something, an interval with its confidence."""
    titles = {"interval": f"{1 - alpha:.0%} interval"}
    filled = [
        column._replace(title=titles.get(column.title, column.title))
        for column in columns
        if any(column.cell(row).text != "-" for row in rows)
    ]
    return Table(label, filled, rows)


def findings(comparison: Comparison) -> str:
    """Return in a sentence how many scores of the runs differ, and which way."""
    counts = Counter(row.verdict for row in comparison.rows if row.primary)
    parts = (f"{count} {verdict}" for verdict, count in counts.most_common())
    return f"Compared with {comparison.base}: {', '.join(parts)}."


def fitted(table: Table) -> str:
    """Return the columns of a table for a terminal, whose lines have at most `WIDTH` characters.

    The columns `SPARED` go first, then the middle of the longest names of runs and tasks.
    """
    table = replace(table, columns=[c for c in table.columns if c.terminal])

    def width(table: Table) -> int:
        return len(table.markdown(padded=True).partition("\n")[0])

    for title in SPARED:
        if width(table) > WIDTH:
            columns = [column for column in table.columns if column.title != title]
            table = replace(table, columns=columns)
    whole, longest = table, WIDTH
    while width(table) > WIDTH and longest > 5:
        longest -= 1
        table = replace(whole, columns=[_cut(c, longest) for c in whole.columns])
    return table.markdown(padded=True)


def _cut(column: Column, longest: int) -> Column:
    if column.title not in ("run", "task"):
        return column
    return column._replace(value=lambda row: shortened(column.value(row), longest))


def shortened(name: str, longest: int) -> str:
    """Return a name without its middle where it has more characters than `longest`.

    Example:
        >>> shortened("prune_percent-40", 9)
        'prun…t-40'
    """
    if len(name) <= longest:
        return name
    end = (longest - 1) // 2
    return f"{name[: longest - 1 - end]}…{name[-end:]}"


def as_table(
    comparison: Comparison, *, everything: bool = True, padded: bool = False
) -> str:
    """Return Markdown tables, `padded` for a terminal; without `everything`, those that fit one."""
    rows, margin = comparison.rows, comparison.margin
    shown = [row for row in rows if everything or row.primary]
    floors = [row for row in comparison.floors if everything or row.primary]
    tables: list[tuple[str, Sequence[Column], Sequence[Any]]]
    tables = [("", DIFFERENCES, shown), (FLOOR, FLOORS, floors)]
    about = ["--all shows all columns, restated metrics, trends and correlations."]
    if everything:
        restated = "Rows that are `restated` are other metrics of the same answers."
        about = [DIFFERENCE, *[restated] * any(not row.primary for row in rows)]
        if margin:
            about.append(
                f"Margin: {margin.text}; {margin.verdict} is shown where q margin is below "
                f"{comparison.alpha:g} (two one-sided tests)."
            )
        about += [ANSWERS] * any(row.answers for row in rows)
        tables.append((TREND, TRENDS, comparison.trends))
        tables.append((CORRELATION, CORRELATIONS, comparison.correlations))
    parts = [f"{findings(comparison)} {' '.join(about)}"]
    for heading, columns, lines in tables:
        if lines:
            table = table_of(heading, columns, lines, comparison.alpha)
            text = table.markdown(padded=padded) if everything else fitted(table)
            parts += [heading, text]
    notes = [f"Note: {note}" for note in comparison.notes]
    if not everything:
        parts, notes = [*map(_wrapped, parts)], [*map(_wrapped, notes)]
    parts.append("\n".join(notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def _wrapped(text: str) -> str:
    if text[:1] == "|":
        return text
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def record(row: Difference) -> dict[str, Any]:
    """Return a difference with its claim, floor and answers as one row of CSV."""
    values = _shown(row)
    for name in ("claim", "floor", "answers", "units"):
        del values[name]
    if claim := row.claim:
        values |= {"margin": claim.margin, "p_margin": claim.p, "q_margin": claim.q}
    if row.floor:
        floor = asdict(row.floor)
        kept = floor.pop("kept") or dict.fromkeys(("share", "low", "high"))
        names = ("kept", "kept_low", "kept_high")
        values |= floor | dict(zip(names, kept.values(), strict=True))
    return values | (asdict(row.answers) if row.answers else {})


def _shown(item: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that its text shows, too."""
    return {f.name: getattr(item, f.name) for f in fields(item) if f.repr}


def as_csv(comparison: Comparison) -> str:
    """Return the differences as CSV; of margins, floors and answers where there are any."""
    return csv_table([record(row) for row in comparison.rows])


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    text = json.dumps(comparison, default=_shown)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2) + "\n"


FORMATS = {"markdown": as_table, "csv": as_csv, "json": as_json}
