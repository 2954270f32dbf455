"""A comparison as Markdown tables, text for a terminal, CSV and JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison_rows import Comparison, Difference
from lm_eval_pruned.results.groups import scale_name
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_eval_pruned.compare.margins import Claim

#: What the tables of trends and correlations show.
TREND = (
    "Trend over expansion ratios (change of the score per 1 of ratio, positive where it falls "
    "with pruning; slopes of single documents):"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (the interval takes the sizes for "
    "independent draws, which steps of pruning are not; p both: both tasks have a trend):"
)


def p_text(p: float | None) -> str:
    """Return a p value as tables show it."""
    if p is None:
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def number_text(value: float | None, form: str, without: str = "-") -> str:
    """Return a number in the given format, or `without` one a dash."""
    return without if value is None else format(value, form)


def interval_text(low: float | None, high: float | None, digits: int) -> str:
    """Return an interval as tables show it, or a dash where it lacks an end."""
    if low is None or high is None:
        return "-"
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def documents_text(row: Difference) -> str:
    """Return how many documents a row is of, and of how many where it is partial."""
    if row.of is not None:
        return f"partial: {row.documents} of {row.of}"
    return str(row.documents or "-")


def _claimed(claim: Claim | None) -> str:
    """Return the interval that decides on a claim, which may be open at one side."""
    if claim is None:
        return "-"
    low = number_text(claim.low, "+.4f", "-inf")
    return f"[{low}, {number_text(claim.high, '+.4f', 'inf')}]"


@dataclass(frozen=True)
class Column:
    """A column of the tables in Markdown and in a terminal.

    Attributes:
        title: Its heading; ``interval`` gets the confidence in front.
        text: What a row has in it.
        align: ``l`` for words, ``r`` for numbers.
        goes: When a terminal is too narrow, columns are left out in this order; 0: never.
    """

    title: str
    text: Callable[[Any], str]
    align: str = "r"
    goes: int = 0


#: Of `Difference`. CSV and JSON have its attributes.
DIFFERENCES = (
    Column("run", lambda row: row.run, "l"),
    Column("task", lambda row: row.task, "l"),
    Column("metric", lambda row: row.metric, "l", 9),
    Column("base", lambda row: f"{row.base_score:.4f}", goes=8),
    Column("score", lambda row: f"{row.score:.4f}"),
    Column("difference", lambda row: f"{row.difference:+.4f}"),
    Column("interval", lambda row: interval_text(row.low, row.high, 4)),
    Column("relative", lambda row: number_text(row.relative, "+.1%"), goes=2),
    Column("p", lambda row: p_text(row.p), goes=7),
    Column("q", lambda row: p_text(row.q), goes=10),
    Column(
        "smallest detectable",
        lambda row: number_text(row.smallest_detectable, ".4f"),
        goes=4,
    ),
    Column("documents", documents_text, goes=3),
    Column("test", lambda row: row.method, "l", 1),
    Column("verdict", lambda row: row.verdict, "l"),
)
#: Of `Claim`, which a row has where a margin was asked for; their place is before the documents.
CLAIMS = (
    Column(
        "margin", lambda row: f"{row.claim.margin:.4g}" if row.claim else "-", "r", 5
    ),
    Column("interval that decides", lambda row: _claimed(row.claim), "r", 6),
    Column("q margin", lambda row: p_text(row.claim and row.claim.q), "r", 5),
)
#: Of `TaskTrend`.
TRENDS = (
    Column("series", lambda each: each.series, "l"),
    Column("task", lambda each: each.task, "l"),
    Column("metric", lambda each: scale_name(each.metric), "l", 9),
    Column("n", lambda each: str(each.trend.n)),
    Column("slope", lambda each: f"{each.trend.slope:+.4f}"),
    Column("interval", lambda each: interval_text(each.trend.low, each.trend.high, 4)),
    Column("p", lambda each: p_text(each.trend.p), goes=7),
    Column("q", lambda each: p_text(each.q), goes=10),
    Column("documents", lambda each: str(each.trend.units or "-"), goes=3),
    Column("test", lambda each: each.trend.method, "l", 1),
)
#: Of `TaskCorrelation`.
CORRELATIONS = (
    Column("series", lambda pair: pair.series, "l"),
    Column("task", lambda pair: _scaled(*pair.tasks[0]), "l"),
    Column("task", lambda pair: _scaled(*pair.tasks[1]), "l"),
    Column("n", lambda pair: str(pair.correlation.n)),
    Column("Pearson r", lambda pair: number_text(pair.correlation.pearson, "+.3f")),
    Column(
        "interval",
        lambda pair: interval_text(
            pair.correlation.pearson_low, pair.correlation.pearson_high, 2
        ),
    ),
    Column("p both", lambda pair: p_text(pair.p)),
    Column("q", lambda pair: p_text(pair.q), goes=10),
)


def _scaled(task: str, metric: str) -> str:
    return f"{task} {scale_name(metric)}"


def _tables(comparison: Comparison) -> list[tuple[str, tuple[Column, ...], Sequence]]:
    """Return heading, columns and rows of each table; tables without rows are left out."""
    claims = CLAIMS if comparison.margin is not None else ()
    tables = [
        ("", (*DIFFERENCES[:-3], *claims, *DIFFERENCES[-3:]), comparison.rows),
        (TREND, TRENDS, comparison.trends),
        (CORRELATION, CORRELATIONS, comparison.correlations),
    ]
    interval = f"{1 - comparison.alpha:.0%} interval"
    return [
        (
            heading,
            tuple(
                replace(column, title=interval)
                if column.title == "interval"
                else column
                for column in columns
            ),
            rows,
        )
        for heading, columns, rows in tables
        if rows
    ]


def as_table(comparison: Comparison) -> str:
    """Return the comparison as Markdown tables for people."""
    header = (
        f"Compared with {comparison.base}; difference = run - base; q: p after "
        "Benjamini-Hochberg over the runs of each task, random controls apart, so of many tasks "
        "some may show a difference by chance; interval: widened as q is, so that it leaves out 0 "
        "exactly where a difference is shown; smallest detectable: "
        "with a chance of 80 % at the level that this leaves."
    )
    if not all(row.primary for row in comparison.rows):
        header += " Rows that are `restated` are other metrics of the same answers."
    if comparison.margin is not None:
        header += (
            f" Margin: {comparison.margin.text}; the interval that decides lies within it exactly "
            f"where {comparison.margin.verdict} is shown (two one-sided tests, q margin below "
            f"{comparison.alpha:g})."
        )
    parts = [header]
    for heading, columns, rows in _tables(comparison):
        cells = [[column.text(row) for column in columns] for row in rows]
        align = "".join(column.align for column in columns)
        titles = [column.title for column in columns]
        parts += [*([heading] if heading else []), markdown_table(titles, cells, align)]
    if comparison.notes:
        parts.append("\n".join(f"Note: {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def as_text(comparison: Comparison, width: int, *, everything: bool = False) -> str:
    """Return the comparison as aligned text for a terminal.

    Args:
        comparison: What is shown.
        width: Columns of the terminal. Columns of a table that do not fit are left out, the least
            important first.
        everything: Whether to show restated metrics, trends and correlations.
    """
    primary = tuple(row for row in comparison.rows if row.primary)
    counts = Counter(row.verdict for row in primary)
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    summary = f"{len(primary)} comparisons with {comparison.base}: {found}."
    if not everything:
        extras = {
            "metrics that restate the same answers": primary != comparison.rows,
            "trends": comparison.trends,
            "correlations": comparison.correlations,
        }
        left_out = [what for what, there in extras.items() if there]
        if left_out:
            summary += f" Left out (--all shows them): {', '.join(left_out)}."
        comparison = replace(comparison, rows=primary, trends=(), correlations=())
    parts = [summary]
    for heading, columns, rows in _tables(comparison):
        parts += [*([heading] if heading else []), _aligned(columns, rows, width)]
    parts += [f"Note: {note}" for note in comparison.notes]
    return (
        "\n\n".join(
            part if "\n" in part else textwrap.fill(part, width) for part in parts
        )
        + "\n"
    )


#: Columns of names, of which the last characters are shown where there are more.
_NAMES = ("run", "task", "series")
_LONGEST_NAME = 28
_SHORTEST_NAME = 8


def _aligned(columns: Sequence[Column], rows: Sequence[Any], width: int) -> str:
    table = [(each, [each.title, *map(each.text, rows)]) for each in columns]

    def lines(longest: int) -> list[str]:
        """Return the rows with columns of equal width, names cut at their front."""
        found = []
        for column, texts in table:
            if column.title in _NAMES:
                texts = [
                    text if len(text) <= longest else f"\u2026{text[1 - longest :]}"
                    for text in texts
                ]
            size = max(map(len, texts))
            pad = str.ljust if column.align == "l" else str.rjust
            found.append([pad(text, size) for text in texts])
        return ["  ".join(line) for line in zip(*found, strict=True)]

    longest = _LONGEST_NAME
    for goes in range(1, 1 + max(column.goes for column in columns)):
        if len(lines(longest)[0]) > width:
            table = [each for each in table if each[0].goes != goes]
    while longest > _SHORTEST_NAME and len(lines(longest)[0]) > width:
        longest -= 1
    return "\n".join(map(str.rstrip, lines(longest)))


#: Columns of the CSV on a margin, by their names in `Claim`.
_CLAIM = {
    "margin": "margin",
    "low": "margin_low",
    "high": "margin_high",
    "p": "p_margin",
    "q": "q_margin",
}


def as_csv(comparison: Comparison) -> str:
    """Return the table of differences as CSV with a header.

    The column ``of`` is there where a run stopped before its last document.
    """
    columns = [name for name in Difference.__dataclass_fields__ if name != "claim"]
    rows = [asdict(row) for row in comparison.rows]
    if all(row.of is None for row in comparison.rows):
        columns.remove("of")
    if comparison.margin is not None:
        place = columns.index("verdict") + 1
        columns[place:place] = _CLAIM.values()
    for row in rows:
        claim = row["claim"] or {}
        row |= {column: claim.get(name) for name, column in _CLAIM.items()}
    return csv_table(columns, [{name: row[name] for name in columns} for row in rows])


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    text = json.dumps(asdict(comparison))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2) + "\n"


FORMATS = {"markdown": as_table, "csv": as_csv, "json": as_json}
