"""A comparison as Markdown tables, CSV and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.compare.comparison import Comparison, Difference
from lm_eval_pruned.results.groups import scale_name
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def number_text(value: float | None, form: str, without: str = "-") -> str:
    """Return a number in the given format, or `without` one a dash."""
    return without if value is None else format(value, form)


def p_text(p: float | None) -> str:
    """Return a p value as tables show it."""
    return "<0.0001" if p is not None and p < 0.0001 else number_text(p, ".4f")


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
    """A column, aligned to the left (``l``) or right; a terminal shows those with `terminal`."""

    title: str
    text: Callable[[Any], str]
    align: str = "r"
    terminal: bool = False


def titles(columns: Sequence[Column], alpha: float) -> list[str]:
    """Return the headings of columns; an interval is told with its confidence."""
    interval = f"{1 - alpha:.0%} interval"
    return [interval if each.title == "interval" else each.title for each in columns]


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
    Column(
        "interval",
        lambda pair: interval_text(
            pair.correlation.pearson_low, pair.correlation.pearson_high, 2
        ),
    ),
)
DIFFERENCE = (
    "difference = run - base; q: p after Benjamini-Hochberg over the runs of each task, random "
    "controls apart, so of many tasks some may show a difference by chance; interval: widened as q "
    "is, so that it leaves out 0 exactly where a difference is shown; smallest detectable: with a "
    "chance of 80 % at the level that this leaves."
)
TREND = (
    "Trend over expansion ratios (change of the score per 1 of ratio, positive where it falls "
    "with pruning; slopes of single documents):"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (the interval takes the sizes for "
    "independent draws, which steps of pruning are not):"
)


def _scaled(task: str, metric: str) -> str:
    return f"{task} {scale_name(metric)}"


def as_table(
    comparison: Comparison, *, everything: bool = True, padded: bool = False
) -> str:
    """Return Markdown tables, `padded` for a terminal; without `everything`, those that fit one."""
    header = f"Compared with {comparison.base}; "
    tables: list[tuple[str, Sequence[Column], Sequence[Any]]]
    if not everything:
        header += "--all shows all columns, restated metrics, trends and correlations."
        few = [each for each in DIFFERENCES if each.terminal]
        tables = [("", few, [row for row in comparison.rows if row.primary])]
    else:
        header += DIFFERENCE
        if not all(row.primary for row in comparison.rows):
            header += " Rows that are `restated` are other metrics of the same answers."
        if margin := comparison.margin:
            header += (
                f" Margin: {margin.text}; {margin.verdict} is shown where q margin is below "
                f"{comparison.alpha:g} (two one-sided tests)."
            )
        tables = [
            ("", DIFFERENCES, comparison.rows),
            (TREND, TRENDS, comparison.trends),
            (CORRELATION, CORRELATIONS, comparison.correlations),
        ]
    parts = [header]
    for heading, columns, rows in tables:
        if comparison.margin is None:
            columns = [each for each in columns if "margin" not in each.title]
        cells = [[column.text(row) for column in columns] for row in rows]
        align = "".join(column.align for column in columns)
        if rows:
            heads = titles(columns, comparison.alpha)
            parts += [heading, markdown_table(heads, cells, align, padded=padded)]
    parts.append("\n".join(f"Note: {note}" for note in comparison.notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return the differences as CSV; of margins and partial documents where there are any."""
    names = [field.name for field in fields(Difference)][:-2]
    names += ["margin", "p_margin", "q_margin"] * (comparison.margin is not None)
    names += ["of"] * any(row.of is not None for row in comparison.rows)
    rows = []
    for row in comparison.rows:
        claim = row.claim and (row.claim.margin, row.claim.p, row.claim.q)
        margin = zip(
            ("margin", "p_margin", "q_margin"), claim or [None] * 3, strict=True
        )
        found = asdict(row) | dict(margin)
        rows.append({name: found[name] for name in names})
    return csv_table(names, rows)


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    text = json.dumps(asdict(comparison))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2) + "\n"


FORMATS = {"markdown": as_table, "csv": as_csv, "json": as_json}
