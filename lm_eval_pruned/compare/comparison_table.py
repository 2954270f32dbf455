"""A comparison as Markdown tables, text for a terminal, CSV and JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.compare.comparison import Comparison, Difference
from lm_eval_pruned.results.groups import scale_name
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.compare.trends import Correlation


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


class Column(NamedTuple):
    """A column of the tables in Markdown and in a terminal.

    ``interval`` gets the confidence in front. Words are aligned to the left (``l``), numbers to
    the right. A terminal, which is narrow, shows those with `terminal`.
    """

    title: str
    text: Callable[[Any], str]
    align: str = "r"
    terminal: bool = False


#: Of `Difference`. CSV and JSON have its attributes.
DIFFERENCES = (
    Column("run", lambda row: row.run, "l", True),
    Column("task", lambda row: row.task, "l", True),
    Column("metric", lambda row: row.metric, "l"),
    Column("base", lambda row: f"{row.base_score:.4f}"),
    Column("score", lambda row: f"{row.score:.4f}", terminal=True),
    Column("difference", lambda row: f"{row.difference:+.4f}", terminal=True),
    Column("interval", lambda row: interval_text(row.low, row.high, 4), terminal=True),
    Column("relative", lambda row: number_text(row.relative, "+.1%")),
    Column("p", lambda row: p_text(row.p)),
    Column("q", lambda row: p_text(row.q), terminal=True),
    Column("smallest detectable", lambda r: number_text(r.smallest_detectable, ".4f")),
    Column("margin", lambda row: f"{row.claim.margin:.4g}" if row.claim else "-"),
    Column("q margin", lambda row: p_text(row.claim and row.claim.q)),
    Column("documents", documents_text),
    Column("test", lambda row: row.method, "l"),
    Column("verdict", lambda row: row.verdict, "l", True),
)
#: Of `TaskTrend`.
TRENDS = (
    Column("series", lambda each: each.series, "l"),
    Column("task", lambda each: each.task, "l"),
    Column("metric", lambda each: scale_name(each.metric), "l"),
    Column("n", lambda each: str(each.trend.n)),
    Column("slope", lambda each: f"{each.trend.slope:+.4f}"),
    Column("interval", lambda each: interval_text(each.trend.low, each.trend.high, 4)),
    Column("p", lambda each: p_text(each.trend.p)),
    Column("q", lambda each: p_text(each.q)),
    Column("documents", lambda each: str(each.trend.units or "-")),
    Column("test", lambda each: each.trend.method, "l"),
)
#: Of `TaskCorrelation`.
CORRELATIONS = (
    Column("series", lambda pair: pair.series, "l"),
    Column("task", lambda pair: _scaled(*pair.tasks[0]), "l"),
    Column("task", lambda pair: _scaled(*pair.tasks[1]), "l"),
    Column("n", lambda pair: str(pair.correlation.n)),
    Column("Pearson r", lambda pair: number_text(pair.correlation.pearson, "+.3f")),
    Column("interval", lambda pair: _fisher(pair.correlation)),
)
TREND = (
    "Trend over expansion ratios (change of the score per 1 of ratio, positive where it falls "
    "with pruning; slopes of single documents):"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (the interval takes the sizes for "
    "independent draws, which steps of pruning are not):"
)


def _fisher(found: Correlation) -> str:
    return interval_text(found.pearson_low, found.pearson_high, 2)


def _scaled(task: str, metric: str) -> str:
    return f"{task} {scale_name(metric)}"


def _tables(comparison: Comparison, *, everything: bool = True) -> list[list[Any]]:
    """Return heading, titles, cells and letters of alignment of each table that has rows."""
    found: list[list[Any]] = []
    for heading, columns, rows in (
        ("", DIFFERENCES, comparison.rows),
        (TREND, TRENDS, comparison.trends),
        (CORRELATION, CORRELATIONS, comparison.correlations),
    ):
        shown = [
            column
            for column in columns
            if (comparison.margin or "margin" not in column.title)
            and (everything or column.terminal)
        ]
        interval = f"{1 - comparison.alpha:.0%} interval"
        titles = [interval if c.title == "interval" else c.title for c in shown]
        cells = [[column.text(row) for column in shown] for row in rows]
        if rows:
            found.append([heading, titles, cells, "".join(c.align for c in shown)])
    return found


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
            f" Margin: {comparison.margin.text}; {comparison.margin.verdict} is shown where "
            f"q margin is below {comparison.alpha:g} (two one-sided tests)."
        )
    parts = [header]
    for heading, *table in _tables(comparison):
        parts += [*([heading] if heading else []), markdown_table(*table)]
    if comparison.notes:
        parts.append("\n".join(f"Note: {note}" for note in comparison.notes))
    return "\n\n".join(parts) + "\n"


def as_text(comparison: Comparison, width: int, *, everything: bool = False) -> str:
    """Return the comparison as aligned text for a terminal of `width` columns.

    `everything` adds the columns that a narrow terminal has no room for, restated metrics, trends
    and correlations.
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
    parts = [textwrap.fill(summary, width)]
    for heading, titles, cells, align in _tables(comparison, everything=everything):
        columns = []
        for letter, *texts in zip(align, titles, *cells, strict=True):
            if not everything:
                # Of long names the end says more.
                texts = [t if len(t) < 29 else f"\u2026{t[-27:]}" for t in texts]
            pad = str.ljust if letter == "l" else str.rjust
            columns.append([pad(text, max(map(len, texts))) for text in texts])
        lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
        parts += [*([heading] if heading else []), "\n".join(lines)]
    parts += [textwrap.fill(f"Note: {note}", width) for note in comparison.notes]
    return "\n\n".join(parts) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return the table of differences as CSV with a header.

    The column ``of`` is there where a run stopped before its last document, and those of the margin
    where one was asked for.
    """
    left_out = {"claim"}
    if comparison.margin is None:
        left_out |= {"margin", "p_margin", "q_margin"}
    if all(row.of is None for row in comparison.rows):
        left_out.add("of")
    names = [field.name for field in fields(Difference)]
    names[-1:] = ["margin", "p_margin", "q_margin", "of"]
    columns = [name for name in names if name not in left_out]
    rows = [asdict(row) for row in comparison.rows]
    for row in rows:
        claim = row["claim"] or dict.fromkeys(("margin", "p", "q"))
        row |= {
            "margin": claim["margin"],
            "p_margin": claim["p"],
            "q_margin": claim["q"],
        }
    return csv_table(columns, [{name: row[name] for name in columns} for row in rows])


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    text = json.dumps(asdict(comparison))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2) + "\n"


FORMATS = {"markdown": as_table, "csv": as_csv, "json": as_json}
