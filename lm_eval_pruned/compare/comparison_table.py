"""A comparison as Markdown tables, text for a terminal, CSV and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison_rows import Comparison, Difference
from lm_eval_pruned.results.series import scale_name
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison_rows import TaskCorrelation, TaskTrend
    from lm_eval_pruned.compare.margins import Claim


#: What the tables of trends and correlations show.
TREND = (
    "Trend over expansion ratios (change of the score per 1 of ratio, positive where it falls "
    "with pruning; slopes of single documents)"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (p of r and of rho take the sizes for "
    "independent draws, which steps of pruning are not; p both: both tasks have a trend)"
)


def as_table(comparison: Comparison) -> str:
    """Return the comparison as Markdown tables for people."""
    confidence = f"{1 - comparison.alpha:.0%}"
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
    parts = [header, markdown_table(*_differences(comparison, confidence))]
    if comparison.trends:
        trends = markdown_table(*_trends(comparison.trends, confidence))
        parts += [f"{TREND}:", trends]
    if comparison.correlations:
        pairs = markdown_table(*_correlations(comparison.correlations, confidence))
        parts += [f"{CORRELATION}:", pairs]
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
    confidence = f"{1 - comparison.alpha:.0%}"
    primary = tuple(row for row in comparison.rows if row.primary)
    counts = Counter(row.verdict for row in primary)
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    summary = f"{len(primary)} comparisons with {comparison.base}: {found}."
    left_out = [
        what
        for what, there in (
            ("metrics that restate the same answers", primary != comparison.rows),
            ("trends", comparison.trends),
            ("correlations", comparison.correlations),
        )
        if there and not everything
    ]
    if left_out:
        summary += f" Left out (--all shows them): {', '.join(left_out)}."
    shown = comparison if everything else replace(comparison, rows=primary)
    parts = [summary, _aligned(*_differences(shown, confidence), width)]
    if everything and comparison.trends:
        trends = _aligned(*_trends(comparison.trends, confidence), width)
        parts += [f"{TREND}:", trends]
    if everything and comparison.correlations:
        pairs = _aligned(*_correlations(comparison.correlations, confidence), width)
        parts += [f"{CORRELATION}:", pairs]
    parts += [f"Note: {note}" for note in comparison.notes]
    return (
        "\n\n".join(
            part if "\n" in part else textwrap.fill(part, width) for part in parts
        )
        + "\n"
    )


#: What a narrow terminal does not show, the first to go first.
_LEAST = (
    *("test", "relative", "documents", "smallest detectable", "margin", "q margin"),
    *("interval that decides", "p of rho", "Spearman rho", "p of r", "p", "base"),
    *("metric", "q"),
)
#: Columns of names, of which the last characters are shown where there are more.
_NAMES = ("run", "task", "series")
_LONGEST_NAME = 28
_SHORTEST_NAME = 8


def _aligned(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], align: str, width: int
) -> str:
    table = {
        place: [name, *(str(row[place]) for row in rows)]
        for place, name in enumerate(columns)
    }

    def shorten(longest: int) -> None:
        for place, cells in table.items():
            if columns[place] in _NAMES:
                table[place] = [
                    cell if len(cell) <= longest else f"\u2026{cell[1 - longest :]}"
                    for cell in cells
                ]

    def needed() -> int:
        return sum(max(map(len, cells)) + 2 for cells in table.values()) - 2

    shorten(_LONGEST_NAME)
    for name in _LEAST:
        if needed() <= width:
            break
        table = {k: cells for k, cells in table.items() if columns[k] != name}
    for longest in range(_LONGEST_NAME, _SHORTEST_NAME - 1, -1):
        if needed() <= width:
            break
        shorten(longest)
    for place, cells in table.items():
        side = "<" if align[place] == "l" else ">"
        size = max(map(len, cells))
        table[place] = [f"{cell:{side}{size}}" for cell in cells]
    return "\n".join(
        "  ".join(line).rstrip() for line in zip(*table.values(), strict=True)
    )


def _differences(
    comparison: Comparison, confidence: str
) -> tuple[list[str], list[list[str]], str]:
    with_margin = comparison.margin is not None
    return (
        ["run", "task", "metric", "base", "score", "difference"]
        + [f"{confidence} interval", "relative", "p", "q", "smallest detectable"]
        + (["margin", "interval that decides", "q margin"] if with_margin else [])
        + ["documents", "test", "verdict"],
        [
            [
                row.run,
                row.task,
                row.metric,
                f"{row.base_score:.4f}",
                f"{row.score:.4f}",
                f"{row.difference:+.4f}",
                interval_text(row.low, row.high, 4),
                number_text(row.relative, "+.1%"),
                p_text(row.p),
                p_text(row.q),
                number_text(row.smallest_detectable, ".4f"),
                *(_claim(row.claim) if with_margin else ()),
                documents_text(row),
                row.method,
                row.verdict,
            ]
            for row in comparison.rows
        ],
        "lllrrrrrrrr" + "rrr" * with_margin + "rll",
    )


def _claim(claim: Claim | None) -> tuple[str, str, str]:
    if claim is None:
        return "-", "-", "-"
    low, high = (
        number_text(end, "+.4f", no_end)
        for end, no_end in ((claim.low, "-inf"), (claim.high, "inf"))
    )
    return f"{claim.margin:.4g}", f"[{low}, {high}]", p_text(claim.q)


def _trends(
    trends: Sequence[TaskTrend], confidence: str
) -> tuple[list[str], list[list[Any]], str]:
    return (
        ["series", "task", "metric", "n", "slope", f"{confidence} interval", "p", "q"]
        + ["documents", "test"],
        [
            [
                each.series,
                each.task,
                scale_name(each.metric),
                each.trend.n,
                number_text(each.trend.slope, "+.4f"),
                interval_text(each.trend.low, each.trend.high, 4),
                p_text(each.trend.p),
                p_text(each.q),
                each.trend.units or "-",
                each.trend.method,
            ]
            for each in trends
        ],
        "lllrrrrrrl",
    )


def _correlations(
    pairs: Sequence[TaskCorrelation], confidence: str
) -> tuple[list[str], list[list[Any]], str]:
    rows = []
    for pair in pairs:
        found = pair.correlation
        rows.append(
            [
                pair.series,
                *(f"{task} {scale_name(metric)}" for task, metric in pair.tasks),
                found.n,
                number_text(found.pearson, "+.3f"),
                interval_text(found.pearson_low, found.pearson_high, 2),
                p_text(found.pearson_p),
                number_text(found.spearman, "+.3f"),
                p_text(found.spearman_p),
                p_text(pair.p),
                p_text(pair.q),
            ]
        )
    return (
        ["series", "task", "task", "n", "Pearson r", f"{confidence} interval", "p of r"]
        + ["Spearman rho", "p of rho", "p both", "q"],
        rows,
        "lllrrrrrrrr",
    )


def as_csv(comparison: Comparison) -> str:
    """Return the table of differences as CSV with a header.

    The column ``of`` is there where a run stopped before its last document.
    """
    apart = {"claim", "of"}
    columns = [name for name in Difference.__dataclass_fields__ if name not in apart]
    rows = [asdict(row) for row in comparison.rows]
    if comparison.margin is not None:
        columns += _CLAIM.values()
    partial = any(row.of is not None for row in comparison.rows)
    if partial:
        columns.append("of")
    for row in rows:
        claim = row.pop("claim") or {}
        if not partial:
            del row["of"]
        if comparison.margin is not None:
            row |= {column: claim.get(name) for name, column in _CLAIM.items()}
    return csv_table(columns, rows)


#: Columns of the CSV on a margin, by their names in `Claim`.
_CLAIM = {
    "margin": "margin",
    "low": "margin_low",
    "high": "margin_high",
    "p": "p_margin",
    "q": "q_margin",
}


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    return json.dumps(_finite(asdict(comparison)), indent=2, allow_nan=False) + "\n"


FORMATS = {"markdown": as_table, "csv": as_csv, "json": as_json}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def documents_text(row: Difference) -> str:
    """Return how many documents a row is of, and of how many where it is partial."""
    if row.of is not None:
        return f"partial: {row.documents} of {row.of}"
    return str(row.documents or "-")


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
